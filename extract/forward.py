"""The forward pass of an extraction: token ids in, kept rows of the chosen sites out, as one jitted pure function."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from extract.models import Model, ModelError, Params, Tap, check_taps, site_widths
from extract.models.kernels import kernel_of
from extract.models.placement import DATA

DTYPES = ("bfloat16", "float16", "float32")

HostOrDevice = Array | np.ndarray

Rows = dict[str, Float[Array, "layer row width"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass over packed contexts. Call it, or give it to `jax.eval_shape` to learn the shapes first.

    Attributes:
        layers: For each site, the layers along the first axis of its rows, ascending; `(None,)` for `embed` and
            `final_norm`, whose first axis has size 1.
        widths: Width of a row at each of these sites.
        dtype: Of the rows returned.
        data: Size of the mesh's axis `data`, which divides the batch; 1 on one device.
    """

    layers: Mapping[str, tuple[int | None, ...]]
    widths: Mapping[str, int]
    dtype: str
    data: int
    _function: Callable[..., Rows] = dataclasses.field(repr=False)

    def __call__(
        self,
        params: Params,
        token_ids: Int[HostOrDevice, "batch context"],
        segment_ids: Int[HostOrDevice, "batch context"],
        positions: Int[HostOrDevice, "batch context"],
        kept: Int[HostOrDevice, " row"],
    ) -> Rows:
        """Returns the kept rows of every site, `[layer, row, width]`; only they leave the device.

        Layers after the last requested one are not computed, nor is the output head. The same arguments give the same
        bits in every process on the same kind of machine. Each new combination of shapes compiles once.

        On a mesh, the batch is dealt out along `data`, and every device gets all rows: they cross to one host. Rows of
        another mesh differ in their last bits, by about 1e-6 of their norm in float32.

        Args:
            params: `model.params`, or others that lie where these do.
            token_ids: Below the vocabulary size; a larger one makes its batch row NaN.
            segment_ids: 1 and up for the documents packed into a row, each a run of neighbouring tokens; 0 for padding.
            positions: Of each token in its document, from 0.
            kept: Flat indices into `batch * context` of the rows to return, in the order wanted. May repeat, which is
                how a short last batch keeps its shape. Must lie inside: others are clipped.

        Raises:
            ModelError: The batch is not divided by the mesh's axis `data`.
        """
        if len(token_ids) % self.data:
            raise ModelError(
                f"found a batch of {len(token_ids)}; expected a multiple of {self.data}, the mesh's axis data; "
                "pad the batch with rows of segment id 0"
            )
        return self._function(params, token_ids, segment_ids, positions, kept)


def make_forward(model: Model, taps: Iterable[Tap], *, dtype: str) -> Forward:
    """Prepares the forward pass that captures `taps`. Nothing is compiled or computed yet.

    Args:
        model: Its structure and its mesh are used, not its parameters: pass these to the call.
        taps: What to capture; order and repetition do not matter.
        dtype: Of the rows returned: "bfloat16", "float16" or "float32". The cast is on the device. A value over 65,504
            becomes infinite in float16: whoever stores it has to refuse.

    Raises:
        ModelError: A tap does not exist, there is none, or the dtype is unknown.
    """
    wanted = frozenset(Tap(*tap) for tap in taps)
    check_taps(model.config, wanted)
    if not wanted:
        raise ModelError("found no taps; expected at least one; pass for example [Tap('final_norm', None)]")
    if dtype not in DTYPES:
        raise ModelError(f"found dtype {dtype!r}; expected one of {', '.join(DTYPES)}; pass dtype='bfloat16'")
    graph, layers, kernel = (
        model.graph,
        _layers_by_site(wanted),
        kernel_of(model.attention, model.mesh, platform=model.platform),
    )

    def forward(
        params: Params,
        token_ids: Int[Array, "batch context"],
        segment_ids: Int[Array, "batch context"],
        positions: Int[Array, "batch context"],
        kept: Int[Array, " row"],
    ) -> Rows:
        decoder = nnx.merge(graph, params)
        found = decoder.activations(token_ids, segment_ids, positions, wanted, kernel=kernel)
        rows = {tap: _rows(value, kept).astype(dtype) for tap, value in found.items()}
        return {site: jnp.stack([rows[Tap(site, layer)] for layer in layers[site]]) for site in layers}

    widths = {site: width for site, width in site_widths(model.config).items() if site in layers}
    data = 1 if model.mesh is None else model.mesh.shape[DATA]
    return Forward(layers=layers, widths=widths, dtype=dtype, data=data, _function=_jitted(forward, model.mesh))


def _jitted(forward: Callable[..., Rows], mesh: Mesh | None) -> Callable[..., Rows]:
    """Says where the inputs and the rows lie; XLA finds all between from these and from where the parameters lie."""
    if mesh is None:
        return jax.jit(forward)
    dealt, repeated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((DATA,), ()))  # type: ignore[no-untyped-call]
    return jax.jit(forward, in_shardings=(None, dealt, dealt, dealt, repeated), out_shardings=repeated)


def _layers_by_site(taps: Iterable[Tap]) -> dict[str, tuple[int | None, ...]]:
    layers: dict[str, list[int | None]] = defaultdict(list)
    for site, layer in sorted(taps):
        layers[site].append(layer)
    return {site: tuple(chosen) for site, chosen in layers.items()}


def _rows(values: Float[Array, "batch context width"], kept: Int[Array, " row"]) -> Float[Array, "row width"]:
    return jnp.take(values.reshape(-1, values.shape[-1]), kept, axis=0, mode="clip")
