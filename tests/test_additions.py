"""Appending with a model: the rows are those that a single run over everything would have stored."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import actstore
import extract
from actstore.errors import InputError, UnfinishedStoreError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.verify import verify
from extract.documents import Document
from extract.models import Model
from extract.named import model_folder

TINY = model_folder("tiny-qwen2")
TEXTS = [
    "The assert statement is a convenient way to insert debugging assertions into a program.",
    "Assignment statements are used to (re)bind names to values. Grüße: 数据 😀.",
    "for", "A while loop repeats as long as its condition is true, and then its else clause is executed once.",
]  # fmt: skip
FIRST = [Document(f"a{i}", " ".join([TEXTS[i % 4]] * (1 + i % 3)), {"number": i}, f"a:{i}") for i in range(12)]
MORE = [Document(f"b{i}", " ".join([TEXTS[(i + 1) % 4]] * (1 + i % 5)), {"number": -i}, f"b:{i}") for i in range(9)]
SETTINGS: dict[str, Any] = {"context": 48, "batch": 2, "block_samples": 128, "sites": ("resid_post", "final_norm")}


@pytest.fixture(scope="module")
def model() -> Model:
    return extract.load_model(TINY)


@pytest.fixture(scope="module")
def started(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of the first documents and of two layers. Copy it before changing it."""
    url = tmp_path_factory.mktemp("started") / "run.acts.zarr"
    extract.run(extract.make_plan(TINY, FIRST, layers=[1, 3], model=model, **SETTINGS), str(url))
    return url


@pytest.fixture
def url(started: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(started, tmp_path / "run.acts.zarr"))


def rows_at_once(model: Model, folder: Path, documents: list[Document], **settings: Any) -> xr.Dataset:
    """What a run of its own stores."""
    path = folder / f"once-{len(list(folder.iterdir()))}.acts.zarr"
    extract.run(extract.make_plan(TINY, documents, model=model, **(SETTINGS | settings)), str(path))
    return xr.open_dataset(path, raw=True).load()


def check_sound(url: Path) -> None:
    root = Root.of(url)
    assert verify(root, read_plan(root)).findings == ()


def test_documents(model: Model, url: Path, tmp_path: Path) -> None:
    plan = extract.append_documents(str(url), TINY, MORE, model=model)
    state = extract.run(plan, str(url))
    found = xr.open_dataset(url, raw=True)
    first, more = (rows_at_once(model, tmp_path, part, layers=[1, 3]) for part in (FIRST, MORE))
    assert state.samples_computed == more.sizes["sample"]
    for name in ("resid_post", "final_norm", "resid_post_norm", "position", "token_id"):
        axis = found[name].dims.index("sample")
        expected = np.concatenate([first[name].values, more[name].values], axis)
        assert found[name].values.tobytes() == expected.tobytes(), name
    documents = np.concatenate([first.document.values, more.document.values + len(FIRST)])
    assert found.document.values.tolist() == documents.tolist()
    store = actstore.open(url)
    last = found.sizes["sample"] - 1
    assert store.documents.strings("id", np.arange(len(store.documents))) == [d.id for d in FIRST + MORE]
    assert store.text([last], window=100)[0].before.encode() in MORE[documents[last] - len(FIRST)].text.encode()
    check_sound(url)


def test_layers(model: Model, url: Path, tmp_path: Path) -> None:
    extract.run(extract.append_layers(str(url), TINY, layers=[2], model=model), str(url))
    extract.run(extract.append_layers(str(url), TINY, sites=["mlp_out"], layers=[0, 3], model=model), str(url))
    found = xr.open_dataset(url, raw=True)
    once = rows_at_once(model, tmp_path, FIRST, layers=[0, 1, 2, 3], sites=("resid_post", "mlp_out"))
    assert found.layer.values.tolist() == [1, 3, 2]
    assert found.mlp_out_layer.values.tolist() == [0, 3]
    for layer in (1, 3, 2):
        assert found.resid_post.sel(layer=layer).values.tobytes() == once.resid_post.sel(layer=layer).values.tobytes()
    for layer in (0, 3):
        rows = found.mlp_out.sel(mlp_out_layer=layer)
        assert rows.values.tobytes() == once.mlp_out.sel(layer=layer).values.tobytes()
    check_sound(url)


def test_layers_for_all_documents_that_came(model: Model, url: Path, tmp_path: Path) -> None:
    extract.run(extract.append_documents(str(url), TINY, MORE, model=model), str(url))
    plan = extract.append_layers(str(url), TINY, layers=[0], model=model)
    extract.run(plan, str(url))
    found = xr.open_dataset(url, raw=True)
    parts = [rows_at_once(model, tmp_path, part, layers=[0]).resid_post.values for part in (FIRST, MORE)]
    assert found.resid_post.sel(layer=0).values.tobytes() == np.concatenate(parts, axis=1)[0].tobytes()
    assert [line.split()[0] for line in plan.describe().splitlines()][:3] == ["model", "documents", "contexts"]
    assert f"documents  {len(FIRST + MORE)}, " in plan.describe()
    check_sound(url)


