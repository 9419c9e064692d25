"""The engine behind `xr.open_dataset("run.acts.zarr")`. Its datasets have `.acts`."""

import os
from collections.abc import Iterable
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from actstore import accessor  # noqa: F401  datasets have `.acts` then
from actstore.kvstore import SUFFIX, Cache, Root
from actstore.ledger import find_plan, read_plan
from actstore.ranged import check_cache
from actstore.reader import open_dataset
from actstore.texts import documents_dataset


class ActstoreBackend(BackendEntrypoint):
    """The xarray engine `actstore`."""

    description = "Activation stores (*.acts.zarr), read through TensorStore"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "raw", "partial", "check", "cache")
    supports_groups = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether this looks like an activation store: a path that ends in `.acts.zarr`."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        return os.fspath(filename_or_obj).rstrip("/").endswith(SUFFIX)

    def open_dataset(  # type: ignore[override]  # engines add their own keywords
        self,
        filename_or_obj: str | os.PathLike[str],
        *,
        drop_variables: str | Iterable[str] | None = None,
        raw: bool = False,
        partial: bool = False,
        check: bool = True,
        cache: str | os.PathLike[str] | None = None,
    ) -> xr.Dataset:
        """The store as a lazy Dataset; see `actstore.reader.open_dataset`, and `actstore.open` for `cache`."""
        root = Root.of(filename_or_obj, cache=None if cache is None else Cache(cache))
        drop = {drop_variables} if isinstance(drop_variables, str) else set(drop_variables or ())
        plan, complete = find_plan(root, unfinished=partial)
        check_cache(root, plan.layout)
        return open_dataset(root, plan, raw=raw, partial=partial, check=check, drop=drop, complete=complete)

    def open_groups_as_dict(  # type: ignore[override]  # engines add their own keywords
        self, filename_or_obj: str | os.PathLike[str], **settings: Any
    ) -> dict[str, xr.Dataset]:
        """The store under `/`, and its documents under `/documents` if it has any. Keywords are of `open_dataset`."""
        root = Root.of(filename_or_obj)
        groups = {"/": self.open_dataset(filename_or_obj, **settings)}
        documents = documents_dataset(root, read_plan(root, unfinished=settings.get("partial", False)))
        return groups if documents is None else groups | {"/documents": documents}

    def open_datatree(  # type: ignore[override]  # engines add their own keywords
        self, filename_or_obj: str | os.PathLike[str], **settings: Any
    ) -> xr.DataTree:
        """The same groups as a tree."""
        return xr.DataTree.from_dict(self.open_groups_as_dict(filename_or_obj, **settings))
