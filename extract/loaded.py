"""A model from its folder onto devices of this process, ready for batches of some size."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import InputError
from extract.hub import hub_identity, is_hub_name, lacks
from extract.mesh import default_mesh, local_devices, make_mesh
from extract.models.errors import ModelError

if TYPE_CHECKING:
    from extract.models import Model


def load_model(
    folder: str | Path, *, dtype: str | None = None, mesh: tuple[int, int] = (1, 1), attention: str | None = None
) -> "Model":
    """Loads a model from its HuggingFace folder, each device its own part of the weights.

    Args:
        folder: with `config.json`, `model.safetensors` (or its shards) and, for extraction, `tokenizer.json`; for the
            name of a model, see `model_folder`.
        dtype: to compute in; None takes float32 on CPUs and bfloat16 on accelerators.
        mesh: devices of this process as (data, model), as in `make_plan`; (1, 1) is JAX's default device.
        attention: the kernel of the forward passes: "chunked" anywhere, "splash" on TPUs, "cudnn" on NVIDIA GPUs; None
            takes cudnn where it can compute the model, and chunked elsewhere.

    Raises:
        InputError: the folder, its config or its weights are not what a supported family has; or there are not as many
            devices, or their mesh does not fit the model, or the kernel fits neither or one of them.
    """
    from extract.models import load_model as load
    from extract.models.kernels import check_kernel, default_kernel

    devices, here = make_mesh(*mesh), local_devices()
    dtype = dtype or here.compute_dtype
    try:
        if attention is not None:
            check_kernel(attention, platform=here.platform, dtype=dtype)  # before minutes of reading weights
        loaded = load(folder, dtype=dtype, mesh=devices)
        attention = attention or default_kernel(
            platform=here.platform, capability=here.capability, dtype=dtype, config=loaded.config, model=mesh[1]
        )
        check_kernel(attention, platform=here.platform, dtype=dtype, config=loaded.config, model=mesh[1])
        loaded = dataclasses.replace(loaded, attention=attention)
    except ModelError as error:
        raise InputError(f"{error}{_hint(str(folder))}") from None
    if (known := hub_identity(Path(folder))) is None:
        return loaded
    name, revision = known
    return dataclasses.replace(loaded, name=name, revision=revision)


def loaded_for(
    batch: int,
    folder: str | Path,
    *,
    mesh: tuple[int, int] | None,
    model: "Model | None",
    dtype: str | None = None,
    attention: str | None = None,
) -> "Model":
    """The model for batches of this size: the given one, or that of `folder` on `mesh`, or on devices that divide it.

    Raises:
        InputError: as in `load_model`; or the mesh or the attention is given with a model that is loaded already.
    """
    if model is None:
        return load_model(folder, dtype=dtype, mesh=mesh or default_mesh(batch), attention=attention)
    if mesh is not None:
        raise InputError(
            f"mesh is {mesh}, but the model is loaded already and lies where it lies; give the mesh to load_model"
        )
    if attention not in (None, model.attention):
        raise InputError(
            f"attention is {attention!r}, but the model is loaded already with {model.attention!r}; give the attention "
            "to load_model"
        )
    return model


def check_batch(model: "Model", batch: int) -> None:
    """Refuses a batch that the model's mesh cannot deal out evenly.

    Raises:
        InputError: it is not a multiple of the mesh's axis `data`.
    """
    data = 1 if model.mesh is None else model.mesh.shape["data"]
    if batch % data:
        low = batch // data * data
        near = " or ".join(str(each) for each in (low, low + data) if each)
        fits = max(each for each in range(1, data) if batch % each == 0)
        raise InputError(
            f"a batch of {batch} contexts cannot be dealt out to {data} parts, the mesh's axis data; expected a "
            f"multiple of {data}; use --batch {near}, or --mesh {fits},{model.mesh.shape['model'] if model.mesh else 1}"
        )


def _hint(folder: str) -> str:
    """What to do about a folder that is not there because it is the name of a model, or that is half a copy of one."""
    path = Path(folder)
    if not path.exists():
        return f"; if it is a model of a hub, give model_folder({folder!r})" if is_hub_name(folder) else ""
    known = hub_identity(path)
    if known is None or not path.is_dir() or not (gap := lacks(path)):
        return ""
    name = "@".join(known)
    return f"; this copy in the hub's cache {gap}: model_folder({name!r}) fetches the rest, with a network"
