"""Filters, normalisation and statistics of norms, each against NumPy over everything in memory."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_points import unchecked
from stores import LAYOUT, Contents, make_contents

import actstore
from actstore import Filter
from actstore.batches import Batches
from actstore.errors import CorruptStoreError, InputError, UnknownNameError
from actstore.kept import Kept, place_in_split
from actstore.layout import norm_name
from actstore.moments import row_norms
from actstore.norms import summarize

SAMPLES = LAYOUT.samples
CODECS = ("crc32c", "none", "zstd")
ORDERS = ("block", "exact")


@pytest.fixture(scope="module", params=CODECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, Path]:
    contents = make_contents(dataclasses.replace(LAYOUT, codec=request.param))
    return contents, contents.write(tmp_path_factory.mktemp("made") / "run.acts.zarr")


def of_document(contents: Contents, name: str) -> np.ndarray:
    """A column of the documents, for each sample."""
    assert contents.documents is not None
    values = contents.documents.ids if name == "id" else contents.documents.columns[name]
    return np.asarray(values, object)[contents.columns["document"]]


def norms_of(contents: Contents, site: str, layer: int | None) -> np.ndarray:
    where = contents.layout.site(site)
    rows = contents.rows[site] if where.layers is None else contents.rows[site][where.layer_index(layer)]
    return row_norms(rows).astype(np.float64)


def splits(contents: Contents, start: float, stop: float) -> np.ndarray:
    """By the 64 bits of the hash as whole numbers."""
    digests = [xxhash.xxh3_64_intdigest(name.encode()) for name in of_document(contents, "id")]
    return np.array([int(start * 2**64) <= digest < int(stop * 2**64) for digest in digests])


Expected = Callable[[Contents], np.ndarray]
FILTERS: dict[str, tuple[Filter, Expected]] = {
    "nothing said": (Filter(), lambda c: np.ones(SAMPLES, bool)),
    "not the first tokens": (Filter(keep={"position": slice(2, None)}), lambda c: c.columns["position"] >= 2),
    "some positions": (
        Filter(keep={"position": slice(1, 4)}),
        lambda c: (c.columns["position"] >= 1) & (c.columns["position"] <= 4),
    ),
    "a token": (Filter(drop={"token_id": 1003}), lambda c: c.columns["token_id"] != 1003),
    "tokens": (Filter(drop={"token_id": [1003, 1000]}), lambda c: ~np.isin(c.columns["token_id"], [1000, 1003])),
    "a column of samples": (Filter(keep={"flag": 1}), lambda c: c.columns["flag"] == 1),
    "a range of floats": (Filter(drop={"score": slice(None, 0.25)}), lambda c: ~(c.columns["score"] <= 0.25)),
    "a text of documents": (
        Filter(keep={"kind": ["ascii", ""]}),
        lambda c: np.isin(of_document(c, "kind"), ["ascii", ""]),
    ),
    "not a text": (Filter(drop={"kind": "日本語"}), lambda c: of_document(c, "kind") != "日本語"),
    "a number of documents": (
        Filter(keep={"pages": [3, 2**62]}),
        lambda c: np.isin(of_document(c, "pages"), [3, 2**62]),
    ),
    "a range of documents": (
        Filter(keep={"weight": slice(0, 1)}),
        lambda c: np.isin(of_document(c, "weight"), [0.5, 1, 0]),
    ),
    "documents": (Filter(keep={"id": "doc-ä1"}), lambda c: of_document(c, "id") == "doc-ä1"),
    "a split": (Filter(split=(0.2, 0.7)), lambda c: splits(c, 0.2, 0.7)),
    "the rest": (Filter(split=(0.7, 1)), lambda c: splits(c, 0.7, 1)),
    "norms": (
        Filter(max_norm=1.1),
        lambda c: norms_of(c, "resid_post", 5) <= 1.1 * np.median(norms_of(c, "resid_post", 5)),
    ),
    "all together": (
        Filter(split=(0, 0.9), keep={"position": slice(1, None), "flag": [0, 1]}, drop={"kind": "x"}, max_norm=1.3),
        lambda c: splits(c, 0, 0.9)
        & (c.columns["position"] >= 1)
        & (of_document(c, "kind") != "x")
        & (norms_of(c, "resid_post", 5) <= 1.3 * np.median(norms_of(c, "resid_post", 5))),
    ),
}  # fmt: skip
GIVEN: dict[str, Any] = {"site": "resid_post", "layer": 5, "batch_size": 4, "epochs": 1, "drop_remainder": False}


def drain(loader: Batches[Any]) -> list[actstore.Batch[Any]]:
    with loader:
        return list(iter(loader.next_or_none, None))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FILTERS)
def test_what_is_kept_is_what_numpy_keeps(made: tuple[Contents, Path], name: str, order: Any) -> None:
    """Each kept sample once, each row the right one, for small and large windows and every part."""
    contents, url = made
    where, expected = FILTERS[name]
    wanted = np.flatnonzero(expected(contents)).tolist()
    assert wanted  # a filter that keeps nothing would prove nothing
    assert len(wanted) < SAMPLES or name == "nothing said"
    store = actstore.open(url)
    for window_bytes in (1, 300, 1 << 20):
        found = drain(store.batches(**GIVEN, order=order, window_bytes=window_bytes, where=where))
        assert sorted(sample for batch in found for sample in batch.samples.tolist()) == wanted
        for batch in found:
            np.testing.assert_array_equal(batch.rows, contents.rows["resid_post"][1][batch.samples])
        assert all(len(batch.samples) == 4 for batch in found[:-1])
        halves = [
            drain(store.batches(**GIVEN, order=order, window_bytes=window_bytes, where=where, part=(number, 2)))
            for number in (0, 1)
        ]
        joined = [[*one.samples, *other.samples] for one, other in zip(*halves, strict=True)]
        assert joined == [batch.samples.tolist() for batch in found]


def test_a_filter_keeps_the_order(made: tuple[Contents, Path]) -> None:
    """What is left comes in the order in which it comes without a filter."""
    contents, url = made
    store = actstore.open(url)
    kept = set(np.flatnonzero(FILTERS["tokens"][1](contents)).tolist())
    for order in ORDERS:
        all_samples = [s for batch in drain(store.batches(**GIVEN, order=order)) for s in batch.samples.tolist()]
        filtered = drain(store.batches(**GIVEN, order=order, where=FILTERS["tokens"][0]))
        assert [s for batch in filtered for s in batch.samples.tolist()] == [s for s in all_samples if s in kept]


def test_norms_of_all_layers_count(made: tuple[Contents, Path]) -> None:
    """A sample of several layers and sites is kept where all of its rows are short enough."""
    contents, url = made
    kept = np.ones(SAMPLES, bool)
    for site, layer in [("mlp_out", 2), ("mlp_out", 11), ("final_norm", None)]:
        norms = norms_of(contents, site, layer)
        kept &= norms <= 1.4 * np.median(norms)
    store = actstore.open(url)
    found = drain(store.batches(layers={"mlp_out": [2, 11], "final_norm": None}, batch_size=5, epochs=1,
                                drop_remainder=False, where=Filter(max_norm=1.4)))  # fmt: skip
    assert sorted(s for batch in found for s in batch.samples.tolist()) == np.flatnonzero(kept).tolist()
    assert 0 < kept.sum() < SAMPLES
    for batch in found:
        np.testing.assert_array_equal(batch.rows["mlp_out"][:, 1], contents.rows["mlp_out"][2][batch.samples])
        np.testing.assert_array_equal(batch.rows["final_norm"], contents.rows["final_norm"][batch.samples])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window_bytes", [1, 300])
def test_restored_at_every_step_a_filtered_loader_goes_on(
    finished: Path, window_bytes: int, order: Any, drop: bool
) -> None:
    store = actstore.open(finished)
    given: dict[str, Any] = {**GIVEN, "order": order, "window_bytes": window_bytes, "where": FILTERS["tokens"][0]}
    given |= {"epochs": 2, "drop_remainder": drop, "batch_size": 9, "seed": 3}
    with store.batches(**given) as loader:
        states, batches = [loader.state()], []
        while (batch := loader.next_or_none()) is not None:
            batches.append(batch.samples.tolist())
            states.append(loader.state())
    for step, state in enumerate(states):
        assert len(json.dumps(state)) <= 200
        with store.batches(**given) as again:
            again.restore(json.loads(json.dumps(state)))
            assert again.state() == state
            assert [batch.samples.tolist() for batch in drain(again)] == batches[step:]
        with store.batches(**given) as skipping:
            skipping.skip(step)
            assert [batch.samples.tolist() for batch in drain(skipping)] == batches[step:]


def test_skipping_without_a_filter_reads_nothing(finished: Path) -> None:
    store = actstore.open(finished)
    for drop in (True, False):
        given = {**GIVEN, "epochs": 2, "drop_remainder": drop, "batch_size": 9}
        batches = [batch.samples.tolist() for batch in drain(store.batches(**given))]
        for step in range(len(batches) + 3):
            with store.batches(**given) as loader:
                loader.skip(step)
                assert not loader._windows._ready
                assert [batch.samples.tolist() for batch in drain(loader)] == batches[step:]
    with pytest.raises(InputError, match="batches is -1; expected 0 or more"):
        store.batches(**GIVEN).skip(-1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_filter_in_any_window(finished: Path, contents: Contents, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    split = (low, high) if low < high else (0.0, 1.0)
    tokens = data.draw(st.lists(st.integers(1000, 1120), max_size=40))
    first = data.draw(st.integers(0, 9))
    where = Filter(split=split, keep={"position": slice(first, None)}, drop={"token_id": tokens} if tokens else {})
    kept = splits(contents, *split) & (contents.columns["position"] >= first)
    kept &= ~np.isin(contents.columns["token_id"], tokens)
    given: dict[str, Any] = {
        "site": "mlp_out", "layer": 11, "epochs": 2, "where": where,
        "batch_size": data.draw(st.integers(1, 60)), "drop_remainder": data.draw(st.booleans()),
        "order": data.draw(st.sampled_from(ORDERS)), "window_bytes": data.draw(st.integers(1, 2000)),
    }  # fmt: skip
    if given["drop_remainder"] and given["batch_size"] > SAMPLES:
        return
    loader = actstore.open(finished).batches(**given)
    wanted = np.flatnonzero(kept).tolist()
    if not wanted or (given["drop_remainder"] and len(wanted) < given["batch_size"]):
        text = f"keeps {len(wanted)} of 53 samples, batch_size is" if wanted else "keeps none of 53 samples; use one"
        with loader, pytest.raises(InputError, match=f"the filter {text}"):
            loader.next_batch()
        return
    seen = [sample for batch in drain(loader) for sample in batch.samples.tolist()]
    count = len(wanted) // given["batch_size"] * given["batch_size"] if given["drop_remainder"] else len(wanted)
    assert len(seen) == 2 * count
    for epoch in (seen[:count], seen[count:]):
        assert len(set(epoch)) == count
        assert set(epoch) <= set(wanted)


def test_a_split_is_of_the_document_alone() -> None:
    """It never changes, is uniform, and parts share nothing."""
    assert [round(place_in_split(name), 6) for name in ("a", "doc-ä1", "")] == PLACES
    places = np.array([place_in_split(f"document {number}") for number in range(20_000)])
    counts, _ = np.histogram(places, bins=20, range=(0, 1))
    assert np.square(counts - 1000).sum() / 1000 < 40  # chi-square of 19 degrees of freedom: 40 once in 300


PLACES = [0.901462, 0.701702, 0.17588]


def test_each_block_is_decided_once(made: tuple[Contents, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a bound on what is remembered costs time alone."""
    contents, url = made
    store = actstore.open(url)
    decided: list[int] = []
    real = Kept._decide
    monkeypatch.setattr(Kept, "_decide", lambda kept, block: decided.append(block) or real(kept, block))
    given = {**GIVEN, "epochs": 3, "where": FILTERS["tokens"][0], "window_bytes": 300}
    first = [batch.samples.tolist() for batch in drain(store.batches(**given))]
    assert sorted(decided) == list(range(contents.layout.blocks))
    monkeypatch.setattr("actstore.kept.MASK_BYTES", 1)
    decided.clear()
    again = store.batches(**given)
    assert again._kept is not None
    assert again._kept._masks_kept == 1
    assert [batch.samples.tolist() for batch in drain(again)] == first
    assert len(decided) > contents.layout.blocks
    assert len(again._kept._masks) == 1


