"""What a user does with a store, in a child with little memory: every step, what it cost, and how it ended.

Run as a program it imports everything once and starts no thread, so that it may fork: a child for every store that a
line of standard input names. Each line of standard output is one step, or the end of a child.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from kill_points import without_sync
from stores import make_contents
from xarray.backends.plugins import list_engines

import actstore.api
import actstore.batches
import actstore.card
import actstore.cli
import actstore.garbage
import actstore.kvstore
import actstore.objects
import actstore.reader
import actstore.repair
import actstore.schema
import actstore.store
import actstore.untrusted
import actstore.verify

CONTENTS = make_contents()
CAP_BYTES = 1600 << 20  # of writable memory, touched or not: 110 MiB after the imports, 8 MiB for each thread's stack
WALL_SECONDS = 60
WRITING = ("continue", "repair", "continue the repaired", "verify the repaired", "dataset of the repaired")


def children() -> None:
    """Answers every order on standard input, one child each."""
    list_engines()  # entry points are looked up once, before the first child
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  names suffice
    assert threads == 1, f"{threads} threads: a fork would not be sound"
    gc.freeze()  # what is imported is never collected: a child's `gc.collect` then costs nothing
    say(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            one_child(**order)
        say(end=wait(child))


def say(**fields: Any) -> None:
    """One line of JSON, at once."""
    os.write(1, json.dumps(fields).encode() + b"\n")


def wait(child: int) -> str:
    """How a child ended: `exit 0`, `signal 9`, or `too slow`."""
    stop = time.monotonic() + WALL_SECONDS
    while time.monotonic() < stop:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return f"exit {code}" if code >= 0 else f"signal {-code}"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"too slow: killed after {WALL_SECONDS} s"


def one_child(url: str, without: str | None = None, last: str | None = None) -> None:
    """Takes every step with one store, or those up to the `last`, then ends the process."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (CAP_BYTES, CAP_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (WALL_SECONDS, WALL_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if without:
            UNGUARDED[without]()
        with without_sync():
            for name, step in steps(Path(url)).items():
                take(name, step)
                if name == last:
                    break
        code = 0
    finally:
        os._exit(code)


