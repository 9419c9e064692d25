"""Documents: every reader against the standard library, and every error message."""

import datetime as dt
import gzip
import inspect
import json
import os
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import InputError
from extract.documents import Document, Fields, Problem
from extract.lines import Broken, read_lines
from extract.python_docs import python_docs
from extract.readers import read_jsonl, read_parquet, read_records, read_text
from extract.seen import Seen
from extract.sources import Documents, open_documents


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
    (document,) = read_jsonl(path, Fields(text="body", id="key"))
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
    "twice": ('{"text": "a", "n": 1, "n": 2}', "x.jsonl:2 has the field 'n' twice", "every field once", "Drop one of"),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "x.jsonl:2 has NUL bytes, as UTF-16", "in UTF-8", "Convert"),
    "empty-id": ('{"text": "a", "id": " "}', "x.jsonl:2 has an empty text in 'id'", "expected an id", "Write one"),
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


CONTENTS = {
    "text": ({"text": "ab"}, Document("r:0", "ab", {}, "r:0")),
    "prompt and completion": (
        {"prompt": "a", "completion": "b", "n": 1},
        Document("r:0", "ab", {"n": 1}, "r:0", completion=1),
    ),
    "text of both": (
        {"text": "ab", "prompt": "a", "completion": "b"},
        Document("r:0", "ab", {"prompt": "a", "completion": "b"}, "r:0", completion=1),
    ),
    "text of something else": (
        {"text": "ab", "prompt": "a", "completion": "c"},
        Document("r:0", "ab", {"prompt": "a", "completion": "c"}, "r:0"),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}]},
        Document("r:0", "", {}, "r:0", messages=({"role": "user", "content": "q"},)),
    ),
    "tokens": ({"input_ids": [5, 0, 7]}, Document("r:0", "", {}, "r:0", token_ids=(5, 0, 7))),
    "tokens of NumPy": ({"input_ids": np.array([5, 7], np.uint16)}, Document("r:0", "", {}, "r:0", token_ids=(5, 7))),
    "scalars of NumPy": (
        {"text": "a", "n": np.int32(3), "x": np.float32(0.5), "yes": np.bool_(True)},
        Document("r:0", "a", {"n": 3, "x": 0.5, "yes": 1}, "r:0"),
    ),
}


@pytest.mark.parametrize(("record", "expected"), CONTENTS.values(), ids=CONTENTS.keys())
def test_what_a_record_may_hold(record, expected):
    assert list(read_records([record], name="r")) == [expected]


