"""Integrity: compares what is stored with what the plan and the commit markers say, shard by shard.

Three depths. `fast`: every shard is there with a sound index, which pins its length (one small read per shard).
`sample`: that, and a share of the shards decoded and compared with their checksums. `full`: all of them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from actstore.commits import Manifest, Marker, Seal, TableMarker
from actstore.errors import ActstoreError, CorruptStoreError
from actstore.generations import first_layer
from actstore.kvstore import Root
from actstore.layout import Layout
from actstore.ledger import lineage, read_status
from actstore.markers import (
    MANIFEST_KEY,
    MARKER_FOLDER,
    RANGES_KEY,
    SEAL_KEY,
    TABLE_KEY,
    checksum,
    committed_blocks,
    has_table,
    key_in,
    marker_key,
    read_marker,
)
from actstore.metadata import array_metadata, documents_group, group_metadata, table_group, table_groups
from actstore.objects import Objects
from actstore.schema import Plan
from actstore.shards import chunk_digests
from actstore.untrusted import MAX_DOCUMENT_BYTES, canonical_json

Depth = Literal["fast", "sample", "full"]
MAX_ASSET_BYTES = 256 << 20
MOST_MISSING = 1000  # markers that are named one by one
SHARDS_AT_ONCE = 2
REMOTE_AT_ONCE = 4  # each with a piece in memory
REQUESTS_AT_ONCE = 16  # of remote storage, where only indices and markers are read
PIECE_BYTES = 64 << 20  # of each is decoded at once


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `block` is None for what belongs to the store as a whole.

    `generation` is that of the plan which vouches for it: 1, unless the store was appended to.
    """

    what: str
    problem: str
    block: int | None = None
    generation: int = 1


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
    chunks: str
    generation: int
    range: tuple[int, int] | None = None

    def name(self, layout: Layout) -> str:
        """How a person calls it: site or column, layer label, block."""
        site = layout.site_of(self.array)
        layer = "" if site is None or self.layer is None else site.layer_text(self.layer)
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
    plans = lineage(root, plan)
    complete = _is_complete(root, plan)
    findings = list(_metadata_findings(root, plans, complete=complete))
    markers: list[tuple[Plan, Marker]] = []
    for each in plans:
        found, lost = _markers(root, each, complete=complete or each is not plan)
        markers += [(each, marker) for marker in found]
        findings += lost
    shards = [shard for each, marker in markers for shard in _shards(each, marker)]
    chosen = {shard for shard in shards if depth == "full" or (depth == "sample" and _drawn(shard, share))}
    arrays = {
        name: Objects.of(root, name, spec)
        for name, spec in array_metadata(plan, complete=False).items()  # padded: a block of an addition may be short
        if "/" not in name
    }
    compared = 0
    remote = REQUESTS_AT_ONCE if depth == "fast" else REMOTE_AT_ONCE
    with ThreadPoolExecutor(SHARDS_AT_ONCE if root.is_local else remote) as pool:
        checks = pool.map(lambda shard: _check_shard(arrays, plan.layout, shard, whole=shard in chosen), shards)
        for done, (finding, count) in enumerate(checks, start=1):
            compared += count
            findings += [finding] if finding else []
            if progress:
                progress(done, len(shards))
    for each in plans:
        if each.documents is not None and (complete or each is not plan or has_table(root, each)):
            findings += _document_findings(root, each, whole=depth == "full")
    return Report(
        root.url, depth, "complete" if complete else "writing", len(markers), len(shards), compared,
        time.perf_counter() - started, tuple(findings),
    )  # fmt: skip


def _is_complete(root: Root, plan: Plan) -> bool:
    """Whether the store is complete: by its root group, or by its seal where the group is damaged."""
    try:
        return read_status(root, plan) == "complete"
    except CorruptStoreError:
        return root.read(key_in(plan.generation, SEAL_KEY)) is not None


