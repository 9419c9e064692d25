"""Which worker this process is: tables of launchers' variables, and a metadata server on loopback."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import InputError
from extract import tpu_vm
from extract.ranks import Rank, resolve
from extract.tpu_vm import TpuVm

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007,010-015],other", "SLURM_NTASKS": "8", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
OPEN_MPI_5 = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "job-0.net,job-1.net,job-2.net,job-3.net"}
SLICES = GKE | {
    "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first.net:8080",
    "JOB_COMPLETION_INDEX": "2",
}  # fmt: skip
ONE_HOST_SLICES = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "JOB_COMPLETION_INDEX": "7"}
ADDRESSES = {"TPU_WORKER_ID": "0", "TPU_PROCESS_ADDRESSES": "10.0.0.1:8471,10.0.0.2:8471"}

CASES: dict[str, tuple[Mapping[str, str], Rank]] = {
    "nobody": ({}, Rank()),
    "SLURM": (SLURM, Rank(3, 8, "SLURM", "node007:61441")),
    "SLURM, plain names": (SLURM | {"SLURM_STEP_NODELIST": "a,b"}, Rank(3, 8, "SLURM", "a:61441")),
    "SLURM, one node": (SLURM | {"SLURM_STEP_NODELIST": "gpu-1"}, Rank(3, 8, "SLURM", "gpu-1:61441")),
    "SLURM, a range": (SLURM | {"SLURM_STEP_NODELIST": "n[01-04]"}, Rank(3, 8, "SLURM", "n01:61441")),
    "SLURM, a step of some tasks": (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, Rank(3, 4, "SLURM", "node007:61441")),
    "SLURM, a chosen port": (SLURM | {"JAX_COORDINATOR_PORT": "99"}, Rank(3, 8, "SLURM", "node007:99")),
    "SLURM, a script without srun": ({k: SLURM[k] for k in SLURM if k != "SLURM_STEP_NODELIST"}, Rank()),
    "Open MPI 4": (OPEN_MPI_4, Rank(1, 2, "Open MPI", "10.96.0.1:62624")),
    "Open MPI 4, version 6 of IP": (
        OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620:10d::2]:43370"},
        Rank(1, 2, "Open MPI", "[fe80::b9b]:61441"),
    ),
    "Open MPI 5": (OPEN_MPI_5, Rank(1, 2, "Open MPI")),
    "Open MPI in a job of SLURM": (SLURM | OPEN_MPI_5, Rank(1, 2, "Open MPI")),
    "GKE": (GKE, Rank(2, 4, "GKE", "job-0.net:8482")),
    "GKE, one host": ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, Rank(0, 1, "GKE", "localhost:8482")),
    "GKE, several slices": (SLICES, Rank(6, 12, "GKE", "first.net:8482")),
    "GKE, addresses": (ADDRESSES, Rank(0, 2, "GKE", "10.0.0.1:8482")),
    "two that agree": (GKE | SLURM | {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Rank(2, 4, "SLURM", "node007:61441")),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), CASES.values(), ids=CASES.keys())
def test_what_launchers_say(tmp_path: Path, environ: Mapping[str, str], expected: Rank) -> None:
    assert resolve(None, None, TpuVm(environ, tmp_path)) == expected


def test_a_rank_is_said_with_who_said_it(tmp_path: Path) -> None:
    assert str(resolve(None, None, TpuVm(SLURM, tmp_path))) == "worker 3 of 8 (SLURM)"
    assert str(resolve(1, 2, TpuVm({}, tmp_path))) == "worker 1 of 2 (options)"


def test_jax_reads_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JAX's own classes as the reference, where they read nothing but the environment."""
    from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster
    from jax._src.clusters.ompi_cluster import OmpiCluster
    from jax._src.clusters.slurm_cluster import SlurmCluster

    monkeypatch.setattr(GkeTpuCluster, "wait_for_coordinator", lambda *_: None)
    for names, cluster in {"SLURM": SlurmCluster, "Open MPI 4": OmpiCluster, "GKE, several": GkeTpuCluster}.items():
        for name, (environ, _) in CASES.items():
            if not name.startswith(names) or "STEP_NUM" in str(environ) or name == "SLURM, a script without srun":
                continue
            with monkeypatch.context() as patch:
                for key, value in environ.items():
                    patch.setenv(key, value)
                found = resolve(None, None, TpuVm(environ, tmp_path))
                theirs = (cluster.get_process_id(), cluster.get_process_count())
                assert (found.rank, found.workers) == theirs, name
                address = cluster.get_coordinator_address(1, environ.get("JAX_COORDINATOR_PORT"))
                assert (found.coordinator or "").replace("[", "").replace("]", "") == address, name


