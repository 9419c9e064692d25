"""Layout: blocks, shards and chunks against brute-force counting, and every error message."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actstore import Plan
from actstore.errors import InputError, UnknownNameError
from actstore.layout import (
    CHUNK_BYTES,
    ITEM_BYTES,
    MAX_BLOCKS,
    MAX_SHARD_BYTES,
    SHARD_BYTES,
    Column,
    Layout,
    Site,
    norm_name,
)

# Fields only: beartype looks at a random item of every tuple, and hypothesis forbids that inside strategies.
LAYERS = st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True).map(tuple)


def site_fields(widest):
    fields = st.tuples(st.integers(1, widest), LAYERS, st.sampled_from(["bfloat16", "float16", "float32"]))
    return st.lists(fields, min_size=1, max_size=4)


def make_sites(fields):
    return tuple(Site(f"site{number}", *field) for number, field in enumerate(fields))


def make_layout(fields):
    sites, samples, chunk, chunks = fields
    return Layout(make_sites(sites), samples, chunk * chunks, chunk)


FIELDS = st.tuples(site_fields(64), st.integers(1, 3000), st.integers(1, 40), st.integers(1, 10))


@given(FIELDS)
def test_blocks_tile_the_samples(fields):
    layout = make_layout(fields)
    ranges = [layout.block_range(block) for block in range(layout.blocks)]
    assert [row for span in ranges for row in range(*span)] == list(range(layout.samples))
    sizes = [stop - start for start, stop in ranges]
    assert all(size == layout.block_samples for size in sizes[:-1])
    assert 1 <= sizes[-1] <= layout.block_samples


@given(FIELDS)
def test_sizes_are_those_of_the_arrays(fields):
    layout = make_layout(fields)
    arrays = [
        np.broadcast_to(np.zeros((), site.dtype), (site.rows_per_sample, layout.samples, site.width))
        for site in layout.sites
    ]
    assert layout.data_bytes == sum(array.nbytes for array in arrays)
    assert layout.shards == sum(len(array) * len(range(0, layout.samples, layout.block_samples)) for array in arrays)
    assert layout.block_bytes == sum(array[:, :1].nbytes for array in arrays) * layout.block_samples
    assert layout.padded_samples >= layout.samples
    assert layout.padded_samples - layout.samples < layout.block_samples
    assert layout.padded_samples % layout.block_samples == layout.block_samples % layout.chunk_samples == 0


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_item_bytes_are_those_of_numpy(dtype):
    assert np.dtype(dtype).itemsize == ITEM_BYTES[dtype]


@given(site_fields(20_000), st.integers(1, 10**10), st.integers(1 << 20, 1 << 34))
def test_a_fitted_layout_keeps_its_bounds(fields, samples, memory_bytes):
    sites = make_sites(fields)
    row_bytes = sum(site.row_bytes * site.rows_per_sample for site in sites)
    assume(samples < MAX_BLOCKS * max(min(memory_bytes // 3, SHARD_BYTES) // row_bytes // 2, 1))
    layout = Layout.fit(sites, samples=samples, memory_bytes=memory_bytes)
    widest = max(site.width * np.dtype(site.dtype).itemsize for site in sites)
    assert layout.samples == samples
    assert layout.block_samples * widest <= SHARD_BYTES
    assert layout.chunk_samples * widest <= CHUNK_BYTES
    assert layout.memory_bytes == 3 * layout.block_bytes
    assert layout.memory_bytes <= memory_bytes or layout.block_samples == 1
    assert layout.blocks > 1 or layout.padded_samples - samples < layout.chunk_samples


@given(site_fields(5000), st.integers(1, 10**9), st.integers(1, 1 << 20))
def test_a_given_block_is_kept_or_rounded_up_by_an_eighth_to_have_good_chunks(fields, samples, block_samples):
    sites = make_sites(fields)
    assume(max(site.row_bytes for site in sites) * block_samples <= MAX_SHARD_BYTES)
    assume(samples <= MAX_BLOCKS * block_samples)
    layout = Layout.fit(sites, samples=samples, block_samples=block_samples)
    assert block_samples <= layout.block_samples <= block_samples * 9 / 8
    ideal = min(CHUNK_BYTES // max(site.row_bytes for site in sites), block_samples)
    assert layout.chunk_samples >= ideal / 32  # a power of two below, an eighth of the block, a power of two below that


BLOCKS = {
    "of whole chunks": (65_536, 65_536, 2048),
    "of a few chunks": (6144, 6144, 2048),
    "of one small chunk": (7, 7, 1),
    "prime": (4099, 4608, 512),
    "round in decimal": (100_000, 100_352, 2048),
    "a prime below a chunk": (1009, 1024, 64),
}


@pytest.mark.parametrize(("asked", "block", "chunk"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_that_are_asked_for(asked, block, chunk):
    layout = Layout.fit([Site("resid_post", 128, (1,))], samples=10**6, block_samples=asked)
    assert (layout.block_samples, layout.chunk_samples) == (block, chunk)


NOT_NUMBERS = {
    "Layout.fit([Site('a', 4, (0,))], samples=2.5)": "samples is 2.5; expected a whole number",
    "Site('a', '4', (0,))": "width of site 'a' is '4'; expected a whole number",
    "Site('a', 4, 3)": "layers is 3; expected several numbers, such as (6, 12), or None for a layerless site",
    "Site('a', 4, ('x',))": "a layer of site 'a' is 'x'; expected a whole number",
}


NUMBERS = (
    "Layout.fit([Site('a', np.int64(4), np.arange(2))], samples=np.int64(100), block_samples=np.int32(16))",
    "Layout.fit([Site('a', 4, range(2))], samples=100, block_samples=16)",
    "Layout.fit([Site('a', 4, [0, 1])], samples=100, block_samples=16)",
)


def unchecked(calls):
    """What expressions give, or the text of their error, in a process whose arguments no type checker sees."""
    code = """
