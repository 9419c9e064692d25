"""What vouches for stored rows: the digests in the commit markers, read when a block is first looked at.

The only place that knows which markers speak for which rows: of several generations, each speaks for what it added.
"""

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from actstore.commits import Marker
from actstore.errors import CorruptStoreError
from actstore.generations import added_sites, first_layer
from actstore.kvstore import Root
from actstore.layout import norm_name
from actstore.ledger import lineage, read_status
from actstore.markers import marker_key, parsed_marker, read_marker
from actstore.schema import Plan

KEPT_BYTES = 64 << 20  # of digests: 290 blocks of 4 sites with 24 layers, all of most stores
DIGITS = 8  # of the CRC-32C of one chunk, in hexadecimal


class Piece(NamedTuple):
    """Samples `start` to `stop - 1` of one layer, and the digest that their writer had of the rows."""

    start: int
    stop: int
    digest: str


class _Digests(NamedTuple):
    """What is kept of one marker: the digests of each array and layer."""

    start: int
    stop: int
    of: dict[tuple[str, int], str]


_Block: TypeAlias = list[_Digests]


class Vouchers:
    """The digests of a store's chunks. Any number of threads may ask.

    Costs one small read per block that is asked for. At most `KEPT_BYTES` of digests are kept, those asked for last.
    """

    def __init__(self, root: Root, plan: Plan, *, only: tuple[str, int] | None = None) -> None:
        """`only`, an array and the index of a layer: what is kept of markers where nothing else will be asked for."""
        self._root, self._plan, self._only = root, plan, only
        self._sites = {site.name for site in plan.layout.sites}
        self._kept: OrderedDict[int, _Block] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in another process too, begins with nothing kept."""
        return functools.partial(Vouchers, only=self._only), (self._root, self._plan)

    @functools.cached_property
    def origin(self) -> str:
        """Fingerprint of the plan that the store began with: what is appended leaves it as it is."""
        return self._lineage[0].fingerprint

    def prepare(self, blocks: Iterable[int]) -> None:
        """Reads the markers of some blocks of a remote store together, which is faster than one after the other.

        What cannot be read is left to `pieces`, which says what is wrong.
        """
        if self._root.is_local:
            return
        with self._lock:
            wanted = [(block, plan) for block in blocks if block not in self._kept for plan in self._lineage]
        wanted = [(block, plan) for block, plan in wanted if block in plan.blocks]
        found: dict[int, _Block] = {}
        with contextlib.suppress(CorruptStoreError):
            markers = self._root.read_all(marker_key(block, plan.generation) for block, plan in wanted)
            for (block, plan), data in zip(wanted, markers, strict=True):
                marker = parsed_marker(self._root, plan, block, data)
                found.setdefault(block, []).append(self._digests(plan, marker))
            self._keep(found)

    def pieces(self, array: str, layer: int, start: int, stop: int) -> list[Piece]:
        """The digests of the rows of one chunk, samples `start` to `stop - 1`, ascending.

        Rows that are in no piece have no digest: those of sites in stores from before there were any.

        Args:
            array: a site, norms or a column. The chunk of a site is one of its chunks, and digests are CRC-32C; the
                chunk of the others is a whole block, and digests are xxh3-128.
            layer: index along the layer axis; 0 where there is none.
            start: first sample of the chunk.
            stop: one past its last sample.

        Raises:
            CorruptStoreError: a marker of the block is missing or damaged.
        """
        pieces = []
        for digests in self._of_block(start // self._plan.layout.block_samples):
            first, last = max(start, digests.start), min(stop, digests.stop)
            digest = digests.of.get((array, layer))
            if digest is None or first >= last:
                continue
            if array in self._sites:
                chunk = self._plan.layout.chunk_samples
                place = DIGITS * (start // chunk - digests.start // chunk)
                digest = digest[place : place + DIGITS]
            pieces.append(Piece(first, last, digest))
        return pieces

    def forget(self, block: int) -> None:
        """Reads the markers of a block again when it is next asked for: the block may have been repaired."""
        with self._lock:
            self._kept_bytes -= _size(self._kept.pop(block, []))

    def _of_block(self, block: int) -> _Block:
        with self._lock:
            found = self._kept.get(block)
            if found is not None:
                self._kept.move_to_end(block)
                return found
        found = self._read(block)  # not under the lock: two threads may read the same marker, which does no harm
        self._keep({block: found})
        return found

    def _keep(self, found: dict[int, _Block]) -> None:
        with self._lock:
            for block, digests in found.items():
                if block not in self._kept:
                    self._kept[block] = digests
                    self._kept_bytes += _size(digests)
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _digests(self, plan: Plan, marker: Marker) -> _Digests:
        of = _digests(plan, marker)
        kept = {self._only} & of.keys() if self._only else of.keys()
        return _Digests(*marker.samples, {key: of[key] for key in kept})

    def _read(self, block: int) -> _Block:
        """What the markers of one block say, oldest generation first."""
        found = []
        for plan in self._lineage:
            marker = self._marker(plan, block) if block in plan.blocks else None
            if marker is not None:
                found.append(self._digests(plan, marker))
        return found

    def _marker(self, plan: Plan, block: int) -> Marker | None:
        """The marker of a block; None where a plan that is being written shares the block with an older one."""
        try:
            return read_marker(self._root, plan, block)
        except CorruptStoreError:
            shared = plan.layout.block_range(block)[0] < plan.block_range(block)[0]
            gone = self._root.read(marker_key(block, plan.generation)) is None
            if shared and gone and read_status(self._root, plan) == "writing":
                return None
            raise

    @functools.cached_property
    def _lineage(self) -> tuple[Plan, ...]:
        return lineage(self._root, self._plan)


def _digests(plan: Plan, marker: Marker) -> dict[tuple[str, int], str]:
    """Digests by array and index of the layer: of chunks for sites, of the block for norms and columns."""
    of: dict[tuple[str, int], str] = {}
    for site in added_sites(plan):
        first, norms = first_layer(plan, site.name), norm_name(site.name)
        of |= {(norms, first + i): digest for i, digest in enumerate(marker.checksums[norms])}
        if marker.chunks:  # none in the oldest stores
            layers = marker.chunks.get(site.name, ())
            of |= {(site.name, first + i): digests for i, digests in enumerate(layers)}
    names = [column.name for column in plan.layout.columns if column.name in marker.checksums]
    return of | {(name, 0): marker.checksums[name][0] for name in names}


def _size(block: _Block) -> int:
    """Bytes in memory, nearly."""
    return sum(200 + sum(150 + len(digest) for digest in digests.of.values()) for digests in block)
