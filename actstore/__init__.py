"""actstore: an activation dataset store.

Reads and writes sharded Zarr v3 stores of language-model activations. Importing it imports no machine-learning library,
and the libraries it needs only when one of its names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore.api import append, copy, create, open  # noqa: A004  reads as `actstore.open`
    from actstore.batches import Batch, Batches
    from actstore.errors import ActstoreError
    from actstore.filters import Filter
    from actstore.layout import Column, Layout, Site
    from actstore.lookup import TokenInContext
    from actstore.marked import TokenRows
    from actstore.norms import NormStatistics
    from actstore.schema import Plan
    from actstore.store import Store
    from actstore.table import DocumentTable
    from actstore.writer import Writer
    from actstore.zarr_adapter import zarr_store

__version__ = "0.1.0"
_WHERE = {
    "ActstoreError": "errors",
    "Batch": "batches",
    "Batches": "batches",
    "Column": "layout",
    "DocumentTable": "table",
    "Filter": "filters",
    "Layout": "layout",
    "NormStatistics": "norms",
    "Plan": "schema",
    "Site": "layout",
    "Store": "store",
    "TokenInContext": "lookup",
    "TokenRows": "marked",
    "Writer": "writer",
    "append": "api",
    "copy": "api",
    "create": "api",
    "open": "api",
    "zarr_store": "zarr_adapter",
}
_MODULES = ("errors", "export", "layout")
__all__ = [
    "ActstoreError",
    "Batch",
    "Batches",
    "Column",
    "DocumentTable",
    "Filter",
    "Layout",
    "NormStatistics",
    "Plan",
    "Site",
    "Store",
    "TokenInContext",
    "TokenRows",
    "Writer",
    "append",
    "copy",
    "create",
    "open",
    "zarr_store",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: zarr imports `actstore.bfloat16` in programs that only use zarr."""
    if name in _MODULES:
        return import_module(f"actstore.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    return getattr(import_module(f"actstore.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion at a prompt."""
    return __all__
