"""What is wrong with rows and tasks: named, counted, and refused or left out."""

import collections
from typing import Any, Literal, TypeAlias

from actstore.errors import InputError

OnError: TypeAlias = Literal["error", "skip"]
_SHOWN = 5  # faults that an error or a summary names with their place


class Fault(Exception):  # noqa: N818  not an error yet: a row that is no task may be left out
    """What is wrong with one row or task. Who knows where it stands counts it, or makes an `InputError` of it.

    Attributes:
        kind: One of a few short names, which are counted.
        found: What was found.
        expected: What was expected.
    """

    def __init__(self, kind: str, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.kind, self.found, self.expected = kind, found, expected


def check_choice(count: int | None, name: str, on_error: OnError) -> None:
    """Refuses a limit below one and an unknown policy.

    Raises:
        InputError: it is one of these.
    """
    if count is not None and count < 1:
        raise InputError(f"{name} is {count}; expected at least 1; leave it out for all")
    if on_error not in ("error", "skip"):
        raise InputError(f"on_error is {on_error!r}; expected 'error' or 'skip'")


class Counts:
    """What a pass has met so far.

    Attributes:
        rows: Rows read.
        tasks: Tasks among them.
        faults: Rows that are none, by kind of fault.
        first: The first few of these, with their place.
    """

    def __init__(self) -> None:
        self.rows = self.tasks = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self.first: list[str] = []

    def fault(self, where: str, fault: Fault) -> None:
        """Counts a row that is no task."""
        self.faults[fault.kind] += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {fault}")

    def listed(self) -> str:
        """How many faults of each kind, in words."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))

    def shown(self) -> str:
        """The first few faults with their place, and a sign where there are more."""
        return "; ".join(self.first) + ("; ..." if self.faults.total() > len(self.first) else "")

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file of settings."""
        faults = dict(sorted(self.faults.items()))
        return {"rows": self.rows, "tasks": self.tasks, "faults": faults, "first_faults": self.first}
