"""What a store will hold, what is committed, and when it is complete: plan, markers, manifest, seal.

Protocol: create the plan; write blocks in any order, from any number of processes, each with its marker last; seal.
A block is committed when its marker is there with the plan's fingerprint. Every step may be repeated, by anybody.
Nothing here needs a coordinator, a lock or a conditional write.

A finished store may be appended to: the next generation has a plan, markers, manifest and seal of its own in a folder
of its own. The root group says which generation is complete; until the next one is sealed, readers see that one.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Shaped

from actstore.errors import (
    CorruptStoreError,
    InputError,
    PlanMismatchError,
    SealedStoreError,
    StoreNotFoundError,
    UnfinishedStoreError,
    UnknownNameError,
)
from actstore.generations import added_sites, first_layer, leads_to
from actstore.kvstore import Root
from actstore.layout import norm_name
from actstore.metadata import array_metadata, documents_group, group_metadata, shard_key, table_group, table_groups
from actstore.schema import (
    FORMAT,
    Manifest,
    Marker,
    Plan,
    Ranges,
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
RANGES_KEY = ".act/ranges.json"
SEAL_KEY = ".act/SEALED.json"
WINDOW_BLOCKS = 1000
"""Blocks whose names begin with the same five digits: as many as a bucket lists in one answer."""
BLOCK_DIGITS = 8


def key_in(generation: int, key: str) -> str:
    """Where a later generation keeps what the first keeps under `key`."""
    return key if generation == 1 else key.replace(".act/", f".act/generations/{generation}/", 1)


def create_plan(root: Root, plan: Plan) -> None:
    """Stores the plan, or checks that the same plan is stored already.

    Raises:
        PlanMismatchError: another plan is there; the differing fields are named.
    """
    key = key_in(plan.generation, PLAN_KEY)
    stored = Plan.from_json(root.create(key, plan.to_json()), where=f"{root.url}/{key}")
    plan.refuse_other(stored, url=root.url)


def read_plan(root: Root, *, unfinished: bool = False) -> Plan:
    """The plan of the store at `root`: that of its newest complete generation, or of the first, finished or not.

    Args:
        root: place of the store.
        unfinished: True gives the generation that is being written, if there is one.

    Raises:
        StoreNotFoundError: there is none here.
        CorruptStoreError: it is damaged.
    """
    return find_plan(root, unfinished=unfinished).plan


class Found(NamedTuple):
    """The plan of a store, and whether it is complete; None where the root group, which says so, is damaged."""

    plan: Plan
    complete: bool | None


def find_plan(root: Root, *, unfinished: bool = False) -> Found:
    """As `read_plan`; the root group is read once for both answers.

    Raises:
        StoreNotFoundError: there is none here.
        CorruptStoreError: its plan is damaged.
    """
    plan = _stored_plan(root, 1)
    if plan is None:
        raise StoreNotFoundError(
            f"no activation store at {root.url}: found no {PLAN_KEY}, expected a folder made by `actstore extract` or "
            f"`actstore.create`; check the path{root.hint(PLAN_KEY)}"
        )
    try:
        attributes, damaged = _root_attributes(root), False
        newest = _newest_complete(attributes)
    except CorruptStoreError:
        attributes, damaged = None, True
        sealed = itertools.count(1)
        newest = next(number for number in sealed if root.read(key_in(number, SEAL_KEY)) is None) - 1
    while plan.generation < newest:
        plan = _next_plan(root, plan, required=True)
    if unfinished and newest:
        plan = _next_plan(root, plan, required=False)
    with contextlib.suppress(CorruptStoreError):
        if not damaged:
            return Found(plan, _status(root, plan, attributes) == "complete")
    return Found(plan, None)


def lineage(root: Root, plan: Plan) -> tuple[Plan, ...]:
    """The plans of all generations up to `plan`, oldest first. One small read for each before it.

    Raises:
        CorruptStoreError: one is missing, damaged, or does not lead to the next.
    """
    plans = [plan]
    while (base := plans[0].base) is not None:
        before = _stored_plan(root, base.generation)
        if before is None or not leads_to(before, plans[0]):
            raise CorruptStoreError(
                f"{root.url}/{key_in(base.generation, PLAN_KEY)} is missing or is not the plan that generation "
                f"{plans[0].generation} was appended to; restore it from a copy"
            )
        plans.insert(0, before)
    return tuple(plans)


def appended_plan(root: Root, extend: Callable[[Plan], Plan]) -> Plan:
    """The plan that `extend` makes of the newest complete generation, or the one it made before that is there.

    Raises:
        UnfinishedStoreError: the store itself is not complete.
        PlanMismatchError: something else is being appended; the differing fields are named.
        InputError: `extend` refuses what is there.
    """
    plans = lineage(root, read_plan(root, unfinished=True))
    for before, after in itertools.pairwise(plans):
        with contextlib.suppress(InputError):  # what was appended then is there now, and would be refused
            if extend(before).fingerprint == after.fingerprint:
                return after
    newest = plans[-1]
    if read_status(root, newest) == "complete":
        return extend(newest)
    if newest.base is None:
        raise UnfinishedStoreError(
            f"{root.url} is unfinished: {len(missing_blocks(root, newest))} of {len(newest.blocks)} blocks are "
            "missing; run the command that writes it again to finish it, then append"
        )
    try:
        extend(plans[-2]).refuse_other(newest, url=root.url)
    except PlanMismatchError as error:
        raise PlanMismatchError(
            f"{error}; or give up what is being appended with `actstore abandon {root.url}`"
        ) from None
    return newest


def _stored_plan(root: Root, generation: int) -> Plan | None:
    key = key_in(generation, PLAN_KEY)
    data = root.read(key)
    if data is None:
        return None
    plan = Plan.from_json(data, where=f"{root.url}/{key}")
    if plan.generation != generation:
        raise CorruptStoreError(
            f"{root.url}/{key} is the plan of generation {plan.generation}, expected {generation}; restore it from a "
            "copy"
        )
    return plan


def _next_plan(root: Root, plan: Plan, *, required: bool) -> Plan:
    """The plan that was appended to `plan`; `plan` itself where there is none and none is required."""
    later = _stored_plan(root, plan.generation + 1)
    if later is None and not required:
        return plan
    if later is None or not leads_to(plan, later):
        raise CorruptStoreError(
            f"{root.url}/{key_in(plan.generation + 1, PLAN_KEY)} is missing or was appended to another store than "
            f"{plan.fingerprint[:12]}; restore it from a copy"
        )
    return later


def read_status(root: Root, plan: Plan) -> Literal["writing", "complete"]:
    """`writing` or `complete`: whether the generation of `plan` is complete, from the root group's attributes.

    Raises:
        CorruptStoreError: the attributes are damaged or belong to another plan.
    """
    return _status(root, plan, _root_attributes(root))


def _status(root: Root, plan: Plan, attributes: RootAttributes | None) -> Literal["writing", "complete"]:
    """The status of the generation of `plan` by the attributes of the root group."""
    if attributes is None:
        return "writing"  # killed between plan and group: nothing is committed yet
    if attributes.generation == plan.generation and attributes.fingerprint != plan.fingerprint:
        raise CorruptStoreError(
            f"{root.url}/zarr.json belongs to the plan {attributes.fingerprint[:12]}, "
            f"{key_in(plan.generation, PLAN_KEY)} is {plan.fingerprint[:12]}; "
            "two stores were mixed: restore the folder from a copy"
        )
    if attributes.generation < plan.generation:
        return "writing"
    return attributes.status if attributes.generation == plan.generation else "complete"


def refuse_lost_group(root: Root, plan: Plan) -> None:
    """Refuses a store that was finished and has lost its root group: it would look as if it were being written.

    Raises:
        CorruptStoreError: says so.
    """
    sealed = root.read(key_in(plan.generation, SEAL_KEY)) is not None
    if sealed and root.read("zarr.json") is None:
        raise CorruptStoreError(
            f"{root.url}/zarr.json is missing, and the store was finished: run `actstore verify`, then "
            "`actstore repair`, or restore it from a copy"
        )


def _root_attributes(root: Root) -> RootAttributes | None:
    data = root.read("zarr.json")
    if data is None:
        return None
    where = f"{root.url}/zarr.json"
    try:
        return RootAttributes.model_validate(parse_json(data, where=where)["attributes"]["actstore"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{where} has no valid attribute `actstore` ({type(error).__name__}); restore it from a copy"
        ) from None


def marker_key(block: int, generation: int = 1) -> str:
    """Key of the marker of a block."""
    return f"{key_in(generation, MARKER_FOLDER)}{block:08d}.json"


def window_folder(folder: str, window: int) -> str:
    """How the keys of a window of blocks begin, in a folder that has one object for each."""
    return f"{folder}{window:05d}"


def committed_blocks(root: Root, plan: Plan, *, windows: Iterable[int] | None = None) -> set[int]:
    """Blocks that have a marker of the plan's generation: one listing, whose cost grows with the number of blocks.

    Args:
        root: place of the store.
        plan: says which generation.
        windows: only the blocks w * 1,000 to w * 1,000 + 999 of each w of these; None for all.
    """
    folder = key_in(plan.generation, MARKER_FOLDER)
    prefixes = [folder] if windows is None else [window_folder(folder, window) for window in windows]
    return numbered(root.keys(*prefixes), folder)


def numbered(keys: Iterable[str], folder: str) -> set[int]:
    """Numbers of the blocks whose objects, such as `00000042.json`, lie in a folder; other keys are passed over."""
    first, last = len(folder), len(folder) + BLOCK_DIGITS
    return {
        int(key[first:last])
        for key in keys
        if len(key) == last + 5 and key.endswith(".json") and key[first:last].isdecimal() and key.isascii()
    }


def has_marker(root: Root, plan: Plan, block: int) -> bool:
    """Whether a block is committed. One small request."""
    return root.exists(marker_key(block, plan.generation))


def missing_blocks(root: Root, plan: Plan) -> list[int]:
    """Blocks of the plan that are not committed, ascending. What is left to do: nothing else has to be remembered."""
    done = committed_blocks(root, plan)
    return [block for block in plan.blocks if block not in done]


def committed_ranges(root: Root, plan: Plan) -> list[tuple[int, int]]:
    """Ranges of samples of which everything that the plan describes is committed, ascending."""
    done = [plan.block_range(block) for block in sorted(committed_blocks(root, plan)) if block in plan.blocks]
    return [(0, plan.base.samples), *done] if plan.base and plan.appends_samples else done


def write_marker(root: Root, plan: Plan, marker: Marker) -> None:
    """Commits a block. Everything the marker vouches for must be durable before."""
    root.write(marker_key(marker.block, plan.generation), marker.to_json())


def read_marker(root: Root, plan: Plan, block: int) -> Marker:
    """The marker of a committed block.

    Raises:
        CorruptStoreError: missing, damaged, or of another plan or block.
    """
    return parsed_marker(root, plan, block, root.read(marker_key(block, plan.generation)))


def parsed_marker(root: Root, plan: Plan, block: int, data: bytes | None) -> Marker:
    """A marker that was read, compared with the plan; the same errors as `read_marker`."""
    key = marker_key(block, plan.generation)
    if data is None:
        raise CorruptStoreError(f"{root.url}/{key} is missing; block {block} must be written again")
    marker = Marker.from_json(data, where=f"{root.url}/{key}")
    if (marker.fingerprint, marker.block) != (plan.fingerprint, block):
        raise CorruptStoreError(
            f"{root.url}/{key} is of block {marker.block} of plan {marker.fingerprint[:12]}, expected block {block} of "
            f"{plan.fingerprint[:12]}; remove it and run the same command again"
        )
    expected = vouched_arrays(plan)
    found = {name: len(digests) for name, digests in marker.checksums.items()}
    if marker.samples != plan.block_range(block) or found != expected:
        raise CorruptStoreError(
            f"{root.url}/{key} vouches for samples {marker.samples} of {_counted(found)}; the plan has "
            f"{plan.block_range(block)} of {_counted(expected)}; remove it and run the command again"
        )
    columns = plan.layout.integer_columns if plan.adds_samples else ()
    if marker.ranges and marker.ranges.keys() != set(columns):
        raise CorruptStoreError(
            f"{root.url}/{key} has the ranges of {sorted(marker.ranges)[:5]}, the plan the columns "
            f"{sorted(columns)[:5]}; remove it and run the same command again"
        )
    (start, stop), size = marker.samples, plan.layout.chunk_samples
    digits = 8 * ((stop - 1) // size - start // size + 1)
    chunks = {name: [len(layer) for layer in layers] for name, layers in marker.chunks.items()}
    whole = {site.name: [digits] * site.rows_per_sample for site in added_sites(plan)}
    if chunks and chunks != whole:
        wrong = [name for name in sorted({*chunks, *whole}) if chunks.get(name) != whole.get(name)]
        raise CorruptStoreError(
            f"{root.url}/{key} does not vouch for every chunk of {wrong[0]}; remove it and run the same command again"
        )
    return marker


def vouched_arrays(plan: Plan) -> dict[str, int]:
    """The arrays that a marker of the plan vouches for, with how many layers of each."""
    sites = {site.name: site.rows_per_sample for site in added_sites(plan)}
    columns = plan.layout.columns if plan.adds_samples else ()
    return sites | {norm_name(name): count for name, count in sites.items()} | {column.name: 1 for column in columns}


def _counted(arrays: dict[str, int]) -> str:
    shown = [f"{name} x {count}" for name, count in sorted(arrays.items())]
    return ", ".join(shown[:2]) + f" and {len(shown) - 2} more" * (len(shown) > 2)


def write_table_marker(root: Root, plan: Plan, marker: TableMarker) -> None:
    """Commits the documents of a plan."""
    root.write(key_in(plan.generation, TABLE_KEY), marker.to_json())


def has_table(root: Root, plan: Plan) -> bool:
    """Whether the documents of a plan are committed."""
    return root.read(key_in(plan.generation, TABLE_KEY)) is not None


def write_assets(root: Root, plan: Plan, assets: Mapping[str, bytes]) -> None:
    """Stores the small files whose digests the plan holds, unless they are stored already.

    Raises:
        InputError: a file is not the one the plan was made with, or one is missing.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in assets.items()}
    if digests != plan.assets:
        raise InputError(f"assets: found {sorted(assets)}, the plan has others ({sorted(plan.assets)}); plan again")
    root.create_all({f"assets/{name}": data for name, data in assets.items()})


