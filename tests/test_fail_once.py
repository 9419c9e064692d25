"""Every storage call fails once: the run ends with an error that names it, and a rerun ends in the same bytes.

The failures are those that TensorStore and the operating system give, put in where actstore calls them. Nothing is put
in above that, so that the translation of errors is tested too. A call that times out has done its work: only the
answer is lost. The others have done nothing.
"""

import dataclasses
import errno
import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tensorstore as ts
from kill_points import WrappedArray, check_kept, unchecked, without_sync, write
from parts import part_and_all
from stores import make_contents, make_documents, tree

from actstore import Column, Layout, Site, durable, kvstore
from actstore.durable import LOCK_SUFFIX
from actstore.errors import StorageError, StorageFullError, StoragePermissionError, StoreError

LAYOUT = Layout(
    (Site("resid_post", 3, (0, 4)), Site("final_norm", 2, None, "float32")), 7, 4, 2, (Column("position", "int32"),)
)
CONTENTS = dataclasses.replace(make_contents(LAYOUT), documents=dataclasses.replace(make_documents(), columns={}))
BLOCKS = range(2)  # the second is short


@dataclasses.dataclass(frozen=True)
class Failure:
    """One way to fail: as TensorStore says it, as the system numbers it, and the error it becomes."""

    status: str
    number: int
    becomes: type[StoreError]

    def of_system(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))

    def of_tensorstore(self, place: str) -> ValueError:
        return ValueError(
            f'{self.status}: Error writing "{place}": Failed to write 12 bytes to file 4: {os.strerror(self.number)} '
            f"[os_error_code='{self.number}'] [tensorstore_spec='{{\"driver\":\"file\"}}']"
        )


FAILURES = {
    "no space": Failure("RESOURCE_EXHAUSTED", errno.ENOSPC, StorageFullError),
    "no permission": Failure("PERMISSION_DENIED", errno.EACCES, StoragePermissionError),
    "time-out": Failure("DEADLINE_EXCEEDED", errno.ETIMEDOUT, StorageError),
    "input/output error": Failure("UNKNOWN", errno.EIO, StorageError),
}


class Calls:
    """Names every storage call of a run below `url`, and lets one of them fail, once."""

    def __init__(self, url: Path, fail_at: str | None = None, failure: Failure | None = None) -> None:
        self.url, self.fail_at, self.failure = url, fail_at, failure
        self.names: list[str] = []
        self._counting = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._paths: dict[int, str] = {}

    def call(self, what: str, key: str, work: Callable[[], Any], error: Callable[[Failure], Exception]) -> Any:
        """Does `work`, or fails before it; a time-out fails after it."""
        with self._counting:
            self._counts[what, key] += 1
            name = f"{what} {key} #{self._counts[what, key]}"
            self.names.append(name)
        if name != self.fail_at or self.failure is None:
            return work()
        if self.failure.number == errno.ETIMEDOUT:
            work()
        raise error(self.failure)

    def of_tensorstore(self, what: str, key: str, future: Callable[[], Any]) -> Any:
        """A future that is started, or fails, when its result is asked for."""

        def error(failure: Failure) -> Exception:
            waiting = failure.number == errno.ETIMEDOUT and what != "write array"
            return TimeoutError() if waiting else failure.of_tensorstore(f"{self.url}/{key}{LOCK_SUFFIX}")

        return SimpleNamespace(
            result=lambda timeout=None: self.call(what, key, lambda: future().result(timeout=timeout), error)
        )

    def of_system(self, what: str, path: str | os.PathLike[str] | int, work: Callable[[], Any]) -> Any:
        place = self._paths.get(path, "") if isinstance(path, int) else os.fspath(path)
        key = os.path.relpath(place, self.url).removesuffix(LOCK_SUFFIX)
        result = self.call(what, key, work, Failure.of_system)
        if what == "open":
            self._paths[result] = place
        return result


