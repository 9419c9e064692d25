"""Kernels that compute attention: the portable one, and those of vendors for their own devices.

Each takes what `attend` takes and gives the same values, apart from rounding. Only the portable one gives the same bits
everywhere, so a plan says which kernel is used.
"""

from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from extract.models.attention import Attend, AttentionRule, Heads, KeyHeads, attend, visible
from extract.models.config import DecoderConfig
from extract.models.errors import ModelError
from extract.models.placement import DATA, MODEL

KERNELS = {"chunked": "any device", "splash": "TPU", "cudnn": "GPU"}
"""What can be chosen, and where it runs."""

GPU_CHUNK_ROWS = 1024
"""Query rows at a time of the portable kernel on a GPU. With 64, as on a CPU, passes of 24 layers over contexts of
1,024 tokens took an H100 90 ms instead of 99, but XLA 155 s to compile instead of 13."""

CUDNN_CAPABILITY, CUDNN_HEAD_DIM = 8.0, 128
"""From which GPUs on, and up to which width of heads, cuDNN's kernel is sure to be there. Hopper's has wider ones."""

SPLASH_BLOCK = 128
"""Tokens of a block of the splash kernel, and what sequences are padded to a multiple of."""


def check_kernel(name: str, *, platform: str, dtype: str, config: DecoderConfig | None = None, model: int = 1) -> None:
    """Refuses a kernel that cannot be used.

    Args:
        name: "chunked", the default; "splash", for TPUs; "cudnn", for NVIDIA GPUs.
        platform: of the devices: "cpu", "gpu" or "tpu".
        dtype: that the model computes in.
        config: of the model; None where it is not known yet.
        model: size of the mesh's axis `model`.

    Raises:
        ModelError: the kernel is unknown, is for other devices, or cannot compute the model, on this mesh or at all.
    """
    if name not in KERNELS:
        raise ModelError(f"found attention {name!r}; expected one of {', '.join(KERNELS)}; the portable one is chunked")
    if name == "chunked":
        return
    if platform != KERNELS[name].lower():
        raise ModelError(
            f"found attention {name!r}, which needs a {KERNELS[name]}, on a machine whose devices are {platform!r}; "
            "expected chunked, which runs on any device; leave the attention out"
        )
    softcap = config is not None and config.attention_softcap is not None
    if name == "cudnn" and (dtype != "bfloat16" or softcap):
        found = "a model that caps its scores" if softcap else f"a model in {dtype}"
        raise ModelError(
            f"found attention 'cudnn' for {found}; expected one in bfloat16 without soft caps, all that it computes; "
            "leave the attention out"
        )
    if config is not None and config.kv_heads % model:
        raise ModelError(
            f"found attention {name!r} for {config.kv_heads} key heads on a mesh whose axis model is {model}; expected "
            "an axis that divides them, since the kernel computes whole heads; use a smaller one, or leave the "
            "attention out"
        )


def default_kernel(
    *, platform: str, capability: float | None, dtype: str, config: DecoderConfig, model: int = 1
) -> str:
    """The kernel of a run that names none: cuDNN's where it can compute the model, else the portable one.

    On an H100 passes with cuDNN's are 1.5 times as fast, and it compiles in seconds what takes XLA minutes.

    Args:
        platform: of the devices.
        capability: compute capability of an NVIDIA GPU; None for others.
        dtype: that the model computes in.
        config: of the model.
        model: size of the mesh's axis `model`.
    """
    if platform != "gpu" or (capability or 0.0) < CUDNN_CAPABILITY:
        return "chunked"
    if config.head_dim > CUDNN_HEAD_DIM or config.head_dim % 8:
        return "chunked"
    try:
        check_kernel("cudnn", platform=platform, dtype=dtype, config=config, model=model)
    except ModelError:
        return "chunked"
    return "cudnn"


