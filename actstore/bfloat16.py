"""bfloat16 for zarr-python: with this data type registered, plain `xr.open_zarr` opens a store.

zarr-python knows no bfloat16 of its own. In metadata the type is the string `bfloat16`, as in TensorStore and the
zarr-extensions registry. Newer versions of zarr find this class through the entry-point group `zarr.data_type`. zarr
3.1 collects that group and never loads it; what it does load, before it reads anything, is the group `zarr.buffer`.
There this package names zarr's own `Buffer`, which changes nothing but imports this module, and the module registers
the type. So no program has to import `actstore` to read a store.
"""

import dataclasses
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.buffer.cpu import Buffer
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import data_type_registry

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined]  # its place since zarr 3.2
except ImportError:
    from zarr.dtype import DataTypeValidationError

__all__ = ["BFloat16", "Buffer", "register"]
NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The brain floating-point type: 8 bits of exponent as in float32, 7 bits of mantissa.

    It inherits the endianness of zarr's float types: without it, zarr-python would write the `bytes` codec without
    `endian`, which TensorStore refuses.
    """

    dtype_cls = type(NATIVE)
    _zarr_v3_name = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """The zarr type of a NumPy dtype.

        Raises:
            DataTypeValidationError: it is not bfloat16; zarr then asks its other types.
        """
        if dtype != NATIVE:
            raise DataTypeValidationError(f"found {dtype}, expected {NATIVE}")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype, always of this machine's byte order: ml_dtypes has no other."""
        return NATIVE

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return NATIVE.itemsize


def register() -> None:
    """Makes zarr-python in this process read and write bfloat16. Harmless when called again."""
    data_type_registry.register("bfloat16", BFloat16)


register()
