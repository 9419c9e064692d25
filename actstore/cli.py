"""The command line `actstore`. Commands of other packages join through the entry-point group `actstore.commands`.

Exit codes: 0 done; 1 a fault of actstore itself; 2 wrong input, nothing was done; 3 the storage failed, try again;
4 the store is damaged; 75 stopped, the same command continues.
"""

import dataclasses
import importlib.metadata
import json
import sys
from typing import Annotated, Any

import numpy as np
import typer

import actstore
from actstore.errors import ActstoreError, CorruptStoreError, InputError
from actstore.garbage import find_garbage, remove_garbage
from actstore.kvstore import Root
from actstore.ledger import abandon as abandon_addition
from actstore.repair import repair as repair_store
from actstore.schema import printable
from actstore.terminal import Work, human_bytes
from actstore.verify import Depth, Report
from actstore.verify import verify as verify_store

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
    "gguf": "demo", "matplotlib": "demo", "optax": "demo",
}  # fmt: skip
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="path of a store, run.acts.zarr")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a program")]


def main() -> None:
    """Runs the command line. Errors of actstore become one line on standard error and their exit code."""
    for entry in importlib.metadata.entry_points(group="actstore.commands"):
        entry.load()(app)
    try:
        app()
    except ActstoreError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        extra = f"actstore[{EXTRA_OF[error.name]}]"
        typer.echo(f"error: {error.name} is not installed, this command needs it; run: pip install '{extra}'", err=True)
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
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds, finished or not."""
    card = describe(actstore.open(store, partial=True))
    if as_json:
        typer.echo(json.dumps(card))
        return
    for name, value in card.items():
        shown = "; ".join(str(part) for part in value) if isinstance(value, list) else str(value)
        text = human_bytes(value) if name == "bytes" else printable(shown, most=2000)  # names may hold escape codes
        typer.echo(f"{name:<12} {text}")


@app.command(epilog="Example: actstore head run.acts.zarr --count 5 --window 8")
def head(
    store: StoreArgument,
    count: Annotated[int, typer.Option(help="number of rows")] = 10,
    start: Annotated[int, typer.Option(help="first row")] = 0,
    window: Annotated[int, typer.Option(help="tokens of context on each side")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show rows with their tokens in context, and their norm at every layer."""
    opened = actstore.open(store)
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


def describe(store: actstore.Store) -> dict[str, Any]:
    """The facts of `actstore info` by name. Costs one listing."""
    layout, plan = store.plan.layout, store.plan
    model = plan.provenance.get("model")
    return {
        "url": store.url,
        "status": "complete" if store.complete else "unfinished",
        "committed": f"{store.committed} of {len(plan.blocks)} blocks",
        "generation": plan.generation,
        "model": str(model.get("name", "unknown")) if isinstance(model, dict) else "unknown",
        "sites": [
            f"{site.name} {'' if site.layers is None else list(site.layers)} x {site.width} {site.dtype}"
            for site in layout.sites
        ],
        "samples": layout.samples,
        "documents": sum(table.documents for table in plan.tables if table),
        "bytes": layout.data_bytes,
        "shards": f"{layout.block_samples} samples, chunks of {layout.chunk_samples}, {layout.codec}",
        "columns": [column.name for column in layout.columns],
        "format": plan.format,
        "fingerprint": plan.fingerprint,
    }


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


def _by_layer(site: actstore.Site, norms: np.ndarray) -> dict[str, float]:
    """Norms of one row by layer label; a layerless site has the label `-`."""
    labels = ["-"] if site.layers is None else [str(layer) for layer in site.layers]
    return dict(zip(labels, norms.round(3).tolist(), strict=True))


def _verify(store: str, depth: Depth) -> Report:
    """Verifies with progress."""
    opened = actstore.open(store, partial=True)
    with Work("verify", unit="shards") as work:
        return verify_store(Root.of(store), opened.plan, depth=depth, progress=work.update)


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
    text = f"{line['before']}\u27e6{line['token']}\u27e7{line['after']}".replace("\n", "\u23ce")
    return f"{line['sample']:>8}  {columns}  {norms}\n          {text}"