def test_stopped_it_continues(model: Model, url: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(state: extract.Progress) -> None:
        if state.blocks_computed:
            raise Stopped

    whole = Path(shutil.copytree(url, tmp_path / "whole.acts.zarr"))
    plan = extract.append_documents(str(whole), TINY, MORE, model=model)
    assert extract.run(plan, str(whole)).blocks_computed == len(plan.store.blocks) > 2
    with pytest.raises(Stopped):
        extract.run(extract.append_documents(str(url), TINY, MORE, model=model), str(url), progress=stop)
    assert xr.open_dataset(url).sizes["sample"] < xr.open_dataset(whole).sizes["sample"]
    state = extract.run(extract.append_documents(str(url), TINY, MORE, model=model), str(url))
    assert (state.blocks_before, state.blocks) == (1, len(plan.store.blocks))
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert {path.relative_to(url) for path in url.rglob("*") if path.is_file()} == names
    assert [name for name in names if (url / name).read_bytes() != (whole / name).read_bytes()] == []
    again = extract.run(extract.append_documents(str(url), TINY, MORE, model=model), str(url))
    assert (again.blocks_before, again.blocks_computed) == (again.blocks, 0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "there is nothing to append; expected documents, layers or sites"),
    "a layer that is there": ({"layers": [3]}, r"layers \[3\] of site 'resid_post' are in the store"),
    "a layer the model lacks": ({"layers": [9]}, "layer 9"),
    "an unknown site": ({"sites": ["resid"]}, "resid"),
    "a layerless site that is there": ({"sites": ["final_norm"]}, "is in the store and has no layers to add"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_layers(case: str, model: Model, started: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        extract.append_layers(str(started), TINY, model=model, **settings)


def test_refused_documents(model: Model, started: Path) -> None:
    with pytest.raises(InputError, match="1 of the documents to append are in the store, first 'a0'"):
        extract.append_documents(str(started), TINY, [*MORE[:1], FIRST[0]], model=model)
    with pytest.raises(InputError, match="there are no documents to read"):
        extract.append_documents(str(started), TINY, [], model=model)
    others = [Document("c", "text", {}, "c:1")]
    with pytest.raises(InputError, match="the documents to add have the columns"):
        extract.append_documents(str(started), TINY, others, model=model)


def test_another_model_is_refused(model: Model, started: Path) -> None:
    other = extract.load_model(TINY, dtype="bfloat16")
    with pytest.raises(InputError, match=r"another model \(model\.compute_dtype: there 'float32', here 'bfloat16'\)"):
        extract.append_layers(str(started), TINY, layers=[2], model=other)


def test_a_store_of_another_program_is_refused(tmp_path: Path) -> None:
    layout = actstore.Layout.fit([actstore.Site("x", 4, None)], samples=3, columns=())
    with actstore.create(tmp_path / "own.acts.zarr", layout, {}) as writer:
        writer.write(0, {"x": np.ones((3, 4), np.float32)})
    with pytest.raises(InputError, match="does not say which model and packing it was written with; only stores that"):
        extract.append_layers(str(tmp_path / "own.acts.zarr"), TINY, layers=[2])


def test_an_unfinished_store_is_refused(model: Model, url: Path) -> None:
    (url / "zarr.json").unlink()
    (url / ".act" / "SEALED.json").unlink()
    (url / ".act" / "commits" / "00000000.json").unlink()
    with pytest.raises(UnfinishedStoreError, match="run the command that writes it again to finish it, then append"):
        extract.append_layers(str(url), TINY, layers=[2], model=model)


def test_the_command(url: Path, tmp_path: Path) -> None:
    lines = [{"id": d.id, "text": d.text, **d.columns} for d in MORE]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "actstore", "append", str(url), "--model", "tiny-qwen2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--documents", str(tmp_path / "more.jsonl"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks_computed"] > 1
    assert "is complete: " in run("--layers", "0").stdout
    again = run("--layers", "0")
    assert (again.returncode, "nothing was computed" in again.stdout) == (0, True)
    assert xr.open_dataset(url).layer.values.tolist() == [1, 3, 0]
    wrong = run()
    assert (wrong.returncode, wrong.stderr) == (
        2, "error: give either --documents, or --layers and --sites for the documents that are there\n",
    )  # fmt: skip
    check_sound(url)
