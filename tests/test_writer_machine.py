"""Any history of a store: writers, crashes, late writes, damages, repairs, seals and reads in any order (hypothesis).

What always holds: a committed block has the rows that were handed over, bit by bit, unless somebody damaged it. Then
verify names it and reading refuses it. Nothing is lost, nothing is shown as zeros. Repair, and writing what is then
missing, ends in the files of an undisturbed run.

The writer is the real one on real files. Its threads are tasks that run one after the other in an order that a seed
decides, and its writes are done when they are started: the same history gives the same files, every time. Real threads
and processes are killed in test_kill.
"""

import collections
import dataclasses
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from kill_points import WrappedArray, block_keys, create, marked_blocks, unchecked, watched, without_sync, write
from parts import part_and_all_of
from simulation import Crash, Executor
from stores import Contents, make_contents, tree

import actstore
from actstore import Column, Layout, Site, Writer, markers, sealing
from actstore import repair as repair_module
from actstore import store as store_module
from actstore import verify as verify_module
from actstore import writer as writer_module
from actstore.durable import LOCK_SUFFIX
from actstore.errors import ActstoreError, CorruptStoreError, InputError, SealedStoreError, UnfinishedStoreError
from actstore.garbage import find_garbage, remove_garbage
from actstore.kvstore import Root
from actstore.layout import norm_name
from actstore.ledger import read_plan
from actstore.markers import MANIFEST_KEY, PLAN_KEY, SEAL_KEY, marker_key

pytestmark = pytest.mark.slow

SITES = (Site("resid_post", 3, (0, 4)), Site("final_norm", 2, None, "float32"))
LAYOUT = Layout(SITES, 15, 4, 2, (Column("position", "int32"), Column("flag", "uint8")))  # 4 blocks, the last is short
OPENED = {PLAN_KEY, "zarr.json"}  # damaged, these stop every command with "restore it from a copy"
ANY = st.integers(0, 2**30)  # an index into what there is at that moment
BLOCKS = st.lists(st.integers(0, LAYOUT.blocks - 1), min_size=1, max_size=5)
DONE: collections.Counter[str] = collections.Counter()


# One thread, one moment


@contextmanager
def in_order(at: Callable[[str], None]) -> Iterator[None]:
    """Writers inside do one thing at a time, and call `at` with the name of every point they pass."""
    with ExitStack() as stack:
        executor = lambda *_, **__: Executor(random.Random(0))  # noqa: E731
        stack.enter_context(mock.patch.object(writer_module, "ThreadPoolExecutor", executor))
        stack.enter_context(mock.patch.object(Root, "open_array", _at_once(Root.open_array)))
        stack.enter_context(watched(at))
        yield


def _at_once(real: Callable[..., Any]) -> Callable[..., Any]:
    """Writes to arrays are done when they are started."""

    def done(key: str, start: Callable[[], Any]) -> Any:
        future = start()
        future.result()
        return future

    return lambda root, name, metadata: WrappedArray(real(root, name, metadata), name, done)


class DiesAt:
    """The process dies at its first passing of a point: nothing that comes after is done."""

    def __init__(self, point: str | None) -> None:
        self.point, self.dead = point, False

    def __call__(self, point: str) -> None:
        self.dead |= point == self.point
        if self.dead:
            raise Crash


def run(url: Path, contents: Contents, blocks: list[int], *, seal: bool = False, die_at: str | None = None) -> bool:
    """One writer from its start to its end or death; whether it died."""
    dies = DiesAt(die_at)
    with in_order(dies), suppress(Crash), create(url, contents, seal=seal) as writer:
        for block in blocks:
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns).result()
    return dies.dead


# What all histories share


