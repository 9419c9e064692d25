"""What a store will hold, what is committed, and when it is complete: plan, markers, manifest, seal.

Protocol: create the plan; write blocks in any order, from any number of processes, each with its marker last; seal.
A block is committed when its marker is there with the plan's fingerprint. Every step may be repeated, by anybody.
Nothing here needs a coordinator, a lock or a conditional write.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import xxhash
from jaxtyping import Shaped

from actstore.errors import CorruptStoreError, InputError, SealedStoreError, StoreNotFoundError, UnfinishedStoreError
from actstore.kvstore import Root
from actstore.metadata import array_metadata, documents_group, group_metadata
from actstore.schema import (
    FORMAT,
    Manifest,
    Marker,
    Plan,
    RootAttributes,
    Seal,
    TableMarker,
    canonical_json,
    parse_json,
)

PLAN_KEY = ".act/plan.json"
MARKER_FOLDER = ".act/commits/"
TABLE_KEY = ".act/documents.json"
MANIFEST_KEY = ".act/manifest.json"
SEAL_KEY = ".act/SEALED.json"


def create_plan(root: Root, plan: Plan) -> None:
    """Stores the plan, or checks that the same plan is stored already.

    Raises:
        PlanMismatchError: another plan is there; the differing fields are named.
    """
    stored = Plan.from_json(root.create(PLAN_KEY, plan.to_json()), where=f"{root.url}/{PLAN_KEY}")
    plan.refuse_other(stored, url=root.url)


def read_plan(root: Root) -> Plan:
    """The plan of the store at `root`.

    Raises:
        StoreNotFoundError: there is none here.
        CorruptStoreError: it is damaged.
    """
    data = root.read(PLAN_KEY)
    if data is None:
        raise StoreNotFoundError(
            f"no activation store at {root.url}: found no {PLAN_KEY}, expected a folder made by `actstore extract` or "
            "`actstore.create`; check the path"
        )
    return Plan.from_json(data, where=f"{root.url}/{PLAN_KEY}")


def read_status(root: Root, plan: Plan) -> str:
    """`writing` or `complete`, from the root group's attributes.

    Raises:
        CorruptStoreError: the attributes are damaged or belong to another plan.
    """
    data = root.read("zarr.json")
    if data is None:
        return "writing"  # killed between plan and group: nothing is committed yet
    where = f"{root.url}/zarr.json"
    try:
        attributes = RootAttributes.model_validate(parse_json(data, where=where)["attributes"]["actstore"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{where} has no valid attribute `actstore` ({type(error).__name__}); restore it from a copy"
        ) from None
    if attributes.fingerprint != plan.fingerprint:
        raise CorruptStoreError(
            f"{where} belongs to the plan {attributes.fingerprint[:12]}, {PLAN_KEY} is {plan.fingerprint[:12]}; "
            "two stores were mixed: restore the folder from a copy"
        )
    return attributes.status


def marker_key(block: int) -> str:
    """Key of the marker of a block."""
    return f"{MARKER_FOLDER}{block:08d}.json"


def committed_blocks(root: Root) -> set[int]:
    """Blocks that have a marker: one listing, whose cost grows with the number of blocks."""
    names = (key.removeprefix(MARKER_FOLDER).removesuffix(".json") for key in root.keys(MARKER_FOLDER))
    return {int(name) for name in names if name.isdigit()}


def missing_blocks(root: Root, plan: Plan) -> list[int]:
    """Blocks of the plan that are not committed, ascending. What is left to do: nothing else has to be remembered."""
    done = committed_blocks(root)
    return [block for block in range(plan.layout.blocks) if block not in done]


def write_marker(root: Root, marker: Marker) -> None:
    """Commits a block. Everything the marker vouches for must be durable before."""
    root.write(marker_key(marker.block), marker.to_json())


def read_marker(root: Root, plan: Plan, block: int) -> Marker:
    """The marker of a committed block.

    Raises:
        CorruptStoreError: missing, damaged, or of another plan or block.
    """
    key = marker_key(block)
    data = root.read(key)
    if data is None:
        raise CorruptStoreError(f"{root.url}/{key} is missing; block {block} must be written again")
    marker = Marker.from_json(data, where=f"{root.url}/{key}")
    if (marker.fingerprint, marker.block) != (plan.fingerprint, block):
        raise CorruptStoreError(
            f"{root.url}/{key} is of block {marker.block} of plan {marker.fingerprint[:12]}, expected block {block} of "
            f"{plan.fingerprint[:12]}; remove it and run the same command again"
        )
    return marker


def write_table_marker(root: Root, marker: TableMarker) -> None:
    """Commits the `documents` group."""
    root.write(TABLE_KEY, marker.to_json())


def has_table(root: Root) -> bool:
    """Whether the `documents` group is committed."""
    return root.read(TABLE_KEY) is not None


def write_assets(root: Root, plan: Plan, assets: Mapping[str, bytes]) -> None:
    """Stores the small files whose digests the plan holds, unless they are stored already.

    Raises:
        InputError: a file is not the one the plan was made with, or one is missing.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in assets.items()}
    if digests != plan.assets:
        raise InputError(f"assets: found {sorted(assets)}, the plan has others ({sorted(plan.assets)}); plan again")
    for name, data in assets.items():
        root.create(f"assets/{name}", data)