def test_chunks_without_a_kept_sample_are_not_read(made: tuple[Contents, Path], tmp_path: Path) -> None:
    """Documents 0 and 1 lie in the first blocks: the others may even be gone."""
    contents, _ = made
    url = contents.write(tmp_path / "x.acts.zarr")
    samples = np.flatnonzero(contents.columns["document"] == 0)
    needed = set((samples // LAYOUT.block_samples).tolist())
    assert len(needed) < contents.layout.blocks
    for block in set(range(contents.layout.blocks)) - needed:
        (url / f"resid_post/c/1/{block}/0").unlink()
    found = drain(actstore.open(url).batches(**GIVEN, where=Filter(keep={"document": 0})))
    assert sorted(s for batch in found for s in batch.samples.tolist()) == samples.tolist()


DAMAGED = ["token_id/c/1", "resid_post_norm/c/1/1", ".act/commits/00000001.json"]


@pytest.mark.parametrize("key", DAMAGED)
def test_what_decides_is_compared_with_its_marker(tmp_path: Path, contents: Contents, key: str) -> None:
    url = contents.write(tmp_path / "x.acts.zarr")
    whole = (url / key).read_bytes()
    (url / key).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    where = Filter(drop={"token_id": 1}, max_norm=3)
    with actstore.open(url).batches(**GIVEN, where=where) as loader, pytest.raises(CorruptStoreError, match="block 1"):
        loader.next_batch()


# Refusals

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no such column": (
        lambda: Filter(keep={"posittion": 1}), UnknownNameError,
        "column 'posittion' is not in {url}; it holds document, flag, id, kind, pages, position, score, token",
    ),
    "a split backwards": (
        lambda: Filter(split=(0.9, 0.1)), InputError,
        r"split is (0.9, 0.1); expected (start, stop) with 0 <= start < stop <= 1",
    ),
    "an empty split": (lambda: Filter(split=(0.5, 0.5)), InputError, "split is (0.5, 0.5); expected"),
    "no norm": (lambda: Filter(max_norm=0), InputError, "max_norm is 0; expected a positive multiple of the median"),
    "NaN": (lambda: Filter(max_norm=float("nan")), InputError, "max_norm is nan; expected a positive multiple"),
    "no value": (lambda: Filter(keep={"flag": []}), InputError, "column 'flag': found no value; name at least one"),
    "None": (
        lambda: Filter(drop={"token_id": None}), InputError,
        "column 'token_id': found None; expected text, a whole number or a finite one",
    ),
    "None among others": (lambda: Filter(drop={"kind": ["x", None]}), InputError, "column 'kind': found None; exp"),
    "bytes": (lambda: Filter(drop={"kind": b"x"}), InputError, "column 'kind': found b'x'; expected text, a whole"),
    "NaN in a column": (lambda: Filter(drop={"score": np.nan}), InputError, "column 'score': found nan; expected text"),
    "NaN in a slice": (lambda: Filter(keep={"score": slice(np.nan, 1)}), InputError, "column 'score': found nan; exp"),
    "a mapping": (lambda: Filter(keep={"flag": {1: 2}}), InputError, "column 'flag': found {1: 2}; expected text"),
    "nested": (lambda: Filter(keep={"flag": np.zeros((1, 2))}), InputError, "column 'flag': found array([0., 0.])"),
    "no columns": (lambda: Filter(keep=["flag"]), InputError, "keep is ['flag']; expected what is wanted of"),
    "a slice backwards": (
        lambda: Filter(keep={"flag": slice(5, 1)}), InputError,
        "column 'flag': found slice(5, 1, None), which holds nothing; expected first <= last",
    ),
    "half a split": (lambda: Filter(split=0.9), InputError, "split is 0.9; expected (start, stop) with 0 <= start"),
    "a split of text": (lambda: Filter(split=("0", "1")), InputError, "split is ('0', '1'); expected (start, stop)"),
    "a norm of text": (lambda: Filter(max_norm="10"), InputError, "max_norm is '10'; expected a positive multiple"),
    "a true norm": (lambda: Filter(max_norm=True), InputError, "max_norm is True; expected a positive multiple"),
    "no filter": (lambda: {"max_norm": 3}, InputError, "where is {'max_norm': 3}; expected an actstore.Filter"),
    "the whole text": (lambda: Filter(keep={"text": "x"}), UnknownNameError, "column 'text' is not in {url}; it holds"),
    "an open slice": (
        lambda: Filter(keep={"flag": slice(None)}), InputError,
        "column 'flag': found slice(None, None, None); expected slice(first, last), one of them may be None",
    ),
    "a step": (lambda: Filter(keep={"flag": slice(0, 9, 2)}), InputError, "column 'flag': found slice(0, 9, 2); exp"),
    "text of numbers": (
        lambda: Filter(drop={"token_id": ["<eos>"]}), InputError,
        "column 'token_id': found '<eos>'; expected numbers, or a slice of them",
    ),
    "numbers of text": (
        lambda: Filter(keep={"kind": 3}), InputError, "column 'kind': found 3; expected values that are text",
    ),
    "a slice of text": (
        lambda: Filter(keep={"kind": slice("a", "b")}), InputError,
        "column 'kind': found slice('a', 'b', None); expected values that are text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_filter_cannot_be_is_refused(finished: Path, case: str) -> None:
    make, kind, message = REFUSED[case]
    with unchecked(), pytest.raises(kind) as caught:
        actstore.open(finished).batches(**GIVEN, where=make())
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message.replace("{url}", str(finished)))


def test_documents_are_needed_where_they_decide(tmp_path: Path) -> None:
    url = make_contents(documents=False).write(tmp_path / "x.acts.zarr")
    with pytest.raises(UnknownNameError, match="holds no documents, or no column 'document'; a split, or columns of"):
        actstore.open(url).batches(**GIVEN, where=Filter(split=(0, 0.5)))
    with pytest.raises(UnknownNameError, match="column 'kind' is not in"):
        actstore.open(url).batches(**GIVEN, where=Filter(keep={"kind": "x"}))


def test_a_state_knows_the_filter_and_the_normalisation(finished: Path) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"where": Filter(split=(0, 0.5))}, {"where": Filter(split=(0.5, 1))}, {"where": Filter(max_norm=3)},
        {"where": Filter(keep={"flag": 1})}, {"where": Filter(drop={"flag": 1})}, {"normalize": "layer_norm"},
        {"where": Filter(keep={"flag": [0, 1]})}, {"where": Filter(keep={"flag": slice(0, 1)})},
        {"normalize": "norm_factor"}, {"normalize": "norm_factor", "where": Filter(max_norm=3)},
    ]  # fmt: skip
    store = actstore.open(finished)
    found = [store.batches(**GIVEN, **each).state()["loader"] for each in settings]
    assert len(set(found)) == len(settings)
    same = [
        Filter(keep={"flag": np.uint8(1), "position": (3, 1)}),
        Filter(keep={"position": np.array([1, 3]), "flag": [1]}),
    ]
    assert len({store.batches(**GIVEN, where=each).state()["loader"] for each in same}) == 1
    with pytest.raises(InputError, match="filter or normalisation; make the loader with the settings it had"):
        store.batches(**GIVEN, **settings[1]).restore(store.batches(**GIVEN, **settings[2]).state())


