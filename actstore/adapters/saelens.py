"""What SAELens' `SAETrainer` and `MultiSAETrainer` take: the scaling factor of a store, and a state in each checkpoint.

Minibatches need no adapter of their own: `map(as_tensor, batches)`, and `map(as_tensors, hooks)` for several hooks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.adapters.hooks import Hooks
from actstore.batches import Batches
from actstore.errors import InputError
from actstore.filters import Filter
from actstore.scaling import scale_of
from actstore.store import Store

STATE_FILE = "actstore_batches.json"


def scaling_factor(
    store: Store, *, site: str = "resid_post", layer: int | None = None, where: Filter | None = None
) -> float:
    """What `normalize_activations="expected_average_only_in"` multiplies by: sqrt(width) / mean norm.

    Set it before `fit`, which then does not estimate it from 1,000 minibatches:
    `trainer.activation_scaler.scaling_factor = scaling_factor(store, layer=3)`. It is that of all rows of the store,
    or of those that a filter keeps: the one that the loader has. `max_norm` of a filter asks every layer that a loader
    reads, here the one layer alone. A trainer that was loaded from a checkpoint has a factor already.

    Raises:
        InputError: all rows are zero.
    """
    statistics = store.stats(site=site, layer=layer, where=where)
    width = store.plan.layout.site(site).width
    return scale_of("expected_average_only_in", statistics, width, what=f"{site} of {store.url}")


def save_with_checkpoints(batches: Batches[Any] | Hooks) -> Callable[[Path | None], None]:
    """A `save_checkpoint_fn` that writes the loader's state into each checkpoint's folder. Nothing without a folder."""

    def save(checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            (checkpoint_path / STATE_FILE).write_text(json.dumps(batches.state()), encoding="utf-8")

    return save


def load_state(checkpoint_path: str | Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint: for the loader's `restore`.

    Raises:
        InputError: there is none in the folder.
    """
    path = Path(checkpoint_path) / STATE_FILE
    if not path.is_file():
        raise InputError(
            f"{checkpoint_path} holds no {STATE_FILE}; give the trainer "
            "save_checkpoint_fn=save_with_checkpoints(batches)"
        )
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state
