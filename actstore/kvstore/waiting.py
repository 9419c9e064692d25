"""Waiting for storage: with a deadline, and never in silence. What failed for a while is tried again, and said.

Lines go to the logger `actstore.storage` as warnings: Python shows them on standard error unless a program wants them
elsewhere. `storage: waiting 20 s for an answer to write resid_post/c/0/3/0 of gs://bucket/run.acts.zarr`.
"""

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from actstore.errors import StorageError
from actstore.kvstore.failures import may_pass, reason, storage_errors

Result = TypeVar("Result")
LOGGER = logging.getLogger("actstore.storage")
LONGEST_PAUSE_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long storage may take."""

    seconds: float
    """Of one operation, with all its attempts."""
    notice_seconds: float
    again: bool
    """Whether what may pass is tried again: a busy or unreachable server is, a local disk is not."""


class Operation(Generic[Result]):
    """Something that the storage does meanwhile. `result` waits for it.

    Args:
        doing: what is done, as the middle of a message: `read zarr.json of s3://...`.
        start: begins it, and gives a future of TensorStore; called again where it is tried again.
        patience: how long it may take.
        sound: looks at the answer; a sentence says what is wrong with one that is none, and it is tried again.
    """

    def __init__(
        self,
        doing: str,
        start: Callable[[], Any],
        patience: Patience,
        *,
        sound: Callable[[Any], str | None] | None = None,
    ) -> None:
        self._doing, self._start, self._patience, self._sound = doing, start, patience, sound
        self._begun = time.monotonic()
        with storage_errors(doing):
            self._future = start()

    def result(self) -> Result:
        """The answer, once it is there.

        Raises:
            StoreError: of the class that fits the failure; a `StorageError` where the time is over.
        """
        pause = 0.5
        while True:
            with storage_errors(self._doing):
                try:
                    answer = self._wait()
                    wrong = None if self._sound is None else self._sound(answer)
                    if wrong is None:
                        return answer
                    raise ValueError(f"UNAVAILABLE: {wrong}")  # as if the storage had said it
                except ValueError as error:
                    if not (self._patience.again and may_pass(str(error)) and self._left > pause):
                        raise
                    LOGGER.warning(
                        "storage: could not %s: %s; trying again, for %.0f s more",
                        self._doing,
                        reason(str(error)),
                        self._left,
                    )
                    time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311  many hosts should not come back at once
                    if self._left <= 0:
                        raise  # says more than that there was no answer
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                self._future = self._start()

    @property
    def _left(self) -> float:
        """Seconds until the time is over."""
        return self._patience.seconds - (time.monotonic() - self._begun)

    def _wait(self) -> Any:
        """Waits for one attempt, and says so now and then.

        Raises:
            StorageError: the time is over.
        """
        while True:
            waited = time.monotonic() - self._begun
            left = self._patience.seconds - waited
            if left <= 0:
                with contextlib.suppress(TimeoutError):
                    return self._future.result(timeout=0)  # it may be there, and nobody came for it
                raise StorageError(
                    f"could not {self._doing}: no answer in {waited:.0f} s; see whether the storage can be reached, "
                    "then run the same command again"
                )
            asked = min(left, self._patience.notice_seconds)
            try:
                return self._future.result(timeout=asked)
            except TimeoutError:
                now = time.monotonic() - self._begun
                if now - waited < 0.9 * asked:  # not ours: the storage says that it gave up
                    raise
                waited = now
                if waited < self._patience.seconds:
                    LOGGER.warning("storage: waiting %.0f s for an answer to %s", waited, self._doing)