class ObservedSystem:
    """The module `os`, with the calls that `durable` makes to a file system observed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in {"open", "writev", "fsync", "ftruncate", "fstat"}:
            return real
        return lambda place, *more: self._calls.of_system(name, place, lambda: real(place, *more))


@contextmanager
def observed(calls: Calls) -> Iterator[None]:
    """Every storage call of actstore inside goes through `calls`: TensorStore, files, folders, locks, free space.

    Opening a key-value store or an array is not among them: it touches no file.
    """

    def open_store(spec: Any, **settings: Any) -> Any:
        real = ts.KvStore.open(spec, **settings).result()
        store = SimpleNamespace(
            read=lambda key: calls.of_tensorstore("read", key, lambda: real.read(key)),
            write=lambda key, value, **conditions: calls.of_tensorstore(
                "write", key, lambda: real.write(key, value, **conditions)
            ),
            list=lambda span: calls.of_tensorstore("list", span.inclusive_min.decode(), lambda: real.list(span)),
        )
        return SimpleNamespace(result=lambda timeout: store)

    def open_array(spec: Any, **settings: Any) -> Any:
        real = ts.open(spec, **settings).result()
        name = os.path.relpath(spec["kvstore"]["path"], calls.url)
        array = WrappedArray(real, name, lambda key, start: calls.of_tensorstore("write array", key, start))
        return SimpleNamespace(result=lambda timeout: array)

    def mkdir(path: Path, **_: bool) -> None:
        calls.of_system("mkdir", path, lambda: os.makedirs(path, exist_ok=True))  # noqa: PTH103  not itself

    def replace(path: Path, target: Path) -> None:
        calls.of_system("replace", path, lambda: real_replace(path, target))

    def disk_usage(path: Path) -> Any:
        return calls.of_system("disk_usage", calls.url, lambda: real_disk_usage(path))

    def lock(file: int, *command: Any) -> Any:
        return calls.of_system("fcntl", file, lambda: fcntl.fcntl(file, *command))

    real_replace, real_disk_usage = Path.replace, shutil.disk_usage
    stores = SimpleNamespace(open=open_store, KeyRange=ts.KvStore.KeyRange)
    tensorstore = SimpleNamespace(open=open_array, Context=ts.Context, KvStore=stores)
    with ExitStack() as stack:
        for place, name, value in [
            *((module, "ts", tensorstore) for module in (kvstore.local, kvstore.place, kvstore.root)),
            (durable, "os", ObservedSystem(calls)),
            (durable, "fcntl", SimpleNamespace(**vars(fcntl) | {"fcntl": lock})),
            (Path, "mkdir", mkdir),
            (Path, "replace", replace),
            (shutil, "disk_usage", disk_usage),
        ]:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with unchecked(), without_sync():
        yield


@pytest.fixture(scope="module")
def calls_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """The names of all storage calls of an undisturbed run, and the files it leaves."""
    url = tmp_path_factory.mktemp("undisturbed") / "run.acts.zarr"
    calls = Calls(url)
    with observed(calls):
        write(url, CONTENTS, BLOCKS, seal=True)
    return sorted(calls.names), tree(url)


def test_no_call_is_forgotten(calls_of_a_run: tuple[list[str], dict[str, bytes]]) -> None:
    """Every file is written by a call that has a name, and the system's calls are there."""
    names, whole = calls_of_a_run
    written = {name.split()[-2] for name in names if name.startswith(("write ", "write array ", "replace "))}
    assert written == set(whole)
    assert {name.split()[0] for name in names} == {
        "open", "read", "write", "list", "mkdir", "fcntl", "fstat", "ftruncate", "writev", "fsync", "replace",
        "disk_usage",
    }  # fmt: skip


@part_and_all(5)
@pytest.mark.parametrize("kind", FAILURES)
def test_every_call_fails_once(
    kind: str, stride: int, tmp_path: Path, calls_of_a_run: tuple[list[str], dict[str, bytes]]
) -> None:
    names, whole = calls_of_a_run
    names = names[list(FAILURES).index(kind) % stride :: stride]
    failure = FAILURES[kind]
    for number, name in enumerate(names):
        url = tmp_path / f"{number}.acts.zarr"
        try:
            check_one_failure(url, Calls(url, name, failure), whole)
        except AssertionError as error:
            raise AssertionError(f"{kind} at {name!r}: {error}") from error
    print(f"{kind}: {len(names)} calls failed once each")


def check_one_failure(url: Path, calls: Calls, whole: dict[str, bytes]) -> None:
    """One run with one failing call, what it leaves, and its rerun."""
    assert calls.failure is not None
    assert calls.fail_at is not None
    caught: StoreError | None = None
    try:
        with observed(calls):
            write(url, CONTENTS, BLOCKS, seal=True)
    except StoreError as error:
        caught = error
    assert type(caught) is calls.failure.becomes, repr(caught)
    message, place = str(caught), calls.fail_at.split()[-2].split("/c/")[0]
    assert str(url) in message, message
    assert place in message or place == ".", message
    assert not any(part in message for part in ("\n", "tensorstore_spec", calls.failure.status)), message
    marked = check_kept(url, CONTENTS, whole)
    write(url, CONTENTS, [block for block in BLOCKS if block not in marked], seal=True)
    assert tree(url) == whole


def test_an_error_that_nobody_translates_would_be_seen(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    calls = Calls(url, "disk_usage . #1", FAILURES["no space"])
    as_it_comes = mock.patch.object(kvstore.local, "storage_errors", return_value=nullcontext())
    with as_it_comes, pytest.raises(OSError, match="No space left"):
        check_one_failure(url, calls, {})


def test_a_failure_that_is_swallowed_would_be_seen(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    calls = Calls(url, "writev resid_post/c/0/1/0 #2", FAILURES["no space"])  # there is no second one
    with pytest.raises(AssertionError, match="None"):
        check_one_failure(url, calls, {})
