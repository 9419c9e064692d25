"""What says that a block, or the documents, are committed: small objects below `.act/`, and where they lie.

A block is committed when its marker is there with the plan's fingerprint. It is written last, after everything it
vouches for, from any process, in any order, as often as one likes. Nothing here needs a coordinator, a lock or a
conditional write.
"""

from collections.abc import Iterable

import numpy as np
import xxhash
from jaxtyping import Shaped

from actstore.commits import Marker, TableMarker
from actstore.errors import CorruptStoreError
from actstore.generations import added_sites
from actstore.kvstore import Root
from actstore.layout import norm_name
from actstore.schema import Plan

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


def checksum(values: Shaped[np.ndarray, "..."]) -> str:
    """xxh3-128 of an array's values as they lie in memory, row by row, little-endian: about 10 GB/s."""
    contiguous = np.ascontiguousarray(values)
    return xxhash.xxh3_128_hexdigest(contiguous.view(np.uint8).data if contiguous.size else b"")
