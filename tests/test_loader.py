"""The loader in every way: both orders, parts, several layers and sites; each sample once, each row the right one."""

import dataclasses
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_points import unchecked
from stores import LAYOUT, Contents, make_contents

import actstore
from actstore import Layout, Site
from actstore.errors import CorruptStoreError, InputError, UnknownNameError
from actstore.shuffle import ExactOrder

SAMPLES = LAYOUT.samples
CODECS = ("crc32c", "none", "zstd")
ORDERS = ("block", "exact")


@pytest.fixture(scope="module", params=CODECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, Path]:
    contents = make_contents(dataclasses.replace(LAYOUT, codec=request.param), documents=False)
    return contents, contents.write(tmp_path_factory.mktemp("made") / "run.acts.zarr")


def all_of(url: Path, **changes: Any) -> list[actstore.Batch]:
    """Every batch of one epoch."""
    defaults = {"site": "resid_post", "layer": 5, "batch_size": 7, "epochs": 1, "drop_remainder": False}
    if "sites" in changes or "layers" in changes:
        del defaults["layer"]
    with actstore.open(url).batches(**(defaults | {"window_bytes": 200} | changes)) as loader:
        return list(iter(loader.next_or_none, None))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", [True, False])
def test_every_row_is_the_one_of_its_sample(made: tuple[Contents, Path], order: str, check: bool) -> None:
    contents, url = made
    for site in contents.layout.sites:
        for index, layer in enumerate(site.layers or [None]):
            rows = contents.rows[site.name] if layer is None else contents.rows[site.name][index]
            batches = all_of(url, site=site.name, layer=layer, order=order, check=check)
            assert sorted(sample for batch in batches for sample in batch.samples) == list(range(SAMPLES))
            for batch in batches:
                assert batch.rows.dtype == rows.dtype
                assert batch.rows.flags.writeable
                assert batch.rows.tobytes() == rows[batch.samples].tobytes()


@pytest.mark.parametrize("order", ORDERS)
def test_several_sites_and_layers_are_aligned(made: tuple[Contents, Path], order: str) -> None:
    contents, url = made
    names = [site.name for site in contents.layout.sites]
    batches = all_of(url, sites=names, order=order)
    assert sorted(sample for batch in batches for sample in batch.samples) == list(range(SAMPLES))
    for batch in batches:
        assert list(batch.rows) == names
        for site in contents.layout.sites:
            rows = contents.rows[site.name]
            expected = rows[batch.samples] if site.layers is None else rows[:, batch.samples].swapaxes(0, 1)
            assert batch.rows[site.name].tobytes() == expected.tobytes()
    for batch in all_of(url, layers=[11, 2], order=order):
        expected = contents.rows["resid_post"][[2, 0]][:, batch.samples].swapaxes(0, 1)
        assert batch.rows["resid_post"].tobytes() == expected.tobytes()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_are_slices_of_the_same_batches(made: tuple[Contents, Path], order: str, parts: int) -> None:
    _, url = made
    whole = all_of(url, batch_size=6, order=order)
    split = [all_of(url, batch_size=6, order=order, part=(number, parts)) for number in range(parts)]
    assert [len(batches) for batches in split] == [len(whole)] * parts
    for number, batch in enumerate(whole):
        samples = np.concatenate([batches[number].samples for batches in split])
        assert samples.tolist() == batch.samples.tolist()
        assert {len(batches[number].samples) for batches in split} == {6 // parts} or number == len(whole) - 1


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), samples=st.integers(1, 60), chunk=st.integers(1, 5), chunks=st.integers(1, 4),
    order=st.sampled_from(ORDERS), codec=st.sampled_from(CODECS),
)  # fmt: skip
def test_any_shape_gives_every_sample_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, samples: int, chunk: int, chunks: int, order: Any,
    codec: Any,
) -> None:  # fmt: skip
    layout = Layout((Site("x", 3, (0,), "float32"),), samples, chunk * chunks, chunk, (), codec)
    contents = make_contents(layout, documents=False)
    url = contents.write(tmp_path_factory.mktemp("shape") / "x.acts.zarr")
    parts = data.draw(st.integers(1, 4))
    batch_size = parts * data.draw(st.integers(1, 20))
    given = {"site": "x", "layer": 0, "batch_size": batch_size, "order": order, "seed": data.draw(st.integers(0, 9)),
             "window_bytes": data.draw(st.integers(1, 1000))}  # fmt: skip
    whole = all_of(url, **given)
    seen = [sample for batch in whole for sample in batch.samples.tolist()]
    assert sorted(seen) == list(range(samples))
    split = [all_of(url, **given, part=(number, parts)) for number in range(parts)]
    again = [s for turn in zip(*split, strict=True) for batch in turn for s in batch.samples.tolist()]
    assert again == seen
    for batch in whole:
        assert batch.rows.tobytes() == contents.rows["x"][0][batch.samples].tobytes()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("several", [False, True])
