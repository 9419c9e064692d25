"""The stored JSON documents: canonical bytes, fingerprints, differences by name, and hostile input."""

import dataclasses
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore import Column, Layout, Plan, Site
from actstore.commits import Manifest, Marker, Seal, TableMarker
from actstore.errors import CorruptStoreError, InputError, PlanMismatchError
from actstore.schema import DocumentTableLayout, RootAttributes
from actstore.untrusted import MAX_DEPTH, canonical_json, parse_json

LAYOUT = Layout((Site("a", 4, (1, 3)), Site("b", 8, None, "float16")), 100, 32, 8)
PROVENANCE = {"model": {"name": "tiny", "sha": "ff"}, "list": [1, 2.5, None, True, {"deep": "é"}]}
TABLE = DocumentTableLayout(documents=3, tokens=40, numbers={"pages": "int64"}, strings={"id": 9, "text": 120})
ASSETS = {"tokenizer.json": b"{}"}
PLAN = Plan.make(LAYOUT, PROVENANCE, TABLE, ASSETS)
MARKER = Marker(
    format=1, block=2, samples=(64, 96), fingerprint=PLAN.fingerprint, checksums={"a": ("0" * 32, "f" * 32)}
)
DOCUMENTS = {
    "plan": PLAN,
    "plan without documents": Plan.make(LAYOUT, {}),
    "marker": MARKER,
    "marker with chunks": MARKER.model_copy(update={"chunks": {"a": ("0123cdef", "f" * 16)}}),
    "documents marker": TableMarker(format=1, fingerprint=PLAN.fingerprint, checksums={"text_bytes": "a" * 32}),
    "manifest": Manifest(format=1, fingerprint=PLAN.fingerprint, blocks=(MARKER, MARKER)),
    "seal": Seal(format=1, fingerprint=PLAN.fingerprint, manifest_sha256="0" * 64),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_document_comes_back_as_it_was(document):
    data = document.to_json()
    again = type(document).from_json(data, where="x")
    assert again == document
    assert again.to_json() == data
    assert json.loads(data)["format"] == 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_pieces_of_a_manifest_are_its_json(count):
    whole = Manifest(format=1, fingerprint=PLAN.fingerprint, blocks=(MARKER,) * count)
    assert b"".join(Manifest.pieces(PLAN.fingerprint, (marker.to_json() for marker in whole.blocks))) == whole.to_json()


@given(JSON)
def test_canonical_json_says_the_same_as_json(value):
    data = canonical_json(value)
    assert json.loads(data) == value == parse_json(data, where="x")
    assert data.isascii()
    assert data == canonical_json(json.loads(json.dumps(value, indent=3)))


def test_canonical_json_sorts_keys_and_has_no_spaces():
    assert canonical_json({"b": [1, 2], "a": {"é": None}}) == b'{"a":{"\\u00e9":null},"b":[1,2]}'


@given(JSON)
def test_any_json_can_be_provenance(value):
    plan = Plan.make(LAYOUT, {"key": value})
    assert Plan.from_json(plan.to_json(), where="x") == plan


# Fingerprint


OTHER_LAYOUTS = {
    "samples": dataclasses.replace(LAYOUT, samples=101),
    "block_samples": dataclasses.replace(LAYOUT, block_samples=64),
    "chunk_samples": dataclasses.replace(LAYOUT, chunk_samples=16),
    "codec": dataclasses.replace(LAYOUT, codec="none"),
    "column dropped": dataclasses.replace(LAYOUT, columns=LAYOUT.columns[:2]),
    "column dtype": dataclasses.replace(LAYOUT, columns=(*LAYOUT.columns[:2], Column("token_id", "int64"))),
    "column order": dataclasses.replace(LAYOUT, columns=LAYOUT.columns[::-1]),
    "site order": dataclasses.replace(LAYOUT, sites=LAYOUT.sites[::-1]),
    "site name": dataclasses.replace(LAYOUT, sites=(Site("c", 4, (1, 3)), LAYOUT.sites[1])),
    "width": dataclasses.replace(LAYOUT, sites=(Site("a", 5, (1, 3)), LAYOUT.sites[1])),
    "layers": dataclasses.replace(LAYOUT, sites=(Site("a", 4, (1, 2)), LAYOUT.sites[1])),
    "layer order": dataclasses.replace(LAYOUT, sites=(Site("a", 4, (3, 1)), LAYOUT.sites[1])),
    "layerless": dataclasses.replace(LAYOUT, sites=(Site("a", 4, None), LAYOUT.sites[1])),
    "dtype": dataclasses.replace(LAYOUT, sites=(Site("a", 4, (1, 3), "float32"), LAYOUT.sites[1])),
}
OTHERS = {
    **{f"layout: {name}": (layout, PROVENANCE, TABLE, ASSETS) for name, layout in OTHER_LAYOUTS.items()},
    "no documents": (LAYOUT, PROVENANCE, None, ASSETS),
    "documents": (LAYOUT, PROVENANCE, TABLE.model_copy(update={"documents": 4}), ASSETS),
    "tokens": (LAYOUT, PROVENANCE, TABLE.model_copy(update={"tokens": 41}), ASSETS),
    "document column": (LAYOUT, PROVENANCE, TABLE.model_copy(update={"numbers": {}}), ASSETS),
    "asset": (LAYOUT, PROVENANCE, TABLE, {"tokenizer.json": b"[]"}),
    "asset name": (LAYOUT, PROVENANCE, TABLE, {"config.json": b"{}"}),
    "no assets": (LAYOUT, PROVENANCE, TABLE, None),
    "provenance value": (LAYOUT, {**PROVENANCE, "model": {"name": "tiny", "sha": "fe"}}, TABLE, ASSETS),
    "provenance key": (LAYOUT, {**PROVENANCE, "more": 1}, TABLE, ASSETS),
    "provenance order": (LAYOUT, {**PROVENANCE, "list": PROVENANCE["list"][::-1]}, TABLE, ASSETS),
}  # fmt: skip


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS.keys())
def test_whatever_differs_changes_the_fingerprint(arguments):
    other = Plan.make(*arguments)
    assert other.fingerprint != PLAN.fingerprint
    with pytest.raises(PlanMismatchError, match=r"^run holds another run, with [1-9][0-9]* differing fields"):
        PLAN.refuse_other(other, url="run")


