"""A server on this machine that holds a bucket, and what a client needs to reach it."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

STARTED_IN_SECONDS = 60  # a busy machine imports slowly

NO_OTHER_ACCOUNT = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "GOOGLE_APPLICATION_CREDENTIALS": os.devnull,
}
"""What keeps a client from finding the accounts of whoever runs the tests, or from asking a cloud for one."""


class Missing(Exception):
    """A server that cannot be installed on this machine or Python; the message says why."""


@dataclasses.dataclass(frozen=True)
class Server:
    """One bucket behind an address: `s3` by path (`/bucket/key`), `gs` by the JSON interface, `http` to read only.

    `environ` holds the credentials that this server accepts; `deviations` names the promises of the conformance suite
    that it is known to break. Each server has a bucket of its own name: TensorStore keeps connections by bucket, and
    one process may use several servers.
    """

    name: str
    scheme: Literal["s3", "gs", "http"]
    endpoint: str
    environ: Mapping[str, str]
    bucket: str = ""
    deviations: frozenset[str] = frozenset()

    def through(self, endpoint: str) -> "Server":
        """The same bucket, reached through a proxy."""
        return dataclasses.replace(self, endpoint=endpoint)

    def client_environ(self) -> dict[str, str]:
        """Environment variables of a process that uses this bucket and no other."""
        place = {"s3": "AWS_ENDPOINT_URL", "gs": "TENSORSTORE_GCS_HTTP_URL"}.get(self.scheme)
        return NO_OTHER_ACCOUNT | dict(self.environ) | ({place: self.endpoint} if place else {})

    def url(self, key: str) -> str:
        """The address of a key, as a user types it."""
        return f"{self.endpoint}/{key}" if self.scheme == "http" else f"{self.scheme}://{self.bucket}/{key}"

    def spec(self, path: str = "") -> dict[str, Any]:
        """TensorStore's own description of a place in the bucket; `gs` also needs `client_environ()`."""
        if self.scheme == "http":
            return {"driver": "http", "base_url": self.endpoint, "path": f"/{path}"}
        if self.scheme == "gs":
            return {"driver": "gcs", "bucket": self.bucket, "path": path}
        region = self.environ["AWS_REGION"]
        return {"driver": "s3", "bucket": self.bucket, "path": path, "endpoint": self.endpoint, "aws_region": region}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], port: int, *, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Runs a server until the block ends; inside, it answers on `port`.

    Raises:
        RuntimeError: it ended, or did not answer in time; with what it said.
    """
    with tempfile.TemporaryFile() as log:  # a full pipe would stop it, a closed one end it
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | dict(environ or {}))
        try:
            if not _answers(process, port):
                process.kill()
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{command!r} did not answer in {STARTED_IN_SECONDS} s; it said: {said}")
            yield
        finally:
            process.kill()
            process.wait()


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    deadline = time.monotonic() + STARTED_IN_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            time.sleep(0.02)
    return False


def request(method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """One request without any client library, for making a bucket: the body of the answer.

    Raises:
        urllib.error.HTTPError: the server refused.
    """
    asked = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
    with urllib.request.urlopen(asked, timeout=STARTED_IN_SECONDS) as answer:
        return answer.read()
