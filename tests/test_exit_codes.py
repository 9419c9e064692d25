"""What schedulers are told to do with exit codes, against the codes that errors have."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from actstore import errors
from actstore.stopping import LIMIT_SECONDS

PAGE = (Path(__file__).parent.parent / "docs/reference/errors.md").read_text("utf-8")
STOPPED, STORAGE = 75, 3


def block(kind: str) -> str:
    found = re.search(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def codes(root: type[errors.ActstoreError]) -> Iterator[int]:
    yield root.exit_code
    for each in root.__subclasses__():
        yield from codes(each)


def test_a_job_of_kubernetes_fails_where_a_new_pod_would_not_help() -> None:
    spec = yaml.safe_load(block("yaml"))["spec"]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert set(rules["FailJob"]) | set(rules["Ignore"]) | {STORAGE} == set(codes(errors.ActstoreError))
    assert rules["Ignore"] == [STOPPED] == [errors.StoppedError.exit_code]
    assert errors.StorageError.exit_code == STORAGE
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes takes the policy with no other
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > LIMIT_SECONDS


def test_a_script_of_slurm_requeues_what_continues(tmp_path: Path) -> None:
    """The script of the page, with programs in place of SLURM's."""
    for name, text in {"srun": 'exit "$CODE"', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for code, restarts in [(0, 0), (1, 0), (2, 0), (4, 0), (3, 20), (3, 19), (75, 99), (137, 99), (143, 99)]:
        environ = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "SLURM_JOB_ID": "17",
            "SLURM_RESTART_COUNT": str(restarts),
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", block("bash")], capture_output=True, text=True, env=environ)
        assert done.returncode == code
        assert done.stdout == ("requeue 17\n" if (code, restarts) == (3, 19) or code >= STOPPED else "")
