"""The launch recipes, as far as they can be run without their clouds: parsed, checked, and run with stand-ins.

A stand-in for `ssh`, `srun`, `gcloud` or `scontrol` starts what it is given on this machine, or writes down what it was
asked for. Whether a cloud accepts a file is not checked here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import check_command

import actstore
from actstore import errors

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "docs/launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TINY = [
    "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "8", "--layers", "1,3", "--context", "128",
    "--block-samples", "1024",
]  # fmt: skip
OPTIONS = ["gs://bucket/run.acts.zarr", "--model", "a model", "--documents", "it's.jsonl", "--rows", 'kind("word")']


def run(
    arguments: list[str | Path], *, bin_folder: Path, stand_ins: Mapping[str, str], **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script, with stand-ins for programs that are not here."""
    bin_folder.mkdir()
    for name, code in stand_ins.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (bin_folder / name).chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, cwd=bin_folder.parent,
        env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"} | environ,
    )  # fmt: skip


def check_store(url: Path) -> None:
    command = [sys.executable, "-m", "actstore", "verify", url]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert actstore.open(url).samples > 10_000


def loaded(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


# --- what a linter sees ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


def test_scripts_inside_yaml_are_sound(tmp_path: Path) -> None:
    for part in ("setup", "run"):
        (tmp_path / part).write_text(f"#!/usr/bin/env bash\n{loaded('skypilot.yaml')[part]}")
        found = subprocess.run([Path(sys.executable).parent / "shellcheck", tmp_path / part], capture_output=True)
        assert found.returncode == 0, found.stdout


def test_meta_a_faulty_script_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "faulty").write_text("#!/usr/bin/env bash\nactstore extract $STORE\n")
    found = subprocess.run([Path(sys.executable).parent / "shellcheck", tmp_path / "faulty"], capture_output=True)
    assert found.returncode == 1
    assert b"SC2086" in found.stdout


def test_every_recipe_is_on_the_page() -> None:
    page = (ROOT / "docs/how-to/launch-on-many-hosts.md").read_text()
    assert set(re.findall(r"\{literalinclude\} \.\./launch/(\S+)", page)) == {it.name for it in LAUNCH.iterdir()}


# --- machines ---

LOCAL_SSH = """
[ "$1 $2 $3 $4 $5" = "-tt -o BatchMode=yes -o ServerAliveInterval=15" ] || exit 98
echo "$6" >> reached
bash -c "$7"
"""


def test_a_list_of_machines_writes_one_store(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("# two\none.example\n\ntwo.example\n")
    done = run(
        [LAUNCH / "machines.sh", "hosts.txt", "x.acts.zarr", *TINY], bin_folder=tmp_path / "bin",
        stand_ins={"ssh": LOCAL_SSH},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "reached").read_text().split()) == ["one.example", "two.example"]
    assert "worker 1 of 2 (options)" in done.stderr
    check_store(tmp_path / "x.acts.zarr")


@pytest.mark.parametrize(
    ("codes", "expected"), [("0 137", 0), ("75 0", 0), ("75 75", 75), ("3 75", 75), ("255 2", 255)]
)
def test_a_list_of_machines_is_done_when_one_says_so(tmp_path: Path, codes: str, expected: int) -> None:
    """Whoever ends with 0 has seen the seal."""
    (tmp_path / "hosts.txt").write_text("one\ntwo\n")
    code = f'codes=({codes}); [ "$6" = one ] && exit "${{codes[0]}}"; exit "${{codes[1]}}"'
    done = run(
        [LAUNCH / "machines.sh", "hosts.txt", *OPTIONS], bin_folder=tmp_path / "bin", stand_ins={"ssh": code}
    )  # fmt: skip
    assert done.returncode == expected


