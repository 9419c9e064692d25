"""What this machine does by itself, to compare with: rows out of memory, plain files; and what this process uses."""

import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TAKE_BYTES = 256 << 20  # of memory to take rows from: more than caches hold
READ_BYTES = 8 << 20  # of one read()
SECONDS_BETWEEN_LOOKS = 0.01


class Growth:
    """Growth of this process's memory, looked at every hundredth of a second; the peak is the system's own."""

    def __init__(self) -> None:
        """Begins with what is there now."""
        self._rss, self._anonymous = _status("VmRSS"), _status("RssAnon")
        self._own, self._next = 0, 0.0

    def look(self, now: float) -> None:
        """Looks, if it is time; `now` is of any clock in seconds."""
        if self._anonymous is not None and now >= self._next:
            self._own = max(self._own, (_status("RssAnon") or 0) - self._anonymous)
            self._next = now + SECONDS_BETWEEN_LOOKS

    def grown(self) -> tuple[int | None, int | None, int | None]:
        """Memory before, the largest growth without mapped files, and that of all; None where the system is silent."""
        peak = _status("VmHWM")
        if self._rss is None or self._anonymous is None or peak is None:
            return None, None, None
        return self._rss, self._own, max(peak - self._rss, 0)


def disk_bytes() -> int | None:
    """Bytes that this process made the system read from disks so far; None where that is not counted."""
    try:
        found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def take_rate(rows: int, row_bytes: int, batch_size: int, *, seconds: float) -> float:
    """Bytes per second of random rows taken out of memory into fresh batches, out of up to 256 MiB of rows."""
    pool = np.ones((max(min(rows, TAKE_BYTES // row_bytes), 1), row_bytes), np.uint8)  # written, so it is really there
    chosen = np.random.default_rng(0).integers(len(pool), size=(8, batch_size))
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        np.take(pool, chosen[done % 8], axis=0, out=np.empty((batch_size, row_bytes), np.uint8), mode="clip")
        done += 1
    return done * batch_size * row_bytes / (time.perf_counter() - started)


def plain_reading(paths: Iterable[Path], *, seconds: float) -> tuple[float, float | None]:
    """Bytes per second of read() of files, once, one after the other; and the share of them that came from disks."""
    buffer, read = bytearray(READ_BYTES), 0
    disk, started = disk_bytes(), time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while time.perf_counter() - started < seconds and (count := file.readinto(buffer)):
                read += count
    elapsed, after = time.perf_counter() - started, disk_bytes()
    return read / elapsed, None if disk is None or after is None else (after - disk) / max(read, 1)


def _status(field: str) -> int | None:
    """A size of this process in bytes, as Linux gives it."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
