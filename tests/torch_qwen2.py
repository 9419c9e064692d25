"""The reference of the model tests: torch's own Qwen2, with a hook at every site."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from extract.models.sites import Tap

Values = dict[Tap, np.ndarray]


class Segment(NamedTuple):
    """One document in a row of a batch."""

    row: int
    start: int
    length: int


class Batch(NamedTuple):
    """What a forward pass takes, and where its documents lie."""

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]

    @property
    def used(self) -> np.ndarray:
        """Flat indices of the tokens that are not padding, in the order of the segments."""
        width = self.token_ids.shape[1]
        return np.concatenate([np.arange(length) + row * width + start for row, start, length in self.segments])


def make_batch(segments: list[Segment], *, shape: tuple[int, int], vocab_size: int, seed: int = 0) -> Batch:
    """Random tokens everywhere, also in the padding: whatever lies there must not matter."""
    token_ids = np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number, (row, start, length) in enumerate(segments, start=1):
        segment_ids[row, start : start + length] = number
        positions[row, start : start + length] = np.arange(length)
    return Batch(token_ids, segment_ids, positions, tuple(segments))


def random_model(raw: dict[str, Any], folder: Path) -> Qwen2ForCausalLM:
    """Makes a Qwen2 with lively random weights, and saves it in `folder` with `raw` as its `config.json`."""
    torch.manual_seed(0)
    # torch's attention does not read a null head_dim as absent, although its rotary embedding does.
    config = Qwen2Config(**{key: value for key, value in raw.items() if (key, value) != ("head_dim", None)})
    config._attn_implementation = "eager"
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.mul_(3.0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return model


def load(folder: Path, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Loads a folder with torch."""
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def one_by_one(model: Qwen2ForCausalLM, batch: Batch) -> Values:
    """Runs every document alone and returns `[token, width]` at every site, in the order of `batch.used`."""
    parts = []
    for row, start, length in batch.segments:
        ids = batch.token_ids[row, start : start + length][None]
        parts.append({tap: value[0] for tap, value in _run(model, {"input_ids": torch.tensor(ids)}).items()})
    return {tap: np.concatenate([part[tap] for part in parts]) for tap in parts[0]}


def masked(model: Qwen2ForCausalLM, batch: Batch) -> Values:
    """Runs the whole batch with torch's attention mask (at most one document in a row); returns as `one_by_one`."""
    arguments = {
        "input_ids": torch.tensor(batch.token_ids),
        "attention_mask": torch.tensor((batch.segment_ids > 0).astype(np.int64)),
        "position_ids": torch.tensor(batch.positions).long(),
    }
    return {tap: value.reshape(-1, value.shape[-1])[batch.used] for tap, value in _run(model, arguments).items()}


def relative_error(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The L2 distance of each token, relative to the length of the expected vector."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def _run(model: Qwen2ForCausalLM, arguments: dict[str, torch.Tensor]) -> Values:
    values: Values = {}

    def keep(site: str, layer: int | None, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        values[Tap(site, layer)] = tensor.float().numpy()

    def keep_input(module: torch.nn.Module, site: str, layer: int) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: keep(site, layer, inputs))

    def keep_output(module: torch.nn.Module, site: str, layer: int | None) -> Any:
        return module.register_forward_hook(lambda _, __, output: keep(site, layer, output))

    core = model.model
    hooks = [keep_output(core.embed_tokens, "embed", None), keep_output(core.norm, "final_norm", None)]
    for index, layer in enumerate(core.layers):
        hooks += [
            keep_input(layer.input_layernorm, "resid_pre", index),
            keep_output(layer.self_attn, "attn_out", index),
            keep_input(layer.post_attention_layernorm, "resid_mid", index),
            keep_input(layer.mlp.down_proj, "mlp_post", index),
            keep_output(layer.mlp, "mlp_out", index),
            keep_output(layer, "resid_post", index),
        ]
    try:
        with torch.no_grad():
            output = model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    values[Tap("logits", None)] = output.logits.float().numpy()
    return values
