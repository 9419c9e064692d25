"""Plans: what is refused before compute, and what the numbers say."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tokenizers import Tokenizer

import extract
from actstore.errors import InputError
from extract.documents import Document
from extract.forward import make_forward
from extract.models import Model
from extract.named import model_folder

TINY = model_folder("tiny-qwen2")

DOCUMENTS = [Document(f"d{i}", f"The statement number {i} is a simple one. " * (i + 1), {}, f"t:{i}") for i in range(9)]


@pytest.fixture(scope="module")
def model() -> Model:
    return extract.load_model(TINY)


def plan(model: Model, **settings: Any) -> extract.ExtractPlan:
    return extract.make_plan(TINY, settings.pop("documents", DOCUMENTS), model=model, **settings)


def test_the_numbers_fit_together(model: Model) -> None:
    made = plan(model, context=64, batch=4, sites=["resid_post", "mlp_post", "final_norm"], layers=[3, 1])
    tokens = len(made.documents.token_id)
    assert made.store.layout.samples == tokens == made.parts[0].packing.rows
    assert [(site.name, site.layers, site.width) for site in made.store.layout.sites] == [
        ("resid_post", (1, 3), 128), ("mlp_post", (1, 3), 320), ("final_norm", None, 128),
    ]  # fmt: skip
    edges = made.step_edges()
    assert edges[0] == 0
    assert edges[-1] == tokens
    assert len(edges) == made.steps + 1
    for step in range(made.steps):
        assert len(made.contexts(step).documents) == edges[step + 1] - edges[step]
    assert made.as_json()["bytes"] == tokens * (2 * 128 + 2 * 320 + 128) * 2
    assert f"{tokens:,} tokens" in made.describe()


def test_default_layers_are_quarters_of_a_small_model(model: Model) -> None:
    assert plan(model).store.layout.sites[0].layers == (1, 2, 3)


def test_the_same_settings_give_the_same_fingerprint(model: Model) -> None:
    assert plan(model).store.fingerprint == plan(model).store.fingerprint


CHANGES: dict[str, dict[str, Any]] = {
    "layers": {"layers": [2]},
    "sites": {"sites": ["mlp_out"]},
    "context": {"context": 128},
    "batch": {"batch": 4},
    "dtype": {"dtype": "float32"},
    "codec": {"codec": "none"},
    "block_samples": {"block_samples": 1024},
    "documents": {"documents": DOCUMENTS[:-1]},
    "a document's text": {"documents": [*DOCUMENTS[:-1], dataclasses.replace(DOCUMENTS[-1], text="another")]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_bytes_changes_the_fingerprint(model: Model, change: dict[str, Any]) -> None:
    assert plan(model).store.fingerprint != plan(model, **change).store.fingerprint


def test_a_plan_holds_no_path_and_no_time(model: Model, tmp_path: Path) -> None:
    text = plan(model).store.to_json().decode()
    assert str(Path.cwd()) not in text
    assert str(TINY.parent) not in text
    assert "2026" not in text.replace(plan(model).store.fingerprint, "")[:200]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown layer": ({"layers": [30]}, r"layer 30 does not exist: the model has 4 layers, 0 to 3"),
    "unknown site": ({"sites": ["resid_past"]}, r"site 'resid_past' does not exist: the known sites are embed, "),
    "patterns of no site": (
        {"sites": ["resid_*", "head_*", "mlp"]},
        r"site 'head_\*' does not exist: the known sites are embed.*\nsite 'mlp' does not exist",
    ),
    "patterns that overlap": ({"sites": ["resid_*", "resid_post"]}, r"name something twice"),
    "no site": ({"sites": []}, r"name at least one of each"),
    "site twice": ({"sites": ["resid_post", "resid_post"]}, r"name something twice"),
    "layer twice": ({"layers": [1, 1]}, r"name something twice"),
    "context too long": (
        {"context": 4096},
        r"context 4096 does not fit: .* made for 1 to 2048 tokens; use --context 2048",
    ),
    "context zero": ({"context": 0}, r"context 0 does not fit"),
    "batch zero": ({"batch": 0}, r"batch is 0; expected at least 1"),
    "no documents": ({"documents": []}, r"there are no documents to read; expected at least one"),
    "unknown dtype": ({"dtype": "int8"}, r"dtype 'int8' is unknown; expected one of bfloat16, float16, float32"),
    "unknown codec": ({"codec": "lz4"}, r"codec 'lz4' is unknown; expected one of crc32c, none, zstd"),
    "block zero": ({"block_samples": 0}, r"block_samples is 0; expected a positive number"),
}


@pytest.mark.parametrize(("settings", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_settings_are_refused(model: Model, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        plan(model, **settings)


def test_contexts_are_as_long_as_yarn_says(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny"))
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"max_position_embeddings": 64, "rope_scaling": yarn}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    stretched = extract.load_model(folder)
    assert extract.make_plan(folder, DOCUMENTS, model=stretched, context=256).parts[0].packing.context == 256
    with pytest.raises(InputError, match=r"context 257 does not fit: .* made for 1 to 256 tokens; use --context 256"):
        extract.make_plan(folder, DOCUMENTS, model=stretched, context=257)


ALL = ("embed", "resid_pre", "q", "k", "v", "attn_z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
PATTERNS = {
    "one": (["resid_*"], ("resid_pre", "resid_mid", "resid_post")),
    "all": (["*"], (*ALL, "final_norm")),
    "letters": (["[qkv]"], ("q", "k", "v")),
    "in the order given": (["mlp_*", "embed", "attn_z"], ("mlp_post", "mlp_out", "embed", "attn_z")),
}


@pytest.mark.parametrize(("patterns", "sites"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_of_sites(model: Model, patterns: list[str], sites: tuple[str, ...]) -> None:
    layout = plan(model, sites=patterns, layers=[1]).store.layout
    assert tuple(site.name for site in layout.sites) == sites
    assert {site.name: site.width for site in layout.sites if site.name in "qkv"}.items() <= {
        "q": 128, "k": 64, "v": 64,
    }.items()  # fmt: skip


HOOKS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...] | None]]] = {
    "of many libraries": (
        {"sites": [
            "blocks.3.hook_resid_post", "model.layers.1", "hidden_states[1]", "layers_output[2]",
            "blocks.0.mlp.hook_post", "ln_final.hook_normalized",
        ]},
        {"resid_post": (0, 1, 2, 3), "mlp_post": (0,), "final_norm": None},
    ),
    "our own": ({"sites": ["resid_post[2]", "q[0]", "resid_post[0]"]}, {"resid_post": (0, 2), "q": (0,)}),
    "beside sites": (
        {"sites": ["mlp_*", "model.layers.3", "mlp_out[0]"], "layers": [1, 2]},
        {"mlp_post": (1, 2), "mlp_out": (0, 1, 2), "resid_post": (3,)},
    ),
    "the last hidden states": ({"sites": ["hidden_states[-1]"]}, {"final_norm": None}),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "sites"), HOOKS.values(), ids=HOOKS)
def test_hooks_by_their_names(model: Model, settings: dict[str, Any], sites: dict[str, tuple[int, ...] | None]) -> None:
    """Each site has the layers that are named for it, ascending, and the forward pass gives them so."""
    made = plan(model, **settings)
    assert {site.name: site.layers for site in made.store.layout.sites} == sites
    forward = make_forward(model, made.taps, dtype="float32")
    assert {site: None if chosen == (None,) else chosen for site, chosen in forward.layers.items()} == sites


REFUSED_HOOKS: dict[str, tuple[dict[str, Any], str]] = {
    "layers of their own": (
        {"sites": ["model.layers.1"], "layers": [2]},
        r"layers \[2\] were given, and \['model.layers.1'\] name their own",
    ),
    "no such layer": ({"sites": ["blocks.9.hook_resid_post"]}, r"layer 9 does not exist: the model has 4 layers"),
    "two places": ({"sites": ["hidden_states[4]"]}, r"'hidden_states\[4\]' means two places: .* resid_post\[3\]"),
    "no hook": ({"sites": ["blocks.1.hook_resid_pots"]}, r"site 'blocks.1.hook_resid_pots' does not exist: the known"),
    "a site's layer twice": ({"sites": ["resid_post", "resid_post[1]"], "layers": [1]}, r"name something twice"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "text"), REFUSED_HOOKS.values(), ids=REFUSED_HOOKS)
def test_hooks_that_cannot_be_are_refused(model: Model, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        plan(model, **settings)


def test_hooks_of_a_plan_are_found_in_the_store(model: Model, tmp_path: Path) -> None:
    """By any other name too."""
    made = plan(model, sites=["model.layers.3", "blocks.1.hook_resid_post", "mlp_post[0]"])
    url = str(tmp_path / "run.acts.zarr")
    extract.run(made, url)
    with xr.open_dataset(url) as dataset:
        rows = dataset.acts["hidden_states[2]"].to_numpy()
        np.testing.assert_array_equal(rows, dataset.resid_post.sel(layer=1).to_numpy())
        assert dataset.acts["blocks.0.mlp.hook_post"].shape == (made.store.layout.samples, 320)


@pytest.fixture
def more_tokens(tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that knows one token more than the model, as that of Gemma 3 does."""
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny-qwen2"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.add_special_tokens(["<image>"]) == 1
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_an_added_token_that_nobody_uses_does_no_harm(model: Model, more_tokens: Path) -> None:
    assert extract.make_plan(more_tokens, DOCUMENTS, model=model).store.layout.samples > 0


def test_a_token_that_the_model_does_not_embed_is_refused_with_its_document(model: Model, more_tokens: Path) -> None:
    documents = [*DOCUMENTS, Document("seen", "An <image> of it.", {}, "t:9")]
    with pytest.raises(InputError, match="document 'seen' has token 1024, the model tiny-qwen2 embeds 0 to 1023; take"):
        extract.make_plan(more_tokens, documents, model=model)
