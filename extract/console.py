"""Runs a plan in front of a person, or of programs: progress, metrics, and a clean end at signals."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actstore.card import human_bytes
from actstore.logs import say
from actstore.stopping import STOPPING
from actstore.terminal import Work

if TYPE_CHECKING:
    from extract.loop import Progress
    from extract.plan import ExtractPlan
    from extract.ranks import Rank


class RunConsole:
    """What one worker of a run shows: on worker 0 the whole run's progress, on others lines of their own work.

    Args:
        rank: which worker it is.
    """

    def __init__(self, rank: "Rank") -> None:
        self.rank = rank
        self._latest: Progress | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, rank: "Rank", *, metrics_port: int | None) -> "Iterator[RunConsole]":
        """Says which worker this is, and inside serves its metrics where a port is given.

        Raises:
            InputError: the port cannot be had.
        """
        console = cls(rank)
        if rank.workers > 1:
            say(str(rank), source=rank.source)
        if metrics_port is None:
            yield console
            return
        from extract.metrics import served

        with served(metrics_port, rank, lambda: console._latest):
            yield console

    def run(self, decided: "ExtractPlan", store: str) -> "Progress":
        """Runs a plan.

        Raises:
            StoppedError: a signal came; committed blocks stay.
        """
        from extract.loop import run
        from extract.mesh import leaving

        samples, alone = decided.as_json()["samples"], self.rank.workers == 1

        def show(state: "Progress") -> None:
            self._latest = state
            if self.rank.rank == 0:
                work.update(samples - state.samples_left, samples, _note(state), _fields(state))
            else:
                work.update(state.samples_computed, None, _note(state), _fields(state))

        label = "extract" if alone else f"worker {self.rank.rank} of {self.rank.workers}"
        with (
            STOPPING.finishing(f"{store} keeps its committed blocks"),
            leaving(),
            Work(label, unit="samples", bar=self.rank.rank == 0) as work,
        ):
            return run(decided, store, progress=show, rank=self.rank, stopping=STOPPING.reason)


def _note(state: "Progress") -> str:
    """How fast, and what limits, in a line."""
    return (
        f"{state.tokens_per_second:,.0f} tokens/s, {human_bytes(state.bytes_written)} written, "
        f"{human_bytes(int(state.bytes_per_second))}/s, {state.share_for_storage:.0%} waiting for storage, limited by "
        f"the {state.limit}"
    )


def _fields(state: "Progress") -> dict[str, Any]:
    """The same for programs."""
    return dataclasses.asdict(state) | {
        "tokens_per_second": round(state.tokens_per_second, 1), "bytes_per_second": round(state.bytes_per_second),
        "share_for_storage": round(state.share_for_storage, 4), "limit": state.limit,
    }  # fmt: skip
