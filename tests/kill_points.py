"""Processes that die at named points of a run, and what must hold at the moment after.

A point lies before or after a storage operation: `before write .act/commits/00000001.json`. The operations are wrapped
here, from outside; the code under test knows nothing of it. Run as a program, this module is a server that forks a
process per line of standard input: everything is imported already, so a process costs 10 ms and not 500.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import jaxtyping
import tensorstore as ts
import xxhash
from appending import ADDITIONS
from stores import Contents, make_contents, raw_tensorstore, tree

import actstore
from actstore import Layout, Writer
from actstore.durable import LOCK_SUFFIX
from actstore.errors import SealedStoreError
from actstore.kvstore import Operation, Root
from actstore.layout import norm_name
from actstore.ledger import read_plan
from actstore.verify import verify

Point = Callable[[str], None]
ASSETS = {"config.json": b'{"model_type": "made-up"}'}
CHILD_SECONDS = 120  # then a process that hangs is ended by the system


def create(url: Path, contents: Contents, *, seal: bool = False) -> Writer:
    """A writer of `contents` and of an asset: a store has every kind of object then."""
    return actstore.create(
        url, contents.layout, contents.provenance, documents=contents.documents, assets=ASSETS, seal=seal
    )


def write(url: Path, contents: Contents, blocks: Iterable[int], *, seal: bool = False) -> None:
    """Writes some blocks and seals if asked to. A store that somebody else has sealed meanwhile is fine."""
    with suppress(SealedStoreError), create(url, contents, seal=seal) as writer:
        for block in blocks:
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns)


# Points


@contextmanager
def watched(at: Point) -> Iterator[None]:
    """Calls `at` with the name of every point that the code inside passes, in the thread that passes it."""
    half = threading.local()
    with ExitStack() as stack:
        changed = {
            verb: _around(verb, getattr(Root, verb), at, half) for verb in ("write", "create", "write_pieces", "delete")
        }
        changed |= {name: _together(name, getattr(Root, name), half) for name in ("write_all", "create_all")}
        changed |= {name: _sent(getattr(Root, name), at, half) for name in ("_writing", "_writing_if")}
        for name, change in changed.items():
            stack.enter_context(mock.patch.object(Root, name, change))
        stack.enter_context(mock.patch.object(Root, "open_array", _watched_array(Root.open_array, at)))
        stack.enter_context(mock.patch.object(os, "writev", _in_two_parts(os.writev, at, half)))
        yield


def _around(verb: str, real: Callable[..., Any], at: Point, half: threading.local) -> Callable[..., Any]:
    def call(root: Root, key: str, *value: Any) -> Any:
        at(f"before {verb} {key}")
        half.key = key
        result = real(root, key, *value)
        at(f"after {verb} {key}")
        return result

    return call


def _together(name: str, real: Callable[..., None], half: threading.local) -> Callable[..., None]:
    """Many objects that a bucket takes at once: each of them has its points."""

    def call(root: Root, values: Mapping[str, bytes]) -> None:
        half.verb = None if root.is_local else name
        real(root, values)
        half.verb = None

    return call


def _sent(real: Callable[..., Any], at: Point, half: threading.local) -> Callable[..., Any]:
    def call(root: Root, key: str, *value: Any) -> Any:
        verb = getattr(half, "verb", None)
        if verb is None:
            return real(root, key, *value)
        at(f"before {verb} {key}")
        return _Sent(real(root, key, *value), lambda: at(f"after {verb} {key}"))

    return call


class _Sent(Operation[Any]):
    """A write that was begun, with a point after it was awaited."""

    def __init__(self, real: Operation[Any], awaited: Callable[[], None]) -> None:
        self._real, self._awaited = real, awaited

    def result(self) -> Any:
        value = self._real.result()
        self._awaited()
        return value


def _in_two_parts(real: Callable[..., int], at: Point, half: threading.local) -> Callable[..., int]:
    """The system takes the first half of a shard, and there is a point before the rest."""

    def writev(file: int, pieces: list[memoryview]) -> int:
        key, half.key = getattr(half, "key", None), None
        if key is None:
            return real(file, pieces)
        data = b"".join(pieces)
        written = os.write(file, data[: len(data) // 2])
        at(f"halfway through write_pieces {key}")
        return written

    return writev


def _watched_array(real: Callable[..., Any], at: Point) -> Callable[..., Any]:
    def write(key: str, start: Callable[[], Any]) -> Any:
        at(f"before write {key}")
        future = start()
        at(f"started write {key}")
        return _Future(future, lambda: at(f"after write {key}"))

    return lambda root, name, metadata: WrappedArray(real(root, name, metadata), name, write)


class WrappedArray:
    """A TensorStore array that hands every write of a chunk to `write`, with the chunk's key and how to start it."""

    __class__ = property(lambda self: ts.TensorStore)  # type: ignore[assignment]  # as the type checks of tests ask

    def __init__(
        self,
        real: Any,
        name: str,
        write: Callable[[str, Callable[[], Any]], Any],
        chunk: tuple[int, ...] | None = None,
    ) -> None:
        self._real, self._name, self._write = real, name, write
        self._chunk = chunk or (0,) * real.rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __getitem__(self, index: Any) -> "WrappedArray":
        axes = index if isinstance(index, tuple) else (index,)
        starts = [axis.start if isinstance(axis, slice) else axis for axis in axes]
        sizes = self._real.chunk_layout.write_chunk.shape
        chunk = tuple(start // size for start, size in zip(starts, sizes, strict=False))
        return WrappedArray(self._real[index], self._name, self._write, chunk + self._chunk[len(chunk) :])

    def write(self, *values: Any, **settings: Any) -> Any:
        key = f"{self._name}/c/{'/'.join(map(str, self._chunk))}"
        return self._write(key, lambda: self._real.write(*values, **settings))


@dataclasses.dataclass(frozen=True)
class _Future:
    """A TensorStore future with a point after it was awaited."""

    real: Any
    awaited: Callable[[], None]

    def result(self, **settings: Any) -> Any:
        value = self.real.result(**settings)
        self.awaited()
        return value


def points_of_a_run(url: Path, contents: Contents) -> list[str]:
    """The points of an undisturbed run, each once, in the order in which it passed them; threads change it a little."""
    passed: list[str] = []
    with watched(passed.append):
        write(url, contents, range(contents.layout.blocks), seal=True)
    return list(dict.fromkeys(passed))


# What must hold


def block_keys(layout: Layout, block: int) -> list[str]:
    """Keys of everything that the marker of a block vouches for, but for `valid`."""
    keys = [f"{column.name}/c/{block}" for column in layout.columns]
    for site in layout.sites:
        for layer in [""] if site.layers is None else [f"{index}/" for index in range(len(site.layers))]:
            keys += [f"{site.name}/c/{layer}{block}/0", f"{norm_name(site.name)}/c/{layer}{block}"]
    return keys


def marked_blocks(files: Iterable[str]) -> set[int]:
    """Blocks with a marker, by the names of files."""
    return {int(Path(name).stem) for name in files if name.startswith(".act/commits/") and name.endswith(".json")}


def check_kept(url: Path, contents: Contents, whole: dict[str, bytes]) -> set[int]:
    """What must hold at any moment of a run whose undisturbed end is the files `whole`; returns the marked blocks.

    `valid` implies data that are there bit by bit, a marker implies `valid` and true checksums, the documents' marker
    implies the documents, and the seal implies everything.

    Raises:
        AssertionError: it does not hold.
    """
    files = {name: data for name, data in tree(url).items() if not name.endswith(LOCK_SUFFIX)}
    marked = marked_blocks(files)
    valid = {int(Path(name).name) for name in files if name.startswith("valid/c/")}
    assert marked <= valid, f"blocks {sorted(marked - valid)} have a marker and are not valid"
    promised = [f"valid/c/{block}" for block in valid]
    promised += [key for block in valid for key in block_keys(contents.layout, block)]
    if ".act/documents.json" in files:
        promised += [key for key in whole if key.startswith("documents/")]
    if ".act/SEALED.json" in files:
        promised += list(whole)
    wrong = {key for key in promised if files.get(key) != whole[key]}
    assert not wrong, f"promised, but missing or wrong: {sorted(wrong)}"
    if valid:
        _check_values(url, contents, valid, marked)
    return marked


def _check_values(url: Path, contents: Contents, valid: set[int], marked: set[int]) -> None:
    """The same through TensorStore alone: values of valid blocks, and checksums of marked ones."""
    for name, values in [*contents.rows.items(), *contents.columns.items(), ("valid", None)]:
        array = raw_tensorstore(url, name)
        for block in valid:
            span = slice(*contents.layout.block_range(block))
            axis = (..., span, slice(None)) if name in contents.rows else (span,)
            stored = array[axis].read().result()
            expected = stored * 0 + 1 if values is None else values[axis]
            assert stored.tobytes() == expected.tobytes(), f"{name} of block {block}"
    for block in marked:
        marker = json.loads((url / f".act/commits/{block:08d}.json").read_bytes())
        span = slice(*contents.layout.block_range(block))
        assert marker["samples"] == [span.start, span.stop]
        for name, digests in marker["checksums"].items():
            array = raw_tensorstore(url, name)
            axis = array.domain.labels.index("sample")
            stored = array[(slice(None),) * axis + (span,)].read().result()
            layers = [stored] if len(digests) == 1 else list(stored)
            assert [xxhash.xxh3_128_hexdigest(layer.tobytes()) for layer in layers] == digests, f"{name} of {block}"


# Processes


QUIET = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Neither NumPy nor pyarrow, which pandas imports, starts threads then: a process with threads must not fork."""


class Forks:
    """Starts processes that write. Use it in a `with` statement: none of them outlives it."""

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, start_new_session=True,
            env=os.environ | QUIET,
        )  # fmt: skip
        return self

    def start(self, url: Path, blocks: Iterable[int], *, seal: bool = False, kill_at: str | None = None) -> int:
        """Starts a process that writes blocks of `make_contents()`; its number."""
        return self._ask({"url": str(url), "blocks": list(blocks), "seal": seal, "kill_at": kill_at})

    def append(
        self,
        url: Path,
        addition: str,
        *,
        blocks: list[int] | None = None,
        seal: bool = True,
        kill_at: str | None = None,
    ) -> int:
        """Starts a process that writes some blocks, or all, of one of the `ADDITIONS`; its number."""
        return self._ask({"url": str(url), "blocks": blocks, "seal": seal, "kill_at": kill_at, "addition": addition})

    def finish(self, url: Path) -> None:
        """Seals, then verifies every byte, in one process more.

        Raises:
            AssertionError: there are findings.
        """
        self.wait(self._ask({"url": str(url), "blocks": [], "seal": True, "kill_at": None, "check": True}))

    def wait(self, process: int) -> bool:
        """Waits for the end of a process; whether it was killed.

        Raises:
            AssertionError: it failed.
        """
        status = os.waitstatus_to_exitcode(self._ask(process))
        assert status in (0, -signal.SIGKILL), f"exit code {status}\n{self.errors()}"
        return status != 0

    def threads(self) -> int:
        """Threads of the server, TensorStore's too: a fork is safe while this is 1."""
        return self._ask(None)

    def errors(self) -> str:
        """What all processes said about their failures."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def _ask(self, question: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"the server is gone\n{self.errors()}"
        return int(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        self._errors.close()


def serve() -> None:
    """Answers each line: a job with the number of a new process, a number with its exit status."""
    contents = make_contents()
    assert contents.plan  # what the first use of a library costs is paid here
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            print(len(list(Path("/proc/self/task").iterdir())), flush=True)
        elif isinstance(question, int):
            print(os.waitpid(question, 0)[1], flush=True)
        else:
            process = os.fork()
            if not process:
                _work(contents, **question)
            print(process, flush=True)


def _work(
    contents: Contents,
    *,
    url: str,
    blocks: list[int] | None,
    seal: bool,
    kill_at: str | None,
    check: bool = False,
    addition: str | None = None,
) -> None:
    """Writes in a new process, and never returns."""
    signal.alarm(CHILD_SECONDS)

    def at(point: str) -> None:
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        with watched(at), without_sync():
            if addition is None:
                write(Path(url), contents, blocks or [], seal=seal)
            else:
                with suppress(SealedStoreError):
                    ADDITIONS[addition]().write(url, blocks=blocks, seal=seal)
        if check:
            report = verify(Root.of(url), read_plan(Root.of(url)))
            assert (report.status, report.findings) == ("complete", ()), report
        code = 0
    except BaseException:  # noqa: BLE001  reported by the exit code and the text
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def without_sync() -> Iterator[None]:
    """A killed process loses nothing that the system has, synced or not. That all is synced is shown by test_writer."""
    real = Root.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Root], url: Any, **options: Any) -> Root:
        root = real(cls, url, **options)
        root.place.__dict__["context"] = ts.Context({"file_io_sync": False})
        return root

    with mock.patch.object(Root, "of", classmethod(of)), mock.patch.object(os, "fsync", return_value=None):
        yield


@contextmanager
def unchecked() -> Iterator[None]:
    """Types are not checked inside: for tests that do the same a thousand times, of which it would take half."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


if __name__ == "__main__":
    import actstore.api

    serve()
