"""Bounds on what remote storage may take: how long, how often again, how much at once. From environment variables.

They are no part of a plan and of no store: the same store is read here through a slow line and there in its own region.
"""

import dataclasses
import math
from collections.abc import Mapping, MutableMapping

from actstore.errors import InputError

QUICK_RETRIES = 2  # by TensorStore, in silence, within a second or two; later ones are ours, and are said
LEAST_BYTES_PER_SECOND = 1_000_000  # of large objects: an operation may take so much longer
STALLED_BYTES_PER_SECOND = 1024
_ABOUT = {
    "deadline_seconds": "until an operation that was tried again and again fails; a second more for each megabyte",
    "stall_seconds": "without a kilobyte a second until a request is given up and tried again",
    "notice_seconds": "until an operation that waits says so, and between such lines",
    "requests_at_once": "of this process, to one cloud",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of remote storage. `Limits.of(os.environ)` reads `ACTSTORE_DEADLINE_SECONDS` and so on."""

    deadline_seconds: float = 120.0
    stall_seconds: float = 20.0
    notice_seconds: float = 20.0
    requests_at_once: int = 32

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Limits":
        """The bounds that the environment sets; others are the defaults.

        Raises:
            InputError: a variable is not a positive number.
        """
        given: dict[str, float] = {}
        for field in dataclasses.fields(cls):
            name = variable(field.name)
            if (text := environ.get(name)) is None:
                continue
            try:
                value = int(text) if field.type is int else float(text)
            except ValueError:
                value = math.nan
            if not (value > 0 and value < 1e6):
                raise InputError(f"{name} is {text!r}; expected a positive number, such as {field.default}")
            given[field.name] = value
        return cls(**given)  # type: ignore[arg-type]  # each has the type of its field

    def described(self) -> dict[str, tuple[str, str]]:
        """What each variable is set to, and what it means: for `actstore info --verbose`."""
        return {variable(name): (f"{getattr(self, name):g}", about) for name, about in _ABOUT.items()}

    def deadline(self, size: int) -> float:
        """Seconds that an operation on `size` bytes may take."""
        return self.deadline_seconds + size / LEAST_BYTES_PER_SECOND

    def tell_curl(self, environ: MutableMapping[str, str]) -> None:
        """Has TensorStore give up stalled requests, which by default wait for ever. It asks at its first request."""
        environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(max(round(self.stall_seconds), 1)))
        environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", str(STALLED_BYTES_PER_SECOND))

    @property
    def resources(self) -> dict[str, dict[str, object]]:
        """TensorStore's own bounds, for its context."""
        retries: dict[str, object] = {"max_retries": QUICK_RETRIES, "initial_delay": "200ms", "max_delay": "1s"}
        at_once: dict[str, object] = {"limit": self.requests_at_once}
        clouds = ("s3", "gcs", "http")
        return {f"{cloud}_request_retries": retries for cloud in clouds} | {
            f"{cloud}_request_concurrency": at_once for cloud in clouds
        }


def variable(field: str) -> str:
    """The environment variable that sets a bound."""
    return f"ACTSTORE_{field.upper()}"