GIVEN: dict[str, tuple[Mapping[str, str], tuple[int | None, int | None], str, Rank]] = {
    "options": ({}, (1, 4), "auto", Rank(1, 4, "options")),
    "options that agree": (SLURM, (3, 8), "auto", Rank(3, 8, "SLURM", "node007:61441")),
    "options, nobody asked": (SLURM, (0, 2), "none", Rank(0, 2, "options")),
    "nobody asked": (SLURM, (None, None), "none", Rank()),
    "the number of pods": ({"JOB_COMPLETION_INDEX": "5"}, (None, 8), "auto", Rank(5, 8, "Kubernetes")),
    "one of two, chosen": (SLURM | GKE, (None, None), "tpu", Rank(2, 4, "GKE", "job-0.net:8482")),
    "the outer, chosen": (SLURM | OPEN_MPI_5, (None, None), "slurm", Rank(3, 8, "SLURM", "node007:61441")),
    "slices of one host": (ONE_HOST_SLICES, (None, 8), "auto", Rank(7, 8, "Kubernetes")),
    "one task of its launcher": (
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (1, 2), "auto", Rank(1, 2, "options"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "options", "launcher", "expected"), GIVEN.values(), ids=GIVEN.keys())
def test_what_options_say(
    tmp_path: Path, environ: Mapping[str, str], options: tuple[int | None, int | None], launcher: str, expected: Rank
) -> None:
    assert resolve(*options, TpuVm(environ, tmp_path), launcher=launcher) == expected


REFUSED: dict[str, tuple[Mapping[str, str], tuple[int | None, int | None], str, str]] = {
    "contradiction": (
        SLURM, (0, 2), "auto",
        "the options say process 0 of 2, SLURM says process 3 of 8; leave the options out, or give --launcher none",
    ),
    "another number": (SLURM, (None, 9), "auto", "the options say process 3 of 9, SLURM says process 3 of 8; leave"),
    "two launchers": (
        SLURM | GKE, (None, None), "auto",
        "SLURM says process 3 of 8, GKE says process 2 of 4: they contradict each other; choose one with --launcher",
    ),
    "slices of one host, nobody knows how many": (
        ONE_HOST_SLICES, (None, None), "auto",
        "Kubernetes says process 7; give --process-id and --num-processes together: --num-processes is missing (or",
    ),
    "no processes": ({}, (0, 0), "auto", "--num-processes is 0; expected at least 1"),
    "pods of nobody knows how many": (
        {"JOB_COMPLETION_INDEX": "5"}, (None, None), "auto",
        "Kubernetes says process 5; give --process-id and --num-processes together: --num-processes is missing (or",
    ),
    "one option": ({}, (1, None), "auto", "give --process-id and --num-processes together: --num-processes is missing"),
    "the other": ({}, (None, 2), "auto", "give --process-id and --num-processes together: --process-id is missing"),
    "too large": ({}, (2, 2), "auto", "--process-id is 2 of 2; expected 0 to 1"),
    "no number": (
        SLURM | {"SLURM_PROCID": "three"}, (None, None), "auto", "SLURM_PROCID is 'three'; expected a whole number;",
    ),
    "beyond": (SLURM | {"SLURM_PROCID": "8"}, (None, None), "auto", "SLURM says process 8 of 8; give --num-processes"),
    "worker beyond": (GKE | {"TPU_WORKER_ID": "4"}, (None, None), "auto", "GKE says worker 4 of 4; give --num"),
    "unknown": ({}, (None, None), "pbs", "--launcher is 'pbs'; expected auto, none, openmpi, slurm, tpu, kubernetes"),
    "not there": ({}, (None, None), "slurm", "--launcher is slurm, and it left no sign of itself in the environment"),
    "Pathways": (
        {"JAX_PLATFORMS": "proxy,cpu"}, (0, 1), "none",
        "JAX_PLATFORMS is 'proxy,cpu': with Pathways one process drives the devices of all hosts, and every row",
    ),
    "head of Pathways": ({"PATHWAYS_HEAD": "job-0"}, (None, None), "auto", "PATHWAYS_HEAD is set: with Pathways one"),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "options", "launcher", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(
    tmp_path: Path, environ: Mapping[str, str], options: tuple[int | None, int | None], launcher: str, said: str
) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        resolve(*options, TpuVm(environ, tmp_path), launcher=launcher)


@contextlib.contextmanager
def metadata_server(attributes: Mapping[str, str], *, failures: int = 0) -> Iterator[str]:
    """Answers as the metadata server of Google's machines does; at first with `failures` times status 503."""

    class Answers(BaseHTTPRequestHandler):
        left = failures

        def do_GET(self) -> None:
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            status = 200 if name in attributes else 404
            if self.headers["Metadata-Flavor"] != "Google":
                status = 403
            elif type(self).left > 0:
                type(self).left -= 1
                status = 503
            self.send_response(status)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if status == 200 else b"<html>no</html>")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


OLD = {"agent-worker-number": "3", "worker-network-endpoints": ",".join(f"w:{i}:10.0.0.{i}" for i in range(4))}
NEW = {"agent-worker-number": "1", "worker-network-endpoints": "10.1.0.5,10.1.0.6"}
MULTI = NEW | {"tpu-env": "TYPE: 'V5E'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nbroken\n"}
ON_TPU = {"JAX_FORCE_TPU_INIT": "1"}


def bus(folder: Path, chips: int) -> Path:
    """What Linux shows of a machine's PCI bus: TPUs, and a network card of the same vendor."""
    for number in range(chips + 1):
        place = folder / f"0000:00:{number:02x}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x1ae0\n")
        (place / "device").write_text("0x0063\n" if number < chips else "0x0042\n")
    return folder


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (OLD, Rank(3, 4, "Cloud TPU", "10.0.0.0:8482")),
        (NEW, Rank(1, 2, "Cloud TPU", "10.1.0.5:8482")),
        (MULTI, Rank(3, 4, "Cloud TPU", "10.1.0.5:8482")),
        ({}, Rank()),
    ],
    ids=["old endpoints", "new endpoints", "slices", "no worker of a slice"],
)
def test_a_tpu_vm_is_asked(tmp_path: Path, attributes: Mapping[str, str], expected: Rank) -> None:
    with metadata_server(attributes) as host:
        environ = {**ON_TPU, "GCE_METADATA_IP": host, "http_proxy": "http://127.0.0.1:9"}
        assert resolve(None, None, TpuVm(environ, tmp_path)) == expected
        assert resolve(None, None, TpuVm(environ | {"TPU_SKIP_MDS_QUERY": "1"}, tmp_path)) == Rank()
        assert resolve(None, None, TpuVm({"GCE_METADATA_IP": host}, tmp_path)) == Rank()  # no TPU


