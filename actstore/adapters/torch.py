"""Minibatches as torch tensors, and as a dataset for torch's own loaders.

A trainer that takes an iterator needs no more than `map(as_tensor, store.batches(...))`.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Shaped
from torch.utils.data import IterableDataset, get_worker_info

import actstore
from actstore.batches import Batches
from actstore.errors import InputError

State: TypeAlias = dict[str, Any]


def as_tensor(
    rows: Shaped[np.ndarray, "..."],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Shaped[torch.Tensor, "..."]:
    """`rows` as a tensor. Without `device` and `dtype` it is the same memory, for bfloat16 too.

    Args:
        rows: a writable array.
        device: where to; None leaves it.
        dtype: into which type; None keeps the stored one.
    """
    if rows.dtype.name == "bfloat16":  # torch knows NumPy's own types only
        tensor = torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(rows)
    return tensor if device is None and dtype is None else tensor.to(device=device, dtype=dtype)


def as_tensors(
    rows: Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Shaped[torch.Tensor, "..."]]:
    """The rows of several hooks as tensors: for trainers that take {hook name: tensor}."""
    return {name: as_tensor(values, device=device, dtype=dtype) for name, values in rows.items()}


class BatchDataset(IterableDataset[Any]):
    """A store's minibatches for `torch.utils.data.DataLoader` and torchdata's `StatefulDataLoader`.

    Give the loader `batch_size=None`: an element is a whole minibatch [batch, width] in the stored dtype, or a
    dictionary by site where `sites` or `layers` are given. With any number of workers the loader gives the very
    sequence that one process gives. Each worker reads the whole store and passes over the minibatches of the others,
    so workers pay only where preparing a minibatch is dear.

    The store is opened where it is read. TensorStore's threads do not survive a fork: in a process that has used a
    store, give the loader `multiprocessing_context="spawn"`.
    """

    def __init__(self, url: str | os.PathLike[str], *, states: bool = False, **settings: Any) -> None:
        """Remembers what to open; a wrong setting is refused at the first minibatch.

        Args:
            url: of a finished store.
            states: True gives pairs of a minibatch and the state after it. Load that state to continue there, with any
                number of workers: torch's own loader reads ahead, so that `state_dict` would be too far.
            settings: those of `Store.batches`.
        """
        super().__init__()
        self._url, self._states, self._settings = os.fspath(url), states, settings
        self._start: State | None = None
        self._share: _Share | None = None

    def __iter__(self) -> Iterator[Any]:
        """Begins anew, or once where `load_state_dict` said."""
        worker = get_worker_info()
        place = (worker.id, worker.num_workers) if worker else (0, 0)
        self.close()
        self._share = _Share(actstore.open(self._url).batches(**self._settings), *place, states=self._states)
        if self._start is not None:
            self._share.load_state_dict(self._start)
            self._start = None
        return self._share

    def state_dict(self) -> State:
        """Where the iterator stands. In a worker, where this worker stands."""
        if self._share is not None:
            return self._share.state_dict()
        return self._start or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iteration continue at `state`; an empty one begins anew."""
        self.close()
        self._start = dict(state) or None

    def close(self) -> None:
        """Stops reading ahead in this process."""
        if self._share is not None:
            self._share.close()
            self._share = None

    def __getstate__(self) -> State:
        """What a worker needs. An iteration under way in this process stays here."""
        return self.__dict__ | {"_share": None}


class _Share(Iterator[Any]):
    """The minibatches of one worker: every `workers`-th, from the number `worker`. All of them where there are none."""

    def __init__(self, batches: Batches[Any], worker: int, workers: int, *, states: bool) -> None:
        self._batches, self._worker, self._workers, self._states = batches, worker, workers, states
        self._skip = worker  # minibatches of others before the next one of its own

    def __next__(self) -> Any:
        self._batches.skip(self._skip)
        self._skip = 0  # and stays so if reading fails: the next call tries the same minibatch again
        found = next(self._batches)
        rows = as_tensors(found) if isinstance(found, dict) else as_tensor(found)
        self._skip = max(self._workers - 1, 0)
        return (rows, {"loader": self._batches.state()}) if self._states else rows

    def state_dict(self) -> State:
        """The loader's state alone where there are no workers, so that it can be loaded anywhere."""
        state = {"loader": self._batches.state()}
        return state | {"skip": self._skip, "workers": self._workers} if self._workers else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state.get("loader"), Mapping) or set(state) - {"loader", "skip", "workers"}:
            raise InputError(f"not a state of a BatchDataset: {str(dict(state))[:80]}; expected what state_dict() gave")
        workers = state.get("workers", self._workers)
        if workers != self._workers:
            raise InputError(
                f"the state is of one of {workers} workers, there are {self._workers}; use as many, or `states=True`, "
                "whose states fit any number"
            )
        self._batches.restore(state["loader"])
        self._skip = state.get("skip", self._worker)

    def close(self) -> None:
        self._batches.close()
