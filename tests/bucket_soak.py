"""Writers and readers behind a network that fails all the time: nothing is lost, nothing is torn.

`python -m tests.bucket_soak --seconds 60` takes turns between a server of S3 and one of Google's interface. Two writers
share each new store, until it is sealed, however often they fail; meanwhile a reader opens an older one. All go through
one proxy, and about one request in five meets a fault. A finished store is compared, byte by byte and without the
proxy, with one that was written to a folder. Prints a line of JSON.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from bucket_processes import LAYOUT, QUICK, Outcome, Processes, small_contents, stored
from fault_proxy import FaultProxy, Rule
from servers.everywhere import started
from servers.moto import NAME as MOTO
from servers.server import Server
from servers.strict_gcs import NAME as STRICT_GCS
from stores import tree

SERVERS = (MOTO, STRICT_GCS)
MOST_RUNS = 30  # of one store: with a fault in five requests a few do
OFTEN = 0.025  # of each of the faults that cost little time
SELDOM = 0.004  # of those that cost a second and more
RULES = [
    *(
        Rule(fault, probability=OFTEN)
        for fault in ("408", "429", "500", "502", "503", "reset before", "reset after", "lost answer", "truncation")
    ),
    Rule("hang", probability=SELDOM),
    Rule("slow drip", probability=SELDOM),
    Rule("bit flip", frozenset({"read"}), key="/c/", probability=SELDOM),  # not in a marker: see test_bucket_faults
    Rule("short body", frozenset({"read"}), key="/c/", probability=SELDOM),
]


@dataclasses.dataclass
class Figures:
    """What was done. `errors` are typed, of runs that were repeated."""

    requests: int = 0
    faulted: int = 0
    stores: int = 0
    runs: int = 0
    reads: int = 0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class BucketSoak:
    """The soak on one server, whose environment must be set."""

    def __init__(
        self, server: Server, processes: Processes, folder: Path, *, seed: int, rules: list[Rule] = RULES
    ) -> None:
        self._server, self._processes, self._seed, self._rules = server, processes, seed, rules
        self._whole = tree(small_contents().write(folder / "whole.acts.zarr"))
        self._prefix = f"soak-{os.getpid()}-{random.getrandbits(32):x}"
        self._older = ""
        self.figures = Figures()

    def run(self, seconds: float) -> Figures:
        """Writes and reads stores for so long, and finishes the last one.

        Raises:
            AssertionError: something was lost, torn, or read as what it is not; or a run failed without a typed error.
        """
        ends = time.monotonic() + seconds
        with FaultProxy(self._server.endpoint, self._rules, seed=self._seed) as proxy:
            while time.monotonic() < ends or not self.figures.stores:
                self._one_store(self._server.through(proxy.endpoint))
        self.figures.requests += len(proxy.requests)
        self.figures.faulted += proxy.faulted
        self.figures.faults.update(each.fault for each in proxy.requests if each.fault)
        return self.figures

    def _one_store(self, server: Server) -> None:
        key = f"{self._prefix}/{self.figures.stores}.acts.zarr"
        shares = [list(range(LAYOUT.blocks))[rank::2] for rank in range(2)]
        for _ in range(MOST_RUNS):
            running = [self._processes.start(server, "write", key, blocks=share, seal=False) for share in shares]
            running += [self._processes.start(server, "read", self._older)] if self._older else []
            outcomes = [self._processes.wait(process) for process in running]
            for outcome in outcomes[2:]:
                self._reading(outcome)
            if self._ended(outcomes[:2]) and self._ended([self._processes.run(server, "write", key)]):
                break
        else:
            raise AssertionError(f"{key} was not sealed in {MOST_RUNS} runs: {self.figures}")
        found = {name: data for name, data in stored(self._server, key).items() if "/probes/" not in name}
        wrong = sorted(name for name in {*found, *self._whole} if found.get(name) != self._whole.get(name))
        assert not wrong, f"{self._server.name}: lost or torn: {wrong}"
        self.figures.stores += 1
        self._older = key

    def _ended(self, outcomes: list[Outcome]) -> bool:
        """Whether all runs ended well; the others ended with a typed error."""
        self.figures.runs += len(outcomes)
        self.figures.errors.update(each.error for each in outcomes if each.error)
        return not any(each.error for each in outcomes)

    def _reading(self, outcome: Outcome) -> None:
        self.figures.reads += 1
        if outcome.error:
            self.figures.errors[f"{outcome.error} of a reader"] += 1
        else:
            assert outcome.value == "right", outcome


def soak(names: tuple[str, ...], seconds: float, seed: int) -> Mapping[str, Figures]:
    """The soak on each server, an equal part of the time on each."""
    figures = {}
    with started() as servers, Processes() as processes, tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).mkdir()
            with mock.patch.dict(os.environ, servers[name].client_environ() | QUICK):
                found = BucketSoak(servers[name], processes, Path(folder) / name, seed=seed)
                figures[name] = found.run(seconds / len(names))
    return figures


def main() -> None:
    """Prints figures; ends with a traceback at the first thing that was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.bucket_soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begun = time.monotonic()
    figures = soak(SERVERS, options.seconds, options.seed)
    requests, faulted = (sum(getattr(each, what) for each in figures.values()) for what in ("requests", "faulted"))
    total = {"seconds": round(time.monotonic() - begun), "requests": requests, "faulted": round(faulted / requests, 3)}
    each = {
        name: {**vars(found), "errors": dict(found.errors), "faults": dict(found.faults)}
        for name, found in figures.items()
    }
    print(json.dumps({**total, "seed": options.seed, **each}))


if __name__ == "__main__":
    main()
