"""Which blocks a worker computes, in which order. Pure: the blocks, its rank and the number of workers decide."""

from collections.abc import Sequence

import numpy as np


def share(blocks: Sequence[int], rank: int, workers: int) -> Sequence[int]:
    """The blocks that a worker computes first: neighbours, so that forward passes that hold two blocks are few.

    Args:
        blocks: of the whole plan, ascending, whether committed or not: all workers see the same.
        rank: of the worker, from 0.
        workers: how many there are.
    """
    count = len(blocks)
    return blocks[count * rank // workers : count * (rank + 1) // workers]


def rest(free: Sequence[int], rank: int, turn: int) -> list[int]:
    """The blocks that a worker that has run out tries next, in this order.

    It begins at a place of its own and goes backwards: the worker whose share they are goes forwards, and others that
    have run out begin elsewhere.

    Args:
        free: blocks that are neither committed nor taken, ascending.
        rank: of the worker.
        turn: how often it has run out before.
    """
    if not free:
        return []
    place = int(np.random.default_rng((rank, turn)).integers(len(free)))
    return [*free[place::-1], *free[:place:-1]]
