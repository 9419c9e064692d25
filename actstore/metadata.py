"""The Zarr v3 metadata of a store as a pure function of its plan. No input, no output.

A reader derives every array's metadata from the plan, whose own size and shape are checked first, and never trusts what
stands in the `zarr.json` of an array: those are there for other Zarr readers.
"""

from typing import Any, Literal

from actstore.layout import Codec, Column, Layout, Site, norm_name
from actstore.schema import CONVENTION, FORMAT, DocumentTableLayout, Plan, RootAttributes

Json = dict[str, Any]
TABLE_CHUNK_BYTES = 4 << 20
TABLE_PIECE_BYTES = 64 << 10  # compressed by itself, so that a text is read without most of what lies around it
BYTES_LITTLE: Json = {"name": "bytes", "configuration": {"endian": "little"}}
BYTES_SINGLE: Json = {"name": "bytes"}
CRC32C: Json = {"name": "crc32c"}


def array_metadata(plan: Plan, *, complete: bool) -> dict[str, Json]:
    """`zarr.json` of every array by its path, in the order in which a reader shows them.

    Args:
        plan: of the store.
        complete: False gives the padded shapes of a store that is being written.
    """
    layout = plan.layout
    samples = layout.samples if complete else layout.padded_samples
    arrays: dict[str, Json] = {}
    for site in layout.sites:
        arrays[site.name] = _activations(layout, site, samples)
        arrays[norm_name(site.name)] = _norms(layout, site, samples)
        if site.layers is not None:
            arrays[layout.layer_dimension(site)] = _labels(plan, site)
    for column in layout.columns:
        arrays[column.name] = _column(layout, column, samples)
    arrays["valid"] = _array(
        [samples], "uint8", [layout.block_samples], ["sample"], 0,
        {"long_name": "committed", "description": "1 where the sample is committed, 0 where it is not"},
    )  # fmt: skip
    for group, table in table_groups(plan).items():
        arrays |= {f"{group}/{name}": metadata for name, metadata in table_metadata(table).items()}
    return arrays


def shard_key(site: Site, layer: int, block: int) -> str:
    """Key of the object that holds a block of one layer, by its index on the layer axis."""
    return f"{site.name}/c/{block}/0" if site.layers is None else f"{site.name}/c/{layer}/{block}/0"


def table_groups(plan: Plan) -> dict[str, DocumentTableLayout]:
    """The groups that hold document tables, oldest first: one for each generation that has documents."""
    names = {number: table_group(number) for number in range(1, plan.generation + 1)}
    return {names[number]: table for number, table in enumerate(plan.tables, start=1) if table is not None}


def table_group(generation: int) -> str:
    """Name of the group that holds the documents of a generation; no column or site can have the later names."""
    return "documents" if generation == 1 else f"documents-{generation}"


def label_chunks(plan: Plan) -> dict[str, int]:
    """Chunk length of every label array: its length when it was made, so that added labels leave its chunks alone."""
    layout, there = plan.layout, plan.base.labels if plan.base else {}
    names = {layout.layer_dimension(site): len(site.layers) for site in layout.sites if site.layers is not None}
    return {name: there.get(name, count) for name, count in names.items()}


def group_metadata(plan: Plan, *, status: Literal["writing", "complete"]) -> Json:
    """`zarr.json` of the root group, with the metadata of all arrays consolidated into it."""
    attributes = RootAttributes(
        format=FORMAT, status=status, fingerprint=plan.fingerprint, generation=plan.generation
    )  # fmt: skip
    model = plan.provenance.get("model")
    nodes = array_metadata(plan, complete=status == "complete")
    nodes |= {group: documents_group() for group in table_groups(plan)}
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "actstore": attributes.model_dump(mode="json"),
            "zarr_conventions": [CONVENTION],
            "model": str(model.get("name", "")) if isinstance(model, dict) else "",
            "title": "activations",
        },
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
    }


def documents_group() -> Json:
    """`zarr.json` of the `documents` group."""
    return {
        "zarr_format": 3, "node_type": "group", "attributes": {"description": "the documents the rows come from"},
    }  # fmt: skip


