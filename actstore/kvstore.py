"""The only place where a path becomes a TensorStore spec, and where TensorStore's errors become ours.

A `Root` is the place of one store: it reads, writes and lists small objects by key, and opens arrays below it. Writes
are durable when they return: on local files TensorStore writes a temporary file, syncs it, renames it, and syncs the
folder.
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import tensorstore as ts

from actstore.durable import LOCK_SUFFIX, lock_files, write_durably
from actstore.errors import (
    ActstoreError,
    CorruptStoreError,
    InputError,
    StorageError,
    StorageFullError,
    StoragePermissionError,
    StoreError,
)
from actstore.objects import kind_of

Result = TypeVar("Result")
SUFFIX = ".acts.zarr"
TIMEOUT_SECONDS = 600.0  # of one request; local storage that takes longer than this is not coming back
MAX_OBJECT_BYTES = 16 << 20  # of plan, marker, metadata: those of 10^6 samples have a few kB
READS_AT_ONCE = 64  # of small objects
CREATE_TRIES = 8  # of an object that others remove as soon as it is there, as claims are
_FILE_THREADS = 16  # measured: 4.5 GB/s against 2.4 GB/s with the default of one per core, warm local files

_KIND_OF_ERRNO: dict[int, type[StorageError]] = {
    errno.ENOSPC: StorageFullError, errno.EDQUOT: StorageFullError,
    errno.EROFS: StoragePermissionError, errno.EACCES: StoragePermissionError, errno.EPERM: StoragePermissionError,
}  # fmt: skip
_STATUS: list[tuple[str, type[StoreError], str]] = [
    ("No space left", StorageFullError, "free some space, then run the same command again"),
    ("Disk quota", StorageFullError, "free some space or raise the quota, then run the same command again"),
    ("Read-only file system", StoragePermissionError, "choose a target that can be written"),
    ("PERMISSION_DENIED", StoragePermissionError, "check the permissions of the target"),
    ("UNAUTHENTICATED", StoragePermissionError, "check your credentials"),
    ("RESOURCE_EXHAUSTED", StorageFullError, "free some space, then run the same command again"),
    ("DATA_LOSS", CorruptStoreError, "run `actstore verify`"),
    ("OUT_OF_RANGE", CorruptStoreError, "run `actstore verify`"),
    ("Requested byte range", CorruptStoreError, "run `actstore verify`"),  # an object shorter than its index
    ("Not enough data", CorruptStoreError, "run `actstore verify`"),  # an empty object
    ("ZSTD_", CorruptStoreError, "run `actstore verify`"),  # FAILED_PRECONDITION, as are refused writes
    ("Truncated Zstd", CorruptStoreError, "run `actstore verify`"),
    ("End of data", CorruptStoreError, "run `actstore verify`"),  # a chunk of another size: of another array
    ("NOT_FOUND", CorruptStoreError, "run `actstore verify`"),
    ("DEADLINE_EXCEEDED", StorageError, "the storage is too slow or gone: run the same command again later"),
    ("UNAVAILABLE", StorageError, "the storage is not reachable: run the same command again later"),
]


@dataclasses.dataclass(frozen=True)
class Root:
    """The place of one store. Cheap to make; nothing is read or written until a method is called."""

    url: str
    path: Path
    context: ts.Context = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, url: str | os.PathLike[str]) -> "Root":
        """The root at a local path or `file://` URL.

        Raises:
            InputError: another kind of URL.
        """
        text = os.fspath(url)
        scheme = re.match(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
        if scheme and scheme[1] != "file":
            raise InputError(
                f"cannot open {text!r}: found a {scheme[1]}:// address, this version reads and writes local paths and "
                "file:// addresses; copy the store to a local folder first"
            )
        path = Path(text[len("file://") :] if scheme else text).expanduser()
        if not path.name:
            raise InputError(f"{text!r} is not a place for a store; expected a path such as runs/qwen{SUFFIX}")
        if os.sep == "/" and "\\" in text:
            raise InputError(f"{text!r} holds a backslash, which TensorStore reads as /; rename the folder")
        context = ts.Context({"file_io_concurrency": {"limit": _FILE_THREADS}})
        return cls(str(path), Path(os.path.realpath(path)), context)  # TensorStore refuses `..` in paths

    def read(self, key: str, *, most_bytes: int = MAX_OBJECT_BYTES) -> bytes | None:
        """The object under `key`, or None.

        Raises:
            CorruptStoreError: it has more than `most_bytes`, or is no file; nothing of it was read.
        """
        self._look(key, most_bytes)
        result = self._call(f"read {key}", lambda kv: kv.read(key))
        return bytes(result.value) if result.state == "value" else None

    def read_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """The objects under many keys, in their order; None for one that is not there. 64 are under way at once.

        Raises:
            CorruptStoreError: one is larger than 16 MiB, or is no file; nothing of it was read.
        """
        remaining = iter(keys)
        while group := list(itertools.islice(remaining, READS_AT_ONCE)):
            for key in group:
                self._look(key, MAX_OBJECT_BYTES)
            with self._store(f"read {group[0]}") as kv:
                begun = [(key, kv.read(key)) for key in group]
            for key, reading in begun:
                with storage_errors(f"read {key} of {self.url}"):
                    found = reading.result(timeout=TIMEOUT_SECONDS)
                yield bytes(found.value) if found.state == "value" else None

    def digest(self, key: str, *, most_bytes: int) -> str | None:
        """SHA-256 of the object under `key`, or None. Costs reading it, and 1 MiB of memory.

        Raises:
            CorruptStoreError: it has more than `most_bytes`; nothing of it was read.
        """
        self._look(key, most_bytes)
        found = hashlib.sha256()
        with storage_errors(f"read {key} of {self.url}"), suppress(FileNotFoundError, NotADirectoryError):
            with (self.path / key).open("rb") as file:
                while piece := file.read(1 << 20):
                    found.update(piece)
            return found.hexdigest()
        return None

    def size(self, key: str) -> int:
        """Bytes of the object under `key`; 0 where there is none."""
        with storage_errors(f"look at {key} of {self.url}"), suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / key).stat().st_size
        return 0

    def write(self, key: str, value: bytes) -> None:
        """Writes the object under `key`, replacing what is there. Durable when it returns."""
        self.refuse_link(key)
        self._call(f"write {key}", lambda kv: kv.write(key, value))

    def write_pieces(self, key: str, pieces: Iterable[memoryview]) -> None:
        """Writes one object from pieces that are taken one after the other and not joined. Durable when it returns."""
        with storage_errors(f"write {key} of {self.url}"):
            write_durably(self.path / key, pieces)

    def create(self, key: str, value: bytes) -> bytes:
        """Writes the object under `key` unless there is one, and returns what is there afterwards.

        Reads back in every case: a conditional write whose answer was lost is reported as lost although it won. What
        another process removes in between is written again.

        Raises:
            StorageError: it is gone each time.
        """
        self._look(key, MAX_OBJECT_BYTES)
        found = self._call(f"read {key}", lambda kv: kv.read(key))
        for _ in range(CREATE_TRIES):
            if found.state == "value":
                return bytes(found.value)
            self.refuse_link(key)
            write = functools.partial(_write_if, key=key, value=value, generation=found.stamp.generation)
            self._call(f"write {key}", write)
            found = self._call(f"read {key}", lambda kv: kv.read(key))
        if found.state == "value":
            return bytes(found.value)
        raise StorageError(
            f"could not write {key} of {self.url}: it was gone each of {CREATE_TRIES} times; expected that it stays: "
            "find out what removes it, then run the same command again"
        )

    def replace(self, key: str, old: bytes, value: bytes) -> bytes:
        """Writes the object under `key` if it is `old` still, and returns what is there afterwards; b"" for nothing.

        Of several that replace the same at once, one finds its own, where the storage keeps to conditions.
        """
        self._look(key, MAX_OBJECT_BYTES)
        found = self._call(f"read {key}", lambda kv: kv.read(key))
        if found.state == "value" and bytes(found.value) == old:
            self.refuse_link(key)
            write = functools.partial(_write_if, key=key, value=value, generation=found.stamp.generation)
            self._call(f"write {key}", write)
            found = self._call(f"read {key}", lambda kv: kv.read(key))
        return bytes(found.value) if found.state == "value" else b""

    def hint(self, key: str) -> str:
        """What is here instead of a store, whose `key` is missing; and where one lies near by, as the end of a message.

        Costs looking at the first 1,000 names of the folder.
        """
        place = str(self.path)
        if not os.path.isdir(place):  # noqa: PTH112  False where Path raises
            found = ": a file is there" if os.path.exists(place) else ": nothing is there"  # noqa: PTH110
        else:
            found, inside = "", []
            with suppress(OSError), os.scandir(place) as entries:
                inside = [each.name for each in itertools.islice(entries, 1000)]
            stores = [name for name in inside if os.path.exists(os.path.join(place, name, key))]  # noqa: PTH110, PTH118
            if len(stores) == 1:
                return f"; a store lies in it: {os.path.join(self.url, stores[0])}"  # noqa: PTH118
        if os.path.exists(os.path.join(os.path.dirname(place), key)):  # noqa: PTH110, PTH118, PTH120
            return f"{found}; the folder above is a store: {os.path.dirname(self.url)}"  # noqa: PTH120
        return found

    def keys(self, *prefixes: str) -> list[str]:
        """Keys that start with any of `prefixes`, sorted. Bytes that are not UTF-8 become replacement characters.

        One listing of what these have in common: on local files the folder is read once, however many there are.
        """
        if not prefixes:
            return []
        common = os.path.commonprefix(prefixes)  # noqa: RUF071  keys are compared letter by letter
        listed = self._call(f"list {common}", lambda kv: kv.list(ts.KvStore.KeyRange(common, _after(common))))
        return sorted(key for key in (key.decode(errors="replace") for key in listed) if key.startswith(prefixes))

    def lock_files(self, folder: str = "") -> list[tuple[str, bool]]:
        """Keys of the lock files below the store or a folder of it, and whether a living writer holds each."""
        with storage_errors(f"look for lock files of {self.url}"):
            return [(str(path.relative_to(self.path)), held) for path, held in lock_files(self.path / folder)]

    def remove_lock_file(self, key: str) -> None:
        """Removes a lock file that `lock_files` named."""
        with storage_errors(f"remove {key} of {self.url}"):
            (self.path / key).unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """Removes the object under `key`, if there is one."""
        self._call(f"delete {key}", lambda kv: kv.write(key, None))

    def open_array(self, name: str, metadata: dict[str, Any]) -> ts.TensorStore:
        """The array `name` with metadata that is known: costs no request.

        Reading a chunk that is not there is an error, never fill values. Writing stores chunks of fill values too.
        """
        spec = {
            "driver": "zarr3",
            "kvstore": {**self._spec(), "path": f"{self.path}/{name}/"},
            "metadata": {key: value for key, value in metadata.items() if key != "storage_transformers"},
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        refuse_fork()
        with storage_errors(f"open array {name} of {self.url}"):
            return ts.open(spec, open=True, assume_metadata=True, context=self.context).result(timeout=TIMEOUT_SECONDS)

    def check_writable(self, need_bytes: int) -> None:
        """Fails before any work when `need_bytes` cannot be written here.

        Raises:
            InputError: the name is not one of a store, or a file is in the way.
            StoragePermissionError: the folder cannot be written.
            StorageFullError: less than `need_bytes` are free.
        """
        name = Path(self.url).name  # as given: a link may lead to a folder of any name
        if not name.endswith(SUFFIX) or name == SUFFIX:
            raise InputError(f"{self.url!r} is not a name for a store; expected one that ends in {SUFFIX}")
        parent = next(place for place in [self.path, *self.path.parents] if os.path.exists(place))  # noqa: PTH110  False where Path raises
        if not parent.is_dir():
            raise InputError(f"cannot write {self.url}: {parent} is a file, expected a folder; choose another target")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise StoragePermissionError(
                f"cannot write {self.url}: {parent} is read-only for this user; choose a target that can be written"
            )
        with storage_errors(f"ask for the free space of {self.url}"):
            free = shutil.disk_usage(parent).free
        if free < need_bytes:
            raise StorageFullError(
                f"cannot write {self.url}: the run needs {need_bytes:,} bytes, {free:,} are free in {parent}; "
                "free some space, choose another target, or store fewer layers or samples"
            )

    def _look(self, key: str, most_bytes: int) -> None:
        """Refuses an object that is too large, or on which reading would wait for ever."""
        with storage_errors(f"read {key} of {self.url}"), suppress(FileNotFoundError, NotADirectoryError):
            found = (self.path / key).stat()
            if not stat.S_ISREG(found.st_mode):
                raise CorruptStoreError(
                    f"{self.url}/{key} is {kind_of(found.st_mode)}, expected a file; restore it from a copy"
                )
            if found.st_size > most_bytes:
                raise CorruptStoreError(
                    f"{self.url}/{key} has {found.st_size:,} bytes, expected at most {most_bytes:,}; it was not read: "
                    "restore it from a copy"
                )

    def refuse_link(self, key: str) -> None:
        """Refuses to write where the lock file is a link: TensorStore would write to the file that it leads to."""
        if (self.path / f"{key}{LOCK_SUFFIX}").is_symlink():
            raise CorruptStoreError(f"{self.url}/{key}{LOCK_SUFFIX} is a link, expected a file; remove it")

    def _spec(self) -> dict[str, str]:
        return {"driver": "file", "path": f"{self.path}/"}

    def _call(self, doing: str, start: Callable[[Any], Any]) -> Any:
        with self._store(doing) as kv:
            return start(kv).result(timeout=TIMEOUT_SECONDS)

    @contextmanager
    def _store(self, doing: str) -> Iterator[Any]:
        """TensorStore's view of this place; its errors inside the block become ours."""
        refuse_fork()
        with storage_errors(f"{doing} of {self.url}"):
            yield ts.KvStore.open(self._spec(), context=self.context).result(timeout=TIMEOUT_SECONDS)


