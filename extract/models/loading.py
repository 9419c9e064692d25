"""From a HuggingFace model folder to a `Model`: every tensor of the checkpoint finds its place, or loading stops."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from extract.models.checkpoint import Checkpoint, TensorDigest, read_json
from extract.models.config import DecoderConfig
from extract.models.decoder import Decoder
from extract.models.errors import ModelError
from extract.models.families import Family, family_of
from extract.models.model import Model, Params

DTYPES = ("float32", "bfloat16")
NAMES_SHOWN = 5

TensorPath = tuple[str | int, ...]


def load_model(folder: str | Path, *, dtype: str = "float32") -> Model:
    """Loads a model from a folder with `config.json` and safetensors.

    Reads and hashes every tensor once and puts it on the default device in `dtype`. Beside the parameters, one tensor
    is in memory at a time.

    Args:
        folder: A HuggingFace model folder.
        dtype: "float32", the faster one on CPU, or "bfloat16".

    Raises:
        ModelError: The folder, its configuration or its tensors are not what the family expects.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ModelError(f"found dtype {dtype!r}; expected one of {', '.join(DTYPES)}; pass dtype={DTYPES[0]!r}")
    raw = _read_config(folder)
    family = family_of(raw)
    config = family.read_config(raw)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    params, digest = _read_params(Checkpoint(folder), family, config, abstract, dtype)
    return Model(
        name=folder.resolve().name,
        config=config,
        graph=graph,
        params=params,
        dtype=dtype,
        weights_digest=digest,
        config_digest=config.digest(),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    expected = "expected a HuggingFace model folder with config.json and model.safetensors"
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise ModelError(f"found {kind} at {folder}; {expected}; check the path or download the model first")
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(f"found {found} in {folder}; {expected}; pass the folder that holds config.json")
    return read_json(folder / "config.json")


def _read_params(
    checkpoint: Checkpoint, family: Family, config: DecoderConfig, abstract: Params, dtype: str
) -> tuple[Params, str]:
    """Returns the parameters, and the digest of the tensors as stored."""
    paths, copies = family.tensor_paths(config), family.tensor_copies(config)
    _check_names(checkpoint.names, paths, copies)
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(abstract)}
    digest = TensorDigest()
    loaded: dict[Any, Any] = {}  # flax leaves the key type of a flat state open
    compared: dict[str, Shaped[np.ndarray, "..."]] = {}
    for tensor in checkpoint.read():
        digest.add(tensor)
        path = paths[copies.get(tensor.name, tensor.name)]
        if tensor.array.shape != shapes[path]:
            raise ModelError(
                f"found tensor {tensor.name!r} of shape {tensor.array.shape}; expected {shapes[path]} by config.json; "
                "use the config.json that belongs to these weights"
            )
        if tensor.name in {*copies, *copies.values()}:
            compared[tensor.name] = tensor.array
        if tensor.name not in copies:
            loaded[path] = nnx.Param(jnp.asarray(tensor.array).astype(dtype))
    _check_copies(compared, copies)
    return nnx.from_flat_state(loaded), digest.hexdigest()


def _check_names(names: Collection[str], paths: Mapping[str, TensorPath], copies: Mapping[str, str]) -> None:
    problems = []
    if missing := sorted(paths.keys() - set(names)):
        problems.append(f"found no tensor {_listed(missing)}; expected every tensor of the model; download it again")
    if left_over := sorted(set(names) - paths.keys() - copies.keys()):
        problems.append(
            f"found tensors that have no place in this model: {_listed(left_over)}; expected every tensor to be used, "
            "since one left out would change the values; use a plain checkpoint of this family"
        )
    if problems:
        raise ModelError("\n".join(problems))


def _check_copies(tensors: Mapping[str, Shaped[np.ndarray, "..."]], copies: Mapping[str, str]) -> None:
    for copy, original in copies.items():
        if copy in tensors and not np.array_equal(tensors[copy], tensors[original]):
            raise ModelError(
                f"found {copy!r} that differs from {original!r}; expected the same values, since config.json says "
                "tie_word_embeddings; set that to false if the model was trained untied"
            )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
