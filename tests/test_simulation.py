"""The commit protocol in schedules that a seed decides: the real code in thousands, a model of its order in 50,000.

Mutants show that the rules would find a mistake in the order of writes.
"""

import dataclasses
import itertools
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from kill_points import block_keys
from parts import part_and_all_of
from simulation import (
    Crash,
    Disk,
    Request,
    Rules,
    Steps,
    Violation,
    model_host,
    mutated,
    real_host,
    run_model,
    run_real,
    simulated,
    stale_nodes,
)
from stores import Contents, make_contents, make_documents, tree

from actstore import Column, Layout, Site, Writer, api, ledger, markers, sealing, table, writer
from actstore import store as store_module
from actstore.errors import CorruptStoreError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.markers import SEAL_KEY, marker_key
from actstore.metadata import array_metadata
from actstore.repair import repair
from actstore.verify import verify

pytestmark = pytest.mark.slow

LAYOUT = Layout((Site("resid_post", 1, (0, 1), "float32"),), 5, 2, 1, (Column("flag", "uint8"),))
RATES = [0.0, 0.005, 0.02, 0.05]
MODEL_SCHEDULES, REAL_SCHEDULES, DRIFT_SCHEDULES = 50_000, 2_000, 300


@dataclasses.dataclass(frozen=True)
class World:
    """A tiny store: what is written, what the end looks like, and the model's steps."""

    url: Path
    attempts: tuple[Contents, ...]
    wholes: tuple[dict[str, bytes], ...]
    rules: Rules
    steps: Steps

    @property
    def contents(self) -> Contents:
        return self.attempts[0]

    @classmethod
    def make(cls, folder: Path, *, documents: bool) -> "World":
        made = make_contents(LAYOUT)
        made.columns["flag"][:] = [1, 0, 0, 0, 1]  # block 1 has nothing but fill values
        few = dataclasses.replace(make_documents(), columns={}) if documents else None
        attempts = tuple(
            dataclasses.replace(
                made, documents=few, rows={name: with_low_bits(rows, bits) for name, rows in made.rows.items()}
            )
            for bits in range(3)
        )
        wholes = tuple(tree(contents.write(folder / f"{number}.acts.zarr")) for number, contents in enumerate(attempts))
        unsealed = tree(attempts[0].write(folder / "unsealed.acts.zarr", seal=False))
        nodes = [f"{name}/zarr.json" for name in array_metadata(attempts[0].plan, complete=True)]
        rules = Rules.of(attempts[0], wholes[0], unsealed)
        return cls(folder / "x.acts.zarr", attempts, wholes, rules, Steps.of(attempts[0], nodes, ["layer/c/0"]))

    def disk(self, seed: int, **changes: bool) -> tuple[Disk, float]:
        """A store for one schedule, and how often its hosts die."""
        generator = random.Random(seed)
        rules = dataclasses.replace(self.rules, **changes)
        return Disk(rules, generator, fault_rate=generator.choice(RATES)), generator.choice(RATES)


def with_low_bits(rows: np.ndarray, bits: int) -> np.ndarray:
    """The same rows as another machine would compute them: the last bits differ."""
    return (rows.view(np.uint32) ^ np.uint32(bits)).view(np.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("plain"), documents=False)


@pytest.fixture(scope="module")
def with_documents(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("with_documents"), documents=True)


Run = Callable[[Disk, float], tuple[int, int]]


def real_run(world: World) -> Run:
    return lambda disk, crash_rate: run_real(disk, world.url, world.attempts[:1], crash_rate=crash_rate)


def model_run(world: World) -> Run:
    return lambda disk, crash_rate: run_model(disk, world.steps, crash_rate=crash_rate)


def run_schedules(world: World, run: Run, seeds: range, *, what: str, **changes: bool) -> list[Disk]:
    """Runs a schedule per seed, and prints how many steps and crashes that were.

    Raises:
        Violation: names the first seed that breaks a rule.
    """
    started, steps, crashes, disks = time.perf_counter(), 0, 0, []
    for seed in seeds:
        disk, crash_rate = world.disk(seed, **changes)
        try:
            done = run(disk, crash_rate)
        except Violation as violation:
            raise Violation(f"seed {seed}: {violation}") from None
        steps, crashes = steps + done[0], crashes + done[1]
        if changes:
            disks.append(disk)
    seconds = time.perf_counter() - started
    print(f"{what}: {len(seeds):,} schedules, {steps:,} steps, {crashes:,} crashes in {seconds:.0f} s; 0 violations")
    return disks


# The real code