class _Threads:
    """Where TensorStore's threads are: in the process that used it first."""

    process: int | None = None


def forked() -> bool:
    """Whether this process was forked from one that had used TensorStore, whose threads do not survive that."""
    if _Threads.process is None:
        _Threads.process = os.getpid()
    return _Threads.process != os.getpid()


def refuse_fork() -> None:
    """Refuses to go on in a process where TensorStore would end the program, or a loader wait for ever.

    Costs two questions for the process id: ask once for what is read together, not for each read.

    Raises:
        InputError: the process was forked from one that had used a store.
    """
    if forked():
        raise InputError(
            f"this process ({os.getpid()}) was forked from one that had used a store ({_Threads.process}): the threads "
            "that read are not in it; expected a process that was spawned, or forked before any store was opened. Use "
            "multiprocessing.get_context('spawn') or 'forkserver' (in torch's DataLoader multiprocessing_context="
            "'spawn'), and open the store in the child"
        )


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turns TensorStore's errors inside the block into ours, in one line without the spec.

    Raises:
        StoreError: of the class that fits the failure.
    """
    try:
        yield
    except ActstoreError:
        raise  # ours already; some of them are ValueErrors too
    except TimeoutError:
        raise StorageError(
            f"could not {doing}: no answer in {TIMEOUT_SECONDS:.0f} s; run the same command again later"
        ) from None
    except OSError as error:
        failure = _KIND_OF_ERRNO.get(error.errno or 0, StorageError)
        remedy = (
            "free some space, then run the same command again" if failure is StorageFullError else "check the target"
        )
        raise failure(f"could not {doing}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        text = str(error)
        for needle, kind, remedy in _STATUS:
            if needle in text:
                raise kind(f"could not {doing}: {_reason(text)}; {remedy}") from None
        raise StorageError(f"could not {doing}: {_reason(text)}; run the same command again") from None


def _reason(text: str) -> str:
    """What went wrong and at which object, out of TensorStore's chain of causes: no status word, spec or location."""
    text = re.sub(r"\s*\[[a-z_ ]+='.*$", "", text.split("\n", maxsplit=1)[0])
    paths = re.findall(rf'{re.escape(SUFFIX)}/([^"\\]+)"', text)
    cause = re.split(r'": |(?<=[a-z]): (?=[A-Z])|^[A-Z_]+: ', text)[-1]
    cause = re.sub(r"^chunk .* is missing$", "missing object", cause)
    return cause + (f" at {paths[-1].removesuffix(LOCK_SUFFIX)}" if paths else "")


def _write_if(kv: Any, *, key: str, value: bytes, generation: Any) -> Any:
    return kv.write(key, value, if_equal=generation)


def _after(prefix: str) -> str:
    """The first key after all that start with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
