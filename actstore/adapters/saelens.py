"""What SAELens' `SAETrainer` and `MultiSAETrainer` take: the scaling factor of a store, and a state in each checkpoint.

Minibatches need no adapter of their own: `map(as_tensor, batches)`, and `map(as_tensors, hooks)` for several hooks.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.adapters.hooks import Hooks
from actstore.adapters.norms import mean_norm
from actstore.api import Store
from actstore.batches import Batches
from actstore.errors import InputError

STATE_FILE = "actstore_batches.json"


def scaling_factor(store: Store, *, site: str = "resid_post", layer: int | None = None) -> float:
    """What `normalize_activations="expected_average_only_in"` multiplies by: sqrt(width) / mean norm.

    Set it before `fit`, which then does not estimate it from 1,000 minibatches:
    `trainer.activation_scaler.scaling_factor = scaling_factor(store, layer=3)`. It is that of all rows of the store.
    A trainer that was loaded from a checkpoint has one already.
    """
    return math.sqrt(store.plan.layout.site(site).width) / mean_norm(store, site=site, layer=layer)


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
