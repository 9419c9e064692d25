"""Minibatches as global JAX arrays over a mesh, on one process or several."""

import jax
import numpy as np
from jaxtyping import Shaped


def as_global_array(
    rows: Shaped[np.ndarray, "rows width"], sharding: jax.sharding.Sharding, *, batch_size: int | None = None
) -> Shaped[jax.Array, "batch width"]:
    """One array [batch, width] over all devices of `sharding`; every process calls it for the same minibatch.

    Over several processes, give the loader of each `part=(number, processes)`. The order is a function of the seed
    alone, so they agree without talking, and one state fits all of them.

    Args:
        rows: the part of the minibatch that this process holds, in order, or the whole of it.
        sharding: how the array lies on devices, such as `NamedSharding(mesh, PartitionSpec("batch"))`.
        batch_size: rows of the whole minibatch; None: `rows` are all of it.
    """
    shape = (batch_size or len(rows), rows.shape[1])
    return jax.make_array_from_process_local_data(sharding, rows, shape)  # type: ignore[no-untyped-call]
