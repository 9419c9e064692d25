"""The progress of a worker for Prometheus: a page of metrics on a port, while it runs. Needs the extra `metrics`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from actstore.errors import InputError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from extract.loop import Progress
    from extract.ranks import Rank


@contextlib.contextmanager
def served(port: int, rank: "Rank", latest: Callable[[], "Progress | None"]) -> Iterator[None]:
    """Inside, `http://HOST:port/metrics` shows the progress of this worker, on all interfaces.

    Args:
        port: where to listen.
        rank: of the worker: labels of all metrics.
        latest: gives the newest progress; None before the run has begun, when there are no metrics of it.

    Raises:
        InputError: the port cannot be had.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(rank, latest))
    try:
        server, thread = start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--metrics-port is {port}, and it cannot be listened on ({reason}); give another, each worker of a host "
            "its own"
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Makes the metrics when they are asked for."""

    def __init__(self, rank: "Rank", latest: Callable[[], "Progress | None"]) -> None:
        self._rank, self._latest = rank, latest

    def collect(self) -> "Iterator[Metric]":
        """All metrics of now; called by the server, in a thread of its own."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        worker = str(self._rank.rank)
        info = GaugeMetricFamily("actstore_worker", "1 while this worker runs", labels=["worker", "workers", "source"])
        info.add_metric([worker, str(self._rank.workers), self._rank.source], 1)
        yield info
        if (state := self._latest()) is None:
            return
        for name, text, value in [
            ("blocks", "blocks of the store", state.blocks),
            ("blocks_committed", "blocks of the store that are known to be committed", state.blocks_committed),
            ("samples_left", "samples of blocks that are not known to be committed or computed", state.samples_left),
            ("seconds", "seconds since this worker began to compute", state.seconds),
        ]:
            gauge = GaugeMetricFamily(f"actstore_{name}", text, labels=["worker"])
            gauge.add_metric([worker], value)
            yield gauge
        for name, text, value in [
            ("blocks_computed", "blocks that this worker computed", state.blocks_computed),
            ("samples_computed", "samples that this worker computed", state.samples_computed),
            ("tokens_computed", "tokens that this worker's model saw", state.tokens_computed),
            ("written_bytes", "bytes of rows that this worker handed to the storage", state.bytes_written),
        ]:
            counter = CounterMetricFamily(f"actstore_{name}", text, labels=["worker"])
            counter.add_metric([worker], value)
            yield counter
        waited = CounterMetricFamily(
            "actstore_waited_seconds", "seconds that this worker waited, by what for", labels=["worker", "stage"]
        )
        for stage in ("storage", "device", "host"):
            waited.add_metric([worker, stage], getattr(state, f"seconds_for_{stage}"))
        yield waited
