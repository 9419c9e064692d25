"""A Dataset as the bytes of files that others read: safetensors and Parquet. Made piece by piece, in bounded memory."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import xarray as xr
from jaxtyping import Shaped

from actstore.errors import InputError

Values: TypeAlias = Shaped[np.ndarray, "..."]

SLAB_BYTES = 32 << 20  # read and written at once; a slab's edges cut chunks, which are 64 times smaller
SAFETENSORS_TYPES = {
    np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64", np.dtype(np.int8): "I8", np.dtype(np.int16): "I16", np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16", np.dtype(np.uint32): "U32",
    np.dtype(np.uint64): "U64", np.dtype(np.bool): "BOOL",
}  # fmt: skip


def safetensors_pieces(dataset: xr.Dataset) -> Iterator[memoryview]:
    """A file of safetensors with a tensor for every variable; `texts_of` is its metadata.

    The sizes are known before anything is read, and no more is needed to begin:
    https://github.com/huggingface/safetensors#format

    Raises:
        InputError: the format has no such dtype; nothing was read.
    """
    tensors = sorted(dataset.variables.items(), key=lambda item: (-item[1].dtype.itemsize, str(item[0])))  # so aligned
    strange = {str(name): str(each.dtype) for name, each in tensors if each.dtype not in SAFETENSORS_TYPES}
    if strange:
        found = ", ".join(f"{name!r} is {dtype}" for name, dtype in strange.items())
        raise InputError(f"safetensors holds numbers only, and {found}; leave it out: drop_vars({list(strange)})")
    ends = itertools.accumulate((each.nbytes for _, each in tensors), initial=0)
    header: dict[str, Any] = {"__metadata__": texts_of(dataset)}
    for (name, each), span in zip(tensors, itertools.pairwise(ends), strict=True):
        header[str(name)] = {"dtype": SAFETENSORS_TYPES[each.dtype], "shape": each.shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    slabs = itertools.chain.from_iterable(_slabs(each) for _, each in tensors)
    data = (np.ascontiguousarray(slab).reshape(-1).view(np.uint8).data for slab in slabs)
    return itertools.chain([memoryview(len(text).to_bytes(8, "little") + text)], data)


def parquet_pieces(dataset: xr.Dataset) -> Iterator[memoryview]:
    """A Parquet file with a line for every sample, row group by row group; `texts_of` is the metadata of its schema.

    Raises:
        InputError: pyarrow is not installed, or a variable does not fit into a table; nothing was read.
    """
    with needed("pyarrow", extra="parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    _check_table(dataset)
    nobody = dataset.isel(sample=[])  # xarray 2026.9 fails on slice(0) of a selection that runs backwards
    schema = pa.schema(_table(nobody).schema, texts_of(dataset))
    plain = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
    sample_bytes = sum(each.nbytes // max(dataset.sizes["sample"], 1) for each in dataset.variables.values())
    group = max(SLAB_BYTES // max(sample_bytes, 1), 1)

    def pieces() -> Iterator[memoryview]:
        sink = _Sink()
        # rows are noise: dictionaries and least and greatest values help nobody, zstd takes out what widening put in
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=plain, write_statistics=plain) as writer:
            for start in range(0, dataset.sizes["sample"], group):
                writer.write_table(_table(dataset.isel(sample=slice(start, start + group))))
                yield from sink.take()
        yield from sink.take()

    return pieces()


@contextmanager
def needed(library: str, *, extra: str) -> Iterator[None]:
    """Around the import of an optional library.

    Raises:
        InputError: the import failed; says what to install.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{library} cannot be imported ({error}); install it: pip install 'actstore[{extra}]'"
        ) from None


def layer_axis(variable: xr.DataArray | xr.Variable) -> str | None:
    """The name of a variable's layer axis, `layer` or `<site>_layer`; None where it has none."""
    return next((str(name) for name in variable.dims if name == "layer" or str(name).endswith("_layer")), None)


