"""`dataset.acts`: a store's dataset asked as researchers think, by hook, document, position, token, split or score.

It works on the whole dataset and on what was selected from it: the coordinate `row` says which samples of the store are
there. What needs the store (documents, texts, tokens) reads it from the address that the dataset was opened with.
"""

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xarray as xr
from jaxtyping import Int64, Shaped

from actstore import card, export
from actstore.asked import (
    check_columns,
    check_filter,
    check_tokens,
    in_order_of,
    listed,
    needs_samples,
    rows_here,
    samples_here,
)
from actstore.documents import StoredDocuments
from actstore.errors import InputError, UnfinishedStoreError, UnknownNameError
from actstore.filters import Filter
from actstore.gather import Samples
from actstore.hooks import Place, place_of
from actstore.kept import Kept
from actstore.layout import Site, whole_number
from actstore.lookup import TokenInContext, in_context, token_ids
from actstore.marked import TokenRows
from actstore.moments import to_float32
from actstore.opened import Opened, store_of
from actstore.reader import ROW
from actstore.shuffle import Permutation

if TYPE_CHECKING:
    import anndata
    import torch

SCORE = "top_score"  # a column of the store may be called score
ROWS_AT_ONCE = 1 << 22  # that a filter is asked of
SCORED_BYTES = 64 << 20  # of rows in float32 that a score is asked for at once

Rows: TypeAlias = Sequence[int] | Shaped[np.ndarray, " row"] | xr.DataArray
Score = Callable[[Shaped[np.ndarray, "row width"]], Shaped[np.ndarray, " row"]]


