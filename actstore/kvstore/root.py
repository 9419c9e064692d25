"""The place of one store: small objects by key, and arrays below it, wherever it is."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tensorstore as ts

from actstore.errors import InputError, StorageError
from actstore.kvstore.addresses import SUFFIX, parse
from actstore.kvstore.cache import Cache
from actstore.kvstore.forks import refuse_fork
from actstore.kvstore.limits import Limits
from actstore.kvstore.local import LocalPlace
from actstore.kvstore.place import Place
from actstore.kvstore.remote import RemotePlace, unanswered, unwritten
from actstore.kvstore.waiting import Operation

Item = TypeVar("Item")
MAX_OBJECT_BYTES = 16 << 20  # of plan, marker, metadata: those of 10^6 samples have a few kB
AT_ONCE = 64  # requests for small objects
CREATE_TRIES = 8  # of an object that others remove as soon as it is there, as claims are


@dataclasses.dataclass(frozen=True)
class Root:
    """The place of one store. Cheap to make; nothing is read or written until a method is called."""

    url: str
    place: Place = dataclasses.field(repr=False, compare=False)
    cache: Cache | None = dataclasses.field(default=None, repr=False, compare=False)
    """Where chunks are kept that were read of a remote store and compared."""

    @classmethod
    def of(cls, url: str | os.PathLike[str], *, cache: Cache | None = None) -> "Root":
        """The root at a local path or a URL: `file://`, `gs://`, `s3://`, `http://`, `https://`, `memory://`.

        Args:
            url: where it is.
            cache: for a remote store; None is the one that `ACTSTORE_CACHE` names, or none.

        Raises:
            InputError: it is none, or holds what could lead elsewhere; a cache for a local store; or `ACTSTORE_`
                variables that cannot be.
        """
        found, limits = parse(os.fspath(url)), Limits.of(os.environ)
        if isinstance(found, str):
            local = LocalPlace(found, limits)
            if cache is not None:
                raise InputError(
                    f"{local.url} is local; expected a remote store to keep chunks of: leave the cache out"
                )
            return cls(local.url, local)
        return cls(found.url, RemotePlace(found, limits), cache or Cache.of(os.environ))

    @property
    def is_local(self) -> bool:
        """Whether objects are files of this machine, which may be mapped: `path` says where."""
        return isinstance(self.place, LocalPlace)

    @property
    def path(self) -> Path:
        """The folder of a local store."""
        if not isinstance(self.place, LocalPlace):
            raise InputError(f"{self.url} is not a folder of this machine; copy the store with `actstore copy`")
        return self.place.path

    @property
    def streams(self) -> bool:
        """Whether shards are written piece by piece; otherwise one is in memory once more while it is written."""
        return self.place.streams

    @property
    def keeps_memory(self) -> bool:
        """Whether the storage would go on using an array that was written: `memory://` would, and must copy it."""
        return self.place.keeps_memory

    def settings(self) -> dict[str, tuple[str, str]]:
        """What bounds its storage, by the environment variables that set it: value and meaning; nothing secret."""
        return self.place.settings() | ({} if self.cache is None else self.cache.settings())

    def read(self, key: str, *, most_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        """The object under `key`, or None. One small request, and of remote storage another for its size.

        Raises:
            CorruptStoreError: it has more than `most_bytes`, or is no file; nothing of it was read.
        """
        self._look(key, most_bytes)
        return self._value(self._begin(f"read {key}", lambda kv: kv.read(key), sound=unanswered).result())

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """The objects under many keys, in their order; None for one that is not there. 64 are under way at once.

        Raises:
            CorruptStoreError: one is larger than 16 MiB, or is no file; nothing of it was read.
        """
        for _, found in self._read_all(keys):
            yield self._value(found)

    def begin_range(self, doing: str, key: str, span: slice) -> Operation[Any]:
        """Begins to read a part of an object that has it: its `value` are bytes, its `state` is `missing` without it.

        Args:
            doing: what it is, for messages: `read resid_post, layer 3 of s3://...`.
            key: of the object.
            span: of its bytes; from its end, if it begins below zero.
        """
        size = max((span.stop or 0) - (span.start or 0), 0)
        refuse_fork()
        kv = self.place.kv
        return Operation(doing, lambda: kv.read(key, byte_range=span), self.place.patience(size), sound=unanswered)

    def digest(self, key: str, *, most_bytes: int) -> str | None:
        """SHA-256 of the object under `key`, or None. Costs reading it: in pieces if it is local.

        Raises:
            CorruptStoreError: it has more than `most_bytes`; nothing of it was read.
        """
        return self.place.digest(key, most_bytes=most_bytes)

    def size(self, key: str) -> int:
        """Bytes of the object under `key`; 0 where there is none. Costs reading it if it is not local."""
        return self.place.size(key)

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key` that is not empty. One small request."""
        return self.place.exists(key)

    def write(self, key: str, value: bytes) -> None:
        """Writes the object under `key`, replacing what is there. Durable when it returns."""
        self.refuse_link(key)
        self._writing(key, value).result()

    def write_all(self, values: Mapping[str, bytes]) -> None:
        """Writes small objects, in a bucket 64 at once; in no order. Durable when it returns."""
        if self.is_local:
            for key, value in values.items():
                self.write(key, value)
            return
        for group in _groups(values.items()):
            for writing in [self._writing(key, value) for key, value in group]:
                writing.result()

    def write_pieces(self, key: str, pieces: Iterable[memoryview]) -> None:
        """Writes one object from pieces that are taken one after the other. Durable when it returns.

        They are joined in memory where the place does not stream.
        """
        self.place.write_pieces(key, pieces)

    def create(self, key: str, value: bytes) -> bytes:
        """Writes the object under `key` unless there is one, and returns what is there afterwards.

        Reads back in every case: a conditional write whose answer was lost is reported as lost although it won. What
        another process removes in between is written again.

        Raises:
            StorageError: it is gone each time.
        """
        self._look(key, MAX_OBJECT_BYTES)
        found = self._reading(key).result()
        for _ in range(CREATE_TRIES):
            if found.state == "value":
                return bytes(found.value)
            found = self._write_if(key, value, found.stamp.generation)
        if found.state == "value":
            return bytes(found.value)
        raise StorageError(
            f"could not write {key} of {self.url}: it was gone each of {CREATE_TRIES} times; expected that it stays: "
            "find out what removes it, then run the same command again"
        )

    def create_all(self, values: Mapping[str, bytes]) -> None:
        """Writes each of some small objects unless there is one, in a bucket 64 at once; in no order."""
        if self.is_local:
            for key, value in values.items():
                self.create(key, value)
            return
        missing = {key: found for key, found in self._read_all(values) if found.state != "value"}
        for group in _groups(missing.items()):
            for writing in [self._writing_if(key, values[key], found.stamp.generation) for key, found in group]:
                writing.result()
        for key, found in self._read_all(missing):
            if found.state != "value":
                self.create(key, values[key])

    def replace(self, key: str, old: bytes, value: bytes) -> bytes:
        """Writes the object under `key` if it is `old` still, and returns what is there afterwards; b"" for nothing.

        Of several that replace the same at once, one finds its own, where the storage keeps to conditions.
        """
        self._look(key, MAX_OBJECT_BYTES)
        found = self._reading(key).result()
        if found.state == "value" and bytes(found.value) == old:
            found = self._write_if(key, value, found.stamp.generation)
        return bytes(found.value) if found.state == "value" else b""

    def hint(self, key: str) -> str:
        """What is here instead of a store, whose `key` is missing; and where one lies near by, as the end of a message.

        Costs looking at the first 1,000 names of a folder, or one listing of a bucket for this key alone.
        """
        return self.place.hint(key)

    def keys(self, *prefixes: str) -> list[str]:
        """Keys that start with any of `prefixes`, sorted. Bytes that are not UTF-8 become replacement characters.

        One listing of what these have in common: on local files the folder is read once, however many there are.

        Raises:
            InputError: the storage cannot be listed: web servers.
        """
        if not prefixes:
            return []
        common = os.path.commonprefix(prefixes)  # noqa: RUF071  keys are compared letter by letter
        span = ts.KvStore.KeyRange(common, _after(common))
        try:
            listed = self._begin(f"list {common}", lambda kv: kv.list(span)).result()
        except NotImplementedError:
            raise InputError(
                f"{self.url} is on a web server, which cannot be listed, and this needs a list of what is there; copy "
                "the store with `actstore copy`, or open it in its bucket"
            ) from None
        keys = sorted([key.decode(errors="replace") for key in listed])
        return keys if len(prefixes) == 1 else [key for key in keys if key.startswith(prefixes)]

    def lock_files(self, folder: str = "") -> list[tuple[str, bool]]:
        """Keys of the lock files below the store or a folder of it, and whether a living writer holds each."""
        return self.place.lock_files(folder)

    def remove_lock_file(self, key: str) -> None:
        """Removes a lock file that `lock_files` named."""
        self.place.remove_lock_file(key)

    def delete(self, key: str) -> None:
        """Removes the object under `key`, if there is one."""
        self._begin(f"delete {key}", lambda kv: kv.write(key, None)).result()

    def open_array(self, name: str, metadata: dict[str, Any]) -> ts.TensorStore:
        """The array `name` with metadata that is known: costs no request.

        Reading a chunk that is not there is an error, never fill values. Writing stores chunks of fill values too.
        """
        spec = {
            "driver": "zarr3",
            "kvstore": self.place.spec(f"{name}/"),
            "metadata": {key: value for key, value in metadata.items() if key != "storage_transformers"},
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        refuse_fork()
        context = self.place.context
        opening: Operation[ts.TensorStore] = self.begin(
            f"open array {name} of {self.url}",
            lambda: ts.open(spec, open=True, assume_metadata=True, context=context),
        )
        return opening.result()

    def begin(self, doing: str, start: Callable[[], Any], *, size: int = 0) -> Operation[Any]:
        """Begins something with an array of this root.

        Args:
            doing: what it is, for messages: `read resid_post, layer 3 of s3://...`.
            start: begins it and gives a future of TensorStore; called again where it has to be tried again.
            size: bytes that go to the storage or come from it, if they are many.
        """
        return Operation(doing, start, self.place.patience(size))

    def check_writable(self) -> None:
        """Fails before any work where nothing can be written. Costs two small requests if it is not local.

        Raises:
            InputError: the name is not one of a store, a file is in the way, or it is on a web server.
            StoragePermissionError: it cannot be written, or these credentials may not.
            BucketError: there is no such bucket.
        """
        name = self.place.name
        if not name.endswith(SUFFIX) or name == SUFFIX:
            raise InputError(f"{self.url!r} is not a name for a store; expected one that ends in {SUFFIX}")
        self.place.check_writable()

    def check_space(self, need_bytes: int) -> None:
        """Fails before any work where `need_bytes` are not free. Buckets have no end.

        Raises:
            StorageFullError: less than `need_bytes` are free.
        """
        self.place.check_space(need_bytes)

    def refuse_link(self, key: str) -> None:
        """Refuses to write where the lock file is a link: TensorStore would write to the file that it leads to."""
        self.place.refuse_link(key)

    def look(self, key: str, most_bytes: int) -> None:
        """Refuses an object of more than `most_bytes` before it is read. Costs a look at a file, or a small request.

        Raises:
            CorruptStoreError: it has more, or is no file.
        """
        self._look(key, most_bytes)

    def _look(self, key: str, most_bytes: int) -> None:
        """Refuses an object that is too large, or on which reading would wait for ever."""
        self.place.look(key, most_bytes)

    def _write_if(self, key: str, value: bytes, generation: Any) -> Any:
        """Writes under a condition, and reads what is there afterwards."""
        self.refuse_link(key)
        self._writing_if(key, value, generation).result()
        return self._reading(key).result()

    def _writing(self, key: str, value: bytes) -> Operation[Any]:
        return self._begin(f"write {key}", lambda kv: kv.write(key, value), size=len(value), sound=unwritten)

    def _writing_if(self, key: str, value: bytes, generation: Any) -> Operation[Any]:
        return self._begin(f"write {key}", lambda kv: kv.write(key, value, if_equal=generation))

    def _read_all(self, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Key and answer of many small objects; 64 are under way at once."""
        for group in _groups(keys):
            self.place.look_all(group, MAX_OBJECT_BYTES)
            for key, reading in [(key, self._reading(key)) for key in group]:
                yield key, reading.result()

    def _reading(self, key: str) -> Operation[Any]:
        return self._begin(f"read {key}", lambda kv: kv.read(key), sound=unanswered)

    def _begin(self, doing: str, start: Callable[[Any], Any], **details: Any) -> Operation[Any]:
        return self.place.begin(doing, start, **details)

    @staticmethod
    def _value(found: Any) -> bytes | None:
        return bytes(found.value) if found.state == "value" else None


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """So many as are asked for at once."""
    remaining = iter(items)
    while group := list(itertools.islice(remaining, AT_ONCE)):
        yield group


def _after(prefix: str) -> str:
    """The first key after all that start with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
