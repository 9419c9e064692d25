"""What SIGINT and SIGTERM do to a command: one line and exit code 75, at any moment.

Until a command writes, a signal ends the process at once: there is nothing to put in order. While it writes
(`finishing`), a signal only sets a mark, the loop ends at its next step, and what was handed to the writer is
committed; a second signal ends the process at once. Ending at once skips the interpreter's teardown, in which threads
that still compute would crash.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from actstore.errors import StoppedError


@dataclasses.dataclass
class Stopping:
    """The state of the handler: one per process, as signals are."""

    kept: str | None = None
    """What stays when the command is stopped; None while nothing has to be finished first."""
    received: str | None = None
    """Name of the signal that asked to stop."""

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  the signature of a handler
        """Called by Python in the main thread, between two of its instructions."""
        name = signal.Signals(number).name
        if self.kept is not None and self.received is None:
            self.received = name
            return
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{show_cursor}error: stopped by {name}; run the same command again to continue\n".encode())
        os._exit(StoppedError.exit_code)

    def check(self) -> None:
        """Ends the work in hand if a signal came.

        Raises:
            StoppedError: it did.
        """
        if self.received is not None:
            raise StoppedError(f"stopped by {self.received}; {self.kept}: run the same command again to continue")

    @contextmanager
    def finishing(self, kept: str) -> Iterator[None]:
        """Inside, signals wait for the next `check`. `kept` says what stays."""
        self.kept = kept
        try:
            yield
        finally:
            self.kept = None


STOPPING = Stopping()


def install() -> None:
    """Takes over SIGINT and SIGTERM of this process. For programs, not for libraries."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, STOPPING.handle)
