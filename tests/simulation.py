"""The commit protocol over a made-up object store, in schedules that a seed decides.

Requests may be lost, done twice, answered late, or arrive long after their host has died. Hosts die at any request and
start again in other numbers. Two kinds of hosts run on this store: the real writer, ledger and table, each host in a
thread of which one at a time may run (`RealHosts`), and a model of their order of requests (`model_host`), which is a
hundred times faster. A test holds the model to the real order.
"""

import dataclasses
import inspect
import json
import os
import random
import textwrap
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import tensorstore
from kill_points import block_keys, unchecked
from stores import Contents

from actstore import kvstore, writer
from actstore.errors import SealedStoreError, StorageError, UnfinishedStoreError
from actstore.kvstore import Root
from actstore.markers import MANIFEST_KEY, MARKER_FOLDER, PLAN_KEY, RANGES_KEY, SEAL_KEY, TABLE_KEY, marker_key

Request = Generator[None, None, Any]  # yields where another host may run
LATE_RATES = (0.1, 0.01, 0.0)  # of the steps at which something late arrives; else it arrives at the very end
TRIES = 4  # of a client, before it gives up
ROUNDS = 80  # then a schedule counts as one that never ends


class Crash(BaseException):
    """The host dies here. Not an `Exception`: no code under test may catch it."""


class Violation(AssertionError):
    """The store holds what must never be seen."""


# The store


@dataclasses.dataclass(frozen=True)
class Rules:
    """What must hold after every change of the store."""

    whole: Mapping[str, bytes]
    """Every object of the finished store of an undisturbed run."""
    unsealed: Mapping[str, bytes]
    """The same before the seal."""
    promised: Mapping[str, tuple[str, ...]]
    """By key: what must be there before it."""
    exact: bool = True
    """Whether every host computes the same bits."""
    stale_nodes: bool = False
    """Whether a late `zarr.json` of the unfinished store may replace a finished one: on stores without conditions."""

    @classmethod
    def of(cls, contents: Contents, whole: Mapping[str, bytes], unsealed: Mapping[str, bytes]) -> "Rules":
        promised = {SEAL_KEY: tuple(key for key in whole if key != SEAL_KEY)}
        for block in range(contents.layout.blocks):
            promised[f"valid/c/{block}"] = tuple(block_keys(contents.layout, block))
            promised[marker_key(block)] = (*promised[f"valid/c/{block}"], f"valid/c/{block}")
        promised[TABLE_KEY] = tuple(key for key in whole if key.startswith("documents/") and "/c/" in key)
        return cls(whole, unsealed, promised)

    def check(self, objects: Mapping[str, bytes], key: str) -> None:
        """Raises Violation where the object that has just changed breaks a rule."""
        value = objects.get(key)
        if value is None:
            raise Violation(f"{key} was deleted")
        unsealed = SEAL_KEY not in objects or (self.stale_nodes and key.endswith("zarr.json"))
        if self.exact and value != self.whole.get(key) and not (unsealed and value == self.unsealed.get(key)):
            raise Violation(f"{key} has bytes that no undisturbed run writes")
        missing = [other for other in self.promised.get(key, ()) if other not in objects]
        if missing:
            raise Violation(f"{key} is there before {missing[0]}")
        if key == SEAL_KEY and self.exact:
            wrong = [other for other, data in self.whole.items() if objects[other] != data]
            if wrong and not self.stale_nodes:
                raise Violation(f"sealed with another {wrong[0]}")


