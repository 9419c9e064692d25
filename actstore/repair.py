"""Makes a damaged store a run that can be continued: what is damaged is taken back, and only that is written again."""

import dataclasses

from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.ledger import (
    MANIFEST_KEY,
    MARKER_FOLDER,
    SEAL_KEY,
    TABLE_KEY,
    create_nodes,
    marker_key,
)
from actstore.metadata import array_metadata, documents_group, group_metadata
from actstore.schema import Plan, canonical_json
from actstore.verify import Report


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was taken back. Running the command that wrote the store again writes just this."""

    blocks: tuple[int, ...]
    keys: tuple[str, ...]


def repair(root: Root, plan: Plan, report: Report) -> Repair:
    """Takes back what `report` found damaged: the store is unfinished afterwards, and every other block stays.

    Each step leaves a store that is either complete or unfinished, so that a stopped repair can be repeated: first the
    seal goes, then the status and the shapes, then the markers of damaged blocks.

    Args:
        root: place of the store.
        plan: of the store.
        report: from `verify`, of this store.

    Raises:
        InputError: there is nothing to repair.
    """
    if not report.findings:
        raise InputError(f"{root.url} is sound at depth {report.depth!r}; there is nothing to repair")
    root.delete(SEAL_KEY)
    root.write("zarr.json", canonical_json(group_metadata(plan, status="writing")))
    for name, spec in array_metadata(plan, complete=False).items():
        root.write(f"{name}/zarr.json", canonical_json(spec))
    if plan.documents is not None:
        root.write("documents/zarr.json", canonical_json(documents_group()))
    create_nodes(root, plan)  # what else is missing
    blocks = tuple(report.damaged_blocks)
    keys = [marker_key(block) for block in blocks]
    keys += [finding.what for finding in report.findings if finding.what.startswith(("assets/", MARKER_FOLDER))]
    keys += [TABLE_KEY] * any(finding.what.startswith(("documents/", TABLE_KEY)) for finding in report.findings)
    for key in [*keys, MANIFEST_KEY]:
        root.delete(key)
    return Repair(blocks, tuple(keys))
