"""Reads chosen rows: every chunk that holds one is read once, whole, and compared with its commit marker.

A chunk whose rows are not those that were committed is an error, wherever it comes from: a swapped or stale shard is
sound in itself, only the marker knows better.
"""

import contextlib
import dataclasses
import functools
import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64, Shaped

from actstore.errors import CorruptStoreError
from actstore.kvstore import Operation, Root, refuse_fork
from actstore.layout import Layout
from actstore.markers import checksum
from actstore.metadata import array_metadata
from actstore.moments import as_integers
from actstore.objects import Objects
from actstore.ranged import RangedRows, Reading
from actstore.schema import Plan
from actstore.shards import chunk_digests
from actstore.vouchers import Vouchers

REMOTE_FLIGHT_BYTES = 256 << 20  # 512 chunks of 512 KiB, or two whole shards: requests take 10 to 100 ms
REMOTE_STRETCH_BYTES = 128 << 20  # a whole shard in one request
BLOCKS_TOGETHER = 64  # whose markers are read at once
FLIGHT_BYTES = 16 << 20  # of chunks being read: 32 of 512 KiB for 16 threads; more costs caches more than it hides
STRETCH_BYTES = 4 << 20  # of neighbouring chunks that are read at once
REMEDY = ", then `actstore repair`"

