"""Reads a HuggingFace model folder: its `config.json` and its tensors, from safetensors only, whole or sharded."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from extract.models.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """One tensor as it lies in a checkpoint; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    array: Shaped[np.ndarray, "..."]


class Checkpoint:
    """The tensors of a model folder, read one at a time.

    Args:
        folder: A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Attributes:
        names: The tensors of all files, sorted.

    Raises:
        ModelError: There are no safetensors, a shard is missing or broken, or the index contradicts the shards.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _tensor_files(folder)
        self.names = sorted(self._files)

    def read(self) -> Iterator[StoredTensor]:
        """Yields every tensor in the order of the names; one of them is in memory at a time.

        Raises:
            ModelError: A tensor has a dtype other than float32, float16 and bfloat16.
        """
        with ExitStack() as stack:
            paths = sorted(set(self._files.values()))
            handles = {path: stack.enter_context(safe_open(path, framework="numpy")) for path in paths}
            for name in self.names:
                path = self._files[name]
                dtype = handles[path].get_slice(name).get_dtype()
                if dtype not in STORED_DTYPES:
                    raise ModelError(
                        f"found tensor {name!r} of dtype {dtype} in {path.name}; expected one of "
                        f"{', '.join(STORED_DTYPES)}; use a checkpoint that is not quantised"
                    )
                yield StoredTensor(name, dtype, handles[path].get_tensor(name))


class TensorDigest:
    """A sha256 over names, dtypes, shapes and bytes of tensors; how they are cut into files does not matter.

    Tensors must be added in the order of their names.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tensor: StoredTensor) -> None:
        """Adds one tensor."""
        self._hash.update(json.dumps([tensor.name, tensor.dtype, tensor.array.shape]).encode())
        self._hash.update(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Returns the digest of all that was added so far."""
        return self._hash.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: The file is not JSON, or holds something other than an object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"found {path.name} that is not JSON ({error}); expected a JSON object; write or download {path} again"
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(
            f"found {path.name} with a {type(raw).__name__}; expected a JSON object; write or download {path} again"
        )
    return raw


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of every tensor."""
    if (folder / INDEX).is_file():
        return _sharded_files(folder)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names_in(folder / SINGLE), folder / SINGLE)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    pickled = any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.iterdir())
    advice = (
        "pickled torch weights can run code and are never read: save the model again with "
        "save_pretrained(folder, safe_serialization=True)"
        if pickled
        else "download the weights into this folder"
    )
    raise ModelError(f"found {found} in {folder}; expected {SINGLE}, or shards with {INDEX}; {advice}")


def _sharded_files(folder: Path) -> dict[str, Path]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ModelError(f"found {INDEX} without weight_map; expected tensor names with their files; download it again")
    files: dict[str, Path] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(
                f"found shard {shard!r} in {INDEX}, but no such file in {folder}; expected every shard beside the "
                "index; download the missing shard"
            )
        files |= dict.fromkeys(_names_in(folder / shard), folder / shard)
    wrong = sorted(name for name in files.keys() | index.keys() if files.get(name, Path()).name != index.get(name))
    if wrong:
        raise ModelError(
            f"found {len(wrong)} tensors that are not in the file {INDEX} says ({', '.join(wrong[:5])}); "
            "expected index and shards to agree; download the model again"
        )
    return files


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ModelError(
            f"found {path.name} that is not a safetensors file ({error}); expected one that is complete; "
            f"download {path} again"
        ) from error
