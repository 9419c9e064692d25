"""SIGKILL at every point of a run, and at random: what is committed stays, and the next run ends in the same bytes."""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_points import ASSETS, Forks, block_keys, check_kept, marked_blocks, points_of_a_run
from parts import part_and_all, part_and_all_of
from stores import Contents, tree

from actstore.garbage import find_garbage, remove_garbage
from actstore.kvstore import Root
from actstore.markers import TABLE_KEY, marker_key

pytestmark = pytest.mark.slow

PHASES = ["plan", "documents", "block 1", "block 3", "seal"]  # blocks 0 and 2 are written by the steps of block 1


def phase_of(point: str, contents: Contents) -> str:
    """The step of the protocol that a point belongs to, by the key that is written there and by how."""
    *_, verb, key = point.split()
    for block in range(contents.layout.blocks):
        if key in {*block_keys(contents.layout, block), f"valid/c/{block}", marker_key(block)}:
            return f"block {block}"
    if key == TABLE_KEY or (key.startswith("documents/") and "/c/" in key):
        return "documents"
    return "plan" if verb == "create" or "/c/" in key else "seal"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def points(contents: Contents, undisturbed: Path) -> list[str]:
    return points_of_a_run(undisturbed.with_name("points.acts.zarr"), contents)


@pytest.fixture(scope="module")
def undisturbed(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was written without any disturbance. Copy it before changing it."""
    url = tmp_path_factory.mktemp("undisturbed") / "run.acts.zarr"
    points_of_a_run(url, contents)
    return url


@pytest.fixture(scope="module")
def whole(undisturbed: Path) -> dict[str, bytes]:
    return tree(undisturbed)


def open_blocks(url: Path, contents: Contents) -> list[int]:
    """Blocks without a marker, by the names of files."""
    return sorted(set(range(contents.layout.blocks)) - marked_blocks(tree(url)))


def resume(forks: Forks, url: Path, contents: Contents, *, processes: int) -> None:
    """Writes what is missing, dealt to several processes at once. If nothing is, all of them seal at once."""
    missing = open_blocks(url, contents)
    shares = [missing[rank::processes] for rank in range(processes)]
    started = [forks.start(url, share, seal=not missing) for share in shares]
    killed = [forks.wait(process) for process in started]
    assert not any(killed)


def check_finished(forks: Forks, url: Path, whole: dict[str, bytes]) -> None:
    forks.finish(url)
    found = tree(url)
    assert found == whole, sorted(key for key in {*found, *whole} if found.get(key) != whole.get(key))


# Every point


def test_no_operation_is_forgotten(points: list[str], whole: dict[str, bytes], contents: Contents) -> None:
    """Every file of a store is made by an operation that has a point before and after it."""
    assert {point.split()[-1] for point in points} == set(whole)
    operations = {point.removeprefix("before ") for point in points if point.startswith("before ")}
    assert {f"after {operation}" for operation in operations} <= set(points)
    labels = re.compile(r"write (attn_out_)?layer/")  # objects; what else has chunks goes through TensorStore
    arrays = {name for name in operations if name.startswith("write ") and "/c/" in name and not labels.match(name)}
    assert arrays
    assert {f"started {name}" for name in arrays} <= set(points)
    shards = {name for name in operations if name.startswith("write_pieces ")}
    assert {f"halfway through {name}" for name in shards} <= set(points)
    assert "before write .act/commits/00000001.json" in points
    assert {phase_of(point, contents) for point in points} == {*PHASES, "block 0", "block 2"}
    assert ASSETS.keys() == {key.removeprefix("assets/") for key in whole if key.startswith("assets/")}
    keys = {key for block in range(contents.layout.blocks) for key in block_keys(contents.layout, block)}
    others = re.compile(r"documents/|(attn_out_)?layer/|valid/")
    assert keys == {key for key in whole if "/c/" in key and not others.match(key)}


@part_and_all(8)
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_a_point_is_continued_to_the_same_bytes(
    phase: str,
    stride: int,
    tmp_path: Path,
    forks: Forks,
    points: list[str],
    contents: Contents,
    whole: dict[str, bytes],
) -> None:
    chosen = [point for point in points if phase_of(point, contents) == phase]
    assert len(chosen) >= 24
    for number, point in enumerate(chosen[::stride]):
        url = tmp_path / f"{number}.acts.zarr"
        try:
            assert forks.wait(forks.start(url, range(contents.layout.blocks), seal=True, kill_at=point))
            check_kept(url, contents, whole)
            resume(forks, url, contents, processes=number % 3 + 1)
            check_finished(forks, url, whole)
        except AssertionError as error:
            raise AssertionError(f"killed at {point!r}: {error}") from error
        shutil.rmtree(url)
    print(
        f"{phase}: killed at {number + 1} of {len(chosen)} points, continued by 1 to 3 processes, every byte compared"
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not say how many threads run")
def test_the_server_has_no_threads_when_it_forks(tmp_path: Path, forks: Forks) -> None:
    assert forks.threads() == 1
    forks.wait(forks.start(tmp_path / "x.acts.zarr", [0]))
    assert forks.threads() == 1


# At random


@part_and_all_of("most", 20, 200)
def test_a_storm_of_kills(tmp_path: Path, forks: Forks, contents: Contents, whole: dict[str, bytes], most: int) -> None:
    """One to five processes at once, some with the same blocks, each killed after a random delay or left alone."""
    generator = random.Random(0)
    kills = rounds = handed = stores = committed = 0
    started = time.perf_counter()
    while kills < most:
        stores += 1
        url = tmp_path / f"{stores}.acts.zarr"
        while not (url / ".act/SEALED.json").exists():
            rounds += 1
            missing = open_blocks(url, contents)
            count = generator.randint(1, 5)
            shares = [missing[rank::count] for rank in range(count)]
            if generator.random() < 0.3:
                shares = [generator.sample(missing, len(missing)) for _ in shares]  # everybody writes everything
            running = [forks.start(url, share, seal=not missing) for share in shares]
            for process in generator.sample(running, len(running)):
                time.sleep(generator.uniform(0, 0.03))
                if generator.random() < 0.8:
                    os.kill(process, signal.SIGKILL)  # a process that has ended stays until it is waited for
            kills += sum([forks.wait(process) for process in running])
            handed += sum(map(len, shares))
            committed += len(missing) - len(open_blocks(url, contents))
            check_kept(url, contents, whole)
        remove_garbage(Root.of(url), find_garbage(Root.of(url)))  # of one killed while another wrote the same block
        check_finished(forks, url, whole)
        shutil.rmtree(url)
    print(
        f"{kills} kills in {rounds} rounds on {stores} stores in {time.perf_counter() - started:.0f} s: "
        f"{committed} blocks were committed, {handed - committed} were begun in vain or twice; 0 violations"
    )


# The checks themselves


def lose(name: str) -> Callable[[Path], None]:
    return lambda url: (url / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def damage(url: Path) -> None:
        data = bytearray((url / name).read_bytes())
        data[len(data) // 2] ^= 1
        (url / name).write_bytes(data)

    return damage


VIOLATIONS = {
    "a marker without its valid chunk": (lose("valid/c/1"), r"blocks \[1\] have a marker and are not valid"),
    "valid without a shard": (lose("mlp_out/c/2/3/0"), "missing or wrong: .*mlp_out/c/2/3/0"),
    "a shard with another bit": (flip("resid_post/c/0/1/0"), "missing or wrong: .*resid_post/c/0/1/0"),
    "documents that are not there": (lose("documents/text_bytes/c/0"), "missing or wrong: .*text_bytes"),
}


@pytest.mark.parametrize(("damage", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_the_check_of_what_must_hold_would_fire(
    tmp_path: Path, undisturbed: Path, contents: Contents, whole: dict[str, bytes], damage: Callable, message: str
) -> None:
    url = Path(shutil.copytree(undisturbed, tmp_path / "x.acts.zarr"))
    (url / ".act/SEALED.json").unlink()
    assert check_kept(url, contents, whole) == {0, 1, 2, 3}
    damage(url)
    with pytest.raises(AssertionError, match=message):
        check_kept(url, contents, whole)
