"""What a run tells: lines for people, JSON lines, metrics for Prometheus."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actstore import cli
from actstore.errors import InputError
from actstore.terminal import SECONDS_BETWEEN_LINES, Work
from extract.loop import Progress
from extract.metrics import served
from extract.ranks import Rank

OPTIONS = [
    "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "40", "--layers", "1,3", "--context", "128",
    "--batch", "4", "--block-samples", "1024",
]  # fmt: skip


def start(*arguments: str | Path, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "actstore", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def metrics(number: int) -> dict[str, float]:
    """The samples of the page by name and stage, as Prometheus' own parser reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{number}/metrics", timeout=5) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        sample.name + sample.labels.get("stage", ""): sample.value for family in families for sample in family.samples
    }


def test_json_lines_and_metrics_of_a_run(tmp_path: Path) -> None:
    number = port()
    url = tmp_path / "x.acts.zarr"
    run = start("extract", url, *OPTIONS, "--json", "--log", "json", "--metrics-port", str(number))
    seen: list[dict[str, float]] = []
    while run.poll() is None:
        try:
            seen.append(metrics(number))
        except OSError:  # not yet, or no more
            time.sleep(0.05)
    out, errors = run.communicate()
    assert run.returncode == 0, errors
    summary = json.loads(out)
    lines = [json.loads(line) for line in errors.splitlines()]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
        assert (line["severity"], line["worker"], line["workers"]) == ("INFO", 0, 1)
    blocks = list(range(summary["blocks"]))
    for did in ("took", "committed"):
        assert sorted(line["block"] for line in lines if line.get("did") == did) == blocks
    (plan,) = (line for line in lines if line["message"] == "plan")
    assert (plan["blocks"], plan["samples"]) == (len(blocks), summary["samples_computed"])
    last = lines[-1]
    assert last["blocks_committed"] == last["blocks"] == len(blocks)
    assert last["tokens_computed"] == summary["tokens_computed"] == summary["samples_computed"] == last["done"]
    begun = [page for page in seen if "actstore_blocks" in page]
    assert begun
    assert all(page["actstore_worker"] == 1 for page in seen)
    assert all(page["actstore_blocks"] == len(blocks) for page in begun)
    for name in ("actstore_blocks_committed", "actstore_tokens_computed_total", "actstore_written_bytes_total"):
        values = [page[name] for page in begun]
        assert values == sorted(values)
        assert values[-1] > 0
    assert begun[-1]["actstore_tokens_computed_total"] <= summary["tokens_computed"]


def test_metrics_of_a_known_state() -> None:
    state = Progress(
        blocks=9, blocks_before=2, blocks_computed=3, samples_left=40, samples_computed=30, bytes_written=600,
        seconds=2.0, blocks_committed=5, tokens_computed=60, seconds_for_storage=0.5, seconds_for_device=1.0,
    )  # fmt: skip
    number = port()
    with served(number, Rank(3, 8, "SLURM"), lambda: state):
        found = metrics(number)
    assert {name: value for name, value in found.items() if not name.endswith("_created")} == {
        "actstore_worker": 1, "actstore_blocks": 9, "actstore_blocks_committed": 5, "actstore_samples_left": 40,
        "actstore_seconds": 2, "actstore_blocks_computed_total": 3, "actstore_samples_computed_total": 30,
        "actstore_tokens_computed_total": 60, "actstore_written_bytes_total": 600,
        "actstore_waited_seconds_totalstorage": 0.5, "actstore_waited_seconds_totaldevice": 1,
        "actstore_waited_seconds_totalhost": 0,
    }  # fmt: skip
    with pytest.raises(OSError, match="refused"):
        metrics(number)
    assert (state.tokens_per_second, state.bytes_per_second, state.share_for_storage) == (30, 300, 0.25)


def test_a_port_that_is_taken_is_refused_before_any_work() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=rf"--metrics-port is {number}, and it cannot be listened on \(Address "),
            served(number, Rank(), lambda: None),
        ):
            pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--log", "yaml"], "--log is 'yaml'; expected text or json"),
        (["--metrics-port", "65536"], "--metrics-port is 65536; expected 1 to 65535"),
        (["--metrics-port", "9400"], "prometheus_client is not installed, this command needs it; run: pip install "),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(sys, "argv", ["actstore", "extract", str(tmp_path / "x.acts.zarr"), *OPTIONS, *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_errors_are_json_lines_too(tmp_path: Path) -> None:
    options = [*OPTIONS, "--log", "json", "--num-processes", "2", "--process-id", "2"]
    refused = start("extract", tmp_path / "x.acts.zarr", *options)
    _, errors = refused.communicate(timeout=60)
    assert refused.returncode == 2
    (line,) = map(json.loads, errors.splitlines())
    assert (line["severity"], line["message"]) == ("ERROR", "--process-id is 2 of 2; expected 0 to 1")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("signals", [1, 2], ids=["finished", "at once"])
def test_a_stopped_run_says_so_in_json(tmp_path: Path, signals: int) -> None:
    url = tmp_path / "x.acts.zarr"
    run = start("extract", url, *OPTIONS, "--log", "json", "--num-processes", "2", "--process-id", "1")
    while not (url / ".act/commits").is_dir() or not list((url / ".act/commits").glob("*.json")):
        assert run.poll() is None
        time.sleep(0.005)
    for _ in range(signals):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 75, errors
    lines = [json.loads(line) for line in errors.splitlines()]
    assert lines[0]["message"].startswith("worker 1 of 2 (options)")
    assert lines[-1]["severity"] == "ERROR"
    assert lines[-1]["message"].startswith("stopped by SIGTERM; ")
    assert lines[-1]["worker"] == 1


class Terminal(io.StringIO):
    """A terminal, as rich looks for one."""

    def isatty(self) -> bool:
        return True


def test_worker_0_has_a_bar_and_others_have_lines_with_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = {}
    for bar in (True, False):
        screens[bar] = Terminal()
        monkeypatch.setattr(sys, "stderr", screens[bar])
        with Work("worker 1 of 8", unit="samples", bar=bar) as work:
            work.update(5, 10 if bar else None, "3 tokens/s")
            monkeypatch.setattr(work, "_last_line", time.monotonic() - SECONDS_BETWEEN_LINES)
            work.update(7, 10 if bar else None, "4 tokens/s")
    assert "\x1b[" in screens[True].getvalue()
    assert "70 %" in screens[True].getvalue()
    assert screens[False].getvalue() == "worker 1 of 8: 7 samples, 4 tokens/s\n" * 2


def test_two_workers_say_who_they_are(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    environ = os.environ | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"}
    few = [*OPTIONS, "--limit", "6"]
    both = [start("extract", url, *few, env=environ | {"SLURM_PROCID": rank}) for rank in ("0", "1")]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    for rank, said in enumerate(errors):
        assert said.splitlines()[0] == f"worker {rank} of 2 (SLURM)"
        whole = r"[\d,]+ of [\d,]+ samples" if rank == 0 else r"[\d,]+ samples"
        assert re.fullmatch(
            rf"worker {rank} of 2: {whole}, [\d,]+ tokens/s, .*, limited by the \w+", said.splitlines()[-1]
        )
        assert ("fingerprint" in said) == (rank == 0)  # the plan is said once
