"""A store in a bucket, on a web server or in memory: objects that are there whole or not at all. No locks, no folders.

What may pass is tried again until the deadline, and said: see `waiting` and `limits`.
"""

import functools
import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import tensorstore as ts

from actstore.errors import CorruptStoreError, InputError, StorageError, StoragePermissionError
from actstore.kvstore.addresses import Address
from actstore.kvstore.clouds import spec_of
from actstore.kvstore.limits import Limits
from actstore.kvstore.place import Place, too_large
from actstore.kvstore.waiting import Patience

PROBES = ".act/probes/"


class RemotePlace(Place):
    """A prefix of a bucket. Nothing is read or written until a method is called."""

    streams = False

    def __init__(self, address: Address, limits: Limits) -> None:
        self.address, self.limits, self.url = address, limits, address.url
        self.keeps_memory = address.scheme == "memory"
        limits.tell_curl(os.environ)
        self._spec = spec_of(address, os.environ)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process too, finds its own way: keys and servers are not part of it."""
        return {"address": self.address, "limits": self.limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The way of that process."""
        self.__init__(**state)  # type: ignore[misc]  # as a copy is made

    def settings(self) -> dict[str, tuple[str, str]]:
        """Time, retries, requests at once."""
        return self.limits.described()

    @functools.cached_property
    def context(self) -> Any:
        """Connections and retries: of the whole process, so that its stores share them."""
        return _context(self.limits)

    def spec(self, folder: str) -> dict[str, Any]:
        """TensorStore's spec of a folder below the place."""
        inside = f"{self.address.bucket}/" if self.address.scheme == "memory" else ""
        return {**self._spec, "path": f"{inside}{self.address.prefix}/{folder}"}

    def patience(self, size: int) -> Patience:
        """How long an operation on `size` bytes may take."""
        return Patience(self.limits.deadline(size), self.limits.notice_seconds, again=True)

    def look(self, key: str, most_bytes: int) -> None:
        """Refuses an object that is too large. One small request: for the byte that would be too much."""
        self.look_all([key], most_bytes)

    def look_all(self, keys: Sequence[str], most_bytes: int) -> None:
        """The same for several objects at once."""
        span = slice(most_bytes, most_bytes + 1)
        looks = [(key, self.begin(f"look at {key}", functools.partial(_read, key=key, span=span))) for key in keys]
        for key, looking in looks:
            try:
                found = looking.result()
            except CorruptStoreError:  # it ends before
                continue
            if found.state == "value":
                raise too_large(f"{self.url}/{key}", f"more than {most_bytes:,}", most_bytes)

    def digest(self, key: str, *, most_bytes: int) -> str | None:
        """SHA-256 of the object under `key`, or None. Costs memory for all of it."""
        self.look(key, most_bytes)
        found = self.begin(f"read {key}", lambda kv: kv.read(key), size=most_bytes, sound=unanswered).result()
        return hashlib.sha256(found.value).hexdigest() if found.state == "value" else None

    def size(self, key: str) -> int:
        """Bytes of the object under `key`; 0 where there is none. Costs reading it."""
        found = self.begin(f"read {key}", lambda kv: kv.read(key), sound=unanswered).result()
        return len(found.value)

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`. One small request."""
        start = functools.partial(_read, key=key, span=slice(0, 0))
        return bool(self.begin(f"look for {key}", start, sound=unanswered).result().state == "value")

    def write_pieces(self, key: str, pieces: Iterable[memoryview]) -> None:
        """Writes one object, joined in memory."""
        whole = b"".join(pieces)
        start = lambda kv: kv.write(key, whole)  # noqa: E731
        self.begin(f"write {key}", start, size=len(whole), sound=unwritten).result()

    def hint(self, key: str) -> str:
        """Nothing is looked for: a listing may be long. But a bucket that is not there is one's own error.

        Raises:
            StorageError: the storage cannot be asked, or has no such bucket.
        """
        span = ts.KvStore.KeyRange(key, f"{key}\0")
        if self.address.scheme in ("gs", "s3"):
            try:
                self.begin(f"look for {key}", lambda kv: kv.list(span)).result()
            except StoragePermissionError:
                return "; these credentials may not list it"
        return ""

    def lock_files(self, folder: str) -> list[tuple[str, bool]]:  # noqa: ARG002  a bucket has none anywhere
        """None: an object is there whole or not at all."""
        return []

    def remove_lock_file(self, key: str) -> None:
        """There is none."""
        raise AssertionError(key)

    def refuse_link(self, key: str) -> None:
        """There are no links."""

    def check_writable(self) -> None:
        """Fails where nothing can be written: writes an empty object and removes it again. Two requests.

        Raises:
            InputError: a web server.
            StoragePermissionError: these credentials may not write here, or, in Google Cloud, not delete.
            BucketError: there is no such bucket.
        """
        if self.address.scheme in ("http", "https"):
            raise InputError(f"cannot write {self.url}: web servers are only read; give gs://, s3:// or a path")
        key = f"{PROBES}{secrets.token_hex(8)}"
        self.begin(f"write {key}", lambda kv: kv.write(key, b""), sound=unwritten).result()
        try:
            self.begin(f"delete {key}", lambda kv: kv.write(key, None)).result()
        except StorageError as error:  # it stays, empty: elsewhere writers need not be allowed to
            if self.address.scheme == "gs" and isinstance(error, StoragePermissionError):
                raise type(error)(
                    f"{error}; Google Cloud asks for storage.objects.delete to write over it too"
                ) from None

    def check_space(self, need_bytes: int) -> None:
        """Buckets do not fill up."""


def unanswered(found: Any) -> str | None:
    """What is wrong with the answer to a read: some servers answer conditions that were not set."""
    return (
        "the answer says neither that the object is there nor that it is not" if found.state == "unspecified" else None
    )


def unwritten(stamp: Any) -> str | None:
    """What is wrong with the answer to a write without conditions: TensorStore calls a 412 no error."""
    return None if stamp.generation else "the write was refused by a condition that was not set"


def _read(kv: Any, *, key: str, span: slice) -> Any:
    return kv.read(key, byte_range=span)


@functools.lru_cache(maxsize=8)
def _context(limits: Limits) -> Any:
    return ts.Context(limits.resources)
