"""Lines on standard error: text for people, or one JSON object a line for programs that gather logs.

Which of the two is known to Python's `logging` alone: a program that wants JSON installs `JsonLines` there, once.
"""

import contextlib
import datetime as dt
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

NAMES = ("actstore", "extract")


class JsonLines(logging.Formatter):
    """A record as one JSON object: `time`, `severity` and `message`, as cloud loggers read them, and fields of its own.

    Args:
        fields: what every line has.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        time = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "severity": record.levelname, "message": record.getMessage(), **self._fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), default=str)


def log_as_json(**fields: Any) -> None:
    """From now on this program writes JSON lines on standard error: its own, and the warnings of libraries.

    For programs, not for libraries. Called again, it replaces the fields that every line has.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(fields))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in NAMES:
        logging.getLogger(name).setLevel(logging.INFO)


def logs_json() -> bool:
    """Whether this program writes JSON lines."""
    return _formatter() is not None


def say(text: str, **fields: Any) -> None:
    """Writes a line for people, or a JSON line with the fields."""
    if logs_json():
        logging.getLogger(NAMES[0]).info("%s", text, extra={"fields": fields})
    else:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def error_line(text: str) -> str:
    """The last line of a program that fails. Takes no lock, so that a handler of signals may write it."""
    formatter = _formatter()
    if formatter is None:
        return f"error: {text}\n"
    return formatter.format(logging.LogRecord(NAMES[0], logging.ERROR, "", 0, text, None, None)) + "\n"


def say_last(text: str) -> None:
    """Writes the last line of a program that ends at once, past locks and buffers, whether anyone reads it or not."""
    if sys.stderr is None:  # it was closed before Python began: the number 2 may be any file by now
        return
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}{error_line(text)}".encode())


def _formatter() -> JsonLines | None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonLines):
            return handler.formatter
    return None