class Disk:
    """The objects, what is still under way to them, and the requests that hosts make."""

    def __init__(self, rules: Rules, generator: random.Random, *, fault_rate: float) -> None:
        self.rules, self.generator, self.fault_rate = rules, generator, fault_rate
        self.late_rate = generator.choice(LATE_RATES)
        self.objects: dict[str, bytes] = {}
        self.late: list[tuple[str, bytes, bool]] = []
        self.log: list[tuple[str, str]] = []
        self.logging = False

    def step(self) -> None:
        """Time passes: something late may arrive."""
        if self.late and self.generator.random() < self.late_rate:
            self.arrive(*self.late.pop(int(self.generator.random() * len(self.late))))

    def arrive(self, key: str, value: bytes, if_absent: bool) -> None:
        if if_absent and key in self.objects and not self.rules.stale_nodes:
            return
        self.objects[key] = value
        self.rules.check(self.objects, key)

    def read(self, key: str) -> Request:
        self._log("read", key)
        yield
        return self.objects.get(key)

    def keys(self, prefix: str) -> Request:
        self._log("list", prefix)
        yield
        return sorted(key for key in self.objects if key.startswith(prefix))

    def put(self, key: str, value: bytes, *, if_absent: bool = False) -> Request:
        """Writes one object, as clients do: tries again when no answer comes, and so may write it twice.

        Raises:
            ValueError: as TensorStore's, after several tries.
            Crash: the host died while its request was under way.
        """
        self._log("put", key)
        for _ in range(TRIES):
            yield
            chance = self.generator.random() / self.fault_rate if self.fault_rate else 9
            if chance < 1:
                continue  # the request was lost
            if chance < 2:
                self.late.append((key, value, if_absent))
                raise Crash
            self.arrive(key, value, if_absent)
            if chance < 3:
                continue  # the answer was lost
            if chance < 4:
                self.late.append((key, value, if_absent))  # the network keeps a copy
            return
        raise ValueError(f'UNAVAILABLE: Error writing "x.acts.zarr/{key}": no answer')

    def create(self, key: str, value: bytes) -> Request:
        """`Root.create`, for the model."""
        found = yield from self.read(key)
        if found is None:
            yield from self.put(key, value, if_absent=True)
            found = yield from self.read(key)
        return found

    def _log(self, what: str, key: str) -> None:
        if self.logging:
            self.log.append((what, key))