BAD_RECORDS = {
    "not a mapping": ("text", "r:0 is a str; expected a mapping such as"),
    "no messages": ({"messages": []}, "r:0, field 'messages', holds []; expected a list of messages"),
    "a message without role": (
        {"messages": [{"content": "q"}]},
        "r:0, field 'messages', holds {'content': 'q'}; expected",
    ),
    "a text of messages": ({"messages": "hello"}, "r:0, field 'messages', holds 'hello'; expected a list of messages"),
    "no tokens": ({"input_ids": []}, "r:0, field 'input_ids', is empty; expected tokens. Drop this document."),
    "negative tokens": ({"input_ids": [-100]}, "r:0, field 'input_ids', holds [-100]; expected a list of token ids"),
    "fractions of tokens": ({"input_ids": [0.5]}, "r:0, field 'input_ids', holds [0.5]; expected a list of token ids"),
    "rows of tokens": ({"input_ids": [[1], [2]]}, "r:0, field 'input_ids', holds [[1], [2]]; expected a list of token"),
    "a text of tokens": ({"input_ids": "5 7"}, "r:0, field 'input_ids', holds '5 7'; expected a list of token ids"),
    "an id of half a character": ({"id": "\ud800", "text": "a"}, "r:0, field 'id', holds half of a surrogate pair"),
    "a column of half a character": ({"c": "\ud800", "text": "a"}, "r:0, field 'c', holds half of a surrogate pair"),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_record_that_is_no_document_is_a_problem(record, message):
    (problem,) = read_records([record], name="r")
    assert isinstance(problem, Problem)
    assert problem.message.startswith(message)


def test_columns_can_be_chosen():
    records = [{"id": "a", "text": "t", "n": 1, "s": "x", "none": None}]
    assert [each.columns for each in Documents(records, fields=Fields(columns=("s",)))] == [{"s": "x"}]
    assert [each.columns for each in Documents(records, fields=Fields(columns=()))] == [{}]
    with pytest.raises(
        InputError, match=r"record:0 has no field 'q', only \['id', 'n', 'none', 's', 'text'\]; expected"
    ):
        list(Documents(records, fields=Fields(columns=("s", "q"))))
    with pytest.raises(InputError, match=r"record:0, field 'none', holds None; expected a number or a string in a"):
        list(Documents(records, fields=Fields(columns=("none",))))


# Every kind of file

RECORDS = [{"id": f"d{number}", "text": f"text {number} é", "n": number, "s": "x" * number} for number in range(7)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def _kinds(folder: Path) -> dict[str, Path]:
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), folder / "x.parquet", row_group_size=3)
    _written(folder / "x.jsonl.gz", gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]))  # of two members
    packed = zstandard.ZstdCompressor()
    _written(folder / "x.jsonl.zst", packed.compress(LINES[:100]) + packed.compress(LINES[100:]))
    _written(folder / "x.ndjson", LINES)
    _written(folder / "folder" / "a.jsonl", LINES[: LINES.index(b"\n") + 1])
    _written(folder / "folder" / "b" / "c.jsonl.gz", gzip.compress(LINES[LINES.index(b"\n") + 1 :]))
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return {name: folder / name for name in ("x.parquet", "x.jsonl.gz", "x.jsonl.zst", "x.ndjson", "folder", "saved")}


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    sources = {
        **_kinds(tmp_path),
        "records": RECORDS,
        "streamed": datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
    }
    sources["library"] = f"datasets:{tmp_path / 'hub'}"  # type: ignore[assignment]
    _written(tmp_path / "hub" / "train.jsonl", LINES)
    expected = [(record["id"], record["text"], {"n": record["n"], "s": record["s"]}) for record in RECORDS]
    for name, source in sources.items():
        found = [(each.id, each.text, each.columns) for each in Documents(source)]
        assert found == expected, name
    places = [
        [each.source for each in Documents(sources[name], limit=2)] for name in ("x.jsonl.gz", "folder", "x.parquet")
    ]
    assert places == [
        ["x.jsonl.gz:1", "x.jsonl.gz:2"], ["a.jsonl:1", "b/c.jsonl.gz:1"], ["x.parquet:0", "x.parquet:1"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_torn_file_is_refused_whatever_is_done_with_bad_lines(tmp_path, name):
    path = _kinds(tmp_path)[name]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=re.escape(str(path)) + " cannot be (unpacked to its end|read from row 0 on)"):
        list(Documents(path, on_error="skip"))


def test_a_dataset_of_several_splits_is_refused_with_theirs(tmp_path):
    one = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        InputError, match=r"both holds the splits train, test; expected one dataset; give the folder of"
    ):
        list(Documents(tmp_path / "both"))


def test_a_dataset_that_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"datasets:.*nothing cannot be loaded \(.*; expected datasets:NAME or"):
        list(Documents(f"datasets:{tmp_path / 'nothing'}"))


# Bad lines that are passed over


def test_what_is_no_document_is_counted_and_named(tmp_path):
    lines = ['{"id": "a", "text": "one"}', "broken", '{"text": ""}', '{"text": 5}', '{"id": "a", "text": "again"}',
             '{"id": "b", "text": "two"}', "[1]"]  # fmt: skip
    documents = Documents(_written(tmp_path / "x.jsonl", "\n".join(lines)), on_error="skip")
    for _ in range(2):  # counts are those of the last reading
        assert [(each.id, each.source) for each in documents] == [("a", "x.jsonl:1"), ("b", "x.jsonl:6")]
        assert documents.problems == {"broken": 1, "empty": 1, "wrong type": 2, "duplicate id": 1}
    assert documents.describe_problems() == (
        "passed over 5 that are no documents (1 broken, 1 duplicate id, 1 empty, 2 wrong type): x.jsonl:2 is not JSON "
        "(Expecting value: line 1 column 1 (char 0)); x.jsonl:3, field 'text', holds an empty text; x.jsonl:4, field "
        "'text', holds a int; The id 'a' stands at an earlier place and again at x.jsonl:5; x.jsonl:7 holds a JSON list"
    )
    assert [each.id for each in Documents(tmp_path / "x.jsonl", on_error="skip", limit=1, skip=1)] == ["b"]


