"""A run whose storage is slower than its model: memory stays in its bound. How fast it is, `make bench` measures."""

import socket
import threading
import time
from pathlib import Path

import pytest
from throttle import Throttle

from tests.benchmarks import slow_storage

OTHER_BYTES = 48_000_000
"""Rows on the device, passes, requests under way and what allocators keep: more than the small blocks here."""


@pytest.mark.long
@pytest.mark.slow
def test_memory_is_bounded_where_the_storage_is_the_limit(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("NOT MEASURED: no /proc/self/clear_refs here, which starts the peak of memory anew")
    found = slow_storage.measure(tmp_path)["slow_storage"]
    assert isinstance(found, dict)
    assert found["limited_by"] == "storage"
    assert found["waiting_for_storage"] > 0.3
    assert found["share_of_limit"] <= 1.02  # it really was limited
    assert found["memory"] <= 1.2 * found["announced"] + OTHER_BYTES < found["written"] / 2


def test_meta_the_connection_is_limited_and_counts() -> None:
    """Against a server that answers with the number of bytes that it got."""
    server = socket.create_server(("127.0.0.1", 0))

    def count() -> None:
        client, _ = server.accept()
        got = 0
        while data := client.recv(1 << 16):
            got += len(data)
            if got >= 500_000:
                break
        client.sendall(str(got).encode())
        client.close()

    threading.Thread(target=count, daemon=True).start()
    began = time.monotonic()
    with Throttle(f"http://127.0.0.1:{server.getsockname()[1]}", bytes_per_second=1e6) as way:
        with socket.create_connection(("127.0.0.1", int(way.endpoint.rsplit(":", 1)[1]))) as client:
            client.sendall(b"x" * 500_000)
            assert client.recv(100) == b"500000"
        ended = time.monotonic()
        assert ended - began > 0.45
        assert way.bytes_between(began, ended + 1) == 500_000
        assert way.bytes_between(ended + 1, ended + 2) == 0
    server.close()
