"""sparsify: a loop over `SparseCoder`, stopped and continued."""

import itertools
import sys

import torch
from sparsify import SparseCoder, SparseCoderConfig

from actstore.adapters.torch import as_tensor
from tests.trainers.steps import ACTIVE, FEATURES, SETTINGS, WIDTH, check_falls, make_store, run_documented

STEPS = 150


def start() -> tuple[SparseCoder, torch.optim.Optimizer]:
    torch.manual_seed(0)
    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=FEATURES, k=ACTIVE))
    return coder, torch.optim.Adam(coder.parameters(), lr=1e-2)


def train(batches, coder: SparseCoder, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for rows in itertools.islice(batches, steps):
        loss = coder(as_tensor(rows, dtype=coder.dtype)).fvu
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        coder.set_decoder_norm_to_unit_norm()
        losses.append(loss.item())
    return losses


def main(folder: str) -> None:
    store = make_store(folder)
    with store.batches(layer=3, **SETTINGS) as batches:
        unbroken = train(batches, *start(), STEPS)
    check_falls("SparseCoder", unbroken)
    running = start()
    with store.batches(layer=3, **SETTINGS) as batches:
        losses = train(batches, *running, 60)
        state = batches.state()
    with store.batches(layer=3, **SETTINGS) as batches:
        batches.restore(state)
        losses += train(batches, *running, STEPS - 60)
    assert losses == unbroken, "the continued run differs"
    print("SparseCoder: continued with the same losses")


if __name__ == "__main__":
    main(sys.argv[1])
    run_documented("sparsify", sys.argv[1])
