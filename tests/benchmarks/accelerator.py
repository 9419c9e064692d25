"""Tokens per second on a GPU in bfloat16, with and without capture, beside torch with hooks on the same GPU.

`python -m tests.benchmarks.accelerator` runs it alone. The model has the shape of Qwen2.5-0.5B and fresh weights, which
both read from one folder. Passes follow one another as in a run: each is begun before the rows of the one before are
taken to the host as NumPy arrays, [layer, row, hidden] in bfloat16. torch's hooks do the same in two ways: a copy in
the hook, as most scripts have it, and copies into pinned memory that go on while the GPU computes.

The share of the peak is that of the products of matrices a pass needs, attention's included, over the rate of one large
product of bfloat16 matrices, measured in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from extract.forward import make_forward
from extract.loaded import load_model
from extract.mesh import toward_host
from extract.models import Model, Tap

BATCH, CONTEXT, PASSES = 32, 1024, 8
SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
PEAK_SIZE = 8192
Run = Callable[[], Any]


def measure(folder: Path, *, repeats: int, kernels: Sequence[str] = ("cudnn",)) -> dict[str, object]:
    """Rates of every way in turns; nothing where there is no GPU, or no torch that sees it."""
    if jax.default_backend() != "gpu":
        print(f"accelerator    NOT MEASURED: JAX's devices are {jax.default_backend()!r}, expected a GPU")
        return {}
    try:
        import torch
    except ImportError:
        print("accelerator    NOT MEASURED: torch, the reference, is not installed")
        return {}
    if not torch.cuda.is_available():
        print("accelerator    NOT MEASURED: torch sees no GPU")
        return {}
    made = fresh_model(folder / "model")
    layers = SHAPE["num_hidden_layers"]
    quarters = [layers * part // 4 - 1 for part in range(1, 5)]
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, SHAPE["vocab_size"], (BATCH, CONTEXT)).astype(np.int32)
    peak = peak_rate()
    ways: dict[str, Run] = {}
    compiled = {}
    for kernel in kernels:
        model = load_model(made, dtype="bfloat16", attention=kernel)
        cases: dict[str, tuple[Sequence[int], int | None]] = {
            "no capture": ([layers - 1], 1), "4 layers": (quarters, None), "all layers": (range(layers), None),
            "early exit at half": ([layers // 2 - 1], None),
        }  # fmt: skip
        for case, (wanted, kept) in cases.items():
            started = time.perf_counter()
            ways[f"actstore {kernel}, {case}"] = passes(model, token_ids, wanted, kept=kept)
            compiled[f"{kernel}, {case}"] = round(time.perf_counter() - started, 1)
    ways |= torch_ways(made, token_ids, quarters)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append((time.perf_counter() - started) / PASSES)
    print(f"accelerator    {jax.devices()[0].device_kind}, one product of {PEAK_SIZE}: {peak / 1e12:.0f} TFLOP/s")
    rates = {}
    for name, values in seconds.items():
        rate = BATCH * CONTEXT / statistics.median(values)
        rates[name] = round(rate)
        share = pass_operations(layers) / statistics.median(values) / peak
        told = "" if "half" in name else f", {share:.0%} of the peak"
        print(f"accelerator    {name:<40} {rate:>12,.0f} tokens/s{told}")
    print(f"accelerator    compiled and loaded, s: {compiled}")
    return {"accelerator": {"device": jax.devices()[0].device_kind, "peak_tflops": round(peak / 1e12), **rates}}


def fresh_model(folder: Path) -> Path:
    """A folder with a model of Qwen2.5-0.5B's shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def pass_operations(layers: int) -> float:
    """Floating-point operations of the products of one pass; each query sees half of its context on average."""
    hidden, inner, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"]
    dim = hidden // heads
    weights = hidden * (2 * hidden + 2 * SHAPE["num_key_value_heads"] * dim) + 3 * hidden * inner
    return BATCH * CONTEXT * layers * (2 * weights + 2 * CONTEXT * hidden)


def peak_rate() -> float:
    """Operations per second of one large product."""
    left, right = (jax.random.normal(jax.random.key(seed), (PEAK_SIZE, PEAK_SIZE), jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.matmul)
    rates = []
    for _ in range(5):
        product(left, right).block_until_ready()
        started = time.perf_counter()
        for _ in range(10):
            last = product(left, right)
        last.block_until_ready()
        rates.append(10 * 2 * PEAK_SIZE**3 / (time.perf_counter() - started))
    return statistics.median(rates)


def passes(model: Model, token_ids: np.ndarray, layers: Sequence[int], *, kept: int | None) -> Run:
    """Several passes, one after the other; compiled and run once before."""
    forward = make_forward(model, [Tap("resid_post", layer) for layer in layers], dtype="bfloat16")
    segments = np.ones_like(token_ids)
    positions = np.broadcast_to(np.arange(token_ids.shape[1], dtype=np.int32), token_ids.shape)
    rows = np.arange(token_ids.size if kept is None else kept, dtype=np.int32)

    def begin() -> jax.Array:
        (found,) = forward(model.params, *map(jnp.asarray, (token_ids, segments, positions, rows))).values()
        return toward_host(found)

    def run() -> np.ndarray:
        ahead = begin()
        for _ in range(PASSES - 1):
            after = begin()
            np.asarray(ahead)
            ahead = after
        return np.asarray(ahead)

    np.asarray(begin())
    return run


def torch_ways(folder: Path, token_ids: np.ndarray, layers: Sequence[int]) -> dict[str, Run]:
    """torch in bfloat16 with its fused attention: eager, as hooks are used."""
    import torch
    from transformers import AutoModelForCausalLM

    core = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    core = core.model.cuda()
    ids = torch.from_numpy(token_ids).long().cuda()
    shape = (len(layers), token_ids.size, core.config.hidden_size)
    pinned = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
    taken = torch.empty(shape, dtype=torch.bfloat16)
    place = {layer: index for index, layer in enumerate(layers)}

    def forward(keep: Callable[[int, Any], None] | None) -> None:
        def hook(layer: int, _: Any, __: Any, output: Any) -> None:
            keep(layer, output[0] if isinstance(output, tuple) else output)

        handles = [core.layers[layer].register_forward_hook(partial(hook, layer)) for layer in layers] if keep else []
        with torch.inference_mode():
            core(ids, use_cache=False)
        for handle in handles:
            handle.remove()

    def plain() -> None:
        for _ in range(PASSES):
            forward(None)
        torch.cuda.synchronize()

    def hooks() -> None:
        for _ in range(PASSES):
            forward(lambda layer, rows: taken[place[layer]].copy_(rows.reshape(shape[1:])))
        torch.cuda.synchronize()

    def pinned_hooks() -> None:
        for number in range(PASSES):
            target = pinned[number % 2]
            forward(lambda layer, rows, to=target: to[place[layer]].copy_(rows.reshape(shape[1:]), non_blocking=True))
        torch.cuda.synchronize()

    return {"torch, no capture": plain, "torch, hooks": hooks, "torch, hooks into pinned memory": pinned_hooks}


def main() -> None:
    """Measures, and prints one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement; the median is reported")
    parser.add_argument("--attention", default="cudnn", help="kernels, with commas between; chunked compiles minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as name:
        print(json.dumps(measure(Path(name), repeats=options.repeats, kernels=options.attention.split(","))))


if __name__ == "__main__":
    main()