@dataclasses.dataclass(frozen=True)
class World:
    """Contents, the points of a run, and the files of undisturbed runs."""

    contents: Contents
    points: list[str]
    whole: dict[str, bytes]
    unsealed: dict[str, bytes]
    other: dict[str, bytes]
    """Of an attempt whose activations differ in their last bits."""

    @classmethod
    def make(cls, folder: Path) -> "World":
        contents = make_contents(LAYOUT, documents=False)  # test_kill, test_damage and test_table have documents
        points: list[str] = []
        every = list(range(LAYOUT.blocks))
        with in_order(points.append):
            write_in_order(folder / "whole.acts.zarr", contents, seal=True)
        write(folder / "threads.acts.zarr", contents, every, seal=True)
        run(folder / "unsealed.acts.zarr", contents, every)
        bits = {name: rows.view(f"u{rows.itemsize}") ^ 1 for name, rows in contents.rows.items()}
        rows = {name: values.view(contents.rows[name].dtype) for name, values in bits.items()}
        run(folder / "other.acts.zarr", dataclasses.replace(contents, rows=rows), every)
        whole, threads, unsealed, other = (
            tree(folder / f"{name}.acts.zarr") for name in ("whole", "threads", "unsealed", "other")
        )
        assert whole == threads, "a writer without threads writes other bytes"
        return cls(contents, list(dict.fromkeys(points)), whole, unsealed, other)


def write_in_order(url: Path, contents: Contents, *, seal: bool) -> None:
    with create(url, contents, seal=seal) as writer:
        for block in range(LAYOUT.blocks):
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns).result()