def test_every_pair_of_other_plans_differs():
    fingerprints = [Plan.make(*arguments).fingerprint for arguments in OTHERS.values()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_equal_content_has_an_equal_fingerprint():
    shuffled = dict(reversed(PROVENANCE.items()))
    assert Plan.make(LAYOUT, shuffled, TABLE, ASSETS).fingerprint == PLAN.fingerprint
    PLAN.refuse_other(Plan.make(LAYOUT, shuffled, TABLE, ASSETS), url="run")


def test_the_fingerprint_of_format_1_never_changes():
    """A store of last year must still be continued. If this fails, the format was changed."""
    plan = Plan.make(Layout((Site("resid_post", 8, (1, 3)),), 10, 4, 2), {"model": {"name": "golden"}})
    assert plan.fingerprint == "4f70070c490239f0d2e04d82d7c1a07c841ba0499e23bdf6a2ccdeb749950542"


def test_a_mismatch_names_the_fields_with_both_values():
    other = Plan.make(
        dataclasses.replace(LAYOUT, samples=99, codec="zstd"), {**PROVENANCE, "model": {"name": "large", "sha": "ff"}},
        TABLE, ASSETS,
    )  # fmt: skip
    with pytest.raises(PlanMismatchError) as caught:
        PLAN.refuse_other(other, url="runs/x.acts.zarr")
    assert str(caught.value) == (
        "runs/x.acts.zarr holds another run, with 3 differing fields (layout.codec: there \"zstd\", here \"crc32c\"; "
        'layout.samples: there 99, here 100; provenance.model.name: there "large", here "tiny"); '
        "choose another target, or give the same settings to continue that run"
    )  # fmt: skip


def test_a_mismatch_stays_short():
    many = {f"setting_{number}": "x" * 1000 for number in range(50)}
    with pytest.raises(PlanMismatchError, match="; and 42 more") as caught:
        PLAN.refuse_other(Plan.make(LAYOUT, PROVENANCE | many, TABLE, ASSETS), url="run")
    assert len(str(caught.value)) < 1200


BAD_PROVENANCE = {
    "not a number": (
        {"x": float("nan")},
        "cannot plan this store: provenance.x.float is nan: Input should be a finite",
    ),
    "infinity": ({"x": {"y": [float("-inf")]}}, "is -inf: Input should be a finite number"),
    "object": ({"x": object()}, "cannot plan this store: provenance.x is <object"),
    "bytes": ({"x": b"a"}, "cannot plan this store: provenance.x is b'a': input was not a valid JSON value"),
    "too deep": ({"x": json.loads("[" * 40 + "]" * 40)}, "provenance is nested deeper than 32 levels; flatten it"),
}


@pytest.mark.parametrize(("provenance", "message"), BAD_PROVENANCE.values(), ids=BAD_PROVENANCE.keys())
def test_provenance_that_is_not_json_is_refused(provenance, message):
    with pytest.raises(InputError) as caught:
        Plan.make(LAYOUT, provenance)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "x" * 65, "ä"])
def test_an_asset_needs_a_plain_name(name):
    with pytest.raises(InputError, match=r"cannot plan this store: assets\..* is "):
        Plan.make(LAYOUT, {}, None, {name: b""})


# Hostile input


