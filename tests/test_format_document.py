"""Holds `docs/reference/format.md` and the code together: what its tables say is computed here, and compared.

`python tests/test_format_document.py --write` writes the JSON Schemas in `docs/reference/schema` again.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

import actstore
from actstore import commits, metadata, schema, table, untrusted
from actstore import layout as layouts
from actstore.layout import ITEM_BYTES, Column, Layout, Site
from actstore.metadata import array_metadata, group_metadata
from actstore.schema import DocumentTableLayout, Plan

DOCS = Path(__file__).parent.parent / "docs" / "reference"
TEXT = (DOCS / "format.md").read_text(encoding="utf-8")
SCHEMAS: dict[str, type[pydantic.BaseModel]] = {
    "plan": schema.Plan,
    "marker": commits.Marker,
    "documents-marker": commits.TableMarker,
    "manifest": commits.Manifest,
    "ranges": commits.Ranges,
    "seal": commits.Seal,
    "root-attributes": schema.RootAttributes,
}
DOCUMENTED = [
    schema.Plan, schema.Base, layouts.Layout, layouts.Site, layouts.Column, schema.DocumentTableLayout, commits.Marker,
    commits.TableMarker, commits.Manifest, commits.Ranges, commits.Seal, schema.RootAttributes,
]  # fmt: skip
ALL_SITES = (
    Site("resid_post", 8, (3, 1)),
    Site("embed", 8, None, "float32"),
    Site("mlp_post", 20, (3, 1), "float16"),
    Site("attn_out", 8, (0,)),
)
ALL_COLUMNS = tuple(Column(f"c_{dtype}", dtype) for dtype in layouts.ColumnDType.__args__)
TABLE = DocumentTableLayout(
    documents=3,
    tokens=5_000_000,
    strings={"id": 9, "text": 10_000_000, "kind": 0},
    numbers={"a": "int64", "b": "float64"},
)
PLANS = {
    "everything": (Layout(ALL_SITES, 100, 32, 16, ALL_COLUMNS), TABLE),
    "packed documents": (Layout(ALL_SITES[:1], 7, 8, 8, ()), TABLE.model_copy(update={"codec": "zstd"})),
    "no columns": (Layout(ALL_SITES[:1], 7, 8, 8, ()), None),
    "no layers, no checksum": (Layout(ALL_SITES[1:2], 64, 32, 16, codec="none"), None),
    "zstd": (Layout(ALL_SITES[::-1], 65, 32, 8, codec="zstd"), None),
}


def rows_of(text: str, first_header: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first_header`."""
    found = re.search(rf"^\| {re.escape(first_header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, f"no table that begins with {first_header!r}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]


def section(text: str, title: str) -> str:
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def ticked(cell: str) -> str:
    return cell.strip("`")


# --- fields of JSON documents ---


def documented_fields(text: str, title: str) -> dict[str, tuple[str, bool]]:
    """Per field: its type in words, and whether it is required."""
    return {
        ticked(name): (kind, {"yes": True, "no": False}[required])
        for name, kind, required, _ in rows_of(section(text, title), "field")
    }


def actual_fields(model: type) -> dict[str, tuple[str, bool]]:
    found = pydantic.TypeAdapter(model).json_schema(ref_template="{model}")
    definitions = found.get("$defs", {})

    def kind(field: dict[str, Any]) -> str:
        if "anyOf" in field:
            return " or ".join(map(kind, field["anyOf"]))
        return definitions[field["$ref"]]["type"] if "$ref" in field else field["type"]

    return {name: (kind(field), name in found["required"]) for name, field in found["properties"].items()}


@pytest.mark.parametrize("model", DOCUMENTED, ids=lambda model: model.__name__)
def test_fields_are_those_of_the_code(model):
    assert documented_fields(TEXT, model.__name__) == actual_fields(model)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("| `block` | integer |", "| `blocks` | integer |"),
        ("| `block` | integer | yes |", "| `block` | integer | no |"),
        ("| `block` | integer |", "| `block` | string |"),
    ],
    ids=["another name", "not required", "another type"],
)
def test_meta_another_field_would_be_found(wrong, right):
    assert wrong in TEXT
    assert documented_fields(TEXT.replace(wrong, right), "Marker") != actual_fields(commits.Marker)


