"""Where the time of a run goes: what the loop waits for."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Stage = Literal["storage", "device", "host"]


@dataclasses.dataclass
class Stages:
    """Seconds that the loop spent on each stage; what is left of the time is its own.

    `storage`: waiting until a block that is being written gives its buffer back. `device`: handing it a pass, which
    compiles the first time, and waiting for rows. `host`: making the input of the next pass, and copying rows into
    blocks.
    """

    seconds: dict[Stage, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(get_args(Stage), 0.0))

    @contextmanager
    def on(self, stage: Stage) -> Iterator[None]:
        """Counts the time inside for a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    @property
    def limit(self) -> Stage:
        """The stage that took most."""
        return max(self.seconds, key=self.seconds.__getitem__)
