"""The objects of an array, looked at before TensorStore reads them: a hostile one would cost more than its rows.

TensorStore reads an object without a shard index whole, however large it is, waits for ever on a pipe, and believes
the lengths in a shard's index. So no object may be larger than the rows it holds, and no chunk of a shard either. What
is too small or not there is left to TensorStore, whose errors name it.

Of a remote object the size or the index is asked for before, each time: one request more. What is compared with commit
markers does not come this way: see `ranged`.
"""

import dataclasses
import errno
import functools
import itertools
import math
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from crc32c import crc32c
from jaxtyping import Shaped, UInt64

from actstore.errors import CorruptStoreError
from actstore.kvstore import Operation, Root, kind_of

CHECKSUM_BYTES = 4
MISSING = (1 << 64) - 1  # offset and length of a chunk that is not there
_SHARDS_KEPT = 1 << 14  # whose index was looked at; looked at again when the file changes


@dataclasses.dataclass(frozen=True)
class Objects:
    """One array and what its objects may cost. Cheap to make; nothing is read until `begin` is called."""

    root: Root
    name: str
    array: Any
    folder: str
    shape: tuple[int, ...]
    """Of one object."""
    most_bytes: int
    """Of one object."""
    chunks: int
    """In one object; 0 where it has no index."""
    most_chunk_bytes: int

    @classmethod
    def of(cls, root: Root, name: str, metadata: dict[str, Any]) -> "Objects":
        """The objects of a whole array with metadata that is known. Costs no request."""
        array: Any = root.open_array(name, metadata)
        layout, codecs = array.chunk_layout, array.codec.to_json()["codecs"]
        shape, chunk = layout.write_chunk.shape, layout.read_chunk.shape
        item = array.dtype.numpy_dtype.itemsize
        whole, part = math.prod(shape) * item, math.prod(chunk) * item
        if codecs[0]["name"] != "sharding_indexed":
            return cls(root, name, array, array.kvstore.path, shape, whole + CHECKSUM_BYTES, 0, 0)
        names = [codec["name"] for codec in codecs[0]["configuration"]["codecs"]]
        chunks = whole // part
        most = part + CHECKSUM_BYTES * ("crc32c" in names)
        most += (part // 128 + 1024) * ("zstd" in names)  # twice what rows that cannot be compressed grow by
        return cls(root, name, array, array.kvstore.path, shape, chunks * (most + 16) + CHECKSUM_BYTES, chunks, most)

    def begin(self, doing: str, *selection: int | slice) -> Operation[Any]:
        """Begins to read the part of the array that `selection` names into a new array.

        Args:
            doing: what it is, for messages: `read layer of runs/x.acts.zarr`.
            selection: as an index of the array; axes that are not named are whole.

        Its files are looked at now: a look at each, and one small read for each shard that was not looked at before.

        Raises:
            CorruptStoreError: an object is no file, is too large, or has an index that claims too much.
        """
        return self.root.begin(doing, self._view(selection).read)

    def begin_into(self, doing: str, values: Shaped[np.ndarray, "..."], *selection: int | slice) -> Operation[Any]:
        """The same into an array that is there, of the same shape and dtype; its contents are undefined until then."""
        target, part = ts.array(values), self._view(selection)
        return self.root.begin(doing, lambda: target.write(part), size=values.nbytes)

    def _view(self, selection: tuple[int | slice, ...]) -> Any:
        for key in self._keys(selection):
            if self.root.is_local:
                self._check(f"{self.folder}{key}")
            else:
                self._check_remote(f"{self.name}/{key}")
        return self.array[selection] if selection else self.array

    def _keys(self, selection: tuple[int | slice, ...]) -> Iterator[str]:
        """The objects that hold a selection; axes that are not named are whole."""
        whole = (slice(None),) * (len(self.shape) - len(selection))
        cells = []
        for index, size, length in zip((*selection, *whole), self.shape, self.array.shape, strict=True):
            start, stop = index.indices(length)[:2] if isinstance(index, slice) else (index, index + 1)
            cells.append(range(start // size, -(-stop // size)))
        for cell in itertools.product(*cells):
            yield "/".join(map(str, ("c", *cell)))

    def _check(self, path: str) -> None:
        try:
            found = os.stat(path)  # noqa: PTH116  a string costs half as much
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                raise CorruptStoreError(f"{path}: {error.strerror}; run `actstore verify`") from None
            return  # TensorStore says what is wrong
        if not stat.S_ISREG(found.st_mode):
            raise CorruptStoreError(f"{path} is {kind_of(found.st_mode)}, expected a file; run `actstore verify`")
        if found.st_size > self.most_bytes:
            raise CorruptStoreError(
                f"{path} has {found.st_size:,} bytes, expected at most {self.most_bytes:,}; run `actstore verify`"
            )
        if self.chunks:
            self._refuse_longer(path, _longest_chunk(path, found.st_size, found.st_mtime_ns, found.st_ino, self.chunks))

    def _check_remote(self, key: str) -> None:
        if not self.chunks:
            self.root.look(key, self.most_bytes)
            return
        span = slice(-16 * self.chunks - CHECKSUM_BYTES, None)
        try:
            index = self.root.begin_range(f"read the index of {key} of {self.root.url}", key, span).result().value
        except CorruptStoreError:  # shorter than an index: TensorStore says so
            return
        self._refuse_longer(f"{self.root.url}/{key}", _longest(index, self.chunks))

    def _refuse_longer(self, where: str, longest: int) -> None:
        if longest > self.most_chunk_bytes:
            raise CorruptStoreError(
                f"{where} has an index with a chunk of {longest:,} bytes, expected at most "
                f"{self.most_chunk_bytes:,}; run `actstore verify`"
            )


@functools.lru_cache(maxsize=_SHARDS_KEPT)
def _longest_chunk(path: str, size: int, _changed: int, _number: int, chunks: int) -> int:
    """The longest chunk that the index at the end of a shard claims. The file's time and number are for the cache."""
    length = 16 * chunks
    if size < length + CHECKSUM_BYTES:
        return 0
    with open(path, "rb") as file:  # noqa: PTH123  the same
        file.seek(size - length - CHECKSUM_BYTES)
        return _longest(file.read(), chunks)


def _longest(tail: bytes, chunks: int) -> int:
    """The longest chunk that an index with its checksum claims; 0 where it is none."""
    data, stored = tail[:-CHECKSUM_BYTES], tail[-CHECKSUM_BYTES:]
    if len(data) != 16 * chunks or crc32c(data) != int.from_bytes(stored, "little"):
        return 0  # TensorStore looks at the checksum first, and refuses it
    index: UInt64[np.ndarray, "chunk 2"] = np.frombuffer(data, "<u8").reshape(chunks, 2)
    lengths = index[(index != MISSING).any(axis=1), 1]
    return int(lengths.max(initial=0))
