"""`actstore bench`: figures beside counts that are made another way. No test looks at how long anything took."""

import dataclasses
import json
import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import PROVENANCE, Contents, make_rows

import actstore
from actstore import Column, Layout, Site, bench, cli
from actstore.bench import cause_of, measure, reading_of, verdict
from actstore.errors import InputError, UnfinishedStoreError, UnknownNameError
from actstore.layout import DEFAULT_COLUMNS
from actstore.machine import Growth, disk_bytes, plain_reading, take_rate

SITES = (Site("resid_post", 96, (1, 3), "float32"), Site("final_norm", 8, None, "float32"))
NARROW = 512 << 10  # bytes: several windows in an epoch, whatever the loader holds beside the window in hand
PAGE = Path(__file__).parent.parent / "docs/how-to/measure-a-store.md"


def write(folder: Path, codec: str = "crc32c", columns: tuple[Column, ...] = DEFAULT_COLUMNS) -> Path:
    """12,000 samples of documents of 1 to 200 tokens; the last block and the last chunk are short."""
    layout = Layout(SITES, samples=12_001, block_samples=2048, chunk_samples=64, columns=columns, codec=codec)
    lengths = np.random.default_rng(0).integers(1, 200, size=400)
    document = np.repeat(np.arange(400, dtype=np.int32), lengths)[: layout.samples]
    rows = {site.name: make_rows(site, layout.samples) for site in SITES}
    values = {column.name: document if column.name == "document" else 0 * document for column in columns}
    return Contents(layout, rows, values, None, dict(PROVENANCE)).write(folder / "bench.acts.zarr")


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {codec: write(tmp_path_factory.mktemp(codec), codec) for codec in ("crc32c", "none", "zstd")}


@pytest.fixture(scope="module")
def store(urls: dict[str, Path]) -> actstore.Store:
    return actstore.open(urls["crc32c"])


def quick(store: actstore.Store, **settings) -> bench.Report:
    return measure(store, **{"layer": 3, "batch_size": 256, "seconds": 0.02} | settings)


def drawn(store: actstore.Store, count: int, **settings) -> np.ndarray:
    """Samples of the first batches of a loader of our own: [batch, row]."""
    settings = {"layer": 3, "batch_size": 256} | settings
    with store.batches(**settings) as batches:
        return np.stack([batches.next_batch().samples for _ in range(count)])


# What is measured


@pytest.mark.parametrize("order", ["block", "exact"])
def test_the_shuffle_is_that_of_the_batches_of_the_loader(store, order):
    found = quick(store, order=order, window_bytes=NARROW, seed=5).shuffle
    samples = drawn(store, found.batches, order=order, window_bytes=NARROW, seed=5)
    documents = store.column("document", np.arange(store.samples))[samples]
    assert found.unit == "documents"
    assert found.units_per_batch == pytest.approx(np.mean([len(set(batch)) for batch in documents.tolist()]))
    assert found.neighbours == pytest.approx((documents[:, 1:] == documents[:, :-1]).mean())
    assert found.ideal_from_samples == store.samples


