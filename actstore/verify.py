"""Integrity: compares what is stored with what the plan and the commit markers say, shard by shard.

Three depths. `fast`: every shard is there with a sound index, which pins its length (one small read per shard).
`sample`: that, and a share of the shards decoded and compared with their checksums. `full`: all of them.
"""

import dataclasses
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from actstore.errors import ActstoreError, CorruptStoreError
from actstore.kvstore import Root, storage_errors
from actstore.layout import Layout
from actstore.ledger import (
    MANIFEST_KEY,
    SEAL_KEY,
    TABLE_KEY,
    checksum,
    committed_blocks,
    has_table,
    marker_key,
    read_marker,
    read_status,
)
from actstore.metadata import array_metadata, documents_group, group_metadata
from actstore.schema import Marker, Plan, Seal, TableMarker, canonical_json

Depth = Literal["fast", "sample", "full"]
MAX_ASSET_BYTES, MAX_MANIFEST_BYTES = 256 << 20, 4 << 30
SHARDS_AT_ONCE = 2  # each is decoded whole: 128 MiB twice


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `block` is None for what belongs to the store as a whole."""

    what: str
    problem: str
    block: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a verification looked at and found. The store is sound at this depth if `findings` is empty."""

    url: str
    depth: Depth
    status: str
    blocks: int
    shards: int
    bytes_compared: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def damaged_blocks(self) -> list[int]:
        """Blocks that have to be written again."""
        return sorted({finding.block for finding in self.findings if finding.block is not None})


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One object that a marker vouches for."""

    array: str
    layer: int | None
    block: int
    start: int
    stop: int
    digest: str

    def name(self, layout: Layout) -> str:
        """How a person calls it: site or column, layer label, block."""
        site = layout.site_of(self.array)
        layers = site.layers if site else None
        layer = "" if layers is None or self.layer is None else f", layer {layers[self.layer]}"
        return f"{self.array}{layer}, block {self.block}"


def verify(
    root: Root,
    plan: Plan,
    *,
    depth: Depth = "full",
    share: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compares the store with its plan and markers. Reads only; an unfinished store is checked as far as it is written.

    Args:
        root: place of the store.
        plan: of the store.
        depth: `fast`, `sample` or `full`.
        share: of the shards that `sample` decodes; the same ones every time.
        progress: called with (shards done, shards in all).

    Costs one small read per shard (`fast`), or reading everything once with two shards in memory (`full`).
    """
    started = time.perf_counter()
    complete = _is_complete(root, plan)
    findings = list(_metadata_findings(root, plan, complete=complete))
    markers, lost = _markers(root, plan, complete=complete)
    findings += lost
    shards = [shard for marker in markers for shard in _shards(plan.layout, marker)]
    chosen = {shard for shard in shards if depth == "full" or (depth == "sample" and _drawn(shard, share))}
    arrays = {
        name: root.open_array(name, spec)
        for name, spec in array_metadata(plan, complete=complete).items()
        if not name.startswith("documents/")
    }
    compared = 0
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        checks = pool.map(lambda shard: _check_shard(arrays, plan.layout, shard, whole=shard in chosen), shards)
        for done, (finding, count) in enumerate(checks, start=1):
            compared += count
            findings += [finding] if finding else []
            if progress:
                progress(done, len(shards))
    if plan.documents is not None and (complete or has_table(root)):
        findings += _document_findings(root, plan, whole=depth == "full")
    return Report(
        root.url, depth, "complete" if complete else "writing", len(markers), len(shards), compared,
        time.perf_counter() - started, tuple(findings),
    )  # fmt: skip


def _is_complete(root: Root, plan: Plan) -> bool:
    """Whether the store is complete: by its root group, or by its seal where the group is damaged."""
    try:
        return read_status(root, plan) == "complete"
    except CorruptStoreError:
        return root.read(SEAL_KEY) is not None


def _shards(layout: Layout, marker: Marker) -> Iterator[_Shard]:
    """Everything a marker vouches for."""
    for array, digests in marker.checksums.items():
        site = layout.site_of(array)
        for index, digest in enumerate(digests):
            layer = None if site is None or site.layers is None else index
            yield _Shard(array, layer, marker.block, *marker.samples, digest)
    start, stop = marker.samples
    yield _Shard("valid", None, marker.block, start, stop, checksum(np.ones(stop - start, np.uint8)))


def _drawn(shard: _Shard, share: float) -> bool:
    """Whether a shard belongs to the sample: a fair draw that depends on the shard alone."""
    return random.Random(f"{shard.array} {shard.layer} {shard.block}").random() < share  # noqa: S311  no secret


