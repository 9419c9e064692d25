"""A frozen plan: what every row is, where it will lie, and what the run will cost. `extract.planning` makes it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from actstore.card import human_bytes
from actstore.generations import added_sites
from actstore.schema import Plan
from actstore.strings import Strings
from actstore.table import DocumentTable
from extract import costs
from extract.arrangement import Part
from extract.duplicates import RUN, Group, near_duplicates
from extract.models.sites import Tap
from extract.packing import Contexts

if TYPE_CHECKING:
    from extract.models import Model


@dataclasses.dataclass(frozen=True)
class ExtractPlan:
    """A run that is decided but not begun. `store` is the part that the store keeps and compares.

    `documents` is the table to write with the rows; None where the store has it already.
    """

    store: Plan
    model: "Model"
    taps: tuple[Tap, ...]
    parts: tuple[Part, ...]
    batch: int
    documents: DocumentTable | None
    assets: dict[str, bytes] = dataclasses.field(repr=False)

    @property
    def mesh(self) -> tuple[int, int]:
        """Devices to compute on, (data, model). No part of the stored plan."""
        mesh = self.model.mesh
        return (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["model"])

    @property
    def steps(self) -> int:
        """Number of forward passes of the whole run, `batch` contexts each."""
        return sum(self._steps_of_parts())

    @property
    def bytes(self) -> int:
        """Bytes of activations that the plan writes, before any codec."""
        return sum(part.packing.rows for part in self.parts) * sum(
            site.sample_bytes for site in added_sites(self.store)
        )

    def _steps_of_parts(self) -> list[int]:
        return [math.ceil(part.packing.contexts / self.batch) for part in self.parts]

    def step_edges(self) -> Int64[np.ndarray, " step_edge"]:
        """First sample of each step, and one past the last sample at the end."""
        firsts = [part.first_sample + part.packing.row_edges()[: -1 : self.batch] for part in self.parts]
        last = self.parts[-1]
        return np.concatenate([*firsts, [last.first_sample + last.packing.rows]])

    def contexts(self, step: int) -> Contexts:
        """The input of one step, its documents numbered as in the store."""
        number = step
        for part, steps in zip(self.parts, self._steps_of_parts(), strict=True):
            if number < steps:
                return part.contexts(number * self.batch, self.batch)
            number -= steps
        raise IndexError(f"step {step} of {self.steps}")

    def describe(self, *, hosts: int = 1) -> str:
        """The plan in a few lines: what is read, computed and written, and what it costs.

        Args:
            hosts: that will run it; more need more requests.
        """
        layout, sizes = self.store.layout, self.as_json(hosts=hosts)
        useful = f"{sizes['useful_share']:.1%} useful ({', '.join(sizes['packing'])})"
        model, (data, cut) = self.model, self.mesh
        mesh = f" on {data} x {cut} devices (data x model)" if data * cut > 1 else ""
        sites = "; ".join(
            f"{site.name} {'' if site.layers is None else list(site.layers)} x {site.width} {site.dtype}, "
            f"{human_bytes(sizes['bytes_by_site'][site.name])}"
            for site in added_sites(self.store)
        )
        return "\n".join(
            [
                f"model      {model.name}, {model.config.layers} layers, computed in {model.dtype}{mesh}",
                f"documents  {sizes['documents']:,}, {sizes['tokens']:,} tokens",
                f"contexts   {sizes['contexts']:,} of {self.parts[0].packing.context} tokens, {useful}",
                f"steps      {self.steps:,} of {self.batch} contexts",
                f"sites      {sites}",
                f"samples    {sizes['samples']:,}{_chosen(sizes['selection'])}, {sizes['bytes'] / 1e6:,.1f} MB",
                f"beside     at most {human_bytes(sizes['bytes_beside'])} of norms, columns and documents",
                f"blocks     {sizes['blocks']:,} of {layout.block_samples:,} samples, {sizes['shards']:,} shards",
                f"chunks     {layout.chunk_samples:,} samples, {layout.codec}",
                f"objects    {sizes['objects']:,}",
                f"requests   {_requests(sizes['requests'])}",
                f"memory     {_memory(sizes['memory'])}",
                f"fingerprint {self.store.fingerprint[:16]}",
            ]
        )

    def near_duplicates(self, threshold: float) -> list[Group]:
        """Groups of documents that are nearly the same; see `extract.duplicates`."""
        return near_duplicates(self.parts[0].token_offsets, self.parts[0].token_id, threshold=threshold)

    def describe_duplicates(self, groups: Sequence[Group]) -> str:
        """The groups in a line, with the first of them."""
        if not groups or self.documents is None:
            return "near-duplicates none"
        others = sum(len(group.documents) - 1 for group in groups)
        ids = [self.documents.ids[document] for document in groups[0].documents[:2]]
        return (
            f"near-duplicates {others:,} documents in {len(groups):,} groups, such as {ids[1]!r}, which is like "
            f"{ids[0]!r} ({groups[0].similarities[1]:.0%} of their runs of {RUN} tokens)"
        )

    def as_json(self, *, hosts: int = 1) -> dict[str, Any]:
        """The numbers of `describe` for a program: counts, and bytes.

        Args:
            hosts: that will run it.
        """
        layout, sites = self.store.layout, added_sites(self.store)
        tokens = sum(len(part.token_id) for part in self.parts)
        contexts = sum(part.packing.contexts for part in self.parts)
        samples = sum(part.packing.rows for part in self.parts)
        computed = sum(part.packing.tokens for part in self.parts)
        return {
            "fingerprint": self.store.fingerprint,
            "generation": self.store.generation,
            "model": self.model.name,
            "mesh": list(self.mesh),
            "documents": sum(len(part.token_offsets) - 1 for part in self.parts),
            "tokens": tokens,
            "contexts": contexts,
            "packing": sorted({part.packing.kind for part in self.parts}),
            "useful_share": round(computed / (contexts * self.parts[0].packing.context), 4),
            "selection": self.store.provenance["selection"],
            "steps": self.steps,
            "sites": [dataclasses.asdict(site) for site in sites],
            "samples": samples,
            "bytes": self.bytes,
            "blocks": len(self.store.blocks),
            "block_samples": layout.block_samples,
            "chunk_samples": layout.chunk_samples,
            "shards": len(self.store.blocks) * sum(site.rows_per_sample for site in sites),
            "tokens_computed": computed,
            "bytes_by_site": {site.name: samples * site.sample_bytes for site in sites},
            "bytes_beside": costs.beside_bytes(self.store),
            "objects": costs.objects(self.store),
            "requests": {place: self._requests_of(place, hosts) for place in ("folder", "bucket")},
            "memory": {
                "blocks": layout.memory_bytes,
                "sending": costs.sending_bytes(self.store),
                "documents": self._document_bytes(),
                "model": self._model_bytes(),
            },
        }

    def _requests_of(self, place: str, hosts: int) -> dict[str, int]:
        """Requests of a block, and of the whole run."""
        found = costs.requests(self.store, remote=place == "bucket")
        return {"block": found.block, "total": found.total(len(self.store.blocks), hosts)}

    def _document_bytes(self) -> int:
        """Bytes of the documents in the memory of this process; what lies in files is left out."""
        arrays: list[Any] = []
        for part in self.parts:
            packing = part.packing
            arrays += [part.token_id, part.token_offsets, packing.piece_document, packing.piece_position]
            arrays += [packing.piece_tokens, packing.piece_rows, packing.first_piece]
        if self.documents is not None:
            texts = Strings.of(self.documents.texts)
            arrays += [self.documents.token_start, self.documents.token_end, texts.data, texts.offsets]
        return sum(array.nbytes for array in arrays if not isinstance(array, np.memmap))

    def _model_bytes(self) -> int:
        """Bytes of the weights on all devices together."""
        import jax

        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.params))


def _chosen(selection: Any) -> str:
    """How rows were chosen, for a person; nothing where all tokens are kept."""
    if not isinstance(selection, dict):
        return ""
    most = f", at most {selection['per_document']} of a document" if "per_document" in selection else ""
    return f" ({selection['rows']}{most})"


def _requests(counts: dict[str, dict[str, int]]) -> str:
    """Requests for a person."""
    shown = [f"{found['total']:,} to a {place}, {found['block']} a block" for place, found in counts.items()]
    return "; ".join(shown)


def _memory(sizes: dict[str, int]) -> str:
    """Memory of a host for a person."""
    blocks, sending, documents, model = (
        human_bytes(sizes[name]) for name in ("blocks", "sending", "documents", "model")
    )
    return (
        f"{blocks} for blocks being filled and written, {sending} more to a bucket, {documents} for documents, "
        f"{model} for the model"
    )
