"""What every kind of storage has: TensorStore's view of it, and how long it may take."""

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import tensorstore as ts

from actstore.errors import CorruptStoreError
from actstore.kvstore.addresses import store_name
from actstore.kvstore.failures import storage_errors
from actstore.kvstore.forks import refuse_fork
from actstore.kvstore.waiting import Operation, Patience


class Place(abc.ABC):
    """The place of one store. Nothing is read or written until a method is called."""

    url: str
    """As it is shown."""
    streams: ClassVar[bool]
    """Whether an object is written piece by piece. Otherwise it is sent whole, and is in memory once more meanwhile."""

    keeps_memory = False
    """Whether what was written would stay where the caller has it: it is copied then."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process too, opens its own connections."""
        return {name: value for name, value in self.__dict__.items() if name not in ("kv", "context")}

    @property
    def name(self) -> str:
        """Name of the store."""
        return store_name(self.url)

    def settings(self) -> dict[str, tuple[str, str]]:
        """What bounds the storage: value and meaning by the variable that sets it."""
        return {}

    @functools.cached_property
    def kv(self) -> Any:
        """TensorStore's key-value store of this place."""
        refuse_fork()
        with storage_errors(f"open {self.url}"):
            return ts.KvStore.open(self.spec(""), context=self.context).result(timeout=self.patience(0).seconds)

    def begin(
        self,
        doing: str,
        start: Callable[[Any], Any],
        *,
        size: int = 0,
        sound: Callable[[Any], str | None] | None = None,
    ) -> Operation[Any]:
        """Begins something with the key-value store; `size` is of large objects, in bytes."""
        refuse_fork()
        kv = self.kv
        return Operation(f"{doing} of {self.url}", lambda: start(kv), self.patience(size), sound=sound)

    @functools.cached_property
    @abc.abstractmethod
    def context(self) -> Any:
        """TensorStore's context: threads, connections, retries."""

    @abc.abstractmethod
    def spec(self, folder: str) -> dict[str, Any]:
        """TensorStore's spec of a folder below the place; empty, or with a slash at its end."""

    @abc.abstractmethod
    def patience(self, size: int) -> Patience:
        """How long an operation on `size` bytes may take."""

    @abc.abstractmethod
    def look(self, key: str, most_bytes: int) -> None:
        """Refuses an object that is too large to be read, or on which reading would wait for ever.

        Raises:
            CorruptStoreError: says which.
        """

    def look_all(self, keys: Sequence[str], most_bytes: int) -> None:
        """The same for several objects."""
        for key in keys:
            self.look(key, most_bytes)

    @abc.abstractmethod
    def digest(self, key: str, *, most_bytes: int) -> str | None:
        """SHA-256 of the object under `key`, or None."""

    @abc.abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object under `key`; 0 where there is none."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""

    @abc.abstractmethod
    def write_pieces(self, key: str, pieces: Iterable[memoryview]) -> None:
        """Writes one object from pieces. Durable when it returns."""

    @abc.abstractmethod
    def hint(self, key: str) -> str:
        """What is here instead of a store, whose `key` is missing, as the end of a message."""

    @abc.abstractmethod
    def lock_files(self, folder: str) -> list[tuple[str, bool]]:
        """Keys of the lock files below a folder, and whether a living writer holds each."""

    @abc.abstractmethod
    def remove_lock_file(self, key: str) -> None:
        """Removes a lock file that `lock_files` named."""

    @abc.abstractmethod
    def refuse_link(self, key: str) -> None:
        """Refuses to write where that would write elsewhere."""

    @abc.abstractmethod
    def check_writable(self) -> None:
        """Fails where nothing can be written."""

    @abc.abstractmethod
    def check_space(self, need_bytes: int) -> None:
        """Fails where there is no space for so many bytes."""


def too_large(where: str, size: str, most_bytes: int) -> CorruptStoreError:
    """What is said of an object that is not read because of its size."""
    return CorruptStoreError(
        f"{where} has {size} bytes, expected at most {most_bytes:,}; it was not read: restore it from a copy"
    )
