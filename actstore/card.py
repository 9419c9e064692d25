"""The card of a store: what it is, how much of it is there, and how large its rows are; as text and as HTML.

A store is untrusted: its plan may hold any JSON. Values are cut, control characters are shown and not obeyed.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from actstore.errors import StoreError
from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.layout import ITEM_BYTES, Site, norm_name
from actstore.ledger import read_status
from actstore.markers import committed_ranges
from actstore.norms import summarize
from actstore.notebook import isolated, table
from actstore.schema import Plan
from actstore.untrusted import printable
from actstore.vouchers import Vouchers

NORM_BLOCKS = 4  # spread over the store; those of each site and layer are one read
NORM_BYTES = 4 << 20  # of norms: about 4 ms for each MiB
NORM_READS = 128  # 0.4 ms each
MOST_LETTERS = 300  # of one value
NORM_HEADER = ("site", "layer", "median", "largest")


class _State(NamedTuple):
    """How much of a store is there: ranges of samples, and blocks of its newest plan."""

    complete: bool
    ranges: list[tuple[int, int]]
    blocks: int


class _Norms(NamedTuple):
    """Of which samples norms are shown, or why none are; and site, layer, median, largest of each."""

    of: str
    rows: list[tuple[str, str, str, str]]


def text(root: Root, plan: Plan) -> str:
    """The card for a terminal: a line for each fact, then median and largest norm of each site and layer.

    Norms are those of at most `NORM_BLOCKS` blocks, and the card says of how many samples. They are left out where one
    block has more than `NORM_BYTES` or `NORM_READS` of them, and the reason is shown where they cannot be read:
    `Store.stats` gives them exactly. Every value is one short printable line.

    Costs a few small reads and at most `NORM_BYTES` of norms: 10 to 60 ms, however large the store. Of an unfinished
    store one listing more, which grows with its blocks: 0.6 s for 100,000.

    Args:
        root: place of the store.
        plan: its plan.

    Raises:
        CorruptStoreError: the root group is damaged, or is that of another plan.
    """
    state = _state(root, plan)
    norms = _norms(root, plan, state)
    shown = [*_lines(_facts(root, plan, state)), ("norms", [norms.of, *_aligned(norms.rows)])]
    return "\n".join(f"{name * (place == 0):<12} {line}" for name, lines in shown for place, line in enumerate(lines))


def html(root: Root, plan: Plan) -> str:
    """The card for a notebook: the same as `text` in two tables, in the notebook's own colours. No script, no link.

    Raises:
        CorruptStoreError: the root group is damaged, or is that of another plan.
    """
    state = _state(root, plan)
    norms = _norms(root, plan, state)
    rows = [(f"<b>{name}</b>", "<br>".join(map(isolated, lines))) for name, lines in _lines(_facts(root, plan, state))]
    cells = [[isolated(cell) for cell in row] for row in norms.rows]
    rows.append(("<b>norms</b>", isolated(norms.of) + (table(cells, head=NORM_HEADER) if cells else "")))
    return table(rows)


def facts(root: Root, plan: Plan) -> dict[str, Any]:
    """What a store holds, by name, as plain JSON: what `actstore info --json` prints.

    `bytes` are those of all activations, before any codec. `percent` is of the blocks that the newest plan writes,
    rounded down: only a complete store has 100.

    Costs one small read; of an unfinished store one listing more. Values are as they are stored: neither cut nor
    escaped.

    Raises:
        CorruptStoreError: the root group is damaged, or is that of another plan.
    """
    return _facts(root, plan, _state(root, plan))


def human_bytes(count: int) -> str:
    """A byte count in decimal units: 1_500_000 is `1.5 MB`."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 5)
    return f"{count / 1000**power:,.1f} {'kMGTP'[power - 1]}B"


def _state(root: Root, plan: Plan) -> _State:
    if read_status(root, plan) == "complete":  # the seal speaks for every block; 10^7 of them are not listed
        return _State(complete=True, ranges=[(0, plan.layout.samples)], blocks=len(plan.blocks))
    ranges = committed_ranges(root, plan)
    return _State(complete=False, ranges=ranges, blocks=len(ranges) - plan.appends_samples)