def _check_shard(arrays: dict[str, Any], layout: Layout, shard: _Shard, *, whole: bool) -> tuple[Finding | None, int]:
    """Reads one shard whole, or one chunk of it; the finding, and the bytes that were compared with a checksum."""
    source = arrays[shard.array] if shard.layer is None else arrays[shard.array][shard.layer]
    name = shard.name(layout)
    try:
        with storage_errors("read it"):
            if not whole:
                source[shard.stop - 1 : shard.stop].read().result()
                return None, 0
            values = np.asarray(source[shard.start : shard.stop].read().result())
    except ActstoreError as error:
        return Finding(name, str(error).removesuffix("; run `actstore verify`"), shard.block), 0
    if checksum(values) == shard.digest:
        return None, values.nbytes
    return Finding(name, "the decoded values differ from the commit marker: swapped, stale or edited", shard.block), 0


def _markers(root: Root, plan: Plan, *, complete: bool) -> tuple[list[Marker], list[Finding]]:
    """The readable markers, and what is wrong with the others. A finished store needs one for every block."""
    present = committed_blocks(root)
    expected = set(range(plan.layout.blocks))
    markers: list[Marker] = []
    findings = [
        Finding(marker_key(block), "there is no such block in the plan") for block in sorted(present - expected)
    ]
    for block in sorted(expected if complete else present & expected):
        try:
            marker = read_marker(root, plan, block)
            if tuple(marker.samples) != plan.layout.block_range(block):
                raise CorruptStoreError(f"samples {marker.samples}, the plan has {plan.layout.block_range(block)}")
            markers.append(marker)
        except ActstoreError as error:
            findings.append(Finding(f"marker of block {block}", str(error), block))
    return markers, findings


def _metadata_findings(root: Root, plan: Plan, *, complete: bool) -> Iterator[Finding]:
    """Metadata of group and arrays, assets, manifest and seal, compared with what the plan says."""
    status: Literal["writing", "complete"] = "complete" if complete else "writing"
    nodes = {"zarr.json": [group_metadata(plan, status=status)]}
    final, padded = (array_metadata(plan, complete=shrunk) for shrunk in (True, False))
    for name, spec in final.items():  # sealing may have been stopped when some shapes were final
        nodes[f"{name}/zarr.json"] = [spec] if complete else [padded[name], spec]
    if plan.documents is not None:
        nodes["documents/zarr.json"] = [documents_group()]
    for key, accepted in nodes.items():
        found = root.read(key)
        if found not in [canonical_json(spec) for spec in accepted]:
            yield Finding(key, "is missing" if found is None else "differs from what the plan says")
    for name, digest in plan.assets.items():
        data = root.read(f"assets/{name}", most_bytes=MAX_ASSET_BYTES)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            yield Finding(f"assets/{name}", "is missing" if data is None else "differs from its digest in the plan")
    yield from _label_findings(root, plan)
    if complete:
        yield from _seal_findings(root, plan)


def _label_findings(root: Root, plan: Plan) -> Iterator[Finding]:
    """The layer coordinates, compared with the plan."""
    metadata = array_metadata(plan, complete=True)
    for site in plan.layout.sites:
        if site.layers is None:
            continue
        name = plan.layout.layer_dimension(site)
        try:
            with storage_errors("read it"):
                labels = root.open_array(name, metadata[name]).read().result()
        except ActstoreError as error:
            yield Finding(name, str(error).removesuffix("; run `actstore verify`"))
            continue
        if not np.array_equal(labels, site.layers):
            yield Finding(name, f"holds {np.asarray(labels).tolist()}, the plan has {list(site.layers)}")


def _seal_findings(root: Root, plan: Plan) -> Iterator[Finding]:
    """Manifest and seal of a finished store."""
    manifest, seal = root.read(MANIFEST_KEY, most_bytes=MAX_MANIFEST_BYTES), root.read(SEAL_KEY)
    if manifest is None or seal is None:
        yield Finding(MANIFEST_KEY if manifest is None else SEAL_KEY, "is missing: the store was not sealed to the end")
        return
    try:
        sealed = Seal.from_json(seal, where=SEAL_KEY)
    except CorruptStoreError as error:
        yield Finding(SEAL_KEY, str(error))
        return
    if (sealed.fingerprint, sealed.manifest_sha256) != (plan.fingerprint, hashlib.sha256(manifest).hexdigest()):
        yield Finding(MANIFEST_KEY, "differs from its digest in the seal, or the seal belongs to another plan")


def _document_findings(root: Root, plan: Plan, *, whole: bool) -> Iterator[Finding]:
    """The document table, array by array."""
    data = root.read(TABLE_KEY)
    if data is None:
        yield Finding(TABLE_KEY, "is missing")
        return
    try:
        marker = TableMarker.from_json(data, where=TABLE_KEY)
    except CorruptStoreError as error:
        yield Finding(TABLE_KEY, str(error))
        return
    for name, spec in array_metadata(plan, complete=True).items():
        if not name.startswith("documents/"):
            continue
        array = root.open_array(name, spec)
        try:
            with storage_errors("read it"):
                values = np.asarray((array if whole else array[:1] if array.size else array).read().result())
        except ActstoreError as error:
            yield Finding(name, str(error))
            continue
        if whole and checksum(values) != marker.checksums.get(name.removeprefix("documents/")):
            yield Finding(name, "the values differ from the checksum of the documents marker")
