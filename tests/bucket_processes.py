"""Processes that use a bucket, each with an environment of its own, and what became of each.

Run as a program, this module is a server that forks a process per line of standard input: everything is imported
already, so a process costs 10 ms and not a second, and each starts without connections, credentials or caches.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore as ts
from kill_points import QUIET, unchecked, watched
from servers.server import Server
from stores import Contents, make_contents, make_documents

import actstore
from actstore import Column, Layout, Site
from actstore.errors import ActstoreError, SealedStoreError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.markers import committed_blocks
from actstore.verify import verify

SECONDS = 120  # then a process that hangs is ended by the system
LAYOUT = Layout(
    (Site("resid_post", 3, (0, 4)), Site("final_norm", 2, None, "float32")), 15, 4, 2, (Column("position", "int32"),)
)
QUICK = {"ACTSTORE_DEADLINE_SECONDS": "8", "ACTSTORE_STALL_SECONDS": "1", "ACTSTORE_NOTICE_SECONDS": "2"}
"""Bounds for tests: what a cloud would be given minutes for."""


def small_contents() -> Contents:
    """Four blocks, the last one short, two sites, documents: about 90 objects."""
    return dataclasses.replace(
        make_contents(LAYOUT), documents=dataclasses.replace(make_documents(), columns={})
    )  # fmt: skip


# What a process does


def write(url: str, *, blocks: Iterable[int] | None = None, seal: bool = True) -> list[int]:
    """Writes what is missing of some blocks, or of all, and seals; the blocks that it wrote."""
    contents = small_contents()
    written = []
    with contextlib.suppress(SealedStoreError), contents.create(url, seal=seal) as writer:
        for block in writer.missing():
            if blocks is None or block in blocks:
                activations, columns = contents.block(block)
                writer.write(block, activations, samples=columns)
                written.append(block)
    return written


def read(url: str) -> str:
    """Opens the store and compares every value with what was written: `right`, or what was wrong."""
    contents = small_contents()
    data = actstore.open(url).dataset(raw=True)
    values = {**contents.rows, **contents.columns}
    wrong = [name for name, rows in values.items() if data[name].values.tobytes() != rows.tobytes()]
    return f"wrong values of {wrong}" if wrong else "right"


def check(url: str) -> str:
    """Verifies every byte: the status, or the first finding."""
    report = verify(Root.of(url), read_plan(Root.of(url)))
    return f"{report.findings[0]}" if report.findings else report.status


def committed(url: str) -> list[int]:
    """The blocks that are committed, by one list."""
    root = Root.of(url)
    return sorted(committed_blocks(root, read_plan(root)))


def points(url: str) -> list[str]:
    """The points that an undisturbed run passes, each once."""
    passed: list[str] = []
    with watched(passed.append):
        write(url)
    return list(dict.fromkeys(passed))


WORK: dict[str, Callable[..., Any]] = {each.__name__: each for each in (write, read, check, committed, points)}


class Outcome(NamedTuple):
    """How a process ended. Where nothing was raised, `error` is empty and `value` what the work gave."""

    killed: bool
    value: Any = None
    error: str = ""
    message: str = ""
    exit_code: int = 0
    seconds: float = 0.0


class Processes:
    """Starts processes that use buckets. Use it in a `with` statement: none of them outlives it."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="bucket-processes-")
        self._log = (Path(self._folder.name) / "log").open("wb")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TENSORSTORE_")}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, start_new_session=True, env=kept | QUIET,
        )  # fmt: skip
        return self

    def start(
        self,
        server: Server,
        work: str,
        key: str,
        *,
        kill_at: str = "",
        environ: Mapping[str, str] = QUICK,
        **given: Any,
    ) -> int:
        """Starts `work` on the store under `key`; the number of the process, which dies at the point `kill_at`."""
        place = server.client_environ() | dict(environ)
        question = {"work": work, "url": server.url(key), "environ": place, "kill_at": kill_at, "given": given}
        return self._ask({**question, "answers": self._folder.name})

    def wait(self, process: int) -> Outcome:
        """Waits for the end of a process."""
        status = os.waitstatus_to_exitcode(self._ask(process))
        if status == -signal.SIGKILL:
            return Outcome(killed=True)
        assert status == 0, f"process {process} ended with {status}:\n{self.log()}"
        return Outcome(killed=False, **json.loads((Path(self._folder.name) / f"{process}.json").read_bytes()))

    def run(self, server: Server, work: str, key: str, **given: Any) -> Outcome:
        """Starts a process and waits for it."""
        return self.wait(self.start(server, work, key, **given))

    def value(self, server: Server, work: str, key: str, **given: Any) -> Any:
        """What the work of a process gave.

        Raises:
            AssertionError: it failed.
        """
        outcome = self.run(server, work, key, **given)
        assert not outcome.error, f"{outcome}\n{self.log()}"
        return outcome.value

    def threads(self) -> int:
        """Threads of the server: a fork is safe while this is 1."""
        return self._ask(None)

    def log(self) -> str:
        """What all processes said."""
        return (Path(self._folder.name) / "log").read_text(errors="replace")[-5000:]

    def _ask(self, question: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"the server is gone\n{self.log()}"
        return int(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        self._log.close()
        self._folder.cleanup()


def serve() -> None:
    """Answers each line: a job with the number of a new process, a number with its exit status.

    The answer to `null` is the number of threads.
    """
    assert small_contents().plan  # what the first use of a library costs is paid here
    for library in ("xarray", "dask.array", "scipy.sparse"):  # xarray imports the others when it makes a dataset
        importlib.import_module(library)
    for line in sys.stdin:
        question = json.loads(line)
        if question is None:
            print(len(list(Path("/proc/self/task").iterdir())), flush=True)
            continue
        if isinstance(question, int):
            print(os.waitpid(question, 0)[1], flush=True)
            continue
        process = os.fork()
        if not process:
            _work(**question)
        print(process, flush=True)


def _work(*, work: str, url: str, environ: dict[str, str], kill_at: str, given: dict[str, Any], answers: str) -> None:
    """Works in a new process, and never returns."""
    signal.alarm(SECONDS)
    os.environ.update(environ)

    def at(point: str) -> None:
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    answer: dict[str, Any] = {}
    code = 1
    try:
        with watched(at) if kill_at else contextlib.nullcontext(), unchecked():
            answer["value"] = WORK[work](url, **given)
        code = 0
    except ActstoreError as error:
        answer = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        code = 0
    except BaseException:  # noqa: BLE001  reported by the exit code and the text
        traceback.print_exc()
    finally:
        answer["seconds"] = time.monotonic() - started
        place = Path(answers) / f"{os.getpid()}.json"
        place.with_suffix(".part").write_text(json.dumps(answer))
        place.with_suffix(".part").rename(place)
        sys.stderr.flush()
        os._exit(code)


# What lies in a bucket, by TensorStore alone


def stored(server: Server, key: str) -> dict[str, bytes]:
    """Every object below a key, with its bytes. Needs the server's environment where it is `gs`."""
    kv = ts.KvStore.open(server.spec(f"{key}/")).result(timeout=30)
    names = kv.list().result(timeout=60)
    found = [kv.read(name) for name in names]
    return {name.decode(): bytes(each.result(timeout=60).value) for name, each in zip(names, found, strict=True)}


def values(server: Server, key: str, name: str) -> np.ndarray:
    """An array as TensorStore itself opens it, from nothing but its `zarr.json`."""
    spec = {"driver": "zarr3", "kvstore": server.spec(f"{key}/{name}/")}
    return ts.open(spec, open=True).result(timeout=30).read().result(timeout=60)


def as_files(objects: Mapping[str, bytes], folder: Path) -> Path:
    """The same objects as files, for checks that look at files."""
    for name, data in objects.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


if __name__ == "__main__":
    serve()