def checksum(values: Shaped[np.ndarray, "..."]) -> str:
    """xxh3-128 of an array's values as they lie in memory, row by row, little-endian: about 10 GB/s."""
    contiguous = np.ascontiguousarray(values)
    return xxhash.xxh3_128_hexdigest(contiguous.view(np.uint8).data if contiguous.size else b"")


def create_nodes(root: Root, plan: Plan) -> None:
    """Writes the `zarr.json` of the group and of every array, unless they are there. Safe from many processes.

    Raises:
        SealedStoreError: the store is complete.
    """
    if root.read(SEAL_KEY) is not None:
        raise SealedStoreError(
            f"{root.url} is complete: nothing is left to write; for another run choose another target"
        )
    arrays = array_metadata(plan, complete=False)
    missing = {key for key in ["zarr.json", *(f"{name}/zarr.json" for name in arrays)] if root.read(key) is None}
    for name, metadata in arrays.items():
        if f"{name}/zarr.json" in missing:
            root.create(f"{name}/zarr.json", canonical_json(metadata))
    if plan.documents is not None:
        root.create("documents/zarr.json", canonical_json(documents_group()))
    if "zarr.json" in missing:
        root.create("zarr.json", canonical_json(group_metadata(plan, status="writing")))


def seal(root: Root, plan: Plan) -> None:
    """Completes a store whose blocks are all committed: manifest, true shapes, status, seal. Safe to repeat.

    Raises:
        UnfinishedStoreError: blocks are missing; says how many and which first.
    """
    missing = missing_blocks(root, plan)
    if missing:
        raise UnfinishedStoreError(
            f"{root.url} cannot be sealed: {len(missing)} of {plan.layout.blocks} blocks are not committed, first "
            f"{missing[:5]}; write them, then seal again"
        )
    if plan.documents is not None and not has_table(root):
        raise UnfinishedStoreError(f"{root.url} cannot be sealed: its documents are not written; write them, then seal")
    markers = tuple(read_marker(root, plan, block) for block in range(plan.layout.blocks))
    manifest = Manifest(format=FORMAT, fingerprint=plan.fingerprint, blocks=markers).to_json()
    root.write(MANIFEST_KEY, manifest)
    for name, metadata in array_metadata(plan, complete=True).items():
        root.write(f"{name}/zarr.json", canonical_json(metadata))  # the shape shrinks; no chunk is touched
    root.write("zarr.json", canonical_json(group_metadata(plan, status="complete")))
    digest = hashlib.sha256(manifest).hexdigest()
    root.write(SEAL_KEY, Seal(format=FORMAT, fingerprint=plan.fingerprint, manifest_sha256=digest).to_json())
