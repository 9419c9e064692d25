"""Which worker of how many this process is, by what its launcher says."""

import dataclasses
from collections.abc import Mapping

from actstore.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rank:
    """The place of a process among the workers of a run."""

    rank: int = 0
    workers: int = 1
    source: str = "alone"
    """What said so, for a person."""


def resolve(process_id: int | None, num_processes: int | None, environ: Mapping[str, str]) -> Rank:
    """The rank that options give.

    Raises:
        InputError: one of the two alone, or numbers that do not fit.
    """
    del environ
    if (process_id is None) != (num_processes is None):
        raise InputError("give --process-id and --num-processes together")
    if process_id is None or num_processes is None:
        return Rank()
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process-id is {process_id} of {num_processes}")
    return Rank(process_id, num_processes, "options")