def table_metadata(table: DocumentTableLayout) -> dict[str, Json]:
    """`zarr.json` of every array of the `documents` group, by its name inside the group."""
    arrays: dict[str, Json] = {}

    def flat(name: str, size: int, dtype: str, item_bytes: int, dimension: str, description: str) -> None:
        most, codecs = TABLE_CHUNK_BYTES // item_bytes, None
        chunk = max(min(size, most), 1)
        if table.codec == "zstd":
            piece = min(chunk, TABLE_PIECE_BYTES // item_bytes)
            chunk = -(-chunk // piece) * piece
            codecs = [_sharding([piece], _chunk_codecs("zstd", dtype))]
        arrays[name] = _array([size], dtype, [chunk], [dimension], 0, {"description": description}, codecs)

    for column, size in table.strings.items():
        flat(f"{column}_bytes", size, "uint8", 1, f"{column}_byte", f"UTF-8 bytes of the column {column!r}")
        flat(f"{column}_offsets", table.documents + 1, "int64", 8, "document_edge",
             f"document i holds {column}_bytes[offsets[i]:offsets[i + 1]]")  # fmt: skip
    for column, dtype in table.numbers.items():
        flat(column, table.documents, dtype, 8, "document", f"user column {column!r}")
    flat("token_offsets", table.documents + 1, "int64", 8, "document_edge",
         "document i holds tokens offsets[i]:offsets[i + 1]")  # fmt: skip
    flat("token_id", table.tokens, "int32", 4, "token", "token ids of all documents, one after the other")
    flat("token_start", table.tokens, "uint32", 4, "token", "first byte of the token in its document's text")
    flat("token_end", table.tokens, "uint32", 4, "token", "one past the last byte of the token in its document's text")
    return arrays


def _activations(layout: Layout, site: Site, samples: int) -> Json:
    """A site: sharded, (1 layer, block_samples, width) with chunks of (1, chunk_samples, width)."""
    shape, shard, chunk = [samples], [layout.block_samples], [layout.chunk_samples]
    dimensions = ["sample", layout.width_dimension(site)]
    if site.layers is not None:
        shape, shard, chunk = [len(site.layers), *shape], [1, *shard], [1, *chunk]
        dimensions = [layout.layer_dimension(site), *dimensions]
    sharding = _sharding([*chunk, site.width], _chunk_codecs(layout.codec, site.dtype))
    attributes: Json = {"long_name": f"{site.name} activations", "site": site.name}
    if layout.columns:
        attributes["coordinates"] = " ".join(column.name for column in layout.columns)
    return _array([*shape, site.width], site.dtype, [*shard, site.width], dimensions, "NaN", attributes, [sharding])


def _norms(layout: Layout, site: Site, samples: int) -> Json:
    """Euclidean norms of the rows of a site: sinks and outliers can be found without reading the rows."""
    shape, chunk, dimensions = [samples], [layout.block_samples], ["sample"]
    if site.layers is not None:
        shape, chunk = [len(site.layers), *shape], [1, *chunk]
        dimensions = [layout.layer_dimension(site), *dimensions]
    attributes: Json = {"long_name": f"Euclidean norm of {site.name}", "site": site.name}
    if layout.columns:
        attributes["coordinates"] = " ".join(column.name for column in layout.columns)
    return _array(shape, "float32", chunk, dimensions, "NaN", attributes)


def _labels(plan: Plan, site: Site) -> Json:
    """The layer labels of a site: a coordinate that xarray indexes."""
    labels = site.layers or ()
    name = plan.layout.layer_dimension(site)
    chunk = label_chunks(plan)[name]
    return _array([len(labels)], "int32", [chunk], [name], -1, {"long_name": "layer of the model"})


def _column(layout: Layout, column: Column, samples: int) -> Json:
    """A number per sample."""
    fill: int | str = "NaN" if column.dtype.startswith("float") else 0 if column.dtype.startswith("u") else -1
    return _array([samples], column.dtype, [layout.block_samples], ["sample"], fill, {"long_name": column.name})


def _sharding(chunk: list[int], codecs: list[Json]) -> Json:
    """The codec of a shard: chunks of one shape, and after them where each lies."""
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk,
            "codecs": codecs,
            "index_codecs": [BYTES_LITTLE, CRC32C],
            "index_location": "end",
        },
    }


def _chunk_codecs(codec: Codec, dtype: str) -> list[Json]:
    """Codecs inside a shard: always plain little-endian bytes first."""
    extra: dict[str, list[Json]] = {
        "none": [],
        "crc32c": [CRC32C],
        "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}, CRC32C],
    }
    return [_plain(dtype), *extra[codec]]


def _plain(dtype: str) -> Json:
    """Values as they lie in memory."""
    return BYTES_SINGLE if dtype.endswith("int8") else BYTES_LITTLE


def _array(
    shape: list[int],
    dtype: str,
    chunk: list[int],
    dimensions: list[str],
    fill: int | str,
    attributes: Json,
    codecs: list[Json] | None = None,
) -> Json:
    """One array's metadata; the default codecs are those of small arrays: bytes and crc32c."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs or [_plain(dtype), CRC32C],
        "attributes": attributes,
        "dimension_names": dimensions,
        "storage_transformers": [],
    }
