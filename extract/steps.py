"""The forward passes of a run, one after the other: which, on what, and what comes back."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, Shaped

from actstore.errors import StoppedError
from extract.mesh import Group, toward_host
from extract.packing import Contexts
from extract.plan import ExtractPlan
from extract.stages import Stages

if TYPE_CHECKING:
    import jax

Rows = dict[str, Shaped[np.ndarray, "layer row width"]]

_OTHER_STOPPED = (
    "another process that computes the same model was stopped; committed blocks stay: run the same command again on all"
)
_END, _NOTHING_NOW, _BLOCKS = 0, 1, 2  # what member 0 says: a block's number comes on top of the last


@dataclasses.dataclass(frozen=True)
class Step:
    """What one forward pass has of one block."""

    block: int
    first: int
    """Number of the pass' first sample."""
    contexts: Contexts
    rows: Rows | None
    """None where another member of the group writes the block."""


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A pass that the device computes."""

    number: int
    first: int
    contexts: Contexts
    arrays: "dict[str, jax.Array]"
    stops: Callable[[], int]


def forward_steps(
    plan: ExtractPlan,
    blocks: Iterable[int | None],
    *,
    group: Group | None = None,
    keeps: Callable[[int], bool] = lambda _: True,
    stopping: Callable[[], str | None] = lambda: None,
    stages: Stages | None = None,
) -> Generator[Step | None, None, None]:
    """Yields what every pass has of each of the blocks; a pass that two neighbours need is computed once.

    A pass is over a fixed set of contexts, so that a row has the same bits whichever block asks for it. Each is begun
    before the rows of the one before are awaited, so that the device does not wait for the host.

    Args:
        plan: what to compute.
        blocks: in the order wanted; asked for one when the passes of the block before have been begun. None means that
            there is nothing now: what was begun is yielded, then None.
        group: the processes that compute together: all must give the same blocks.
        keeps: whether the rows of a block are wanted here.
        stopping: says why to stop; asked before each pass.
        stages: counts the time.

    Raises:
        StoppedError: `stopping` said so here, or in another process of the group.
    """
    import jax

    from extract.forward import make_forward

    group, stages = group or Group.of(plan.model.mesh), stages or Stages()
    edges = plan.step_edges()
    dtype = plan.store.layout.sites[0].dtype
    forward = make_forward(plan.model, plan.taps, dtype="float32" if dtype == "float16" else dtype)
    places = int(np.diff(edges).max())
    reason = ""

    def begin(number: int, *, kept_here: bool) -> _Begun:
        nonlocal reason
        reason = reason or stopping() or ""
        stops = group.total(int(bool(reason)))
        with stages.on("host"):
            contexts = plan.contexts(number)
            kept = np.zeros(places, np.int32)
            kept[: len(contexts.documents)] = np.flatnonzero(contexts.kept)
            inputs = (contexts.token_ids, contexts.segment_ids, contexts.positions)
            tokens, segments, positions = (group.place(values, dealt=True) for values in inputs)
        with stages.on("device"):  # on a CPU with several devices this call computes; the first one compiles
            arrays = forward(plan.model.params, tokens, segments, positions, group.place(kept, dealt=False))
            if kept_here:
                arrays = {site: toward_host(rows) for site, rows in arrays.items()}
        return _Begun(number, int(edges[number]), contexts, arrays, stops)

    def end(block: int, step: _Begun) -> Step:
        with stages.on("device"):
            if step.stops():
                raise StoppedError(reason or _OTHER_STOPPED)
            if not keeps(block):
                jax.block_until_ready(step.arrays)  # type: ignore[no-untyped-call]
                return Step(block, step.first, step.contexts, None)
            count = len(step.contexts.documents)
            rows = {site: np.asarray(rows)[:, :count] for site, rows in step.arrays.items()}
        return Step(block, step.first, step.contexts, rows)

    ahead: deque[tuple[int, _Begun]] = deque()
    latest: _Begun | None = None
    try:
        for block in blocks:
            if block is None:
                while ahead:
                    yield end(*ahead.popleft())
                yield None
                reason = stopping() or ""
                if group.total(int(bool(reason)))():
                    raise StoppedError(reason or _OTHER_STOPPED)
                continue
            for number in _steps_of(plan, block, edges):
                if latest is None or latest.number != number:
                    latest = begin(number, kept_here=keeps(block))
                ahead.append((block, latest))
                if len(ahead) > 1:
                    yield end(*ahead.popleft())
        while ahead:
            yield end(*ahead.popleft())
    finally:  # of a run that is stopped: a process that ends while the device computes may crash
        for _, step in ahead:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # of a group that lost a member
                jax.block_until_ready(step.arrays)  # type: ignore[no-untyped-call]


def agreed_blocks(dealt: Iterable[int | None], group: Group) -> Iterator[int | None]:
    """The blocks that are dealt to member 0 of a group, in all its members.

    Each is agreed on while the one before is computed.

    Args:
        dealt: blocks to compute, None where there is none now; only member 0 takes any.
        group: the processes that compute together.
    """
    if group.members == 1:
        yield from dealt
        return
    source = iter(dealt)

    def ask() -> Callable[[], int]:
        if group.member:
            return group.total(0)
        for block in source:
            return group.total(_NOTHING_NOW if block is None else _BLOCKS + block)
        return group.total(_END)

    answer = ask()
    while (said := answer()) != _END:
        if said == _NOTHING_NOW:
            yield None
            answer = ask()
        else:
            answer = ask()
            yield said - _BLOCKS


def _steps_of(plan: ExtractPlan, block: int, edges: Int64[np.ndarray, " step_edge"]) -> range:
    """The passes that hold samples of a block."""
    start, stop = plan.store.block_range(block)
    return range(int(np.searchsorted(edges, start, side="right")) - 1, int(np.searchsorted(edges, stop, side="left")))
