"""What SIGINT, SIGTERM and SIGHUP do to a command: one line and exit code 75, at any moment.

Until a command writes, a signal ends the process at once: there is nothing to put in order. While it writes
(`finishing`), a signal only sets a mark, the loop ends at its next step, and what was handed to the writer is
committed: within 25 seconds, else it is dropped. A second signal ends the process at once. Ending at once skips the
interpreter's teardown, in which threads that still compute would crash.

SIGHUP says that the terminal is gone, such as that of an ssh session. Where it is ignored, as under nohup, it stays so.
"""

import contextlib
import dataclasses
import os
import signal
import stat
import threading
from collections.abc import Iterator
from types import FrameType

from actstore.errors import StoppedError
from actstore.logs import say_last

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
        if number == signal.SIGHUP:
            _leave_terminal()
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

    @contextlib.contextmanager
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
    say_last(f"stopped by {why}; run the same command again to continue")
    os._exit(StoppedError.exit_code)


def _leave_terminal() -> None:
    """Lets what is said from now on go nowhere, where it went to a terminal that is gone: each write would fail."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


STOPPING = Stopping()


def install() -> None:
    """Takes over SIGINT, SIGTERM and SIGHUP of this process. For programs, not for libraries."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, STOPPING.handle)


def ignore() -> None:
    """Lets a process that is done end with its own exit code, whatever signal comes while Python shuts down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