# The model of a host


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a host writes, in the order of the model. Mutants change it."""

    nodes: tuple[str, ...]
    labels: tuple[str, ...]
    documents: tuple[str, ...]
    sites: tuple[str, ...]
    blocks: int
    short: bool
    """Whether the last block is short: then something may have been appended to it."""
    block: Callable[[int], tuple[tuple[str, ...], ...]]
    """Groups of keys of a block: the next group begins when the one before is durable."""

    @classmethod
    def of(cls, contents: Contents, nodes: list[str], labels: list[str]) -> "Steps":
        documents = (contents.documents.arrays() if contents.documents else {}).keys()

        def block(number: int) -> tuple[tuple[str, ...], ...]:
            return tuple(block_keys(contents.layout, number)), (f"valid/c/{number}",), (marker_key(number),)

        written = tuple(f"documents/{name}/c/0" for name in documents)
        sites = tuple(site.name for site in contents.layout.sites)
        short = contents.layout.samples % contents.layout.block_samples > 0
        return cls(tuple(nodes), tuple(labels), written, sites, contents.layout.blocks, short, block)


def model_host(disk: Disk, steps: Steps, rank: int, count: int) -> Request:
    """One host from its start to its end: plan, nodes, documents, its share of the missing blocks, seal."""
    whole, unsealed, shuffle = disk.rules.whole, disk.rules.unsealed, disk.generator.shuffle
    yield from disk.keys(MARKER_FOLDER)
    yield from disk.create(PLAN_KEY, whole[PLAN_KEY])
    if (yield from disk.read(SEAL_KEY)) is not None and (yield from disk.read("zarr.json")) == whole["zarr.json"]:
        return
    documents = ["documents/zarr.json"] if steps.documents else []
    for key in (*steps.nodes, *documents, "zarr.json"):
        yield from disk.create(key, unsealed[key])
    labels = {}
    for key in steps.labels:
        labels[key] = yield from disk.read(key)
    for key, there in labels.items():
        if there != whole[key]:
            yield from disk.put(key, whole[key])
    if steps.documents and (yield from disk.read(TABLE_KEY)) is None:
        for key in steps.documents:
            yield from disk.put(key, whole[key])
        yield from disk.put(TABLE_KEY, whole[TABLE_KEY])
    missing = yield from _missing(disk, steps)
    for number in missing[rank::count]:
        if steps.short and number == steps.blocks - 1:
            yield from disk.read(".act/generations/2/plan.json")
        for group in steps.block(number):
            keys = list(group)
            shuffle(keys)
            for key in keys:
                yield from disk.put(key, whole[key])
    if (yield from _missing(disk, steps)):
        return
    if steps.documents and (yield from disk.read(TABLE_KEY)) is None:
        return
    for number in range(steps.blocks):
        yield from disk.read(marker_key(number))
    for site in steps.sites:
        yield from disk.keys(f"{site}/c/")
    for key in (MANIFEST_KEY, RANGES_KEY):
        yield from disk.put(key, whole[key])
    yield from disk.read("zarr.json")
    for key in (*steps.nodes, "zarr.json", SEAL_KEY):
        yield from disk.put(key, whole[key])


def _missing(disk: Disk, steps: Steps) -> Request:
    found = yield from disk.keys(MARKER_FOLDER)
    return [number for number in range(steps.blocks) if marker_key(number) not in found]


def run_model(disk: Disk, steps: Steps, *, crash_rate: float) -> tuple[int, int]:
    """Hosts start and die until the store is sealed; how many steps and crashes that took.

    Raises:
        Violation: a rule was broken, or the run never ends.
    """
    chance, count_steps, crashes = disk.generator.random, 0, 0
    for _ in range(ROUNDS):
        count = 1 + int(chance() * 4)
        hosts = [model_host(disk, steps, rank, count) for rank in range(count)]
        while hosts:
            host = hosts[int(chance() * len(hosts))]
            count_steps += 1
            disk.step()
            try:
                if chance() < crash_rate:
                    raise Crash
                next(host)
            except (StopIteration, ValueError):
                hosts.remove(host)
            except Crash:
                crashes += 1
                hosts.remove(host)
        if SEAL_KEY in disk.objects:
            break
        crash_rate, disk.fault_rate = crash_rate * 0.9, disk.fault_rate * 0.9
    finish(disk)
    return count_steps, crashes


def finish(disk: Disk) -> None:
    """The end of a schedule: everything late arrives, and the store must be that of an undisturbed run."""
    while disk.late:
        disk.arrive(*disk.late.pop(int(disk.generator.random() * len(disk.late))))
    if SEAL_KEY not in disk.objects:
        raise Violation(f"not sealed after {ROUNDS} rounds")
    if disk.rules.exact and stale_nodes(disk) and not disk.rules.stale_nodes:
        raise Violation("the finished store differs from that of an undisturbed run")


def stale_nodes(disk: Disk) -> list[str]:
    """Objects of a finished store that are not those of an undisturbed run."""
    return [key for key, data in disk.objects.items() if disk.rules.whole.get(key) != data]


# Real hosts


class FakeTensorStore:
    """What `actstore.kvstore` needs of the module `tensorstore`, over a `Disk`.

    `wait` does a request: it lets other hosts run wherever the request yields.
    """

    Context = staticmethod(lambda settings: None)

    def __init__(self, disk: Disk, folder: Path, wait: Callable[[Request], Any]) -> None:
        self._disk, self._folder, self._wait = disk, folder, wait
        self.KvStore = SimpleNamespace(open=self._open_store, KeyRange=lambda first, last: first)

    def open(self, spec: Any, **_: Any) -> Any:
        name = os.path.relpath(spec["kvstore"]["path"], self._folder)
        keeps_fill_values = spec["store_data_equal_to_fill_value"]
        return _answer(lambda: FakeArray(self._disk, name, spec["metadata"], keeps_fill_values, self._wait))

    def write_durably(self, path: Path, pieces: list[memoryview]) -> None:
        self._wait(self._disk.put(os.path.relpath(path, self._folder), b"".join(pieces)))

    def _open_store(self, spec: Any, **_: Any) -> Any:
        disk, wait = self._disk, self._wait
        return _answer(
            lambda: SimpleNamespace(
                read=lambda key: _answer(lambda: _read_result(wait(disk.read(key)))),
                write=lambda key, value, if_equal=None: _answer(
                    lambda: (wait(disk.put(key, value, if_absent=if_equal is not None)), WRITTEN)[1]
                ),
                list=lambda prefix: _answer(lambda: [key.encode() for key in wait(disk.keys(prefix))]),
            )
        )


WRITTEN = SimpleNamespace(generation="written")


def _answer(work: Callable[[], Any]) -> Any:
    """A future that does its work when it is asked for its result."""
    return SimpleNamespace(result=lambda timeout=None: work())


def _read_result(value: bytes | None) -> Any:
    state = "missing" if value is None else "value"
    return SimpleNamespace(state=state, value=value, stamp=SimpleNamespace(generation=state))


class FakeArray:
    """An array whose chunks are objects, such as values and their CRC-32C. Written whole, or it is a violation."""

    def __init__(
        self, disk: Disk, name: str, metadata: Any, keeps_fill_values: bool, wait: Callable[[Request], Any]
    ) -> None:
        self._disk, self._name, self._keeps_fill_values, self._wait = disk, name, keeps_fill_values, wait
        self._metadata = metadata
        self._chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        self._key = f"{name}/c/{'/'.join('0' * len(self._chunk))}"
        self.rank = len(self._chunk)
        self.fill_value = float("nan") if metadata["fill_value"] == "NaN" else metadata["fill_value"]

    def __getitem__(self, index: Any) -> "FakeArray":
        axes = index if isinstance(index, tuple) else (index,)
        spans = [axis if isinstance(axis, slice) else slice(axis, axis + 1) for axis in axes]
        for span, size in zip(spans, self._chunk, strict=False):
            if span.start % size or span.stop - span.start != size:
                raise Violation(f"{self._name} is written in parts: {span} of chunks of {size}")
        places = [span.start // size for span, size in zip(spans, self._chunk, strict=False)]
        view = object.__new__(FakeArray)
        view.__dict__ = {**vars(self), "_key": f"{self._name}/c/{'/'.join(map(str, places))}"}
        return view

    def write(self, values: np.ndarray, **_: Any) -> Any:
        """Begins to write one chunk, now or when the result is asked for; without asking, perhaps never."""
        if not values.size or (not self._keeps_fill_values and (values == self.fill_value).all()):
            return _answer(lambda: None)
        request = self._disk.put(self._key, _encoded(self._metadata, values))
        if self._disk.generator.random() < 0.5:
            return _answer(lambda: self._wait(request))
        self._wait(request)
        return _answer(lambda: None)


def _encoded(metadata: Any, values: np.ndarray) -> bytes:
    """The object of one chunk."""
    if metadata["codecs"][0]["name"] == "sharding_indexed":
        return _packed(json.dumps(metadata), values.dtype.name, values.tobytes())
    data = values.tobytes()
    return data + google_crc32c.value(data).to_bytes(4, "little")


@cache
def _packed(metadata: str, dtype: str, values: bytes) -> bytes:
    """An object of documents, by the real TensorStore, which compresses it."""
    described = json.loads(metadata)
    described["shape"] = described["chunk_grid"]["configuration"]["chunk_shape"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": described,
            "store_data_equal_to_fill_value": True}  # fmt: skip
    array = tensorstore.open(spec, create=True).result()
    array.write(np.frombuffer(values, dtype)).result()
    return bytes(array.kvstore.read("c/0").result().value)


class Executor:
    """`ThreadPoolExecutor` without threads: tasks run in random order when a result is asked for, or at the end."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._waiting: list[Task] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Task":
        task = Task(self, lambda: function(*arguments))
        self._waiting.append(task)
        return task

    def run_until(self, wanted: "Task | None") -> None:
        while self._waiting and not (wanted and wanted.done()):
            self._waiting.pop(int(self._generator.random() * len(self._waiting))).run()

    def shutdown(self, *, wait: bool) -> None:
        assert wait
        self.run_until(None)