def _facts(root: Root, plan: Plan, state: _State) -> dict[str, Any]:
    layout, blocks = plan.layout, len(plan.blocks)
    percent = math.floor(1000 * state.blocks / blocks) / 10
    return {
        "url": root.url,
        "status": "complete" if state.complete else "unfinished",
        "committed": f"{state.blocks} of {blocks} blocks",
        "percent": percent if state.complete else min(percent, 99.9),  # all blocks, and not sealed
        "generation": plan.generation,
        "model": _model(plan),
        "sites": [_site(site) for site in layout.sites],
        "samples": layout.samples,
        "documents": sum(table.documents for table in plan.tables if table),
        "bytes": layout.data_bytes,
        "shards": f"{layout.block_samples} samples, chunks of {layout.chunk_samples}, {layout.codec}",
        "columns": [column.name for column in layout.columns],
        "format": plan.format,
        "fingerprint": plan.fingerprint,
    }


def _model(plan: Plan) -> str:
    """The model's name as the provenance has it: `{"model": {"name": ...}}`, or `{"model": ...}`."""
    model = plan.provenance.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return name if isinstance(name, str) and name else "unknown"


def _site(site: Site) -> str:
    layers = "" if site.layers is None else f" {list(site.layers)}"
    return f"{site.name}{layers} x {site.width} {site.dtype}"


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each fact as lines that a terminal may show: one, or one for each site."""
    for name, value in found.items():
        if name == "sites":
            lines = [_cut_layers(line) for line in value]
        elif isinstance(value, list):
            lines = [", ".join(value) or "none"]
        elif name == "bytes":
            lines = [human_bytes(value)]
        else:
            lines = [f"{value:,}" if isinstance(value, int) else str(value)]
        yield name, [printable(line, most=MOST_LETTERS) for line in lines]


def _cut_layers(site: str) -> str:
    """A site of many layers without those in the middle, so that its width and dtype are still seen."""
    return site if len(site) <= MOST_LETTERS else f"{site[: MOST_LETTERS // 2]} ... {site[-MOST_LETTERS // 4 :]}"


def _norms(root: Root, plan: Plan, state: _State) -> _Norms:
    """Norms of a few blocks; none where already one block has too many."""
    layout = plan.layout
    reads = sum(site.rows_per_sample for site in layout.sites)
    block_bytes = reads * layout.block_samples * ITEM_BYTES["float32"]
    most = min(NORM_BLOCKS, NORM_BYTES // block_bytes, NORM_READS // reads)
    if not most:
        size = human_bytes(block_bytes)
        return _Norms(f"left out, one block has {size} of them in {reads:,} parts; `Store.stats` reads them", [])
    spans = _spread(state.ranges, layout.block_samples, most)
    if not spans:
        return _Norms("none yet, no block is committed", [])
    try:
        vouchers = Vouchers(root, plan)
        rows = [row for site in layout.sites for row in _norms_of(root, plan, site, spans, vouchers)]
    except StoreError as error:  # the rest of the card helps to find out what is wrong
        return _Norms(printable(f"could not be read: {error}", most=2 * MOST_LETTERS), [])
    samples = sum(len(span) for span in spans)
    of = f"{samples:,} of {layout.samples:,}" if samples < layout.samples else f"all {samples:,}"
    return _Norms(f"median and largest of {of} samples", rows)


def _spread(ranges: Sequence[tuple[int, int]], block_samples: int, most: int) -> list[range]:
    """The samples of at most `most` blocks that hold some of `ranges`, spread evenly; not more than is in `ranges`."""
    counts = [-(-stop // block_samples) - start // block_samples for start, stop in ranges]
    ends = np.cumsum(counts, dtype=np.int64)
    blocks = int(ends[-1]) if len(ends) else 0
    taken = min(most, blocks)
    spans = []
    for place in ((2 * number + 1) * blocks // (2 * taken) for number in range(taken)):
        which = int(np.searchsorted(ends, place, side="right"))
        first, last = ranges[which]
        start = (first // block_samples + place - int(ends[which]) + counts[which]) * block_samples
        spans.append(range(max(start, first), min(start + block_samples, last)))
    return spans


def _norms_of(
    root: Root, plan: Plan, site: Site, spans: Sequence[range], vouchers: Vouchers
) -> Iterator[tuple[str, str, str, str]]:
    source = Source.open(root, plan, norm_name(site.name), vouchers=vouchers)
    found = []
    for span in spans:
        norms = np.empty((site.rows_per_sample, len(span)), np.float32)
        gather(source, range(site.rows_per_sample), span, norms)
        found.append(norms)
    for index, norms in enumerate(np.concatenate(found, axis=1)):
        statistics = summarize(functools.partial(iter, [norms]))
        label = "" if site.layers is None else str(site.layers[index])
        yield site.name, label, f"{statistics.median:.4g}", f"{statistics.largest:.4g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows under their header: names to the left, numbers to the right."""
    if not rows:
        return []
    table = [NORM_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]  # fmt: skip
