"""How fast this machine computes a plan: its first passes, timed."""

import contextlib
import time

from extract.plan import ExtractPlan
from extract.steps import forward_steps

SECONDS = 5.0


def measure(plan: ExtractPlan, *, seconds: float = SECONDS) -> float:
    """Tokens per second of the plan's forward passes on the devices of this process, with their way to the host.

    Compiles, then computes for about so many seconds, or to the end of the plan's first blocks; writes nothing.
    Of a plan of one pass, which is the one that compiles, the time of compiling counts too.

    Args:
        plan: what to compute.
        seconds: how long.
    """
    tokens, started = 0, time.perf_counter()
    with contextlib.closing(forward_steps(plan, plan.store.blocks)) as steps:
        seen = -1
        for step in steps:
            if step is None or step.first == seen:
                continue
            if seen < 0 and plan.steps > 1:
                started = time.perf_counter()
            else:
                tokens += int(step.contexts.filled.sum())
            seen = step.first
            if time.perf_counter() - started > seconds and tokens:
                break
    return tokens / (time.perf_counter() - started)
