"""The writer: bytes against TensorStore's own, the order of writes as the system sees it, kills, and refusals."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import stores
import tensorstore as ts
from stores import LAYOUT, make_contents, raw_tensorstore, tree

import actstore
from actstore import Layout, Site
from actstore.errors import InputError, PlanMismatchError, SealedStoreError, StorageError, UnfinishedStoreError
from actstore.kvstore import Root
from actstore.metadata import array_metadata
from actstore.shards import chunk_digests

CODECS = ["crc32c", "none", "zstd"]
SMALL = make_contents(Layout((Site("resid_post", 3, (0, 4)),), 11, 4, 2), documents=False)


def expected_arrays(contents):
    """Every array of a store of `contents`, apart from the documents, from the values in memory."""
    layout = contents.layout
    arrays = dict(contents.rows) | dict(contents.columns)
    for name, rows in contents.rows.items():
        arrays[f"{name}_norm"] = np.linalg.norm(rows.astype(np.float64), axis=-1)
    first = next(site.layers for site in layout.sites if site.layers is not None)
    for site in layout.sites:
        if site.layers is not None:
            arrays["layer" if site.layers == first else f"{site.name}_layer"] = np.array(site.layers)
    return arrays | {"valid": np.ones(layout.samples)}


@pytest.mark.parametrize("codec", CODECS)
def test_tensorstore_reads_what_was_written(tmp_path, codec):
    contents = make_contents(dataclasses.replace(LAYOUT, codec=codec), documents=False)
    path = contents.write(tmp_path / "x.acts.zarr")
    expected = expected_arrays(contents)
    assert set(expected) == set(array_metadata(contents.plan, complete=True))
    for name, values in expected.items():
        stored = raw_tensorstore(path, name).read().result()
        assert stored.shape == values.shape
        if name.endswith("_norm"):
            np.testing.assert_allclose(stored, values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_shards_are_byte_for_byte_those_of_tensorstore(tmp_path, codec, chunk):
    layout = dataclasses.replace(LAYOUT, codec=codec, chunk_samples=chunk, columns=())
    contents = make_contents(layout, documents=False)
    path = contents.write(tmp_path / "x.acts.zarr", seal=False)
    for name, rows in contents.rows.items():
        shutil.copytree(path / name, tmp_path / name, ignore=shutil.ignore_patterns("c"))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / name}/"}}
        array = ts.open({**spec, "store_data_equal_to_fill_value": True}, open=True).result()
        padded = np.full(array.shape, np.nan, rows.dtype)
        padded[..., : layout.samples, :] = rows
        array.write(padded).result()
        assert tree(path / name) == tree(tmp_path / name)


def slow_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, as RFC 3720 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_slow_checksum_is_that_of_the_standard():
    assert slow_crc32c(b"123456789") == 0xE3069283
    assert slow_crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_markers_have_the_checksum_of_every_chunk(tmp_path, codec, chunk):
    """Of the rows in memory; the last chunk of the last block counts without its padding."""
    layout = dataclasses.replace(LAYOUT, codec=codec, chunk_samples=chunk)
    contents = make_contents(layout, documents=False)
    path = contents.write(tmp_path / "x.acts.zarr")
    for block in range(layout.blocks):
        first, last = layout.block_range(block)
        expected = {}
        for site in layout.sites:
            layers = contents.rows[site.name].reshape(site.rows_per_sample, layout.samples, site.width)
            starts = range(first, last, chunk)
            expected[site.name] = [
                "".join(f"{slow_crc32c(rows[at : min(at + chunk, last)].tobytes()):08x}" for at in starts)
                for rows in layers
            ]
        marker = json.loads((path / f".act/commits/{block:08d}.json").read_bytes())
        assert marker["chunks"] == expected


PARTS = {  # start, samples, chunk_samples: where the pieces end
    "one chunk": (0, 4, 4, [4]),
    "from a chunk's middle": (3, 9, 4, [1, 5, 9]),
    "within a chunk": (5, 2, 4, [2]),
    "to a chunk's end": (6, 2, 4, [2]),
    "one row at a chunk's end": (7, 6, 4, [1, 5, 6]),
    "far away": (10**12 + 2, 3, 4, [2, 3]),
    "chunks of one": (5, 3, 1, [1, 2, 3]),
}


@pytest.mark.parametrize(("start", "count", "chunk", "ends"), PARTS.values(), ids=PARTS.keys())
def test_chunks_are_cut_at_their_edges_wherever_the_rows_begin(start, count, chunk, ends):
    rows = stores.make_rows(Site("a", 3, None), count)
    pieces = [rows[first:last].tobytes() for first, last in itertools.pairwise([0, *ends])]
    expected = "".join(f"{slow_crc32c(piece):08x}" for piece in pieces)
    assert chunk_digests(rows, start=start, chunk_samples=chunk) == expected


def test_a_marker_that_would_be_too_long_has_no_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.writer.MAX_CHUNK_DIGESTS", 4)  # a block of SMALL has two layers of two chunks
    path = SMALL.write(tmp_path / "x.acts.zarr")
    assert json.loads((path / ".act/commits/00000000.json").read_bytes())["chunks"].keys() == {"resid_post"}
    monkeypatch.setattr("actstore.writer.MAX_CHUNK_DIGESTS", 3)
    path = SMALL.write(tmp_path / "y.acts.zarr")
    assert json.loads((path / ".act/commits/00000000.json").read_bytes())["chunks"] == {}
    actstore.open(path)


def test_labels_and_valid_of_an_unfinished_store(unfinished, contents):
    for name, values in expected_arrays(contents).items():
        if name.endswith("layer"):
            np.testing.assert_array_equal(raw_tensorstore(unfinished, name).read().result(), values)
    valid = raw_tensorstore(unfinished, "valid").read().result()
    committed = np.r_[16:32, 48:53]
    np.testing.assert_array_equal(np.flatnonzero(valid), committed)  # the padding after sample 52 is not valid
    for name, rows in contents.rows.items():
        stored = raw_tensorstore(unfinished, name).read().result()
        np.testing.assert_array_equal(stored[..., committed, :], rows[..., committed, :])
        assert np.isnan(np.delete(stored.astype(np.float32), committed, axis=-2)).all()


ORDERS = {
    "backwards": [3, 2, 1, 0],
    "mixed": [2, 0, 3, 1],
    "every block twice": [0, 0, 1, 2, 3, 3, 2, 1],
    "again after all": [0, 1, 2, 3, 0, 1, 2, 3],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_order_of_blocks_does_not_change_a_byte(tmp_path, contents, finished, order):
    assert tree(contents.write(tmp_path / "x.acts.zarr", blocks=order)) == tree(finished)


def test_blocks_of_several_runs_make_the_same_store(tmp_path, contents, finished):
    path = tmp_path / "x.acts.zarr"
    for blocks in ([2], [], [0, 2], [1, 3]):
        contents.write(path, blocks=blocks, seal=False)
    assert contents.create(path).missing() == []
    contents.write(path, blocks=[])
    assert tree(path) == tree(finished)


def test_a_continued_run_leaves_committed_blocks_alone(tmp_path, contents, finished):
    path = contents.write(tmp_path / "x.acts.zarr", blocks=[1, 2], seal=False)
    before = {name: (path / name).stat().st_mtime_ns for name in tree(path) if re.search(r"/c/|commits|plan", name)}
    with contents.create(path, seal=True) as writer:
        assert writer.missing() == [0, 3]
        for number in writer.missing():
            activations, columns = contents.block(number)
            writer.write(number, activations, samples=columns)
    assert "layer/c/0" in before
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before
    assert tree(path) == tree(finished)


# What may be handed over


ACCEPTED = {
    "float64": lambda rows: rows.astype(np.float64),
    "float32": lambda rows: rows.astype(np.float32),
    "not contiguous": lambda rows: np.repeat(rows, 2, axis=-1)[..., ::2],
    "Fortran order": np.asfortranarray,
    "read-only": lambda rows: np.frombuffer(rows.tobytes(), rows.dtype).reshape(rows.shape),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_equal_values_give_equal_bytes(tmp_path, contents, finished, change):
    changed = dataclasses.replace(contents, rows={name: change(rows) for name, rows in contents.rows.items()})
    assert tree(changed.write(tmp_path / "x.acts.zarr")) == tree(finished)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int16"])
def test_columns_of_another_integer_type_are_taken(tmp_path, contents, finished, dtype):
    columns = {**contents.columns, "position": contents.columns["position"].astype(dtype)}
    assert tree(dataclasses.replace(contents, columns=columns).write(tmp_path / "x.acts.zarr")) == tree(finished)


def resid(value, dtype=ml_dtypes.bfloat16):
    rows = make_contents().block(0)[0]["resid_post"].astype(dtype)
    rows[1, 3, 2] = value
    return rows


REFUSED = {
    "site missing": ({"mlp_out": None}, {}, "a block needs the sites ['attn_out', 'final_norm', 'mlp_out', 'resid"),
    "site unknown": ({"resid_pre": resid(0)}, {}, "'mlp_out', 'resid_post', 'resid_pre']; give"),
    "column missing": ({}, {"score": None}, "a block needs the columns ['document', 'flag', 'position', 'score', 'tok"),
    "column unknown": ({}, {"other": np.zeros(16)}, "; give each exactly once"),
    "too few samples": (
        {"resid_post": resid(0)[:, :15]},
        {},
        "site 'resid_post' has shape (3, 15, 6), expected (3, 16, 6): (layer, sample, width) of this block",
    ),
    "axes swapped": ({"resid_post": resid(0).transpose(1, 0, 2)}, {}, "has shape (16, 3, 6), expected"),
    "layer of a layerless site": (
        {"final_norm": np.zeros((1, 16, 3), np.float32)},
        {},
        "site 'final_norm' has shape (1, 16, 3), expected (16, 3): (sample, width) of this block",
    ),
    "integers": ({"resid_post": np.zeros((3, 16, 6), int)}, {}, "site 'resid_post' has dtype int64; expected bfloat16"),
    "other half precision": (
        {"resid_post": np.zeros((3, 16, 6), np.float16)},
        {},
        "site 'resid_post' has dtype float16; expected bfloat16, or float32 or float64 to be rounded to bfloat16",
    ),
    "float16 overflow": (
        {"mlp_out": np.full((3, 16, 4), 7e4, np.float32)},
        {},
        "site 'mlp_out' has a value of 70000, float16 ends at 65504; store this site as bfloat16 or float32",
    ),
    "column shape": ({}, {"flag": np.zeros(15, np.uint8)}, "column 'flag' has shape (15,), expected (16,)"),
    "column of fractions": ({}, {"position": np.zeros(16)}, "column 'position' has dtype float64, expected int32"),
    "column of integers": ({}, {"score": np.zeros(16, int)}, "column 'score' has dtype int64, expected float32"),
    "column of truths": ({}, {"flag": np.zeros(16, bool)}, "column 'flag' has dtype bool, expected uint8"),
    "column of text": ({}, {"position": np.full(16, "a")}, "column 'position' has dtype <U1, expected int32"),
    "column too large": ({}, {"flag": np.full(16, 256)}, "column 'flag' has values that uint8 cannot hold; use a"),
    "column negative": ({}, {"flag": np.full(16, -1)}, "column 'flag' has values that uint8 cannot hold"),
    "column over 32 bits": ({}, {"document": np.full(16, 2**40)}, "has values that int32 cannot hold"),
}  # fmt: skip


@pytest.mark.parametrize(("activations", "columns", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_block_that_does_not_fit_is_refused_at_once(tmp_path, contents, activations, columns, message):
    rows, values = contents.block(0)
    rows, values = rows | activations, values | columns
    with contents.create(tmp_path / "x.acts.zarr") as writer:
        before = tree(tmp_path)
        with pytest.raises(InputError) as caught:
            writer.write(
                0,
                {name: array for name, array in rows.items() if array is not None},
                samples={name: array for name, array in values.items() if array is not None},
            )
        assert message in str(caught.value)
        assert tree(tmp_path) == before
        activations, columns = contents.block(0)
        writer.write(0, activations, samples=columns).result()  # the writer is still good
        assert writer.missing() == [1, 2, 3]


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_is_not_in_the_layout_is_refused(tmp_path, contents, block):
    activations, columns = contents.block(0)
    writer = contents.create(tmp_path / "x.acts.zarr")
    with pytest.raises(InputError, match=f"block {block} does not exist; this plan writes blocks 0 to 3"):
        writer.write(block, activations, samples=columns)


BROKEN = {
    "NaN": ({"resid_post": resid(np.nan)}, "site 'resid_post', layer 5, sample 19 holds NaN or infinity"),
    "infinity": ({"resid_post": resid(-np.inf)}, "site 'resid_post', layer 5, sample 19 holds NaN or infinity"),
    "NaN to be rounded": ({"resid_post": resid(np.nan, np.float64)}, "site 'resid_post', layer 5, sample 19 holds NaN"),
    "infinity to be rounded": (
        {"resid_post": resid(np.inf, np.float32)},
        "site 'resid_post', layer 5, sample 19 holds",
    ),
    "layerless": (
        {"final_norm": np.full((16, 3), np.inf, np.float32)},
        "site 'final_norm', sample 16 holds NaN or inf",
    ),
}


@pytest.mark.parametrize(("activations", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_block_that_is_not_finite_is_never_committed(tmp_path, contents, activations, message):
    rows, columns = contents.block(1)
    writer = contents.create(tmp_path / "x.acts.zarr")
    error = writer.write(1, rows | activations, samples=columns).exception()
    assert type(error) is InputError
    assert str(error).startswith(message)
    assert str(error).endswith("expected finite activations; find out why the model produced it")
    assert writer.missing() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="holds NaN or infinity"):  # whoever does not look at futures hears of it
        writer.write(0, rows, samples=columns)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        writer.close()


def test_values_whose_norm_overflows_are_kept(tmp_path):
    contents = make_contents(Layout((Site("a", 2, None, "float32"),), 2, 2, 1, columns=()), documents=False)
    contents.rows["a"][:] = [[3e38, 3e38], [1, 2]]
    path = contents.write(tmp_path / "x.acts.zarr")
    np.testing.assert_array_equal(raw_tensorstore(path, "a").read().result(), contents.rows["a"])
    np.testing.assert_array_equal(raw_tensorstore(path, "a_norm").read().result(), np.float32([np.inf, 5**0.5]))


# Beginning and ending


def test_another_run_is_refused_and_changes_nothing(unfinished):
    before = tree(unfinished)
    other = dataclasses.replace(make_contents(dataclasses.replace(LAYOUT, codec="none")), provenance={"model": "x"})
    with pytest.raises(PlanMismatchError) as caught:
        other.create(unfinished)
    fields = ['layout.codec: there "crc32c", here "none"', "provenance.model: there nothing", "provenance.numbers"]
    assert all(field in str(caught.value) for field in fields)
    assert tree(unfinished) == before


def test_a_finished_store_takes_no_writer(finished, contents):
    before = tree(finished)
    with pytest.raises(SealedStoreError, match="is complete: nothing is left to write; for another run"):
        contents.create(finished)
    assert tree(finished) == before


def test_leaving_early_is_said_and_does_not_seal(tmp_path, contents):
    with pytest.raises(UnfinishedStoreError, match=r"3 of 4 blocks are not committed, first \[0, 1, 3\]; write them"):
        contents.write(tmp_path / "x.acts.zarr", blocks=[2])
    assert not (tmp_path / "x.acts.zarr" / ".act" / "SEALED.json").exists()


def test_an_exception_inside_leaves_the_store_open(tmp_path, contents):
    def fail():
        with contents.create(tmp_path / "x.acts.zarr", seal=True) as writer:
            for number in range(4):
                activations, columns = contents.block(number)
                writer.write(number, activations, samples=columns)
            raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        fail()
    assert not (tmp_path / "x.acts.zarr" / ".act" / "SEALED.json").exists()
    contents.write(tmp_path / "x.acts.zarr")


def test_no_thread_stays(tmp_path, contents):
    contents.write(tmp_path / "x.acts.zarr")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("actstore")] == []


def test_an_error_of_the_storage_reaches_the_caller(tmp_path, monkeypatch):
    writer = SMALL.create(tmp_path / "x.acts.zarr")

    def fail(root, key, value):
        raise StorageError("the cable is out")

    monkeypatch.setattr(Root, "write", fail)
    activations, columns = SMALL.block(0)
    assert isinstance(writer.write(0, activations, samples=columns).exception(), StorageError)
    with pytest.raises(StorageError, match="the cable is out"):
        writer.write(1, activations, samples=columns)
    with pytest.raises(StorageError, match="the cable is out"):
        writer.close()


def test_writing_waits_while_blocks_are_in_flight(tmp_path, monkeypatch):
    """Two blocks are taken, the third has to wait until one of them is committed."""
    gate, real = threading.Event(), Root.write

    def slow(root, key, value):
        gate.wait(60)
        real(root, key, value)

    writer = SMALL.create(tmp_path / "x.acts.zarr")
    monkeypatch.setattr(Root, "write", slow)
    taken = []

    def hand_over():
        for number in range(3):
            activations, columns = SMALL.block(number)
            taken.append(writer.write(number, activations, samples=columns))

    thread = threading.Thread(target=hand_over)
    thread.start()
    deadline = time.monotonic() + 30
    while len(taken) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(taken) == 2
    assert writer.missing() == [0, 1, 2]
    gate.set()
    thread.join(60)
    writer.close()
    assert writer.missing() == []


# Order, kills and company: other processes


def start(program: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(stores.__file__).parent)}
    command = [*before, sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


WRITE = """
import sys
from stores import make_contents
make_contents().write(sys.argv[1], blocks=map(int, sys.argv[2].split(",")), seal=False)
"""
CALL = re.compile(
    r"^(?P<start>[0-9.]+) (?P<call>rename|f(?:data)?sync)\w*\((?P<arguments>.*)\) += 0 <(?P<seconds>[0-9.]+)>$"
)


@dataclasses.dataclass(frozen=True)
class Life:
    """When an object was renamed into place, and when that was durable, in seconds."""

    begun: float
    durable: float


def lives(lines: list[str], store: Path) -> dict[str, Life]:
    """Every object of a store: synced as a file, then renamed, then its folder synced, each done before the next began.

    Raises AssertionError where that is not so.
    """
    syncs: dict[str, list[tuple[float, float]]] = {}
    renames: list[tuple[float, float, str, str]] = []
    for match in filter(None, map(CALL.search, lines)):
        begin = float(match["start"])
        end = begin + float(match["seconds"])
        if match["call"] == "rename":
            source, target = re.findall(r'"([^"]+)"', match["arguments"])
            renames.append((begin, end, source, target))
        else:
            syncs.setdefault(re.search("<(.+)>", match["arguments"])[1], []).append((begin, end))
    found = {}
    for begin, end, source, target in renames:
        assert any(done <= begin for _, done in syncs.get(source, [])), f"{source} was renamed before it was synced"
        folder = [done for start, done in syncs.get(str(Path(target).parent), []) if start >= end]
        assert folder, f"the folder of {target} was not synced after the rename"
        found[str(Path(target).relative_to(store))] = Life(begin, min(folder))
    return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The life of every object that a process made that wrote blocks 2 and 0."""
    folder = tmp_path_factory.mktemp("traced").resolve()
    if shutil.which("strace") is None:
        pytest.skip("no strace here: the order of writes is not proven")
    strace = (
        "strace", "--follow-forks", "--output-separately", f"--output={folder}/t", "-y", "-s", "4096", "-qq",
        "--syscall-times=us", "--absolute-timestamps=format:unix,precision:us",
        "--trace=rename,renameat,renameat2,fsync,fdatasync",
    )  # fmt: skip
    process = start(WRITE, folder / "x.acts.zarr", "2,0", before=strace)
    _, errors = process.communicate(timeout=300)
    if "ptrace" in errors:
        pytest.skip(f"strace may not trace here: {errors.strip()}")
    assert process.returncode == 0, errors
    lines = [line for path in folder.glob("t.*") for line in path.read_text().splitlines()]
    return lives(lines, folder / "x.acts.zarr")


