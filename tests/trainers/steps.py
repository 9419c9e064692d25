"""What the scripts that run a trainer share: the store, and what is expected of a run."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

import actstore
from tests import learnable

PAGE = Path(__file__).parent.parent.parent / "docs/how-to/train-with-sae-trainers.md"
WIDTH, FEATURES, ACTIVE = learnable.WIDTH, learnable.DIRECTIONS, learnable.ACTIVE
SETTINGS: dict[str, Any] = {"batch_size": 256, "seed": 5}
BATCH = 256


def make_store(folder: str | Path) -> actstore.Store:
    """A small store in `folder`, with layers 1 and 3 of resid_post."""
    return actstore.open(learnable.write(Path(folder) / "run.acts.zarr"))


def check_falls(what: str, losses: list[float], *, to: float = 0.5) -> None:
    """Says the loss at both ends, and refuses one that did not fall to the fraction `to`."""
    first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
    print(f"{what}: {len(losses)} steps, loss {first:.4f} -> {last:.4f}")
    assert last < to * first, f"{what}: the loss went from {first} to {last}; expected less than {to} of the first"


def check_taken(what: str, state: dict[str, Any], store: actstore.Store, steps: int, **settings: Any) -> None:
    """Refuses a loader that does not stand where `steps` minibatches leave it."""
    with store.batches(**SETTINGS | settings) as batches:
        for _ in itertools.islice(batches, steps):
            pass
        expected = batches.state()
    assert state == expected, f"{what}: the loader stands at {state}; expected {expected}, after {steps} minibatches"
    assert len(json.dumps(state)) < 200
    print(f"{what}: took exactly {steps} minibatches")


def documented(section: str) -> list[str]:
    """The code of one section of the page."""
    (part,) = re.findall(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    return re.findall(r"^```text\n(.*?)^```$", part, re.M | re.S)


def run_documented(section: str, folder: str | Path) -> None:
    """Runs the code of one section of the page where the store is."""
    os.chdir(folder)
    blocks = documented(section)
    assert blocks, f"{section} has no code"
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": "page"})
    print(f"{section}: ran {len(blocks)} examples of {PAGE.name}")
