"""Which worker of how many this process is: what options say, what its launcher says, or one alone."""

import dataclasses

from actstore.errors import InputError
from extract.launchers import detect, named
from extract.tpu_vm import TpuVm


@dataclasses.dataclass(frozen=True)
class Rank:
    """The place of a process among the workers of a run.

    Attributes:
        rank: Number of the worker, from 0.
        workers: How many there are.
        source: What said so, for a person.
        coordinator: `host:port` of process 0 where the launcher says it.
    """

    rank: int = 0
    workers: int = 1
    source: str = "alone"
    coordinator: str | None = None

    def __str__(self) -> str:
        """As in `worker 3 of 8 (SLURM)`."""
        return f"worker {self.rank} of {self.workers} ({self.source})"


def resolve(process_id: int | None, num_processes: int | None, machine: TpuVm, *, launcher: str = "auto") -> Rank:
    """The rank of this process.

    Args:
        process_id: as the option says; None leaves it to the launcher.
        num_processes: likewise.
        machine: what to ask, with its environment.
        launcher: `auto` asks all, `none` asks nobody, else the one that has to be there.

    Raises:
        InputError: one option alone where no launcher has the other, numbers that do not fit, or options and launcher
            that contradict each other.
    """
    refuse_pathways(machine)
    said = None if launcher == "none" else detect(machine) if launcher == "auto" else named(launcher, machine)
    if said is not None and said.processes == 1 and num_processes is not None:
        said = None  # one task of its launcher, which may well be one worker of several
    rank = process_id if process_id is not None or said is None else said.process
    workers = num_processes if num_processes is not None or said is None else said.processes
    if said is not None and (rank, workers) != (said.process, said.processes or workers):
        raise InputError(
            f"the options say process {rank} of {workers}, {said}; leave the options out, or give --launcher none so "
            "that only they count"
        )
    if rank is None and workers is None:
        return Rank()
    if rank is None or workers is None:
        lacks = "--process-id" if rank is None else "--num-processes"
        found = f"{said}; " if said is not None else ""
        alone = " (or --launcher none to compute alone)" if said is not None else ""
        raise InputError(f"{found}give --process-id and --num-processes together: {lacks} is missing{alone}")
    if workers < 1:
        raise InputError(f"--num-processes is {workers}; expected at least 1")
    if not 0 <= rank < workers:
        raise InputError(f"--process-id is {rank} of {workers}; expected 0 to {workers - 1}")
    return Rank(rank, workers, said.title if said else "options", said.coordinator if said else None)


def refuse_pathways(machine: TpuVm) -> None:
    """Refuses a process that drives the devices of many hosts: all rows would come through this one.

    Raises:
        InputError: it is one of Pathways.
    """
    environ = machine.environ
    platforms = environ.get("JAX_PLATFORMS", "")
    named_so = {"proxy", "pathways"} & {part.strip().lower() for part in platforms.split(",")}
    other = [name for name, value in environ.items() if name.startswith("PATHWAYS_") and value]
    if named_so or other:
        shown = f"JAX_PLATFORMS is {platforms!r}" if named_so else f"{sorted(other)[0]} is set"
        raise InputError(
            f"{shown}: with Pathways one process drives the devices of all hosts, and every row would pass through it; "
            "start the same command on every host of the slice instead, without Pathways (and without that variable)"
        )
