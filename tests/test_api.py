"""`actstore.open`, `create` and `Store`: what most programs use, against memory and brute force."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from stores import LAYOUT, TEXTS, make_contents, make_documents, tree

import actstore
from actstore import TokenInContext
from actstore.errors import (
    CorruptStoreError,
    InputError,
    StoreNotFoundError,
    UnfinishedStoreError,
    UnknownNameError,
)

TABLE = make_documents()


@pytest.fixture
def store(finished):
    return actstore.open(finished)


def test_names_are_exported():
    assert sorted(actstore.__all__) == sorted(set(actstore.__all__))
    for name in actstore.__all__:
        assert getattr(actstore, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = actstore.nothing


def test_modules_that_the_documentation_names_are_attributes():
    program = "import actstore; print(actstore.export.to_numpy, actstore.errors.InputError, actstore.layout.Site)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_store_knows_itself(store, finished, contents):
    assert store.url == str(finished)
    assert store.sites == LAYOUT.sites
    assert store.samples == 53
    assert store.complete
    assert store.committed == 4
    assert store.plan == contents.plan


@pytest.mark.parametrize("form", [str, lambda path: path, lambda path: f"file://{path}", lambda path: f"{path}/"])
def test_an_address_may_be_written_in_several_ways(finished, form):
    assert actstore.open(form(finished)).samples == 53


def test_an_unfinished_store_needs_partial(unfinished):
    with pytest.raises(UnfinishedStoreError, match=r"2 of 4 blocks are committed; .* or give partial=True"):
        actstore.open(unfinished)
    store = actstore.open(unfinished, partial=True)
    assert (store.complete, store.committed, store.samples) == (False, 2, 53)
    assert store.dataset(partial=True).sizes["sample"] == 21


def test_no_store_is_said_and_nothing_is_made(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"expected a folder made by `actstore extract` or `actstore\.create`"):
        actstore.open(tmp_path / "x.acts.zarr", partial=True)
    assert list(tmp_path.iterdir()) == []


def test_create_writes_and_open_reads(tmp_path):
    """The example of the front page, with assets."""
    layout = actstore.Layout.fit([actstore.Site("resid_post", 8, (3,), "float32")], samples=10, columns=())
    rows = np.arange(80, dtype=np.float32).reshape(1, 10, 8)
    with actstore.create(
        tmp_path / "x.acts.zarr", layout, {"model": {"name": "m"}}, assets={"a.json": b"[]"}
    ) as writer:
        writer.write(0, {"resid_post": rows})
    store = actstore.open(tmp_path / "x.acts.zarr")
    np.testing.assert_array_equal(store.dataset().resid_post, rows)
    assert store.dataset().attrs["model"] == "m"
    assert (tmp_path / "x.acts.zarr" / "assets" / "a.json").read_bytes() == b"[]"


def test_dataset_is_that_of_xarray(store, finished):
    for raw in (False, True):
        ours, theirs = store.dataset(raw=raw), xr.open_dataset(finished, engine="actstore", raw=raw)
        assert {name: array.dtype for name, array in ours.items()} == {
            name: array.dtype for name, array in theirs.items()
        }
        xr.testing.assert_identical(
            ours.astype(np.float32), theirs.astype(np.float32)
        )  # xarray cannot compare bfloat16


# Columns


@pytest.mark.parametrize("rows", [[0], [52, 3, 3, 17], list(range(53)), []], ids=len)
def test_columns_are_those_of_the_rows(store, contents, rows):
    for name, values in contents.columns.items():
        found = store.column(name, np.array(rows, np.int64))
        np.testing.assert_array_equal(found, values[rows])
        assert found.dtype == values.dtype


def test_an_unknown_column_is_refused(store, tmp_path):
    with pytest.raises(UnknownNameError) as caught:
        store.column("layer", np.array([0]))
    assert str(caught.value) == (
        "column 'layer' is not in this store; it holds document, position, token_id, score, flag"
    )
    bare = make_contents(dataclasses.replace(LAYOUT, columns=()), documents=False).write(tmp_path / "x.acts.zarr")
    with pytest.raises(UnknownNameError, match="it holds none"):
        actstore.open(bare).column("document", np.array([0]))


@pytest.mark.parametrize("row", [53, -1])
def test_a_column_of_a_row_that_is_not_there_is_an_error_of_ours(store, row):
    with pytest.raises(InputError, match=f"rows {row} to {row} asked for; this store has 0 to 52"):
        store.column("document", np.array([row]))


def test_damaged_columns_are_an_error(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "x.acts.zarr")
    (path / "document" / "c" / "1").unlink()
    with pytest.raises(CorruptStoreError, match=r"read document, block 1 of .*: missing object at document/c/1"):
        actstore.open(path).column("document", np.array([20]))


# Text


def in_context(contents, row, window):
    """Brute force: glue the pieces of the tokens around, each cut out of the text by its own span."""
    document, position = contents.columns["document"][row], contents.columns["position"][row]
    first, last = TABLE.token_offsets[document : document + 2]
    data = TEXTS[document].encode()
    pieces = [data[TABLE.token_start[token] : TABLE.token_end[token]].decode() for token in range(first, last)]
    return TokenInContext(
        "".join(pieces[max(position - window, 0) : position]),
        pieces[position],
        "".join(pieces[position + 1 : position + 1 + window]),
    )


@pytest.mark.parametrize("window", [0, 1, 3, 16, 1000])
def test_text_is_that_of_brute_force(store, contents, window):
    rows = np.random.default_rng(0).permutation(53)
    assert store.text(rows, window=window) == [in_context(contents, row, window) for row in rows]


def test_text_holds_whole_characters(store, contents):
    """Characters of one to four bytes, marks and flags: no piece has half of one."""
    shown = store.text(range(53), window=2)
    assert not any("\ufffd" in piece for token in shown for piece in (token.before, token.token, token.after))
    documents = contents.columns["document"]
    assert len({TEXTS[document] for document in documents}) >= 4
    for token, document in zip(shown, documents, strict=True):
        assert token.before + token.token + token.after in TEXTS[document]


def test_a_window_as_large_as_the_document_shows_it_whole(store, contents):
    for token, document in zip(store.text(range(53), window=10**6), contents.columns["document"], strict=True):
        assert token.before + token.token + token.after == TEXTS[document]


def test_text_of_one_row_and_of_none(store, contents):
    assert store.text([7]) == store.text(np.array([7])) == [in_context(contents, 7, 16)]
    assert store.text([]) == []


@pytest.mark.parametrize("rows", [[53], [-1], [0, 99]], ids=str)
def test_text_of_a_row_that_is_not_there_is_refused(store, rows):
    with pytest.raises(InputError, match=f"rows {min(rows)} to {max(rows)} asked for; this store has 0 to 52"):
        store.text(rows)


def test_text_needs_documents(tmp_path):
    path = make_contents(documents=False).write(tmp_path / "x.acts.zarr")
    with pytest.raises(UnknownNameError, match="holds no documents; it was created without them"):
        actstore.open(path).text([0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("position", 10**6, "a sample is token 1000000 of document 0, which has 57 tokens"),
        ("position", -1, "a sample is token -1 of document 0, which has 57 tokens"),
        ("document", 5, "documents 5 to 5 asked for; this store has 0 to 4"),
        ("document", -1, "documents -1 to -1 asked for; this store has 0 to 4"),
    ],
    ids=["position after", "position before", "document after", "document before"],
)
def test_text_of_columns_that_point_nowhere_is_refused(tmp_path, contents, name, value, message):
    columns = contents.columns | {"document": np.zeros(53, np.int32)} | {name: np.full(53, value, np.int32)}
    path = dataclasses.replace(contents, columns=columns).write(tmp_path / "x.acts.zarr")
    with pytest.raises(InputError, match=message):
        actstore.open(path).text([0])


def test_reading_changes_nothing(finished, store):
    before = tree(finished)
    store.dataset().load()
    store.text(range(53))
    store.column("document", np.arange(53))
    with store.batches(batch_size=10, layer=5, epochs=1) as batches:
        list(batches)
    assert tree(finished) == before


def test_rows_of_blocks_that_are_not_committed_are_refused_as_such(unfinished):
    store = actstore.open(unfinished, partial=True)
    assert store.column("position", np.array([16, 31, 48])).tolist()
    for row in (0, 40):
        with pytest.raises(UnfinishedStoreError, match=rf"block {row // 16} of the rows asked for is not committed"):
            store.text([row])


def test_a_store_verifies_itself(finished, unfinished, tmp_path):
    done: list[tuple[int, int]] = []
    report = actstore.open(finished).verify(progress=lambda shards, total: done.append((shards, total)))
    assert report.findings == ()
    assert done[-1] == (report.shards, report.shards) != (0, 0)
    assert actstore.open(unfinished, partial=True).verify(depth="fast").findings == ()
    shutil.copytree(finished, tmp_path / "cut.acts.zarr")
    shard = tmp_path / "cut.acts.zarr/resid_post/c/0/1/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (finding,) = actstore.open(tmp_path / "cut.acts.zarr").verify(depth="fast").findings
    assert (finding.what, finding.block) == ("resid_post, layer 2, block 1", 1)


def test_a_negative_window_is_refused(finished):
    with pytest.raises(InputError, match="window is -1; expected a number of tokens, 0 or more"):
        actstore.open(finished).text([0], window=-1)


def test_a_store_says_what_it_is(finished):
    assert repr(actstore.open(finished)) == (
        f"<actstore.Store {finished}: 53 samples, resid_post [2, 5, 11] x 6, mlp_out [2, 5, 11] x 4, attn_out [5] x 6, "
        "final_norm x 3>"
    )


@pytest.mark.parametrize("package", ["actstore", "extract"])
def test_the_public_names_are_offered_for_completion(package):
    module = __import__(package)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