class WriterMachine(RuleBasedStateMachine):
    """One store and everything that can happen to it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.folder = Path(tempfile.mkdtemp())
        self.url = self.folder / "run.acts.zarr"
        self.root = Root.of(self.url)
        self.hurt: set[str] = set()
        """Keys that were damaged and not mended since."""
        DONE["histories"] += 1

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            shutil.rmtree(self.folder)

    # What should be there, by bytes alone

    @property
    def files(self) -> dict[str, bytes]:
        found = tree(self.url) if self.url.exists() else {}
        return {key: data for key, data in found.items() if not key.endswith(LOCK_SUFFIX)}

    def is_there(self) -> bool:
        return (self.url / "zarr.json").exists()

    def missing(self) -> list[int]:
        return sorted(set(range(LAYOUT.blocks)) - marked_blocks(self.files))

    def is_right(self, key: str, data: bytes | None) -> bool:
        """Whether an object is that of the undisturbed run, apart from the last block's padding, which nobody reads."""
        whole = self.world.whole[key]
        if data == whole or data is None or len(data) != len(whole):
            return data == whole
        array, _, place = key.partition("/c/")
        start, stop = LAYOUT.block_range(LAYOUT.blocks - 1)
        site = next((site for site in LAYOUT.sites if site.name == array), None)
        if site is None:  # one chunk with its checksum
            last = place.split("/")[-1] == str(LAYOUT.blocks - 1)
            used = (stop - start) * (len(data) - 4) // LAYOUT.block_samples
            sound = google_crc32c.value(data[:-4]).to_bytes(4, "little") == data[-4:]
            return bool(place) and last and sound and data[:used] == whole[:used]
        used = math.ceil((stop - start) / LAYOUT.chunk_samples) * (LAYOUT.chunk_samples * site.row_bytes + 4)
        index = LAYOUT.block_samples // LAYOUT.chunk_samples * 16 + 4
        last = key.endswith(f"/{LAYOUT.blocks - 1}/0")
        return last and (data[:used], data[-index:]) == (whole[:used], whole[-index:])

    def is_complete(self, files: dict[str, bytes]) -> bool:
        return files.get("zarr.json") == self.world.whole["zarr.json"]

    def keys(self, block: int) -> list[str]:
        return [marker_key(block), f"valid/c/{block}", *block_keys(LAYOUT, block)]

    def wrong_keys(self, files: dict[str, bytes]) -> tuple[dict[int, set[str]], set[str]]:
        """What is not as promised: by block of those that have a marker or should have one, and of no block."""
        whole, complete = self.world.whole, self.is_complete(files)
        blocks = range(LAYOUT.blocks) if complete else sorted(marked_blocks(files))
        wrong = {block: {key for key in self.keys(block) if not self.is_right(key, files.get(key))} for block in blocks}
        promised = {key for key in whole if key.startswith(("layer/c", "assets/"))}
        if complete:
            promised |= {MANIFEST_KEY, SEAL_KEY}
        others = {key for key in promised if files.get(key) != whole[key]}
        for key in (key for key in whole if key.endswith("zarr.json")):
            accepted = {whole[key]} if complete else {whole[key], self.world.unsealed[key]}
            others |= {key} if files.get(key) not in accepted else set()
        return {block: keys for block, keys in wrong.items() if keys}, others

    # What can happen

    @rule(blocks=BLOCKS)
    def write(self, blocks: list[int]) -> None:
        """Any blocks in any order, also again."""
        with suppress(SealedStoreError):
            assert not run(self.url, self.world.contents, blocks)
            DONE["blocks written"] += len(blocks)

    @rule(count=st.integers(1, 3))
    def resume(self, count: int) -> None:
        """Several writers at once: all start, then all write a block each in turn, then all end."""
        contents, missing = self.world.contents, self.missing()
        with in_order(lambda point: None), suppress(SealedStoreError), ExitStack() as stack:
            writers = [stack.enter_context(create(self.url, contents)) for _ in range(count)]
            for place, block in enumerate(missing):
                activations, columns = contents.block(block)
                writers[place % count].write(block, activations, samples=columns).result()
            DONE["resumed"] += 1

    @rule(blocks=BLOCKS, where=ANY, inside=st.booleans())
    def crash(self, blocks: list[int], where: int, inside: bool) -> None:
        """A writer dies at a point, or ends because it does not come there. It seals if nothing is in the way."""
        keys = {key for block in blocks for key in self.keys(block)}
        points = [point for point in self.world.points if not inside or point.split()[-1] in keys]
        self.crash_at(points[where % len(points)], blocks)

    def crash_at(self, point: str, blocks: list[int]) -> None:
        wrong, _ = self.wrong_keys(self.files)
        seal = not wrong and set(self.missing()) <= set(blocks)
        with suppress(SealedStoreError):
            DONE["crashes"] += run(self.url, self.world.contents, blocks, seal=seal, die_at=point)

    @precondition(is_there)
    @rule(block=st.integers(0, LAYOUT.blocks - 1), which=ANY, same=st.booleans())
    def late_write(self, block: int, which: int, same: bool) -> None:
        """A write of a dead attempt arrives: the same bytes, or of activations with other last bits."""
        files, keys = self.files, [f"valid/c/{block}", *block_keys(LAYOUT, block)]
        if set(keys) <= files.keys():
            keys = [*keys, marker_key(block)]  # it was written after all of these
        self.late_write_of(keys[which % len(keys)], same=same)

    def late_write_of(self, key: str, *, same: bool) -> None:
        (self.url / key).parent.mkdir(parents=True, exist_ok=True)
        (self.url / key).write_bytes((self.world.whole if same else self.world.other)[key])
        self.hurt |= {key} if not same else set()
        DONE[f"late writes of {'the same' if same else 'other'} bits"] += 1
        if not same:
            self.read()

    @precondition(is_there)
    @rule(which=ANY, how=st.sampled_from(["flip", "delete", "truncate", "swap"]), where=ANY, inside=st.booleans())
    def damage(self, which: int, how: str, where: int, inside: bool) -> None:
        """To any file, or to one of a committed block."""
        files = self.files
        marked = [key for block in sorted(marked_blocks(files)) for key in self.keys(block) if key in files]
        keys = marked if inside and marked else [key for key in files if key not in OPENED]
        key, data = keys[which % len(keys)], files[keys[which % len(keys)]]
        if how == "delete":
            self.damage_to({key: None})
        elif how == "swap":
            partner = keys[where % len(keys)]
            self.damage_to({key: files[partner], partner: data})
        elif how == "truncate":
            self.damage_to({key: data[: where % max(len(data), 1)]})
        elif data:
            place = where % len(data)
            self.damage_to({key: data[:place] + bytes([data[place] ^ 1 << where % 8]) + data[place + 1 :]})

    def damage_to(self, changes: dict[str, bytes | None]) -> None:
        for key, data in changes.items():
            if data is None:
                (self.url / key).unlink()
            else:
                (self.url / key).write_bytes(data)
        self.hurt |= changes.keys()
        DONE["damages"] += 1
        self.read()

    @precondition(lambda self: self.hurt and self.is_there())
    @rule()
    def repair(self) -> None:
        report = verify_module.verify(self.root, read_plan(self.root))
        if not report.findings:
            with pytest.raises(InputError, match="there is nothing to repair"):
                repair_module.repair(self.root, read_plan(self.root), report)
            return
        repair_module.repair(self.root, read_plan(self.root), report)
        DONE["repairs"] += 1
        assert self.wrong_keys(self.files)[0] == {}, "a block is committed although it was found damaged"

    @precondition(is_there)
    @rule(times=st.integers(1, 2), both=st.booleans(), after_writing=st.booleans())
    def seal(self, times: int, both: bool, after_writing: bool) -> None:
        """Once, twice, or by two that both began before the other ended."""
        if after_writing:
            self.write(self.missing())
        missing, (wrong, _) = self.missing(), self.wrong_keys(self.files)
        try:
            with in_order(lambda point: None), ExitStack() as stack:
                for _ in range(times):
                    stack.enter_context(create(self.url, self.world.contents, seal=True))
                    if not both:
                        stack.pop_all().close()
        except UnfinishedStoreError:
            assert missing, "seal misses blocks that are there"
        except SealedStoreError:
            assert SEAL_KEY in self.files
        except CorruptStoreError:
            assert wrong, "seal refuses what nobody damaged"
        else:
            assert not missing, f"sealed without the blocks {missing}"
            DONE["seals"] += 1

    @precondition(is_there)
    @rule()
    def read(self) -> None:
        """By dataset, columns and batches: what is read is the truth or an error, and without damage it is no error."""
        files = self.files
        wrong, others = self.wrong_keys(files)
        store = actstore.open(self.url, partial=True)
        try:
            dataset = store.dataset(raw=True, partial=True)
        except ActstoreError:
            assert others, "a sound store cannot be opened"
            return
        complete = self.is_complete(files)
        blocks = range(LAYOUT.blocks) if complete else sorted(marked_blocks(files))
        spans = [LAYOUT.block_range(block) for block in blocks]
        assert dataset.sizes["sample"] == sum(stop - start for start, stop in spans)
        begin = 0
        for block, (start, stop) in zip(blocks, spans, strict=True):
            rows = slice(begin, begin := begin + stop - start)
            for name, values in (self.world.contents.rows | self.world.contents.columns).items():
                expected = values[..., start:stop, :] if name in self.world.contents.rows else values[start:stop]
                dataset_rows = lambda name=name, rows=rows: dataset[name].isel(sample=rows).values  # noqa: E731
                self.is_the_truth(dataset_rows, expected, f"{name}, block {block}", damaged=block in wrong)
        if complete and not others:
            self.read_batches(store, damaged=bool(wrong))
        DONE["reads"] += 1

    def is_the_truth(self, read: Callable[[], np.ndarray], expected: np.ndarray, what: str, *, damaged: bool) -> None:
        try:
            found = read()
        except ActstoreError:
            assert damaged, f"{what} cannot be read, and nobody damaged it"
            DONE["refused reads"] += 1
        else:
            assert found.tobytes() == expected.tobytes(), f"{what} is read as other values"
            DONE["true reads"] += 1

    def read_batches(self, store: actstore.Store, *, damaged: bool) -> None:
        def rows() -> np.ndarray:
            found = np.empty_like(self.world.contents.rows["resid_post"][1])
            with store.batches(layer=4, batch_size=4, epochs=1, drop_remainder=False) as batches:
                while batch := batches.next_or_none():
                    found[batch.samples] = batch.rows
            return found

        self.is_the_truth(rows, self.world.contents.rows["resid_post"][1], "batches", damaged=damaged)

    # What always holds

    @invariant()
    def what_always_holds(self) -> None:
        """Nothing is wrong that nobody damaged, and verify finds every damage and nothing else."""
        files = self.files
        self.hurt = {key for key in self.hurt if not self.is_right(key, files.get(key))}
        if "zarr.json" not in files:
            return
        wrong, others = self.wrong_keys(files)
        lost = set().union(*wrong.values()) - self.hurt
        assert not lost, f"committed, but missing or wrong: {sorted(lost)}"
        lost = others - self.hurt - {SEAL_KEY}  # a crash after the root group and before the seal
        assert not lost, f"promised, but missing or wrong: {sorted(lost)}"
        report = verify_module.verify(self.root, read_plan(self.root))
        assert report.damaged_blocks == sorted(wrong), "verify names other blocks than are damaged"
        found = {finding.what for finding in report.findings if finding.block is None}
        assert bool(found) == bool(others), (found, others)

    def finish(self) -> None:
        """Repairs what is to be repaired, writes what is missing, seals: every byte is that of an undisturbed run."""
        if self.is_there():
            report = verify_module.verify(self.root, read_plan(self.root))
            if report.findings:
                repair_module.repair(self.root, read_plan(self.root), report)
        with suppress(SealedStoreError):
            run(self.url, self.world.contents, self.missing(), seal=True)
        assert verify_module.verify(self.root, read_plan(self.root)).findings == ()
        remove_garbage(self.root, find_garbage(self.root))
        assert self.files.keys() == self.world.whole.keys()
        assert [key for key, data in self.files.items() if not self.is_right(key, data)] == []
        self.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with without_sync(), unchecked():
        yield World.make(tmp_path_factory.mktemp("world"))


