"""What a plan says of objects, requests, memory and time, against runs that are counted."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from kill_points import unchecked
from test_docs import program
from test_plan import TINY, model, plan

import actstore
import extract
from actstore import Layout, Site, kvstore
from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.kvstore.local import LocalPlace
from actstore.schema import Plan
from extract.cli import _refuse_more
from extract.costs import Duration, Speeds, beside_bytes, human_seconds, requests
from extract.documents import Document
from extract.models import Model
from extract.options import bytes_of, speeds
from extract.pace import measure

__all__ = ["model"]  # a fixture

TEXTS = [Document(f"d{i}", f"The statement number {i} is a simple one. " * (i + 1), {}, f"t:{i}") for i in range(30)]


class Counted:
    """A key-value store or an array of TensorStore that counts what it is asked."""

    def __init__(self, real: Any, counts: Counter[str]) -> None:
        self._real, self._counts = real, counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in ("read", "write", "list"):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self._counts["delete" if name == "write" and arguments[-1] is None else name] += 1
            return found(*arguments, **options)

        return call

    def __getitem__(self, index: Any) -> "Counted":
        return Counted(self._real[index], self._counts)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Requests from now on."""
    found: Counter[str] = Counter()

    def opened(start: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            future = start(*arguments, **options)
            return SimpleNamespace(result=lambda timeout=None: Counted(future.result(timeout=timeout), found))

        return call

    modules = [it for it in [kvstore, *vars(kvstore).values()] if isinstance(it, ModuleType) and hasattr(it, "ts")]
    for module in modules:
        real = module.ts
        keys = SimpleNamespace(open=opened(real.KvStore.open), KeyRange=real.KvStore.KeyRange)
        monkeypatch.setattr(module, "ts", SimpleNamespace(KvStore=keys, open=opened(real.open), Context=real.Context))
    for name, kind in [("exists", "look"), ("write_pieces", "write")]:  # files, without TensorStore
        real_method = getattr(LocalPlace, name)

        def method(place: LocalPlace, *arguments: Any, real_method: Any = real_method, kind: str = kind) -> Any:
            found[kind] += 1
            return real_method(place, *arguments)

        monkeypatch.setattr(LocalPlace, name, method)
    with unchecked():
        yield found
    assert found, "nothing was counted"


def made(model: Model, **settings: Any) -> extract.ExtractPlan:
    return plan(model, documents=TEXTS, context=64, batch=4, layers=[1, 3], **settings)


def files(url: Path) -> list[Path]:
    return [path for path in url.rglob("*") if path.is_file()]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("place", ["folder", "bucket"])
@pytest.mark.parametrize("sites", [["resid_post"], ["mlp_out", "final_norm"]], ids=["layers", "no layers"])
def test_objects_and_requests_are_those_of_a_run(
    model: Model, tmp_path: Path, counts: Counter[str], sites: list[str], place: str
) -> None:
    found, folder = {}, str(tmp_path) if place == "folder" else f"memory://costs/{'-'.join(sites)}"
    for blocks, size in [("many", 128), ("few", 512)]:
        decided = made(model, sites=sites, block_samples=size)
        counts.clear()
        url = f"{folder}/{blocks}.acts.zarr"
        extract.run(decided, url)
        numbers = decided.as_json()
        said = numbers["requests"][place]
        total = sum(counts.values())
        print(said, total, counts)
        assert len(Root.of(url).keys("")) == numbers["objects"]
        assert total == pytest.approx(said["total"], rel=0.02)
        found[blocks] = (len(decided.store.blocks), total, said["block"])
    read = 2 if place == "bucket" else 1
    (many, asked, block), (few, asked_few, _) = found["many"], found["few"]
    assert many > 30 > 15 > few
    assert (asked - asked_few) / (many - few) == pytest.approx(block + read, abs=0.15)  # of its marker, at the end


def test_added_layers_are_counted_too(model: Model, tmp_path: Path, counts: Counter[str]) -> None:
    url = str(tmp_path / "x.acts.zarr")
    extract.run(made(model, block_samples=64), url)
    decided = extract.append_layers(url, TINY, layers=[0, 2], model=model)
    counts.clear()
    extract.run(decided, url)
    said = decided.as_json()["requests"]["folder"]
    assert sum(counts.values()) == pytest.approx(said["total"], rel=0.05)


def test_bytes_beside_the_activations_are_at_least_those_on_disk(model: Model, tmp_path: Path) -> None:
    """Documents are compressed, and are counted as they are before that."""
    decided = made(model, block_samples=2048)
    url = tmp_path / "x.acts.zarr"
    extract.run(decided, str(url))
    names = {site.name for site in decided.store.layout.sites}
    beside = [path for path in files(url) if "c" in path.relative_to(url).parts]
    stored = sum(path.stat().st_size for path in beside if path.relative_to(url).parts[0] not in names)
    padding = decided.store.layout.padded_samples / decided.store.layout.samples
    most = beside_bytes(decided.store)
    rows = beside_bytes(decided.store.model_copy(update={"documents": None}))
    assert rows < stored < 1.02 * padding * most + 100 * len(beside)
    documents = sum(path.stat().st_size for path in beside if "documents" in path.relative_to(url).parts)
    assert documents < (most - rows) / 2


def test_more_hosts_and_a_bucket_need_more_requests(model: Model) -> None:
    store: Plan = made(model, block_samples=64).store
    folder, bucket = requests(store, remote=False), requests(store, remote=True)
    assert bucket.block > folder.block
    assert bucket.total(10, 4) - bucket.total(10, 3) == bucket.worker > folder.worker
    assert (
        made(model).as_json(hosts=8)["requests"]["folder"]["total"]
        > made(model).as_json()["requests"]["folder"]["total"]
    )


def test_memory_is_that_of_three_blocks_and_of_the_documents(model: Model, tmp_path: Path) -> None:
    here, there = made(model), made(model, tokens_folder=tmp_path / "tokens")
    found = here.as_json()["memory"]
    assert found["blocks"] == 3 * here.store.layout.block_bytes
    assert found["model"] == pytest.approx(4 * 0.82e6, rel=0.05)  # float32
    assert 12 * len(here.documents.token_id) < found["documents"] < 40 * len(here.documents.token_id) + 20_000
    assert there.as_json()["memory"]["documents"] < found["documents"] / 2  # in files


# --- time ---


def test_the_slower_part_is_the_limit() -> None:
    known = Speeds(hosts=4, tokens=1000.0, storage_bytes=1e6)
    compute = known.of(8_000_000, 10**9)
    assert (compute.compute_seconds, compute.storage_seconds, compute.limit) == (2000.0, 1000.0, "compute")
    storage = known.of(8_000_000, 10**10)
    assert (storage.seconds, storage.limit) == (10_000.0, "storage")
    assert storage.describe() == "33 min 20 s of compute, 2 h 46 min of storage: limited by the storage"
    assert Speeds(tokens=1000.0).of(5000, 1) == Duration(5.0, None)
    assert Speeds(tokens=1000.0).of(5000, 1).describe() == "5 s of compute"
    assert Speeds().of(5000, 1).seconds is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (61.0, "1 min 1 s"), (7200.0, "2 h 0 min"), (2e5, "2 d 7 h")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_measured_rate_is_that_of_this_machine(model: Model) -> None:
    decided = made(model)
    rate = measure(decided, seconds=0.5)
    assert 100 < rate < 1e7
    assert measure(plan(model, documents=TEXTS[:1], context=64, batch=1), seconds=0.1) > 0  # one pass


# --- limits ---

SIZES = {"100GB": 100 * 10**9, "1.5 TB": 1_500_000_000_000, "64GiB": 64 << 30, "4096": 4096, "2k": 2000}


@pytest.mark.parametrize(("text", "size"), SIZES.items(), ids=SIZES)
def test_numbers_of_bytes(text: str, size: int) -> None:
    assert bytes_of(text, "--max-bytes") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "10 iB", "0.1", "0", "1 X", "1..5GB"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--max-bytes is {text!r}; expected ")):
        bytes_of(text, "--max-bytes")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hosts": 0}, "--hosts is 0; expected at least 1"),
        ({"rate": "fast"}, "--rate is 'fast'; expected tokens in a second, such as 250000, or measure"),
        ({"rate": "0"}, "--rate is '0'; expected tokens"),
        ({"bandwidth": "much"}, "--bandwidth is 'much'; expected a number of bytes"),
    ],
)
def test_speeds_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        speeds(**{"hosts": 1, "rate": None, "bandwidth": None} | given)


