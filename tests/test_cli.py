"""The command line as a person and a program see it: help, output, one-line errors, exit codes."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr

from actstore import cli
from extract.named import model_folder

TINY = model_folder("tiny-qwen2")
SMALL = ["--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "12", "--layers", "1,3", "--context", "128"]


class Outcome(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `actstore ...` in this process."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Outcome(int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store, made by the command itself in a process of its own."""
    url = tmp_path_factory.mktemp("cli") / "x.acts.zarr"
    command = [sys.executable, "-m", "actstore", "extract", str(url), *SMALL, "--block-samples", "4096", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout)
    assert summary["blocks_computed"] == summary["blocks"] > 2
    shown = (
        r"^extract: [\d,]+ of [\d,]+ samples, [\d,]+ tokens/s, \d+\.\d MB written, \d+\.\d [kM]B/s, \d+% waiting for "
    )
    assert re.search(shown + r"storage, limited by the (storage|device|host)$", done.stderr, re.M)
    assert "\x1b" not in done.stderr + done.stdout, "no bars and colours where there is no terminal"
    return url


COMMANDS = [
    "info", "head", "verify", "repair", "abandon", "gc", "watch", "copy", "bench", "plan", "extract", "append",
    "generate", "demo", "arc",
]  # fmt: skip
WITHIN = {"arc": ["transform", "prompts", "score"]}
WHOLE = [f"{name} {part}".strip() for name in COMMANDS for part in WITHIN.get(name, [""])]