class Task:
    """The future of one call."""

    def __init__(self, executor: Executor, work: Callable[[], Any]) -> None:
        self._executor, self._work = executor, work
        self._done = False
        self._error: Exception | None = None
        self._value: Any = None
        self._callbacks: list[Callable[[Any], None]] = []

    def run(self) -> None:
        try:
            self._value = self._work()
        except Exception as error:  # noqa: BLE001  as futures do
            self._error = error
        self._done = True
        for callback in self._callbacks:
            callback(self)

    def done(self) -> bool:
        return self._done

    def exception(self) -> Exception | None:
        self._executor.run_until(self)
        return self._error

    def result(self) -> Any:
        if error := self.exception():
            raise error
        return self._value

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)


class Hosts:
    """Threads of which one runs at a time. Which one is decided at every request; there it may also die."""

    def __init__(self, disk: Disk, crash_rate: float) -> None:
        self._disk, self._crash_rate = disk, crash_rate
        self._gates: dict[threading.Thread, threading.Lock] = {}
        self._dead: set[threading.Thread] = set()
        self._all_done = threading.Event()
        self._failure: BaseException | None = None
        self.steps = self.crashes = 0

    def run(self, programs: list[Callable[[], None]]) -> None:
        """Runs every program to its end or its death; raises what no program expected."""
        for program in programs:
            gate = threading.Lock()
            gate.acquire()
            self._gates[threading.Thread(target=self._live, args=(program, gate))] = gate
        threads = list(self._gates)
        for thread in threads:
            thread.start()
        self._next().release()
        self._all_done.wait()
        for thread in threads:
            thread.join()
        if self._failure:
            raise self._failure

    def wait(self, request: Request) -> Any:
        """Does a request of the running host; others run in between."""
        me = threading.current_thread()
        while me not in self._dead and not self._failure:
            try:
                next(request)
                self._pause(me)
            except StopIteration as end:
                return end.value
            except Violation as violation:
                self._failure = violation
            except Crash:
                self._dead.add(me)
                self.crashes += 1
        raise Crash

    def _pause(self, me: threading.Thread) -> None:
        self.steps += 1
        self._disk.step()
        if self._disk.generator.random() < self._crash_rate:
            raise Crash
        gate = self._next()
        if gate is not self._gates[me]:
            gate.release()
            self._gates[me].acquire()

    def _next(self) -> threading.Lock:
        gates = list(self._gates.values())
        return gates[int(self._disk.generator.random() * len(gates))]

    def _live(self, program: Callable[[], None], gate: threading.Lock) -> None:
        gate.acquire()
        try:
            program()
        except Crash:
            pass
        except BaseException as error:  # noqa: BLE001  raised in the main thread
            self._failure = self._failure or error
        finally:
            del self._gates[threading.current_thread()]
            if self._gates:
                self._next().release()
            else:
                self._all_done.set()


