"""What a plan takes: objects, requests, memory and time. Pure: the plan and a few rates decide.

A request is one question to the storage, or one object on its way to it: what buckets charge for and limit. On a
folder it is a file that is written and synced, read, looked at or removed.
"""

import dataclasses
import math

from actstore.generations import added_sites
from actstore.layout import ITEM_BYTES
from actstore.markers import WINDOW_BLOCKS, vouched_arrays
from actstore.metadata import TABLE_CHUNK_BYTES, array_metadata, table_groups, table_metadata
from actstore.schema import Plan
from actstore.writer import SHARDS_AT_ONCE

CLAIM, LOOK = 3, 1  # a claim is read, written and read back; of remote storage its size is asked for before
CLAIMED_TWICE = 2  # the marker is looked for when a block is taken, and before it is written
RELEASE = MARKER = VALID = 1


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests of a run whose workers do not die, do not wait for each other, and need no second try.

    Attributes:
        block: Of one block: claim, shards, norms, columns, marker.
        worker: Of each worker, to begin.
        once: Of the run: metadata, documents, sealing, which reads every marker.
    """

    block: int
    worker: int
    once: int

    def total(self, blocks: int, workers: int) -> int:
        """Of the whole run."""
        return blocks * self.block + workers * self.worker + self.once


def block_objects(plan: Plan) -> int:
    """Objects that a block leaves: a shard and a norm of each site and layer, columns, `valid` and the marker."""
    return sum(vouched_arrays(plan).values()) + VALID + MARKER


def objects(plan: Plan) -> int:
    """Objects that a run of the plan leaves, those it writes again included."""
    return (
        len(plan.blocks) * block_objects(plan) + _document_chunks(plan) + _nodes(plan) + _labels(plan) + _papers(plan)
    )


def requests(plan: Plan, *, remote: bool) -> Requests:
    """Requests of a run.

    Args:
        plan: what is written.
        remote: to a bucket, where the size of a small object is asked for before it is read; False: to a folder.
    """
    look = LOOK if remote else 0
    read, create = 1 + look, CLAIM + look
    block = create + CLAIMED_TWICE + block_objects(plan) + RELEASE
    pages = _pages(len(plan.blocks)) if remote else 1
    probes = 4 if remote else 0  # an object is written and removed again, to see that it can be, twice
    share = 2 if remote else 1  # windows of a worker's share
    nodes, groups, assets = _nodes(plan), len(table_groups(plan)), len(plan.assets)
    begun = nodes if plan.base is None else 0  # those of an addition are written when it is sealed
    worker = probes + 3 * read + (1 + assets + begun) * read + pages + share + _labels(plan) * read
    alone = 2 if begun else 1  # the plan, and the root group after all other nodes; those are created together
    created = (create - read) * alone + (1 + read) * (assets + max(begun - 1, 0))
    documents = 0 if plan.documents is None else _document_chunks(plan) + MARKER + 3 * read
    shards = sum(_pages(len(plan.blocks) * site.rows_per_sample) if remote else 1 for site in added_sites(plan))
    papers = 3  # manifest, ranges and seal
    sealing = len(plan.blocks) * read + 2 * pages + shards + nodes - groups + papers + create + 4 * read + 2
    return Requests(block, worker, created + _labels(plan) + documents + sealing)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What decides how long a run takes.

    Attributes:
        hosts: How many compute.
        tokens: Per second, of one host; None where that is not known.
        storage_bytes: Per second, that the storage takes from all hosts together; None where that is not known.
        measured: Whether tokens are to be measured.
    """

    hosts: int = 1
    tokens: float | None = None
    storage_bytes: float | None = None
    measured: bool = False

    def of(self, tokens: int, size: int) -> "Duration":
        """The time of a run that reads so many tokens and writes so many bytes."""
        return Duration(
            None if self.tokens is None else tokens / (self.tokens * self.hosts),
            None if self.storage_bytes is None else size / self.storage_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Duration:
    """How long a run takes, its start and its end left out, if each part is as fast as said; None where not known."""

    compute_seconds: float | None
    storage_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """Of the whole run: both parts go on at once, and the slower one is the limit."""
        known = [seconds for seconds in (self.compute_seconds, self.storage_seconds) if seconds is not None]
        return max(known, default=None)

    @property
    def limit(self) -> str | None:
        """`compute` or `storage`, whichever takes longer; None where one is not known."""
        if self.compute_seconds is None or self.storage_seconds is None:
            return None
        return "storage" if self.storage_seconds > self.compute_seconds else "compute"

    def describe(self) -> str:
        """In a few words; nothing where nothing is known."""
        parts = {"compute": self.compute_seconds, "storage": self.storage_seconds}
        shown = ", ".join(f"{human_seconds(each)} of {name}" for name, each in parts.items() if each is not None)
        return f"{shown}: limited by the {self.limit}" if self.limit and shown else shown


def human_seconds(seconds: float) -> str:
    """A length of time in its two largest units: `2 h 5 min`."""
    whole = math.ceil(seconds)
    for unit, size, smaller, least in [("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)]:
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // least} {smaller}"
    return f"{whole} s"


def sending_bytes(plan: Plan) -> int:
    """Bytes of shards that are in memory once more while they go to a bucket."""
    return 2 * SHARDS_AT_ONCE * max(site.row_bytes for site in added_sites(plan)) * plan.layout.block_samples


def beside_bytes(plan: Plan) -> int:
    """Bytes beside the activations: norms, columns, `valid`, and documents with their tokens before compression."""
    rows = sum(site.rows_per_sample for site in added_sites(plan))
    columns = sum(ITEM_BYTES[column.dtype] for column in plan.layout.columns) if plan.adds_samples else 0
    samples = plan.block_range(plan.blocks[-1])[1] - plan.block_range(plan.blocks[0])[0]
    return samples * (ITEM_BYTES["float32"] * rows + columns + VALID) + sum(_table_bytes(plan))


def _pages(keys: int) -> int:
    """Answers to a listing."""
    return max(math.ceil(keys / WINDOW_BLOCKS), 1)


def _nodes(plan: Plan) -> int:
    """`zarr.json` of the group, of every array and of the groups of documents."""
    return 1 + len(array_metadata(plan, complete=True)) + len(table_groups(plan))


def _labels(plan: Plan) -> int:
    return sum(site.layers is not None for site in plan.layout.sites)


def _papers(plan: Plan) -> int:
    """Plan, marker of the documents, manifest, ranges and seal, and what is kept beside them."""
    return 4 + (plan.documents is not None) + len(plan.assets)


def _document_chunks(plan: Plan) -> int:
    return sum(math.ceil(size / TABLE_CHUNK_BYTES) for size in _table_bytes(plan))


def _table_bytes(plan: Plan) -> list[int]:
    """Bytes of each array of the documents that a plan writes."""
    tables = [] if plan.documents is None else table_metadata(plan.documents).values()
    return [array["shape"][0] * ITEM_BYTES[array["data_type"]] for array in tables]