def test_equal_filters_are_written_equally(finished: Path) -> None:
    """Whatever type their numbers have: a configuration file may give either."""
    store = actstore.open(finished)
    with unchecked():
        equal = [
            (Filter(max_norm=10), Filter(max_norm=np.float32(10))),
            (Filter(keep={"flag": 1}), Filter(keep={"flag": [1.0, np.int64(1), 1]})),
            (Filter(split=[0, 0.5]), Filter(split=(0.0, np.float64(0.5)))),
            (Filter(drop={"token_id": np.array(7)}), Filter(drop={"token_id": range(7, 8)})),
        ]
    for one, other in equal:
        assert one == other
        assert hash(one) == hash(other)
        states = [store.batches(**GIVEN, where=where).state() for where in (one, other)]
        assert states[0] == states[1]
        json.dumps(states)
    long = np.arange(5000)
    changed = np.where(long == 2500, 9999, long)
    assert Filter(drop={"token_id": long}).as_json() != Filter(drop={"token_id": changed}).as_json()


def test_values_are_compared_in_the_dtype_of_their_column(tmp_path: Path) -> None:
    """0.1 is not a float32, and 2^62 + 1 no float64."""
    layout = actstore.Layout((actstore.Site("x", 1, None, "float32"),), 4, 4, 4,
                             (actstore.Column("share", "float32"), actstore.Column("large", "int64")))  # fmt: skip
    columns = {"share": np.array([0.1, 0.2, 0.1, 0.5], np.float32), "large": np.array([2**62, 2**62 + 1, 0, 1])}
    with actstore.create(tmp_path / "x.acts.zarr", layout, {}) as writer:
        writer.write(0, {"x": np.ones((4, 1), np.float32)}, samples=columns)
    store = actstore.open(tmp_path / "x.acts.zarr")
    for where, kept in [
        (Filter(keep={"share": 0.1}), [0, 2]),
        (Filter(drop={"share": [0.1, 0.5]}), [1]),
        (Filter(keep={"share": slice(0.1, 0.1)}), [0, 2]),
        (Filter(keep={"large": [2**62 + 1, 0.5, 2**70]}), [1]),
        (Filter(keep={"large": slice(0.5, 2**62)}), [0, 3]),
    ]:
        found = drain(store.batches(site="x", batch_size=4, epochs=1, drop_remainder=False, where=where))
        assert sorted(found[0].samples.tolist()) == kept


