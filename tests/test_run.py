"""Extraction end to end: stored rows against direct passes and torch, and runs that are killed and continued."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import actstore
import extract
from actstore.claims import Claims
from actstore.errors import InputError, PlanMismatchError
from actstore.kvstore import Root
from extract import dealing, loop
from extract.documents import Document
from extract.models import Model
from extract.named import model_folder

TINY = model_folder("tiny-qwen2")

LINES = [
    "The assert statement is a convenient way to insert debugging assertions into a program.",
    "Assignment statements are used to (re)bind names to values and to modify attributes or items.",
    "Grüße: 数据 😀.",
    "for",
]
DOCUMENTS = [Document(f"d{i}", " ".join(LINES[: 1 + i % 4] * (1 + i % 5)), {"number": i}, f"t:{i}") for i in range(24)]
SITES = ("resid_post", "resid_mid", "mlp_post", "final_norm")


@pytest.fixture(scope="module")
def model() -> Model:
    return extract.load_model(TINY)


def make_plan(model: Model, **settings: Any) -> extract.ExtractPlan:
    defaults: dict[str, Any] = {"context": 64, "batch": 4, "block_samples": 256}
    return extract.make_plan(TINY, DOCUMENTS, model=model, **(defaults | settings))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_rows_equal_a_direct_forward_pass_bit_for_bit(model: Model, tmp_path: Path, dtype: str) -> None:
    plan = make_plan(model, sites=SITES, layers=[0, 2, 3], dtype=dtype)
    url = tmp_path / "x.acts.zarr"
    state = extract.run(plan, str(url))
    assert state.blocks_computed == state.blocks == plan.store.layout.blocks > 2
    dataset = xr.open_dataset(url, engine="actstore", raw=True)
    expected = direct_rows(model, plan, dtype)
    for site in SITES:
        assert dataset[site].dtype == np.dtype(dtype)
        assert dataset[site].values.tobytes() == expected[site].tobytes(), site


def direct_rows(model: Model, plan: extract.ExtractPlan, dtype: str) -> dict[str, np.ndarray]:
    """Every row by running the module itself on each step's contexts and taking the filled places with NumPy."""
    import jax
    from flax import nnx

    from extract.models import Tap

    taps = [Tap(site, layer) for site in SITES for layer in ([None] if site == "final_norm" else [0, 2, 3])]

    @jax.jit
    def whole(params: Any, ids: Any, segments: Any, positions: Any) -> Any:
        decoder = nnx.merge(model.graph, params)
        found = decoder.activations(ids, segments, positions, set(taps))
        return {tap: found[tap] for tap in taps}

    parts: dict[Tap, list[np.ndarray]] = {tap: [] for tap in taps}
    for step in range(plan.steps):
        contexts = plan.contexts(step)
        inputs = map(jnp.asarray, (contexts.token_ids, contexts.segment_ids, contexts.positions))
        for tap, values in whole(model.params, *inputs).items():
            parts[tap].append(np.asarray(values)[contexts.filled].astype(dtype))
    rows = {tap: np.concatenate(values) for tap, values in parts.items()}
    stacked = {site: np.stack([rows[tap] for tap in taps if tap.site == site]) for site in SITES}
    return stacked | {"final_norm": stacked["final_norm"][0]}