@pytest.mark.parametrize("command", WHOLE)
def test_every_command_has_help_with_an_example_that_parses(run: Run, command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    example = re.search(rf"Example: actstore ({command} .*)", " ".join(shown.out.split()))
    assert example is not None
    words = example[1].split()
    options = [word for word in words if word.startswith("--")]
    assert all(option in shown.out for option in options)


def test_help_lists_every_command_and_exit_code(run: Run) -> None:
    shown = run("--help").out
    assert re.findall(r"^  (\w+)  ", shown.split("Commands:")[1], re.M) == COMMANDS
    assert all(code in shown for code in ("0 done", "2 wrong input", "3 the", "4 the store", "75 stopped"))
    for group, names in WITHIN.items():
        assert re.findall(r"^  (\w+)  ", run(group, "--help").out.split("Commands:")[1], re.M) == names


def test_version(run: Run) -> None:
    assert run("--version").out == "actstore 0.1.0\n"


def test_info_as_text_and_json(run: Run, store: Path) -> None:
    card = json.loads(run("info", store, "--json").out)
    assert card["status"] == "complete"
    blocks = math.ceil(card["samples"] / 4096)
    assert card["committed"] == f"{blocks} of {blocks} blocks"
    assert card["sites"] == ["resid_post [1, 3] x 128 bfloat16"]
    assert card["bytes"] == card["samples"] * 2 * 128 * 2
    text = run("info", store).out
    for value in ("complete", "tiny-qwen2", "resid_post [1, 3] x 128 bfloat16", card["fingerprint"]):
        assert value in text


def test_head_shows_rows_with_norms_and_tokens_in_context(run: Run, store: Path) -> None:
    shown = run("head", store, "--start", "700", "--count", "3", "--json").out
    lines = [json.loads(line) for line in shown.splitlines()]
    dataset = xr.open_dataset(store)
    rows = dataset.resid_post.isel(sample=slice(700, 703)).values
    for place, line in enumerate(lines):
        assert line["sample"] == 700 + place
        assert line["token_id"] == dataset.token_id.values[700 + place]
        for index, layer in enumerate(("1", "3")):
            assert line["norm"]["resid_post"][layer] == pytest.approx(np.linalg.norm(rows[index, place]), abs=2e-3)
    assert lines[0]["after"].startswith(lines[1]["token"])
    text = run("head", store, "--start", "700", "--count", "1").out
    assert f"\u27e6{lines[0]['token']}\u27e7".replace("\n", "\u23ce") in text


def test_commands_advise_what_a_command_can_do(run: Run, store: Path, unfinished: Path) -> None:
    for command in ("head", "bench"):
        outcome = run(command, unfinished)
        assert outcome.code == 2
        assert outcome.err.endswith("2 of 4 blocks are committed; run the command that writes it again to finish it\n")
    outcome = run("bench", store)
    assert outcome.code == 2
    assert outcome.err == "error: site 'resid_post' holds layers [1, 3]; say which one with --layer\n"


def test_head_refuses_rows_that_do_not_exist(run: Run, store: Path) -> None:
    outcome = run("head", store, "--start", "99999999")
    assert outcome.code == 2
    assert re.match(
        r"error: --start 99999999 --count 10 asked for; the store has rows 0 to \d+; take some", outcome.err
    )


def test_plan_prints_the_numbers_and_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = json.loads(run("plan", *SMALL, "--json").out)
    assert numbers["bytes"] == numbers["samples"] * 2 * 128 * 2
    assert "fingerprint" in run("plan", *SMALL).out
    assert list(tmp_path.iterdir()) == []


def test_extracting_again_says_that_nothing_was_computed(run: Run, store: Path) -> None:
    outcome = run("extract", store, *SMALL, "--block-samples", "4096")
    assert outcome.code == 0
    assert re.search(r"is complete; all \d blocks were there before, nothing was computed\n$", outcome.out)


def folder_without_config(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    return ["--model", str(tmp_path / "model")]


def unsupported_family(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return ["--model", str(tmp_path / "model")]


def empty_documents(tmp_path: Path) -> list[str]:
    (tmp_path / "empty.jsonl").touch()
    return ["--documents", str(tmp_path / "empty.jsonl")]


BAD: dict[str, tuple[Callable[[Path], list[str]] | list[str], str]] = {
    "unknown layer": (["--layers", "30"], r"layer 30 does not exist: the model has 4 layers, 0 to 3; choose"),
    "layer that is no number": (["--layers", "six"], r"--layers has 'six'; expected whole numbers with commas between"),
    "unknown site": (["--sites", "resid_past"], r"site 'resid_past' does not exist: the known sites are .*; use one"),
    "folder without config.json": (folder_without_config, r"found nothing in .*; expected .* config.json .*; pass the"),
    "missing model": (["--model", "no/such/model"], r"found nothing at no/such/model; expected a HuggingFace model"),
    "unsupported family": (unsupported_family, r"mamba.*qwen2"),
    "empty document set": (empty_documents, r"empty.jsonl holds no documents; expected at least one"),
    "missing documents": (["--documents", "no/such.jsonl"], r"no/such.jsonl"),
    "context longer than the model's": (["--context", "5000"], r"context 5000 does not fit: .* 1 to 2048 tokens; use"),
    "unknown dtype": (["--dtype", "int4"], r"dtype 'int4' is unknown; expected one of bfloat16, float16, float32"),
    "limit zero": (["--limit", "0"], r"limit is 0; expected at least 1"),
}


@pytest.mark.parametrize(("bad", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_with_code_2_and_leaves_nothing(
    run: Run, tmp_path: Path, bad: Callable[[Path], list[str]] | list[str], text: str
) -> None:
    more = bad if isinstance(bad, list) else bad(tmp_path)
    outcome = run("extract", tmp_path / "runs/x.acts.zarr", *SMALL, *more)
    assert_one_line_error(outcome, text)
    assert not (tmp_path / "runs").exists()


def assert_one_line_error(outcome: Outcome, text: str) -> None:
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2, outcome
    assert outcome.err.splitlines()[-1:] == errors, "the error is the last line, and the only one"
    assert re.search(text, errors[0]), errors[0]
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_a_folder_that_holds_another_run_is_refused_by_field(run: Run, store: Path) -> None:
    before = sorted(store.rglob("*"))
    outcome = run("extract", store, *SMALL, "--layers", "2", "--block-samples", "4096")
    assert_one_line_error(
        outcome, r"holds another run, with 1 differing fields \(layout.sites\[0\].layers: there \[1, 3\]"
    )
    assert sorted(store.rglob("*")) == before


def test_a_name_that_is_not_one_of_a_store(run: Run, tmp_path: Path) -> None:
    assert_one_line_error(run("extract", tmp_path / "x.zarr", *SMALL), r"expected one that ends in .acts.zarr")


def test_a_file_in_the_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.acts.zarr").write_text("mine")
    assert_one_line_error(run("extract", tmp_path / "x.acts.zarr", *SMALL), r"is a file, expected a folder")
    assert (tmp_path / "x.acts.zarr").read_text() == "mine"


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tmpfs with the mount options of the test's parameter."""
    place = tmp_path / "disk"
    place.mkdir()
    options = request.param
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"NOT CHECKED: this machine does not allow mount -o {options}: {tried.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_read_only_target(run: Run, mounted: Path) -> None:
    assert_one_line_error(
        run("extract", mounted / "x.acts.zarr", *SMALL), r"is read-only for this user; choose a target"
    )


@pytest.mark.parametrize("mounted", ["size=1m"], indirect=True)
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(run: Run, mounted: Path) -> None:
    outcome = run("extract", mounted / "x.acts.zarr", *SMALL)
    assert_one_line_error(outcome, r"the run needs [\d,]+ bytes, [\d,]+ are free in .*; free some space")
    assert list(mounted.iterdir()) == []


@pytest.mark.parametrize("mounted", ["size=16m"], indirect=True)
def test_a_disk_that_fills_up_in_the_middle_loses_nothing(run: Run, mounted: Path) -> None:
    url = mounted / "x.acts.zarr"
    hog = mounted / "hog"
    command = [sys.executable, "-c", HOG, str(hog), "extract", str(url), *SMALL, "--block-samples", "1024"]
    full = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert_one_line_error(
        Outcome(full.returncode, full.stdout, full.stderr),
        r"could not write .* of .*: .*No space left on device( at \S+)?; free some space, then run",
    )
    kept = json.loads(run("info", url, "--json").out)["committed"]
    assert re.fullmatch(r"[1-9]\d* of \d+ blocks", kept)
    hog.unlink()
    again = json.loads(run("extract", url, *SMALL, "--block-samples", "1024", "--json").out)
    assert f"{again['blocks_before']} of {again['blocks']} blocks" == kept


HOG = """
import sys, threading, time
from pathlib import Path
from actstore import cli
hog, url = Path(sys.argv[1]), Path(sys.argv[3])
def fill():  # takes the rest of the disk when two blocks are committed
    while len(list((url / ".act/commits").glob("*.json"))) < 2:
        time.sleep(0.001)
    with hog.open("wb") as file:
        try:
            while True:
                file.write(bytes(65536)); file.flush()
        except OSError:
            pass
threading.Thread(target=fill, daemon=True).start()
sys.argv = ["actstore", *sys.argv[2:]]
cli.main()
"""


def test_info_of_nothing(run: Run, tmp_path: Path) -> None:
    outcome = run("info", tmp_path / "none.acts.zarr")
    assert outcome.code == 2
    assert re.match(r"error: no activation store at .*none.acts.zarr: found no .act/plan.json, expected", outcome.err)


def test_a_damaged_plan_has_code_4(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.acts.zarr/.act").mkdir(parents=True)
    (tmp_path / "x.acts.zarr/.act/plan.json").write_text("{}")
    outcome = run("info", tmp_path / "x.acts.zarr")
    assert outcome.code == 4
    assert re.match(r"error: .*/.act/plan.json is not a plan of format 1: ", outcome.err)


def test_a_missing_option_is_named(run: Run) -> None:
    outcome = run("extract", "x.acts.zarr", "--model", "tiny-qwen2")
    assert outcome.code == 2
    assert "Missing option '--documents'" in outcome.err


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    words = " ".join([sys.executable, "-m", "actstore", "extract", str(url), *SMALL])
    done = subprocess.run(["script", "-qec", words, "/dev/null"], capture_output=True, text=True, check=True,
                          env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})  # fmt: skip
    assert re.search(r"extract.*100 %.*tokens/s", done.stdout)
