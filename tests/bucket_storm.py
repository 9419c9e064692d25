"""Writers of a store in a bucket are killed: at every point of a run, and at random. Nothing that was promised is lost.

`python -m tests.bucket_storm` does it at length, on one server of S3 and one of Google's interface, and prints a line
of JSON; the tests do some of it.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from bucket_processes import LAYOUT, Processes, as_files, small_contents, stored
from kill_points import check_kept
from servers.everywhere import started
from servers.moto import NAME as MOTO
from servers.server import Server
from servers.strict_gcs import NAME as STRICT_GCS
from stores import tree

SERVERS = (MOTO, STRICT_GCS)
PROBES = ".act/probes/"  # empty objects of writers that died between two requests


@dataclasses.dataclass
class Figures:
    """What was done."""

    kills: int = 0
    stores: int = 0
    rounds: int = 0
    seconds: float = 0.0


class Storm:
    """Kills writers of small stores on one server. The server's environment must be set: `stored` needs it."""

    def __init__(self, server: Server, processes: Processes, folder: Path) -> None:
        self._server, self._processes, self._folder = server, processes, folder
        self._contents = small_contents()
        self.whole = tree(self._contents.write(folder / "whole.acts.zarr"))
        """What a run without disturbance leaves, in a folder."""
        self._prefix = f"storm-{os.getpid()}-{random.getrandbits(32):x}"
        self._keys = self._snapshots = 0

    def points(self) -> list[str]:
        """Every point of a run."""
        return self._processes.value(self._server, "points", self._key())

    def kill_at(self, points: Iterable[str]) -> Figures:
        """Kills a run at each of these points, and has one to three processes finish it.

        Raises:
            AssertionError: something that was promised is missing or wrong; or the end is not the same bytes.
        """
        figures, begun = Figures(), time.monotonic()
        for number, point in enumerate(points):
            key = self._key()
            try:
                assert self._processes.run(self._server, "write", key, kill_at=point).killed
                missing = self._missing(key)
                count = number % 3 + 1
                shares = [missing[rank::count] for rank in range(count)]
                running = [self._processes.start(self._server, "write", key, blocks=share) for share in shares[1:]]
                outcomes = [self._processes.wait(each) for each in running]
                assert all(each.error in ("", "UnfinishedStoreError") for each in outcomes), outcomes
                self._processes.value(self._server, "write", key)
                self._compare(key)
            except AssertionError as error:
                raise AssertionError(f"{self._server.name}: killed at {point!r}: {error}") from error
            figures.kills, figures.stores, figures.rounds = figures.kills + 1, figures.stores + 1, figures.rounds + 2
        figures.seconds = time.monotonic() - begun
        return figures

    def at_random(self, kills: int, *, seed: int) -> Figures:
        """One to four processes at once, some with the same blocks, each killed after a random delay or left alone.

        Raises:
            AssertionError: as of `kill_at`.
        """
        figures, draw, begun = Figures(), random.Random(seed), time.monotonic()
        while figures.kills < kills:
            figures.stores += 1
            key = self._key()
            sealed = False
            while not sealed:
                figures.rounds += 1
                missing, count = self._missing(key), draw.randint(1, 4)
                everything = draw.random() < 0.3
                shares = [missing if everything else missing[rank::count] for rank in range(count)]
                running = [
                    self._processes.start(self._server, "write", key, blocks=share, seal=not missing)
                    for share in shares
                ]  # fmt: skip
                for process in draw.sample(running, len(running)):
                    time.sleep(draw.uniform(0, 0.5))
                    if draw.random() < 0.8:
                        os.kill(process, signal.SIGKILL)  # one that has ended stays until it is waited for
                outcomes = [self._processes.wait(process) for process in running]
                assert not any(each.error for each in outcomes), outcomes
                figures.kills += sum(each.killed for each in outcomes)
                sealed = ".act/SEALED.json" in stored(self._server, key)
            self._missing(key)
            self._compare(key)
        figures.seconds = time.monotonic() - begun
        return figures

    def _key(self) -> str:
        """A place for another store."""
        self._keys += 1
        return f"{self._prefix}/{self._keys}.acts.zarr"

    def _missing(self, key: str) -> list[int]:
        """Blocks that are not committed, after a look at everything that was promised."""
        self._snapshots += 1
        files = as_files(stored(self._server, key), self._folder / f"{self._snapshots}.acts.zarr")
        files.mkdir(exist_ok=True)
        marked = check_kept(files, self._contents, self.whole)
        return sorted(set(range(LAYOUT.blocks)) - marked)

    def _compare(self, key: str) -> None:
        found = {name: data for name, data in stored(self._server, key).items() if not name.startswith(PROBES)}
        wrong = sorted(name for name in {*found, *self.whole} if found.get(name) != self.whole.get(name))
        assert not wrong, f"other bytes than those of an undisturbed run: {wrong}"


def storms(names: Iterable[str]) -> Iterator[tuple[str, Storm]]:
    """A storm on each server, with its environment set meanwhile."""
    with started() as servers, Processes() as processes, tempfile.TemporaryDirectory() as folder:
        for name in names:
            server = servers[name]
            (Path(folder) / name).mkdir()
            with mock.patch.dict(os.environ, server.client_environ()):
                yield name, Storm(server, processes, Path(folder) / name)


def main() -> None:
    """Prints figures as JSON; ends with a traceback at the first promise that was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.bucket_storm", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="at random, on each server")
    parser.add_argument("--every", type=int, default=1, help="of the points of a run, each so many-th")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = {}
    for name, storm in storms(SERVERS):
        at_random = storm.at_random(options.kills, seed=options.seed)
        points = storm.points()
        at_points = storm.kill_at(points[:: options.every])
        result[name] = {"random": dataclasses.asdict(at_random), "points": dataclasses.asdict(at_points)}
        print(f"{name}: {result[name]}, of {len(points)} points", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
