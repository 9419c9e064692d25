"""dictionary_learning's `trainSAE` on a store: exactly as many minibatches as steps, and its norm factor given."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from dictionary_learning.training import trainSAE

from actstore.adapters.torch import as_tensor
from actstore.batches import Batches
from actstore.errors import InputError


def train(
    batches: Batches[Any],
    *,
    trainer_configs: list[dict[str, Any]],
    steps: int,
    norm_factor: float | None = None,
    **arguments: Any,
) -> None:
    """Calls `trainSAE`, so that the loader has given `steps` minibatches when it returns.

    `trainSAE` by itself draws one more, and with `normalize_activations=True` another 101 to estimate the factor.

    Args:
        batches: what to train on.
        trainer_configs: as for `trainSAE`.
        steps: as for `trainSAE`.
        norm_factor: what each row is divided by while training; the saved weights fit rows that are not divided.
            `store.stats(...).root_mean_square` is what `trainSAE` estimates. None: no division.
        arguments: those of `trainSAE`, but `data` and `normalize_activations`.

    Raises:
        InputError: `norm_factor` is not positive.
    """
    if norm_factor is not None and not norm_factor > 0:
        raise InputError(f"norm_factor is {norm_factor}; expected a positive number, or None for no division")
    data = _Data(map(as_tensor, itertools.islice(batches, steps)), norm_factor)
    trainSAE(data, trainer_configs, steps, normalize_activations=norm_factor is not None, **arguments)


class _Data:
    """What `trainSAE` iterates: with a norm factor twice, first to estimate it.

    That first pass gives one row of the wanted norm, of which the estimate is the factor itself. There is no argument
    for it, and its own arithmetic then scales the saved weights.
    """

    def __init__(self, tensors: Iterator[torch.Tensor], norm_factor: float | None) -> None:
        self._tensors, self._norm_factor = tensors, norm_factor

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._norm_factor is None:
            return self._tensors
        row, self._norm_factor = torch.tensor([[self._norm_factor]]), None
        return iter([row])
