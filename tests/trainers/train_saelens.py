"""SAELens: `SAETrainer` and `MultiSAETrainer` on a store, with its norms, stopped and continued."""

import sys
from pathlib import Path

import torch
from sae_lens import SAE, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig

from actstore.adapters.hooks import Hooks
from actstore.adapters.saelens import load_state, save_with_checkpoints, scaling_factor
from actstore.adapters.torch import as_tensor, as_tensors
from actstore.export import HOOKS, sae_lens_metadata
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


class Recorded(SAETrainer):
    """The trainer, with the loss of each step kept."""

    def step(self, batch):
        output = super().step(batch)
        self.losses = [*getattr(self, "losses", []), output.loss.item()]
        return output


def make_sae() -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=WIDTH, d_sae=FEATURES, k=ACTIVE, normalize_activations="expected_average_only_in", device="cpu"
        )
    )


def make_config(folder: Path | None = None) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=1e-2, lr_end=1e-3,
        n_checkpoints=1 if folder else 0, checkpoint_path=str(folder) if folder else None,
    )  # fmt: skip


def one(store, folder: Path) -> None:
    """One SAE: the norm is given, the state is in the checkpoint, and the continued run ends with the same weights."""
    with store.batches(layer=3, **SETTINGS) as batches:
        trainer = Recorded(
            make_config(folder), make_sae(), map(as_tensor, batches), save_checkpoint_fn=save_with_checkpoints(batches)
        )
        trainer.activation_scaler.scaling_factor = scaling_factor(store, layer=3)
        whole = trainer.fit()
        check_falls("SAETrainer", trainer.losses)
        check_taken("SAETrainer", batches.state(), store, STEPS, layer=3)
    (checkpoint,) = (path for path in folder.iterdir() if path.name.isdigit())
    with store.batches(layer=3, **SETTINGS) as batches:
        batches.restore(load_state(checkpoint))
        trainer = Recorded(make_config(), make_sae(), map(as_tensor, batches))
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        continued = trainer.fit()
        check_taken("SAETrainer, continued", batches.state(), store, STEPS, layer=3)
    assert len(trainer.losses) < STEPS, "nothing was left of the checkpoint"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), f"{name} differs after a restart"
    print(f"SAETrainer: continued from sample {checkpoint.name} to the same weights")


def metadata(store, folder: Path) -> None:
    """Our metadata is in an SAE that was saved and loaded again, and TransformerLens has every hook that we name."""
    known = sae_lens_metadata(store.plan, "resid_post", 3)
    config = TopKTrainingSAEConfig(d_in=known["d_in"], d_sae=FEATURES, k=ACTIVE, metadata=SAEMetadata(**known))
    TopKTrainingSAE(config).save_inference_model(folder)
    kept = SAE.load_from_disk(folder).cfg.metadata
    assert {name: kept[name] for name in known} == known, kept
    shape = {"n_layers": 4, "d_model": 8, "n_ctx": 4, "d_head": 4, "d_mlp": 16, "d_vocab": 5, "act_fn": "silu"}
    model = HookedTransformer(HookedTransformerConfig(**shape, normalization_type="RMS", gated_mlp=True))
    missing = {hook.format(3) for hook in HOOKS.values()} - set(model.hook_dict)
    assert not missing, missing
    print(f"metadata: {known['hook_name']} came back, and {len(HOOKS)} hooks exist")


def factor(store) -> None:
    """Our factor is the one that SAELens would estimate, from the whole store at once."""
    scaler = ActivationScaler()
    with store.batches(layer=3, epochs=1, **SETTINGS) as batches:
        scaler.estimate_scaling_factor(WIDTH, map(as_tensor, batches), store.samples // BATCH)
    ours = scaling_factor(store, layer=3)
    assert abs(scaler.scaling_factor / ours - 1) < 2e-3, (scaler.scaling_factor, ours)  # its norms are in bfloat16
    print(f"scaling factor: {ours:.6f} from the norms, {scaler.scaling_factor:.6f} estimated")


def several(store, folder: Path) -> None:
    """Two SAEs on one stream, aligned by sample, continued from a checkpoint."""
    names = {"low": "blocks.1.hook_resid_post", "high": "blocks.3.hook_resid_post"}
    layers = {"low": 1, "high": 3}

    def make(hooks, config, save=None):
        saes = {name: make_sae() for name in names}
        trainer = MultiSAETrainer(config, saes, names, map(as_tensors, hooks), save_checkpoint_fn=save)
        losses = {name: [] for name in names}
        for name, single in trainer.trainers.items():
            plain = single.step
            single.step = lambda batch, name=name, plain=plain: keep(losses[name], plain(batch))
        return trainer, losses

    def keep(losses, output):
        losses.append(output.loss.item())
        return output

    def make_hooks():
        return Hooks(store, {hook: ("resid_post", layers[name]) for name, hook in names.items()}, **SETTINGS)

    with make_hooks() as hooks:
        trainer, losses = make(hooks, make_config(folder), save_with_checkpoints(hooks))
        for name, single in trainer.trainers.items():
            single.activation_scaler.scaling_factor = scaling_factor(store, layer=layers[name])
        whole = trainer.fit()
        check_taken("MultiSAETrainer", hooks.state(), store, STEPS, layers=[1, 3])
        for name in names:
            check_falls(f"MultiSAETrainer, {name}", losses[name])
    (checkpoint,) = (path for path in folder.iterdir() if path.name.isdigit())
    with make_hooks() as hooks:
        hooks.restore(load_state(checkpoint))
        trainer, losses = make(hooks, make_config())
        trainer.load_checkpoint(checkpoint)
        continued = trainer.fit()
    for name in names:
        assert 0 < len(losses[name]) < STEPS
        for key, value in whole[name].state_dict().items():
            assert torch.equal(value, continued[name].state_dict()[key]), f"{name}.{key} differs after a restart"
    print("MultiSAETrainer: continued to the same weights")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = make_store(place)
    metadata(made, place / "saved")
    factor(made)
    one(made, place / "one")
    several(made, place / "several")
    run_documented("SAELens", place)
