"""A small server of Google Cloud Storage's JSON interface that enforces what the real one enforces.

Generations grow with every write and are compared as the service compares them: `ifGenerationMatch` and
`ifGenerationNotMatch`, where 0 means that there is no such object; 412 where a condition fails, 304 where a read is not
needed. Lists are in the order of UTF-8 bytes, a page holds 1,000 names. What a client may do is written per token; as
at the service, to write over an object is to delete it, and needs both rights.
Parameters that are not known are refused, so that no test believes in a condition that nobody looks at.

Start-up: `python tests/servers/strict_gcs.py --port PORT --allow TOKEN=get,list,put,delete`, with one empty bucket,
`acts`, in memory. No credentials but these tokens; objects are gone when it ends. It stands in for the service in this:
reading whole objects and ranges, `uploadType=media`, deleting, listing. It knows no resumable upload, no versions, no
composition, no limit of one write per second to the same object.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.handler import Handler
from servers.server import Server, free_port, running

TOKEN = "may-do-all"
RIGHTS = frozenset({"get", "list", "put", "delete"})
MOST_NAMES = 1000  # of a page, as of the service
MOST_NAME_BYTES = 1024
CONDITIONS = {"ifGenerationMatch", "ifGenerationNotMatch"}
IGNORED = {  # they change no stored byte; TensorStore sends its name with every read
    "alt", "fields", "prettyPrint", "projection", "key", "userProject", "quotaUser", "tensorstore",
}  # fmt: skip
NAME = "strict-gcs"
BUCKET = f"acts-{NAME}"
_PLACE = re.compile(r"(?P<upload>/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(/(?P<name>[^/]+))?")
_OPERATIONS = {  # by method, whether it uploads, whether the path names an object
    ("GET", False, True): "get",
    ("GET", False, False): "list",
    ("POST", True, False): "put",
    ("DELETE", False, True): "delete",
}


@contextlib.contextmanager
def strict_gcs(**rights: frozenset[str]) -> Iterator[Server]:
    """The server with one token that may do all, and others with the rights given."""
    port = free_port()
    tokens = {TOKEN: RIGHTS} | rights
    allowed = [word for token, may in tokens.items() for word in ("--allow", f"{token}={','.join(sorted(may))}")]
    with running([sys.executable, __file__, "--port", str(port), *allowed], port):
        yield Server(NAME, "gs", f"http://127.0.0.1:{port}", {"GOOGLE_AUTH_TOKEN_FOR_TESTING": TOKEN}, BUCKET)


class _Object(NamedTuple):
    generation: int
    data: bytes


class _Refused(Exception):
    """An answer that is not 2xx, as the service words it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class StrictGcs(ThreadingHTTPServer):
    """The bucket: every operation is one critical section, as every operation of the service is one."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, rights: dict[str, frozenset[str]]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.rights = rights
        self._objects: dict[str, _Object] = {}
        self._generations = itertools.count(1_700_000_000_000_000)  # the service counts microseconds
        self._lock = threading.Lock()

    def read(self, name: str, conditions: dict[str, int]) -> _Object:
        with self._lock:
            found = self._objects.get(name)
            _require(found, conditions, reading=True)
            if found is None:
                raise _Refused(404, f"No such object: {BUCKET}/{name}")
            return found

    def write(self, name: str, data: bytes, conditions: dict[str, int], *, may_replace: bool) -> _Object:
        if not 0 < len(name.encode()) <= MOST_NAME_BYTES or name in {".", ".."} or re.search(r"[\r\n]", name):
            raise _Refused(400, f"Invalid object name: {name[:80]!r}")
        with self._lock:
            found = self._objects.get(name)
            _require(found, conditions, reading=False)
            if found is not None and not may_replace:
                raise _missing("delete")
            written = self._objects[name] = _Object(next(self._generations), data)
            return written

    def delete(self, name: str, conditions: dict[str, int]) -> None:
        with self._lock:
            found = self._objects.get(name)
            _require(found, conditions, reading=False)
            if found is None:
                raise _Refused(404, f"No such object: {BUCKET}/{name}")
            del self._objects[name]

    def names(self, query: dict[str, str]) -> tuple[list[tuple[str, _Object]], str | None]:
        """One page, and the token of the next."""
        most = min(MOST_NAMES, _whole_number(query, "maxResults", MOST_NAMES) or MOST_NAMES)
        start, stop = query.get("startOffset", ""), query.get("endOffset", "")
        if "pageToken" in query:
            start = max(start, bytes.fromhex(query["pageToken"]).decode(), key=str.encode)
        with self._lock:
            found = sorted(
                (name, each) for name, each in self._objects.items()
                if name.startswith(query.get("prefix", ""))
                and name.encode() >= start.encode() and (not stop or name.encode() < stop.encode())
            )  # fmt: skip
        found.sort(key=lambda each: each[0].encode())
        return found[:most], found[most][0].encode().hex() if len(found) > most else None


def _require(found: _Object | None, conditions: dict[str, int], *, reading: bool) -> None:
    """Refuses where a condition does not hold; 0 stands for no object."""
    generation = found.generation if found else 0
    if conditions.get("ifGenerationMatch", generation) != generation:
        raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
    if conditions.get("ifGenerationNotMatch", -1) == generation:
        raise _Refused(304 if reading and found else 412, "At least one of the pre-conditions did not hold.")


def _missing(right: str) -> _Refused:
    return _Refused(403, f"the caller does not have storage.objects.{right} access, or it may not exist")


def _whole_number(query: dict[str, str], name: str, default: int = 0) -> int:
    if not re.fullmatch(r"\d{1,19}", query.get(name, str(default))):
        raise _Refused(400, f"Invalid value for {name}: {query[name]!r}")
    return int(query.get(name, default))


class _Handler(Handler):
    server: StrictGcs

    def do_GET(self) -> None:
        self._answer_or_refuse()

    do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = do_GET

    def _answer_or_refuse(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._route(body)
        except _Refused as refused:
            error = {"code": refused.status, "message": refused.message}
            empty = refused.status == 304
            self._send(refused.status, b"" if empty else json.dumps({"error": error}).encode())

    def _route(self, body: bytes) -> None:
        if self.headers.get("Transfer-Encoding"):
            raise _Refused(400, "this server reads bodies with a Content-Length only")
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        place = _PLACE.fullmatch(parts.path)
        shape = (self.command, bool(place and place["upload"]), bool(place and place["name"]))
        what = _OPERATIONS.get(shape)
        if place is None or what is None:
            raise _Refused(400, f"this server does not know {self.command} {parts.path[:80]}")
        self._allow(what)
        if unquote(place["bucket"]) != BUCKET:
            raise _Refused(404, f"The specified bucket does not exist: {unquote(place['bucket'])}")
        getattr(self, f"_{what}")(unquote(place["name"] or ""), query, body)

    def _allow(self, what: str) -> None:
        word, _, token = self.headers.get("Authorization", "").partition(" ")
        if word != "Bearer":
            raise _Refused(401, "Anonymous caller does not have storage.objects access")
        if token not in self.server.rights:
            raise _Refused(401, "Invalid Credentials")
        if not self._may(what):
            raise _missing(what)

    def _may(self, what: str) -> bool:
        return what in self.server.rights[self.headers["Authorization"].partition(" ")[2]]

    def _conditions(self, query: dict[str, str], *more: str) -> dict[str, int]:
        if unknown := query.keys() - CONDITIONS - IGNORED - {*more}:
            raise _Refused(400, f"Unknown parameters: {sorted(unknown)}")
        return {name: _whole_number(query, name) for name in CONDITIONS & query.keys()}

    def _get(self, name: str, query: dict[str, str], _: bytes) -> None:
        found = self.server.read(name, self._conditions(query))
        if query.get("alt") != "media":
            self._send(200, json.dumps(_resource(name, found)).encode())
            return
        data, headers = found.data, {"x-goog-generation": str(found.generation), "ETag": f'"{found.generation}"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or asked[0] == "bytes=-":
            self._send(200, data, headers)
            return
        first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
        last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
        if first > last:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        place = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206, data[first : last + 1], headers | place)

    def _put(self, _: str, query: dict[str, str], body: bytes) -> None:
        if query.get("uploadType") != "media" or "name" not in query:
            raise _Refused(400, "this server takes uploadType=media with a name only")
        conditions = self._conditions(query, "uploadType", "name")
        written = self.server.write(query["name"], body, conditions, may_replace=self._may("delete"))
        self._send(200, json.dumps(_resource(query["name"], written)).encode())

    def _delete(self, name: str, query: dict[str, str], _: bytes) -> None:
        self.server.delete(name, self._conditions(query))
        self._send(204, b"")

    def _list(self, _: str, query: dict[str, str], __: bytes) -> None:
        self._conditions(query, "prefix", "startOffset", "endOffset", "pageToken", "maxResults")
        found, following = self.server.names(query)
        page: dict[str, Any] = {"kind": "storage#objects", "items": [_resource(*each) for each in found]}
        self._send(200, json.dumps(page | ({"nextPageToken": following} if following else {})).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        kind = {"Content-Type": "application/json" if headers is None else "application/octet-stream"}
        length = {} if status in (204, 304) else {"Content-Length": str(len(body))}
        for key, value in (kind | length | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _resource(name: str, found: _Object) -> dict[str, str]:
    return {
        "kind": "storage#object", "name": name, "bucket": BUCKET, "generation": str(found.generation),
        "metageneration": "1", "size": str(len(found.data)),
        "md5Hash": b64encode(hashlib.md5(found.data, usedforsecurity=False).digest()).decode(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--allow", action="append", default=[], metavar="TOKEN=RIGHT,RIGHT")
    options = parser.parse_args()
    rights = {token: frozenset(may.split(",")) for token, _, may in (each.partition("=") for each in options.allow)}
    with StrictGcs(options.port, rights) as server:
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
