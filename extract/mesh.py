"""The only place that asks JAX for devices."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Devices:
    """What this process computes on."""

    platform: str
    count: int
    kind: str

    @property
    def compute_dtype(self) -> str:
        """The dtype to compute in: float32 on CPUs, whose bfloat16 is emulated and slower, bfloat16 elsewhere."""
        return "float32" if self.platform == "cpu" else "bfloat16"


def local_devices() -> Devices:
    """The devices of this process. Starts JAX's backend."""
    import jax

    devices = jax.local_devices()
    return Devices(devices[0].platform, len(devices), devices[0].device_kind)
