"""Any history of a store: writers, kills, late writes, damages, repairs and seals in any order (hypothesis).

Three things always hold. Committed blocks read back as written unless somebody damaged them. Verify finds every damage
and nothing else. Repair, and writing what is then missing, restores every byte.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kill_points import (
    Forks,
    block_keys,
    create,
    marked_blocks,
    points_of_a_run,
    unchecked,
    without_sync,
    write,
)
from simulation import mutated
from stores import Contents, make_contents, tree

from actstore import repair as repair_module
from actstore import verify as verify_module
from actstore.durable import LOCK_SUFFIX
from actstore.errors import CorruptStoreError, InputError, SealedStoreError, UnfinishedStoreError
from actstore.garbage import find_garbage, remove_garbage
from actstore.kvstore import Root
from actstore.ledger import MANIFEST_KEY, PLAN_KEY, SEAL_KEY, TABLE_KEY, marker_key, read_plan
from actstore.metadata import array_metadata
from actstore.verify import Report

OPENED = {PLAN_KEY, TABLE_KEY, "zarr.json"}  # damaged, these stop every command with "restore it from a copy"
ANY = st.integers(0, 2**30)  # an index into what there is at that moment
BLOCKS = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@dataclasses.dataclass(frozen=True)
class World:
    """What all histories share: processes, and the files of undisturbed runs."""

    forks: Forks
    contents: Contents
    points: list[str]
    whole: dict[str, bytes]
    unsealed: dict[str, bytes]
    other: dict[str, bytes]
    """Of an attempt whose activations differ in their last bits."""

    @classmethod
    def make(cls, forks: Forks, folder: Path) -> "World":
        contents = make_contents()
        points = points_of_a_run(folder / "whole.acts.zarr", contents)
        write(folder / "unsealed.acts.zarr", contents, range(contents.layout.blocks))
        rows = {name: np.nextafter(values, values + values.dtype.type(1)) for name, values in contents.rows.items()}
        write(folder / "other.acts.zarr", dataclasses.replace(contents, rows=rows), range(contents.layout.blocks))
        whole, unsealed, other = (tree(folder / f"{name}.acts.zarr") for name in ("whole", "unsealed", "other"))
        return cls(forks, contents, points, whole, unsealed, other)


class WriterMachine(RuleBasedStateMachine):
    """One store and everything that can happen to it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.folder = Path(tempfile.mkdtemp())
        self.url = self.folder / "run.acts.zarr"
        self.root = Root.of(self.url)
        self.plan = create(self.folder / "plan.acts.zarr", world.contents).plan

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            shutil.rmtree(self.folder)

    @property
    def files(self) -> dict[str, bytes]:
        return {key: data for key, data in tree(self.url).items() if not key.endswith(LOCK_SUFFIX)}

    def is_there(self) -> bool:
        return (self.url / "zarr.json").exists()

    def missing(self) -> list[int]:
        return sorted(set(range(self.world.contents.layout.blocks)) - marked_blocks(self.files))

    def verify(self) -> Report:
        return verify_module.verify(self.root, read_plan(self.root))

    # What should be found, by bytes alone

    def damaged_blocks(self) -> list[int]:
        """Blocks whose marker, `valid` or data are not those of the undisturbed run, as far as they are promised."""
        files, whole = self.files, self.world.whole
        complete = files.get("zarr.json") == whole["zarr.json"]
        blocks = range(self.world.contents.layout.blocks) if complete else marked_blocks(files)
        return [block for block in sorted(blocks) if any(files.get(key) != whole[key] for key in self.keys(block))]

    def keys(self, block: int) -> list[str]:
        return [marker_key(block), f"valid/c/{block}", *block_keys(self.world.contents.layout, block)]

    def other_damages(self) -> set[str]:
        """The same for what belongs to no block."""
        files, whole = self.files, self.world.whole
        complete = files.get("zarr.json") == whole["zarr.json"]
        accepted = {
            key: {data} for key, data in whole.items() if key.startswith(("layer/c", "attn_out_layer/c", "assets/"))
        }
        for key in whole:
            if key.endswith("zarr.json"):
                accepted[key] = {whole[key]} if complete else {whole[key], self.world.unsealed[key]}
            if key.startswith("documents/") and "/c/" in key and (TABLE_KEY in files or complete):
                accepted[key] = {whole[key]}
        if complete:
            accepted |= {key: {whole[key]} for key in (TABLE_KEY, MANIFEST_KEY, SEAL_KEY)}
        return {key for key, data in accepted.items() if files.get(key) not in data}

    # What can happen

    @rule(blocks=BLOCKS)
    def write(self, blocks: list[int]) -> None:
        """Any blocks in any order, also twice."""
        assert not self.world.forks.wait(self.world.forks.start(self.url, blocks))

    @rule(count=st.integers(1, 3))
    def resume(self, count: int) -> None:
        """Several processes at once."""
        missing = self.missing()
        started = [self.world.forks.start(self.url, missing[rank::count]) for rank in range(count)]
        assert [self.world.forks.wait(process) for process in started] == [False] * count

    @rule(blocks=BLOCKS, where=ANY)
    def crash(self, blocks: list[int], where: int) -> None:
        """A writer is killed at a point, or ends because it does not come there. It seals if nothing is in the way."""
        keys = {key for block in blocks for key in self.keys(block)}
        points = [point for point in self.world.points if where % 2 == 0 or point.split()[-1] in keys]
        sealing = set(self.missing()) <= set(blocks) and not self.damaged_blocks()
        process = self.world.forks.start(self.url, blocks, seal=sealing, kill_at=points[where % len(points)])
        self.world.forks.wait(process)

    @precondition(is_there)
    @rule(block=st.integers(0, 3), which=ANY, same=st.booleans())
    def late_write(self, block: int, which: int, same: bool) -> None:
        """A write of a dead attempt arrives: the same bytes, or activations with other last bits."""
        keys = block_keys(self.world.contents.layout, block)
        key = keys[which % len(keys)]
        (self.url / key).parent.mkdir(parents=True, exist_ok=True)
        (self.url / key).write_bytes((self.world.whole if same else self.world.other)[key])

    @precondition(is_there)
    @rule(which=ANY, how=st.sampled_from(["flip", "delete", "truncate", "swap"]), where=ANY)
    def damage(self, which: int, how: str, where: int) -> None:
        files = self.files
        keys = [key for key in files if key not in OPENED]
        key = keys[which % len(keys)]
        data = files[key]
        if how == "delete":
            (self.url / key).unlink()
        elif how == "truncate":
            (self.url / key).write_bytes(data[: where % len(data)])
        elif how == "flip":
            place = where % self.used_bytes(key, len(data))
            (self.url / key).write_bytes(data[:place] + bytes([data[place] ^ 1 << where % 8]) + data[place + 1 :])
        else:
            partner = keys[where % len(keys)]
            (self.url / key).write_bytes(files[partner])
            (self.url / partner).write_bytes(data)

    def used_bytes(self, key: str, size: int) -> int:
        """Bytes of a file that mean something: chunks of the last shard with nothing but padding do not."""
        layout = self.world.contents.layout
        last = layout.blocks - 1
        for site in layout.sites:
            if key.startswith(f"{site.name}/c/") and key.endswith(f"/{last}/0"):
                start, stop = layout.block_range(last)
                chunks = -(-(stop - start) // layout.chunk_samples)
                return chunks * (layout.chunk_samples * site.row_bytes + 4)
        return size

    @precondition(is_there)
    @rule()
    def repair(self) -> None:
        report = self.verify()
        if not report.findings:
            with pytest.raises(InputError, match="there is nothing to repair"):
                repair_module.repair(self.root, self.plan, report)
            return
        assert list(repair_module.repair(self.root, self.plan, report).blocks) == report.damaged_blocks
        assert self.damaged_blocks() == []

    @precondition(is_there)
    @rule()
    def seal(self) -> None:
        missing = self.missing()
        try:
            create(self.url, self.world.contents, seal=True).__exit__(None, None, None)
        except UnfinishedStoreError:
            assert missing
        except SealedStoreError:
            assert SEAL_KEY in self.files
        except CorruptStoreError:
            assert any(
                self.files[marker_key(block)] != self.world.whole[marker_key(block)]
                for block in marked_blocks(self.files)
            )

    # What always holds

    @precondition(is_there)
    @invariant()
    def verify_finds_every_damage_and_nothing_else(self) -> None:
        report = self.verify()
        assert report.damaged_blocks == self.damaged_blocks()
        others = {finding.what for finding in report.findings if finding.block is None}
        assert bool(others) == bool(self.other_damages()), (others, self.other_damages())

    @precondition(is_there)
    @invariant()
    def committed_blocks_are_never_read_wrong(self) -> None:
        """Strictly: a missing chunk is an error. Only bytes that somebody changed read as other values."""
        files, metadata = self.files, array_metadata(self.plan, complete=False)
        for name, rows in self.world.contents.rows.items():
            array = self.root.open_array(name, metadata[name])
            for block in marked_blocks(files):
                span = slice(*self.world.contents.layout.block_range(block))
                keys = [key for key in block_keys(self.world.contents.layout, block) if key.startswith(f"{name}/c/")]
                try:
                    stored = array[..., span, :].read().result()
                except ValueError:
                    assert any(files.get(key) != self.world.whole[key] for key in keys)
                    continue
                if not np.array_equal(stored, rows[..., span, :]):
                    assert any(files[key] != self.world.whole[key] for key in keys)

    def finish(self) -> None:
        """Repairs what is to be repaired, writes what is missing, seals: every byte is that of an undisturbed run."""
        if self.is_there() and (report := self.verify()).findings:
            repair_module.repair(self.root, self.plan, report)
        write(self.url, self.world.contents, self.missing(), seal=True)
        assert self.verify().findings == ()
        remove_garbage(self.root, find_garbage(self.root))
        assert tree(self.url) == self.world.whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Forks() as forks, without_sync(), unchecked():
        yield World.make(forks, tmp_path_factory.mktemp("world"))


def run_machine(world: World, **changes: Any) -> None:
    few = settings(max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: WriterMachine(world), settings=settings(few, **changes))


def test_any_history_ends_in_the_same_bytes(world: World) -> None:
    run_machine(world)


MUTANTS = {
    "values are not compared": (verify_module, "_check_shard", ("checksum(values) == shard.digest", "True")),
    "missing chunks are filled": (
        Root,
        "open_array",
        ('"fill_missing_data_reads": False', '"fill_missing_data_reads": True'),
    ),
    "markers of damaged blocks stay": (repair_module, "repair", ("for block in blocks]", "for block in []]")),
}


@pytest.mark.parametrize(("place", "name", "change"), MUTANTS.values(), ids=MUTANTS)
def test_the_machine_would_find(world: World, place: Any, name: str, change: tuple[str, str]) -> None:
    with mutated(place, name, change), pytest.raises(AssertionError):
        run_machine(world, phases=[Phase.generate], database=None, derandomize=True)