import sys
import numpy as np
from actstore import Layout, Plan, Site
for call in sys.argv[1:]:
    try:
        print(Plan.make(eval(call), {}).to_json().decode())
    except ValueError as error:
        print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code, *calls], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def test_what_is_no_number_is_refused():
    assert unchecked(NOT_NUMBERS) == list(NOT_NUMBERS.values())


def test_numbers_of_any_kind_give_the_same_plan():
    layout = Layout.fit([Site("a", 4, (0, 1))], samples=100, block_samples=16)
    assert unchecked(NUMBERS) == [Plan.make(layout, {}).to_json().decode()] * len(NUMBERS)


@pytest.mark.parametrize(
    ("width", "dtype", "block", "chunk"),
    [(896, "bfloat16", 65_536, 256), (4096, "bfloat16", 16_384, 64), (4096, "float32", 8192, 32)],
    ids=["qwen-0.5b", "8b", "8b-float32"],
)
def test_models_get_the_shards_of_the_design(width, dtype, block, chunk):
    layout = Layout.fit([Site("resid_post", width, (6,), dtype)], samples=10**8)
    assert (layout.block_samples, layout.chunk_samples) == (block, chunk)


def test_a_small_store_is_one_block():
    layout = Layout.fit([Site("resid_post", 896, (6, 12))], samples=1000)
    assert (layout.blocks, layout.block_samples, layout.chunk_samples) == (1, 1024, 256)


SITE_ERRORS = {
    "name with a dash": (("resid-post", 4, (0,)), "site name 'resid-post' is not allowed; use up to 64 letters"),
    "empty name": (("", 4, (0,)), "site name '' is not allowed"),
    "non-ASCII name": (("größe", 4, (0,)), "site name 'größe' is not allowed"),
    "path": (("../x", 4, (0,)), "site name '../x' is not allowed"),
    "hidden name": (("_x", 4, (0,)), "site name '_x' is not allowed"),
    "long name": (("x" * 65, 4, (0,)), "is not allowed; use up to 64"),
    "reserved name": (("valid", 4, (0,)), "site name 'valid' is used by the format itself (assets, documents, "),
    "dtype": (("a", 4, (0,), "int8"), "site 'a' has dtype 'int8'; expected one of bfloat16, float16, float32"),
    "no width": (("a", 0, (0,)), "site 'a' has width 0; expected 1 to 1,048,576 values"),
    "no layers": (("a", 4, ()), "site 'a' has no layers; name at least one, or None for a layerless site"),
    "layer twice": (("a", 4, (3, 3)), "site 'a' has layers [3, 3]; expected distinct numbers >= 0"),
    "negative layer": (("a", 4, (-1,)), "site 'a' has layers [-1]; expected distinct numbers >= 0"),
}


@pytest.mark.parametrize(("arguments", "message"), SITE_ERRORS.values(), ids=SITE_ERRORS.keys())
def test_a_site_that_cannot_be_stored_is_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        Site(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("sample", "int32", "column name 'sample' is used by the format itself"),
        ("a b", "int32", "column name 'a b' is not allowed"),
        ("a", "bool", "column 'a' has dtype 'bool'; expected one of int8, int16, int32, int64, uint8"),
    ],
    ids=["reserved", "space", "dtype"],
)
def test_a_column_that_cannot_be_stored_is_refused(name, dtype, message):
    with pytest.raises(InputError, match="^" + message):
        Column(name, dtype)