def test_stored_rows_match_torch_document_by_document(model: Model, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="NOT CHECKED against torch: it is not installed")
    from transformers import Qwen2ForCausalLM

    reference = Qwen2ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    plan = make_plan(model, context=1024, layers=[0, 1, 2], dtype="float32")
    extract.run(plan, str(tmp_path / "x.acts.zarr"))
    dataset = actstore.open(tmp_path / "x.acts.zarr").dataset()
    offsets = plan.documents.token_offsets
    for document in range(len(DOCUMENTS)):
        rows = dataset.resid_post.isel(sample=np.flatnonzero(dataset.document.values == document))
        ids = plan.documents.token_id[offsets[document] : offsets[document + 1]]
        assert rows.position.values.tolist() == list(range(len(ids)))
        assert rows.token_id.values.tolist() == ids.tolist()
        with torch.no_grad():
            hidden = reference(torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True).hidden_states
        for layer in (0, 1, 2):
            expected = hidden[layer + 1][0].numpy()
            error = np.linalg.norm(rows.sel(layer=layer).values - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert error.max() < 2e-5, (document, layer)


def test_coordinates_and_text_belong_to_the_rows(model: Model, tmp_path: Path) -> None:
    plan = make_plan(model, context=16)
    extract.run(plan, str(tmp_path / "x.acts.zarr"))
    store = actstore.open(tmp_path / "x.acts.zarr")
    dataset = store.dataset()
    rows = np.arange(0, store.samples, 7)
    documents, positions = dataset.document.values[rows], dataset.position.values[rows]
    tokens = plan.documents.token_id[plan.documents.token_offsets[documents] + positions]
    assert dataset.token_id.values[rows].tolist() == tokens.tolist()
    for document, shown in zip(documents, store.text(rows, window=3), strict=True):
        assert shown.before + shown.token + shown.after in DOCUMENTS[document].text
    assert store.documents.strings("id", np.array([3, 0])) == ["d3", "d0"]
    assert store.documents.numbers("number", np.array([3, 0])).tolist() == [3, 0]
    assert (tmp_path / "x.acts.zarr/assets/tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_running_again_computes_nothing(model: Model, tmp_path: Path) -> None:
    plan, url = make_plan(model), str(tmp_path / "x.acts.zarr")
    extract.run(plan, url)
    before = tree(Path(url))
    state = extract.run(plan, url)
    assert (state.blocks_before, state.blocks_computed, state.samples_computed) == (state.blocks, 0, 0)
    assert tree(Path(url)) == before


def test_a_worker_that_waits_for_its_storage_says_that_it_lives(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks take a second to be written, and signs of life are due after 0.1 s: else another would take them over."""
    real, renewals = Root.write_pieces, Counter[int]()

    def slow(self: Root, key: str, pieces: Any) -> None:
        if "/c/" in key and not key.startswith("documents/"):
            time.sleep(1.0)
        real(self, key, pieces)

    monkeypatch.setattr(Root, "write_pieces", slow)
    monkeypatch.setattr(Claims, "renew", lambda self, block: renewals.update([block]))
    monkeypatch.setattr(dealing, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(loop, "STORAGE_SECONDS", 0.05)
    plan = make_plan(model, layers=[0], block_samples=1024)
    seen: list[extract.Progress] = []
    state = extract.run(plan, str(tmp_path / "x.acts.zarr"), progress=seen.append)
    assert state.limit == "storage"
    assert renewals.keys() == set(range(state.blocks))
    assert min(renewals.values()) >= 3
    assert len({each.seconds_for_storage for each in seen}) > 3 * state.blocks  # progress is shown meanwhile too


def test_a_block_size_smaller_than_a_step_and_larger_than_the_store(model: Model, tmp_path: Path) -> None:
    stores = []
    for number, block_samples in enumerate([32, 8192]):
        extract.run(make_plan(model, block_samples=block_samples), str(tmp_path / f"{number}.acts.zarr"))
        stores.append(actstore.open(tmp_path / f"{number}.acts.zarr").dataset(raw=True))
    assert stores[0].resid_post.values.tobytes() == stores[1].resid_post.values.tobytes()


def test_another_run_is_refused_with_the_differing_fields(model: Model, tmp_path: Path) -> None:
    url = str(tmp_path / "x.acts.zarr")
    extract.run(make_plan(model, layers=[1]), url)
    before = tree(Path(url))
    with pytest.raises(PlanMismatchError, match=r"layout.sites\[0\].layers: there \[1\], here \[2\]"):
        extract.run(make_plan(model, layers=[2]), url)
    assert tree(Path(url)) == before


def test_values_that_float16_cannot_hold_are_refused(model: Model, tmp_path: Path) -> None:
    import jax

    huge = Model(**{**vars(model), "params": jax.tree.map(lambda x: x * 300, model.params)})
    plan = make_plan(huge, dtype="float16")
    with pytest.raises(
        InputError, match=r"site 'resid_post' has a value of .*, float16 ends at 65504; store this site"
    ):
        extract.run(plan, str(tmp_path / "x.acts.zarr"))


def command(url: Path, *more: str) -> list[str]:
    options = ["--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "40", "--layers", "1,3"]
    sizes = ["--context", "128", "--batch", "2", "--block-samples", "512"]
    return [sys.executable, "-m", "actstore", "extract", str(url), *options, *sizes, *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody stopped."""
    url = tmp_path_factory.mktemp("whole") / "x.acts.zarr"
    subprocess.run(command(url), check=True, capture_output=True)
    return tree(url)


def committed(url: Path) -> int:
    return len(list((url / ".act/commits").glob("*.json"))) if (url / ".act/commits").is_dir() else 0


def wait_for_blocks(process: subprocess.Popen[str], url: Path, blocks: int) -> None:
    """Waits until a run has committed `blocks` blocks, or says what it printed."""
    deadline = time.monotonic() + 120
    while committed(url) < blocks:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"ended with {process.returncode} before {blocks} blocks: {process.communicate()}")
        time.sleep(0.002)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("blocks", [1, 17])
def test_kill_9_and_run_again_gives_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes], blocks: int) -> None:
    url = tmp_path / "x.acts.zarr"
    process = subprocess.Popen(command(url), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_blocks(process, url, blocks)
    process.kill()
    process.communicate()
    done = committed(url)
    with pytest.raises(actstore.ActstoreError, match=rf"is unfinished: {done} of \d+ blocks are committed"):
        actstore.open(url)
    again = subprocess.run(command(url, "--json"), check=True, capture_output=True, text=True)
    blocks_before, computed = (int(re.search(rf'"{name}": (\d+)', again.stdout)[1]) for name in  # type: ignore[index]
                               ("blocks_before", "blocks_computed"))  # fmt: skip
    assert blocks_before == done
    assert blocks_before + computed == actstore.open(url).plan.layout.blocks
    assert tree(url) == undisturbed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_75_and_keeps_what_is_done(
    tmp_path: Path, undisturbed: dict[str, bytes], number: signal.Signals
) -> None:
    url = tmp_path / "x.acts.zarr"
    process = subprocess.Popen(command(url), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_blocks(process, url, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert f"error: stopped by {number.name}; {url} keeps its committed blocks: run the same command again" in errors
    assert committed(url) >= 2
    subprocess.run(command(url), check=True, capture_output=True)
    assert tree(url) == undisturbed


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.4, 2.0, 2.6, 3.2, 3.8])
def test_a_signal_at_any_moment_stops_with_one_line_and_75(tmp_path: Path, seconds: float) -> None:
    """While Python starts, libraries are imported, documents are tokenised, the model compiles and computes."""
    url = tmp_path / "x.acts.zarr"
    process = subprocess.Popen(command(url), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ready = time.monotonic() + 30
    handled = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", handled.read_text())[1], 16) & 1 << signal.SIGTERM - 1:  # type: ignore[index]
        assert time.monotonic() < ready
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (75, 0), errors
    if process.returncode == 75:
        last = errors.splitlines()[-1]
        assert re.fullmatch(r"error: stopped by SIGTERM; .*run the same command again to continue", last)
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    process = subprocess.Popen(command(url), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_blocks(process, url, 1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "error: stopped by SIGINT" in errors
