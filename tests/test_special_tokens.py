"""Special tokens around documents, against the ids of transformers for the post-processors of five families."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from actstore.errors import InputError, UnknownNameError
from extract.special_tokens import BOS, EOS, SpecialTokens, named_tokens, special_tokens

TEXTS = ["", "a", "Grüße 😀", " two words\n", "a<s>b", "<s>a</s>"]
START, END = "<s>", "</s>"


def engine_of(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer with the bytes as tokens, built as those of a family are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", START, END, "<pad>", "[CLS]", "[SEP]"]
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate([*names, *letters])}, merges=[], unk_token="<unk>"
        )
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    before = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, 1)]
    )
    if kind == "gemma":
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("▁", "merged_with_previous"), engine.pre_tokenizer]
        )
        engine.normalizer = normalizers.Replace(" ", "▁")
        engine.post_processor = before
    elif kind == "llama":
        engine.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), before])
    elif kind in ("qwen", "gpt2"):
        engine.post_processor = processors.ByteLevel(trim_offsets=kind == "gpt2")
    elif kind == "bert":
        engine.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    elif kind == "glm":
        engine.post_processor = processors.TemplateProcessing(
            single=f"[CLS] {START} $A", special_tokens=[("[CLS]", 4), (START, 1)]
        )
    return engine


PREFIXES = {"llama": (1,), "gemma": (1,), "qwen": (), "gpt2": (), "none": (), "bert": (4,), "glm": (4, 1)}


def saved(folder: Path, engine: tokenizers.Tokenizer, **config: Any) -> Path:
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("claims", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=["", "add", "do not"])
@pytest.mark.parametrize("kind", list(PREFIXES))
def test_the_models_own_are_those_of_transformers(tmp_path: Path, kind: str, claims: dict[str, bool]) -> None:
    engine = engine_of(kind)
    folder = saved(tmp_path, engine, bos_token=START, eos_token=END, **claims)
    original = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = special_tokens(folder, engine)
    assert found.prefix == PREFIXES[kind]
    assert found.suffix == ()
    for text in TEXTS:
        ids = original(text)["input_ids"]
        if kind == "bert":
            assert ids.pop() == 5  # what its model has after a text is no matter of BOS
        before, after = found.around(engine.encode(text, add_special_tokens=False).ids)
        assert [*before, *engine.encode(text, add_special_tokens=False).ids, *after] == ids


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_is_no_prefix(tmp_path: Path, direction: str) -> None:
    engine = engine_of("llama")
    engine.enable_padding(direction=direction, pad_id=3, pad_token="<pad>", length=8)
    assert special_tokens(saved(tmp_path, engine), engine).prefix == (1,)


def test_a_tokenizer_that_drops_letters(tmp_path: Path) -> None:
    digits = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "0": 1}, merges=[]))
    digits.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert special_tokens(saved(tmp_path, digits), digits).prefix == (0,)
    nothing = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0}, merges=[]))
    with pytest.raises(
        InputError, match=r"no tokens for any of 'a', '0', ' ', '\\n', so what .* say --bos never or --bos"
    ):
        special_tokens(tmp_path, nothing)


POLICIES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "default": ({}, (1,), ()),
    "never": ({"bos": "never"}, (), ()),
    "always": ({"bos": "always"}, (1,), ()),
    "end": ({"bos": "never", "eos": "always"}, (), (2,)),
    "both": ({"bos": "always", "eos": "always"}, (1,), (2,)),
    "rendered": ({"rendered": True}, (), ()),
    "rendered, never": ({"rendered": True, "bos": "never"}, (), ()),
    "rendered, always": ({"rendered": True, "bos": "always", "eos": "always"}, (1,), (2,)),
}


@pytest.mark.parametrize("case", list(POLICIES))
def test_policies(tmp_path: Path, case: str) -> None:
    options, prefix, suffix = POLICIES[case]
    engine = engine_of("llama")
    found = special_tokens(saved(tmp_path, engine, bos_token=START, eos_token=END), engine, **options)
    assert (found.prefix, found.suffix) == (prefix, suffix)
    recorded = json.loads(json.dumps(found.provenance()))
    assert recorded == {"bos": "model", "eos": "never", "rendered": False} | options | {
        "prefix": list(prefix), "suffix": list(suffix),
    }  # fmt: skip


def test_a_model_without_one_takes_that_of_another_only_when_asked(tmp_path: Path) -> None:
    """GPT-2 has a BOS that its own tokenizer does not write."""
    engine = engine_of("gpt2")
    folder = saved(tmp_path, engine, bos_token={"content": END, "lstrip": False}, eos_token=END)
    assert special_tokens(folder, engine).prefix == ()
    assert special_tokens(folder, engine, bos="always").prefix == (2,)


AROUND: dict[str, tuple[bool, list[int], list[int]]] = {
    "a text": (False, [7, 8], [1, 7, 8, 2]),
    "a text that names them": (False, [1, 7, 2], [1, 1, 7, 2, 2]),
    "a chat without": (True, [7, 8], [1, 7, 8, 2]),
    "a chat with both": (True, [1, 7, 2], [1, 7, 2]),
    "a chat with the first": (True, [1, 7], [1, 7, 2]),
    "in the middle": (True, [7, 1, 2, 8], [1, 7, 1, 2, 8, 2]),
    "nothing": (True, [], [1, 2]),
}


@pytest.mark.parametrize("case", list(AROUND))
@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_never_twice(case: str, kind: Any) -> None:
    rendered, ids, whole = AROUND[case]
    before, after = SpecialTokens((1,), (2,), "always", "always", rendered).around(
        kind(ids, *([np.int32] * (kind is np.array)))
    )
    assert [*before, *ids, *after] == whole


def test_nothing_is_put_around_by_default() -> None:
    assert SpecialTokens(rendered=True).around([5]) == ((), ())


ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], type[InputError], str]] = {
    "no bos": (
        {"bos_token": None}, {"bos": "always"}, InputError,
        r"^the tokenizer in .* has no bos_token; expected one in tokenizer_config.json for --bos always; leave it out,",
    ),
    "no eos": ({}, {"eos": "always"}, InputError, "has no eos_token; expected one in tokenizer_config.json for --eos"),
    "no token": (
        {"bos_token": "<b>"}, {"bos": "always"}, InputError,
        r"^the bos_token '<b>' of .*_config.json is no token of tokenizer.json; expected one of its tokens; take both",
    ),
    "bos": ({}, {"bos": "sometimes"}, UnknownNameError, "^bos is 'sometimes'; expected one of never, always, model;"),
    "eos": ({}, {"eos": "model"}, UnknownNameError, "^eos is 'model'; expected one of never, always; give one"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors(tmp_path: Path, case: str) -> None:
    config, options, kind, message = ERRORS[case]
    engine = engine_of("qwen")
    with pytest.raises(kind, match=message):
        special_tokens(saved(tmp_path, engine, **config), engine, **options)


def test_the_policies_that_are_offered_exist(tmp_path: Path) -> None:
    engine = engine_of("llama")
    folder = saved(tmp_path, engine, bos_token=START, eos_token=END)
    for bos in BOS:
        for eos in EOS:
            found = special_tokens(folder, engine, bos=bos, eos=eos)
            assert (found.bos, found.eos) == (bos, eos)
    assert dataclasses.is_dataclass(found)


def test_a_folder_without_a_configuration_names_no_tokens(tmp_path: Path) -> None:
    assert named_tokens(tmp_path) == {}
