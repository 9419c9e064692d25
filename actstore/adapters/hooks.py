"""Several places of a model side by side, by the names of their hooks: for trainers that take a batch of each."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from jaxtyping import Int64, Shaped

from actstore.errors import InputError
from actstore.store import Store

Places: TypeAlias = Mapping[str, tuple[str, int | None]]


class HookBatch(NamedTuple):
    """The same samples at every hook."""

    rows: dict[str, Shaped[np.ndarray, "batch _"]]
    samples: Int64[np.ndarray, " batch"]


class Hooks(Iterator[dict[str, Shaped[np.ndarray, "batch _"]]]):
    """An iterator of {hook name: rows [batch, width]}, the same samples at every hook.

    One loader reads all of them. `close()` it or use `with`.

    Example:
        >>> places = {"blocks.1": ("resid_post", 1), "blocks.3": ("resid_post", 3)}  # doctest: +SKIP
        >>> rows = next(Hooks(store, places, batch_size=4096))["blocks.3"]           # doctest: +SKIP
    """

    def __init__(self, store: Store, places: Places, **settings: Any) -> None:
        """Makes the loader.

        Args:
            store: a finished store.
            places: (site, layer) of each hook, by its name; layer None for a site without layers.
            settings: those of `Store.batches`, but the sites and layers.

        Raises:
            UnknownNameError: no such site or layer.
            InputError: no hook was named, or one without the layer that it needs.
        """
        self.store, self._places = store, dict(places)
        self._layers = _wanted(store, self._places)
        self._batches = store.batches(layers=self._layers, **settings)

    def __next__(self) -> dict[str, Shaped[np.ndarray, "batch _"]]:
        return self.next_batch().rows

    def next_batch(self) -> HookBatch:
        """The next minibatch of every hook, with its sample numbers.

        Raises:
            StopIteration: all epochs were given.
            StoreError: reading failed; calling again retries.
        """
        batch = self._batches.next_batch()
        rows = {}
        for name, (site, layer) in self._places.items():
            found, labels = batch.rows[site], self._layers[site]
            rows[name] = found if labels is None or layer is None else found[:, labels.index(layer)]
        return HookBatch(rows, batch.samples)

    def next_or_none(self) -> HookBatch | None:
        """The next minibatch with its sample numbers, or None after the last epoch."""
        try:
            return self.next_batch()
        except StopIteration:
            return None

    @property
    def scales(self) -> dict[str, float]:
        """What the rows of each hook are multiplied by: see `Batches.scales`."""
        scales = self._batches.scales
        return {name: scales[place] for name, place in self._places.items() if place in scales}

    def state(self) -> dict[str, Any]:
        """Where it stands: JSON of less than 200 bytes."""
        return dict(self._batches.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at `state`.

        Raises:
            InputError: the state is of other sites, layers or settings.
        """
        self._batches.restore(state)

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wanted(store: Store, places: Places) -> dict[str, list[int] | None]:
    """The layers to read of each site, each once; None of a site without layers."""
    if not places:
        raise InputError("no hook was named; expected {hook name: (site, layer)}")
    layers: dict[str, list[int] | None] = {}
    for name, (site, layer) in places.items():
        where = store.plan.layout.site(site)
        if where.layers is None:
            where.layer_index(layer)
            layers[site] = None
        elif layer is None:
            raise InputError(f"hook {name!r} names no layer; site {site!r} holds layers {list(where.layers)}")
        else:
            layers[site] = sorted({*(layers.get(site) or []), layer})
    return layers
