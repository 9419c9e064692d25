"""Processes that were forked from one that had used TensorStore: they are refused, because they would wait for ever."""

import os

from actstore.errors import InputError


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
