"""The only place that asks JAX for devices, for processes, or for what these agree on."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from actstore.errors import InputError, StoppedError, WorkerLostError
from actstore.logs import say_last
from actstore.untrusted import printable

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, NamedSharding

AXES = ("data", "model")
HEARTBEAT_SECONDS = 10  # JAX's default is 100: as long would a group wait for one that was killed
JOIN_SECONDS = 300
LOOK_SECONDS = 0.2  # between two looks for signals
LEAVE_SECONDS = 10.0  # JAX waits 300 until all others end too: launchers kill after 30
_LOST = (
    "another of the processes that compute this model ended or cannot be reached; committed blocks stay: run the same "
    "command again on all of them"
)
_HANDLERS: list[Any] = []  # C calls them: they must live as long as the process


@dataclasses.dataclass(frozen=True)
class Devices:
    """What this process computes on."""

    platform: str
    count: int
    kind: str
    capability: float | None = None
    """Compute capability of an NVIDIA GPU, such as 9.0."""

    @property
    def compute_dtype(self) -> str:
        """The dtype to compute in: float32 on CPUs, whose bfloat16 is emulated and slower, bfloat16 elsewhere."""
        return "float32" if self.platform == "cpu" else "bfloat16"


def local_devices() -> Devices:
    """The devices of this process. Starts JAX's backend."""
    import jax

    devices = jax.local_devices()
    capability = str(getattr(devices[0], "compute_capability", ""))  # such as 9.0; another maker's is such as gfx90a
    known = float(capability) if re.fullmatch(r"[0-9]+\.[0-9]", capability) else None
    return Devices(devices[0].platform, len(devices), devices[0].device_kind, known)


def join(coordinator: str, *, processes: int, process: int) -> None:
    """Makes this process one of several that may compute together. Before anything else of JAX.

    Waits until all are there, for 5 minutes at most.

    Args:
        coordinator: `host:port` of the first process, which listens there; the same on every host.
        processes: how many there are.
        process: number of this one, from 0.

    Raises:
        InputError: the coordinator cannot be reached, or the others did not come.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", val=False)  # type: ignore[no-untyped-call]  # it takes SIGTERM
    _end_with_75_when_others_are_lost()
    initialize = functools.partial(
        jax.distributed.initialize, coordinator, num_processes=processes, process_id=process,
        cluster_detection_method="deactivate", initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )  # fmt: skip
    try:
        _in_a_thread(initialize)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {process} of {processes} could not join the others through {coordinator}: "
            f"{str(error).splitlines()[0][:200]}; start the same command on every host, each with its own --process-id "
            "and with the address of process 0 as --coordinator"
        ) from None


def _in_a_thread(work: Callable[[], None]) -> None:
    """Does what waits outside Python for long: in the main thread no signal would be handled meanwhile."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised below
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
    for failure in failures:
        raise failure


