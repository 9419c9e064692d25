"""Copies a finished store to another place, object by object: folder, bucket and web server in any combination.

What is copied is known from the plan, so that the source need not be listed. Every object is compared on its way with
what vouches for it: rows, norms and columns with their commit markers, documents with their marker, the rest with its
own checksum. Markers follow the rows of their blocks and the root group comes last: a copy that was stopped looks
unfinished, and the same call continues it. What is there already counts as copied where the target has the same marker
for it, and only there.
"""

import dataclasses
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import xxhash

from actstore.commits import Seal, TableMarker
from actstore.compared import check_object, check_own, decoded_values, is_compressed, item_bytes, span_of
from actstore.errors import CorruptStoreError, InputError, PlanMismatchError
from actstore.gather import BLOCKS_TOGETHER, Source
from actstore.kvstore import Root
from actstore.ledger import create_plan, find_plan, lineage, read_asset, stored_generations
from actstore.markers import MANIFEST_KEY, PLAN_KEY, RANGES_KEY, SEAL_KEY, TABLE_KEY, key_in, marker_key
from actstore.metadata import array_metadata, shard_key, table_group
from actstore.reader import check_complete
from actstore.schema import Plan
from actstore.sealing import node_objects, write_manifest
from actstore.shards import CHECKSUM_BYTES
from actstore.verify import MAX_ASSET_BYTES
from actstore.vouchers import Vouchers

AT_ONCE = 16  # objects
MEMORY_BYTES = 1 << 30  # of shards that are being copied; each is held up to three times


@dataclasses.dataclass(frozen=True)
class Copied:
    """What was done. `objects_before` were there already, from a copy that was stopped."""

    source: str
    target: str
    objects: int
    objects_before: int
    bytes_copied: int
    seconds: float


def copy(source: Root, target: Root, *, progress: Callable[[int, int, str], None] | None = None) -> Copied:
    """Copies a finished store, compared on its way. Stopped in any way and called again, it continues.

    Args:
        source: a finished store.
        target: where to; a place for a store, empty or with a part of the same one.
        progress: called with objects done, objects in all, and the rate.

    Costs one request to the source and one to the target for each object, and `MEMORY_BYTES`, or three times a shard.

    Raises:
        StoreNotFoundError: there is no store at the source.
        UnfinishedStoreError: it is not complete.
        PlanMismatchError: another store is at the target, or more was appended to the one that is there. What is there
            and not committed, or by another attempt, is written over.
        CorruptStoreError: an object of the source is missing or damaged; names site, layer and block.
        StorageError: the storage failed, on either side.
    """
    if source.url == target.url:
        raise InputError(f"{source.url} is source and target of a copy; name another target")
    plan, complete = find_plan(source)
    if not complete:
        check_complete(source, plan)
    target.check_writable()
    return _Copy(source, target, plan, progress).run()


