"""Documents: every reader against the standard library, and every error message."""

import inspect
import json
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from actstore.errors import InputError
from extract.documents import Document, open_documents, python_docs, read_jsonl, read_text


def _written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# JSONL


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"}', Document("x.jsonl:1", "a", {}, "x.jsonl:1")),
        ('{"id": "d7", "text": "a"}', Document("d7", "a", {}, "x.jsonl:1")),
        ('{"id": 7, "text": "a"}', Document("7", "a", {}, "x.jsonl:1")),
        ('\ufeff{"text": "a"}', Document("x.jsonl:1", "a", {}, "x.jsonl:1")),
        ("\n  \n" + '{"text": "a"}', Document("x.jsonl:3", "a", {}, "x.jsonl:3")),
        ('{"text": "é\\n\\ud83d\\ude00"}', Document("x.jsonl:1", "é\n😀", {}, "x.jsonl:1")),
        (
            '{"text": "a", "n": 3, "x": 0.5, "s": "q", "yes": true, "none": null, "list": [1], "object": {}}',
            Document("x.jsonl:1", "a", {"n": 3, "x": 0.5, "s": "q", "yes": 1}, "x.jsonl:1"),
        ),
    ],
    ids=["no-id", "string-id", "integer-id", "byte-order-mark", "blank-lines", "escapes", "columns"],
)
def test_a_jsonl_line_becomes_a_document(tmp_path, line, expected):
    path = _written(tmp_path / "x.jsonl", line + "\n")
    (document,) = read_jsonl(path)
    assert document == expected
    assert not any(isinstance(value, bool) for value in document.columns.values())
    assert open_documents(str(path)) == [expected]


def test_jsonl_fields_can_be_renamed(tmp_path):
    path = _written(tmp_path / "x.jsonl", '{"body": "a", "key": "k", "id": "other", "text": "t"}')
    (document,) = read_jsonl(path, text_field="body", id_field="key")
    assert document == Document("k", "a", {"id": "other", "text": "t"}, "x.jsonl:1")


