"""The document table: texts, columns and tokens as they went in, and every refusal."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import LAYOUT, TEXTS, make_contents, make_documents, raw_tensorstore

import actstore
from actstore import DocumentTable, Layout, Site
from actstore.errors import CorruptStoreError, InputError, PlanMismatchError, UnknownNameError
from actstore.kvstore import Root
from actstore.table import write_table

COUNT = len(TEXTS)
TABLE = make_documents()
NO_TOKENS = {
    "token_id": np.zeros(0, np.int32),
    "token_start": np.zeros(0, np.uint32),
    "token_end": np.zeros(0, np.uint32),
}


@pytest.fixture
def stored(finished):
    return actstore.open(finished).documents


def test_texts_and_columns_come_back(stored):
    everything = np.arange(COUNT)
    assert len(stored) == COUNT
    assert stored.columns == ("id", "kind", "text", "pages", "weight")  # text columns, then numbers
    assert stored.strings("id", everything) == list(TABLE.ids)
    assert stored.strings("text", everything) == list(TEXTS)
    assert stored.strings("kind", everything) == TABLE.columns["kind"]
    assert stored.numbers("pages", everything).tolist() == TABLE.columns["pages"]
    assert stored.numbers("weight", everything).tolist() == TABLE.columns["weight"]


@pytest.mark.parametrize("documents", [[], [3], [4, 0, 4, 1]], ids=str)
def test_some_documents_come_in_the_order_asked_for(stored, documents):
    assert stored.strings("text", np.array(documents, int)) == [TEXTS[number] for number in documents]
    expected = [TABLE.columns["pages"][number] for number in documents]
    assert stored.numbers("pages", np.array(documents, int)).tolist() == expected


def test_tokens_of_a_document_are_those_of_the_stream(stored):
    for document, text in enumerate(TEXTS):
        ids, spans = stored.tokens(document)
        part = slice(*TABLE.token_offsets[document : document + 2])
        np.testing.assert_array_equal(ids, TABLE.token_id[part])
        np.testing.assert_array_equal(spans, np.stack([TABLE.token_start[part], TABLE.token_end[part]], axis=1))
        pieces = [text.encode()[start:end].decode() for start, end in spans]
        assert "".join(pieces) == text
        assert pieces[-1] == ""


def test_other_readers_find_the_same_bytes(finished):
    """text is UTF-8 with offsets: readable by whatever reads Zarr."""
    data = bytes(raw_tensorstore(finished, "documents/text_bytes").read().result())
    edges = raw_tensorstore(finished, "documents/text_offsets").read().result()
    assert [data[start:end].decode() for start, end in itertools.pairwise(edges)] == list(TEXTS)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(TEXT, min_size=1, max_size=5), st.data())
@settings(max_examples=15)
def test_any_texts_come_back(tmp_path_factory, texts, data):
    """Also empty ones, zero characters, and line ends of every kind."""
    count = len(texts)
    numbers = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count))
    table = DocumentTable(
        [str(number) for number in range(count)], texts, np.zeros(count + 1, np.int64), **NO_TOKENS,
        columns={"mirrored": [text[::-1] for text in texts], "number": numbers},
    )  # fmt: skip
    layout = Layout((Site("a", 1, None),), 1, 1, 1, columns=())
    path = tmp_path_factory.mktemp("texts") / "x.acts.zarr"
    actstore.create(path, layout, {}, documents=table, seal=False).close()
    stored = actstore.open(path, partial=True).documents
    everything = np.arange(count)
    assert stored.strings("text", everything) == texts
    assert stored.strings("mirrored", everything) == [text[::-1] for text in texts]
    assert stored.numbers("number", everything).tolist() == numbers
    assert [len(stored.tokens(document)[0]) for document in range(count)] == [0] * count


# Refused before anything is written


OFFSETS, LAST = TABLE.token_offsets, np.array([0, 0, 0, 0, 0, 1])
REFUSED = {
    "none": ({"ids": [], "texts": [], "columns": {}}, "documents: found none, expected at least one"),
    "texts": ({"texts": TEXTS[1:]}, "documents: texts has 4 values, expected 5, one per document"),
    "column length": ({"columns": {"a": [1]}}, "documents: a has 1 values, expected 5, one per document"),
    "ids": ({"ids": ["a", "b", "a", "c", "d"]}, "ids are not unique, 'a' is there twice; give every document"),
    "few offsets": ({"token_offsets": TABLE.token_offsets[:-1]}, "token_offsets has 5 values, [0] to [128], expected"),
    "no offsets": ({"token_offsets": np.zeros(0, np.int64)}, "token_offsets has 0 values, [] to [], expected 6"),
    "offsets end": ({"token_offsets": OFFSETS - LAST}, "[0] to [129], expected 6 that ascend"),
    "offsets begin": ({"token_offsets": OFFSETS + LAST[::-1]}, "[1] to [130], expected 6 that ascend"),
    "offsets descend": (
        {"token_offsets": TABLE.token_offsets[[0, 2, 1, 3, 4, 5]]},
        "expected 6 that ascend from 0 to the number of tokens, 130",
    ),
    "token dtype": ({"token_id": TABLE.token_id.astype(int)}, "token_id is int64 (130,), expected int32 (130,)"),
    "spans": ({"token_end": TABLE.token_end[1:]}, "documents: token_end is uint32 (129,), expected uint32 (130,)"),
    "token past its text": (
        {"token_end": TABLE.token_end + np.uint32(1000)},
        "documents: token 0 of document 'doc-ä0' has the bytes 0 to 1001 of a text of 83 bytes; give places",
    ),
    "token backwards": ({"token_start": TABLE.token_end + np.uint32(1)}, "token 0 of document 'doc-ä0' has the bytes "),
    "a long text": (
        {"texts": ["x" * (64 << 20) + "x", *TEXTS[1:]]},
        "documents: one has 67,108,865 bytes of text or tokens, at most 67,108,864 can be read at once; cut it into",
    ),
    "column name": ({"columns": {"a b": [1] * COUNT}}, "document column name 'a b' is not allowed"),
    "column taken": ({"columns": {"text": ["a"] * COUNT}}, "column name 'text' is used by the format itself"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TABLE, **changes)
    assert message in str(caught.value)


BAD_COLUMNS = {
    "mixed": ({"a": ["x", 1, 2, 3, 4]}, "column 'a' holds ['int', 'str']; expected only text or only numbers"),
    "truths": ({"a": [True] * COUNT}, "documents: column 'a' holds ['bool']; expected only text or only numbers"),
    "nothing": ({"a": [None] * COUNT}, "documents: column 'a' holds ['NoneType']"),
    "lists": ({"a": [[1]] * COUNT}, "documents: column 'a' holds ['list']"),
    "over 64 bits": ({"a": [2**63] * COUNT}, "documents: column 'a' has numbers over 64 bits; give them as text"),
    "name of bytes": ({"text_bytes": [1] * COUNT}, "documents: the arrays ['text_bytes'] would be there twice; rename"),
    "name of offsets": ({"b": ["x"] * COUNT, "b_offsets": [1] * COUNT}, "arrays ['b_offsets'] would be there twice"),
    "surrogate": ({"a": ["\ud800"] * COUNT}, "documents: '\\ud800' holds half of a surrogate pair; expected whole"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS.keys())
def test_a_column_that_cannot_be_stored_is_refused(tmp_path, columns, message):
    table = dataclasses.replace(TABLE, columns=columns)
    with pytest.raises(InputError) as caught:
        dataclasses.replace(make_contents(), documents=table).create(tmp_path / "x.acts.zarr")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_other_sizes_is_refused(tmp_path, contents):
    with contents.create(tmp_path / "x.acts.zarr") as writer:
        other = dataclasses.replace(TABLE, texts=[*TEXTS[:-1], "longer"])
        with pytest.raises(InputError, match="make a plan of these documents"):
            write_table(writer.root, writer.plan, other)


def test_a_table_of_equal_sizes_is_refused_as_well(tmp_path, contents):
    """Sizes stand in the plan, contents do not: another text must not be taken for the one that is stored."""
    path = contents.write(tmp_path / "x.acts.zarr", blocks=[0], seal=False)
    other = dataclasses.replace(contents, documents=dataclasses.replace(TABLE, texts=[*TEXTS[:-1], "y"]))
    with pytest.raises(PlanMismatchError, match="holds other documents of the same sizes; choose another target"):
        other.create(path)
    assert actstore.open(path, partial=True).documents.strings("text", np.array([4])) == ["x"]


def test_a_table_is_written_once(tmp_path, contents):
    path = contents.write(tmp_path / "x.acts.zarr", blocks=[], seal=False)
    files = sorted((path / "documents").rglob("c/*"))
    before = [file.stat().st_mtime_ns for file in files]
    write_table(Root.of(path), contents.plan, TABLE)
    contents.create(path).close()
    assert [file.stat().st_mtime_ns for file in files] == before


# Refused at reading


@pytest.mark.parametrize("documents", [[5], [-1], [0, 10**9]], ids=str)
def test_a_document_that_is_not_there_is_refused(stored, documents):
    message = f"documents {min(documents)} to {max(documents)} asked for; this store has 0 to 4"
    for ask in (
        lambda: stored.strings("text", np.array(documents)),
        lambda: stored.numbers("pages", np.array(documents)),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    with pytest.raises(InputError, match="this store has 0 to 4"):
        stored.tokens(documents[-1])


def test_a_column_that_is_not_there_is_refused(stored):
    one = np.array([0])
    with pytest.raises(UnknownNameError, match="text column 'pages' is not in the documents; there are id, kind, text"):
        stored.strings("pages", one)
    with pytest.raises(UnknownNameError, match="number column 'text' is not in the documents; there are pages, weight"):
        stored.numbers("text", one)
    with pytest.raises(UnknownNameError, match="text column 'title' is not in the documents"):
        stored.strings("title", one)


def test_a_store_without_documents_says_so(tmp_path):
    layout = dataclasses.replace(LAYOUT, columns=())
    path = make_contents(layout, documents=False).write(tmp_path / "x.acts.zarr")
    with pytest.raises(UnknownNameError, match="holds no documents; it was created without them"):
        _ = actstore.open(path).documents


def rewrite(path, name, change):
    """Writes changed values with right checksums, as a broken program would."""
    array = raw_tensorstore(path, f"documents/{name}")
    array.write(change(array.read().result().copy())).result()


DAMAGES = {
    "offsets descend": ("text_offsets", lambda edges: edges[[0, 2, 1, 3, 4, 5]], "text_offsets of .* does not ascend"),
    "offsets begin late": ("text_offsets", lambda edges: edges + 1, "text_offsets of .* does not ascend from 0"),
    "offsets past the end": (
        "text_offsets",
        lambda edges: edges * 100,
        "text_offsets of .* does not ascend from 0 to the size of its column; run `actstore verify`",
    ),
    "not UTF-8": ("text_bytes", lambda data: data | 0x80, "text_bytes of .* is not UTF-8; run `actstore verify`"),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_documents_are_an_error(finished, tmp_path, name, change, message):
    path = shutil.copytree(finished, tmp_path / "x.acts.zarr")
    rewrite(path, name, change)
    with pytest.raises(CorruptStoreError, match=message):
        actstore.open(path).documents.strings("text", np.arange(COUNT))


@pytest.mark.parametrize("name", ["text_bytes", "text_offsets", "pages", "token_id", "token_offsets"])
def test_a_missing_array_is_an_error(finished, tmp_path, name):
    path = shutil.copytree(finished, tmp_path / "x.acts.zarr")
    shutil.rmtree(path / "documents" / name / "c")
    stored = actstore.open(path).documents
    with pytest.raises(CorruptStoreError, match=r"could not read documents of .*: missing object at documents/"):
        _ = stored.strings("text", np.array([0])), stored.numbers("pages", np.array([0])), stored.tokens(0)
