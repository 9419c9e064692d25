"""Minibatches as a grain dataset, so that grain's prefetching, device transfer and checkpoints work with them."""

import os
from typing import Any

import grain

import actstore
from actstore.batches import Batches
from actstore.errors import InputError


class BatchDataset(grain.IterDataset[Any]):  # type: ignore[misc]  # grain has no types
    """A grain dataset whose elements are whole minibatches: NumPy arrays, or dictionaries of them by site.

    The loader reads ahead in a thread of its own, so `mp_prefetch` is of no use, and is refused.
    `grain.experimental.device_put(dataset, device)` copies to devices ahead of use.

    Example:
        >>> dataset = BatchDataset("run.acts.zarr", layer=3, batch_size=4096)      # doctest: +SKIP
        >>> batches = iter(grain.experimental.device_put(dataset, jax.devices()[0]))  # doctest: +SKIP
    """

    def __init__(self, url: str | os.PathLike[str], **settings: Any) -> None:
        """Remembers what to open; a wrong setting is refused when iteration begins.

        Args:
            url: of a finished store.
            settings: those of `Store.batches`.
        """
        super().__init__()
        self._url, self._settings = os.fspath(url), settings

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._url, self._settings)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:  # noqa: FBT001, FBT002  as grain calls it
        """Refuses: each of grain's workers would read the whole store for its share.

        Raises:
            InputError: always.
        """
        del sl, sequential_slice
        raise InputError(
            f"the minibatches of {self._url} are not divided among grain's workers; leave `mp_prefetch` out: the "
            "loader reads ahead in a thread of its own"
        )

    def __str__(self) -> str:
        return f"BatchDataset({self._url!r})"


class BatchIterator(grain.DatasetIterator[Any]):  # type: ignore[misc]
    """Minibatches with grain's `get_state` and `set_state`; the state is the loader's, and JSON."""

    _batches: Batches[Any] | None = None  # grain also closes an iterator that was not made, such as one without a store

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self._batches = actstore.open(url).batches(**settings)

    def __next__(self) -> Any:
        return next(self._open())

    def get_state(self) -> dict[str, Any]:
        """Where the loader stands."""
        return dict(self._open().state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state`.

        Raises:
            InputError: the state is of another loader.
        """
        self._open().restore(state)

    def close(self) -> None:
        """Stops reading ahead. As grain asks, the iterator cannot be used again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        super().close()

    def _open(self) -> Batches[Any]:
        if self._batches is None:
            raise ValueError("this iterator was closed; make a new one with iter(dataset)")
        return self._batches