def test_jsonl_is_read_as_it_is_asked_for(tmp_path):
    path = _written(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert [document.text for document in open_documents(str(path), limit=2)] == ["a", "b"]
    with pytest.raises(InputError, match=r"x\.jsonl:3 is not JSON"):
        open_documents(str(path), limit=3)


BAD_LINES = {
    "not-json": ('{"text": "a"', "x.jsonl:2 is not JSON (", "one JSON object on the line", "Correct the line"),
    "deep": ("[" * 100_000, "x.jsonl:2 is not JSON (", "one JSON object on the line", "Correct the line"),
    "long-number": ('{"n": ' + "1" * 5000 + "}", "x.jsonl:2 is not JSON (", "one JSON object", "Correct the line"),
    "not-object": ("[1]", "x.jsonl:2 holds a JSON list", "an object such as", "Wrap the value"),
    "no-text": (
        '{"txt": "a", "id": "q"}',
        "x.jsonl:2 has no field 'text', only ['id', 'txt']",
        "expected the text there",
        "Rename the field",
    ),
    "number-text": ('{"text": 5}', "x.jsonl:2, field 'text', holds a int", "expected a string", "Write the text in"),
    "null-text": ('{"text": null}', "x.jsonl:2, field 'text', holds a NoneType", "expected a string", "Write"),
    "empty-text": ('{"text": ""}', "x.jsonl:2, field 'text', holds an empty text", "at least one", "Drop this"),
    "blank-text": ('{"text": " \\n"}', "x.jsonl:2, field 'text', holds an empty text", "at least one", "Drop this"),
    "surrogate": ('{"text": "\\ud800"}', "x.jsonl:2, field 'text', holds half of a surrogate", "whole", "Remove"),
    "list-id": ('{"text": "a", "id": [1]}', "x.jsonl:2 has [1] in 'id'", "a string or an integer", "Correct or drop"),
    "bool-id": ('{"text": "a", "id": true}', "x.jsonl:2 has True in 'id'", "a string or an integer", "Correct or drop"),
    "not-utf8": (b'{"text": "\xff"}', "x.jsonl:2 has the byte 0xff at offset 10", "expected UTF-8", "Convert"),
    "same-id": (
        '{"text": "b", "id": "first"}',
        "The id 'first' stands at x.jsonl:1 and again at x.jsonl:2",
        "expected every id once",
        "Rename one",
    ),
}


@pytest.mark.parametrize(("line", "found", "expected", "remedy"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(tmp_path, line, found, expected, remedy):
    good = b'{"text": "a", "id": "first"}\n'
    path = _written(tmp_path / "x.jsonl", good + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(InputError) as caught:
        open_documents(str(path))
    parts = [str(caught.value).find(part) for part in (found, expected, remedy)]
    assert parts[0] == 0
    assert parts == sorted(parts), f"out of order or missing in: {caught.value}"


# Text files


def test_a_text_file_is_one_document(tmp_path):
    path = _written(tmp_path / "a.txt", "\ufeffline one\nline two\n")
    assert open_documents(str(path)) == [Document("a.txt", "line one\nline two\n", {}, "a.txt")]


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    names = ["b.txt", "a.md", "sub/c.rst", "sub/a.txt", "skipped.py", ".hidden.txt", ".git/notes.md", "sub/.x/y.md"]
    for name in names:
        _written(tmp_path / name, f"text of {name}")
    (tmp_path / "folder.txt").mkdir()
    documents = list(read_text(tmp_path))
    assert [document.id for document in documents] == ["a.md", "b.txt", "sub/a.txt", "sub/c.rst"]
    assert all(document.text == f"text of {document.id}" for document in documents)
    assert [document.id for document in open_documents(str(tmp_path), limit=1)] == ["a.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "sub/a.txt holds an empty text; expected at least one visible character. Drop this document."),
        (
            b"ab\xe9",
            (
                "sub/a.txt has the byte 0xe9 at offset 2, which is not UTF-8; expected UTF-8 text. "
                "Convert the file, for example with iconv."
            ),
        ),
    ],
    ids=["empty", "latin-1"],
)
def test_a_bad_text_file_is_named(tmp_path, content, message):
    _written(tmp_path / "sub" / "a.txt", content)
    with pytest.raises(InputError) as caught:
        open_documents(str(tmp_path))
    assert str(caught.value) == message


# The front door


def test_an_unknown_ending_says_what_is_accepted(tmp_path):
    path = _written(tmp_path / "x.csv", "a,b")
    with pytest.raises(InputError) as caught:
        open_documents(str(path))
    assert str(caught.value) == (
        f"{path} ends in '.csv'; expected .jsonl, .ndjson, .txt, .md or .rst, a folder of text files or 'python-docs'. "
        "Convert the file to JSONL: one object per line, with a string field 'text'."
    )


def test_a_missing_source_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_documents("nothing.jsonl")
    assert str(caught.value) == (
        "There is nothing at nothing.jsonl; expected a file, a folder or 'python-docs'. "
        f"Check the path (the working folder is {tmp_path})."
    )


@pytest.mark.parametrize("reader", [read_jsonl, read_text])
def test_a_reader_names_a_file_that_is_not_there(tmp_path, reader):
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(
        InputError, match=re.escape(f"{missing} cannot be opened (No such file or directory); expected")
    ):
        list(reader(missing))


@pytest.mark.parametrize("name", ["empty.jsonl", "folder"])
def test_a_source_without_documents_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        _written(path, "\n\n")
    else:
        _written(path / "code.py", "pass")
    with pytest.raises(InputError) as caught:
        open_documents(str(path))
    assert str(caught.value) == (
        f"{path} holds no documents; expected at least one. A folder needs files that end in .txt, .md or .rst, "
        "a JSONL file one JSON object per line."
    )


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match=f"limit is {limit}; expected at least 1, or None for all documents. Leave it"):
        open_documents("python-docs", limit=limit)


# Python's own documentation


@pytest.fixture(scope="module")
def docs() -> dict[str, Document]:
    return {document.id: document for document in open_documents("python-docs")}


def test_topics_are_those_of_help(docs):
    found = {name.removeprefix("topics/"): doc.text for name, doc in docs.items() if name.startswith("topics/")}
    assert set(found.values()) == set(topics.values())
    assert all(topics[name] == text for name, text in found.items())
    assert docs["topics/assert"].source == "pydoc_data.topics:assert"


@pytest.mark.parametrize(
    ("identifier", "item"),
    [
        ("docstring/json", json),
        ("docstring/json.decoder/JSONDecoder", json.JSONDecoder),
        ("docstring/json.decoder/JSONDecoder.raw_decode", json.JSONDecoder.raw_decode),
        ("docstring/inspect/getdoc", inspect.getdoc),
    ],
    ids=["package", "class", "method", "function"],
)
def test_docstrings_are_those_of_inspect(docs, identifier, item):
    assert docs[identifier].text == inspect.getdoc(item)
    assert docs[identifier].columns == {"kind": "docstring"}


def test_a_docstring_source_points_at_its_definition(docs):
    _, line = inspect.getsourcelines(inspect.getdoc)
    assert docs["docstring/inspect/getdoc"].source == f"inspect.py:{line}"


def test_the_docs_are_clean(docs):
    texts = [document.text for document in docs.values()]
    assert len(texts) == len(set(texts)) > 3000
    docstrings = [document for document in docs.values() if document.columns["kind"] == "docstring"]
    assert min(len(document.text) for document in docstrings) == 61
    skipped = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages)/")
    assert not [document.source for document in docstrings if skipped.search(document.source)]
    library = sysconfig.get_path("stdlib")
    assert not [document for document in docs.values() if library in document.source or library in document.id]
    "".join(texts).encode("utf-8")


def test_the_docs_come_in_the_same_order_every_time(docs):
    again = [document.id for document, _ in zip(python_docs(), range(1000), strict=False)]
    assert again == list(docs)[:1000]
