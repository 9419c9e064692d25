"""What launchers say of a process: Cloud TPU, GKE, SLURM, Open MPI and Kubernetes, as JAX's own detection reads them.

A launcher that is not there gives None. What it says is read from variables of the environment; only a Cloud TPU VM is
asked through its metadata server.
"""

import dataclasses
import re
from collections.abc import Mapping

from actstore.errors import InputError
from extract.tpu_vm import TpuVm

TPU_PORT = 8482  # JAX's own choices, so that both find each other
PORTS, FIRST_PORT = 1 << 12, 65535 - (1 << 12) + 1


@dataclasses.dataclass(frozen=True)
class Launched:
    """What a launcher says of this process.

    Attributes:
        launcher: As `--launcher` names it.
        title: Its name for a person.
        process: Number of this process, from 0.
        processes: How many there are; None where the launcher does not say.
        coordinator: `host:port` where process 0 can be reached; None where the launcher does not say.
    """

    launcher: str
    title: str
    process: int
    processes: int | None
    coordinator: str | None = None

    def __str__(self) -> str:
        """As in `SLURM says process 3 of 8`."""
        return f"{self.title} says process {self.process}" + (f" of {self.processes}" if self.processes else "")


def openmpi(machine: TpuVm) -> Launched | None:
    """What `mpirun` says."""
    environ = machine.environ
    if "OMPI_COMM_WORLD_RANK" not in environ or "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    rank, size = _number(environ, "OMPI_COMM_WORLD_RANK"), _number(environ, "OMPI_COMM_WORLD_SIZE")
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if found is None:  # Open MPI 5 does not say
        return _checked(Launched("openmpi", "Open MPI", rank, size))
    job = re.match(r"[0-9]+", environ["OMPI_MCA_orte_hnp_uri"])
    port = FIRST_PORT + (int(job[0]) // PORTS) % PORTS if job else FIRST_PORT
    return _checked(Launched("openmpi", "Open MPI", rank, size, _address(found[1] or found[2], port, environ)))


def slurm(machine: TpuVm) -> Launched | None:
    """What `srun` says. A script that `sbatch` started without it is one process, whatever the job has."""
    environ = machine.environ
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environ):
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    port = FIRST_PORT + _number(environ, "SLURM_JOB_ID") % PORTS
    host = re.match(r"([^,\[]*)(?:\[([^,\-\]]*))?", environ["SLURM_STEP_NODELIST"])  # node[001-015],other
    first = (host[1] + (host[2] or "")) if host else ""
    process, processes = _number(environ, "SLURM_PROCID"), _number(environ, count)
    return _checked(Launched("slurm", "SLURM", process, processes, _address(first, port, environ)))


def tpu(machine: TpuVm) -> Launched | None:
    """What GKE puts into the environment, or else the metadata server of a Cloud TPU VM says; of all slices."""
    environ = machine.environ
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if names is not None and "TPU_WORKER_ID" in environ:
        hosts, worker, slices = names.split(","), _number(environ, "TPU_WORKER_ID"), environ
        title = "GKE"
    else:
        number = machine.attribute("agent-worker-number") if machine.has_metadata else None
        if number is None:
            return None
        endpoints = machine.attribute("worker-network-endpoints") or ""
        hosts = [each.split(":")[-1] for each in endpoints.split(",")]  # a host, or name:id:address
        worker = _number({"agent-worker-number": number}, "agent-worker-number")
        slices, title = {**machine.tpu_env(), **environ}, "Cloud TPU"
    count = _number(slices, "MEGASCALE_NUM_SLICES") if slices.get("MEGASCALE_NUM_SLICES") else 1
    own = _number(slices, "MEGASCALE_SLICE_ID") if slices.get("MEGASCALE_SLICE_ID") else 0
    if worker >= len(hosts):
        raise InputError(f"{title} says worker {worker} of {len(hosts)}{_REMEDY}")
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    process, processes = worker + own * len(hosts), count * len(hosts)
    return _checked(Launched("tpu", title, process, processes, _address(first, TPU_PORT, environ)))


def kubernetes(machine: TpuVm) -> Launched | None:
    """What an Indexed Job says: which of its pods this is. Not how many there are."""
    if "JOB_COMPLETION_INDEX" not in machine.environ:
        return None
    return Launched("kubernetes", "Kubernetes", _number(machine.environ, "JOB_COMPLETION_INDEX"), None)


LAUNCHERS = {"openmpi": openmpi, "slurm": slurm, "tpu": tpu, "kubernetes": kubernetes}
"""By their names for `--launcher`, those that start processes inside others' first."""
_INSIDE = {("openmpi", "slurm"), ("openmpi", "kubernetes"), ("slurm", "kubernetes"), ("tpu", "kubernetes")}
_REMEDY = "; give --num-processes and --process-id, and --launcher none so that no launcher is asked"


def detect(machine: TpuVm) -> Launched | None:
    """What the launcher of this process says; None where nobody started it as one of several.

    `mpirun` inside a job of SLURM speaks for its processes, and GKE for the pods of a Job. Where each pod is a slice of
    one host, GKE says process 0 of 1 to all of them, and the index in the Job tells them apart.

    Raises:
        InputError: two launchers contradict each other, or one says what cannot be.
    """
    found = [said for launcher in LAUNCHERS.values() if (said := launcher(machine)) is not None]
    for other in found[1:]:
        first, same = found[0], (found[0].process, found[0].processes) == (other.process, other.processes)
        if not same and (first.launcher, other.launcher) not in _INSIDE:
            raise InputError(
                f"{first}, {other}: they contradict each other; choose one with --launcher {first.launcher} or "
                f"{other.launcher}, or give --launcher none"
            )
    if [(said.launcher, said.processes) for said in found] == [("tpu", 1), ("kubernetes", None)]:
        return found[1]
    return found[0] if found else None


def named(name: str, machine: TpuVm) -> Launched:
    """What one launcher says.

    Raises:
        InputError: it is unknown, is not there, or says what cannot be.
    """
    if name not in LAUNCHERS:
        raise InputError(f"--launcher is {name!r}; expected auto, none, {', '.join(LAUNCHERS)}")
    if (said := LAUNCHERS[name](machine)) is None:
        raise InputError(
            f"--launcher is {name}, and it left no sign of itself in the environment; start the command through it, or "
            "give --num-processes and --process-id"
        )
    return said


def _checked(said: Launched) -> Launched:
    if said.processes is not None and said.process >= said.processes:
        raise InputError(f"{said}{_REMEDY}")
    return said


def _number(values: Mapping[str, str], name: str) -> int:
    text = values.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise InputError(f"{name} is {text!r}; expected a whole number{_REMEDY}")
    return int(text)


def _address(host: str, port: int, environ: Mapping[str, str]) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{environ.get('JAX_COORDINATOR_PORT', port)}"
