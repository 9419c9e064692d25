"""actstore: an activation dataset store.

Reads and writes sharded Zarr v3 stores of language-model activations. Importing it imports no machine-learning library.
"""

from actstore.api import Store, TokenInContext, create, open  # noqa: A004  reads as `actstore.open`
from actstore.batches import Batch, Batches
from actstore.errors import ActstoreError
from actstore.layout import Column, Layout, Site
from actstore.schema import Plan
from actstore.table import DocumentTable
from actstore.writer import Writer

__version__ = "0.1.0"
__all__ = [
    "ActstoreError",
    "Batch",
    "Batches",
    "Column",
    "DocumentTable",
    "Layout",
    "Plan",
    "Site",
    "Store",
    "TokenInContext",
    "Writer",
    "create",
    "open",
]
