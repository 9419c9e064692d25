"""Runs a plan in front of a person: progress on the terminal, and a clean end at SIGINT and SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from actstore.errors import StoppedError
from actstore.terminal import Work, human_bytes

if TYPE_CHECKING:
    from extract.loop import Progress
    from extract.plan import ExtractPlan


def run_with_progress(decided: "ExtractPlan", store: str) -> "Progress":
    """Runs a plan with a bar or plain lines, and stops cleanly at SIGINT and SIGTERM.

    Raises:
        StoppedError: a signal came; committed blocks stay.
    """
    from extract.loop import run

    with Work("extract", unit="samples") as work, stoppable(f"{store} keeps its committed blocks"):
        return run(
            decided,
            store,
            progress=lambda state: work.update(
                decided.store.layout.samples - state.samples_left,
                decided.store.layout.samples,
                f"{state.tokens_per_second:,.0f} tokens/s, {human_bytes(state.bytes_written)} written",
            ),
        )


@contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """The first SIGINT or SIGTERM raises StoppedError in the main thread; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  the signature of a handler
        signal.signal(number, signal.SIG_DFL)
        raise StoppedError(f"stopped by {signal.Signals(number).name}; {kept}: run the same command again to continue")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