def kernel_of(name: str, mesh: Mesh | None, *, platform: str) -> Attend:
    """The kernel of this name, which must have passed `check_kernel`; over a mesh, each device for its own heads.

    XLA finds out by itself how to divide the portable one. It cannot look into the others, whose contexts and heads are
    dealt out here.
    """
    if name == "chunked":
        return partial(attend, chunk_rows=GPU_CHUNK_ROWS) if platform == "gpu" else attend
    kernel: Attend = attend_splash if name == "splash" else attend_cudnn
    return kernel if mesh is None else over_mesh(kernel, mesh)


def over_mesh(kernel: Attend, mesh: Mesh) -> Attend:
    """The kernel with contexts dealt out along the axis `data` of a mesh, and heads along `model`."""
    heads, rows = PartitionSpec(DATA, None, MODEL, None), PartitionSpec(DATA, None)  # type: ignore[no-untyped-call]

    def dealt(
        query: Heads, key: KeyHeads, value: KeyHeads, segment_ids: Int[Array, "batch sequence"], *, rule: AttentionRule
    ) -> Heads:
        run = jax.shard_map(
            partial(kernel, rule=rule), mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads,
            check_vma=False,
        )  # fmt: skip
        mixed: Heads = run(query, key, value, segment_ids)
        return mixed

    return dealt


def attend_splash(
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    segment_ids: Int[Array, "batch sequence"],
    *,
    rule: AttentionRule,
    interpret: bool = False,
) -> Heads:
    """Attention by JAX's splash kernel, made for TPUs: scores never leave the core, blocks out of reach are skipped.

    Sequences are padded to a multiple of 128. Source: `jax.experimental.pallas.ops.tpu.splash_attention`.

    Args:
        query: As in `attend`, like the following.
        key: See there.
        value: See there.
        segment_ids: See there.
        rule: See there; window, scale and soft cap are all computed by the kernel.
        interpret: Run it on any device, slowly: for tests.
    """  # fmt: skip
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length = query.shape[1]
    padding = -length % SPLASH_BLOCK
    whole = [jnp.pad(heads, ((0, 0), (0, padding), (0, 0), (0, 0))) for heads in (query * rule.scale, key, value)]
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    kernel = _splash_kernel(length + padding, query.shape[2], rule.window, rule.softcap, interpret)
    heads_first = [heads.transpose(0, 2, 1, 3) for heads in whole]
    mixed = jax.vmap(kernel)(*heads_first, splash.SegmentIds(segments, segments))
    return mixed.transpose(0, 2, 1, 3)[:, :length].astype(value.dtype)


@cache
def _splash_kernel(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool) -> Any:  # noqa: FBT001
    """One kernel for all layers of a shape and rule: its masks are NumPy's work."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    blocks = splash.BlockSizes(block_q=SPLASH_BLOCK, block_kv=SPLASH_BLOCK, block_kv_compute=SPLASH_BLOCK)
    with jax.ensure_compile_time_eval():  # made inside a trace, its arrays would belong to that trace
        return splash.make_splash_mha(
            mask=masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
            block_sizes=blocks, interpret=interpret,
        )  # fmt: skip


def attend_cudnn(
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    segment_ids: Int[Array, "batch sequence"],
    *,
    rule: AttentionRule,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Heads:
    """Attention by cuDNN's fused kernel, for NVIDIA GPUs, in bfloat16.

    Segments go in as a mask of `batch * sequence * sequence` values, which the kernel reads: meant for contexts of a
    few thousand tokens.

    Args:
        query: As in `attend`, like the following.
        key: See there.
        value: See there.
        segment_ids: See there.
        rule: See there; without soft cap.
        implementation: "cudnn"; "xla" computes the same call on any device, for tests.

    Raises:
        ModelError: the rule has a soft cap.
    """  # fmt: skip
    if rule.softcap is not None:
        raise ModelError("attention 'cudnn' computes no soft cap; use 'chunked'")
    indices = jnp.arange(query.shape[1])
    mask = visible(indices, segment_ids, indices, segment_ids, window=rule.window)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], scale=rule.scale, implementation=implementation
    )  # fmt: skip
