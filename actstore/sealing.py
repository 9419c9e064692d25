"""From committed blocks to a finished store: nodes, manifest, seal; and what takes back an addition.

A store is sealed when every block has its marker: anybody may do it, several at once and again after a crash.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from actstore.commits import Manifest, Ranges, Seal
from actstore.errors import CorruptStoreError, InputError, SealedStoreError, UnfinishedStoreError
from actstore.generations import added_sites, first_layer
from actstore.kvstore import Root
from actstore.ledger import (
    lineage,
    newest_complete,
    read_plan,
    read_status,
    root_attributes,
    stored_generations,
    stored_plan,
)
from actstore.markers import (
    MANIFEST_KEY,
    MARKER_FOLDER,
    PLAN_KEY,
    RANGES_KEY,
    SEAL_KEY,
    TABLE_KEY,
    has_table,
    key_in,
    marker_key,
    missing_blocks,
    parsed_marker,
)
from actstore.metadata import array_metadata, documents_group, group_metadata, shard_key, table_group, table_groups
from actstore.schema import FORMAT, Plan
from actstore.untrusted import canonical_json


def create_nodes(root: Root, plan: Plan) -> None:
    """Writes the `zarr.json` of the group and of every array, unless they are there. Safe from many processes.

    Those of a later generation are written when it is sealed: until then readers see the one before.

    Raises:
        SealedStoreError: the store is complete.
        UnfinishedStoreError: the plan appends to a generation that is not complete.
    """
    if _is_finished(root, plan):
        if plan.base is not None:
            raise SealedStoreError(
                f"{root.url}: this was appended already, as generation {plan.generation}; nothing is left to write. To "
                "append more of the same, give a provenance that tells the two apart"
            )
        raise SealedStoreError(
            f"{root.url} is complete: nothing is left to write; for another run choose another target"
        )
    if plan.base is not None:
        _check_base(root, plan)
        return
    root.create_all(node_objects(plan, complete=False))
    root.create("zarr.json", canonical_json(group_metadata(plan, status="writing")))


def node_objects(plan: Plan, *, complete: bool) -> dict[str, bytes]:
    """Key and bytes of the `zarr.json` of every array and of the groups of documents; not of the root group."""
    groups = dict.fromkeys(table_groups(plan), documents_group())
    return _nodes(array_metadata(plan, complete=complete) | groups)


def _nodes(metadata: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """Key and bytes of the `zarr.json` of arrays and groups."""
    return {f"{name}/zarr.json": canonical_json(each) for name, each in metadata.items()}


def is_sealed(root: Root, plan: Plan) -> bool:
    """Whether the generation of the plan is finished.

    Raises:
        PlanMismatchError: it is, and is that of another plan; the differing fields are named.
        CorruptStoreError: its plan or the root group is damaged.
    """
    if root.read(key_in(plan.generation, SEAL_KEY)) is None:
        return False
    stored = stored_plan(root, plan.generation)
    if stored is not None:
        plan.refuse_other(stored, url=root.url)
    return _is_finished(root, plan)


def _is_finished(root: Root, plan: Plan) -> bool:
    """Whether the seal is there, and the root group says so too: it may be lost, or of an older generation again."""
    sealed = root.read(key_in(plan.generation, SEAL_KEY)) is not None
    return sealed and read_status(root, plan) == "complete"


def seal(root: Root, plan: Plan) -> None:
    """Completes a store whose blocks are all committed: manifest, true shapes, status, seal. Safe to repeat.

    Costs one listing per site, to see that every shard is there, and one small read per block. Shards are not read:
    `verify` does that, and readers compare every chunk with its marker.

    Raises:
        UnfinishedStoreError: blocks are missing; says how many and which first.
        CorruptStoreError: shards of committed blocks are gone.
    """
    missing = missing_blocks(root, plan)
    if missing:
        raise UnfinishedStoreError(
            f"{root.url} cannot be sealed: {len(missing)} of {len(plan.blocks)} blocks are not committed, first "
            f"{missing[:5]}; write them, then seal again"
        )
    if plan.base is not None:
        _check_base(root, plan)
    if plan.documents is not None and not has_table(root, plan):
        raise UnfinishedStoreError(f"{root.url} cannot be sealed: its documents are not written; write them, then seal")
    manifest_sha256, bounds = write_manifest(root, plan)
    gathered = Ranges.of(plan, bounds)
    ranges = None if gathered is None else gathered.to_json()
    if ranges is not None:
        root.write(key_in(plan.generation, RANGES_KEY), ranges)
    if (
        newest_complete(root_attributes(root)) <= plan.generation
    ):  # else it was appended to meanwhile: readers see more already
        nodes = array_metadata(plan, complete=True)  # the shape shrinks; no chunk is touched
        if plan.base is not None and plan.documents is not None:
            nodes[table_group(plan.generation)] = documents_group()
        root.write_all(_nodes(nodes))
        root.write("zarr.json", canonical_json(group_metadata(plan, status="complete")))
    seal = Seal(
        format=FORMAT,
        fingerprint=plan.fingerprint,
        manifest_sha256=manifest_sha256,
        ranges_sha256=None if ranges is None else hashlib.sha256(ranges).hexdigest(),
    )
    root.write(key_in(plan.generation, SEAL_KEY), seal.to_json())


def write_manifest(root: Root, plan: Plan) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """Joins all markers; the SHA-256 of them, and the ranges of each. Nothing is there if one of them is refused.

    Each marker is read, compared with the plan, written and dropped: all of them may be larger than memory. A bucket
    takes them as one object, which is in memory while it is sent.

    Raises:
        CorruptStoreError: a marker is not of this plan, or a shard of a committed block is gone.
    """
    found = root.read_all(marker_key(block, plan.generation) for block in plan.blocks)
    digest, bounds = hashlib.sha256(), list[dict[str, tuple[int, int]]]()

    def markers() -> Iterator[bytes]:
        for block, data in zip(plan.blocks, found, strict=True):
            marker = parsed_marker(root, plan, block, data)
            bounds.append(marker.ranges)
            yield marker.to_json()
        _refuse_lost_shards(root, plan)

    def pieces() -> Iterator[memoryview]:
        for piece in Manifest.pieces(plan.fingerprint, markers()):
            digest.update(piece)
            yield memoryview(piece)

    root.write_pieces(key_in(plan.generation, MANIFEST_KEY), pieces())
    return digest.hexdigest(), bounds


def read_ranges(root: Root, plan: Plan) -> Ranges | None:
    """The ranges of the columns of a finished generation; None where it has none, or they are not those of its seal.

    Then columns have to be read. Costs two small reads.
    """
    data, seal = (root.read(key_in(plan.generation, key)) for key in (RANGES_KEY, SEAL_KEY))
    if data is None or seal is None:
        return None
    sealed = Seal.from_json(seal, where=f"{root.url}/{key_in(plan.generation, SEAL_KEY)}")
    if (sealed.fingerprint, sealed.ranges_sha256) != (plan.fingerprint, hashlib.sha256(data).hexdigest()):
        return None
    return Ranges.from_json(data, where=f"{root.url}/{key_in(plan.generation, RANGES_KEY)}")


def _refuse_lost_shards(root: Root, plan: Plan) -> None:
    for site in added_sites(plan):
        found = set(root.keys(f"{site.name}/c/"))
        first = first_layer(plan, site.name)
        for block, index in itertools.product(plan.blocks, range(site.rows_per_sample)):
            key = shard_key(site, first + index, block)
            if key not in found:
                raise CorruptStoreError(
                    f"{root.url} cannot be sealed: {site.name}{site.layer_text(index)}, block {block} is committed, "
                    f"but its shard {key} is gone; run `actstore repair`, then write what is missing and seal again"
                )


def _check_base(root: Root, plan: Plan) -> None:
    """Refuses to touch a store whose generation before is not complete."""
    before = lineage(root, plan)[-2]
    if read_status(root, before) != "complete":
        raise UnfinishedStoreError(
            f"{root.url}: generation {before.generation} is not complete, generation {plan.generation} was appended "
            "to it; run the command that wrote that one again, then this one"
        )
    if root.read(key_in(before.generation, SEAL_KEY)) is None:
        seal(root, before)  # its writer was stopped just before


def take_back_longer(root: Root, plan: Plan, block: int) -> None:
    """Takes back what later generations appended to the short last block of `plan`, before it is written again.

    Raises:
        SealedStoreError: the store is complete: writing the block would drop what was appended to it.
    """
    if plan.layout.block_range(block)[1] % plan.layout.block_samples == 0:
        return
    for number in range(stored_generations(root), plan.generation, -1):
        if not longer(root, number, block):
            continue
        if read_status(root, plan) == "complete":
            raise SealedStoreError(
                f"{root.url}: block {block} was written again when samples were appended to it; this writer began "
                "before that, and nothing is left for it to write"
            )
        root.delete(marker_key(block, number))


def longer(root: Root, generation: int, block: int) -> bool:
    """Whether a later generation appended samples to a block, and has its marker."""
    key = marker_key(block, generation)
    if root.read(key) is None:
        return False
    plan = stored_plan(root, generation)
    return plan is not None and plan.appends_samples


def abandon(root: Root) -> Plan:
    """Gives up an addition that is not finished: its markers go, then its plan. What it wrote is written over later.

    Raises:
        InputError: nothing is being appended.
    """
    plan = read_plan(root, unfinished=True)
    if plan.base is None or read_status(root, plan) == "complete":
        raise InputError(f"{root.url}: nothing is being appended; there is nothing to give up")
    plans = [PLAN_KEY, TABLE_KEY, MANIFEST_KEY, RANGES_KEY, SEAL_KEY]
    for key in [
        *root.keys(key_in(plan.generation, MARKER_FOLDER)),
        *(key_in(plan.generation, key) for key in plans[::-1]),
    ]:
        root.delete(key)
    return plan