def test_block_order_comes_near_the_ideal_as_the_window_grows_and_exact_order_is_there(store):
    narrow, wide = (quick(store, window_bytes=size).shuffle for size in (NARROW // 8, 64 << 20))
    exact = quick(store, order="exact", window_bytes=NARROW).shuffle
    assert narrow.units_per_batch < 0.7 * narrow.units_per_batch_ideal
    assert narrow.lag_correlation > 10 * narrow.lag_correlation_error
    assert narrow.neighbours > 2 * narrow.neighbours_ideal
    for good in (wide, exact):
        assert good.units_per_batch == pytest.approx(good.units_per_batch_ideal, rel=0.05)
        assert abs(good.lag_correlation) < 5 * good.lag_correlation_error
        assert good.neighbours == pytest.approx(good.neighbours_ideal, rel=0.5)


def test_the_ideal_is_that_of_random_batches(store):
    rng = np.random.default_rng(3)
    documents = store.column("document", np.arange(store.samples))
    found = [len(np.unique(rng.choice(documents, 256, replace=False))) for _ in range(300)]
    noise = np.std(found) / np.sqrt(len(found))
    assert abs(quick(store).shuffle.units_per_batch_ideal - np.mean(found)) < 4 * noise


def test_without_documents_chunks_are_counted(tmp_path):
    store = actstore.open(write(tmp_path, columns=()))
    found = quick(store, window_bytes=NARROW).shuffle
    samples = drawn(store, found.batches, window_bytes=NARROW)
    assert found.unit == "chunks"
    assert found.units_per_batch == pytest.approx(np.mean([len(set(batch)) for batch in (samples // 64).tolist()]))


def test_of_a_large_store_the_documents_of_some_blocks_stand_for_all(store, monkeypatch):
    whole = quick(store).shuffle
    monkeypatch.setattr(bench, "COUNTED_SAMPLES", 3 * 2048)
    monkeypatch.setattr(bench, "PIECE_SAMPLES", 2 * 2048)
    part = quick(store).shuffle
    assert part.ideal_from_samples == 3 * 2048
    assert part.units_per_batch_ideal == pytest.approx(whole.units_per_batch_ideal, rel=0.1)
    assert part.neighbours_ideal == pytest.approx(whole.neighbours_ideal, rel=0.2)


def test_a_window_is_what_the_loader_reads_at_once(store):
    """The first window of block order holds all samples of its chunks; what comes after is of other chunks."""
    with store.batches(layer=3, batch_size=1, window_bytes=NARROW) as batches:
        window = batches.window_samples
        chunks = np.array([batches.next_batch().samples[0] for _ in range(window)]) // 64
        after = batches.next_batch().samples[0] // 64
    assert 0 < window < store.samples / 2
    assert set(np.unique(chunks, return_counts=True)[1]) <= {64, 12_001 % 64}
    assert after not in chunks


# Read amplification

COUNTING = """
import sys
from pathlib import Path
import actstore

def count():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

url, order, window = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = actstore.open(url)
with store.batches(layer=3, batch_size=256, order=order, window_bytes=window, epochs=1) as batches:
    batches.next_batch()  # of the first window; markers are read with it
    before = count()
    rest = sum(rows.nbytes for rows in batches)
print(count() - before, rest)
"""


@pytest.mark.parametrize("order", ["block", "exact"])
def test_amplification_is_what_the_system_counts_as_read(urls, order):
    """An epoch through read(): compressed stores are not mapped. The first two windows are read before counting."""
    if not Path("/proc/self/io").exists():
        pytest.skip("no /proc/self/io here: what is read is not counted")
    store, window = actstore.open(urls["zstd"]), NARROW // 4
    found = quick(store, order=order, window_bytes=window)
    command = [sys.executable, "-c", COUNTING, str(urls["zstd"]), order, str(window)]
    read, given = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    stored = sum(path.stat().st_size for path in (urls["zstd"] / "resid_post/c/1").rglob("0"))
    decoded = read / stored * found.layer_bytes
    assert found.reading.unit == "chunks"
    assert decoded / given == pytest.approx(found.reading.amplification, rel=0.15)
    assert found.reading.amplification == pytest.approx(1) if order == "block" else found.reading.amplification > 5


@pytest.mark.parametrize("codec", ["crc32c", "none"])
def test_pages_are_those_of_the_files_that_hold_the_rows(urls, codec):
    """Rows are searched in the shard files, byte by byte: nothing of the layout is used."""
    store = actstore.open(urls[codec])
    samples = drawn(store, 1, order="exact").ravel()
    values = make_rows(SITES[0], store.samples)[1]
    shards = [(urls[codec] / f"resid_post/c/1/{block}/0").read_bytes() for block in range(6)]
    pages = set()
    for sample in samples.tolist():
        (block,) = (number for number, shard in enumerate(shards) if values[sample].tobytes() in shard)
        start = shards[block].index(values[sample].tobytes())
        pages |= {(block, place // mmap.PAGESIZE) for place in range(start, start + 96 * 4)}
    found = reading_of(store, SITES[0], samples, exact=True)
    assert found.unit == "pages"
    assert found.amplification == pytest.approx(len(pages) * mmap.PAGESIZE / (256 * 96 * 4))


def test_of_a_layer_in_one_window_the_dropped_remainder_is_read_in_vain(store):
    found = quick(store, batch_size=7000, window_bytes=64 << 20)
    assert found.reading.amplification == pytest.approx(12_001 / 7000)


# Limits, memory, machine

CASES = {
    "all of it in one window": ((True, 0.9, 0.1, 1.0), "one window"),
    "hardly any waiting": ((False, 0.3, 0.9, 0.0), "copying"),
    "waiting, reader busy": ((False, 0.8, 0.95, 0.0), "reading"),
    "waiting, all from memory, cores of others": ((False, 0.8, 0.2, 0.01), "reading"),
    "waiting for the disk": ((False, 0.8, 0.2, 0.9), "storage"),
    "from the disk, but two cores are full": ((False, 0.8, 1.8, 0.9), "reading"),
    "nobody counts, reader idle": ((False, 0.8, 0.2, None), "storage"),
    "nobody counts, reader busy": ((False, 0.8, 0.9, None), "reading"),
}


@pytest.mark.parametrize(("given", "cause"), CASES.values(), ids=CASES.keys())
def test_what_limits(given, cause):
    one_window, waited, busy, disk = given
    assert cause_of(one_window=one_window, waited=waited, busy=busy, disk=disk) == cause


VERDICTS = {
    "one window": ({}, r"fits one window: the shuffle is perfect"),
    "copying": ({}, r"a trainer that takes over \d+\.\d ms for each does not wait$"),
    "storage": ({"order": "exact"}, r"faster disk, or order block, which reads each chunk once$"),
    "reading": ({}, r"cores help, and --no-check \(check=False\) where the store was just verified$"),
    "storage in block order": ({"cause": "storage"}, r"else use a faster disk$"),
    "reading single rows": ({"cause": "reading", "reading": bench.Reading(3.0, "pages")}, r"cores help$"),
    "reading without a check": ({"cause": "reading", "check": False}, r"cores help$"),
}


@pytest.mark.parametrize(("name", "case"), VERDICTS.items(), ids=VERDICTS.keys())
def test_the_verdict_says_what_to_do(store, name, case):
    changes, expected = case
    limit = bench.Limit(changes.pop("cause", name), 0.75, 0.5)
    assert re.search(expected, verdict(dataclasses.replace(quick(store), limit=limit, **changes)))


def test_a_layer_in_one_window_is_said_to_be_so(store):
    assert quick(store, window_bytes=64 << 20).limit.cause == "one window"
    assert quick(store, window_bytes=NARROW).limit.cause != "one window"


def test_what_the_loader_promises_is_two_windows_and_a_batch(store):
    found = quick(store, window_bytes=NARROW)
    assert found.memory.promised_bytes == (2 * found.window_samples + 256) * 96 * 4
    if Path("/proc/self/status").exists():
        assert found.memory.before_bytes > 20e6
        assert found.memory.own_bytes >= 0
        assert found.memory.peak_bytes >= 0


def test_growth_is_what_was_allocated_and_not_what_was_mapped(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here: memory is not measured")
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    growth = Growth()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) == 0
        array = np.ones(64 << 20, np.uint8)  # glibc asks the system for memory beyond 32 MiB, whatever is free
        growth.look(now=1.0)
        later = np.ones(64 << 20, np.uint8)
        growth.look(now=1.001)  # too soon to look again
    before, own, peak = growth.grown()
    assert before > 20e6
    assert array.nbytes - 1e6 < own < array.nbytes + 16e6 < array.nbytes + later.nbytes
    assert peak >= 0


def test_files_and_rows_of_memory_are_read(tmp_path):
    for number in range(3):
        (tmp_path / str(number)).write_bytes(bytes(1000))
    rate, share = plain_reading(sorted(tmp_path.iterdir()), seconds=5.0)
    assert rate > 0
    assert share is None or share >= 0
    assert take_rate(1000, 64, 16, seconds=0.01) > 0
    assert disk_bytes() is None or disk_bytes() >= 0


def test_all_of_a_layer_is_read_plainly(store, monkeypatch):
    read = []
    monkeypatch.setattr(bench, "plain_reading", lambda paths, *, seconds: (read.extend(paths), (1.0, 0.0))[1])
    quick(store, site="final_norm", layer=None)
    folder = Path(store.url) / "final_norm"
    assert sorted(read) == sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")


# Settings


def test_a_small_store_gets_smaller_batches_and_a_note(finished):
    found = measure(actstore.open(finished), layer=5, seconds=0.01)
    assert found.batch_size == 53 // 8
    assert found.notes == ("batches of 6 rows: the store has 53 samples",)
    assert quick(actstore.open(finished), site="final_norm", layer=None, batch_size=53).notes == ()


def test_progress_counts_the_measurements(store):
    said = []
    quick(store, progress=lambda *step: said.append(step))
    assert [step[:2] for step in said] == [(done, 4) for done in range(5)]


WRONG = {
    "batch": ({"batch_size": 12_002}, InputError, "12,002, the store holds 12,001 samples.*use a smaller batch_size"),
    "layer": ({"layer": 2}, UnknownNameError, "layer 2"),
    "no layer": ({"layer": None}, InputError, "layer"),
    "site": ({"site": "mlp_out"}, UnknownNameError, "mlp_out"),
    "order": ({"order": "sideways"}, InputError, "order is 'sideways'; expected 'block' or 'exact'"),
    "no time": ({"seconds": 0.0}, InputError, "seconds is 0.0; expected a positive number, such as 5"),
    "for ever": ({"seconds": float("inf")}, InputError, "seconds is inf; expected a positive number"),
    "window": ({"window_bytes": 0}, InputError, "window_bytes 0 must be positive"),
    "seed": ({"seed": -1}, InputError, "seed is -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_before_anything_is_read(run, store, urls, monkeypatch, name):
    settings, kind, said = WRONG[name]
    monkeypatch.setattr(bench, "_read", lambda *_: pytest.fail("read something"))
    if name != "order":  # its type is checked here before it is
        with pytest.raises(kind, match=said):
            quick(store, **settings)
    given = {"layer": 3, "seconds": 0.02} | settings
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
    code, _, err = run("bench", urls["crc32c"], *words)
    if name != "order":
        assert code == 2
        assert re.match(f"error: .*{said}", err)


# The command


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `actstore ...` in this process: exit code, output, errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    return call


QUICK = ["--layer", "3", "--seconds", "0.02", "--window-bytes", str(NARROW)]


@pytest.mark.parametrize("order", ["block", "exact"])
def test_the_command_prints_a_line_for_each_kind_of_figure(run, urls, order):
    code, out, err = run("bench", urls["crc32c"], *QUICK, "--order", order, "--batch-size", "256")
    assert code == 0
    assert err == "bench: 4 of 4 measurements\n"
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["store", "order", "speed", "compare", "batches", "reading", "shuffle", "memory", "limit"]
    for expected in [
        rf"^store     {re.escape(str(urls['crc32c']))}, resid_post, layer 3: 12,001 rows, 4\.6 MB$",
        rf"^order     {order}, batches of 256 rows, windows of [\d,]+$",
        r"^speed     [\d.]+ [kMG]B/s, [\d,]+ rows/s",
        r"^compare   random rows out of memory .*B/s; plain read\(\) of the shards .*B/s",
        r"^batches   [\d.]+ ms \(median\), slowest [\d.]+ ms, the first after [\d.]+ s$",
        rf"^reading   [\d.]+ bytes read for one handed out, in {'chunks' if order == 'block' else 'pages'}",
        r"^shuffle   [\d.]+ documents in a batch, ideal [\d.]+; neighbours alike [\d.]+%, ideal [\d.]+%; lag ",
        r"; lag correlation -?[\d.]+, ideal 0 \+- [\d.]+$",
        r"^memory    .*; promised [\d.]+ [kM]B$",
        r"^limit     \w+",
    ]:
        assert re.search(expected, out, re.MULTILINE), expected


def keys_of(value: object, before: str = "") -> set[str]:
    """Dotted names of all values of a JSON object."""
    if not isinstance(value, dict):
        return {before.removesuffix(".")}
    return set().union(*(keys_of(inner, f"{before}{key}.") for key, inner in value.items()))


def documented_keys(text: str) -> set[str]:
    return set(re.findall(r"^\| `([a-z_.]+)` \|", text, re.MULTILINE))


def test_json_holds_all_figures_under_the_documented_keys(run, urls):
    code, out, _ = run("bench", urls["crc32c"], *QUICK, "--json", "--no-check", "--seed", "3")
    assert code == 0
    found = json.loads(out)
    assert keys_of(found) == documented_keys(PAGE.read_text(encoding="utf-8"))
    assert (found["layer"], found["check"], found["seed"], found["batch_size"]) == (3, False, 3, 4096)
    assert found["speed"]["bytes_per_second"] == pytest.approx(found["speed"]["rows_per_second"] * 96 * 4)


def test_meta_a_key_that_is_not_documented_would_be_found():
    text = PAGE.read_text(encoding="utf-8")
    assert documented_keys(text) - documented_keys(text.replace("| `speed.seconds` |", "")) == {"speed.seconds"}


def test_a_note_comes_last(run, finished):
    _, out, _ = run("bench", finished, "--layer", "5", "--seconds", "0.01")
    assert out.splitlines()[-1] == "note: batches of 6 rows: the store has 53 samples"


def test_a_system_that_says_nothing_of_itself_is_measured_too(run, urls, monkeypatch):
    monkeypatch.setattr("actstore.machine.Path", lambda path: Path(f"{path}/none"))
    code, out, _ = run("bench", urls["crc32c"], *QUICK)
    assert code == 0
    assert "memory    not said by this system; promised" in out
    assert "from disks" not in out


def test_an_unfinished_store_is_refused(run, unfinished):
    with pytest.raises(UnfinishedStoreError):
        actstore.open(unfinished)
    code, _, err = run("bench", unfinished, "--layer", "5")
    assert code == 2
    assert "2 of 4 blocks are committed" in err


def test_a_damaged_store_has_code_4(run, urls, tmp_path):
    url = write(tmp_path)
    shard = url / "resid_post/c/1/2/0"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    code, _, err = run("bench", url, "--layer", "3", "--seconds", "0.01")  # all of the layer is in the first window
    assert code == 4
    assert "resid_post, layer 3, block 2" in err