HOSTILE = {
    "empty": (b"", "is not valid JSON (Expecting value"),
    "cut off": (PLAN.to_json()[:-1], "is not valid JSON (Expecting"),
    "not UTF-8": (b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec can't decode byte 0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not valid JSON ('utf-8' codec"),
    "duplicate key": (b'{"a": 1, "a": 1}', "is not valid JSON (a key appears twice)"),
    "deep duplicate key": (b'{"b": [{"a": 1, "a": 2}]}', "is not valid JSON (a key appears twice)"),
    "NaN": (b'{"a": NaN}', "is not valid JSON (NaN is not JSON)"),
    "infinity": (b"[-Infinity]", "is not valid JSON (-Infinity is not JSON)"),
    "number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "is not valid JSON (Exceeds the limit"),
    "200,000 brackets": (b"[" * 200_000, "is nested deeper than 32 levels; not read"),
    "200,000 closed brackets": (b"[" * 200_000 + b"]" * 200_000, "is nested deeper than 32 levels; not read"),
    "200,000 objects": (b'{"a":' * 200_000, "is nested deeper than 32 levels; not read"),
    "brackets after an escaped quote": (b'{"a\\"":' + b"[" * 50 + b"]" * 50 + b"}", "is nested deeper than 32 levels"),
    "two documents": (b"{}{}", "is not valid JSON (Extra data"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_refused_fast(data, message):
    started = time.perf_counter()
    with pytest.raises(CorruptStoreError) as caught:
        Plan.from_json(data, where="run/plan.json")
    assert time.perf_counter() - started < 2
    assert str(caught.value).startswith(f"run/plan.json {message}")
    assert len(str(caught.value)) < 300


def test_brackets_in_strings_are_not_depth():
    value = {"text": "[{" * 100, 'quo"te\\': ["[[[["] * 50, "deep": json.loads("[" * 31 + "]" * 31)}
    assert parse_json(canonical_json(value), where="x") == value


@pytest.mark.parametrize("levels", [MAX_DEPTH, MAX_DEPTH + 1])
def test_the_depth_limit_is_exact(levels):
    data = b"[" * levels + b"]" * levels
    if levels > MAX_DEPTH:
        with pytest.raises(CorruptStoreError, match="is nested deeper than 32 levels"):
            parse_json(data, where="x")
    else:
        assert parse_json(data, where="x") == json.loads(data)


def test_a_large_document_is_not_read(monkeypatch):
    monkeypatch.setattr("actstore.untrusted.MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(CorruptStoreError, match="x has 1,001 bytes, expected at most 1,000; not read"):
        parse_json(b" " * 1001, where="x")


def edited(document, **changes):
    return canonical_json(json.loads(document.to_json()) | changes)


def without(document, *fields):
    return canonical_json({key: value for key, value in json.loads(document.to_json()).items() if key not in fields})


WRONG = {
    "list": (Plan, b"[]", "x is not a plan of format 1: : Input should be an object"),
    "newer format": (Plan, edited(PLAN, format=2), "x is not a plan of format 1: format: Input should be 1"),
    "unknown field": (Seal, edited(DOCUMENTS["seal"], note="hi"), "x is not a seal of format 1: note: Extra inputs"),
    "no format": (Marker, without(MARKER, "format"), "x is not a commit marker of format 1: format: Field required"),
    "number as text": (Marker, edited(MARKER, block="2"), "block: Input should be a valid integer"),
    "missing field": (Marker, without(MARKER, "block"), "x is not a commit marker of format 1: block: Field required"),
    "negative block": (Marker, edited(MARKER, block=-1), "block: Input should be greater than or equal to 0"),
    "block as text": (Marker, edited(MARKER, block="two"), "block: Input should be a valid integer"),
    "short digest": (Marker, edited(MARKER, checksums={"a": ["00"]}), "checksums.a.0: String should match pattern"),
    "three ends": (Marker, edited(MARKER, samples=[1, 2, 3]), "samples"),
    "short fingerprint": (Seal, edited(DOCUMENTS["seal"], fingerprint="00"), "fingerprint: String should match"),
    "marker in manifest": (
        Manifest,
        edited(DOCUMENTS["manifest"], blocks=[{"format": 1}]),
        "blocks.0.block: Field required",
    ),
    "half a digest": (Marker, edited(MARKER, chunks={"a": ["0" * 12]}), "chunks.a.0: String should match pattern"),
    "no digest": (Marker, edited(MARKER, chunks={"a": [""]}), "chunks.a.0: String should match pattern"),
    "layout that cannot be": (
        Plan,
        edited(PLAN, layout=json.loads(PLAN.to_json())["layout"] | {"samples": 0}),
        "layout: Value error, samples is 0; expected a positive number",
    ),
    "path as asset": (Plan, edited(PLAN, assets={"../../etc/passwd": "0" * 64}), "assets.../../etc/passwd"),
    "infinite number": (Plan, PLAN.to_json().replace(b"2.5", b"1e999"), "finite number"),
    "edited": (Plan, PLAN.to_json().replace(b'"tiny"', b'"Tiny"'), f"x has the fingerprint {PLAN.fingerprint[:12]}, "),
}


@pytest.mark.parametrize(("kind", "data", "message"), WRONG.values(), ids=WRONG.keys())
def test_json_of_another_shape_is_refused(kind, data, message):
    with pytest.raises(CorruptStoreError) as caught:
        kind.from_json(data, where="x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_documents_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        PLAN.fingerprint = "0" * 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.layout.samples = 3
    with pytest.raises(ValueError, match="frozen"):
        RootAttributes(format=1, status="writing", fingerprint="0" * 64).status = "complete"
