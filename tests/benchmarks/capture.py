"""Tokens per second of forward passes with and without capture, beside torch, nnsight and TransformerLens.

All have the same weights and the same batch. nnsight and TransformerLens are processes in environments of their own,
actstore with a device for each core is one in ours (`captors`): each is measured if its rows are those of actstore.

Each pass runs all layers and no output head, except where a way says otherwise, and leaves its rows on the host as
NumPy arrays, as a store wants them: [layer, row, hidden] in float32.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from extract.forward import make_forward
from extract.models import Model, Tap, load_model
from extract.named import model_folder
from tests.benchmarks.captors import WAYS
from tests.benchmarks.peers import Peer
from tests.benchmarks.timing import median_seconds

BATCH, CONTEXT = 8, 256
MOST_ERROR = 1e-3  # of the norm of a row: float32 in another order
HEADS = {"TransformerLens": " and head"}


def measure(folder: Path, *, model: str, repeats: int) -> dict[str, object]:
    """Tokens per second of every way in turns, the cost of capture, compile seconds and XLA's memory."""
    loaded = load_model(model_folder(model))
    layers = loaded.config.layers
    quarters = sorted({layers * part // 4 - 1 for part in range(1, 5)})
    token_ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (BATCH, CONTEXT)).astype(np.int32)
    compiled = {
        "no capture": Compiled(loaded, token_ids, [layers - 1], kept=1),
        f"{len(quarters)} layers": Compiled(loaded, token_ids, quarters),
        "all layers": Compiled(loaded, token_ids, range(layers)),
        "early exit at half": Compiled(loaded, token_ids, [layers // 2 - 1]),
    }
    ways: dict[str, Callable[[], Any]] = {f"actstore, {name}": way for name, way in compiled.items()}
    ways |= torch_ways(model_folder(model), token_ids, quarters)
    expected = compiled[f"{len(quarters)} layers"].rows()
    with ExitStack() as stack:
        ways |= peer_ways(folder, model_folder(model), token_ids, quarters, expected, stack)
        seconds = median_seconds(ways, repeats=repeats)
    rates = {name: BATCH * CONTEXT / value for name, value in seconds.items()}
    for name, rate in rates.items():
        print(f"capture        {name:<37} {rate:>9,.1f} tokens/s")
    for name, way in compiled.items():
        memory = f"{way.temporary_bytes / 1e6:,.0f} MB beside weights"
        print(f"capture        {name:<22} compiled in {way.seconds:.1f} s, {memory}")
    base, some = rates["actstore, no capture"], f"{len(quarters)} layers"
    cost = {name: 1 - rates[f"actstore, {name}"] / base for name in compiled}
    print(f"capture        cost of {some} {cost[some]:.1%}, of all {cost['all layers']:.1%}")
    return {
        "capture": {name: round(rate, 1) for name, rate in rates.items()}
        | {
            "model": loaded.name,
            "cost_of_all_layers": round(cost["all layers"], 4),
            "compile_seconds": {name: round(way.seconds, 2) for name, way in compiled.items()},
            "temporary_bytes": {name: way.temporary_bytes for name, way in compiled.items()},
        }
    }


class Compiled:
    """A forward pass that keeps the residual stream after some layers: all rows of it, or some."""

    def __init__(self, model: Model, token_ids: np.ndarray, layers: Sequence[int], *, kept: int | None = None) -> None:
        forward = make_forward(model, [Tap("resid_post", layer) for layer in layers], dtype="float32")
        segments = np.ones_like(token_ids)
        positions = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape)
        rows = np.arange(token_ids.size if kept is None else kept, dtype=np.int32)
        self._arguments = (model.params, *map(jax.numpy.asarray, (token_ids, segments, positions, rows)))
        started = time.perf_counter()
        self._run = jax.jit(forward).lower(*self._arguments).compile()
        self.seconds = time.perf_counter() - started
        self.temporary_bytes = self._run.memory_analysis().temp_size_in_bytes

    def __call__(self) -> None:
        """One pass, its rows on the host."""
        self.rows()

    def rows(self) -> np.ndarray:
        """The rows of one pass, [layer, row, hidden]."""
        (rows,) = self._run(*self._arguments).values()
        return np.asarray(rows)


def peer_ways(
    folder: Path, model: Path, token_ids: np.ndarray, layers: Sequence[int], expected: np.ndarray, stack: ExitStack
) -> dict[str, Callable[[], Any]]:
    """One pass of each process whose rows are the expected ones; says why the others are not measured."""
    ways: dict[str, Callable[[], Any]] = {}
    np.save(folder / "token_ids.npy", token_ids)
    (folder / "layers.json").write_text(json.dumps(layers))
    for name in WAYS:
        try:
            peer = Peer(
                name, ["tests.benchmarks.captors", name, model.resolve(), folder.resolve()], folder / f"{name}.log"
            )
            stack.callback(peer.close)
            peer.ask("keep")
            rows = np.load(folder / "rows.npy")
            if rows.shape != expected.shape:
                raise RuntimeError(f"its rows are {rows.shape}, ours {expected.shape}")
            far = np.linalg.norm(rows - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            if far.max() > MOST_ERROR:
                raise RuntimeError(f"its rows differ from ours by {far.max():.1e} of their norm")
            ways[f"{name}, {len(layers)} layers{HEADS.get(name, '')}"] = partial(peer.ask, "run")
        except (OSError, RuntimeError) as error:
            print(f"capture        NOT MEASURED: {name}: {error}", flush=True)
    return ways


def torch_ways(folder: Path, token_ids: np.ndarray, layers: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """torch in float32 on as many threads as there are cores; none where torch is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("capture        NOT MEASURED: torch, which is not installed")
        return {}
    core = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    ids = torch.from_numpy(token_ids).long()
    kept: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            kept[layer] = states.reshape(-1, core.config.hidden_size).numpy()

        return hook

    def plain() -> None:
        with torch.inference_mode():
            core(ids, use_cache=False)

    def hooked() -> None:
        handles = [core.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
        plain()
        np.stack([kept[layer] for layer in layers])
        for handle in handles:
            handle.remove()

    def hidden_states() -> None:
        with torch.inference_mode():
            states = core(ids, use_cache=False, output_hidden_states=True).hidden_states
        np.stack([state.numpy() for state in states])

    return {
        "torch, no capture": plain,
        f"torch, hooks at {len(layers)} layers": hooked,
        "torch, output_hidden_states": hidden_states,
    }
