"""Tokenisation against the tokenizer used directly, and spans against the source text."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from actstore.errors import InputError
from extract import tokenising, tokens
from extract.documents import Document
from extract.named import model_folder
from extract.tokenising import digest, tokenise

TINY = model_folder("tiny-qwen2")

TEXTS = {
    "ascii": "def f(x):\n    return x + 1\n",
    "two bytes": "Grüße aus Köln, señor",
    "three bytes": "数据 and 漢字",
    "four bytes": "a 😀 b 🜁",
    "spaces": "   leading\t\ttabs  and trailing   ",
}


@pytest.fixture(scope="module")
def tokenizer() -> tokens.Tokenizer:
    return tokens.load_tokenizer(TINY)


def documents(texts: dict[str, str], **columns: object) -> list[Document]:
    return [Document(name, text, dict(columns), f"test:{name}") for name, text in texts.items()]  # type: ignore[arg-type]


def test_ids_are_those_of_the_tokenizer(tokenizer: tokens.Tokenizer) -> None:
    plain = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    table = tokenise(documents(TEXTS), tokenizer)
    expected = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS.values()]
    assert table.token_id.tolist() == [token for ids in expected for token in ids]
    assert np.diff(table.token_offsets).tolist() == [len(ids) for ids in expected]


@pytest.mark.parametrize("name", list(TEXTS))
def test_spans_cover_the_text_and_hold_whole_characters(tokenizer: tokens.Tokenizer, name: str) -> None:
    table = tokenise(documents({name: TEXTS[name]}), tokenizer)
    raw = TEXTS[name].encode()
    spans = list(zip(table.token_start.tolist(), table.token_end.tolist(), strict=True))
    assert {byte for start, end in spans for byte in range(start, end)} == set(range(len(raw)))
    assert "".join(dict.fromkeys(raw[start:end].decode() + f"\0{start}" for start, end in spans)).replace("\0", "")
    for token, (start, end) in zip(table.token_id.tolist(), spans, strict=True):
        decoded = tokenizer.engine.decode([token])
        assert "\ufffd" in decoded or raw[start:end].decode() == decoded


def test_batches_of_documents_change_nothing(tokenizer: tokens.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenise(documents(TEXTS), tokenizer)
    monkeypatch.setattr(tokenising, "_DOCUMENTS_AT_ONCE", 2)
    seen: list[tuple[int, int]] = []
    parts = tokenise(documents(TEXTS), tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert parts.token_id.tolist() == whole.token_id.tolist()
    assert digest(parts) == digest(whole)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_digest_depends_on_ids_texts_and_tokens(tokenizer: tokens.Tokenizer) -> None:
    tables = [
        tokenise(documents(texts), tokenizer)
        for texts in ({"a": "one", "b": "two"}, {"a": "one", "c": "two"}, {"a": "one", "b": "three"}, {"ab": "one"})
    ]
    assert len({digest(table) for table in tables}) == 4


def test_columns_are_kept(tokenizer: tokens.Tokenizer) -> None:
    table = tokenise(documents({"a": "one", "b": "two"}, kind="x", year=1999, score=0.5), tokenizer)
    assert {name: list(values) for name, values in table.columns.items()} == {
        "read_from": ["test:a", "test:b"], "kind": ["x", "x"], "year": [1999, 1999], "score": [0.5, 0.5],
    }  # fmt: skip


def test_a_missing_column_is_refused_by_name(tokenizer: tokens.Tokenizer) -> None:
    ragged = [Document("a", "one", {"kind": "x"}, "f.jsonl:1"), Document("b", "two", {}, "f.jsonl:2")]
    with pytest.raises(InputError, match=r"document 'b' \(f.jsonl:2\) has no field 'kind', which f.jsonl:1 has"):
        tokenise(ragged, tokenizer)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer.json; expected a HuggingFace model folder"):
        tokens.load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer \("):
        tokens.load_tokenizer(tmp_path)