@pytest.mark.parametrize("block", [0, 2])
def test_shards_then_valid_then_marker(traced, contents, block):
    """As the system sees it: a step begins when the one before is on the disk."""
    valid, marker = traced[f"valid/c/{block}"], traced[f".act/commits/{block:08d}.json"]
    keys = [f"{name}/c/{block}" for name in contents.columns]
    for site in contents.layout.sites:
        for layer in [""] if site.layers is None else [f"{index}/" for index in range(len(site.layers))]:
            keys += [f"{site.name}/c/{layer}{block}/0", f"{site.name}_norm/c/{layer}{block}"]
    assert max(traced[key].durable for key in keys) <= valid.begun
    assert valid.durable <= marker.begun


def test_the_plan_comes_first_and_the_documents_before_their_marker(traced):
    assert min(traced, key=lambda key: traced[key].begun) == ".act/plan.json"
    assert traced[".act/plan.json"].durable <= min(
        life.begun for key, life in traced.items() if key != ".act/plan.json"
    )
    documents = [life.durable for key, life in traced.items() if key.startswith("documents/")]
    assert len(documents) > 8
    assert max(documents) <= traced[".act/documents.json"].begun


TORN = {
    "not synced": (['2.0 rename("/s/a.__lock", "/s/a") = 0 <0.1>'], "was renamed before it was synced"),
    "synced too late": (
        ["1.0 fsync(3</s/a.__lock>) = 0 <5.0>", '2.0 rename("/s/a.__lock", "/s/a") = 0 <0.1>'],
        "was renamed before it was synced",
    ),
    "folder not synced": (
        [
            "1.0 fsync(3</s/a.__lock>) = 0 <0.1>",
            '2.0 renameat(4, "/s/a.__lock", 4, "/s/a") = 0 <0.1>',
            "2.05 fsync(4</s>) = 0 <0.1>",
        ],
        "the folder of /s/a was not synced after the rename",
    ),
}