def read_asset(root: Root, plan: Plan, name: str) -> bytes:
    """A small file that is kept with the store, compared with its digest in the plan.

    Raises:
        UnknownNameError: the store has no such file.
        CorruptStoreError: it is missing or damaged.
    """
    if name not in plan.assets:
        raise UnknownNameError(
            f"{root.url} holds no file {name!r}; it holds {', '.join(sorted(plan.assets)) or 'none'}"
        )
    data = root.read(f"assets/{name}")
    if data is None or hashlib.sha256(data).hexdigest() != plan.assets[name]:
        raise CorruptStoreError(
            f"assets/{name} of {root.url} is missing or not what the plan says; run `actstore verify`"
        )
    return data


def checksum(values: Shaped[np.ndarray, "..."]) -> str:
    """xxh3-128 of an array's values as they lie in memory, row by row, little-endian: about 10 GB/s."""
    contiguous = np.ascontiguousarray(values)
    return xxhash.xxh3_128_hexdigest(contiguous.view(np.uint8).data if contiguous.size else b"")


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
    stored = _stored_plan(root, plan.generation)
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
        _newest_complete(_root_attributes(root)) <= plan.generation
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


def _newest_complete(attributes: RootAttributes | None) -> int:
    """How many generations are complete, by the root group alone."""
    return attributes.generation if attributes is not None and attributes.status == "complete" else 0


def stored_generations(root: Root) -> int:
    """How many generations have a plan, finished or not. One small read for each."""
    return next(number for number in itertools.count(1) if root.read(key_in(number + 1, PLAN_KEY)) is None)


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
    plan = _stored_plan(root, generation)
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
