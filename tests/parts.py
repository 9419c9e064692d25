"""What `make test` does of a test that has a long form: `make test-long` does the rest.

A test of many cases is marked `sampled(every)`: every such case is run by `make test`, the others are marked `long`. A
test with many cases inside is given a stride, `@part_and_all(every)`, and takes `cases[::stride]`. One with counts
takes `@part_and_all_of`. A case by its name, long or not: `pytest -m '' -k NAME`. Why: docs/decisions/0022.
"""

from collections import Counter

import pytest


def part_and_all(every: int) -> pytest.MarkDecorator:
    """Gives `stride` to a test: `every` in `make test`, 1 in its long form."""
    return part_and_all_of("stride", every, 1)


def part_and_all_of(name: str, part: object, everything: object) -> pytest.MarkDecorator:
    """Gives the argument `name` to a test: `part` in `make test`, `everything` in its long form."""
    return pytest.mark.parametrize(
        name, [pytest.param(part, id="a part"), pytest.param(everything, id="all", marks=pytest.mark.long)]
    )


def mark_the_rest_long(items: list[pytest.Item]) -> None:
    """Marks as long what is not every n-th case of a test marked `sampled(n)`, in the order of collection."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % marker.args[0]:
            item.add_marker(pytest.mark.long)
        seen[test] += 1
