"""Makes a damaged store a run that can be continued: what is damaged is taken back, and only that is written again."""

import dataclasses

from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.ledger import lineage, stored_generations
from actstore.markers import MANIFEST_KEY, MARKER_FOLDER, RANGES_KEY, SEAL_KEY, TABLE_KEY, key_in, marker_key
from actstore.metadata import group_metadata, table_group
from actstore.schema import Plan
from actstore.sealing import create_nodes, longer, node_objects
from actstore.untrusted import canonical_json
from actstore.verify import Finding, Report


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was taken back. Running the commands that wrote the store again, in their order, writes just this.

    `generation` is the oldest that is damaged: 1, unless the store was appended to. Those after it are sealed again by
    their commands.
    """

    blocks: tuple[int, ...]
    keys: tuple[str, ...]
    generation: int = 1


def repair(root: Root, plan: Plan, report: Report) -> Repair:
    """Takes back what `report` found damaged: the store is unfinished afterwards, and every other block stays.

    Each step leaves a store that is either complete or unfinished, so that a stopped repair can be repeated: first the
    seals go, then the status and the shapes, then the markers of damaged blocks. A store that was appended to becomes
    what it was before the oldest damaged generation.

    Args:
        root: place of the store.
        plan: of the store.
        report: from `verify`, of this store.

    Raises:
        InputError: there is nothing to repair.
    """
    if not report.findings:
        raise InputError(f"{root.url} is sound at depth {report.depth!r}; there is nothing to repair")
    plans, count = lineage(root, plan), stored_generations(root)
    oldest = min(finding.generation for finding in report.findings)
    for number in range(count, oldest - 1, -1):
        root.delete(key_in(number, SEAL_KEY))
    sound = plans[oldest - 2] if oldest > 1 else None
    _write_nodes(root, plans[0] if sound is None else sound, complete=sound is not None)
    if sound is None:
        create_nodes(root, plans[0])  # what else is missing
    keys = [key for finding in report.findings for key in _taken_back(root, count, finding)]
    sealed = [key_in(number, key) for number in range(oldest, count + 1) for key in (MANIFEST_KEY, RANGES_KEY)]
    for key in [*keys, *sealed]:
        root.delete(key)
    return Repair(tuple(report.damaged_blocks), tuple(dict.fromkeys(keys)), oldest)


def _write_nodes(root: Root, plan: Plan, *, complete: bool) -> None:
    """The status first, then the shapes."""
    root.write("zarr.json", canonical_json(group_metadata(plan, status="complete" if complete else "writing")))
    root.write_all(node_objects(plan, complete=complete))


def _taken_back(root: Root, generations: int, finding: Finding) -> list[str]:
    """The keys that go because of one finding, in the order in which they go."""
    generation, table = finding.generation, key_in(finding.generation, TABLE_KEY)
    if finding.block is not None:  # writing it again drops the rows that were appended to it: these go first
        later = [number for number in range(generations, generation, -1) if longer(root, number, finding.block)]
        return [marker_key(finding.block, number) for number in (*later, generation)]
    if finding.what.startswith(("assets/", key_in(generation, MARKER_FOLDER))):
        return [finding.what]
    return [table] if finding.what.startswith((f"{table_group(generation)}/", table)) else []
