"""Keeps the values of a forward pass that were asked for."""

from collections.abc import Iterable

from jaxtyping import Array, Float

from extract.models.sites import Tap


class Recorder:
    """Is offered the value at every site as a decoder is traced, and keeps those of `taps`.

    A plain Python object: it lives during one trace and leaves no operation behind, so that capture costs nothing.

    Args:
        taps: What to keep.

    Attributes:
        found: The values kept so far.
    """

    def __init__(self, taps: Iterable[Tap]) -> None:
        self._missing = set(taps)
        self.found: dict[Tap, Float[Array, "batch sequence width"]] = {}

    @property
    def complete(self) -> bool:
        """All that was asked for is there: what follows need not be computed."""
        return not self._missing

    def offer(
        self, site: str, layer: int | None, value: Float[Array, "batch sequence width"]
    ) -> Float[Array, "batch sequence width"]:
        """Keeps `value` if it was asked for, and hands it back in any case."""
        tap = Tap(site, layer)
        if tap in self._missing:
            self._missing.remove(tap)
            self.found[tap] = value
        return value