def test_a_metadata_server_that_fails_is_asked_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu_vm, "PAUSE_SECONDS", 0.01)
    with metadata_server(NEW, failures=3) as host:
        found = resolve(None, None, TpuVm({**ON_TPU, "GCE_METADATA_IP": host}, tmp_path))
        assert (found.rank, found.workers) == (1, 2)
    said = r"its metadata server 127.0.0.1:\d+ does not say agent-worker-number \(.*[Rr]efused.*\); give"
    with pytest.raises(InputError, match=said):
        resolve(None, None, TpuVm({**ON_TPU, "GCE_METADATA_IP": host}, tmp_path))
    with metadata_server(NEW, failures=99) as host, pytest.raises(InputError, match=r"\(status 503\)"):
        resolve(None, None, TpuVm({**ON_TPU, "GCE_METADATA_IP": host}, tmp_path))


@pytest.mark.parametrize(("chips", "bounds"), [(0, None), (1, "1,1,1"), (4, "2,2,1"), (8, "2,4,1"), (3, None)])
def test_a_process_alone_takes_the_chips_of_its_host(tmp_path: Path, chips: int, bounds: str | None) -> None:
    machine = TpuVm({"TPU_HOST_BOUNDS": "4,4,1"}, bus(tmp_path, chips))
    assert machine.chips == chips
    found = machine.alone()
    assert found.get("TPU_CHIPS_PER_PROCESS_BOUNDS") == bounds
    assert not found or found["TPU_PROCESS_BOUNDS"] == found["TPU_HOST_BOUNDS"] == "1,1,1"
    assert TpuVm({"TPU_VISIBLE_CHIPS": "0"}, tmp_path).alone() == {}


def test_the_topology_of_a_slice_becomes_that_of_the_host(tmp_path: Path) -> None:
    place = bus(tmp_path, 4)
    assert TpuVm({"TPU_TOPOLOGY": "8x8"}, place).alone()["TPU_TOPOLOGY"] == "2x2"
    assert TpuVm({"TPU_TOPOLOGY": "4x4x8"}, place).alone()["TPU_TOPOLOGY"] == "2x2x1"
    assert "TPU_TOPOLOGY" not in TpuVm({}, place).alone()


def test_the_command_finds_its_number_by_the_metadata_server(tmp_path: Path) -> None:
    """The same command twice, as on two hosts of a slice; JAX computes on the CPU."""
    options = ["--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "4", "--layers", "1", "--json"]
    command = [sys.executable, "-m", "actstore", "extract", str(tmp_path / "x.acts.zarr"), *options]
    processes = []
    with contextlib.ExitStack() as servers:
        for worker in ("0", "1"):
            host = servers.enter_context(metadata_server(NEW | {"agent-worker-number": worker}))
            environ = os.environ | ON_TPU | {"GCE_METADATA_IP": host, "JAX_PLATFORMS": "cpu"}
            environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it in this process, which has no TPU
            processes.append(
                subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
            )
        said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for worker, (out, errors) in enumerate(said):
        assert f"worker {worker} of 2 (Cloud TPU)" in errors
        summary = json.loads(out.splitlines()[-1])
        assert (summary["rank"], summary["workers"]) == (worker, 2)
