"""llamascopium: `Trainer.fit` on a store, with its norms, stopped and continued."""

import sys
from pathlib import Path

import numpy as np
import torch
from llamascopium import SAEConfig, SparseAutoEncoder
from llamascopium.initializer import Initializer, InitializerConfig
from llamascopium.trainer import Trainer, TrainerConfig

from actstore.adapters.hooks import Hooks
from actstore.adapters.llamascopium import Stream
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

STEPS, HOOK = 150, "blocks.3.hook_resid_post"


class Recorded(Trainer):
    """The trainer, with the loss of each step kept."""

    losses: list[float]

    def _training_step(self, sae, batch):
        context = super()._training_step(sae, batch)
        self.losses.append(context["loss"].item())
        return context


def make_sae(store) -> SparseAutoEncoder:
    torch.manual_seed(0)
    sae = SparseAutoEncoder(
        SAEConfig(
            hook_point_in=HOOK, hook_point_out=HOOK, d_model=WIDTH, expansion_factor=FEATURES / WIDTH, act_fn="topk",
            top_k=ACTIVE, device="cpu", dtype=torch.float32,
        )
    )  # fmt: skip
    Initializer(InitializerConfig()).initialize_parameters(sae)
    sae.set_dataset_average_activation_norm({HOOK: store.stats(layer=3).mean})
    return sae


def fit(stream: Stream, sae: SparseAutoEncoder, folder: Path, steps: int) -> list[float]:
    trainer = Recorded(
        TrainerConfig(
            lr=1e-2, lr_warm_up_steps=10, l1_coefficient=None, initial_k=ACTIVE, k_warmup_steps=0, n_checkpoints=0,
            total_training_tokens=steps * BATCH, exp_result_path=str(folder), amp_dtype=torch.bfloat16,
        )
    )  # fmt: skip
    trainer.losses = []
    trainer.fit(sae, stream)
    return trainer.losses


def make_hooks(store) -> Hooks:
    return Hooks(store, {HOOK: ("resid_post", 3)}, **SETTINGS)


def main(folder: Path) -> None:
    store = make_store(folder)
    with make_hooks(store) as hooks:
        stream = Stream(hooks)
        first = next(iter(stream))
        with store.batches(layer=3, **SETTINGS) as batches:
            expected = batches.next_batch()
        np.testing.assert_array_equal(first[HOOK].view(torch.uint16).numpy(), expected.rows.view(np.uint16))
        np.testing.assert_array_equal(first["tokens"].numpy(), expected.samples + 7)
        assert first["mask"].dtype == torch.bool
        assert first["mask"].all()
        losses = fit(stream, make_sae(store), folder / "whole", STEPS)
        check_falls("Trainer", losses)
        check_taken("Trainer", hooks.state(), store, STEPS, layers=[3])
        state = hooks.state()
        following = next(hooks)[HOOK]
    with make_hooks(store) as hooks:
        hooks.restore(state)
        stream = Stream(hooks)
        again = next(iter(stream))[HOOK]
        np.testing.assert_array_equal(again.view(torch.uint16).numpy(), following.view(np.uint16))
        fit(stream, make_sae(store), folder / "more", 20)
        check_taken("Trainer, continued", hooks.state(), store, STEPS + 20, layers=[3])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    run_documented("llamascopium", sys.argv[1])
