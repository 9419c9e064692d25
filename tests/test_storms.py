"""Workers that are killed, stopped, slowed, and started again in other numbers: nothing is lost, little done twice."""

import collections
import itertools
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from fleet import CONTEXT, Worker, workers
from stores import tree

import extract
from actstore.claims import CLAIM_FOLDER
from extract.named import model_folder
from extract.ranks import Rank

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

KILLED, STOPPED = -9, 75


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one worker writes whom nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (worker,) = workers(folder, folder / "x.acts.zarr", 1)
    assert worker.wait() == 0, worker.errors
    return tree(folder / "x.acts.zarr")


class Tally(NamedTuple):
    """What became of a block: how often it was taken, and how often a worker that had it ended before it was done."""

    taken: int
    interrupted: int


def tally(fleet: list[Worker]) -> dict[int, Tally]:
    """By block, from the lines that workers wrote up to their end."""
    taken: collections.Counter[int] = collections.Counter()
    interrupted: collections.Counter[int] = collections.Counter()
    for worker in fleet:
        in_hand = set()
        for did, block in worker.blocks:
            if did == "took":
                taken[block] += 1
                in_hand.add(block)
            elif did == "gave back":
                interrupted[block] += 1
            if did != "took":
                in_hand.discard(block)
        assert not in_hand or worker.code in (KILLED, STOPPED)
        interrupted.update(in_hand)
    return {block: Tally(taken[block], interrupted[block]) for block in taken}


def storm(folder: Path, undisturbed: dict[str, bytes], *, rounds: int, seed: int) -> tuple[int, int]:
    """Rounds of workers in changing numbers, of which some are killed or stopped; stores, one after the other.

    Returns:
        How many workers were killed or stopped, and how many blocks were computed again.
    """
    draw = random.Random(seed)
    fleets: list[Worker] = []
    ended = again = 0
    stores = itertools.count()
    url = folder / f"{next(stores)}.acts.zarr"
    for turn in range(rounds):
        fleet = workers(folder / f"round-{turn}", url, draw.randint(1, 4), "--log", "json")
        fleets += fleet
        until_blocks(fleet, url, draw.randint(0, 12))
        for worker in draw.sample(fleet, len(fleet)):
            time.sleep(draw.uniform(0, 0.3))
            worker.signal(signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL)
        codes = [worker.wait(60) for worker in fleet]
        assert set(codes) <= {0, KILLED, STOPPED}, [worker.errors for worker in fleet]
        ended += sum(code != 0 for code in codes)
        if turn == rounds - 1 or (url / ".act/SEALED.json").exists():
            (last,) = workers(folder / f"end-{turn}", url, 1, "--log", "json")  # what is left, or nothing
            assert last.wait() == 0, last.errors
            assert tree(url) == undisturbed
            found = tally([*fleets, last])
            assert set(found) == set(range(last.summary["blocks"]))
            for block, (taken, interrupted) in found.items():
                assert taken - 1 <= interrupted, f"block {block} was taken {taken} times, {interrupted} workers lost it"
            again += sum(each.taken - 1 for each in found.values())
            fleets, url = [], folder / f"{next(stores)}.acts.zarr"
    return ended, again


def until_blocks(fleet: list[Worker], url: Path, more: int) -> None:
    """Waits until so many more blocks are committed, or all workers have ended."""
    folder = url / ".act/commits"
    count = lambda: len(list(folder.glob("*.json"))) if folder.is_dir() else 0  # noqa: E731
    target = count() + more
    while count() < target and any(worker.code is None for worker in fleet):
        time.sleep(0.005)


def test_a_small_storm(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    ended, _ = storm(tmp_path, undisturbed, rounds=5, seed=8)
    assert ended >= 5


@pytest.mark.long
def test_a_storm(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    ended, again = storm(tmp_path, undisturbed, rounds=50, seed=9)
    print(f"50 rounds: {ended} workers killed or stopped, {again} blocks computed again")
    assert ended >= 50


def test_meta_a_block_that_is_computed_twice_would_be_noticed(tmp_path: Path) -> None:
    """Two workers that cannot see each other's claims."""
    url = tmp_path / "x.acts.zarr"
    (first,) = workers(tmp_path / "first", url, 1, "--log", "json")
    assert first.wait() == 0
    for marker in (url / ".act/commits").glob("*3.json"):
        marker.unlink()
    (url / ".act/SEALED.json").unlink()
    (second,) = workers(tmp_path / "second", url, 1, "--log", "json")
    assert second.wait() == 0
    found = tally([first, second])
    assert {block for block, each in found.items() if each.taken - 1 > each.interrupted} == set(
        range(3, len(found), 10)
    )


SLOW_SECONDS, PATIENCE = 0.4, 2.0


def slow_or_fast(url: str, number: int, results: str) -> None:
    """A worker that needs a second and more for a pass, or none that does; in a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    plan = extract.make_plan(
        model_folder("tiny-qwen2"), extract.open_documents("python-docs", limit=12), layers=[1, 3], context=128,
        batch=4, block_samples=1024,
    )  # fmt: skip

    def slowed(_: object) -> None:
        time.sleep(SLOW_SECONDS * (number == 0))

    began = time.monotonic()
    state = extract.run(plan, url, rank=Rank(number, 2), patience=PATIENCE, progress=slowed)
    Path(results, f"{number}.txt").write_text(f"{state.blocks_computed} {state.blocks} {time.monotonic() - began}")


def test_a_slow_worker_is_overtaken_without_harm(tmp_path: Path) -> None:
    """Its share is taken by one that has run out, also the blocks that it has in hand; it comes to a good end."""
    urls = [str(tmp_path / f"{name}.acts.zarr") for name in ("both", "one")]
    both = [CONTEXT.Process(target=slow_or_fast, args=(urls[0], number, str(tmp_path))) for number in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    found = [(tmp_path / f"{number}.txt").read_text().split() for number in (0, 1)]
    (slow, fast), blocks = (int(each[0]) for each in found), int(found[0][1])
    assert blocks > 8
    assert fast > 2 * slow
    assert blocks <= slow + fast <= blocks + 3  # at most the blocks that the slow one had in hand
    alone = CONTEXT.Process(target=slow_or_fast, args=(urls[1], 1, str(tmp_path)))
    alone.start()
    alone.join(200)
    assert tree(Path(urls[0])) == tree(Path(urls[1]))
    assert not list(Path(urls[0], CLAIM_FOLDER).glob("*.json"))