Samples: TypeAlias = range | Int64[np.ndarray, " row"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A stored array of a site, of its norms, or of a column. Without `vouchers` nothing is compared."""

    objects: Objects
    name: str
    layout: Layout
    url: str
    vouchers: Vouchers | None

    @classmethod
    def open(cls, root: Root, plan: Plan, name: str, *, vouchers: Vouchers | None) -> "Source":
        """The array `name` with the shape of a finished store. Costs no request."""
        objects = Objects.of(root, name, array_metadata(plan, complete=True)[name])
        return cls(objects, name, plan.layout, root.url, vouchers)

    @property
    def array(self) -> Any:
        """TensorStore's view of it, for its shape and dtype."""
        return self.objects.array

    @functools.cached_property
    def is_site(self) -> bool:
        """Whether it holds activations; norms and columns are not sharded."""
        return any(site.name == self.name for site in self.layout.sites)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Labels along its layer axis; None where it has none."""
        site = self.layout.site_of(self.name)
        return site.layers if site else None

    @functools.cached_property
    def chunk_samples(self) -> int:
        """Samples that are read and compared together: a chunk of a site, a whole block of norms and columns."""
        return self.layout.chunk_samples if self.is_site else self.layout.block_samples

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of one layer."""
        width = self.array.shape[-1] if self.is_site else 1
        return width * self.array.dtype.numpy_dtype.itemsize

    def shard(self, layer: int, sample: int) -> str:
        """How a person calls the shard that holds a sample: array, layer label, block, store."""
        site = self.layout.site_of(self.name)
        label = site.layer_text(layer) if site else ""
        return f"{self.name}{label}, block {sample // self.layout.block_samples} of {self.url}"

    def begin(
        self, layer: int, start: int, stop: int, values: Shaped[np.ndarray, "sample *stored"]
    ) -> Operation[Any] | Reading:
        """Begins to read samples `start` to `stop - 1` of one layer, whole chunks of one block, into `values`."""
        if self._ranged is not None:
            with contextlib.suppress(CorruptStoreError):  # of a marker: said when it is compared
                reading = self._ranged.begin(self._doing(layer, start), layer, start, stop, values)
                if reading is not None:
                    return reading
        return self.begin_usually(layer, start, stop, values)

    def begin_usually(
        self, layer: int, start: int, stop: int, values: Shaped[np.ndarray, "sample *stored"]
    ) -> Operation[Any]:
        """The same through TensorStore, as any store can be read; its errors say what is wrong with an object."""
        span = slice(start, stop)
        selection = (span,) if self.layers is None else (layer, span)
        return self.objects.begin_into(self._doing(layer, start), values, *selection)

    @property
    def flight_bytes(self) -> int:
        """Of chunks that are being read at once."""
        return FLIGHT_BYTES if self.objects.root.is_local else REMOTE_FLIGHT_BYTES

    @property
    def stretch_bytes(self) -> int:
        """Of neighbouring chunks that are read at once."""
        return STRETCH_BYTES if self.objects.root.is_local else REMOTE_STRETCH_BYTES

    def prepare(self, blocks: Sequence[int]) -> None:
        """Reads what is needed to compare rows of some blocks, if that is faster than one after the other."""
        if self.vouchers is not None:
            self.vouchers.prepare(blocks)

    @functools.cached_property
    def _ranged(self) -> RangedRows | None:
        """Ranges of objects, where these are not files; what they give has to be compared."""
        root, item_bytes = self.objects.root, self.array.dtype.numpy_dtype.itemsize
        if root.is_local or self.vouchers is None:
            return None
        return RangedRows(root, self.layout, self.name, self.vouchers, item_bytes=item_bytes)

    def _doing(self, layer: int, sample: int) -> str:
        return f"read {self.shard(layer, sample)}"


class _Stretch(NamedTuple):
    """Neighbouring chunks: samples `start` to `stop - 1`; places `first` to `last - 1` of what was asked for."""

    start: int
    stop: int
    first: int
    last: int
    whole: bool


class _Read(NamedTuple):
    """A stretch of one layer on its way into `values`: `out` itself, or a buffer to pick from when it is there."""

    layer: int
    stretch: _Stretch
    reading: Operation[Any] | Reading
    values: Shaped[np.ndarray, "sample *stored"]
    out: Shaped[np.ndarray, "row *width"]


def gather(
    source: Source,
    layers: Sequence[int],
    samples: Samples,
    out: Shaped[np.ndarray, "layer row *width"],
    *,
    width: slice | Int64[np.ndarray, " chosen"] = slice(None),
) -> None:
    """Fills `out` with the rows of some layers and samples.

    Args:
        source: where to read.
        layers: indices along the layer axis; `[0]` where there is none.
        samples: ascending, all of them there.
        out: C-contiguous, in the stored dtype, or float32 for bfloat16, which is then widened.
        width: which values of each row. Whole rows are read anyway.

    Chunks that are wanted whole are read straight into `out` where it has their dtype and width. Memory beside `out`:
    `source.flight_bytes`, or one chunk where that is larger; of remote stores twice that.

    Raises:
        CorruptStoreError: a shard is missing, damaged, swapped or stale; names site, layer and block.
        StorageError: the storage failed.
    """
    refuse_fork()
    same = out.dtype == source.array.dtype.numpy_dtype and isinstance(width, slice) and width == slice(None)
    pending: deque[_Read] = deque()
    spare: list[Shaped[np.ndarray, "sample *stored"]] = []  # buffers used before: new memory costs as much as reading
    flying = 0
    for place, stretch in _order(source, len(layers), samples):
        size = (stretch.stop - stretch.start) * source.sample_bytes
        while pending and flying + size > source.flight_bytes:
            landed = pending.popleft()
            flying -= _land(source, landed, samples, width)
            if landed.values is not landed.out:
                spare.append(landed.values)
        target = out[place, stretch.first : stretch.last]
        values = target if same and stretch.whole else _buffer(source, stretch.stop - stretch.start, spare)
        pending.append(_start(source, layers[place], stretch, values, target))
        flying += size
    for read in pending:
        _land(source, read, samples, width)


def _order(source: Source, layers: int, samples: Samples) -> Iterator[tuple[int, _Stretch]]:
    """What to read in which order: block by block, so that each marker is read once; then layer by layer."""
    blocks = tiles(samples, source.layout.block_samples)
    while together := list(itertools.islice(blocks, BLOCKS_TOGETHER)):
        source.prepare([number for number, _, _ in together])
        for _, first, last in together:
            stretches = list(_stretches(source, samples[first:last], first))
            yield from ((place, stretch) for place in range(layers) for stretch in stretches)


def _stretches(source: Source, samples: Samples, offset: int) -> Iterator[_Stretch]:
    """The chunks of one block that hold `samples`; neighbours that are wanted whole are joined."""
    size, most = source.chunk_samples, source.stretch_bytes // source.sample_bytes
    held: _Stretch | None = None
    for number, first, last in tiles(samples, size):
        start, stop = number * size, min((number + 1) * size, source.layout.samples)
        found = _Stretch(start, stop, offset + first, offset + last, _is_run(samples[first:last], stop - start))
        if held and held.whole and found.whole and held.stop == start and stop - held.start <= most:
            held = found._replace(start=held.start, first=held.first)
            continue
        if held:
            yield held
        held = found
    if held:
        yield held


def tiles(samples: Samples, size: int) -> Iterator[tuple[int, int, int]]:
    """Number of each tile of `size` samples that is wanted, and the places of its samples, [first, last)."""
    first = 0
    while first < len(samples):
        number = int(samples[first]) // size
        last = bisect_left(samples, (number + 1) * size, first)
        yield number, first, last
        first = last


def _is_run(samples: Samples, count: int) -> bool:
    """Whether these are `count` samples, one after the other."""
    if len(samples) != count:
        return False
    return samples.step == 1 or count == 1 if isinstance(samples, range) else bool((np.diff(samples) == 1).all())


def _buffer(
    source: Source, samples: int, spare: list[Shaped[np.ndarray, "_ *stored"]]
) -> Shaped[np.ndarray, "sample *stored"]:
    """Memory for a stretch: a spare buffer of its size, or a new one."""
    fitting = next((place for place, buffer in enumerate(spare) if len(buffer) == samples), None)
    if fitting is not None:
        return spare.pop(fitting)
    spare.clear()  # of another size: what flies and what is spare stay within one bound
    return np.empty((samples, *source.array.shape[-1:]) if source.is_site else samples, source.array.dtype.numpy_dtype)


def _start(
    source: Source,
    layer: int,
    stretch: _Stretch,
    values: Shaped[np.ndarray, "sample *stored"],
    out: Shaped[np.ndarray, "row *width"],
) -> _Read:
    """Starts to read a stretch into `values`."""
    try:
        reading = source.begin(layer, stretch.start, stretch.stop, values)
    except CorruptStoreError as error:
        raise CorruptStoreError(f"could not read {source.shard(layer, stretch.start)}: {error}{REMEDY}") from None
    return _Read(layer, stretch, reading, values, out)


def _land(source: Source, read: _Read, samples: Samples, width: slice | Int64[np.ndarray, " chosen"]) -> int:
    """Waits for a stretch, compares it, and puts its wanted rows where they belong; the bytes that were read."""
    stretch = read.stretch
    if not (isinstance(read.reading, Reading) and _landed(source, read, read.reading)):
        try:
            reading = read.reading
            if isinstance(reading, Reading):
                reading = source.begin_usually(read.layer, stretch.start, stretch.stop, read.values)
            reading.result()
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{error}{REMEDY}") from None
        if source.vouchers is not None:
            compare(source, source.vouchers, read.layer, stretch.start, read.values)
    if read.values is not read.out:
        wanted = samples[stretch.first : stretch.last]
        put(read.values if stretch.whole else read.values[_within(wanted, stretch.start)], read.out, width)
    return read.values.nbytes


def _landed(source: Source, read: _Read, reading: Reading) -> bool:
    """Whether ranges of an object gave the rows that were committed; if not, the usual way finds out what is wrong."""
    try:
        reading.result()
        if source.vouchers is not None:
            compare(source, source.vouchers, read.layer, read.stretch.start, read.values)
    except CorruptStoreError:
        reading.drop()
        return False
    reading.keep()
    return True


def compare(
    source: Source, vouchers: Vouchers, layer: int, start: int, values: Shaped[np.ndarray, "sample *width"]
) -> None:
    """Compares whole chunks, the first one beginning at sample `start`, with what vouches for them.

    Raises:
        CorruptStoreError: they are not the rows that were committed.
    """
    for first in range(0, len(values), source.chunk_samples):
        chunk = values[first : first + source.chunk_samples]
        wrong = _difference(source, vouchers, layer, start + first, chunk)
        if wrong:
            vouchers.forget(start // source.layout.block_samples)  # it may have been repaired since its marker was read
            wrong = _difference(source, vouchers, layer, start + first, chunk)
        if wrong:
            raise CorruptStoreError(f"{source.shard(layer, start)}: {wrong}; run `actstore verify`{REMEDY}")


def _difference(
    source: Source, vouchers: Vouchers, layer: int, start: int, chunk: Shaped[np.ndarray, "sample *width"]
) -> str | None:
    """What is wrong with a chunk that begins at sample `start`, if anything."""
    try:
        pieces = vouchers.pieces(source.name, layer, start, start + len(chunk))
    except CorruptStoreError as error:
        shard = source.shard(layer, start)
        raise CorruptStoreError(
            f"{shard} cannot be compared with its commit marker: {error}; run `actstore verify`{REMEDY}"
        ) from None
    for piece in pieces:
        rows = chunk[piece.start - start : piece.stop - start]
        size = source.chunk_samples
        found = chunk_digests(rows, start=piece.start, chunk_samples=size) if source.is_site else checksum(rows)
        if found != piece.digest:
            return (
                f"samples {piece.start} to {piece.stop - 1} have the checksum {found}, their commit marker has "
                f"{piece.digest}: swapped, stale or edited"
            )
    return None


def _within(samples: Samples, start: int) -> slice | Int64[np.ndarray, " row"]:
    """Samples of one stretch as an index into it; never empty."""
    if isinstance(samples, range):
        return slice(samples[0] - start, samples[-1] - start + 1, samples.step)
    return samples - start


def put(
    rows: Shaped[np.ndarray, "row *stored"],
    out: Shaped[np.ndarray, "row *width"],
    width: slice | Int64[np.ndarray, " chosen"],
) -> None:
    """Copies the chosen values of rows into `out`, and widens them where it is wider."""
    chosen = rows[..., width] if rows.ndim > 1 else rows
    if chosen.dtype == out.dtype:
        as_integers(out)[...] = as_integers(chosen)
    else:
        np.copyto(out, chosen)  # exact; in the core's cache three times as fast as `to_float32`, but under the GIL