def test_options_reach_other_machines_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("one\n")
    done = run(
        [LAUNCH / "machines.sh", "hosts.txt", *OPTIONS], bin_folder=tmp_path / "bin",
        stand_ins={"ssh": 'bash -c "$7"', "actstore": "printf '%s\\n' \"$@\" > asked"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["extract", *OPTIONS, "--launcher", "none", "--num-processes", "1", "--process-id", "0"]
    check_command(asked)


# --- SLURM ---

TWO_TASKS = """
[ "$1 $2 $3" = "--no-kill --kill-on-bad-exit=0 --cpus-per-task=8" ] || exit 98
shift 3
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""


def test_slurm_writes_one_store(tmp_path: Path) -> None:
    done = run(
        [LAUNCH / "slurm.sh", "x.acts.zarr", *TINY], bin_folder=tmp_path / "bin",
        stand_ins={"srun": TWO_TASKS, "scontrol": "exit 97"}, SLURM_JOB_ID="17", SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="node[1-2]", SLURM_CPUS_PER_TASK="8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "worker 1 of 2 (SLURM)" in done.stderr
    check_store(tmp_path / "x.acts.zarr")


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, "0", False), (1, "0", False), (2, "0", False), (4, "0", False), (75, "99", True), (137, "99", True),
        (143, "99", True), (3, "19", True), (3, "20", False),
    ],
)  # fmt: skip
def test_slurm_queues_again_what_can_continue(tmp_path: Path, code: int, restarts: str, requeued: bool) -> None:
    done = run(
        [LAUNCH / "slurm.sh", *OPTIONS], bin_folder=tmp_path / "bin", SLURM_JOB_ID="17",
        SLURM_RESTART_COUNT=restarts, SLURM_CPUS_PER_TASK="8",
        stand_ins={"srun": f"exit {code}", "scontrol": 'echo "$@" > asked'},
    )  # fmt: skip
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_slurm_stops_workers_in_time() -> None:
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    name, seconds = given["signal"].split("@")
    assert (name, int(seconds) >= 60, "requeue" in given) == ("TERM", True, True)


# --- TPU VMs ---


def test_tpu_vms_get_the_command_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = tmp_path / ".venv/bin/actstore"
    program.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > asked\n")
    program.chmod(0o755)
    done = run(
        [LAUNCH / "tpu-vm.sh", "run", "slice", "zone-a", *OPTIONS], bin_folder=tmp_path / "bin",
        stand_ins={"gcloud": 'echo "${@:1:9}" > called; bash -c "${10}"'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").read_text().split() == [
        "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone", "zone-a", "--worker=all", "--command",
    ]  # fmt: skip
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["extract", *OPTIONS]
    check_command(asked)


def test_tpu_vms_are_set_up_with_extras_that_there_are(tmp_path: Path) -> None:
    done = run(
        [LAUNCH / "tpu-vm.sh", "setup", "slice", "zone-a"], bin_folder=tmp_path / "bin",
        stand_ins={"gcloud": 'echo "${10}" > called'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_extras((tmp_path / "called").read_text())
    wrong = subprocess.run([LAUNCH / "tpu-vm.sh", "start", "slice", "zone-a"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "give setup or run, found start\n")


def assert_extras(text: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"(?:actstore|\.)\[([\w,]+)\]", text)
    assert set(named.split(",")) <= set(known)


# --- Kubernetes ---


def test_jobset_treats_exit_codes_as_they_are_meant() -> None:
    found = loaded("jobset.yaml")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    actions = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
    }  # fmt: skip
    assert actions == {1: "FailJob", 2: "FailJob", 4: "FailJob", errors.StoppedError.exit_code: "Ignore"}
    assert errors.StorageError.exit_code not in actions  # counted
    disrupted = [rule for rule in job["podFailurePolicy"]["rules"] if "onPodConditions" in rule]
    assert disrupted == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]  # fmt: skip
    assert {
        rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if rule not in disrupted
    } == {container["name"]}
    assert pod["restartPolicy"] == "Never"  # what a policy needs
    assert pod["terminationGracePeriodSeconds"] > 30
    assert (job["completionMode"], job["completions"]) == ("Indexed", job["parallelism"])


def test_jobset_runs_a_command_that_there_is() -> None:
    pod = loaded("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["args"])
    assert f"--metrics-port={container['ports'][0]['containerPort']}" in container["args"]
    hosts = loaded("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert hosts * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert {it["name"] for it in container["volumeMounts"]} == {it["name"] for it in pod["volumes"]}


def test_meta_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="no-such"):
        check_command(["extract", "x.acts.zarr", "--model=m", "--documents=d", "--no-such=1"])


# --- SkyPilot ---


def test_skypilot_gives_every_node_its_number(tmp_path: Path) -> None:
    task = loaded("skypilot.yaml")
    (tmp_path / "run.sh").write_text(task["run"])
    done = run(
        ["bash", "-eu", "run.sh"], bin_folder=tmp_path / "bin",
        stand_ins={"actstore": "printf '%s\\n' \"$@\" > asked"}, **task["envs"], SKYPILOT_NUM_NODES="8",
        SKYPILOT_NODE_RANK="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-6:] == ["--launcher", "none", "--num-processes", "8", "--process-id", "3"]
    check_command(asked)
    assert_extras(task["setup"])


# --- the image ---


def test_the_image_is_made_of_what_there_is() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [name for name, _ in steps] == [
        "FROM", "ARG", "WORKDIR", "COPY", "COPY", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT",
    ]  # fmt: skip
    copied = [name for kind, text in steps if kind == "COPY" for name in text.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} <= set(copied)
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= set(copied)
    texts = dict(steps)
    assert_extras(texts["RUN"])
    assert json.loads(texts["ENTRYPOINT"]) == ["actstore"]
    python = re.fullmatch(r"python:3\.(\d+)-slim", texts["FROM"])
    assert python
    assert int(python[1]) >= 11
    assert shlex.split(texts["ARG"]) == ["JAX=jax[tpu]"]
