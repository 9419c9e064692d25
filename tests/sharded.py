"""What models are on several devices: run in a process that has eight, prints JSON. `sharded.py FOLDER`.

The folder gets a model of its own: 8 heads over 2 key heads, biases that matter, an untied head, a vocabulary of 97
that no mesh divides.
"""

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import extract
from extract.forward import make_forward
from extract.mesh import default_mesh, make_mesh
from extract.models import Model, Tap, load_model
from extract.models.attention import AttentionRule, attend
from extract.models.kernels import attend_cudnn, attend_splash, over_mesh
from extract.models.sites import LAYER_SITES
from extract.sources import open_documents

TINY = Path(extract.__path__[0]) / "demo" / "tiny-qwen2"
MESHES = {"tiny-qwen2": [(8, 1), (4, 2), (2, 4), (1, 8)], "odd": [(2, 4), (1, 8)]}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ODD = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6,
    "rope_theta": 10_000.0, "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip


def write_odd(folder: Path) -> None:
    """Writes a random model with the shapes of `ODD`."""
    width, inner, kv, mlp = 48, 48, 12, 80
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (97, width), "model.norm.weight": (width,), "lm_head.weight": (97, width),
    }  # fmt: skip
    for layer in range(2):
        of_layer = {
            "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (inner, width), "self_attn.q_proj.bias": (inner,),
            "self_attn.k_proj.weight": (kv, width), "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, width), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (width, inner), "mlp.gate_proj.weight": (mlp, width),
            "mlp.up_proj.weight": (mlp, width), "mlp.down_proj.weight": (width, mlp),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    generator = np.random.default_rng(0)
    folder.mkdir()
    save_file(
        {name: (0.3 * generator.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(ODD))


def batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Eight packed rows of 70 tokens, so that attention works in chunks; padding at the end of some."""
    ids = np.random.default_rng(1).integers(0, vocab_size, (8, 70)).astype(np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row in range(8):
        edges = [0, 5 + 4 * row, 50, 70 - 5 * (row % 3)]
        for number, (start, stop) in enumerate(itertools.pairwise(edges), start=1):
            segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
    return {
        "token_ids": ids, "segment_ids": segments, "positions": positions,
        "kept": np.flatnonzero(segments)[::3].astype(np.int32),
    }  # fmt: skip


def every_row(model: Model) -> dict[str, np.ndarray]:
    taps = [Tap(site, layer) for site in LAYER_SITES for layer in range(model.config.layers)]
    forward = make_forward(model, [*taps, Tap("embed", None), Tap("final_norm", None)], dtype="float32")
    return {site: np.asarray(rows) for site, rows in forward(model.params, **batch(model.config.vocab_size)).items()}


def collectives(compiled: Any) -> dict[str, int]:
    """How often a compiled function exchanges arrays between devices, by kind and shape."""
    found = re.findall(rf"= (\S+?)(?:{{\S*)? ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
    return dict(Counter(f"{kind} {shape}" for shape, kind in found))


def exchanged(model: Model, tap: Tap) -> dict[str, int]:
    forward = make_forward(model, [tap], dtype="float32")
    lowered = jax.jit(forward).lower(model.params, **batch(model.config.vocab_size))
    return collectives(lowered.compile())


def on_devices(model: Model) -> dict[str, Any]:
    """Bytes of every device, and whether each shard has just what it should of the whole."""
    sizes: Counter[int] = Counter()
    right = True
    whole = dict(nnx.to_flat_state(load_model(folder_of[model.name]).params))
    for path, variable in nnx.to_flat_state(model.params):
        for shard in variable[...].addressable_shards:
            sizes[shard.device.id] += shard.data.nbytes
            right = right and np.array_equal(shard.data, np.asarray(whole[path][...])[shard.index])
    return {"bytes": [sizes[device.id] for device in jax.local_devices()], "right": bool(right)}


def report(folder: Path, shape: tuple[int, int], one: Model, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        model = load_model(folder, mesh=make_mesh(*shape))
    except ValueError as error:
        return {"refused": str(error)}
    rows = every_row(model)
    errors = {
        site: float(np.max(np.linalg.norm(rows[site] - values, axis=-1) / np.linalg.norm(values, axis=-1)))
        for site, values in expected.items()
    }
    ids = batch(model.config.vocab_size)["token_ids"][:, :40]
    logits, exact = (np.asarray(each.apply(each.params, ids)) for each in (model, one))
    return {
        "errors": errors | {"logits": float(np.max(np.abs(logits - exact)) / np.max(np.abs(exact)))},
        "same_digest": model.weights_digest == one.weights_digest,
        "devices": on_devices(model),
    } | ({} if model.name == "odd" else {
        "resid_post": exchanged(model, Tap("resid_post", model.config.layers - 1)),
        "mlp_post": exchanged(model, Tap("mlp_post", 0)),
    })  # fmt: skip


def gathered() -> dict[str, int]:
    """What `collectives` says of a function that does gather a weight: the check of the others can fail."""
    mesh = make_mesh(2, 4)
    assert mesh is not None
    cut, whole = NamedSharding(mesh, PartitionSpec("model")), NamedSharding(mesh, PartitionSpec())
    function = jax.jit(lambda weight: weight * 2, in_shardings=cut, out_shardings=whole)
    return collectives(function.lower(np.ones((320, 128), np.float32)).compile())


def uneven() -> dict[str, str]:
    """What is said of a batch that four parts cannot be made of."""
    model = extract.load_model(TINY, mesh=(4, 2))
    forward = make_forward(model, [Tap("embed", None)], dtype="float32")
    ids = np.ones((6, 8), np.int32)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model.params, ids, ids, ids, np.zeros(1, np.int32)),
        "plan": lambda: extract.make_plan(TINY, open_documents("python-docs", limit=1), batch=6, model=model),
    }
    said = dict.fromkeys(calls, "")
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def kernels() -> dict[str, float]:
    """How far kernels that are dealt out over a mesh are from the portable one on one device, at most."""
    generator = np.random.default_rng(0)
    states = [generator.normal(size=(4, 150, heads, 16)).astype(np.float32) for heads in (8, 4, 4)]
    segments, rule = np.sort(generator.integers(1, 4, (4, 150)), axis=1), AttentionRule(40, 0.3)
    expected, errors = np.asarray(attend(*states, segments, rule=rule)), {}
    for name, kernel in {"splash": partial(attend_splash, interpret=True),
                         "cudnn": partial(attend_cudnn, implementation="xla")}.items():  # fmt: skip
        mesh = make_mesh(2, 4)
        assert mesh is not None
        found = np.asarray(jax.jit(partial(over_mesh(kernel, mesh), rule=rule))(*states, segments))
        errors[name] = float(np.abs(found - expected).max())
    return errors


if __name__ == "__main__":
    odd = Path(sys.argv[1]) / "odd"
    write_odd(odd)
    folder_of = {"tiny-qwen2": TINY, "odd": odd}
    answer: dict[str, Any] = {"gathered": gathered(), "uneven": uneven(), "kernels": kernels()}
    answer["default"] = {str(contexts): default_mesh(contexts) for contexts in (1, 6, 8, 12, 16)}
    for name, folder in folder_of.items():
        alone = load_model(folder)
        values = every_row(alone)
        for shape in MESHES[name]:
            answer[f"{name} {shape[0]}x{shape[1]}"] = report(folder, shape, alone, values)
    print(json.dumps(answer))