@part_and_all_of("histories", 8, 60)
def test_any_history_ends_in_the_same_files(world: World, histories: int) -> None:
    DONE.clear()
    run_state_machine_as_test(
        lambda: WriterMachine(world),
        settings=settings(
            max_examples=histories, stateful_step_count=14, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    print(", ".join(f"{count} {what}" for what, count in DONE.most_common()) + ": 0 violations")
    assert DONE["histories"] >= histories
    rarest = min(DONE[what] for what in ["crashes", "damages", "repairs", "seals", "refused reads"])
    assert rarest >= max(1, histories // 12)


# Mutants: each is found by a history that is the same every time


def marker_first(self: Writer, block: int, *arrays: Any) -> Any:
    """The marker is written, with what it will say, before what it vouches for."""
    self.root.write(marker_key(block), MARKERS[block])
    return REAL["_commit"](self, block, *arrays)


def torn_shard(self: Root, key: str, pieces: list[memoryview]) -> None:
    """Half a shard is in its place before the whole is."""
    path = self.path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(pieces)[:20])
    REAL["write_pieces"](self, key, pieces)


def no_valid(self: Writer, name: str, *arguments: Any, **settings: Any) -> Any:
    """`valid` is not written."""
    nothing = SimpleNamespace(result=lambda: None)
    return nothing if name == "valid" else REAL["_start"](self, name, *arguments, **settings)


def keeps_markers(self: Root, key: str) -> None:
    """Repair leaves the markers of damaged blocks."""
    if not key.startswith(".act/commits/"):
        REAL["delete"](self, key)


def unchecked_dataset(*arguments: Any, **settings: Any) -> Any:
    """Reading does not compare chunks with their markers."""
    return REAL["open_dataset"](*arguments, **settings | {"check": False})


REAL: dict[str, Callable[..., Any]] = {
    "_commit": Writer._commit, "write_pieces": Root.write_pieces, "_start": Writer._start, "delete": Root.delete,
    "open_dataset": store_module.open_dataset, "checksum": markers.checksum,
}  # fmt: skip
MARKERS: dict[int, bytes] = {}
Steps = Callable[[WriterMachine], None]
SHARD, NORM = "resid_post/c/1/1/0", f"{norm_name('final_norm')}/c/2"


def all_blocks(machine: WriterMachine) -> None:
    machine.write([2, 0, 3, 1])


def dies_in_the_middle(machine: WriterMachine) -> None:
    machine.write([0])
    machine.crash_at(f"halfway through write_pieces {SHARD}", [2, 1])


def dies_while_writing_again(machine: WriterMachine) -> None:
    all_blocks(machine)
    machine.crash_at(f"halfway through write_pieces {SHARD}", [1])


def repairs_a_late_write(machine: WriterMachine) -> None:
    all_blocks(machine)
    machine.late_write_of(SHARD, same=False)
    machine.what_always_holds()
    machine.repair()


def reads_a_late_write(machine: WriterMachine) -> None:
    all_blocks(machine)
    machine.late_write_of(NORM, same=False)
    machine.late_write_of(SHARD, same=False)
    machine.read()


def seals_too_early(machine: WriterMachine) -> None:
    machine.write([0, 1, 3])
    machine.seal(times=1, both=False, after_writing=False)


MUTANTS: dict[str, tuple[Any, str, Any, Steps, str]] = {
    "the marker before the shards": (Writer, "_commit", marker_first, dies_in_the_middle, "committed, but missing"),
    "half a shard in its place": (Root, "write_pieces", torn_shard, dies_while_writing_again, "missing or wrong"),
    "valid is not written": (Writer, "_start", no_valid, all_blocks, "missing or wrong: .*valid/c/0"),
    "checksums of nothing": (
        writer_module, "checksum", lambda values: REAL["checksum"](values * 0), all_blocks, "missing or wrong",
    ),
    "repair forgets the marker": (Root, "delete", keeps_markers, repairs_a_late_write, "although it was found damaged"),
    "verify compares nothing": (
        verify_module, "_check_shard", lambda *_, **__: (None, 0), repairs_a_late_write, "verify names other blocks",
    ),
    "reading compares nothing": (
        store_module, "open_dataset", unchecked_dataset, reads_a_late_write, "read as other values",
    ),
    "seal counts nothing": (sealing, "missing_blocks", lambda *_: [], seals_too_early, "what nobody damaged"),
    "seal checks nothing": (
        writer_module, "seal", lambda root, plan: root.write("zarr.json", MARKERS[-1]), seals_too_early,
        r"sealed without the blocks \[2\]",
    ),
}  # fmt: skip


@contextmanager
def machine_of(world: World) -> Iterator[WriterMachine]:
    MARKERS.update({block: world.whole[marker_key(block)] for block in range(LAYOUT.blocks)})
    MARKERS[-1] = world.whole["zarr.json"]
    machine = WriterMachine(world)
    try:
        yield machine
    finally:
        shutil.rmtree(machine.folder)


def play(machine: WriterMachine, steps: Steps) -> None:
    steps(machine)
    machine.what_always_holds()


@pytest.mark.parametrize(("place", "name", "mutant", "steps", "message"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_found_by_a_fixed_history(
    world: World, place: Any, name: str, mutant: Any, steps: Steps, message: str
) -> None:
    with machine_of(world) as machine:
        play(machine, steps)  # without the mutant nothing is wrong
        machine.finish()
    patch: AbstractContextManager[Any] = mock.patch.object(place, name, mutant)
    with machine_of(world) as machine, patch, pytest.raises(AssertionError, match=message):
        play(machine, steps)


def test_a_history_is_the_same_every_time(world: World) -> None:
    """The order in which points are passed, and the files after a crash at each of some of them."""
    found = []
    for _ in range(2):
        points: list[str] = []
        with machine_of(world) as machine:
            with in_order(points.append):
                write_in_order(machine.url, world.contents, seal=True)
            shutil.rmtree(machine.url)
            files = []
            for point in world.points[::25]:
                run(machine.url, world.contents, [1, 0], die_at=point)
                files.append(machine.files)
                shutil.rmtree(machine.url, ignore_errors=True)
        found.append((points, files))
    assert found[0] == found[1]