class _Copy:
    """One copy under way."""

    def __init__(
        self, source: Root, target: Root, plan: Plan, progress: Callable[[int, int, str], None] | None
    ) -> None:
        self._source, self._target, self._plan, self._progress = source, target, plan, progress
        self._plans = lineage(source, plan)
        self._vouchers = Vouchers(source, plan)
        self._arrays = array_metadata(plan, complete=True)
        self._started = time.perf_counter()
        self._there: set[str] = set()
        self._done = self._before = self._bytes = 0
        self._lock = threading.Lock()
        layout = plan.layout
        self._in_block = sum(site.rows_per_sample for site in layout.sites) * 2 + len(layout.columns) + 1
        tables = [name for name in self._arrays if "/" in name]
        self._all = self._in_block * layout.blocks + sum(len(_cells(self._arrays[name])) for name in tables)

    def run(self) -> Copied:
        """Plans, then nodes and documents, then blocks with their markers, then what says that all is there."""
        self._refuse_other()
        for plan in self._plans:
            create_plan(self._target, plan)
        self._there = set(self._target.keys(""))
        self._target.check_space(self._missing_bytes())
        self._nodes()
        for plan in self._plans:
            self._documents(plan)
        self._blocks()
        for plan in self._plans:
            self._seal(plan)
        self._small("zarr.json")
        seconds = time.perf_counter() - self._started
        return Copied(
            self._source.url, self._target.url, self._done - self._before, self._before, self._bytes, seconds
        )  # fmt: skip

    def _refuse_other(self) -> None:
        """Refuses a target that would become older, and one that was finished with other rows.

        Raises:
            PlanMismatchError: says which.
        """
        there = stored_generations(self._target) if self._target.exists(PLAN_KEY) else 0
        if there > len(self._plans):
            raise PlanMismatchError(
                f"{self._target.url} has {there} generations, expected at most the {len(self._plans)} of "
                f"{self._source.url}: more was appended to it, which a copy would hide; choose another target"
            )
        seals = [key_in(plan.generation, SEAL_KEY) for plan in self._plans]
        for key, ours, theirs in zip(seals, self._source.read_all(seals), self._target.read_all(seals), strict=True):
            if theirs not in (None, ours):
                raise PlanMismatchError(
                    f"{self._target.url} is finished, and its {key} is not that of {self._source.url}: it is another "
                    "run; choose another target"
                )

    def _missing_bytes(self) -> int:
        """Bytes of activations that are not there yet."""
        layout = self._plan.layout
        return sum(
            layout.block_samples * site.row_bytes
            for site in layout.sites
            for layer, block in itertools.product(range(site.rows_per_sample), range(layout.blocks))
            if shard_key(site, layer, block) not in self._there
        )

    def _nodes(self) -> None:
        """Metadata of arrays and groups, labels of layers, assets."""
        self._target.write_all(node_objects(self._plan, complete=True))
        for site in self._plan.layout.sites:
            if site.layers is not None:
                name = self._plan.layout.layer_dimension(site)
                for cell in _cells(self._arrays[name]):
                    data = self._object(f"{name}/c/{cell}")
                    check_own(data, f"{name} of {self._source.url}")
                    self._target.write(f"{name}/c/{cell}", data)
        for name in self._plans[0].assets:
            self._target.write(f"assets/{name}", read_asset(self._source, self._plans[0], name))

    def _documents(self, plan: Plan) -> None:
        """The documents of one generation and their marker, array by array."""
        key, group = key_in(plan.generation, TABLE_KEY), table_group(plan.generation)
        if plan.documents is None:
            return
        data, there = self._required(key), self._target.read(key)
        marker = TableMarker.from_json(data, where=f"{self._source.url}/{key}")
        if there not in (None, data):
            raise PlanMismatchError(
                f"{self._target.url} holds other documents of the same sizes; choose another target"
            )
        with ThreadPoolExecutor(AT_ONCE, "actstore-copy") as pool:
            tables = [name for name in self._arrays if name.startswith(f"{group}/")]
            for _ in pool.map(
                lambda name: self._table(
                    name, marker.checksums.get(name.removeprefix(f"{group}/")), committed=there is not None
                ),
                tables,
            ):
                pass
        self._small(key)

    def _table(self, name: str, digest: str | None, *, committed: bool) -> None:
        """One array of documents, unless the target has their marker and all of it."""
        keys = [f"{name}/c/{cell}" for cell in _cells(self._arrays[name])]
        if committed and self._there.issuperset(keys):
            self._count(len(keys), before=True)
            return
        found, metadata = xxhash.xxh3_128(), self._arrays[name]
        for key in keys:
            data = self._object(key)
            if is_compressed(metadata):
                found.update(decoded_values(name, metadata, key, data, where=f"{key} of {self._source.url}"))
            else:
                check_own(data, f"{key} of {self._source.url}")
                span = span_of(metadata, key)
                found.update(data[: (span.stop - span.start) * item_bytes(metadata)])
            self._target.write(key, data)
            self._count(1, size=len(data))
        if found.hexdigest() != digest:
            raise CorruptStoreError(
                f"{name} of {self._source.url} differs from the checksum of its marker; run `actstore verify` there"
            )

    def _blocks(self) -> None:
        """All blocks in order, many objects at once; the markers of each when its objects are there."""
        layout = self._plan.layout
        largest = max(site.row_bytes for site in layout.sites) * layout.block_samples
        workers = max(min(AT_ONCE, MEMORY_BYTES // (3 * largest)), 1)
        pending: deque[tuple[int, list[Future[None]]]] = deque()
        markers: list[Future[None]] = []
        flying, committed = 0, frozenset[int]()
        with (
            ThreadPoolExecutor(AT_ONCE, "actstore-markers") as small,
            ThreadPoolExecutor(workers, "actstore-copy") as pool,
        ):
            try:
                for block in range(layout.blocks):
                    if block % BLOCKS_TOGETHER == 0:
                        together = range(block, min(block + BLOCKS_TOGETHER, layout.blocks))
                        self._vouchers.prepare(together)
                        committed = self._committed(together)
                    tasks = [pool.submit(self._one, *each, block in committed) for each in self._objects_of(block)]
                    pending.append((block, tasks))
                    flying += len(tasks)
                    while pending and (flying > max(4 * AT_ONCE, self._in_block) or block == layout.blocks - 1):
                        number, tasks = pending.popleft()
                        flying -= len(tasks)
                        for task in tasks:
                            task.result()
                        markers += [small.submit(self._small, key) for key in self._markers_of(number)]
                for marker in markers:
                    marker.result()
            except BaseException:
                for task in [*markers, *(task for _, tasks in pending for task in tasks)]:
                    task.cancel()
                raise

    def _markers_of(self, block: int) -> list[str]:
        return [marker_key(block, plan.generation) for plan in self._plans if block in plan.blocks]

    def _committed(self, blocks: range) -> frozenset[int]:
        """Those of the blocks that the target has with all their markers.

        A marker that differs is removed: it vouches for rows that are written over.
        """
        keys = [key for block in blocks for key in self._markers_of(block) if key in self._there]
        pairs = zip(keys, self._source.read_all(keys), self._target.read_all(keys), strict=True)
        same = {key: ours == theirs for key, ours, theirs in pairs}
        for key in keys:
            if not same[key]:
                self._target.delete(key)
        return frozenset(block for block in blocks if all(same.get(key) for key in self._markers_of(block)))

    def _objects_of(self, block: int) -> Iterator[tuple[str, str, int, int]]:
        """Array, key, layer and block of each object of a block."""
        layout = self._plan.layout
        for name in [*self._arrays]:
            site = layout.site_of(name)
            if site is None:
                if name == "valid" or any(column.name == name for column in layout.columns):
                    yield name, f"{name}/c/{block}", 0, block
                continue
            for layer in range(site.rows_per_sample):
                flat = f"{name}/c/{block}" if site.layers is None else f"{name}/c/{layer}/{block}"
                yield name, shard_key(site, layer, block) if site.name == name else flat, layer, block

    def _one(self, name: str, key: str, layer: int, block: int, committed: bool) -> None:  # noqa: FBT001  of a task
        """Copies one object; read again once if it is not what its marker says: a bit may flip on the way."""
        if committed and key in self._there:
            self._count(1, before=True)
            return
        source = Source.open(self._source, self._plan, name, vouchers=None)
        try:
            data = self._object(key)
            check_object(source, self._vouchers, self._arrays[name], data, layer=layer, block=block)
        except CorruptStoreError:
            data = self._object(key)
            check_object(source, self._vouchers, self._arrays[name], data, layer=layer, block=block)
        self._target.write(key, data)
        self._count(1, size=len(data))

    def _object(self, key: str) -> bytes:
        """An object of the source. One request where it is not local.

        Raises:
            CorruptStoreError: it is missing.
        """
        name = key.rpartition("/c/")[0]
        metadata = self._arrays[name]
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        size = math.prod(shape) * item_bytes(metadata)
        sharded = metadata["codecs"][0]["name"] == "sharding_indexed"
        if is_compressed(metadata):
            return self._required(key, most_bytes=2 * size + (1 << 20))
        chunks = math.prod(shape) // math.prod(metadata["codecs"][0]["configuration"]["chunk_shape"]) if sharded else 1
        own = CHECKSUM_BYTES * (chunks if self._plan.layout.codec == "crc32c" or not sharded else 0)
        size += own + (16 * chunks + CHECKSUM_BYTES if sharded else 0)
        doing = f"read {key} of {self._source.url}"
        found = self._source.begin_range(doing, key, slice(0, size)).result()  # exactly, however large it is
        if found.state != "value":
            raise CorruptStoreError(f"{self._source.url}/{key} is missing; run `actstore verify` there")
        return bytes(found.value)

    def _required(self, key: str, *, most_bytes: int = MAX_ASSET_BYTES) -> bytes:
        found = self._source.read(key, most_bytes=most_bytes)
        if found is None:
            raise CorruptStoreError(f"{self._source.url}/{key} is missing; run `actstore verify` there")
        return found

    def _seal(self, plan: Plan) -> None:
        """Manifest, ranges and seal of a generation. The manifest is made of the markers: it may be larger than memory.

        Raises:
            CorruptStoreError: it is not the one of the source's seal.
        """
        seal, where = (key_in(plan.generation, key) for key in (SEAL_KEY, MANIFEST_KEY))
        sealed = Seal.from_json(self._required(seal), where=f"{self._source.url}/{seal}")
        digest, _ = write_manifest(self._target, plan)
        if digest != sealed.manifest_sha256:
            raise CorruptStoreError(
                f"{self._source.url}/{where} is not made of the markers that are there; run `actstore verify` there"
            )
        for key in (RANGES_KEY, SEAL_KEY):
            self._small(key_in(plan.generation, key))

    def _small(self, key: str) -> None:
        """Copies an object that nothing vouches for but what is above it, unless the same is there."""
        data = self._source.read(key, most_bytes=MAX_ASSET_BYTES)
        if data is None and not key.endswith(RANGES_KEY.rpartition("/")[2]):  # the oldest stores have none
            data = self._required(key)
        if data is not None and not (key in self._there and self._target.read(key, most_bytes=MAX_ASSET_BYTES) == data):
            self._target.write(key, data)

    def _count(self, objects: int, *, size: int = 0, before: bool = False) -> None:
        with self._lock:
            self._done += objects
            self._before += objects * before
            self._bytes += size
            if self._progress is not None:
                rate = self._bytes / max(time.perf_counter() - self._started, 1e-9)
                self._progress(self._done, self._all, f"{rate / 1e6:,.1f} MB/s")


def _cells(metadata: dict[str, Any]) -> list[str]:
    """The cells of an array's grid, as in its keys."""
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return ["/".join(map(str, cell)) for cell in itertools.product(
        *(range(math.ceil(size / step)) for size, step in zip(shape, chunk, strict=True))
    )]  # fmt: skip
