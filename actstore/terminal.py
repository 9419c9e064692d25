"""What commands show while they work: a bar on a terminal, a line every few seconds anywhere else."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from actstore.logs import logs_json, say

SECONDS_BETWEEN_LINES = 10.0


class Work:
    """Progress of one piece of work, on standard error. Use it in a `with` statement.

    Args:
        label: what is being done.
        unit: what is counted.
        bar: False for lines on a terminal too.
    """

    def __init__(self, label: str, *, unit: str, bar: bool = True) -> None:
        self._label, self._unit, self._wants_bar = label, unit, bar
        self._bar: Progress | None = None
        self._shown: tuple[int, int | None, str] = (0, 0, "")
        self._fields: Mapping[str, Any] = {}
        self._last_line = 0.0

    def update(self, done: int, total: int | None, note: str = "", fields: Mapping[str, Any] | None = None) -> None:
        """Shows that `done` of `total` units are done, or of a number that nobody knows; `note` may hold rates.

        Args:
            done: units that are done.
            total: of how many; None where nobody knows.
            note: what else to say.
            fields: the same for programs, in JSON lines.
        """
        self._shown, self._fields = (done, total, note), fields or {}
        if self._bar is not None:
            if total is None:
                note = f"{done:,} {self._unit}{', ' + note if note else ''}"
            self._bar.update(
                self._bar.task_ids[0], completed=done, total=None if total is None else max(total, 1), note=note
            )  # fmt: skip
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def __enter__(self) -> Self:
        self._last_line = time.monotonic()
        if self._wants_bar and sys.stderr.isatty() and not logs_json():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                       TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
            self._bar = Progress(*columns, console=Console(file=sys.stderr))
            self._bar.add_task(self._label, total=None, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with suppress(OSError):  # of a terminal that is gone
                self._bar.stop()
        elif kind is None and (self._shown[1] or self._shown[0]):
            self._line()

    def _line(self) -> None:
        done, total, note = self._shown
        self._last_line = time.monotonic()
        of_all = "" if total is None else f" of {total:,}"
        text = f"{self._label}: {done:,}{of_all} {self._unit}{', ' + note if note else ''}"
        say(text, done=done, total=total, unit=self._unit, **self._fields)


@contextmanager
def redrawn() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows a text on standard output: on a terminal in place of the one before, else below."""
    with Live(auto_refresh=False) as live:

        def show(text: str) -> None:
            if live.console.is_terminal:
                live.update(Text(text), refresh=True)
            else:
                sys.stdout.write(f"{text}\n")
                sys.stdout.flush()

        yield show