def test_more_bytes_than_were_allowed_are_refused(model: Model) -> None:
    decided = made(model)
    assert decided.bytes == decided.as_json()["bytes"] == sum(decided.as_json()["bytes_by_site"].values())
    _refuse_more(decided, decided.bytes)
    _refuse_more(decided, None)
    with pytest.raises(InputError, match=r"would write [\d.]+ MB of activations, --max-bytes is [\d.]+ MB; keep fewer"):
        _refuse_more(decided, decided.bytes - 1)


COMMAND = ["--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "4", "--layers", "1,3"]


def test_plan_says_what_a_run_takes_and_refuses_it_then() -> None:
    told = CliRunner().invoke(program(), ["plan", *COMMAND, "--hosts", "2", "--rate", "500", "--json", "--yes"])
    numbers = json.loads(told.stdout)
    assert (told.exit_code, numbers["time"]["hosts"], numbers["time"]["limit"]) == (0, 2, None)
    assert numbers["time"]["compute_seconds"] == numbers["tokens_computed"] / 1000
    told = CliRunner().invoke(program(), ["plan", *COMMAND, "--bandwidth", "1MB", "--max-bytes", "1MB"])
    assert re.search(r"^time +\d+ s of storage, on 1 host$", told.stdout, re.M)
    said = r"^requests +[\d,]+ to a folder, \d+ a block; [\d,]+ to a bucket, \d+ a block$"
    assert re.search(said, told.stdout, re.M)
    assert isinstance(told.exception, InputError)
    assert "--max-bytes is 1.0 MB" in str(told.exception)


def test_extract_refuses_before_anything_is_computed(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    command = [sys.executable, "-m", "actstore", "extract", url, *COMMAND, "--max-bytes", "1MB"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert re.search(r"would write \d\.\d MB of activations, --max-bytes is 1\.0 MB", refused.stderr)
    assert not url.exists()


@pytest.mark.long
@pytest.mark.slow
def test_50_000_samples_of_four_layers_take_less_than_one_per_cent_more_than_their_rows(tmp_path: Path) -> None:
    """What the system that this replaces took 720 MB for, in 750 MB."""
    layout = Layout.fit([Site("resid_post", 896, (6, 12, 18, 23))], samples=50_000)
    rows = np.ones((4, layout.block_samples, 896), ml_dtypes.bfloat16)
    with actstore.create(str(tmp_path / "x.acts.zarr"), layout, {"rows": "ones"}) as writer:
        for block in writer.missing():
            start, stop = writer.block_range(block)
            columns = {column.name: np.arange(start, stop) for column in layout.columns}
            writer.write(block, {"resid_post": rows[:, : stop - start]}, samples=columns)
    stored = sum(path.stat().st_size for path in files(tmp_path / "x.acts.zarr"))
    print(layout.data_bytes, stored)
    assert layout.data_bytes == 358_400_000
    assert layout.data_bytes < stored < 1.01 * 360e6
    assert stored < 1.01 * layout.data_bytes