def test_a_name_of_samples_and_of_documents_is_ambiguous(tmp_path: Path) -> None:
    layout = dataclasses.replace(LAYOUT, columns=(*LAYOUT.columns[:3], actstore.Column("pages", "int32")))
    contents = make_contents(dataclasses.replace(layout, columns=layout.columns[:3]))
    contents = dataclasses.replace(
        contents, layout=layout, columns=contents.columns | {"pages": np.zeros(SAMPLES, np.int32)}
    )
    store = actstore.open(contents.write(tmp_path / "x.acts.zarr"))
    with pytest.raises(InputError, match=r"column 'pages' of .* is one of samples and one of documents; it cannot be"):
        store.batches(**GIVEN, where=Filter(keep={"pages": 3}))


def test_samples_without_a_document_are_named(tmp_path: Path, contents: Contents) -> None:
    columns = contents.columns | {"document": np.where(np.arange(SAMPLES) == 20, -1, contents.columns["document"])}
    lost = dataclasses.replace(contents, columns=columns).write(tmp_path / "x.acts.zarr")
    with (
        actstore.open(lost).batches(**GIVEN, where=Filter(split=(0, 0.5))) as loader,
        pytest.raises(InputError, match=r"samples of .* name the documents -1 to \d, it holds 0 to 4; a split, or"),
    ):
        loader.next_batch()