@xr.register_dataset_accessor("acts")  # type: ignore[no-untyped-call]
class Acts:
    """Selections of a store's dataset, as `dataset.acts`."""

    def __init__(self, dataset: xr.Dataset) -> None:
        """Made by xarray. Reads nothing."""
        self._dataset = dataset

    def __repr__(self) -> str:
        return f"{card.text(self._store.root, self._store.plan)}\nhere         {self._here()}"

    def _repr_html_(self) -> str:
        return f"{card.html(self._store.root, self._store.plan)}<p>{self._here()}</p>"

    def _here(self) -> str:
        one = ROW in self._dataset.coords and not self._dataset.coords[ROW].dims
        count = 1 if one else self._dataset.sizes.get("sample")
        return "no samples" if count is None else f"{count:,} of {self._store.plan.layout.samples:,} samples"

    def __getitem__(self, name: str) -> xr.DataArray:
        """The rows [sample, hidden] at one place of the model, lazily, by the name that any library has for it.

        `blocks.12.hook_resid_post` (TransformerLens), `model.layers.12` (modules of transformers), `hidden_states[13]`,
        `layers_output[12]` (nnterp), `resid_post[12]`; or a site alone where one layer of it is here, or it has none.

        Raises:
            UnknownNameError: nothing has this name, or the store does not hold it.
            InputError: it means several places.
        """
        place = self._only_layer(name) or self.place(name)
        if place.site not in self._dataset:
            raise UnknownNameError(f"{name!r} is site {place.site!r}, which was left out of this dataset")
        rows = self._dataset[place.site]
        if place.layer is None:
            return rows
        layout = self._store.plan.layout
        site = layout.site(place.site)
        there = self._labels(site)
        if place.layer not in there:
            raise UnknownNameError(f"{name!r} is layer {place.layer}; this dataset was cut to layers {there}")
        dimension = layout.layer_dimension(site)
        return rows.isel({dimension: there.index(place.layer)}) if dimension in rows.dims else rows

    def _only_layer(self, name: str) -> Place | None:
        """The place of a site of which a single layer is here."""
        site = next((site for site in self._store.plan.layout.sites if site.name == name and site.layers), None)
        if site is None or site.name not in self._dataset:
            return None
        there = self._labels(site)
        return Place(site.name, there[0]) if len(there) == 1 else None

    def place(self, name: str) -> Place:
        """The site and layer that a hook's name means."""
        store = self._store
        return place_of(name, store.plan.layout, model_layers=store.model_layers, family=store.model_family)

    @property
    def rows(self) -> Int64[np.ndarray, " sample"]:
        """Which samples of the store this dataset has, in its order; a single one too. Costs 8 bytes for each.

        Raises:
            InputError: the dataset does not say so.
        """
        self._refuse_own_rows()
        return rows_here(self._dataset)

    def sel(
        self,
        *,
        document: int | str | slice | Iterable[int | str | np.integer] | None = None,
        token: str | Iterable[str] | None = None,
        split: Sequence[int | float] | None = None,
        where: Filter | None = None,
        **columns: Any,
    ) -> xr.Dataset:
        """The samples for which everything holds that is said, lazily, in their order.

        Args:
            document: numbers or ids of documents, or a `slice` of numbers with both its ends.
            token: text of tokens, with the spaces that belong to them, by the stored tokenizer.
            split: (start, stop) of 0 to 1, as in `actstore.Filter`.
            where: a filter, instead of what follows.
            columns: what is wanted of columns of samples or documents: a value, several, or for numbers a `slice` with
                both its ends, as in `actstore.Filter`. Values are compared: none counts from the end.

        Documents are found by the range that each block's were stored with: the column `document` is read, once, in the
        blocks that can hold them. Other columns are read in the blocks where samples are left. Of an unfinished store
        the samples that are here are chosen from.

        Raises:
            UnknownNameError: no such column, document or token.
            InputError: something is wanted of a column that it cannot be.
            UnfinishedStoreError: a norm is compared with the median of rows that are not there yet.
        """
        there, store, places = self._there(), self._store, None
        check_filter(where)
        check_columns(columns, store.columns, store.root.url)
        if document is not None:
            places = self._of_documents(store.numbers(listed(document)), there)
        if token is not None:
            if "token_id" in columns:
                raise InputError(f"token={token!r} and token_id= were given; give one of them")
            texts = listed(token)
            check_tokens(texts, token)
            columns["token_id"] = [each for text in texts for each in token_ids(store.root, store.plan, text)]
        if columns or split is not None:
            if where is not None:
                raise InputError(f"where= and {', '.join(columns) or 'split'} were given; say all of it in the filter")
            where = Filter(split=split or (0, 1), keep=columns)
        if where is None and places is None:
            return self._dataset
        count = needs_samples(self._dataset)
        if where is not None:
            places = self._kept(where, there, range(count) if places is None else places)
        return self._dataset.isel(sample=places)

    def sample(self, count: int, *, seed: int = 0) -> xr.Dataset:
        """Some samples of this dataset, drawn at random without replacement, ascending. The same for the same seed.

        Raises:
            InputError: the dataset has fewer, or the seed is no whole number from 0 on.
        """
        there, count, seed = needs_samples(self._dataset), whole_number(count, "count"), whole_number(seed, "seed")
        if seed < 0:
            raise InputError(f"seed is {seed}; expected a whole number from 0 on")
        if not 0 <= count <= there:
            raise InputError(f"{count:,} samples were asked for; this dataset has {there:,}")
        drawn = Permutation(there, (seed, 4))(np.arange(count)) if count else np.arange(0)
        return self._dataset.isel(sample=np.sort(drawn))

    def top(
        self, score: Score | xr.DataArray | Shaped[np.ndarray, " sample"], count: int = 10, *, hook: str | None = None
    ) -> xr.Dataset:
        """The samples with the highest scores, best first, with their scores as the coordinate `top_score`.

        Args:
            score: one number per sample, by their places, or by their rows in an array of xarray that has the
                coordinate `row`; or a function of rows [row, hidden] in float32 that gives one for each, such
                as the activation of a feature. NaN is never among the best.
            count: how many, at most.
            hook: whose rows the function takes.

        A function is given 64 MiB of rows at a time; memory does not grow with the store.

        Raises:
            InputError: the scores are not one per sample, are of other rows, or a function comes without `hook`.
        """
        count = whole_number(count, "count")
        if count < 0:
            raise InputError(f"{count} samples were asked for; expected 0 or more")
        best = list[tuple[float, int]]()
        for first, values in self._scores(score, hook):
            scores = np.asarray(values, np.float64)
            places = np.argsort(-scores, kind="stable")[:count]
            places = places[~np.isnan(scores[places])]
            found = zip(scores[places].tolist(), (-(first + places)).tolist(), strict=True)
            best = heapq.nlargest(count, [*best, *found])
        places = np.array([-place for _, place in best], np.int64)
        scores = np.array([value for value, _ in best], np.float64)
        return self._dataset.isel(sample=places).assign_coords({SCORE: ("sample", scores)})

    def text(self, rows: Rows | None = None, *, window: int = 16) -> TokenRows[TokenInContext]:
        """The tokens of some rows of the store by their numbers, or of all that are here, with the text around each.

        A mask has a truth value for each sample that is here, as in `isel`.

        It shows itself with the tokens marked, in notebooks and on terminals, with the rows' numbers, and their scores
        where `top` gave them; else it is a sequence.

        Raises:
            UnknownNameError: the store was made without documents.
            InputError: a row does not exist, or a mask is not as long as this dataset.
        """
        wanted = self.rows if rows is None else self._wanted(rows)
        labels = {ROW: wanted.tolist()}
        if rows is None and SCORE in self._dataset.coords:
            labels[SCORE] = [round(score, 4) for score in self._dataset.coords[SCORE].values.tolist()]
        found = in_context(self._store.root, self._store.plan, self._store.documents, wanted, window=window)
        return TokenRows(found, labels=labels)

    @property
    def documents(self) -> StoredDocuments:
        """The documents of the store: texts, ids, columns and tokens."""
        return self._store.documents

    def to_numpy(self, site: str | None = None) -> "export.Rows | dict[str, export.Rows]":
        """What is selected, in memory: see `actstore.export.to_numpy`."""
        return export.to_numpy(self._dataset, site)

    def to_torch(self, site: str | None = None) -> "torch.Tensor | dict[str, torch.Tensor]":
        """What is selected, as tensors: see `actstore.export.to_torch`."""
        return export.to_torch(self._dataset, site)

    def to_anndata(self, site: str | None = None) -> "anndata.AnnData":
        """What is selected of one site and layer, as an AnnData: see `actstore.export.to_anndata`."""
        return export.to_anndata(self._dataset, site)

    def write_safetensors(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """What is selected, as a file: see `actstore.export.write_safetensors`."""
        export.write_safetensors(self._dataset, path, overwrite=overwrite)

    def write_parquet(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """What is selected, as a file: see `actstore.export.write_parquet`."""
        export.write_parquet(self._dataset, path, overwrite=overwrite)

    def sae_lens_metadata(self, hook: str) -> dict[str, Any]:
        """SAELens' metadata of an SAE that is trained on one place: see `actstore.export.sae_lens_metadata`."""
        place = self.place(hook)
        return export.sae_lens_metadata(self._store.plan, place.site, place.layer)

    def _there(self) -> Samples:
        """Which samples are here: a range, which costs nothing, where all of the store's are."""
        self._refuse_own_rows()
        return samples_here(self._dataset)

    def _refuse_own_rows(self) -> None:
        if ROW in {column.name for column in self._store.plan.layout.columns}:
            raise InputError(
                f"{self._store.root.url} has a column {ROW!r} of its own, so that rows are not numbered here"
            )

    def _wanted(self, rows: Any) -> Shaped[np.ndarray, " row"]:
        """Numbers of rows, or those of a mask."""
        if isinstance(rows, slice):
            raise InputError(
                f"rows is {rows}; expected numbers of rows; for a part of the dataset take "
                "dataset.isel(sample=slice(...)).acts.text()"
            )
        found = np.atleast_1d(in_order_of(self._dataset, rows, "a mask") if _is_mask(rows) else np.asarray(rows))
        if found.dtype != np.bool:
            return found
        here = self.rows
        if found.shape != here.shape:
            raise InputError(
                f"found a mask of shape {found.shape}; expected one value for each of {len(here):,} samples"
            )
        return here[found]

    def _of_documents(self, wanted: list[int], there: Samples) -> Int64[np.ndarray, " place"]:
        """Places of the samples of some documents."""
        if self._store.complete:
            found = self._store.runs.samples(wanted)
            return found if isinstance(there, range) else np.flatnonzero(np.isin(there, found))
        if "document" not in self._dataset.coords:  # its runs cannot be read
            raise InputError(
                f"{self._store.root.url} is unfinished, and the dataset lacks the coordinate 'document' to select by"
            )
        return np.flatnonzero(np.isin(self._dataset.coords["document"].to_numpy(), wanted))

    def _kept(
        self, where: Filter, there: Samples, places: range | Int64[np.ndarray, " place"]
    ) -> Int64[np.ndarray, " kept"]:
        """Which of the rows at some places a filter keeps. A norm is asked of all sites and layers that are here."""
        store = self._store
        if where.max_norm is not None and not store.complete:
            raise UnfinishedStoreError(
                f"{store.root.url} is unfinished: max_norm compares with the median of all its rows; finish it, or "
                "select by the norms that are here, such as dataset.resid_post_norm"
            )
        here = [site for site in store.plan.layout.sites if site.name in self._dataset]
        layers = [
            (site, site.layer_index(layer))
            for site in here
            for layer in ([None] if site.layers is None else self._labels(site))
        ]
        decides, found = Kept(store.root, store.plan, where, layers, check=True), [np.arange(0)]
        for first in range(0, len(places), ROWS_AT_ONCE):
            part = np.asarray(places[first : first + ROWS_AT_ONCE], np.int64)
            rows = part if isinstance(there, range) else there[part]
            found.append(part[decides.mask_unordered(rows)])
        return np.concatenate(found)

    def _scores(self, score: Any, hook: str | None) -> Iterator[tuple[int, Shaped[np.ndarray, " row"]]]:
        """Scores of neighbouring samples, and the first one's place."""
        there = needs_samples(self._dataset)
        if not callable(score):
            values = in_order_of(self._dataset, score, "scores")
            if values.shape != (there,):
                raise InputError(f"found scores of shape {values.shape}; expected one for each of {there:,} samples")
            yield 0, values
            return
        if hook is None:
            raise InputError("a function of rows needs to know which: give hook=, such as 'resid_post[12]'")
        rows = self[hook]
        step = max(SCORED_BYTES // (4 * rows.shape[-1]), 1)
        for first in range(0, there, step):
            part = to_float32(rows.isel(sample=slice(first, first + step)).to_numpy())
            values = np.asarray(score(part))
            if values.shape != (len(part),):
                raise InputError(
                    f"the function gave scores of shape {values.shape}; expected one for each of {len(part):,} rows"
                )
            yield first, values

    def _labels(self, site: Site) -> list[int]:
        """Labels of the layers of a site that are here: along its axis, or the one it was cut to."""
        labels = self._dataset[site.name].coords[self._store.plan.layout.layer_dimension(site)]
        return np.atleast_1d(labels.to_numpy()).tolist()

    @property
    def _store(self) -> Opened:
        return store_of(self._dataset)


@xr.register_dataarray_accessor("acts")  # type: ignore[no-untyped-call]
class ArrayActs:
    """What an array of a store's dataset knows by its coordinate `row`, as `array.acts`."""

    def __init__(self, array: xr.DataArray) -> None:
        """Made by xarray. Reads nothing."""
        self._acts = Acts(array.coords.to_dataset())

    @property
    def rows(self) -> Int64[np.ndarray, " sample"]:
        """Which samples of the store it has: see `Acts.rows`."""
        return self._acts.rows

    @property
    def documents(self) -> StoredDocuments:
        """The documents of the store."""
        return self._acts.documents

    def text(self, rows: Rows | None = None, *, window: int = 16) -> TokenRows[TokenInContext]:
        """The tokens of its rows, or of some of the store, with the text around each: see `Acts.text`."""
        return self._acts.text(rows, window=window)


def _is_mask(rows: Any) -> bool:
    return isinstance(rows, xr.DataArray) and rows.dtype == np.bool