def _end_with_75_when_others_are_lost() -> None:
    """Gives this process a message and an exit code when JAX ends it.

    JAX's service calls `abort` in a thread of its own when another process is gone: no exception reaches Python, and
    Python's own handlers of signals would not run before the end.
    """

    def end(_: int) -> None:
        say_last(_LOST)
        os._exit(WorkerLostError.exit_code)

    _HANDLERS.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _HANDLERS[-1])


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends a process that joined others when it is stopped inside: soon, though the others may go on for hours.

    Where all are stopped together they take leave of each other, so that none is lost while another still writes.
    Those that go on are ended by JAX when this one is gone, with 75 too: all continue when they are started again.
    """
    import jax

    try:
        yield
    except StoppedError as error:
        if not jax.distributed.is_initialized():
            raise
        say_last(" ".join(str(error).split()))
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(LEAVE_SECONDS)
        os._exit(error.exit_code)


def make_mesh(data: int, model: int) -> "Mesh | None":
    """A mesh of devices with the axes `data` and `model`; None for one device of this process. Starts JAX's backend.

    The devices are those of this process where they are enough, else those of a group of processes with neighbouring
    numbers, which must all make this mesh. JAX orders the devices by how they are wired, so that those of the axis
    `model` are neighbours. Where a mesh takes fewer than there are, the others stay idle.

    Args:
        data: parts that the contexts of a batch are dealt out to.
        model: parts that heads, MLPs and vocabulary are cut into.

    Raises:
        InputError: a size is not positive, or there are not as many devices.
    """
    import jax

    there, devices = local_devices(), jax.local_devices()
    if data < 1 or model < 1:
        raise InputError(
            f"mesh {data},{model} needs at least one device; this process has {there.count} ({there.kind}); give "
            f"positive sizes data,model whose product is at most {there.count}"
        )
    if data * model > there.count:
        devices = _devices_of_group(data, model, there)
    if data * model == 1:
        return None
    return jax.make_mesh(
        (data, model), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices[: data * model]
    )


def _devices_of_group(data: int, model: int, there: Devices) -> "list[jax.Device]":
    """The devices of the group of processes that this one is in.

    Raises:
        InputError: there are not as many, or the mesh is not that of whole processes.
    """
    import jax

    processes, members = jax.process_count(), data * model // there.count
    needs = f"mesh {data},{model} needs {data} x {model} devices; this process has {there.count} ({there.kind})"
    if processes == 1:
        raise InputError(
            f"{needs}; give positive sizes data,model whose product is at most {there.count}, or, for a model that "
            "spans hosts, start the same command on each with --coordinator"
        )
    if members * there.count != data * model or processes % members:
        raise InputError(
            f"{needs}, and there are {processes} processes; expected a product of at most {there.count}, or that of a "
            f"number of processes that divides {processes}"
        )
    first = jax.process_index() // members * members
    found = [device for device in jax.devices() if first <= device.process_index < first + members]
    return sorted(found, key=lambda device: (device.process_index, device.id))


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes that compute one model together: all run the same passes, in the same order.

    Attributes:
        mesh: The devices; None or those of one process where that computes alone.
        number: Of the group, from 0.
        groups: How many there are.
        member: Of this process in its group, from 0. Member 0 decides for all.
        members: How many processes it has.
    """

    mesh: "Mesh | None" = None
    number: int = 0
    groups: int = 1
    member: int = 0
    members: int = 1

    @classmethod
    def of(cls, mesh: "Mesh | None") -> "Group":
        """The group that a mesh spans."""
        import jax

        if mesh is None or len({device.process_index for device in mesh.devices.flat}) == 1:
            return cls(mesh, jax.process_index(), jax.process_count())
        processes = sorted({device.process_index for device in mesh.devices.flat})
        members = len(processes)
        return cls(
            mesh, processes[0] // members, jax.process_count() // members,
            processes.index(jax.process_index()), members,
        )  # fmt: skip

    def place(self, values: Shaped[np.ndarray, "..."], *, dealt: bool) -> "jax.Array":
        """An input of the forward pass on the devices: its first axis dealt out along `data`, or whole on each."""
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        if self.members == 1 or self.mesh is None:
            return jnp.asarray(values)
        sharding = NamedSharding(self.mesh, PartitionSpec(*(("data",) if dealt else ())))  # type: ignore[no-untyped-call]
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    def total(self, mine: int) -> Callable[[], int]:
        """Begins to add up one number of each member; calling what is returned waits for the sum, the same for all.

        It lines up behind the passes that were begun before, and ahead of those that are begun after.
        """
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        if self.members == 1 or self.mesh is None:
            return lambda: mine
        here = jax.process_index()
        first = min(device.id for device in self.mesh.devices.flat if device.process_index == here)
        rows, columns = self.mesh.devices.shape
        mine_at = {
            (row, column): np.full((1, 1), mine if self.mesh.devices[row, column].id == first else 0, np.int32)
            for row in range(rows)
            for column in range(columns)
        }

        def part(place: tuple[slice, ...] | None) -> Shaped[np.ndarray, "1 1"]:
            (row, column) = place or (slice(0), slice(0))
            return mine_at[row.start or 0, column.start or 0]

        each = NamedSharding(self.mesh, PartitionSpec(*AXES))  # type: ignore[no-untyped-call]
        whole = NamedSharding(self.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        added = _adder(whole)(jax.make_array_from_callback((rows, columns), each, part))
        return lambda: int(np.asarray(added))


@functools.cache
def _adder(whole: "NamedSharding") -> "Callable[[jax.Array], jax.Array]":
    """Adds up an array of all devices, compiled once."""
    import jax

    return jax.jit(lambda numbers: numbers.sum(), out_shardings=whole)


def toward_host(rows: "jax.Array") -> "jax.Array":
    """Begins to copy an array that every device of this process has, whole, to the host; does not wait.

    `np.asarray` of what is returned waits for the copy. From a GPU it goes into pinned memory: 48 GB/s on an H100,
    where `np.asarray` of the array itself gave 1.4.
    """
    import jax

    (here, *_) = rows.addressable_shards
    if here.device.platform != "gpu":
        rows.copy_to_host_async()
        return rows
    return jax.device_put(here.data, jax.sharding.SingleDeviceSharding(here.device, memory_kind="pinned_host"))


@contextlib.contextmanager
def device_errors(group: Group) -> Iterator[None]:
    """Turns what JAX raises into one line: a device without memory, another member of the group that is gone.

    Raises:
        InputError: what was asked for does not fit.
        WorkerLostError: another process of the group ended.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            first = printable(str(error).splitlines()[0], most=120)
            raise InputError(
                f"a device ran out of memory ({first}); run again with a smaller --batch or --context, or a --mesh of "
                "more devices, into another target: these are part of a run"
            ) from error
        if group.members == 1:
            raise
        raise WorkerLostError(_LOST) from error


def default_mesh(batch: int) -> tuple[int, int]:
    """The mesh of a run that names none: as many devices on `data` as divide the batch, `(1, 1)` on one device."""
    count = local_devices().count
    return max(data for data in range(1, count + 1) if max(batch, 1) % data == 0), 1
