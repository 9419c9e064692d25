"""An open store: what `actstore.open` returns. Each method is a few lines over the module that does the work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import xarray as xr
from jaxtyping import Int

from actstore import (
    accessor,  # noqa: F401  datasets have `.acts` then
    card,
)
from actstore.batches import Array, Batches, Order
from actstore.documents import StoredDocuments
from actstore.errors import InputError, UnknownNameError
from actstore.filters import Filter
from actstore.kept import Kept, norm_statistics
from actstore.kvstore import Root
from actstore.layout import Site
from actstore.ledger import read_status
from actstore.lookup import TokenInContext, column, in_context
from actstore.marked import TokenRows
from actstore.markers import committed_blocks
from actstore.norms import NormStatistics
from actstore.reader import check_complete, open_dataset
from actstore.scaling import Normalization
from actstore.schema import Plan
from actstore.verify import Depth, Report, verify
from actstore.windows import Selection


class Store:
    """An open activation store. Made by `actstore.open`; holds no file open and reads nothing until asked."""

    def __repr__(self) -> str:
        """Where it is and what it holds, without reading."""
        layers = {site.name: f" {list(site.layers)}" if site.layers else "" for site in self.sites}
        sites = ", ".join(f"{site.name}{layers[site.name]} x {site.width}" for site in self.sites)
        return f"<actstore.Store {self.url}: {self.samples:,} samples, {sites}>"

    def _repr_html_(self) -> str:
        """What notebooks show: the card."""
        return card.html(self._root, self.plan)

    def __init__(self, root: Root, plan: Plan, *, complete: bool = False) -> None:
        """`complete`: it was just seen to be; otherwise that is looked up each time."""
        self._root, self._complete = root, complete
        self.plan = plan

    @property
    def url(self) -> str:
        """Where the store is."""
        return self._root.url

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites with their layers, widths and dtypes."""
        return self.plan.layout.sites

    @property
    def samples(self) -> int:
        """Number of samples (rows per site and layer)."""
        return self.plan.layout.samples

    @property
    def complete(self) -> bool:
        """Whether the store is sealed. Costs one read."""
        return read_status(self._root, self.plan) == "complete"

    @property
    def committed(self) -> int:
        """Number of committed blocks. Costs one listing."""
        return len(committed_blocks(self._root, self.plan))

    def card(self) -> None:
        """Prints what the store is and how much of it is there, as `actstore info` does. A notebook shows it by itself.

        Costs a few small reads and the norms of a few blocks: 10 to 60 ms, however large the store. Of an unfinished
        store one listing more.

        Raises:
            CorruptStoreError: the root group is damaged, or is that of another plan.
        """
        print(card.text(self._root, self.plan))  # noqa: T201  it is asked to

    @property
    def documents(self) -> StoredDocuments:
        """The documents the rows come from.

        Raises:
            UnknownNameError: the store was made without documents.
        """
        if not any(self.plan.tables):
            raise UnknownNameError(f"{self.url} holds no documents; it was created without them")
        return StoredDocuments(self._root, self.plan)

    def dataset(self, *, raw: bool = False, partial: bool = False, check: bool = True) -> xr.Dataset:
        """The store as a lazy `xarray.Dataset`; the same as `xr.open_dataset(url)`.

        Args:
            raw: True gives bfloat16 as stored; False gives float32, in which reductions are right.
            partial: True also opens an unfinished store, with its committed samples only.
            check: False reads without comparing chunks with their commit markers: for stores that were just verified.
        """
        complete = True if self._complete else None
        return open_dataset(self._root, self.plan, raw=raw, partial=partial, check=check, complete=complete)

    @overload
    def batches(
        self,
        *,
        batch_size: int,
        site: str = ...,
        layer: int | None = ...,
        sites: None = ...,
        layers: None = ...,
        seed: int = ...,
        epochs: int | None = ...,
        drop_remainder: bool = ...,
        order: Order = ...,
        window_bytes: int | None = ...,
        part: tuple[int, int] = ...,
        where: Filter | None = ...,
        normalize: Normalization | None = ...,
        check: bool = ...,
    ) -> Batches[Array]: ...

    @overload
    def batches(
        self,
        *,
        batch_size: int,
        site: str = ...,
        layer: None = ...,
        sites: Sequence[str] | None = ...,
        layers: Sequence[int] | Mapping[str, Sequence[int] | None] | None = ...,
        seed: int = ...,
        epochs: int | None = ...,
        drop_remainder: bool = ...,
        order: Order = ...,
        window_bytes: int | None = ...,
        part: tuple[int, int] = ...,
        where: Filter | None = ...,
        normalize: Normalization | None = ...,
        check: bool = ...,
    ) -> Batches[dict[str, Array]]: ...

    def batches(
        self,
        *,
        batch_size: int,
        site: str = "resid_post",
        layer: int | None = None,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | Mapping[str, Sequence[int] | None] | None = None,
        seed: int = 0,
        epochs: int | None = None,
        drop_remainder: bool = True,
        order: Order = "block",
        window_bytes: int | None = None,
        part: tuple[int, int] = (0, 1),
        where: Filter | None = None,
        normalize: Normalization | None = None,
        check: bool = True,
    ) -> Batches[Any]:
        """Shuffled minibatches [batch, width] of one site and layer, in the stored dtype; or of several.

        With `sites` or `layers` a minibatch is a dictionary by site: [batch, layer, width], or [batch, width] for a
        site without layers, all of the same samples.

        Args:
            batch_size: rows of one minibatch.
            site: which site.
            layer: label of the layer; may be left out where the site has only one.
            sites: several sites, aligned by sample; `site` and `layer` are then not used.
            layers: several layers of `site`, or of each of `sites`; None takes all. Or the layers of each site by its
                name, without `sites`; None for all, and for a site without layers.
            seed: the same seed gives the same batches, on any machine.
            epochs: number of passes over the store; None never ends.
            drop_remainder: False gives a last, smaller minibatch in each epoch.
            order: `block` reads whole chunks and shuffles among the many chunks of a window. `exact` shuffles all
                samples and reads them one by one: for local, uncompressed stores that fit into the page cache; others
                read a chunk for each row.
            window_bytes: of rows that are held at once: one half is handed out, the other is read meanwhile. Block
                order shuffles inside a half: one as large as what is read of the store gives a perfect shuffle. None is
                2 GiB in block order, 512 MiB in exact order. Rows of local, uncompressed stores stay in the system's
                page cache, those of others are in this process's memory.
            part: (number, parts) of processes that share the minibatches: each gets its slice of every one. The
                minibatches are the same whatever the number of parts.
            where: which samples to give; None gives all. An epoch is then shorter. Chunks that hold none of them are
                not read.
            normalize: None gives rows as they are stored. Otherwise they are float32, normalised as the name says:
                `expected_average_only_in` (SAELens: by one number, so that the mean norm is sqrt(width)),
                `norm_factor` (dictionary_learning: by one number, so that the mean squared norm is 1),
                `constant_norm_rescale` (SAELens: each row to the norm sqrt(width)), `layer_norm` (SAELens: each row
                less its mean, by its standard deviation). The numbers are in `Batches.scales`.
            check: False reads without comparing chunks with their commit markers: for stores that were just verified.
                Exact order on local stores compares one chunk of each shard, which finds a wrong shard and not a
                flipped bit.

        Raises:
            UnfinishedStoreError: the store is not complete.
            UnknownNameError: no such site or layer.
            InputError: settings that cannot give a batch.
        """
        check_complete(self._root, self.plan)
        several = sites is not None or layers is not None
        return Batches(
            self._root, self.plan, self._selections(site, layer, sites, layers), stacked=several,
            batch_size=batch_size, seed=seed, epochs=epochs, drop_remainder=drop_remainder, order=order,
            window_bytes=window_bytes, part=part, where=where, normalize=normalize, check=check,
        )  # fmt: skip

    def _selections(
        self,
        name: str,
        layer: int | None,
        names: Sequence[str] | None,
        layers: Sequence[int] | Mapping[str, Sequence[int] | None] | None,
    ) -> list[Selection]:
        """What a loader reads of each site.

        Raises:
            UnknownNameError: no such site or layer.
            InputError: nothing is selected, or the same twice.
        """
        if names is None and layers is None:
            site = self.plan.layout.site(name)
            return [Selection(site, (site.layer_index(layer),))]
        if layer is not None:
            raise InputError(f"layer={layer} and several sites or layers were given; give layers=[{layer}] alone")
        if isinstance(layers, Mapping):
            if names is not None:
                raise InputError(f"sites {list(names)} and layers by site were given; give the layers by site alone")
            wanted = list(layers.items())
            for each, labels in wanted:
                if labels is not None and self.plan.layout.site(each).layers is None:
                    raise UnknownNameError(f"site {each!r} has no layers, asked for {labels}; give None")
        else:
            if isinstance(names, str):
                raise InputError(f"sites is {names!r}; expected several, such as [{names!r}]")
            wanted = [(name, layers) for name in ([name] if names is None else names)]
        found = [_selection(self.plan.layout.site(name), labels) for name, labels in wanted]
        twice = len({each.site.name for each in found}) != len(found)
        twice |= any(len(set(each.layers)) != len(each.layers) for each in found)
        if not found or twice or not all(each.layers for each in found):
            raise InputError(f"{wanted} was asked for, as (site, layers); name at least one of each, each once")
        return found

    def column(self, name: str, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """Values of a coordinate such as `document`, `position` or `token_id` for some samples.

        Raises:
            UnknownNameError: no such column.
            InputError: a row does not exist.
        """
        return column(self._root, self.plan, name, rows)

    def stats(
        self, *, site: str = "resid_post", layer: int | None = None, where: Filter | None = None, check: bool = True
    ) -> NormStatistics:
        """Statistics of the norms of one site and layer, exact: mean, root mean square, median, largest.

        Reads 4 bytes per sample, twice; no activation. Memory does not grow with the store.

        Args:
            site: which site.
            layer: label of the layer; may be left out where the site has only one.
            where: only of samples that this filter keeps.
            check: False reads without comparing norms with their commit markers.

        Raises:
            UnfinishedStoreError: the store is not complete.
            UnknownNameError: no such site, layer or column.
            InputError: the filter keeps nothing.
            CorruptStoreError: norms are missing or damaged.
        """
        check_complete(self._root, self.plan)
        found = self.plan.layout.site(site)
        index = found.layer_index(layer)
        kept = Kept(self._root, self.plan, where, [(found, index)], check=check) if where is not None else None
        return norm_statistics(self._root, self.plan, found, index, kept=kept, check=check)

    def verify(self, *, depth: Depth = "full", progress: Callable[[int, int], None] | None = None) -> Report:
        """Compares everything that is stored with the plan and the markers. Reads only.

        Args:
            depth: `fast` (is every shard there, one small read each), `sample` (and one in twenty is decoded) or `full`
                (all bytes are read, with two shards in memory).
            progress: called with (shards done, shards in all).

        Returns:
            What was compared; the store is sound at this depth if its `findings` are empty.
        """
        return verify(self._root, self.plan, depth=depth, progress=progress)

    def text(self, rows: Sequence[int] | Int[np.ndarray, " n"], *, window: int = 16) -> TokenRows[TokenInContext]:
        """Each row's token with up to `window` tokens before and after it, from the stored texts: no tokenizer needed.

        A token that is not part of its document's text (an end-of-text token, say) is shown as empty text at its place.

        Raises:
            UnknownNameError: the store was made without documents.
            InputError: a row does not exist, or its document or position does not.
        """
        return TokenRows(in_context(self._root, self.plan, self.documents, rows, window=window))


def _selection(site: Site, labels: Sequence[int] | None) -> Selection:
    """Some layers of a site, or all."""
    if isinstance(labels, int | str):
        raise InputError(f"layers is {labels!r}; expected several, such as [{labels}]")
    if site.layers is None:
        return Selection(site, (0,))
    return Selection(site, tuple(map(site.layer_index, site.layers if labels is None else labels)))