def test_other_columns_than_those_of_the_first_document_are_counted_and_named(tmp_path):
    lines = ['{"id": "a", "text": "one", "n": 1}', '{"id": "b", "text": "two"}', '{"id": "c", "text": "t", "n": "x"}',
             '{"id": "d", "text": "t", "n": 0.5, "m": 1}', '{"id": "e", "text": "t", "n": null}',
             f'{{"id": "f", "text": "t", "n": {2**63}}}', '{"id": "g", "text": "six", "n": 0.5}']  # fmt: skip
    path = _written(tmp_path / "x.jsonl", "\n".join(lines))
    documents = Documents(path, on_error="skip")
    assert [(each.id, each.columns) for each in documents] == [("a", {"n": 1}), ("g", {"n": 0.5})]
    assert documents.problems == {"other columns": 5}
    assert [re.findall(r"x\.jsonl:[2-7]", message) for message in documents.first_problems] == [
        [f"x.jsonl:{line}"] for line in (2, 3, 4, 5, 6)
    ]
    with pytest.raises(InputError, match=r"document 'b' \(x.jsonl:2\) has no field 'n', which x.jsonl:1 has; give"):
        list(Documents(path))
    assert len(list(Documents(path, fields=Fields(columns=())))) == 7


def test_a_column_that_no_store_can_have_is_refused_whatever_is_done_with_bad_lines(tmp_path):
    path = _written(tmp_path / "x.jsonl", '{"text": "a", "a b": 1}')
    with pytest.raises(InputError, match=r"x.jsonl:1: document column name 'a b' is not .*; rename the field, or choo"):
        list(Documents(path, on_error="skip"))


def test_dates_and_times_are_texts(tmp_path):
    when = dt.datetime(2026, 7, 26, 12, 30, tzinfo=dt.UTC)
    record = {"id": "a", "text": "t", "run": when, "day": when.date()}
    pa.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    (document,) = Documents(tmp_path / "x.parquet")
    assert document.columns == {"run": "2026-07-26T12:30:00+00:00", "day": "2026-07-26"}


def test_a_text_that_is_too_long_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("extract.documents.TEXT_BYTES", 100)
    monkeypatch.setattr("extract.lines.LINE_BYTES", 1 << 20)
    path = _written(tmp_path / "x.jsonl", '{"text": "%s"}\n{"text": "ok"}' % ("é" * 51))
    documents = Documents(path, on_error="skip")
    assert [each.text for each in documents] == ["ok"]
    (message,) = documents.first_problems
    assert message == (
        "x.jsonl:1, field 'text', holds 102 bytes of text; expected at most 100, which are read at once. Cut it into "
        "several documents."
    )


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long_is_not_held(tmp_path, ending):
    raw = b'{"a": "%s"}\n{"a": 1}\n{"a": "%s"}' % (b"x" * 100_000, b"x" * 250)
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.ZstdCompressor().compress(raw)}[ending]
    path = _written(tmp_path / f"x.jsonl{ending}", packed)
    shares: list[float] = []
    found = dict(read_lines(path, most_bytes=200, progress=shares.append))
    assert [*found] == [f"x.jsonl{ending}:{line}" for line in (1, 2, 3)]
    one, two, three = found.values()
    assert two == {"a": 1}
    assert isinstance(one, Broken)
    assert one == three
    assert one.found == "is longer than 200 bytes"
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("source", [None, 5, b"x.jsonl", {"text": "a"}, datasets.DatasetDict()])
def test_what_is_no_source_is_refused(unchecked, source):
    with pytest.raises(InputError, match=r"the source of the documents is a .*; expected a path, 'python-docs' or an"):
        Documents(source)


