"""What SIGINT and SIGTERM do to a command: one line and exit code 75, at any moment.

Until a command writes, a signal ends the process at once: there is nothing to put in order. While it writes
(`finishing`), a signal only sets a mark, the loop ends at its next step, and what was handed to the writer is
committed: within 25 seconds, else it is dropped. A second signal ends the process at once. Ending at once skips the
interpreter's teardown, in which threads that still compute would crash.
"""

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from actstore.errors import StoppedError
from actstore.logs import error_line

LIMIT_SECONDS = 25.0  # launchers that send SIGTERM kill after 30 s or more


@dataclasses.dataclass
class Stopping:
    """The state of the handler: one per process, as signals are."""

    kept: str | None = None
    """What stays when the command is stopped; None while nothing has to be finished first."""
    received: str | None = None
    """Name of the signal that asked to stop."""
    _limit: threading.Timer | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  the signature of a handler
        """Called by Python in the main thread, between two of its instructions."""
        name = signal.Signals(number).name
        if self.kept is not None and self.received is None:
            self.received = name
            dropped = f"{name}, what was not written after {LIMIT_SECONDS:.0f} s is dropped"
            self._limit = threading.Timer(LIMIT_SECONDS, _end, [dropped])
            self._limit.daemon = True
            self._limit.start()
            return
        _end(name)

    def reason(self) -> str | None:
        """Why to end the work in hand; None while no signal came."""
        if self.received is None:
            return None
        return f"stopped by {self.received}; {self.kept}: run the same command again to continue"

    def check(self) -> None:
        """Ends the work in hand if a signal came.

        Raises:
            StoppedError: it did.
        """
        if (reason := self.reason()) is not None:
            raise StoppedError(reason)

    @contextmanager
    def finishing(self, kept: str) -> Iterator[None]:
        """Inside, signals wait for the next `check`. `kept` says what stays."""
        self.kept = kept
        try:
            yield
        finally:
            self.kept = None
            if self._limit is not None:
                self._limit.cancel()


def _end(why: str) -> None:
    """Ends the process at once."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    said = error_line(f"stopped by {why}; run the same command again to continue")
    os.write(2, f"{show_cursor}{said}".encode())
    os._exit(StoppedError.exit_code)


STOPPING = Stopping()


def install() -> None:
    """Takes over SIGINT and SIGTERM of this process. For programs, not for libraries."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, STOPPING.handle)


def ignore() -> None:
    """Lets a process that is done end with its own exit code, whatever signal comes while Python shuts down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
