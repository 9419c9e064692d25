"""localbucket: S3 over a folder, which takes any key and ignores `If-Match`, as some S3-compatible stores do.

Start-up: `localbucket --port PORT FOLDER` (PyPI `localbucket`), with a folder `acts-localbucket` in FOLDER: that is the
bucket.

Good for: a store whose conditional writes cannot be trusted, and looking at objects as files. A read takes 40 ms after
a write on the same connection, since it sends an answer in two pieces. Keys with an empty part, or of more bytes than
the file system takes as a name, are refused.
"""

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from servers.moto import ANY_KEY
from servers.server import Missing, Server, free_port, running

NAME = "localbucket"
BUCKET = f"acts-{NAME}"
DEVIATIONS = frozenset({"conditional overwrite", "a key below a key", "keys of 900 bytes", "keys with an empty part"})


@contextlib.contextmanager
def localbucket() -> Iterator[Server]:
    """The server with an empty bucket."""
    if importlib.util.find_spec("localbucket") is None:
        raise Missing("localbucket is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="localbucket-") as folder:
        (Path(folder) / BUCKET).mkdir()
        with running([sys.executable, "-P", "-m", "localbucket", "--port", str(port), folder], port):
            yield Server(NAME, "s3", f"http://127.0.0.1:{port}", ANY_KEY, BUCKET, deviations=DEVIATIONS)