@pytest.mark.parametrize(("lines", "message"), TORN.values(), ids=TORN.keys())
def test_the_trace_test_would_fire(lines, message):
    with pytest.raises(AssertionError, match=message):
        lives(lines, Path("/s"))


@pytest.mark.parametrize("codec", CODECS)
def test_at_the_marker_everything_else_is_there(tmp_path, monkeypatch, codec):
    """The same without strace: when a marker begins to be written, its block reads back whole."""
    contents = make_contents(dataclasses.replace(LAYOUT, codec=codec), documents=False)
    path, real, seen = tmp_path / "x.acts.zarr", Root.write, []

    def look(root, key, value):
        if key.startswith(".act/commits/"):
            block = int(key[-13:-5])
            span = slice(*contents.layout.block_range(block))
            for name, rows in contents.rows.items():
                stored = raw_tensorstore(path, name)[..., span, :].read().result()
                seen.append(np.array_equal(stored, rows[..., span, :]))
            seen.append(raw_tensorstore(path, "valid")[span].read().result().all())
        real(root, key, value)

    monkeypatch.setattr(Root, "write", look)
    contents.write(path, seal=False)
    assert seen == [True] * 4 * (len(contents.rows) + 1)


KILLED = """
import os, signal, sys, time
from stores import make_contents
contents = make_contents()
with contents.create(sys.argv[1], seal=True) as writer:
    for number in range(contents.layout.blocks):
        activations, columns = contents.block(number)
        future = writer.write(number, activations, samples=columns)
        if number == int(sys.argv[2]):
            time.sleep(float(sys.argv[3]))
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("block", "seconds"), [(1, 0.0), (3, 0.003)], ids=["early", "late"])
def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path, contents, finished, block, seconds):
    path = tmp_path / "x.acts.zarr"
    process = start(KILLED, path, block, seconds)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    with contents.create(path, seal=True) as writer:
        missing = writer.missing()
        assert missing
        for number in missing:
            activations, columns = contents.block(number)
            writer.write(number, activations, samples=columns)
    assert tree(path) == tree(finished)


COMPANY = """
import sys, time
from pathlib import Path
from stores import make_contents
contents = make_contents()
me, others = Path(sys.argv[2]), [Path(name) for name in sys.argv[3].split(",")]
me.touch()
while not all(other.exists() for other in others):
    time.sleep(0.001)
