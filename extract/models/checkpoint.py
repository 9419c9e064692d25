"""Reads a HuggingFace model folder: its `config.json` and its tensors, from safetensors only, whole or sharded."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from extract.models.errors import ModelError
from extract.models.stored import Index, Shape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

PIECE_BYTES = 16 << 20
"""How much of a tensor is read at once: large beside the cost of a call, small beside a tensor of a real model."""


class StoredTensor(NamedTuple):
    """What a checkpoint says of one tensor; `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: Shape


class Piece(NamedTuple):
    """Some rows of what was asked for; the first of them is `start`."""

    start: int
    array: Shaped[np.ndarray, "..."]


class Checkpoint:
    """The tensors of a model folder. Opening it reads their names and shapes; several threads may read at once.

    Args:
        folder: A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
        ignored: Expression for names of tensors that are no weights: nobody looks at them.

    Attributes:
        tensors: All others that are stored, in the order of their names.

    Raises:
        ModelError: There are no safetensors, a shard is missing or broken, the index contradicts the shards, or a
            tensor has a dtype other than float32, float16 and bfloat16.
    """

    def __init__(self, folder: Path, *, ignored: str = "") -> None:
        files = _tensor_files(folder, re.compile(ignored))
        handles = {path: safe_open(path, framework="numpy") for path in set(files.values())}
        self._handles = {name: handles[path] for name, path in files.items()}
        self.tensors = {name: self._stored(name, files[name]) for name in sorted(files)}

    def read(self, name: str, index: Index | None = None) -> Iterator[Piece]:
        """Yields a tensor, or what it has at `index`, in pieces of whole rows of at most `PIECE_BYTES` (or one row).

        A piece is a copy in the stored dtype. The file is mapped into memory: what was read of it counts as memory of
        the process until the kernel needs the room, but is never written out and never makes it run short.

        Args:
            name: Of a tensor with at least one axis.
            index: One slice for each axis, with start and stop.
        """
        tensor = self.tensors[name]
        rows, *others = index or tuple(slice(0, size) for size in tensor.shape)
        row_bytes = STORED_BYTES[tensor.dtype] * math.prod(part.stop - part.start for part in others)
        step, stored = max(1, PIECE_BYTES // max(row_bytes, 1)), self._handles[name].get_slice(name)  # type: ignore[no-untyped-call]
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            yield Piece(start - rows.start, stored[(part, *others)])

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of one shape have the same values. Reads both, piece by piece."""
        pairs = zip(self.read(first), self.read(second), strict=True)
        return all(np.array_equal(one.array, other.array) for one, other in pairs)

    def digest(self, *, stop: threading.Event | None = None) -> str:
        """Returns a sha256 over names, dtypes, shapes and bytes of all tensors, in the order of the names.

        How they are cut into files does not matter. Reads every byte once, in pieces: about 0.7 seconds per gigabyte,
        with or without a copy of the parameters beside it, mostly without holding the interpreter.

        Args:
            stop: Gives up when it is set; the digest is then worth nothing.
        """
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for piece in self.read(tensor.name):
                if stop is not None and stop.is_set():
                    return digest.hexdigest()
                digest.update(np.ascontiguousarray(piece.array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _stored(self, name: str, path: Path) -> StoredTensor:
        stored = self._handles[name].get_slice(name)  # type: ignore[no-untyped-call]
        if (dtype := stored.get_dtype()) not in STORED_BYTES:
            raise ModelError(
                f"found tensor {name!r} of dtype {dtype} in {path.name}; expected one of "
                f"{', '.join(STORED_BYTES)}; use a checkpoint that is not quantised"
            )
        return StoredTensor(name, dtype, tuple(stored.get_shape()))


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


def _tensor_files(folder: Path, ignored: re.Pattern[str]) -> dict[str, Path]:
    """Returns the file of every tensor that is not ignored."""
    if (folder / INDEX).is_file():
        return _sharded_files(folder, ignored)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names_in(folder / SINGLE, ignored), folder / SINGLE)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    pickled = any(path.suffix in {".bin", ".pt", ".pth"} for path in folder.iterdir())
    advice = (
        "pickled torch weights can run code and are never read: save the model again with "
        "save_pretrained(folder, safe_serialization=True)"
        if pickled
        else "download the weights into this folder"
    )
    raise ModelError(f"found {found} in {folder}; expected {SINGLE}, or shards with {INDEX}; {advice}")


def _sharded_files(folder: Path, ignored: re.Pattern[str]) -> dict[str, Path]:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise ModelError(f"found {INDEX} without weight_map; expected tensor names with their files; download it again")
    # It may list buffers that no file has: transformers left them out of the shards, and not always out of the index.
    index = {name: shard for name, shard in listed.items() if not ignored.fullmatch(name)}
    files: dict[str, Path] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(
                f"found shard {shard!r} in {INDEX}, but no such file in {folder}; expected every shard beside the "
                "index; download the missing shard"
            )
        files |= dict.fromkeys(_names_in(folder / shard, ignored), folder / shard)
    wrong = sorted(name for name in files.keys() | index.keys() if files.get(name, Path()).name != index.get(name))
    if wrong:
        raise ModelError(
            f"found {len(wrong)} tensors that are not in the file {INDEX} says ({', '.join(wrong[:5])}); "
            "expected index and shards to agree; download the model again"
        )
    return files


def _names_in(path: Path, ignored: re.Pattern[str]) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return [name for name in tensors.keys() if not ignored.fullmatch(name)]  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ModelError(
            f"found {path.name} that is not a safetensors file ({error}); expected one that is complete; "
            f"download {path} again"
        ) from error