def texts_of(dataset: xr.Dataset) -> dict[str, str]:
    """The attributes, and the coordinates that are a single value, as strings: what was none is JSON."""
    chosen = {name: each[...].values.tolist() for name, each in dataset.coords.items() if not each.dims}
    return {
        str(name): value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in [*dataset.attrs.items(), *chosen.items()]
    }


def widened(values: Values) -> Values:
    """bfloat16 as float32, exactly, for libraries that have none; anything else as it is."""
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values


def _slabs(variable: xr.Variable) -> Iterator[Values]:
    """A variable in C order, in parts of at most `SLAB_BYTES`. Parts are new objects: xarray caches what it reads."""
    if variable.nbytes <= SLAB_BYTES or not variable.ndim:
        yield variable[...].values
    elif step := SLAB_BYTES // (variable.nbytes // len(variable)):
        for start in range(0, len(variable), step):
            yield variable[start : start + step].values
    else:
        for index in range(len(variable)):
            yield from _slabs(variable[index])


class _Sink(io.RawIOBase):
    """A file that is only written to, and whose bytes are taken out on the way."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        """What pyarrow asks."""
        return True

    def write(self, data: Any) -> int:
        """Keeps a copy, until it is taken."""
        self._pieces.append(bytes(data))
        self._size += len(self._pieces[-1])
        return len(self._pieces[-1])

    def tell(self) -> int:
        """Bytes written in all, those taken too."""
        return self._size

    def take(self) -> Iterator[memoryview]:
        """What was written since the last time."""
        pieces, self._pieces = self._pieces, []
        return map(memoryview, pieces)


def _check_table(dataset: xr.Dataset) -> None:
    """Refuses what has no place in a table of samples.

    Raises:
        InputError: names the variable, and says what to do with it.
    """
    if "sample" not in dataset.dims:
        raise InputError(
            f"the dataset has the axes {list(map(str, dataset.dims))}; expected `sample`, for the lines of the table; "
            "select samples with a list or a slice, as in isel(sample=[5])"
        )
    names: list[str] = []
    for name, variable in dataset.variables.items():
        axis = layer_axis(variable)
        width = [size for dimension, size in variable.sizes.items() if dimension not in ("sample", axis)]
        if "sample" in variable.dims:
            labels = [""] if axis is None else [f"_layer_{label}" for label in dataset[axis].values.tolist()]
            names += [f"{name}{label}" for label in labels]
            misfit = len(width) > 1 or 0 in width
        else:
            misfit = variable.ndim > 0 and name in dataset.data_vars
        if misfit:
            raise InputError(
                f"variable {name!r} has the shape {dict(variable.sizes)}; expected `sample`, and at most a layer axis "
                f"and one more with at least one value; leave it out: drop_vars({name!r})"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"the columns {twice} would be there twice; choose each layer once, or rename a variable")


def _table(part: xr.Dataset) -> Any:
    """Some samples as a table of Arrow. Layers are columns of their own."""
    import pyarrow as pa

    columns = {}
    for name, variable in part.variables.items():
        if "sample" not in variable.dims:
            continue
        axis = layer_axis(variable)
        if axis is None:
            columns[str(name)] = _column(str(name), variable.transpose("sample", ...)[...].values)
            continue
        layers = variable.transpose(axis, "sample", ...)[...].values
        for label, values in zip(part[axis].values.tolist(), layers, strict=True):
            columns[f"{name}_layer_{label}"] = _column(str(name), values)
    return pa.table(columns)


def _column(name: str, values: Values) -> Any:
    """Numbers, strings or fixed-size lists of Arrow.

    Raises:
        InputError: Arrow or Parquet has no such values.
    """
    import pyarrow as pa

    values = widened(values)
    try:
        if values.dtype.kind in "OUT":  # a part of none tells nothing of what objects are
            return pa.array(
                values.astype(object), pa.string(), from_pandas=True
            )  # pandas 3 makes NaN of a missing text
        flat = pa.array(values.reshape(-1))
        return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    except pa.ArrowException as error:
        raise InputError(
            f"variable {name!r} has values for which there is no column: {error}; leave it out: drop_vars({name!r})"
        ) from None