def test_a_copy_of_a_filtered_loader_has_read_nothing(finished: Path) -> None:
    where = Filter(split=(0, 0.9), drop={"token_id": 1003}, max_norm=1.3)
    with actstore.open(finished).batches(**GIVEN, where=where, normalize="norm_factor") as loader:
        loader.next_batch()
        written = pickle.dumps(loader)
        copy = pickle.loads(written)
        assert len(written) < 20_000
        assert copy._kept is not None
        assert not copy._kept._masks
        with copy:
            expected, found = loader.next_batch(), copy.next_batch()
        np.testing.assert_array_equal(found.rows, expected.rows)


# Normalisation


def normalized(name: str, rows: np.ndarray, all_rows: np.ndarray) -> np.ndarray:
    """In float64, by the formulas of the trainers."""
    rows, norms = rows.astype(np.float64), np.linalg.norm(all_rows.astype(np.float64), axis=1)
    width = rows.shape[1]
    if name == "expected_average_only_in":
        return rows * (np.sqrt(width) / norms.mean())
    if name == "norm_factor":
        return rows / np.sqrt(np.square(norms).mean())
    if name == "constant_norm_rescale":
        return rows * np.sqrt(width) / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred / (centred.std(axis=1, keepdims=True, ddof=1) + 1e-5)