def real_host(url: Path, contents: Contents, rank: int, count: int) -> None:
    """One host from its start to its end, as a program that uses actstore would do it."""
    with suppress(SealedStoreError, UnfinishedStoreError, StorageError), contents.create(url, seal=True) as writer:
        for block in writer.missing()[rank::count]:
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns).result()


@contextmanager
def simulated(disk: Disk, url: Path, wait: Callable[[Request], Any]) -> Iterator[None]:
    """actstore writes to `disk` instead of files."""
    fake = FakeTensorStore(disk, url, wait)
    with ExitStack() as stack:
        for place, name, value in [
            *((module, "ts", fake) for module in (kvstore.local, kvstore.place, kvstore.root)),
            (kvstore.local, "write_durably", fake.write_durably),
            (Root, "check_writable", lambda root: None),
            (Root, "check_space", lambda root, need_bytes: None),
            (writer, "ThreadPoolExecutor", lambda *_, **__: Executor(disk.generator)),
        ]:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(unchecked())
        yield


def run_real(disk: Disk, url: Path, attempts: Sequence[Contents], *, crash_rate: float) -> tuple[int, int]:
    """As `run_model`, with the code of actstore. Each round's hosts write the contents of one of `attempts`."""
    generator, steps, crashes = disk.generator, 0, 0
    for _ in range(ROUNDS):
        count = generator.randint(1, 4)
        contents = generator.choice(attempts)
        hosts = Hosts(disk, crash_rate)
        with simulated(disk, url, hosts.wait):
            hosts.run([partial(real_host, url, contents, rank, count) for rank in range(count)])
        steps, crashes = steps + hosts.steps, crashes + hosts.crashes
        if SEAL_KEY in disk.objects:
            break
        crash_rate, disk.fault_rate = crash_rate * 0.9, disk.fault_rate * 0.9
    finish(disk)
    return steps, crashes


def mutated(place: Any, name: str, *changes: tuple[str, str]) -> Any:
    """A patch that changes the source text of a function or method of actstore."""
    function = inspect.unwrap(getattr(place, name))
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is not in {name} once: the mutant has to follow the code"
        source = source.replace(old, new)
    found: dict[str, Any] = {}
    exec(compile(source, f"<mutant of {name}>", "exec"), function.__globals__, found)
    return mock.patch.object(place, name, found[name])
