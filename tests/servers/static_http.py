"""A plain web server over a folder, with ranges: what a store looks like behind `http://`, to read only.

Start-up: `python tests/servers/static_http.py --port PORT FOLDER`. It answers GET and HEAD, with `Range`, `ETag` and
`If-None-Match`; there is no list. Anything else gets 405.
"""

import argparse
import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.handler import Handler
from servers.server import Server, free_port, running

NAME = "static-http"


@contextlib.contextmanager
def static_http(folder: Path) -> Iterator[Server]:
    """The server over a folder."""
    port = free_port()
    with running([sys.executable, __file__, "--port", str(port), str(folder)], port):
        yield Server(NAME, "http", f"http://127.0.0.1:{port}", {})


class _Handler(Handler):
    folder: Path

    def do_GET(self) -> None:
        path = self.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.resolve().is_relative_to(self.folder) or not path.is_file():
            self._send(404, b"no such file")
            return
        data = path.read_bytes()
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if headers["ETag"] in self.headers.get("If-None-Match", ""):
            self._send(304, b"", headers)
        elif asked is None or asked[0] == "bytes=-":
            self._send(200, data, headers)
        else:
            first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
            last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
            if first > last:
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            place = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self._send(206, data[first : last + 1], headers | place)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send(405, b"this server is read only")

    do_PUT = do_DELETE = do_PATCH = do_POST

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if (status, key) != (304, "Content-Length"):
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    handler = type("_OfFolder", (_Handler,), {"folder": options.folder.resolve()})
    with ThreadingHTTPServer(("127.0.0.1", options.port), handler) as server:
        server.daemon_threads = True
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
