"""What a Cloud TPU VM says of itself: chips on its bus, and attributes by its metadata server."""

import dataclasses
import importlib.util
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from actstore.errors import InputError

GOOGLE = "0x1ae0"
TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # as JAX knows them
TRIES, PAUSE_SECONDS, ANSWER_SECONDS = 6, 0.5, 5.0
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # how the chips of one host are wired
_CHOSEN = ("TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """The machine that this process runs on, if it is one with TPUs."""

    environ: Mapping[str, str]
    bus: Path = Path("/sys/bus/pci/devices")

    @property
    def chips(self) -> int:
        """TPU chips on the bus of this machine."""
        found = 0
        for vendor in self.bus.glob("*/vendor"):
            if vendor.read_text().strip() == GOOGLE:
                found += vendor.with_name("device").read_text().strip() in TPU_DEVICES
        return found

    @property
    def has_metadata(self) -> bool:
        """Whether to ask the metadata server: where JAX would take the TPUs, unless the environment says not to."""
        if "TPU_SKIP_MDS_QUERY" in self.environ:
            return False
        library = "TPU_LIBRARY_PATH" in self.environ or importlib.util.find_spec("libtpu") is not None
        return "JAX_FORCE_TPU_INIT" in self.environ or (library and self.chips > 0)

    def attribute(self, name: str) -> str | None:
        """An attribute of the instance; None where it has none of that name.

        Raises:
            InputError: the metadata server does not answer.
        """
        host = self.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        reason = ""
        for turn in range(TRIES):
            time.sleep(PAUSE_SECONDS * bool(turn))
            try:
                with direct.open(request, timeout=ANSWER_SECONDS) as answer:
                    return str(answer.read().decode())
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                reason = f"status {error.code}"
            except OSError as error:
                reason = str(getattr(error, "reason", error))
        raise InputError(
            f"this machine has TPUs, and its metadata server {host} does not say {name} ({reason}); give "
            "--num-processes and --process-id with --launcher none, or --launcher none alone to compute alone"
        )

    def tpu_env(self) -> dict[str, str]:
        """The lines `NAME: 'value'` of the attribute `tpu-env`."""
        lines = (self.attribute("tpu-env") or "").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {name.strip(): value.strip().strip("'") for name, colon, value in pairs if colon}

    def alone(self) -> dict[str, str]:
        """Variables by which a process takes the chips of this host, instead of waiting for all hosts of its slice.

        Libtpu reads some by their old names, and GKE sets those for the whole slice. Empty where the environment
        chooses chips itself, or the host has an unusual number of them.
        """
        bounds = _BOUNDS.get(self.chips)
        if bounds is None or any(name in self.environ for name in _CHOSEN):
            return {}
        dimensions = self.environ.get("TPU_TOPOLOGY", "").count("x") + 1
        topology = "x".join(bounds.split(",")[:dimensions])
        return {
            "TPU_PROCESS_BOUNDS": "1,1,1", "TPU_HOST_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": bounds, "TPU_CHIPS_PER_HOST_BOUNDS": bounds,
            "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "CLOUD_TPU_TASK_ID": "0",
        } | ({"TPU_TOPOLOGY": topology} if "TPU_TOPOLOGY" in self.environ else {})  # fmt: skip