def take(name: str, step: Callable[[], Any]) -> None:
    """One step: what it gave or raised, the seconds of all processors, and the most memory."""
    say(begin=name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
    started, wall = time.process_time(), time.monotonic()
    error: BaseException | None = None
    gave: Any = None
    try:
        gave = step()
    except Exception as caught:  # noqa: BLE001  the parent judges it
        error = caught
    say(
        step=name,
        reads=name not in WRITING,
        gave=gave,
        error=type(error).__name__ if error else None,
        ours=isinstance(error, actstore.ActstoreError),
        message=str(error) if error else None,
        cpu=time.process_time() - started,
        wall=time.monotonic() - wall,
        peak=peak_bytes(),
    )
    del error
    gc.collect()  # an error holds on to the frames it went through


def peak_bytes() -> int:
    """The most memory this process had since the peak was last set back."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def steps(url: Path) -> dict[str, Callable[[], Any]]:
    """Everything a user would try, those that write last."""

    def opened() -> actstore.store.Store:
        return actstore.api.open(url, partial=True)

    def verified(depth: Any) -> list[str]:
        store = opened()
        report = actstore.verify.verify(actstore.kvstore.Root.of(url), store.plan, depth=depth)
        return [f"{finding.what}: {finding.problem}" for finding in report.findings]

    def repaired() -> None:
        root = actstore.kvstore.Root.of(url)
        plan = opened().plan
        actstore.repair.repair(root, plan, actstore.verify.verify(root, plan))

    def continued() -> None:
        with CONTENTS.create(url) as writer:
            for block in writer.missing():
                activations, columns = CONTENTS.block(block)
                writer.write(block, activations, samples=columns)

    return {
        "open": lambda: repr(actstore.api.open(url)),
        "open partial": lambda: repr(opened()),
        "info": lambda: json.dumps(actstore.cli.describe(opened())),
        "card": lambda: card_of(opened()),
        "dataset": lambda: rows_of(opened().dataset(partial=True)),
        "xarray": lambda: rows_of(xr.open_dataset(url, engine="actstore", raw=True)),
        **{f"batches {number}": lambda number=number: batch_of(opened(), number) for number in range(4)},
        "select": lambda: selected_of(xr.open_dataset(url, engine="actstore")),
        "columns": lambda: columns_of(opened()),
        "text": lambda: texts_of(opened()),
        "documents": lambda: documents_of(opened()),
        "head": lambda: len(actstore.cli.row_lines(actstore.api.open(url), np.arange(3), window=4)),
        "verify fast": lambda: verified("fast"),
        "verify full": lambda: verified("full"),
        "garbage": lambda: len(actstore.garbage.find_garbage(actstore.kvstore.Root.of(url)).dead),
        "continue": continued,
        "repair": repaired,
        "continue the repaired": continued,
        "verify the repaired": lambda: verified("full"),
        "dataset of the repaired": lambda: rows_of(opened().dataset()),
    }


def card_of(store: actstore.store.Store) -> list[str]:
    """The lines of the card, and whether it is too long for a notebook."""
    lines = actstore.card.text(actstore.kvstore.Root.of(store.url), store.plan).splitlines()
    return lines + ["WRONG VALUES: more than 128 KiB of HTML"] * (len(store._repr_html_()) > 1 << 17)


def ends(samples: int) -> Iterator[slice]:
    """The first rows of a store, some in the middle and the last."""
    for start in sorted({0, max(samples // 2 - 1, 0), max(samples - 3, 0)}):
        yield slice(start, min(start + 3, samples))


def same(name: str, found: np.ndarray, sites: Any, span: slice) -> list[str]:
    """Says where values differ from those the sound store has, if it has such."""
    known = CONTENTS.rows.get(name, CONTENTS.columns.get(name))
    if known is None or sites != CONTENTS.layout.sites:
        return []
    expected = known[..., span, :] if name in CONTENTS.rows else known[span]
    return [] if np.array_equal(found.astype(np.float64), expected.astype(np.float64)) else [f"WRONG VALUES in {name}"]


def selected_of(dataset: xr.Dataset) -> list[str]:
    """Finds the rows of a document."""
    rows, documents = dataset.acts.sel(document=0).acts.rows, CONTENTS.columns["document"]
    if dataset.sizes["sample"] != len(documents) or np.array_equal(rows, np.flatnonzero(documents == 0)):
        return []
    return ["WRONG VALUES in a selection"]


def rows_of(dataset: xr.Dataset) -> list[str]:
    """Reads some rows of every variable."""
    wrong = []
    samples = dataset.sizes["sample"]
    sites = CONTENTS.layout.sites if samples <= CONTENTS.layout.samples else ()
    for name, variable in dataset.variables.items():
        for span in ends(samples):
            where = {"sample": span} if "sample" in variable.dims else {}
            wrong += same(str(name), dataset[name].isel(where).values, sites, span)
    return wrong


def batch_of(store: actstore.store.Store, number: int) -> list[str]:
    """One batch of the first layer of a site, compared row by row."""
    if number >= len(store.sites):
        return []
    site, layers = store.sites[number].name, store.sites[number].layers
    settings = {"batch_size": 8, "seed": 1, "window_bytes": 256 << 20}
    with store.batches(site=site, layer=layers[0] if layers else None, **settings) as batches:
        batch = batches.next_batch()
    if store.plan.layout != CONTENTS.layout:
        return []
    known = CONTENTS.rows[site]
    expected = (known[0] if layers else known)[batch.samples]
    wrong = not np.array_equal(batch.rows.astype(np.float64), expected.astype(np.float64))
    return [f"WRONG VALUES in a batch of {site}"] * wrong


def columns_of(store: actstore.store.Store) -> list[str]:
    wrong = []
    for span in ends(store.samples):
        for column in store.plan.layout.columns:
            values = store.column(column.name, np.arange(span.start, span.stop))
            wrong += same(column.name, values, store.plan.layout.sites, span)
    return wrong


def texts_of(store: actstore.store.Store) -> list[str]:
    wrong = []
    for span in ends(store.samples):
        wrong += [str(len(shown.token)) for shown in store.text(range(span.start, span.stop)) if len(shown.token) > 99]
    return wrong


def documents_of(store: actstore.store.Store) -> list[str]:
    """Every column of the first and last document."""
    documents, table, wrong = store.documents, CONTENTS.documents, []
    wanted = np.array([0, len(documents) - 1])
    assert table is not None
    known: dict[str, Any] = {"id": table.ids, "text": table.texts, **table.columns}
    for column in documents.columns[:20]:
        numbers = column not in ("id", "text", "kind")
        values = list(documents.numbers(column, wanted) if numbers else documents.strings(column, wanted))
        if len(documents) == len(table.ids) and column in known:
            wrong += [f"WRONG VALUES in {column}"] * (values != [known[column][0], known[column][-1]])
    for document in wanted:
        documents.tokens(int(document))
    return wrong


def _with(place: Any, name: str, value: Any) -> Callable[[], None]:
    assert hasattr(place, name), f"{name} is no longer in {place}: nothing would be changed"
    return lambda: setattr(place, name, value)


UNGUARDED: dict[str, Callable[[], None]] = {
    "size of documents": _with(actstore.kvstore.Root, "_look", lambda self, key, most_bytes: None),
    "values of documents": _with(actstore.untrusted, "MAX_VALUES", 1 << 60),
    "length of messages": _with(actstore.schema, "printable", lambda text, *, most: text),
    "size of objects": _with(actstore.objects.Objects, "_check", lambda self, path: None),
    "chunks of a window": _with(
        actstore.batches, "_window_chunks", lambda layout, size, row: size // (row * layout.chunk_samples)
    ),
}
"""What a child can do without: each of these guards stops a hostile store."""


if __name__ == "__main__":
    children()
