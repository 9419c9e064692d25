"""dictionary_learning: `trainSAE` on a store, without and with normalised activations."""

import sys
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import get_norm_factor

from actstore.adapters.dictionary_learning import train
from actstore.adapters.torch import as_tensor
from tests.trainers.steps import (
    ACTIVE,
    BATCH,
    FEATURES,
    SETTINGS,
    WIDTH,
    check_falls,
    check_taken,
    make_store,
    run_documented,
)

STEPS = 150


class Recorded(TopKTrainer):
    """The trainer, with the loss of each step and the mean squared norm of the rows it was given."""

    losses: list[float]
    norms: list[float]

    def update(self, step, x):
        self.losses.append(super().update(step, x))
        self.norms.append(x.square().sum(1).mean().item())


def fit(store, folder: Path, norm_factor: float | None) -> tuple[list[float], AutoEncoderTopK]:
    """The mean squared norms the trainer saw, and the autoencoder it saved."""
    what = "trainSAE, normalised" if norm_factor else "trainSAE"
    Recorded.losses, Recorded.norms = [], []
    config = {
        "trainer": Recorded, "steps": STEPS, "activation_dim": WIDTH, "dict_size": FEATURES, "k": ACTIVE, "lr": 1e-2,
        "warmup_steps": 10, "threshold_start_step": 100, "layer": 3, "lm_name": "made-up", "seed": 0, "device": "cpu",
    }  # fmt: skip
    with store.batches(layer=3, **SETTINGS) as batches:
        train(
            batches, trainer_configs=[config], steps=STEPS, norm_factor=norm_factor, device="cpu", save_dir=str(folder)
        )
        check_taken(what, batches.state(), store, STEPS, layer=3)
    check_falls(what, Recorded.losses)
    return Recorded.norms, AutoEncoderTopK.from_pretrained(str(folder / "trainer_0/ae.pt"), k=ACTIVE, device="cpu")


def unexplained(store, autoencoder: AutoEncoderTopK) -> float:
    """The fraction of the variance of stored rows, not divided by anything, that the autoencoder leaves."""
    with store.batches(layer=3, **SETTINGS) as batches, torch.no_grad():
        rows = as_tensor(next(batches), dtype=torch.float32)
        residual = rows - autoencoder(rows)
    return (residual.square().sum() / (rows - rows.mean(0)).square().sum()).item()


def main(folder: Path) -> None:
    store = make_store(folder)
    ours = store.stats(layer=3).root_mean_square
    with store.batches(layer=3, epochs=1, **SETTINGS) as batches:
        theirs = get_norm_factor((as_tensor(rows, dtype=torch.float32) for rows in batches), store.samples // BATCH)
    assert abs(theirs / ours - 1) < 1e-4, (theirs, ours)
    norms, autoencoder = fit(store, folder / "plain", None)
    assert abs(sum(norms) / len(norms) / ours**2 - 1) < 0.02
    print(f"unexplained: {unexplained(store, autoencoder):.3f}")
    norms, autoencoder = fit(store, folder / "normalised", ours)
    assert abs(sum(norms) / len(norms) - 1) < 0.02, "rows of unit mean squared norm were expected"
    left = unexplained(store, autoencoder)
    assert left < 0.5, f"the saved autoencoder does not fit rows as they are stored: {left} of the variance is left"
    print(f"unexplained by what was saved, on rows as stored: {left:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    run_documented("dictionary_learning", sys.argv[1])