GOOD = Layout((Site("a", 4, (1, 3)), Site("b", 8, (3,)), Site("c", 4, None)), 100, 32, 8)
WIDE = (Site("b", 4096, None),)
LAYOUT_ERRORS = {
    "no sites": ({"sites": ()}, "a layout needs 1 to 256 sites and at most 256 columns, found 0 and "),
    "too many columns": (
        {"columns": tuple(Column(f"c{i}", "int8") for i in range(257))},
        "a layout needs 1 to 256 sites and at most",
    ),
    "too many samples": ({"samples": 1 << 41}, "samples is 2,199,023,255,552; expected at most 1,099,511,627,776"),
    "too many blocks": (
        {"samples": 1 << 33, "block_samples": 32},
        "8,589,934,592 samples in blocks of 32 are 268,435,456 blocks, at",
    ),
    "site twice": ({"sites": (Site("a", 4, (0,)), Site("a", 8, (0,)))}, "the names ['a', 'a_norm'] are used twice;"),
    "norm of another": ({"sites": (Site("a", 4, (0,)), Site("a_norm", 1, (0,)))}, "the names ['a_norm'] are used"),
    "column as site": ({"columns": (Column("a", "int32"),)}, "the names ['a'] are used twice"),
    "column as axis of layers": ({"columns": (Column("b_layer", "int32"),)}, "the names ['b_layer'] are used twice"),
    "column as axis of widths": ({"columns": (Column("b_hidden", "int32"),)}, "the names ['b_hidden'] are used twice"),
    "codec": ({"codec": "lz4"}, "codec 'lz4' is unknown; expected one of crc32c, none, zstd"),
    "no samples": ({"samples": 0}, "samples is 0; expected a positive number"),
    "no block": ({"block_samples": 0}, "block_samples is 0; expected a positive number"),
    "no chunk": ({"chunk_samples": 0}, "chunk_samples is 0; expected a positive number"),
    "not a multiple": (
        {"block_samples": 30},
        "block_samples 30 is not a multiple of chunk_samples 8; try block_samples=32",
    ),
    "large shard": (
        {"sites": WIDE, "block_samples": 1 << 18},
        (
            "a shard of site 'b' would have 2,147,483,648 bytes, at most 1,073,741,824 can be written at once; "
            "use block_samples <= 131072"
        ),
    ),
    "large block": ({"block_samples": 1 << 24}, "block_samples is 16,777,216; expected at most 8,388,608"),
    "large chunk": ({"block_samples": 1 << 21, "chunk_samples": 1 << 21}, "chunk_samples is 2,097,152; expected at"),
    "too many layers of all sites": (
        {"sites": tuple(Site(f"s{number}", 1, tuple(range(1024))) for number in range(17))},
        "the number of layers of all sites is 17,408; expected at most 16,384",
    ),
    "a block of thousands of digits": ({"block_samples": 10**4000, "chunk_samples": 7}, "block_samples is 10,000,0"),
}


@pytest.mark.parametrize(("changes", "message"), LAYOUT_ERRORS.values(), ids=LAYOUT_ERRORS.keys())
def test_a_layout_that_cannot_be_stored_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(GOOD, **changes)
    assert str(caught.value).startswith(message)


def test_the_remedy_of_a_large_shard_works():
    assert dataclasses.replace(GOOD, sites=WIDE, block_samples=131_072).block_samples == MAX_SHARD_BYTES // 8192


def test_fit_needs_a_site():
    with pytest.raises(InputError, match="a layout needs at least one site, found none"):
        Layout.fit([], samples=3)


@pytest.mark.parametrize("block", [-1, 4, 10**9])
def test_a_block_that_is_not_there_is_refused(block):
    with pytest.raises(InputError, match=f"block {block} does not exist; this layout has blocks 0 to 3"):
        GOOD.block_range(block)


@pytest.mark.parametrize(
    ("site", "layer", "index"),
    [("a", 1, 0), ("a", 3, 1), ("b", 3, 0), ("b", None, 0), ("c", None, 0)],
    ids=["first", "second", "only", "only-unnamed", "layerless"],
)
def test_layers_are_found_by_their_labels(site, layer, index):
    assert GOOD.site(site).layer_index(layer) == index


@pytest.mark.parametrize(
    ("site", "layer", "error", "message"),
    [
        ("a", 2, UnknownNameError, r"layer 2 of site 'a' is not in this store; it holds layers \[1, 3\]"),
        ("a", None, InputError, r"site 'a' holds layers \[1, 3\]; say which one with `layer=`"),
        ("c", 1, UnknownNameError, "site 'c' has no layers, asked for layer 1; leave `layer` out"),
    ],
    ids=["unknown", "unsaid", "layerless"],
)
def test_a_layer_that_is_not_there_is_refused(site, layer, error, message):
    with pytest.raises(error, match=message):
        GOOD.site(site).layer_index(layer)


def test_an_unknown_site_is_refused():
    with pytest.raises(UnknownNameError, match="site 'd' is not in this store; it holds a, b, c"):
        GOOD.site("d")


def test_axes_are_shared_where_they_are_the_same():
    assert [GOOD.layer_dimension(site) for site in GOOD.sites[:2]] == ["layer", "b_layer"]
    assert [GOOD.width_dimension(site) for site in GOOD.sites] == ["hidden", "b_hidden", "hidden"]
    assert norm_name("a") == "a_norm"


@given(FIELDS)
def test_a_dimension_name_has_one_length(fields):
    """xarray refuses a dataset in which one name stands for two lengths."""
    layout = make_layout(fields)
    lengths: dict[str, set[object]] = {}
    for site in layout.sites:
        lengths.setdefault(layout.width_dimension(site), set()).add(site.width)
        if site.layers is not None:
            lengths.setdefault(layout.layer_dimension(site), set()).add(site.layers)
    assert all(len(found) == 1 for found in lengths.values())
    assert math.prod(map(len, lengths.values())) == 1
