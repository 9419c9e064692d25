"""Copies a finished store to another place, object by object: folder, bucket and web server in any combination.

What is copied is known from the plan, so that the source need not be listed. Every object is compared on its way with
what vouches for it: rows, norms and columns with their commit markers, documents with their marker, the rest with its
own checksum. Markers follow the rows of their blocks and the root group comes last: a copy that was stopped looks
unfinished, and the same call continues it. What is there already counts as copied where the target has the same marker
for it, and only there.
"""

import contextlib
import dataclasses
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash
from crc32c import crc32c
from jaxtyping import Shaped, UInt8

from actstore.commits import Seal, TableMarker
from actstore.errors import CorruptStoreError, InputError, PlanMismatchError
from actstore.gather import BLOCKS_TOGETHER, Source, compare, gather
from actstore.kvstore import Root
from actstore.ledger import create_plan, find_plan, lineage, read_asset, stored_generations
from actstore.markers import MANIFEST_KEY, PLAN_KEY, RANGES_KEY, SEAL_KEY, TABLE_KEY, key_in, marker_key
from actstore.metadata import array_metadata, shard_key, table_group
from actstore.objects import Objects
from actstore.reader import check_complete
from actstore.schema import Plan
from actstore.sealing import node_objects, write_manifest
from actstore.shards import CHECKSUM_BYTES, packed_index
from actstore.verify import MAX_ASSET_BYTES
from actstore.vouchers import Vouchers

AT_ONCE = 16  # objects
MEMORY_BYTES = 1 << 30  # of shards that are being copied; each is held up to three times
PIECE_SAMPLES = 1 << 14  # of a compressed shard, decoded at once


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
                    _own_checksum(data, f"{name} of {self._source.url}")
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
            if _compressed(metadata):
                found.update(_values(name, metadata, key, data, where=f"{key} of {self._source.url}"))
            else:
                _own_checksum(data, f"{key} of {self._source.url}")
                span = _span(metadata, key)
                found.update(data[: (span.stop - span.start) * _itemsize(metadata)])
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
        source = Source.open(self._source, self._plan, name, vouchers=self._vouchers)
        try:
            data = self._object(key)
            self._check(source, data, layer, block)
        except CorruptStoreError:
            data = self._object(key)
            self._check(source, data, layer, block)
        self._target.write(key, data)
        self._count(1, size=len(data))

    def _check(self, source: Source, data: bytes, layer: int, block: int) -> None:
        """Compares an object with what its block's markers say.

        Raises:
            CorruptStoreError: it differs.
        """
        layout = self._plan.layout
        start, stop = layout.block_range(block)
        if _compressed(self._arrays[source.name]):
            _decode(source, self._arrays[source.name], data, layer, start, stop)
            return
        where = source.shard(layer, start)
        chunk = source.chunk_samples * source.sample_bytes
        checksum = 0 if source.is_site and layout.codec == "none" else CHECKSUM_BYTES
        whole: UInt8[np.ndarray, " byte"] = np.frombuffer(data, np.uint8)
        count = layout.block_samples // source.chunk_samples
        if len(whole) < count * (chunk + checksum):
            raise CorruptStoreError(f"{where} has {len(whole):,} bytes, too few for its rows; run `actstore verify`")
        for number in range(count):
            first = start + number * source.chunk_samples
            part = whole[number * (chunk + checksum) : (number + 1) * (chunk + checksum)]
            if checksum:
                _own_checksum(part.data, where)
            if first < stop and source.name != "valid":
                rows: Shaped[np.ndarray, "_"] = part[:chunk].view(source.array.dtype.numpy_dtype)
                rows = rows.reshape(source.chunk_samples, *source.array.shape[-1:] * source.is_site)
                compare(source, self._vouchers, layer, first, rows[: stop - first])
        if not source.is_site:
            return
        length = chunk + checksum
        index = packed_index([number for place in range(count) for number in (place * length, length)])
        if whole[count * length :].tobytes() != index:
            raise CorruptStoreError(f"{where} has an index that is not that of its chunks; run `actstore verify`")

    def _object(self, key: str) -> bytes:
        """An object of the source. One request where it is not local.

        Raises:
            CorruptStoreError: it is missing.
        """
        name = key.rpartition("/c/")[0]
        metadata = self._arrays[name]
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        size = math.prod(shape) * _itemsize(metadata)
        sharded = metadata["codecs"][0]["name"] == "sharding_indexed"
        if _compressed(metadata):
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


def _decode(source: Source, metadata: dict[str, Any], data: bytes, layer: int, start: int, stop: int) -> None:
    """Decodes a compressed shard out of memory, some chunks at a time, and compares them."""
    name, layout = source.name, source.layout
    site = layout.site(name)
    step = max(PIECE_SAMPLES // layout.chunk_samples, 1) * layout.chunk_samples
    with _in_memory(name, metadata, shard_key(site, layer, start // layout.block_samples), data) as objects:
        held = dataclasses.replace(source, objects=objects)
        for first in range(start, stop, step):
            samples = range(first, min(first + step, stop))
            gather(held, [layer], samples, np.empty((1, len(samples), site.width), site.dtype))


def _values(name: str, metadata: dict[str, Any], key: str, data: bytes, *, where: str) -> memoryview:
    """The values of a compressed object of documents, decoded out of memory.

    Raises:
        CorruptStoreError: it is damaged.
    """
    try:
        with _in_memory(name, metadata, key, data) as objects:
            values = objects.begin(f"decode {key}", _span(metadata, key)).result()
    except CorruptStoreError:
        raise CorruptStoreError(f"{where} is damaged: its values cannot be decoded; run `actstore verify`") from None
    return np.ascontiguousarray(values).view(np.uint8).data


@contextlib.contextmanager
def _in_memory(name: str, metadata: dict[str, Any], key: str, data: bytes) -> Iterator[Objects]:
    """An array of which one object is there, in memory, for as long as it is decoded."""
    memory = Root.of(f"memory://copies/{id(data)}.acts.zarr")  # no other object has this number while it is there
    memory.write(key, data)
    try:
        yield Objects.of(memory, name, metadata)
    finally:
        memory.delete(key)


def _span(metadata: dict[str, Any], key: str) -> slice:
    """The values of a flat array that one of its objects holds."""
    (size,), (chunk,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    first = int(key.rpartition("/")[2]) * chunk
    return slice(first, min(first + chunk, size))


def _compressed(metadata: dict[str, Any]) -> bool:
    """Whether the bytes of an array's objects are not those of its values."""
    inner = metadata["codecs"][0].get("configuration", {}).get("codecs", [])
    return any(codec["name"] == "zstd" for codec in inner)


def _own_checksum(data: Any, where: str) -> None:
    """Compares bytes with the CRC-32C that follows them.

    Raises:
        CorruptStoreError: they differ.
    """
    view = memoryview(data)
    if crc32c(view[:-CHECKSUM_BYTES]) != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
        raise CorruptStoreError(f"{where} differs from its own checksum; run `actstore verify`")


def _cells(metadata: dict[str, Any]) -> list[str]:
    """The cells of an array's grid, as in its keys."""
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return ["/".join(map(str, cell)) for cell in itertools.product(
        *(range(math.ceil(size / step)) for size, step in zip(shape, chunk, strict=True))
    )]  # fmt: skip


def _itemsize(metadata: dict[str, Any]) -> int:
    return 2 if metadata["data_type"] == "bfloat16" else int(np.dtype(metadata["data_type"]).itemsize)
