"""Environments of peers that do not go with ours: made once, in `.venv-bench-NAME`, which git ignores."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
CPU_TORCH = "torch==2.13.0"  # the newest whose CPU wheel is small, for Python 3.11 alone


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a peer needs, and the Pythons it runs on, best first."""

    name: str
    requirements: tuple[str, ...]
    versions: tuple[str, ...]

    def python(self) -> Path:
        """Its interpreter; installs what is needed, unless a stamp says that it is there.

        Raises:
            OSError: no Python that it runs on was found, or it cannot be installed there.
        """
        base = _interpreter(self.versions)
        place = TOP / f".venv-bench-{self.name}"
        python, stamp = place / "bin/python", place / "installed.txt"
        wanted = "\n".join((str(base), *self.requirements))
        if not (stamp.is_file() and stamp.read_text("utf-8") == wanted):
            print(f"installing {', '.join(self.requirements)} into {place.name}", flush=True)
            subprocess.run([base, "-m", "venv", "--clear", place], check=True)
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*pip, *self.requirements], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"pip could not install it: {done.stderr.strip()[-300:]}")
            stamp.write_text(wanted, "utf-8")
        return python


ENVIRONMENTS = {
    "SAELens": Environment("saelens", ("sae-lens==6.54.12", CPU_TORCH), ("3.11",)),
    "nnsight": Environment("nnsight", ("nnsight==0.8.1", CPU_TORCH), ("3.11",)),
    "TransformerLens": Environment("transformer-lens", ("transformer-lens==4.3.0", CPU_TORCH), ("3.11",)),
    "annbatch": Environment("annbatch", ("annbatch==0.3.1", "zarrs==0.2.3"), ("3.12", "3.13")),
}


def _interpreter(versions: tuple[str, ...]) -> Path:
    """The first Python of these versions that starts: this one, on the path, or under pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in versions:
        found = shutil.which(f"python{version}")
        candidates = [Path(sys.executable), *([Path(found)] if found else [])]
        for candidate in [*candidates, *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]:
            asked = "import sys; print(sys.base_prefix, '%d.%d' % sys.version_info[:2])"
            told = subprocess.run([candidate, "-c", asked], capture_output=True, text=True).stdout.split()
            if told[-1:] == [version]:
                return Path(told[0]) / "bin" / f"python{version}"
    raise FileNotFoundError(f"none of Python {', '.join(versions)} was found on this machine")
