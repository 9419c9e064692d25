"""Runs real trainers on a small store, each in an environment of its own, and says what could not be checked.

Run by `make trainers`. Trainers pin versions that do not go together, so each gets a folder below `.venv-trainers`,
made once. The exit code is 0 only if every trainer was installed and passed. It needs no library itself.
"""

import argparse
import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
TORCH = "torch==2.13.0"  # the newest whose CPU wheel is small; trainers ask for any


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A script next to this file, and what it needs."""

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # taken out again after installing

    @property
    def script(self) -> str:
        """The module that is run."""
        return f"tests.trainers.train_{self.name}"


TRAINERS = (
    Trainer("saelens", ("sae-lens>=6.54",)),
    # nnsight brings a torchvision that does not go with the CPU wheel of torch, and transformers then fails to import
    Trainer("dictionary_learning", ("dictionary-learning>=0.1",), unwanted=("torchvision",)),
    Trainer("sparsify", ("eai-sparsify>=1.3",)),
    # it imports a name that TransformerLens 4 has removed
    Trainer("llamascopium", ("llamascopium>=2.0.0b34", "transformer-lens<4")),
)


def install(trainer: Trainer, folder: Path) -> Path:
    """The interpreter of the trainer's environment. A stamp says what was installed: pip runs again for anything else.

    Raises:
        CalledProcessError: it cannot be installed; pip has said why.
    """
    place, ours = folder / trainer.name, hashlib.sha256((TOP / "pyproject.toml").read_bytes()).hexdigest()
    wanted = "\n".join((TORCH, *trainer.requirements, f"pyproject.toml {ours}"))
    python, stamp = place / "bin/python", place / "installed.txt"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        venv.create(place, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--editable", str(TOP), TORCH, *trainer.requirements], check=True)
        if trainer.unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *trainer.unwanted], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def check(trainer: Trainer, folder: Path) -> str:
    """Installs and runs one trainer. What to print of it, which begins with PASSED, FAILED or NOT CHECKED."""
    started = time.monotonic()
    print(f"== {trainer.name}: {', '.join(trainer.requirements)}", flush=True)
    try:
        python = install(trainer, folder)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"NOT CHECKED: could not be installed: {error}"
    installed = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="actstore-trainer-") as scratch:
        done = subprocess.run([python, "-m", trainer.script, scratch], cwd=TOP)
    took = f"installed in {installed - started:.0f} s, trained in {time.monotonic() - installed:.0f} s"
    return f"PASSED: {took}" if done.returncode == 0 else f"FAILED with exit code {done.returncode}: {took}"


def main(trainers: tuple[Trainer, ...] = TRAINERS) -> None:
    """Exits with 1 if any trainer failed or could not be installed."""
    parser = argparse.ArgumentParser(prog="python -m tests.trainers")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(trainer.name for trainer in trainers)}")
    parser.add_argument("--folder", type=Path, default=TOP / ".venv-trainers", help="where the environments are")
    arguments = parser.parse_args()
    known = {trainer.name: trainer for trainer in trainers}
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"no such trainer: {', '.join(unknown)}; expected some of {', '.join(known)}")
    folder = arguments.folder.absolute()
    results = {name: check(known[name], folder) for name in arguments.names or known}
    print("\n" + "\n".join(f"{name:20} {result}" for name, result in results.items()))
    sys.exit(0 if all(result.startswith("PASSED") for result in results.values()) else 1)


if __name__ == "__main__":
    main()
