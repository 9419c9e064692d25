"""The runner of `make trainers` says what it could not check, and the page's code is what it runs."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from trainers import steps

TOP = Path(__file__).parent.parent
RUN = """
import sys
from tests.trainers.__main__ import Trainer, main
main((Trainer("absent", ("./no-such-folder-of-a-trainer",)),))
"""


@pytest.mark.slow
def test_a_trainer_that_cannot_be_installed_is_named_and_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, "--folder", tmp_path], cwd=TOP, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "no-such-folder-of-a-trainer" in done.stderr  # pip's own words
    assert done.stdout.splitlines()[-1].startswith("absent               NOT CHECKED: could not be installed: ")
    assert not (tmp_path / "absent/installed.txt").exists()


def test_an_unknown_trainer_is_refused():
    done = subprocess.run([sys.executable, "-m", "tests.trainers", "sealens"], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "no such trainer: sealens; expected some of saelens, dictionary_learning, sparsify, llamascopium" in done.stderr
    )


SECTIONS = {"SAELens": 3, "dictionary_learning": 1, "sparsify": 1, "llamascopium": 1}


@pytest.mark.parametrize(("section", "count"), SECTIONS.items(), ids=SECTIONS.keys())
def test_the_page_names_what_is_there(section, count):
    """Without the trainers: the code parses, and what it takes from actstore exists. The scripts run it."""
    blocks = steps.documented(section)
    assert len(blocks) == count
    for node in ast.walk(ast.parse("\n".join(blocks))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("actstore"):
            assert find_spec(node.module), node.module
            source = Path(find_spec(node.module).origin).read_text("utf-8")
            made = {each.name for each in ast.parse(source).body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
            assert {alias.name for alias in node.names} <= made