NAMES = ("expected_average_only_in", "norm_factor", "constant_norm_rescale", "layer_norm")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("where", [None, Filter(max_norm=1.2)], ids=["all", "short rows"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_normalised_as_the_trainers_do(made: tuple[Contents, Path], name: Any, where: Filter | None) -> None:
    contents, url = made
    store = actstore.open(url)
    for site, layer in [("resid_post", 5), ("mlp_out", 2), ("attn_out", None), ("final_norm", None)]:
        place = contents.layout.site(site)
        index = place.layer_index(layer)
        rows = contents.rows[site] if place.layers is None else contents.rows[site][index]
        norms = norms_of(contents, site, layer)
        kept = np.full(SAMPLES, True) if where is None else norms <= 1.2 * np.median(norms)
        given = {**GIVEN, "site": site, "layer": layer}
        for batch in drain(store.batches(**given, where=where, normalize=name)):
            assert batch.rows.dtype == np.float32
            assert batch.rows.flags.writeable
            np.testing.assert_allclose(
                batch.rows, normalized(name, rows[batch.samples], rows[kept]), rtol=3e-6, atol=1e-6
            )


def test_each_layer_has_a_scale_of_its_own(made: tuple[Contents, Path]) -> None:
    contents, url = made
    loader = actstore.open(url).batches(
        layers={"mlp_out": [11, 2], "final_norm": None}, batch_size=8, normalize="expected_average_only_in", epochs=1
    )
    with loader:
        batch = loader.next_batch()
    assert set(loader.scales) == {("mlp_out", 11), ("mlp_out", 2), ("final_norm", None)}
    for number, layer in enumerate((11, 2)):
        rows = contents.rows["mlp_out"][contents.layout.site("mlp_out").layer_index(layer)]
        scale = 2 / norms_of(contents, "mlp_out", layer).mean()
        assert loader.scales["mlp_out", layer] == pytest.approx(scale, rel=1e-6)
        expected = rows[batch.samples].astype(np.float64) * scale
        np.testing.assert_allclose(batch.rows["mlp_out"][:, number], expected, rtol=3e-6)
    assert actstore.open(url).batches(**GIVEN).scales == {}
    assert actstore.open(url).batches(**GIVEN, normalize="layer_norm").scales == {}


def test_rows_of_zeros(tmp_path: Path) -> None:
    """They stay zeros where each row has a number of its own; where all are zero there is no number for all."""
    layout = actstore.Layout((actstore.Site("x", 3, None, "float32"),), 8, 8, 4, ())
    with actstore.create(tmp_path / "x.acts.zarr", layout, {}) as writer:
        writer.write(0, {"x": np.zeros((8, 3), np.float32)})
    store = actstore.open(tmp_path / "x.acts.zarr")
    for name in ("constant_norm_rescale", "layer_norm"):
        with store.batches(site="x", batch_size=8, normalize=name) as loader:  # type: ignore[call-overload]
            assert not next(loader).any()
    for name in ("expected_average_only_in", "norm_factor"):
        loader = store.batches(site="x", batch_size=8, normalize=name)  # type: ignore[call-overload]
        with loader, pytest.raises(InputError, match=r"norms of x of .* have the mean 0.0; expected a positive finite"):
            next(loader)


def test_other_normalisations_are_refused(finished: Path) -> None:
    with unchecked(), pytest.raises(InputError) as caught:
        actstore.open(finished).batches(**GIVEN, normalize="none")
    assert str(caught.value) == (
        "normalize is 'none'; expected one of expected_average_only_in, norm_factor, constant_norm_rescale, "
        "layer_norm, or None"
    )  # fmt: skip


# Statistics


@pytest.mark.parametrize(
    ("site", "layer"), [("resid_post", 11), ("mlp_out", 2), ("attn_out", None), ("final_norm", None)]
)
def test_statistics_are_those_of_numpy(made: tuple[Contents, Path], site: str, layer: int | None) -> None:
    contents, url = made
    norms = norms_of(contents, site, layer)
    for where, kept in [(None, np.full(SAMPLES, True)), (Filter(keep={"flag": 1}), contents.columns["flag"] == 1)]:
        found = actstore.open(url).stats(site=site, layer=layer, where=where)
        assert found.samples == kept.sum()
        assert found.mean == pytest.approx(norms[kept].mean(), rel=1e-12)
        assert found.root_mean_square == pytest.approx(np.sqrt(np.square(norms[kept]).mean()), rel=1e-12)
        assert found.median == np.median(norms[kept].astype(np.float32))
        assert found.largest == norms[kept].max()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), max_size=9), max_size=5))
