"""Runs a plan in front of a person: progress on the terminal, and a clean end at SIGINT and SIGTERM."""

from typing import TYPE_CHECKING

from actstore.card import human_bytes
from actstore.stopping import STOPPING
from actstore.terminal import Work

if TYPE_CHECKING:
    from extract.loop import Progress
    from extract.plan import ExtractPlan
    from extract.ranks import Rank

WORTH_SAYING = 0.05


def run_with_progress(decided: "ExtractPlan", store: str, *, rank: "Rank | None" = None) -> "Progress":
    """Runs a plan with a bar or plain lines: the whole run's on worker 0, elsewhere those of this worker.

    Raises:
        StoppedError: a signal came; committed blocks stay.
    """
    from extract.loop import run

    samples = decided.as_json()["samples"]

    def show(state: "Progress") -> None:
        storage = state.seconds_for_storage / max(state.seconds, 1e-9)
        note = f"{state.tokens_per_second:,.0f} tokens/s, {human_bytes(state.bytes_written)} written"
        if storage > WORTH_SAYING:
            note += f", {storage:.0%} waiting for storage"
        work.update(samples - state.samples_left, samples, note)

    label = "extract" if rank is None or rank.workers == 1 else f"extract {rank.rank} of {rank.workers}"
    with Work(label, unit="samples") as work, STOPPING.finishing(f"{store} keeps its committed blocks"):
        return run(decided, store, progress=show, rank=rank, stopping=STOPPING.reason)