def _shards(plan: Plan, marker: Marker) -> Iterator[_Shard]:
    """Everything a marker vouches for."""
    for array, digests in marker.checksums.items():
        site = plan.layout.site_of(array)
        first = first_layer(plan, site.name) if site else 0
        chunks = marker.chunks.get(array) or [""] * len(digests)
        for index, (digest, sums) in enumerate(zip(digests, chunks, strict=True), start=first):
            layer = None if site is None or site.layers is None else index
            found = marker.ranges.get(array)
            yield _Shard(array, layer, marker.block, *marker.samples, digest, sums, plan.generation, found)
    start, stop = marker.samples
    digest = checksum(np.ones(stop - start, np.uint8))
    yield _Shard("valid", None, marker.block, start, stop, digest, "", plan.generation)


def _drawn(shard: _Shard, share: float) -> bool:
    """Whether a shard belongs to the sample: a fair draw that depends on the shard alone."""
    return random.Random(f"{shard.array} {shard.layer} {shard.block}").random() < share  # noqa: S311  no secret


def _check_shard(arrays: dict[str, Any], layout: Layout, shard: _Shard, *, whole: bool) -> tuple[Finding | None, int]:
    """Reads one shard whole, or one chunk of it; the finding, and the bytes that were compared with a checksum."""
    objects, name = arrays[shard.array], shard.name(layout)
    layer = () if shard.layer is None else (shard.layer,)
    sizes = [site.row_bytes * layout.chunk_samples for site in layout.sites if site.name == shard.array]
    step = max(PIECE_BYTES // sizes[0], 1) * layout.chunk_samples if sizes else layout.block_samples
    try:
        if not whole:
            objects.begin("read it", *layer, slice(shard.stop - 1, shard.stop)).result()
            return None, 0
        size = layout.chunk_samples if shard.chunks else 0
        found = _read(objects, shard.start, shard.stop, step, *layer, chunk_samples=size)
    except ActstoreError as error:
        problem = str(error).removesuffix("; run `actstore verify`")
        return Finding(name, problem, shard.block, shard.generation), 0
    if found == (shard.digest, shard.chunks, shard.range or found.range):
        width = objects.array.shape[-1] if sizes else 1
        return None, (shard.stop - shard.start) * width * objects.array.dtype.numpy_dtype.itemsize
    problem = "the decoded values differ from the commit marker: swapped, stale or edited"
    if found.digest == shard.digest:
        problem = f"the commit marker has wrong {'ranges' if found.chunks == shard.chunks else 'digests of chunks'}"
    return Finding(name, problem, shard.block, shard.generation), 0


class _Found(NamedTuple):
    """What stored values are: their checksum, those of their chunks, lowest and highest (0 and 0 where not asked)."""

    digest: str
    chunks: str
    range: tuple[int, int]


def _read(objects: Objects, start: int, stop: int, step: int, *layer: int, chunk_samples: int = 0) -> _Found:
    """What values `start` to `stop - 1` are, read in pieces that end at multiples of `step`.

    Their chunks are looked at where `chunk_samples` is given, and else the range of whole numbers.
    """
    found, chunks, bounds = xxhash.xxh3_128(), "", list[int]()
    while start < stop:
        end = min((start // step + 1) * step, stop)
        values = np.ascontiguousarray(objects.begin("read it", *layer, slice(start, end)).result())
        found.update(values.view(np.uint8).data)
        chunks += chunk_digests(values, start=start, chunk_samples=chunk_samples) if chunk_samples else ""
        bounds += [int(values.min()), int(values.max())] if values.dtype.kind in "iu" and not chunk_samples else []
        start = end
    return _Found(found.hexdigest(), chunks, (min(bounds, default=0), max(bounds, default=0)))


def _markers(root: Root, plan: Plan, *, complete: bool) -> tuple[list[Marker], list[Finding]]:
    """The readable markers, and what is wrong with the others. A finished store needs one for every block."""
    present = committed_blocks(root, plan)
    markers: list[Marker] = []
    findings = [
        Finding(marker_key(block, plan.generation), "there is no such block in the plan", None, plan.generation)
        for block in sorted(present)
        if block not in plan.blocks
    ]
    missing = (block for block in plan.blocks if block not in present) if complete else iter(())
    wanted = [*(block for block in present if block in plan.blocks), *itertools.islice(missing, MOST_MISSING)]
    if next(missing, None) is not None:
        problem = f"of {len(plan.blocks):,} blocks only {len(wanted) - MOST_MISSING:,} have a marker"
        findings.append(Finding(MARKER_FOLDER, problem, None, plan.generation))

    def look(block: int) -> Marker | Finding:
        try:
            return read_marker(root, plan, block)
        except ActstoreError as error:
            return Finding(f"marker of block {block}", str(error), block, plan.generation)

    with ThreadPoolExecutor(1 if root.is_local else REQUESTS_AT_ONCE) as pool:
        for found in pool.map(look, sorted(wanted)):
            if isinstance(found, Marker):
                markers.append(found)
            else:
                findings.append(found)
    return markers, findings


def _metadata_findings(root: Root, plans: tuple[Plan, ...], *, complete: bool) -> Iterator[Finding]:
    """Metadata of groups and arrays, assets, manifests and seals, compared with what the plans say.

    Where the newest generation is being written, what is stored is that of the one before.
    """
    plan = plans[-1] if complete or len(plans) == 1 else plans[-2]
    complete = complete or len(plans) > 1
    status: Literal["writing", "complete"] = "complete" if complete else "writing"
    nodes = {"zarr.json": [group_metadata(plan, status=status)]}
    final, padded = (array_metadata(plan, complete=shrunk) for shrunk in (True, False))
    later = array_metadata(plans[-1], complete=True)
    for name, spec in final.items():  # sealing may have been stopped when some shapes were final
        nodes[f"{name}/zarr.json"] = [spec, later.get(name, spec)] if complete else [padded[name], spec]
    for group in table_groups(plan):
        nodes[f"{group}/zarr.json"] = [documents_group()]
    for key, accepted in nodes.items():
        try:
            stored = root.read(key)
        except ActstoreError as error:
            yield Finding(key, str(error))
            continue
        if stored not in [canonical_json(spec) for spec in accepted]:
            yield Finding(key, "is missing" if stored is None else "differs from what the plan says")
    for name, digest in plans[0].assets.items():
        try:
            found = root.digest(f"assets/{name}", most_bytes=MAX_ASSET_BYTES)
        except ActstoreError as error:
            yield Finding(f"assets/{name}", str(error))
            continue
        if found != digest:
            yield Finding(f"assets/{name}", "is missing" if found is None else "differs from its digest in the plan")
    if not complete and root.read(SEAL_KEY) is not None:
        yield Finding("zarr.json", "says that the store is being written, and the store is sealed")
    yield from _label_findings(root, plan)
    for sealed in plans[: plan.generation] if complete else ():
        yield from _seal_findings(root, sealed)


def _label_findings(root: Root, plan: Plan) -> Iterator[Finding]:
    """The layer coordinates, compared with the plan."""
    metadata = array_metadata(plan, complete=True)
    for site in plan.layout.sites:
        if site.layers is None:
            continue
        name = plan.layout.layer_dimension(site)
        try:
            labels = Objects.of(root, name, metadata[name]).begin("read it").result()
        except ActstoreError as error:
            yield Finding(name, str(error).removesuffix("; run `actstore verify`"))
            continue
        if not np.array_equal(labels, site.layers):
            yield Finding(name, f"holds {np.asarray(labels).tolist()[:20]}, the plan has {list(site.layers)[:20]}")


def _seal_findings(root: Root, plan: Plan) -> Iterator[Finding]:
    """Manifest and seal of a finished generation."""
    manifest_key, seal_key, ranges_key = (key_in(plan.generation, key) for key in (MANIFEST_KEY, SEAL_KEY, RANGES_KEY))
    finding = functools.partial(Finding, generation=plan.generation)
    blocks = committed_blocks(root, plan)
    most = 1000 + sum(root.size(marker_key(block, plan.generation)) + 1 for block in blocks)  # it is the markers
    try:
        manifest, seal = root.digest(manifest_key, most_bytes=most), root.read(seal_key)
    except CorruptStoreError as error:
        yield finding(SEAL_KEY if seal_key in str(error) else manifest_key, str(error))
        return
    if manifest is None or seal is None:
        yield finding(manifest_key if manifest is None else seal_key, "is missing: the store was not sealed to the end")
        return
    try:
        sealed = Seal.from_json(seal, where=seal_key)
    except CorruptStoreError as error:
        yield finding(seal_key, str(error))
        return
    if (sealed.fingerprint, sealed.manifest_sha256) != (plan.fingerprint, manifest):
        yield finding(manifest_key, "differs from its digest in the seal, or the seal belongs to another plan")
        return
    try:
        sound = root.digest(ranges_key, most_bytes=MAX_DOCUMENT_BYTES) == sealed.ranges_sha256
    except CorruptStoreError:
        sound = False
    if not sound:
        yield finding(ranges_key, "differs from its digest in the seal, or is missing")
    if len(blocks) >= len(plan.blocks):  # else a hostile plan may name millions; a missing marker is found elsewhere
        yield from _resealed_findings(root, plan, manifest)


def _resealed_findings(root: Root, plan: Plan, sealed: str) -> Iterator[Finding]:
    """Markers that are not those of the manifest, whose digest is `sealed`: the manifest is its markers, joined."""
    found = hashlib.sha256()
    markers = (root.read(marker_key(block, plan.generation)) or b"" for block in plan.blocks)
    try:
        for piece in Manifest.pieces(plan.fingerprint, markers):
            found.update(piece)
        if found.hexdigest() == sealed:
            return
        manifest = root.read(key_in(plan.generation, MANIFEST_KEY), most_bytes=MAX_ASSET_BYTES) or b""
    except ActstoreError:
        return  # a marker that cannot be read is a finding of its own
    for block in plan.blocks:
        with contextlib.suppress(ActstoreError):  # so is one that is damaged
            read_marker(root, plan, block)
            if (root.read(marker_key(block, plan.generation)) or b"") not in manifest:
                problem = "differs from the manifest: edited, or of another attempt"
                yield Finding(f"marker of block {block}", problem, block, plan.generation)


def _document_findings(root: Root, plan: Plan, *, whole: bool) -> Iterator[Finding]:
    """The documents of a generation, array by array."""
    key, group = key_in(plan.generation, TABLE_KEY), table_group(plan.generation)
    finding = functools.partial(Finding, generation=plan.generation)
    data = root.read(key)
    if data is None:
        yield finding(key, "is missing")
        return
    try:
        marker = TableMarker.from_json(data, where=key)
    except CorruptStoreError as error:
        yield finding(key, str(error))
        return
    arrays = {name: spec for name, spec in array_metadata(plan, complete=True).items() if name.startswith(f"{group}/")}
    if marker.fingerprint != plan.fingerprint or {f"{group}/{name}" for name in marker.checksums} != set(arrays):
        yield finding(key, "is of another plan, or vouches for other arrays")
        return
    for name, spec in arrays.items():
        objects = Objects.of(root, name, spec)
        (size,), (chunk,) = objects.array.shape, objects.shape
        try:
            digest = _read(objects, 0, size if whole else min(size, 1), chunk).digest
        except ActstoreError as error:
            yield finding(name, str(error))
            continue
        if whole and digest != marker.checksums.get(name.removeprefix(f"{group}/")):
            yield finding(name, "the values differ from the checksum of the documents marker")