def test_the_median_is_numpys(lists: list[list[float]]) -> None:
    parts = [np.array(values, np.float32) for values in lists]
    found, together = summarize(lambda: iter(parts)), np.concatenate([np.empty(0, np.float32), *parts])
    assert found.samples == len(together)
    if len(together):
        assert found.median == np.median(together)
        assert found.largest == together.max()
    else:
        assert np.isnan(found.median)


def test_statistics_of_nothing_are_refused(finished: Path) -> None:
    with pytest.raises(InputError, match=r"the filter keeps none of the 53 samples of .*; use one that keeps some"):
        actstore.open(finished).stats(layer=5, where=Filter(keep={"token_id": 1}))
    with pytest.raises(UnknownNameError, match="layer 3 of site 'resid_post' is not in this store"):
        actstore.open(finished).stats(layer=3)


def test_statistics_are_compared_with_their_marker(tmp_path: Path, contents: Contents) -> None:
    url = contents.write(tmp_path / "x.acts.zarr")
    one, other = (url / norm_name("resid_post") / f"c/1/{block}" for block in (0, 1))
    swapped = one.read_bytes(), other.read_bytes()
    one.write_bytes(swapped[1])
    other.write_bytes(swapped[0])
    with pytest.raises(CorruptStoreError, match=r"resid_post_norm, layer 5, block 0 of .*swapped, stale or edited"):
        actstore.open(url).stats(layer=5)
    assert actstore.open(url).stats(layer=5, check=False).samples == SAMPLES
