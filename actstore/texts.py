"""The documents of a store as a lazy xarray Dataset: texts and columns, decoded as they are asked for."""

import asyncio
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Shaped
from xarray.backends import BackendArray
from xarray.core import indexing

from actstore.documents import StoredDocuments
from actstore.kvstore import Root
from actstore.metadata import table_groups
from actstore.schema import Plan

DESCRIPTION = "the documents the rows come from"


class DocumentColumn(BackendArray):
    """A column of the document table, of all generations. Texts are Python strings. Any thread may read."""

    def __init__(self, root: Root, plan: Plan, name: str, dtype: np.dtype[Any]) -> None:
        self._root, self._plan, self._name = root, plan, name
        self.shape, self.dtype = (len(StoredDocuments(root, plan)),), dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """What xarray calls. One range read for each run of neighbouring texts."""
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    async def async_getitem(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """The same in a thread of the event loop."""
        return await asyncio.to_thread(self.__getitem__, key)

    def _read(self, key: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        chosen = np.arange(self.shape[0])[key[0]]  # out of range is an IndexError of NumPy
        numbers = np.atleast_1d(chosen)
        stored = StoredDocuments(self._root, self._plan)  # of its own: what it keeps is for one thread
        if self.dtype != np.dtype(object):
            return stored.numbers(self._name, numbers).reshape(chosen.shape)
        found = np.empty(len(numbers), object)
        found[:] = stored.strings(self._name, numbers)
        return found.reshape(chosen.shape)


def documents_dataset(root: Root, plan: Plan) -> xr.Dataset | None:
    """Texts and columns of the documents, by their numbers; None where the store has none. Reads nothing.

    Tokens are left out: `StoredDocuments.tokens` reads them document by document.
    """
    tables = list(table_groups(plan).values())
    if not tables:
        return None
    dtypes = {name: np.dtype(object) for name in tables[0].strings}
    dtypes |= {name: np.dtype(dtype) for name, dtype in tables[0].numbers.items()}
    variables = {
        name: xr.Variable(["document"], indexing.LazilyIndexedArray(DocumentColumn(root, plan, name, dtype)))
        for name, dtype in dtypes.items()
    }
    return xr.Dataset(variables, attrs={"description": DESCRIPTION})
