"""Ways of other libraries, each a process in an environment of its own that answers lines with JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.environments import ENVIRONMENTS, TOP


class Peer:
    """A process that runs one way.

    Args:
        name: Of the way; one of `ENVIRONMENTS` runs in that, any other in this one.
        module: What it runs, with its arguments.
        log: Where it writes its errors.

    Raises:
        OSError: its environment cannot be made.
    """

    def __init__(self, name: str, module: Sequence[str | Path], log: Path) -> None:
        python = ENVIRONMENTS[name].python() if name in ENVIRONMENTS else Path(sys.executable)
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-m", *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, cwd=TOP, env=os.environ | quiet,
            )  # fmt: skip
        self._log = log

    def ask(self, what: str) -> dict[str, Any]:
        """Its answer.

        Raises:
            RuntimeError: it failed, or the process ended.
        """
        try:
            print(what, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        found = json.loads(answer) if answer else {"error": f"it ended: {self._log.read_text()[-300:].strip()}"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
