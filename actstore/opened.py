"""The store behind a dataset or an array of xarray: which it is, and what is read of it for selections."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from actstore.documents import StoredDocuments
from actstore.errors import InputError, StoreNotFoundError, UnknownNameError
from actstore.kvstore import Root
from actstore.ledger import lineage, read_asset, read_plan, read_status
from actstore.reader import FINGERPRINT, ROW, SOURCE
from actstore.runs import DocumentRuns
from actstore.schema import Plan

NO_STORE = (
    "this dataset does not say what store it is of; open one with xr.open_dataset. Of an opened one the coordinate "
    "'row' says it, and xr.merge, reset_coords and drop_encoding take that away: select before these, or begin with "
    "the opened dataset again, as in opened.isel(sample=rows)"
)


class Opened:
    """The store behind a dataset. What is read of it is kept."""

    def __init__(self, root: Root, plan: Plan) -> None:
        """Reads nothing."""
        self.root, self.plan = root, plan

    @functools.cached_property
    def documents(self) -> StoredDocuments:
        """Raises UnknownNameError where there are none."""
        if not self.has_documents:
            raise UnknownNameError(f"{self.root.url} holds no documents; it was made without")
        return StoredDocuments(self.root, self.plan)

    @property
    def has_documents(self) -> bool:
        """Whether the store was made with a table of documents."""
        return any(table is not None for table in self.plan.tables)

    @property
    def complete(self) -> bool:
        """Whether it is written by now. Costs one small read."""
        return read_status(self.root, self.plan) == "complete"

    @functools.cached_property
    def runs(self) -> DocumentRuns:
        """Costs two small reads."""
        if "document" not in {column.name for column in self.plan.layout.columns}:
            raise UnknownNameError(f"{self.root.url} has no column 'document'; its samples are of no documents")
        return DocumentRuns(self.root, self.plan)

    @functools.cached_property
    def ids(self) -> dict[str, list[int]]:
        """Documents by their ids. Costs reading all ids, once."""
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.documents.strings("id")):
            found.setdefault(name, []).append(number)
        return found

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that can be selected by: those of samples, then those of documents."""
        of_documents = self.documents.columns if self.has_documents else ()
        names = [column.name for column in self.plan.layout.columns]
        return tuple(dict.fromkeys([*names, *(name for name in of_documents if name != "text")]))

    def numbers(self, wanted: list[Any]) -> list[int]:
        """Numbers of documents that were named by number, id or a slice of numbers, which holds both its ends.

        Numbers are compared with the table of documents; of a store without one nothing is known.

        Raises:
            UnknownNameError: there is no such document.
            InputError: it is neither.
        """
        found = list[int]()
        for each in wanted:
            if isinstance(each, str):
                if each not in self.ids:
                    raise UnknownNameError(f"no document of {self.root.url} has the id {each!r}")
                found += self.ids[each]
            elif isinstance(each, slice):
                found += self._span(each)
            elif isinstance(each, bool | np.bool_) or not isinstance(each, int | np.integer):
                raise InputError(f"document {each!r} was asked for; expected a number or an id")
            else:
                found.append(int(each))
        if self.has_documents:
            strange = [number for number in found if not 0 <= number < len(self.documents)]
            if strange:
                raise UnknownNameError(
                    f"no document of {self.root.url} has the number {strange[0]}; it has 0 to {len(self.documents) - 1}"
                )
        return found

    def _span(self, wanted: slice) -> range:
        ends = (wanted.start, wanted.stop)
        if wanted.step is not None or not all(
            end is None or (isinstance(end, int | np.integer) and not isinstance(end, bool) and end >= 0)
            for end in ends
        ):
            raise InputError(f"document={wanted} was asked for; expected slice(first, last) of numbers of documents")
        last = len(self.documents) - 1
        first = 0 if wanted.start is None else int(wanted.start)
        stop = last if wanted.stop is None else int(wanted.stop)
        if first > stop:
            raise InputError(f"document={wanted} holds nothing; expected first <= last, of documents 0 to {last}")
        return range(first, max(min(stop, last), first) + 1)  # a first one that is not there is found out later

    def model_layers(self) -> int | None:
        """Layers of the model, by the configuration that is kept with the store; None where it is not."""
        if "config.json" not in self.plan.assets:
            return None
        config = json.loads(read_asset(self.root, self.plan, "config.json"))
        count = config.get("num_hidden_layers", config.get("n_layer"))
        return count if isinstance(count, int) else None

    @property
    def model_family(self) -> str | None:
        """`model_type` of the model, by the provenance; None where that does not say."""
        model = self.plan.provenance.get("model")
        family = model.get("family") if isinstance(model, dict) else None
        return family if isinstance(family, str) else None


def store_of(dataset: xr.Dataset) -> Opened:
    """The store that a dataset is of: by its coordinate `row`, or by its own attributes.

    Raises:
        InputError: it does not say, the store is another one now, or it is a copy that was written elsewhere.
    """
    said = dataset.coords[ROW].encoding if ROW in dataset.coords else {}
    if FINGERPRINT in said:
        return _opened(said[SOURCE], said[FINGERPRINT])
    attributes, url = dataset.attrs.get("actstore"), dataset.encoding.get(SOURCE)
    if not isinstance(attributes, Mapping) or not isinstance(url, str):
        raise InputError(NO_STORE)
    fingerprint = str(attributes.get("fingerprint"))
    try:
        return _opened(url, fingerprint)
    except StoreNotFoundError:
        if not os.path.exists(url):  # noqa: PTH110  False where Path raises
            raise
        raise InputError(
            f"{url} is a copy of rows of the store {fingerprint[:12]}, which xarray wrote: documents and texts stayed "
            "there; open the store itself and take these rows: xr.open_dataset(STORE).isel(sample=copy.row.values)"
        ) from None


@functools.lru_cache(maxsize=4)
def _opened(url: str, fingerprint: str) -> Opened:
    """Refuses a store that is another one now. One that was appended to meanwhile is seen as it was.

    Raises:
        InputError: says so.
    """
    root = Root.of(url)
    plans = lineage(root, read_plan(root, unfinished=True))
    plan = next((plan for plan in plans if plan.fingerprint == fingerprint), None)
    if plan is None:
        raise InputError(f"{url} is another store than the one this dataset was opened from; open it again")
    return Opened(root, plan)
