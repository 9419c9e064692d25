"""A connection of limited speed: passes bytes on between clients and a server, those to the server no faster than told.

It knows nothing of what it passes. All connections share one limit, as those of a machine share its network.
"""

import bisect
import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 16


class Throttle:
    """The way to a server. Use it in a `with` statement; `endpoint` is for clients.

    Args:
        upstream: `http://host:port` of the server.
        bytes_per_second: that all clients together may send.
    """

    def __init__(self, upstream: str, *, bytes_per_second: float) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._rate, self._lock = bytes_per_second, threading.Lock()
        self._next = 0.0  # when the way is free again
        self._sent: list[tuple[float, int]] = []  # moments, and bytes in all until then
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def bytes_between(self, first: float, last: float) -> int:
        """Bytes that were sent to the server between two moments of `time.monotonic`."""
        with self._lock:
            moments = [moment for moment, _ in self._sent]
            begin, end = bisect.bisect(moments, first), bisect.bisect(moments, last)
            counted = [0, *(count for _, count in self._sent)]
            return counted[end] - counted[begin]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Passes bytes on both ways until both sides have ended."""
        with client, socket.create_connection(self._upstream) as server:
            down = threading.Thread(target=self._pass, args=(server, client, False), daemon=True)
            down.start()
            self._pass(client, server, True)
            down.join()

    def _pass(self, source: socket.socket, target: socket.socket, slow: bool) -> None:
        """Passes on what comes from one side until that ends."""
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                if slow:
                    self._wait(len(data))
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait(self, count: int) -> None:
        """Waits for the turn of some bytes: each piece takes the way for as long as it needs."""
        with self._lock:
            begins = max(self._next, time.monotonic())
            self._next = until = begins + count / self._rate
            self._sent.append((until, count + (self._sent[-1][1] if self._sent else 0)))
        time.sleep(max(0.0, until - time.monotonic()))
