"""Runs a plan in front of a person: progress on the terminal, and a clean end at SIGINT and SIGTERM."""

from typing import TYPE_CHECKING

from actstore.card import human_bytes
from actstore.stopping import STOPPING
from actstore.terminal import Work

if TYPE_CHECKING:
    from extract.loop import Progress
    from extract.plan import ExtractPlan


def run_with_progress(decided: "ExtractPlan", store: str) -> "Progress":
    """Runs a plan with a bar or plain lines.

    Raises:
        StoppedError: a signal came; committed blocks stay.
    """
    from extract.loop import run

    samples = decided.as_json()["samples"]

    def show(state: "Progress") -> None:
        rate, written = f"{state.tokens_per_second:,.0f} tokens/s", human_bytes(state.bytes_written)
        work.update(samples - state.samples_left, samples, f"{rate}, {written} written")
        STOPPING.check()

    with Work("extract", unit="samples") as work, STOPPING.finishing(f"{store} keeps its committed blocks"):
        return run(decided, store, progress=show)