@part_and_all_of("count", REAL_SCHEDULES // 10, REAL_SCHEDULES)
def test_the_real_code_in_thousands_of_schedules(plain: World, count: int) -> None:
    run_schedules(plain, real_run(plain), range(count), what="real code")


def test_a_seed_decides_everything(plain: World) -> None:
    for seed in range(3):
        logs = []
        for _ in range(2):
            disk, crash_rate = plain.disk(seed)
            disk.logging = True
            real_run(plain)(disk, crash_rate)
            logs.append(disk.log)
        assert logs[0] == logs[1]


@part_and_all_of("count", REAL_SCHEDULES // 100, REAL_SCHEDULES // 10)
def test_the_real_code_with_documents(with_documents: World, count: int) -> None:
    run_schedules(with_documents, real_run(with_documents), range(count), what="with documents")


def test_a_store_that_ignores_conditions_is_never_wrong(plain: World) -> None:
    """Only JSON of the unfinished store may come late and stay: no value is wrong, and rewriting it is safe."""
    disks = run_schedules(plain, real_run(plain), range(200), what="no conditions", stale_nodes=True)
    stale = [stale_nodes(disk) for disk in disks]
    assert all(key.endswith("zarr.json") for keys in stale for key in keys)
    print(f"{sum(map(bool, stale))} of {len(stale)} finished stores have stale metadata")


@part_and_all_of("count", DRIFT_SCHEDULES // 5, DRIFT_SCHEDULES)
def test_late_writes_with_other_low_bits_are_found_and_repaired(plain: World, tmp_path: Path, count: int) -> None:
    """Hosts of different rounds compute different low bits: verify names exactly the blocks that were mixed."""
    mixed = 0
    for seed in range(count):
        disk, crash_rate = plain.disk(seed, exact=False)
        run_real(disk, plain.url, plain.attempts, crash_rate=crash_rate)
        damaged = mixed_blocks(plain, disk.objects)
        if not damaged:
            continue
        mixed += 1
        url = tmp_path / f"{seed}.acts.zarr"
        for key, data in disk.objects.items():
            (url / key).parent.mkdir(parents=True, exist_ok=True)
            (url / key).write_bytes(data)
        root = Root.of(url)
        report = verify(root, read_plan(root))
        assert report.damaged_blocks == damaged
        repair(root, read_plan(root), report)
        plain.contents.write(url, blocks=damaged)
        assert verify(root, read_plan(root)).findings == ()
        shutil.rmtree(url)
    assert mixed > 5, "the schedules are too calm to show anything"
    print(f"{mixed} of {count} schedules left blocks of two attempts; each was found and repaired")


def mixed_blocks(world: World, objects: dict[str, bytes]) -> list[int]:
    """Blocks whose data are not those that their marker was written for, by bytes alone."""
    found = []
    for block in range(LAYOUT.blocks):
        key = marker_key(block)
        whole = next(whole for whole in world.wholes if whole[key] == objects[key])
        if any(objects[name] != whole[name] for name in block_keys(LAYOUT, block)):
            found.append(block)
    return found


def test_a_marker_of_another_plan_is_refused_for_ever(plain: World) -> None:
    """Somebody copied a marker of another run into the store: it is never sealed, and the marker is named."""
    for seed in range(20):
        with pytest.raises(CorruptStoreError, match=r"commits/00000001.json is of block 1 of plan 000"):
            run_with_foreign_marker(plain)(*plain.disk(seed))


def run_with_foreign_marker(world: World) -> Run:
    def run(disk: Disk, crash_rate: float) -> tuple[int, int]:
        fingerprint = world.contents.plan.fingerprint.encode()
        disk.objects[marker_key(1)] = world.rules.whole[marker_key(1)].replace(fingerprint, b"0" * 64)
        return real_run(world)(disk, crash_rate)

    return run


# The model


@part_and_all_of("count", MODEL_SCHEDULES // 10, MODEL_SCHEDULES)
def test_the_model_in_50_000_schedules(plain: World, count: int) -> None:
    run_schedules(plain, model_run(plain), range(count), what="model")


def test_the_model_with_documents(with_documents: World) -> None:
    run_schedules(with_documents, model_run(with_documents), range(MODEL_SCHEDULES // 25), what="model, documents")


def requests_of_model(disk: Disk, world: World, stop_after: int) -> None:
    for _ in itertools.islice(model_host(disk, world.steps, 0, 1), stop_after):
        pass


def requests_of_real_code(disk: Disk, world: World, stop_after: int) -> None:
    left = stop_after

    def wait(request: Request) -> Any:
        nonlocal left
        while left:
            try:
                next(request)
            except StopIteration as end:
                return end.value
            left -= 1
        raise Crash

    with simulated(disk, world.url, wait), suppress(Crash):
        real_host(world.url, world.contents, 0, 1)


def without_order_in_groups(world: World, log: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The log without the keys of objects that may be under way at once: data of a block, arrays of the documents."""
    groups = {key: f"data of {block}" for block in range(LAYOUT.blocks) for key in block_keys(LAYOUT, block)}
    groups |= dict.fromkeys(world.steps.documents, "documents")
    return [(what, groups.get(key, key)) for what, key in log]


@pytest.mark.parametrize(("documents", "stride"), [(False, 1), (True, 9)], ids=["plain", "with documents"])
def test_the_model_makes_the_requests_of_the_real_code(
    request: pytest.FixtureRequest, documents: bool, stride: int
) -> None:
    """Alone, cut off after any number of requests, and then those of the host that continues."""
    world: World = request.getfixturevalue("with_documents" if documents else "plain")
    for stop_after in itertools.count(0, stride):
        logs = []
        for host in (requests_of_model, requests_of_real_code):
            disk = Disk(world.rules, random.Random(0), fault_rate=0)
            disk.logging = True
            host(disk, world, stop_after)
            sealed = SEAL_KEY in disk.objects
            host(disk, world, sys.maxsize)
            assert disk.objects == world.rules.whole
            logs.append(without_order_in_groups(world, disk.log))
        assert logs[0] == logs[1], f"after {stop_after} requests"
        if sealed:
            break
    print(f"the model makes the requests of the real code, {stop_after // stride} times cut off and continued")


ORDERS = {
    "marker before shards": (2, 0, 1),
    "marker before valid": (0, 2, 1),
    "valid before shards": (1, 0, 2),
    "valid missing": (0, 2),
    "shards missing": (1, 2),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_model_in_another_order_is_caught(plain: World, order: tuple[int, ...]) -> None:
    groups = plain.steps.block
    steps = dataclasses.replace(plain.steps, block=lambda number: tuple(groups(number)[index] for index in order))
    mutant = dataclasses.replace(plain, steps=steps)
    with pytest.raises(Violation, match="is there before") as caught:
        run_schedules(mutant, model_run(mutant), range(1000), what="mutant")
    print(caught.value)


# Mutants of the real code

VALID = 'self._start("valid", first, np.ones(stop - first, np.uint8)).result()'
COMMIT = "write_marker(self.root, self.plan, marker)"
LATER = "(lambda key, pieces: self.__dict__.setdefault('late', []).append((key, list(pieces))))("
AT_LAST = "[self.root.write_pieces(*put) for put in self.__dict__.pop('late')]"
SEALED_BLOCKS = [
    ("    found = root", "    blocks = {*plan.blocks} - {*missing_blocks(root, plan)}\n    found = root"),
    ("in plan.blocks)\n    digest", "in blocks)\n    digest"), ("zip(plan.blocks, found", "zip(blocks, found"),
    ("        _refuse_lost_shards(root, plan)", ""),
]  # fmt: skip
MUTANTS: dict[str, tuple[bool, list[tuple[Any, str, list[tuple[str, str]]]]]] = {
    "marker before shards": (False, [
        (Writer, "_write_shard", [("self.root.write_pieces(", LATER)]),
        (Writer, "_commit", [(COMMIT, f"{COMMIT}; {AT_LAST}")]),
    ]),
    "marker before valid": (False, [(Writer, "_commit", [(VALID, "pass"), (COMMIT, f"{COMMIT}; {VALID}")])]),
    "a write not awaited": (False, [(Writer, "_commit", [("in pending:", "in pending[1:]:")])]),
    "valid not awaited": (False, [(Writer, "_commit", [(VALID, VALID.removesuffix(".result()"))])]),
    "valid missing": (False, [(Writer, "_commit", [(VALID, "pass")])]),
    "fill values deleted": (False, [
        (Root, "open_array", [('"store_data_equal_to_fill_value": True', '"store_data_equal_to_fill_value": False')]),
    ]),
    "no padding": (False, [(Writer, "_padded", [("if not missing:", "if True:")])]),
    "seal before all markers": (False, [
        (sealing, "seal", [("if missing:", "if False:")]), (sealing, "write_manifest", SEALED_BLOCKS),
    ]),
    "a block is done when it is valid": (False, [
        (markers, "committed_blocks", [("key_in(plan.generation, MARKER_FOLDER)", '"valid/c/"')]),
    ]),
    "documents not awaited": (True, [(table, "write_table", [("writing.result()", "pass")])]),
    "documents' marker missing": (True, [(table, "write_table", [("write_table_marker(", "(lambda *_: None)(")])]),
}  # fmt: skip


@contextmanager
def mutant(changes: list[tuple[Any, str, list[tuple[str, str]]]]) -> Iterator[None]:
    """Changes the source of actstore; a function that other modules import by name is changed there too."""
    with ExitStack() as stack:
        for place, name, texts in changes:
            patch = stack.enter_context(mutated(place, name, *texts))
            for module in (ledger, markers, sealing, writer, table, api, store_module):
                if not isinstance(place, type) and hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, patch))
        yield


@pytest.mark.parametrize(("documents", "changes"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_caught(request: pytest.FixtureRequest, documents: bool, changes: Any) -> None:
    world: World = request.getfixturevalue("with_documents" if documents else "plain")
    with mutant(changes), pytest.raises((Violation, CorruptStoreError)) as caught:
        run_schedules(world, real_run(world), range(200), what="mutant")
    print(caught.value)


def test_a_mutant_that_accepts_a_marker_of_another_plan_is_caught(plain: World) -> None:
    old = "(marker.fingerprint, marker.block) != (plan.fingerprint, block)"
    with (
        mutant([(markers, "parsed_marker", [(old, "marker.block != block")])]),
        pytest.raises(CorruptStoreError, match="block 1 is committed, but its shard resid_post/c/0/1/0 is gone"),
    ):
        run_schedules(plain, run_with_foreign_marker(plain), range(20), what="mutant")