def test_restored_at_every_step_it_goes_on(made: tuple[Contents, Path], order: Any, several: bool) -> None:
    _, url = made
    store = actstore.open(url)
    chosen: dict[str, Any] = {"sites": ["mlp_out", "final_norm"]} if several else {"site": "mlp_out", "layer": 2}
    given = {"batch_size": 9, "order": order, "window_bytes": 150, "seed": 4, **chosen}
    with store.batches(**given) as loader:
        states, batches = [loader.state()], []
        for _ in range(14):  # more than two epochs
            batches.append(loader.next_batch().samples.tolist())
            states.append(loader.state())
    for step, state in enumerate(states[:-1]):
        with store.batches(**given, part=(1, 3)) as loader:
            loader.restore(state)
            found = [loader.next_batch().samples.tolist() for _ in batches[step:][:4]]
        assert found == [batch[3:6] for batch in batches[step:][:4]]
    other = store.batches(**(given | {"order": "exact" if order == "block" else "block"}))
    with pytest.raises(InputError, match="another store, site, layer, seed, order, window, batch size, filter"):
        other.restore(states[3])


def test_two_seeds_and_two_epochs_differ(made: tuple[Contents, Path]) -> None:
    _, url = made
    orders = [
        [sample for batch in all_of(url, order="exact", seed=seed, epochs=2) for sample in batch.samples.tolist()]
        for seed in (0, 1)
    ]
    firsts = [order[:SAMPLES] for order in orders] + [order[SAMPLES:] for order in orders]
    assert all(one != other for one, other in itertools.combinations(firsts, 2))


def test_exact_order_mixes_far_more_than_a_window() -> None:
    """A batch of 4,096 of a million samples comes from about 4,096 places; its order never changes."""
    order = ExactOrder(1_000_000, 7, 65_536)
    samples = order.rows(0, 0, 4096)
    assert samples[:6].tolist() == EXACT
    assert len(np.unique(samples // 256)) > 2500  # of 3,906 chunks; 2,537 are expected when drawn at random
    assert abs(samples.mean() / 500_000 - 1) < 0.03


EXACT = [393657, 606016, 46566, 336945, 348177, 136821]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_goes_on_in_another_process(made: tuple[Contents, Path], order: Any) -> None:
    with actstore.open(made[1]).batches(site="mlp_out", layer=2, batch_size=5, order=order) as loader:
        next(loader)
        command = [sys.executable, "-c", COPY]
        done = subprocess.run(command, input=pickle.dumps(loader), capture_output=True, check=True)
        assert json.loads(done.stdout) == [loader.next_batch().samples.tolist() for _ in range(3)]


COPY = """
import json, pickle, sys
loader = pickle.load(sys.stdin.buffer)
print(json.dumps([loader.next_batch().samples.tolist() for _ in range(3)]))
"""


# Damage


def swapped(url: Path) -> None:
    one, other = url / "resid_post/c/1/2/0", url / "resid_post/c/2/2/0"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = {
    "swapped": swapped,
    "missing": lambda url: (url / "resid_post/c/1/2/0").unlink(),
    "empty": lambda url: (url / "resid_post/c/1/2/0").write_bytes(b""),
    "cut": lambda url: (url / "resid_post/c/1/2/0").write_bytes((url / "resid_post/c/1/2/0").read_bytes()[:-1]),
    "a folder": lambda url: ((url / "resid_post/c/1/2/0").unlink(), (url / "resid_post/c/1/2/0").mkdir()),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_shard_is_an_error_in_both_orders(
    made: tuple[Contents, Path], tmp_path: Path, order: str, damage: str
) -> None:
    _, path = made
    url = Path(shutil.copytree(path, tmp_path / "run.acts.zarr"))
    DAMAGES[damage](url)
    with pytest.raises(CorruptStoreError, match=r"resid_post, layer 5, block 2 of .*run `actstore verify`"):
        all_of(url, order=order)
    assert len(all_of(url, order=order, layer=2)) == 8  # another layer is as it was


# Settings


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an order": ({"order": "random"}, InputError, "order is 'random'; expected 'block' or 'exact'"),
    "a part": ({"part": (2, 2)}, InputError, r"part is \(2, 2\); expected \(number, parts\) with 0 <= number < parts"),
    "parts that do not divide": (
        {"part": (0, 2), "batch_size": 7}, InputError, "batch_size 7 cannot be divided into 2 equal parts; use",
    ),
    "a site": ({"sites": ["resid_post", "q"], "layer": None}, UnknownNameError, "site 'q' is not in this store"),
    "a layer": ({"layers": [2, 3], "layer": None}, UnknownNameError, "layer 3 of site 'resid_post' is not in"),
    "layer and layers": ({"layers": [2]}, InputError, r"layer=5 and several .* were given; give layers=\[5\] alone"),
    "a site twice": ({"sites": ["mlp_out"] * 2, "layer": None}, InputError, "name at least one of each, each once"),
    "no layers": ({"layers": [], "layer": None}, InputError, "name at least one of each, each once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused(made: tuple[Contents, Path], case: str) -> None:
    changes, kind, message = REFUSED[case]
    with unchecked(), pytest.raises(kind, match=message):
        actstore.open(made[1]).batches(**({"site": "resid_post", "layer": 5, "batch_size": 8} | changes))
