"""`actstore demo`: text, tokens, activations, store, xarray, minibatches, a trained SAE, and what its features mean."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from jaxtyping import Int64, Shaped

import actstore
from actstore.card import human_bytes
from actstore.errors import CorruptStoreError, InputError
from actstore.terminal import Work
from extract.console import RunConsole
from extract.demo.features import Firing, TopSamples, count_firing, pick_features, top_samples, write_features
from extract.demo.plot import plot_loss
from extract.demo.sae import TrainedSAE, train_sae
from extract.demo.smollm2 import ModelFetchError
from extract.documents import Document
from extract.planning import make_plan
from extract.ranks import Rank
from extract.sources import open_documents

CHARACTERS_PER_TOKEN = 4  # of English text and BPE; only the size of the demo depends on it
BLOCK_SAMPLES = 16_384
BATCH = 1024
SINK_RATIO = 10.0  # rows of 10 times the median norm are attention sinks: the first token of each context
FEATURES_SHOWN, TOKENS_SHOWN = 12, 8

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoFiles:
    """What the demo leaves."""

    store: Path
    plot: Path
    features: Path


def run_demo(
    folder: Path, *, model: Callable[[str], Path], name: str | None, tokens: int, steps: int, say: Say
) -> DemoFiles:
    """Runs the whole path into `folder`, and says what happens at each stage.

    Args:
        folder: where the store, the plot and the features go.
        model: gives the folder of a model by its name.
        name: of the model; None takes SmolLM2, or the tiny model where that cannot be fetched.
        tokens: about how many to read.
        steps: training steps of the SAE.
        say: called with one line or more at a time.

    Raises:
        InputError: fewer tokens than one batch, or no steps.
    """
    if tokens < BATCH * CHARACTERS_PER_TOKEN or steps < 1:
        raise InputError(
            f"tokens is {tokens} and steps {steps}; expected at least {BATCH * CHARACTERS_PER_TOKEN} and 1"
        )
    started = time.perf_counter()
    chosen = _model(model, name, say)
    files = DemoFiles(folder / f"{chosen.name}.acts.zarr", folder / "sae-loss.png", folder / "features.txt")
    _extract(chosen, choose_documents(open_documents("python-docs"), tokens), files.store, say)
    store = actstore.open(files.store)
    layers = store.sites[0].layers or ()
    layer = layers[(len(layers) - 1) // 2]
    _show_readers(store, layer, say)
    sae = _train(store, layer, steps, say)
    plot_loss(sae.history, files.plot)
    firing, top = _features(store, layer, sae)
    write_features(files.features, firing=firing, top=top, context=lambda sample: _context(store, sample))
    _summarise(store, layer, sae, files, time.perf_counter() - started, say)
    return files


def choose_documents(documents: Sequence[Document], tokens: int) -> list[Document]:
    """About `tokens` tokens of text, drawn evenly from all documents: the same ones each time, in their order."""
    drawn = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    sizes = np.cumsum([len(document.text) for document in drawn])
    kept = {document.id for document in drawn[: int(np.searchsorted(sizes, tokens * CHARACTERS_PER_TOKEN)) + 1]}
    return [document for document in documents if document.id in kept]


def _model(model: Callable[[str], Path], name: str | None, say: Say) -> Path:
    """The folder of the model to use."""
    if name is not None:
        return model(name)
    try:
        return model("smollm2")
    except ModelFetchError as error:
        say(f"{error}\nThe demo goes on with tiny-qwen2, the small model that comes with actstore.")
        return model("tiny-qwen2")


def _extract(folder: Path, documents: Sequence[Document], url: Path, say: Say) -> None:
    """Writes the store, or what is missing of it."""
    say("\n1. Extract: text -> tokens -> forward pass -> whole shards")
    with Work("tokenise", unit="documents") as work:
        plan = make_plan(folder, documents, block_samples=BLOCK_SAMPLES, progress=work.update)
    say(plan.describe())
    state = RunConsole(Rank()).run(plan, str(url))
    say(
        f"   {state.blocks_computed} of {state.blocks} blocks computed, {state.blocks_before} were there before; "
        f"{state.tokens_per_second:,.0f} tokens/s, {human_bytes(state.bytes_written)} written"
    )


def _show_readers(store: actstore.Store, layer: int, say: Say) -> None:
    """Opens the store in three ways, and checks that they give the same values.

    Raises:
        CorruptStoreError: they do not.
    """
    say("\n2. Read: actstore.open, xr.open_dataset and xr.open_zarr see the same values")
    rows = np.linspace(0, store.samples - 1, 64).astype(int)
    ours = store.dataset().resid_post.sel(layer=layer).isel(sample=rows).values
    engine = xr.open_dataset(store.url).resid_post.sel(layer=layer).isel(sample=rows).values
    plain = xr.open_zarr(store.url, chunks=None).resid_post.sel(layer=layer).isel(sample=rows).values
    if not (np.array_equal(ours, engine) and np.array_equal(ours, plain.astype(np.float32))):
        raise CorruptStoreError(f"{store.url} reads differently in xarray; run `make test` and report what it says")
    sizes = " x ".join(f"{axis} {size:,}" for axis, size in store.dataset().resid_post.sizes.items())
    say(f"   {len(rows)} rows of layer {layer} compared, equal; resid_post is {sizes}")


def _train(store: actstore.Store, layer: int, steps: int, say: Say) -> TrainedSAE:
    """A TopK SAE on shuffled minibatches of one layer."""
    width = store.sites[0].width
    features = 8 * width if width < 512 else 4096
    say(f"\n3. Train: TopK SAE, {features} features, k 32, on batches of {BATCH} rows of layer {layer}")
    sinks_out = actstore.Filter(max_norm=SINK_RATIO)
    with (
        store.batches(layer=layer, batch_size=BATCH, seed=0, where=sinks_out) as batches,
        Work("train", unit="steps") as work,
    ):
        return train_sae(
            batches, width=width, features=features, k=32, steps=steps,
            progress=lambda label, done, total: work.update(done, total, label),
        )  # fmt: skip


def _features(store: actstore.Store, layer: int, sae: TrainedSAE) -> tuple[Firing, TopSamples]:
    """Which features fire how often, and the samples that excite some of them most."""
    firing = count_firing(sae, _every_sample(store, layer))
    return firing, top_samples(
        sae, _every_sample(store, layer), features=pick_features(firing, count=FEATURES_SHOWN), k=TOKENS_SHOWN
    )


def _every_sample(
    store: actstore.Store, layer: int
) -> Iterator[tuple[Shaped[np.ndarray, "batch hidden"], Int64[np.ndarray, " batch"]]]:
    """Each sample once, with its number."""
    with store.batches(layer=layer, batch_size=4 * BATCH, epochs=1, drop_remainder=False) as batches:
        while (batch := batches.next_or_none()) is not None:
            yield batch.rows.astype(np.float32), batch.samples


def _context(store: actstore.Store, sample: int) -> tuple[str, str, str]:
    (shown,) = store.text([sample], window=12)
    return shown.before, shown.token, shown.after


def _summarise(store: actstore.Store, layer: int, sae: TrainedSAE, files: DemoFiles, seconds: float, say: Say) -> None:
    """The end of the story, for a stranger."""
    end, layout = sae.metrics, store.plan.layout
    program = sys.argv[0] if Path(sys.argv[0]).name == "actstore" else "actstore"
    example = files.features.read_text(encoding="utf-8").split("\n\n")[0]
    say(f"\n4. What a feature means: the tokens that excite one feature most, in their text\n{example}")
    say(
        f"\nDone in {seconds:.0f} s.\n"
        f"  {files.store}: {layout.samples:,} samples x {len(store.sites[0].layers or ())} layers x "
        f"{store.sites[0].width} {store.sites[0].dtype}, {human_bytes(layout.data_bytes)}\n"
        f"  {files.plot}: loss {end.loss:.4f}, fraction of variance unexplained {end.fvu:.3f}, L0 {end.l0:.1f}, "
        f"dead features {end.dead:.1%}\n"
        f"  {files.features}: top tokens of {FEATURES_SHOWN} features\n"
        f"Next: {program} info {files.store}; {program} head {files.store}; in Python:\n"
        f'  xr.open_dataset("{files.store}").resid_post.sel(layer={layer})'
    )
