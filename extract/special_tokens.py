"""Tokens that stand around a text: what a tokenizer calls them, and which of them every document gets."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from actstore.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    import tokenizers

CONFIG = "tokenizer_config.json"
Bos = Literal["never", "always", "model"]
Eos = Literal["never", "always"]
BOS: tuple[Bos, ...] = ("never", "always", "model")
EOS: tuple[Eos, ...] = ("never", "always")

_MAP = "special_tokens_map.json"  # of folders that were saved before transformers 4.34
_SAMPLES = ("a", "0", " ", "\n")  # one of them has a token in every tokenizer of a language model


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The token ids that go before and after every document.

    Attributes:
        prefix: Ids before each document, none or one for most models.
        suffix: Ids after each document.
        bos: The policy that `prefix` follows from.
        eos: The policy that `suffix` follows from.
        rendered: The documents are chats that a template wrote, special tokens included: none is put where the text
            has it already.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos: Bos = "never"
    eos: Eos = "never"
    rendered: bool = False

    def around(self, ids: Sequence[int] | Int[np.ndarray, " token"]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What goes before and what goes after a document with these token ids."""
        before, after = self.prefix, self.suffix
        if self.rendered and tuple(ids[: len(before)]) == before:
            before = ()
        if self.rendered and tuple(ids[max(len(ids) - len(after), 0) :]) == after:
            after = ()
        return before, after

    def provenance(self) -> dict[str, Any]:
        """Policies and ids for the plan: JSON values, equal for equal treatment of the documents."""
        return dataclasses.asdict(self) | {"prefix": list(self.prefix), "suffix": list(self.suffix)}


def special_tokens(
    folder: str | Path,
    engine: "tokenizers.Tokenizer",
    *,
    bos: Bos = "model",
    eos: Eos = "never",
    rendered: bool = False,
) -> SpecialTokens:
    """Decides which tokens every document gets.

    Args:
        folder: Of the tokenizer. Its `tokenizer_config.json` says which tokens `bos_token` and `eos_token` are.
        engine: Its `tokenizer.json`.
        bos: What goes before a document. `model`: what the tokenizer itself puts before a text, by the post-processor
            in `tokenizer.json`; this is what transformers 5 does, which does not read `add_bos_token` where there is a
            `tokenizer.json`. Llama and Gemma have a token there, Qwen and GPT-2 have none. `always`: `bos_token`.
        eos: What goes after a document. `always`: `eos_token`.
        rendered: The documents are rendered chats. `model` then adds nothing, as in transformers: the template has
            written what the model wants. `always` adds a token only where it is not the first, or last, one already;
            a line break that a template writes after its last `eos_token` counts as text.

    Costs the tokenisation of one letter.

    Raises:
        UnknownNameError: A policy that does not exist.
        InputError: The tokenizer has no such token.
    """
    for name, value, known in (("bos", bos, BOS), ("eos", eos, EOS)):
        if value not in known:
            raise UnknownNameError(f"{name} is {value!r}; expected one of {', '.join(known)}; give one of these")
    prefix: tuple[int, ...] = ()
    if bos == "always":
        prefix = (_named_id(folder, engine, "bos"),)
    elif bos == "model" and not rendered:
        prefix = _own_prefix(engine)
    suffix = (_named_id(folder, engine, "eos"),) if eos == "always" else ()
    return SpecialTokens(prefix, suffix, bos, eos, rendered)


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """The object in `tokenizer_config.json`; an empty one where there is no such file.

    Raises:
        InputError: It is not a JSON object.
    """
    return _read_object(Path(folder) / CONFIG)


def named_tokens(folder: str | Path) -> dict[str, str]:
    """Texts of the special tokens that a tokenizer's folder names: `{"bos_token": "<s>", ...}`.

    Those that are null are left out, so that a chat template finds them undefined, as it does with transformers.

    Raises:
        InputError: A file is not a JSON object, or a token is not a text.
    """
    config = read_tokenizer_config(folder)
    older = {} if "added_tokens_decoder" in config else _read_object(Path(folder) / _MAP)
    extra = config.get("extra_special_tokens")
    named = config | older | (extra if isinstance(extra, dict) else {})
    found = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if not name.endswith("_token") or text is None or isinstance(text, bool):
            continue  # other settings, such as add_bos_token
        if not isinstance(text, str):
            raise InputError(
                f"{Path(folder) / CONFIG} has {name} {value!r}; expected a text, or null; mend the file, or "
                "fetch it again"
            )
        found[name] = text
    return found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); expected an object; fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected a JSON object; fetch the file again")
    return value


def _named_id(folder: str | Path, engine: "tokenizers.Tokenizer", kind: Literal["bos", "eos"]) -> int:
    text = named_tokens(folder).get(f"{kind}_token")
    if text is None:
        raise InputError(
            f"the tokenizer in {folder} has no {kind}_token; expected one in {CONFIG} for --{kind} always; "
            f"leave it out, or name the token there"
        )
    number = engine.token_to_id(text)
    if number is None:
        raise InputError(
            f"the {kind}_token {text!r} of {Path(folder) / CONFIG} is no token of tokenizer.json; expected one of its "
            "tokens; take both files from the same model"
        )
    return int(number)


def _own_prefix(engine: "tokenizers.Tokenizer") -> tuple[int, ...]:
    """Ids that the post-processor puts before a single text."""
    for sample in _SAMPLES:
        encoding = engine.encode(sample)
        owners = encoding.sequence_ids
        if 0 in owners:
            before = owners.index(0)
            kept = encoding.attention_mask  # a file may ask for padding, which may be on the left
            return tuple(int(encoding.ids[place]) for place in range(before) if kept[place])
    raise InputError(
        f"the tokenizer has no tokens for any of {', '.join(map(repr, _SAMPLES))}, so what it puts before a text "
        "cannot be seen; expected a tokenizer of a language model; say --bos never or --bos always"
    )
