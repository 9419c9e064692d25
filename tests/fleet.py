"""Worker processes forked from a server that has imported everything: a start costs a second, not ten.

Each is a process of its own that runs the command line; what it says goes into files, so that a kill loses nothing.
"""

import atexit
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

OPTIONS = [
    "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "30", "--layers", "1,3", "--context", "128",
    "--batch", "4", "--block-samples", "1024",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "jax",
        "flax.nnx",
        "tokenizers",
        "safetensors.numpy",
        "actstore.cli",
        "extract.cli",
        "extract.loop",
        "extract.planning",
    ]
)


class Block(NamedTuple):
    """What a worker says that it did with a block."""

    did: str
    block: int


class Worker:
    """One process that runs `actstore ...`, from its making on.

    Args:
        folder: for the files of what it says; must be its own.
        arguments: of the command.
        devices: virtual devices of the process.
    """

    def __init__(self, folder: Path, *arguments: str | Path, devices: int = 1) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self.process = CONTEXT.Process(target=_run, args=(str(folder), [str(each) for each in arguments], devices))
        self.process.start()

    @property
    def code(self) -> int | None:
        """Exit code; -9 of one that was killed, None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float = 300.0) -> int:
        """Waits for its end, and gives the exit code."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"no end in {seconds} s: {self.errors}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    @property
    def out(self) -> str:
        """What it wrote on standard output."""
        return (self._folder / "out").read_text()

    @property
    def errors(self) -> str:
        """What it wrote on standard error."""
        return (self._folder / "err").read_text()

    @property
    def summary(self) -> dict[str, Any]:
        """Of `--json`. Gloo prints before it."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def blocks(self) -> list[Block]:
        """What it did with blocks, of `--log json`."""
        lines = [json.loads(line) for line in self.errors.splitlines() if line.startswith("{") and line.endswith("}")]
        return [Block(line["did"], line["block"]) for line in lines if "did" in line]


def workers(folder: Path, url: Path, count: int, *more: str, devices: int = 1) -> list[Worker]:
    """Starts workers of one run that know their numbers."""
    ranks = [["--num-processes", str(count), "--process-id", str(number)] for number in range(count)]
    return [
        Worker(folder / str(number), "extract", url, *OPTIONS, "--json", *rank, *more, devices=devices)
        for number, rank in enumerate(ranks)
    ]


def _run(folder: str, arguments: list[str], devices: int) -> None:
    """What the process does."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = ["actstore", *arguments]
    from actstore.__main__ import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # JAX takes leave of the others there; multiprocessing ends without it
