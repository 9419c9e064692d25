"""What llamascopium's `Trainer.fit` takes: an iterable of the rows of each hook, with token ids and a mask."""

from collections.abc import Iterator

import numpy as np
import torch

from actstore.adapters.hooks import Hooks
from actstore.adapters.torch import as_tensor, as_tensors


class Stream:
    """{hook: [batch, width], "tokens": [batch], "mask": [batch]} of every minibatch.

    Each `iter` begins where the hooks stood when the stream was made: `fit` takes a first minibatch only to see its
    size, and then begins again. The ids of all tokens are held in memory, 4 bytes a sample.
    """

    def __init__(self, hooks: Hooks, *, column: str = "token_id", device: torch.device | str | None = None) -> None:
        """Reads the token ids.

        Args:
            hooks: what to train on.
            column: of the token ids.
            device: where the trainer wants its tensors.

        Raises:
            UnknownNameError: the store has no such column.
        """
        self._hooks, self._start, self._device = hooks, hooks.state(), device
        self._tokens = hooks.store.column(column, np.arange(hooks.store.samples))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._hooks.restore(self._start)
        while (batch := self._hooks.next_or_none()) is not None:
            tokens = as_tensor(self._tokens[batch.samples].astype(np.int64), device=self._device)
            mask = torch.ones_like(tokens, dtype=torch.bool)  # every stored row counts
            yield {**as_tensors(batch.rows, device=self._device), "tokens": tokens, "mask": mask}