def test_limits_are_those_of_the_code():
    limits = {ticked(name): int(value) for name, value in rows_of(TEXT, "limit")}
    modules = (schema, commits, untrusted, layouts)
    here = {name: value for module in modules for name, value in vars(module).items() if name.startswith("MAX_")}
    assert limits == here
    assert f"at most 4 MiB ({metadata.TABLE_CHUNK_BYTES} bytes)" in TEXT
    assert f"at most 64 KiB ({metadata.TABLE_PIECE_BYTES} bytes)" in TEXT
    assert schema.CONVENTION["uuid"] in TEXT
    assert f"# Format {schema.FORMAT}\n" in TEXT


def test_taken_names_are_those_of_the_code():
    site_names, document_names = re.findall(r"(?:taken: |cannot be )([^.]+)\.", section(TEXT, "Names"))
    assert set(re.findall(r"`(\w+)`", site_names)) == layouts.RESERVED
    assert set(re.findall(r"`(\w+)`", document_names)) == table.TAKEN


# --- arrays ---


def documented_arrays(text: str, plan: Plan, *, complete: bool) -> dict[str, Any]:
    """`zarr.json` of every array, computed from the tables of the document alone."""
    arrays: dict[str, Any] = {}
    attributes = rows_of(text, "attribute")
    for pattern, dimensions, dtype, shape, chunk, fill, codecs in rows_of(text, "array"):
        for names, numbers in _instances(ticked(pattern.split(" ")[0]), pattern, plan, complete=complete):
            stored_dtype = _named(ticked(dtype), names)
            sizes = [_size(part, numbers) for part in ticked(shape).split(", ")]
            item = ITEM_BYTES[stored_dtype]
            flat, piece = (max(min(sizes[0], most // item), 1) for most in (4194304, 65536))
            table_codec = plan.documents.codec if plan.documents else None
            if table_codec == "zstd":
                flat = -(-flat // piece) * piece
            grid = [_size(part, numbers | {"flat": flat}) for part in ticked(chunk).split(", ")]
            inner = [
                _size(part.replace("block", "chunk"), numbers | {"flat": flat}) for part in ticked(chunk).split(", ")
            ]
            template = ticked(pattern.split(" ")[0])
            arrays[_named(template, names)] = {
                "zarr_format": 3,
                "node_type": "array",
                "shape": sizes,
                "data_type": stored_dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": json.loads(ticked(fill)),
                "codecs": _codecs(text, codecs, plan.layout.codec, table_codec, item, inner, piece),
                "attributes": {
                    ticked(key): _named(value, names)
                    for key, of, value in attributes
                    if ticked(of) == template and (key != "`coordinates`" or plan.layout.columns)
                },
                "dimension_names": [_named(part, names) for part in ticked(dimensions).split(", ")],
                "storage_transformers": [],
            }
    return arrays


def _instances(
    template: str, pattern: str, plan: Plan, *, complete: bool
) -> list[tuple[dict[str, str], dict[str, int]]]:
    """What the capitals and sizes of one row of the table stand for, once per array that the row describes."""
    layout, documents = plan.layout, plan.documents
    blocks = -(-layout.samples // layout.block_samples)
    numbers = {
        "samples": layout.samples if complete else blocks * layout.block_samples,
        "block_samples": layout.block_samples,
        "chunk_samples": layout.chunk_samples,
    }
    if template.startswith(("SITE", "LAYER")):
        found = []
        layered = [site for site in layout.sites if site.layers is not None]
        for site in layout.sites:
            if (site.layers is None) != pattern.endswith("without"):
                continue
            first = "layer" if layered and site.layers == layered[0].layers else f"{site.name}_layer"
            width = "hidden" if site.width == layout.sites[0].width else f"{site.name}_hidden"
            columns = " ".join(column.name for column in layout.columns)
            names = {"SITE": site.name, "SITE_DTYPE": site.dtype, "LAYER": first, "HIDDEN": width, "COLUMNS": columns}
            count = len(site.layers or ())
            found.append((names, numbers | {"layers": count, "label_chunk": count, "width": site.width}))
        return found
    if template == "COLUMN":
        kinds = {"i": "signed", "u": "unsigned", "f": "floating"}
        return [
            ({"COLUMN": column.name, "COLUMN_DTYPE": column.dtype}, numbers)
            for column in layout.columns
            if pattern.endswith(f" {kinds[np.dtype(column.dtype).kind]}")
        ]
    if template == "valid":
        return [({}, numbers)]
    if documents is None:
        return []
    counts = {"documents": documents.documents, "tokens": documents.tokens}
    if "STRING" in template:
        return [({"STRING": name}, counts | {"bytes": size}) for name, size in documents.strings.items()]
    if "NUMBER" in template:
        return [({"NUMBER": name, "NUMBER_DTYPE": dtype}, counts) for name, dtype in documents.numbers.items()]
    return [({}, counts)]


def _named(text: str, names: dict[str, str]) -> str:
    for capital in sorted(names, key=len, reverse=True):
        text = text.replace(capital, names[capital])
    return text


def _size(text: str, numbers: dict[str, int]) -> int:
    first, _, more = text.partition(" + ")
    return (int(first) if first.isdigit() else numbers[first]) + int(more or 0)


def _codecs(
    text: str, kind: str, codec: str, table_codec: str | None, item_bytes: int, inner: list[int], piece: int
) -> Any:
    chains = {name: ticked(chain) for name, chain in rows_of(text, "codecs")}
    chunk_chains = {ticked(name): ticked(chain) for name, chain in rows_of(text, "codec")}
    if kind == "table":
        kind = {"crc32c": "plain", "zstd": "packed"}[table_codec]
    name = f"{kind}, one byte per value" if kind in ("plain", "packed") and item_bytes == 1 else kind
    chain = chains[name].replace('"CHUNK_CODECS"', chunk_chains[codec]).replace('"CHUNK"', json.dumps(inner))
    chain = chain.replace('"PIECE"', json.dumps(piece))
    return json.loads(chain)


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "writing"])
@pytest.mark.parametrize("case", PLANS)
def test_arrays_are_those_of_the_code(case, complete):
    layout, documents = PLANS[case]
    plan = Plan.make(layout, {}, documents)
    assert documented_arrays(TEXT, plan, complete=complete) == array_metadata(plan, complete=complete)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `valid` | `sample` | `uint8` |", "| `valid` | `sample` | `int8` |"),
        ("`layers, samples, width`", "`samples, layers, width`"),
        ('"level":1', '"level":3'),
        ("layer of the model |", "layer |"),
        ("| `documents/token_end` | `token` | `uint32` | `tokens` | `flat` | `0` | table |\n", ""),
        ('"chunk_shape":["PIECE"]', '"chunk_shape":[1]'),
    ],
    ids=["dtype", "shape", "codec", "attribute", "array left out", "pieces"],
)
def test_meta_another_table_would_be_found(old, new):
    assert old in TEXT

    def agree(text):
        plans = [Plan.make(layout, {}, documents) for layout, documents in PLANS.values()]
        return all(
            documented_arrays(text, plan, complete=True) == array_metadata(plan, complete=True) for plan in plans
        )

    assert agree(TEXT)
    assert not agree(TEXT.replace(old, new))


# --- a real store ---


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A sealed store with documents, written through the public functions."""
    url = tmp_path_factory.mktemp("format") / "run.acts.zarr"
    layout = Layout((Site("resid_post", 4, (0, 2)), Site("embed", 4, None)), 5, 4, 2)
    documents = actstore.DocumentTable(
        ids=["a"], texts=["hello"], token_offsets=np.array([0, 5]), token_id=np.arange(5, dtype=np.int32),
        token_start=np.arange(5, dtype=np.uint32), token_end=np.arange(1, 6, dtype=np.uint32),
    )  # fmt: skip
    with actstore.create(
        url, layout, {"model": {"name": "m"}}, documents=documents, assets={"a.json": b"{}"}
    ) as writer:
        for block in range(layout.blocks):
            start, stop = layout.block_range(block)
            rows = np.ones((2, stop - start, 4), np.float32)
            columns = {name: np.arange(start, stop) for name in ("document", "position", "token_id")}
            writer.write(
                block, {"resid_post": rows, "embed": rows[0]}, samples={**columns, "document": columns["position"] * 0}
            )
    return url


@pytest.mark.parametrize(
    ("file", "title"),
    [
        ("plan", "Plan"),
        ("commits/00000001", "Marker"),
        ("documents", "TableMarker"),
        ("manifest", "Manifest"),
        ("ranges", "Ranges"),
        ("SEALED", "Seal"),
    ],
)
def test_stored_documents_have_every_field(stored, file, title):
    data = (stored / ".act" / f"{file}.json").read_bytes()
    assert set(json.loads(data)) == set(documented_fields(TEXT, title)) - {"base"}
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_marker_has_the_documented_checksums(stored):
    checksums = json.loads((stored / ".act/commits/00000000.json").read_bytes())["checksums"]
    layers = {
        "resid_post": 2,
        "resid_post_norm": 2,
        "embed": 1,
        "embed_norm": 1,
        "document": 1,
        "position": 1,
        "token_id": 1,
    }
    assert {name: len(digests) for name, digests in checksums.items()} == layers


def test_files_are_those_of_the_tree(stored):
    tree = re.search(r"^## Tree\n\n```text\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL)[1]
    known = {line.split()[0].rstrip(",/") for line in tree.splitlines()[1:]}
    patterns = {"<site>": "resid_post", "<site>_norm": "resid_post_norm", "<column>": "document", "<block>": "00000000"}
    found = {path.relative_to(stored).as_posix() for path in stored.rglob("*")}
    elsewhere = {".act/claims", "documents-<generation>", ".act/generations/<generation>"}  # not of this
    for name in known - {"layer"} - elsewhere:
        path = name.replace("<name>", "a.json")
        for capital in sorted(patterns, key=len, reverse=True):
            path = path.replace(capital, patterns[capital])
        assert path in found, name
    top = {path.name for path in stored.iterdir()} - set(array_metadata(_plan(stored), complete=True))
    assert top == {"zarr.json", ".act", "assets", "documents"}
    assert {path.name.split(".")[0] for path in (stored / ".act").iterdir()} == {
        "plan", "commits", "documents", "manifest", "ranges", "SEALED",
    }  # fmt: skip


def test_stored_metadata_is_that_of_the_document(stored):
    plan = _plan(stored)
    for name, expected in documented_arrays(TEXT, plan, complete=True).items():
        assert json.loads((stored / name / "zarr.json").read_bytes()) == expected
    root = json.loads((stored / "zarr.json").read_bytes())
    assert root == group_metadata(plan, status="complete")
    assert set(root["attributes"]) == {"actstore", "zarr_conventions", "model", "title"}
    assert set(root["attributes"]["actstore"]) == set(documented_fields(TEXT, "RootAttributes")) - {"generation"}


def _plan(stored: Path) -> Plan:
    return Plan.from_json((stored / ".act/plan.json").read_bytes(), where="plan")


# --- JSON Schema ---


def json_schema(model: type[pydantic.BaseModel]) -> str:
    """The schema as it is committed. Titles are left out: pydantic makes them from the names."""

    def without_titles(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: without_titles(inner) for key, inner in value.items() if key != "title" or isinstance(inner, dict)
            }  # fmt: skip
        return [without_titles(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(without_titles(model.model_json_schema()), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_those_of_the_code(name):
    committed = (DOCS / "schema" / f"{name}.json").read_text(encoding="utf-8")
    assert committed == json_schema(SCHEMAS[name]), "run: python tests/test_format_document.py --write"
    assert f"<schema/{name}.json>" in TEXT


def test_meta_a_changed_model_would_be_found():
    class Seal(commits.Seal):
        host: str

    assert json_schema(Seal) != (DOCS / "schema" / "seal.json").read_text(encoding="utf-8")


def test_no_schema_is_left_over():
    assert {path.stem for path in (DOCS / "schema").glob("*.json")} == set(SCHEMAS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_format_document.py --write")
    for name, model in SCHEMAS.items():
        (DOCS / "schema" / f"{name}.json").write_text(json_schema(model), encoding="utf-8")
