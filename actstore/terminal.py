"""What commands show while they work: a bar on a terminal, a plain line every few seconds anywhere else."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Work:
    """Progress of one piece of work, on standard error. Use it in a `with` statement.

    Args:
        label: what is being done.
        unit: what is counted.
        stream: where to write.
    """

    def __init__(self, label: str, *, unit: str, stream: TextIO | None = None) -> None:
        self._label, self._unit = label, unit
        self._stream = stream or sys.stderr
        self._bar: Progress | None = None
        self._shown: tuple[int, int | None, str] = (0, 0, "")
        self._last_line = 0.0

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Shows that `done` of `total` units are done, or of a number that nobody knows; `note` may hold rates."""
        self._shown = (done, total, note)
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
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                       TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._bar.add_task(self._label, total=None, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and (self._shown[1] or self._shown[0]):
            self._line()

    def _line(self) -> None:
        done, total, note = self._shown
        self._last_line = time.monotonic()
        of_all = "" if total is None else f" of {total:,}"
        print(f"{self._label}: {done:,}{of_all} {self._unit}{', ' + note if note else ''}", file=self._stream)
