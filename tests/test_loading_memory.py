"""What loading holds in host memory beside the parameters, as the system counts it, of a model of 268 MB."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from watched import WATCH

import extract

ROOT = Path(extract.__path__[0]).parent
WIDTH, INNER, LAYERS = 1024, 4096, 8
PIECE, ROOM = 16 << 20, 20_000_000
LARGEST = INNER * WIDTH * 4
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": INNER, "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip

LOAD = (
    WATCH
    + """
import jax

import extract
import extract.models.loading as loading
from extract.mesh import make_mesh
from extract.models import load_model

folder, mesh, keep = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "keep"
kept, read_part = [], loading.read_part
if keep:
    loading.read_part = lambda *arguments, **options: kept.append(read_part(*arguments, **options)) or kept[-1]
load_model(extract.model_folder("tiny-qwen2"), mesh=make_mesh(*mesh))  # libraries, threads
before = anonymous()
watching = threading.Thread(target=watch, daemon=True)
watching.start()
model = load_model(folder, mesh=make_mesh(*mesh))
done = True
watching.join()
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
print(json.dumps({"parameters": held, "peak": peak[0] - before}))
"""
)


def write_model(folder: Path) -> None:
    """Random bfloat16, written in pieces: this process does not hold the model either."""
    of_layer = {
        "input_layernorm.weight": [WIDTH], "post_attention_layernorm.weight": [WIDTH],
        **{f"self_attn.{name}_proj.weight": [WIDTH, WIDTH] for name in "qkvo"},
        **{f"self_attn.{name}_proj.bias": [WIDTH] for name in "qkv"},
        "mlp.gate_proj.weight": [INNER, WIDTH], "mlp.up_proj.weight": [INNER, WIDTH],
        "mlp.down_proj.weight": [WIDTH, INNER],
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [INNER, WIDTH], "model.norm.weight": [WIDTH]}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    edges = np.cumsum([0] + [2 * int(np.prod(shape)) for shape in shapes.values()]).tolist()
    places = zip(shapes.items(), edges[:-1], edges[1:], strict=True)
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]} for (name, shape), start, stop in places
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0).integers(0x3C00, 0x3F00, 1 << 20).astype("<u2").tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, edges[-1], len(numbers)):
            file.write(numbers[: edges[-1] - start])
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_model(folder)
    assert (folder / "model.safetensors").stat().st_size > 260_000_000
    return folder


def beside(folder: Path, *, mesh: tuple[int, int] = (1, 1), keep: bool = False) -> int:
    """The peak of the loading process's own memory, above what it had before and the parameters themselves."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here: the peak of memory is not measured")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    environment["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # else glibc keeps up to 110 MB of what was given back
    command = [sys.executable, "-c", LOAD, str(folder), json.dumps(mesh), "keep" if keep else "drop"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["parameters"] > 500_000_000, "float32, twice what is stored"
    return found["peak"] - found["parameters"]


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4)])
def test_loading_holds_one_parameter_and_pieces_of_what_is_stored(folder, mesh):
    assert beside(folder, mesh=mesh) < LARGEST + 2 * PIECE + ROOM


def test_meta_parameters_that_are_kept_would_be_found(folder):
    assert beside(folder, mesh=(1, 4), keep=True) > 2 * (LARGEST + 2 * PIECE + ROOM)
