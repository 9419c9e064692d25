"""A minute of the soak, and that its judge finds what a loader could leave behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from soak import ALLOWED, Usage, leaks

TOP = Path(__file__).parent.parent


def run(*command: str, timeout: float) -> tuple[int, dict]:
    """Exit code and the JSON of the last line."""
    done = subprocess.run([sys.executable, *command], cwd=TOP, capture_output=True, text=True, timeout=timeout)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_a_minute_of_training_leaves_nothing_behind() -> None:
    code, found = run("-m", "tests.soak", "--minutes", "1", "--seed", "7", timeout=300)
    print({name: value for name, value in found.items() if name != "measured"})
    assert (code, found["leaks"]) == (0, [])
    for name in ("batches", "epochs", "loaders", "restores", "outages", "kills"):
        assert found[name] > 0, f"no {name} in a minute: the soak did not do what it is for"


# The judge

LEAKING = """
import json, tempfile, threading
from pathlib import Path
from tests.soak import Soak

kept = []


class Leaking:
    def __init__(self, loader):
        self.loader = loader
        LEAK_OF_A_LOADER

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def next_batch(self):
        batch = self.loader.next_batch()
        LEAK_OF_A_BATCH
        return batch


with tempfile.TemporaryDirectory() as folder:
    soak = Soak(Path(folder), 0, wrap=Leaking)
    soak.run(12)
print(json.dumps(soak.result()))
"""
LEAKS = {
    "megabytes": ("pass", "kept.append((batch, b'x' * 200_000))"),  # a busy machine takes few batches
    "threads": (  # a busy machine makes few loaders in these seconds
        "for _ in range(8): threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "pass",
    ),
    "files": ("kept.append(open(__file__ if '__file__' in globals() else '/dev/null'))", "pass"),
    "nothing": ("pass", "pass"),
}


@pytest.mark.slow
@pytest.mark.sampled(4)
@pytest.mark.parametrize("leak", LEAKS)
def test_meta_a_loader_that_leaks_is_found(leak: str) -> None:
    of_a_loader, of_a_batch = LEAKS[leak]
    program = LEAKING.replace("LEAK_OF_A_LOADER", of_a_loader).replace("LEAK_OF_A_BATCH", of_a_batch)
    _, found = run("-c", program, timeout=120)
    assert [each.split()[0] for each in found["leaks"]] == ([] if leak == "nothing" else [leak])


SERIES = {
    "flat": (lambda t: 200 + 0 * t, []),
    "noise": (lambda t: 200 + 5 * np.sin(37 * t), []),
    "a warm-up": (lambda t: 200 - 80 * np.exp(-t / 20), []),
    "a few peaks": (lambda t: 200 + 300 * (t % 60 < 6), []),
    "one MB in ten seconds": (lambda t: 200 + t / 10, ["megabytes"]),
    "steps": (lambda t: 200 + 20 * (t // 120), ["megabytes"]),
}


@pytest.mark.parametrize("case", SERIES)
def test_the_judge_on_made_up_series(case: str) -> None:
    values, expected = SERIES[case]
    seconds = np.linspace(1, 600, 120)
    measured = [
        Usage(float(t), float(values(t)), 14.0 + (t > 300), 7.0 - (number % 5 == 0))
        for number, t in enumerate(seconds)
    ]  # fmt: skip
    assert [each.split()[0] for each in leaks(measured)] == expected
    assert list(ALLOWED) == ["megabytes", "threads", "files"]
