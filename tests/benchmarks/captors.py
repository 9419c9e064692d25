"""Capture in a process of its own: by other libraries, each as its own documentation says, and by ours on a device for
each core, which JAX has to know before it starts.

`python -m tests.benchmarks.captors WAY MODEL FOLDER` takes `run` and `keep`, a line each, and answers each with a line
of JSON. `run` is one pass over `token_ids.npy` of the folder, after which the residual streams behind the layers of
`layers.json` are a NumPy array [layer, row, hidden]; `keep` also writes it to `rows.npy`. Peers run in environments
that have NumPy and no actstore.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], np.ndarray]


def with_actstore(model: str, token_ids: np.ndarray, layers: Sequence[int]) -> Run:
    """The mesh that a run takes where `JAX_NUM_CPU_DEVICES` is the number of cores. They must divide the batch."""
    import jax

    from extract.mesh import default_mesh, make_mesh
    from extract.models import load_model
    from tests.benchmarks.capture import Compiled

    cores = len(os.sched_getaffinity(0))
    if len(token_ids) % cores:
        raise ValueError(f"{cores} cores do not divide a batch of {len(token_ids)}")
    jax.config.update("jax_num_cpu_devices", cores)
    return Compiled(load_model(model, mesh=make_mesh(*default_mesh(len(token_ids)))), token_ids, layers).rows


def with_nnsight(model: str, token_ids: np.ndarray, layers: Sequence[int]) -> Run:
    """A trace that stops behind the last layer: no head is computed."""
    import nnsight
    import torch

    traced = nnsight.TransformersModel(model, task="text-generation", dtype=torch.float32, dispatch=True)
    ids = torch.from_numpy(token_ids).long()

    def run() -> np.ndarray:
        with torch.inference_mode(), traced.trace(ids) as tracer:
            kept = nnsight.save([])
            for layer in layers:
                kept.append(traced.model.layers[layer].output)
            tracer.stop()
        return stacked(kept)

    return run


def with_transformer_lens(model: str, token_ids: np.ndarray, layers: Sequence[int]) -> Run:
    """A run with a cache of some names, and the head: it can stop before a layer, and not behind the last."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(model, dtype=torch.float32, device="cpu")
    ids = torch.from_numpy(token_ids).long()
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]

    def run() -> np.ndarray:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(ids, names_filter=names, return_cache_object=False)
        return stacked([cache[name] for name in names])

    return run


def stacked(states: Sequence[Any]) -> np.ndarray:
    """The rows of some layers on the host."""
    return np.stack([state.reshape(-1, state.shape[-1]).numpy() for state in states])


WAYS = {"actstore, device per core": with_actstore, "nnsight": with_nnsight, "TransformerLens": with_transformer_lens}


def main() -> None:
    """Answers until the input ends."""
    name, model, place = sys.argv[1:]
    folder = Path(place)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    run: Run | None = None
    for line in sys.stdin:
        found: dict[str, Any] = {}
        try:
            if run is None:
                run = WAYS[name](
                    model, np.load(folder / "token_ids.npy"), json.loads((folder / "layers.json").read_text())
                )
            rows = run()
            if line.strip() == "keep":
                np.save(folder / "rows.npy", rows)
        except Exception as error:  # noqa: BLE001  told to whoever asked
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