@pytest.mark.parametrize("name", ["python-docs.jsonl", "python-docsx", "datasets"])
def test_a_name_that_is_nearly_one_of_ours_is_a_path(name):
    with pytest.raises(InputError, match=f"There is nothing at {name}; expected a file, a folder or 'python-docs'"):
        Documents(name)


def test_a_stream_needs_a_name():
    with pytest.raises(InputError, match=r"'datasets:' names no dataset; expected datasets:NAME or datasets:NAME:SPL"):
        list(Documents("datasets:"))


def test_names_of_fields_are_texts():
    with pytest.raises(InputError, match=r"record:0 has a field named 3; expected texts as names. Rename the field"):
        list(Documents([{"text": "a", 3: 1}]))


def test_nothing_but_problems_is_refused_with_them(tmp_path):
    path = _written(tmp_path / "x.jsonl", "broken\n")
    with pytest.raises(
        InputError, match=r"holds no documents \(passed over 1 that are no documents \(1 broken\): x.js"
    ):
        list(Documents(path, on_error="skip"))


@given(groups=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=20))
def test_ids_that_were_there_before_are_seen(groups):
    seen, known = Seen(), set()
    for group in groups:
        expected = []
        for number in group:
            expected.append(number in known)
            known.add(number)
        assert seen.add(np.array(group, np.uint64)).tolist() == expected


# Text files


def test_a_text_file_is_one_document(tmp_path):
    path = _written(tmp_path / "a.txt", "\ufeffline one\nline two\n")
    assert open_documents(str(path)) == [Document("a.txt", "line one\nline two\n", {}, "a.txt")]


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    names = ["b.txt", "a.md", "sub/c.rst", "sub/a.txt", "skipped.py", ".hidden.txt", ".git/notes.md", "sub/.x/y.md"]
    for name in names:
        _written(tmp_path / name, f"text of {name}")
    (tmp_path / "folder.txt").mkdir()
    documents = open_documents(str(tmp_path))
    assert [document.id for document in documents] == ["a.md", "b.txt", "sub/a.txt", "sub/c.rst"]
    assert all(document.text == f"text of {document.id}" for document in documents)
    assert [document.id for document in open_documents(str(tmp_path), limit=1)] == ["a.md"]


def test_links_and_names_in_a_folder(tmp_path):
    _written(tmp_path / "all" / "A.TXT", "upper case")
    _written(tmp_path / "all" / "b.txt", "linked")
    (tmp_path / "all" / "c.txt").symlink_to("b.txt")
    (tmp_path / "all" / "loop").symlink_to("..")
    assert [document.id for document in Documents(tmp_path / "all")] == ["A.TXT", "b.txt", "c.txt"]
    (tmp_path / "all" / "d.txt").symlink_to("nowhere.txt")
    with pytest.raises(InputError, match=r"d.txt cannot be opened \(No such file or directory\); expected a readable"):
        list(Documents(tmp_path / "all"))


def test_a_name_that_is_not_utf_8_is_counted(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system has no names that are not UTF-8")
    _written(tmp_path / "a.txt", "text")
    documents = Documents(tmp_path, on_error="skip")
    assert [each.id for each in documents] == ["a.txt"]
    assert documents.first_problems == ["the name of \ufffd.txt is not UTF-8; expected one that is. Rename the file."]


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
        f"{path} ends in '.csv'; expected .jsonl, .ndjson, .jsonl.gz, .jsonl.zst, .ndjson.gz, .ndjson.zst, .parquet, "
        ".txt, .md or .rst, a folder of such files or 'python-docs'. Convert the file to JSONL: one object per line, "
        "with a string field 'text'; of ARC tasks, `actstore arc prompts` makes one."
    )


def test_a_missing_source_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_documents("nothing.jsonl")
    assert str(caught.value) == (
        "There is nothing at nothing.jsonl; expected a file, a folder or 'python-docs'. "
        f"Check the path (the working folder is {tmp_path})."
    )


@pytest.mark.parametrize("reader", [read_jsonl, read_text, read_parquet])
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
        f"{path} holds no documents; expected at least one. A folder needs files that end in .txt, .md or .rst or hold "
        "records, a JSONL file one JSON object per line."
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