contents.write(sys.argv[1], blocks=map(int, sys.argv[4].split(",")), seal=False)
"""


def test_two_processes_write_one_store(tmp_path, contents, finished):
    """Both begin at once, and both write every block, in opposite orders."""
    path, marks = tmp_path / "x.acts.zarr", [tmp_path / "one", tmp_path / "two"]
    orders = ["0,1,2,3", "3,2,1,0"]
    both = ",".join(map(str, marks))
    for process in [start(COMPANY, path, mark, both, order) for mark, order in zip(marks, orders, strict=True)]:
        finish(process)
    assert contents.create(path).missing() == []
    contents.write(path, blocks=[])
    assert tree(path) == tree(finished)
    rows = actstore.open(path).dataset(raw=True).resid_post.values
    np.testing.assert_array_equal(rows, contents.rows["resid_post"])


class Tensor:
    """What NumPy cannot read, as a tensor on a device or of a type that NumPy does not know."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")


def test_lists_and_whatever_numpy_can_view_are_written(tmp_path, contents):
    class Viewed:
        def __array__(self, dtype=None, copy=None):
            return activations["resid_post"]

    activations, columns = contents.block(0)
    with contents.create(tmp_path / "x.acts.zarr") as writer:
        listed = {name: values.tolist() if name == "document" else values for name, values in columns.items()}
        writer.write(0, {**activations, "resid_post": Viewed()}, samples=listed)
    stored = raw_tensorstore(tmp_path / "x.acts.zarr", "resid_post")[:, :16].read().result()
    np.testing.assert_array_equal(stored, activations["resid_post"])


def test_what_numpy_cannot_read_is_refused_with_the_remedy_for_tensors(tmp_path, contents):
    activations, columns = contents.block(0)
    with contents.create(tmp_path / "x.acts.zarr") as writer:
        text = r"site 'resid_post' is a .*Tensor that NumPy cannot read \(.*BFloat16\); .*for a tensor tensor.detach"
        with pytest.raises(InputError, match=text):
            writer.write(0, {**activations, "resid_post": Tensor()}, samples=columns)


def test_a_closed_writer_says_so(tmp_path, contents):
    activations, columns = contents.block(0)
    writer = contents.create(tmp_path / "x.acts.zarr")
    writer.close()
    with pytest.raises(InputError, match=r"this writer is closed; make another with actstore.create"):
        writer.write(0, activations, samples=columns)
