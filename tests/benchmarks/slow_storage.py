"""A run whose storage is slower than its model: what it writes a second beside that limit, and the memory it holds.

The storage is a bucket's server on this machine behind a connection of limited speed. First the connection is as fast
as it can be: that says how slow it must be to be the limit. The run is a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the servers of the tests are

from servers.strict_gcs import strict_gcs
from throttle import Throttle

DOCUMENTS, BLOCK_SAMPLES = 40, 2048  # shards of half a megabyte: of more than one, libcurl asks the server first
SITES = ("resid_post", "resid_mid", "attn_out", "mlp_out")
FAST = 1e10
SHARE = 0.3  # of the speed that the run has with fast storage


def measure(folder: Path, *, model: str = "tiny-qwen2") -> dict[str, object]:
    """Bytes per second with fast storage, with slow storage, and its limit; memory beside what is announced."""
    del folder
    with strict_gcs() as server:
        fast, _ = _run(server, FAST, "fast", model)
        limit = SHARE * fast["bytes_per_second"]
        slow, sent = _run(server, limit, "slow", model)
    figures = {
        "limit": round(limit), "sent": round(sent), "share_of_limit": round(sent / limit, 4),
        "waiting_for_storage": round(slow["share_for_storage"], 3), "limited_by": slow["limit"],
        "memory": slow["peak"], "announced": slow["announced"], "fast": round(fast["bytes_per_second"]),
        "memory_fast": fast["peak"], "written": slow["written"],
    }  # fmt: skip
    print(f"slow storage   limit {limit / 1e6:,.1f} MB/s, sent {sent / 1e6:,.1f} MB/s, {sent / limit:.1%} of it; "
          f"{slow['share_for_storage']:.0%} of the time waiting for it")  # fmt: skip
    print(f"slow storage   memory {slow['peak'] / 1e6:,.0f} MB, with fast storage {fast['peak'] / 1e6:,.0f} MB, "
          f"announced {slow['announced'] / 1e6:,.0f} MB")  # fmt: skip
    return {"slow_storage": figures}


def _run(server: Any, rate: float, name: str, model: str) -> tuple[dict[str, Any], float]:
    """What a run says of itself, and the bytes that it sent in a second."""
    with Throttle(server.endpoint, bytes_per_second=rate) as way:
        through = server.through(way.endpoint)
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.slow_storage", server.url(f"{name}.acts.zarr"), model],
            env=os.environ | through.client_environ(), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr)
        said = json.loads(done.stdout.splitlines()[-1])
        seconds = said["ended"] - said["began"]
        return said, way.bytes_between(said["began"], said["ended"]) / seconds


def _work(url: str, model: str) -> dict[str, Any]:
    """The run, in its process. What is compiled, and libraries, are in memory before it counts."""
    import extract
    from extract.loop import Progress
    from extract.named import model_folder

    def plan_of(limit: int) -> Any:
        documents = extract.open_documents("python-docs", limit=limit)
        settings: dict[str, Any] = {"context": 128, "block_samples": BLOCK_SAMPLES}
        return extract.make_plan(folder, documents, sites=SITES, layers=[0, 1, 2, 3], model=loaded, **settings)

    folder = model_folder(model)
    loaded = extract.load_model(folder)
    extract.run(plan_of(2), url.replace(".acts.zarr", "-first.acts.zarr"))
    plan = plan_of(DOCUMENTS)
    moments: dict[str, float] = {}

    def note(state: Progress) -> None:
        if state.samples_computed:
            moments.setdefault("began", time.monotonic())
        if state.blocks_committed == state.blocks:
            moments.setdefault("ended", time.monotonic())  # before it seals, which sends next to nothing

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
    before = _status("VmRSS")
    state = extract.run(plan, url, progress=note)
    return moments | {
        "bytes_per_second": state.bytes_written / (moments["ended"] - moments["began"]), "limit": state.limit,
        "share_for_storage": state.share_for_storage, "peak": _status("VmHWM") - before,
        "announced": sum(plan.as_json()["memory"][name] for name in ("blocks", "sending")),
        "written": state.bytes_written,
    }  # fmt: skip


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:])))
