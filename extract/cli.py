"""Commands that run a model: `plan`, `extract`, `generate`, `demo`, `arc`. They join `actstore` by its entry point."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actstore.card import human_bytes
from actstore.cli import JsonOption
from actstore.errors import InputError
from actstore.logs import logs_json, say
from actstore.terminal import Work
from extract import arc_cli
from extract.console import RunConsole
from extract.named import NAMED_MODELS, model_folder
from extract.options import (
    chosen,
    documents_of,
    layer_numbers,
    limits,
    mesh_sizes,
    places,
    reading,
    reporting,
    speeds,
    takes,
    workers,
)

if TYPE_CHECKING:
    from extract.completions import Written
    from extract.loop import Progress
    from extract.plan import ExtractPlan
    from extract.sources import Documents

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="HuggingFace folder, organisation/model[@revision] of a hub, or one of: " + ", ".join(NAMED_MODELS),
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands of this package to the program."""
    app.command(epilog="Example: actstore plan --model tiny-qwen2 --documents python-docs --layers 1,3")(plan)
    app.command(
        epilog="Example: actstore extract run.acts.zarr --model tiny-qwen2 --documents python-docs --layers 1,3"
    )(extract)
    app.command(epilog="Example: actstore append run.acts.zarr --model tiny-qwen2 --layers 2")(append)
    app.command(
        epilog="Example: actstore generate answers.jsonl --model tiny-qwen2 --documents prompts.jsonl --max-tokens 64"
    )(generate)
    app.command(epilog="Example: actstore demo --folder demo")(demo)
    arc_cli.register(app)


@takes(documents_of, places, reading, speeds, limits)
def plan(
    *,
    model: ModelOption,
    near_duplicates: Annotated[
        float | None, typer.Option(help="report documents that share this part of their runs of 5 tokens, such as 0.8")
    ] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Show what `extract` would compute and write, and what that takes, without computing it."""
    from extract.pace import measure

    known, most = chosen(speeds, options), chosen(limits, options)
    decided = _plan(model, options)
    numbers, lines = decided.as_json(hosts=known.hosts), decided.describe(hosts=known.hosts)
    if known.measured:
        known = dataclasses.replace(known, tokens=measure(decided))
    time = known.of(numbers["tokens_computed"], numbers["bytes"] + numbers["bytes_beside"])
    if time.seconds is not None:
        lines += f"\ntime       {time.describe()}, on {known.hosts:,} host{'s' * (known.hosts > 1)}"
        numbers["time"] = {**dataclasses.asdict(known), **dataclasses.asdict(time), "limit": time.limit}
    if near_duplicates is not None:
        found = decided.near_duplicates(near_duplicates)
        numbers["near_duplicates"] = [dataclasses.asdict(group) for group in found]
        lines += "\n" + decided.describe_duplicates(found)
    typer.echo(json.dumps(numbers) if as_json else lines)
    _refuse_more(decided, most)


@takes(documents_of, places, reading, workers, reporting, limits)
def extract(
    *,
    store: Annotated[str, typer.Argument(metavar="STORE", help="where to write: a path that ends in .acts.zarr")],
    model: ModelOption,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Run a model over documents and store its activations. Stopped or killed, the same command continues."""
    from actstore.kvstore import Root

    port = chosen(reporting, options)
    Root.of(store).check_writable()  # before minutes of tokenising
    rank, most = chosen(workers, options), chosen(limits, options)
    if rank.workers > 1 and options["tokens_folder"] is not None:
        options["tokens_folder"] = str(Path(options["tokens_folder"]) / f"worker-{rank.rank}")
    with RunConsole.open(rank, metrics_port=port) as console:
        _run(_plan(model, options), store, console, most=most, as_json=as_json)


@takes(documents_of, workers, reporting, limits)
def append(
    *,
    store: Annotated[str, typer.Argument(metavar="STORE", help="a finished store, run.acts.zarr")],
    model: ModelOption,
    documents: Annotated[
        str | None, typer.Option("--documents", help="more documents, as in extract: with the store's own settings")
    ] = None,
    sites: Annotated[str | None, typer.Option("--sites", help="more sites, or those of the layers to add")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="more layers of the store's documents")] = None,
    mesh: Annotated[
        str | None, typer.Option("--mesh", help="as in extract; default as many devices as divide the store's batch")
    ] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Add documents, or layers and sites, to a finished store. Stopped or killed, the same command continues."""
    from extract.additions import append_documents, append_layers

    if (documents is None) == (sites is None and layers is None):
        raise InputError("give either --documents, or --layers and --sites for the documents that are there")
    if documents is None and (options["skip"] or options["limit"] is not None):
        raise InputError("--skip and --limit count documents from 0; give them with --documents")
    devices, port, most = mesh_sizes(mesh), chosen(reporting, options), chosen(limits, options)
    with RunConsole.open(chosen(workers, options), metrics_port=port) as console:
        folder = folder_of(model)
        if documents is None:
            names = None if sites is None else [site.strip() for site in sites.split(",")]
            decided = append_layers(store, folder, layers=layer_numbers(layers), sites=names, mesh=devices)
        else:
            texts = chosen(documents_of, {**options, "documents": documents})
            with Work("tokenise", unit="documents") as work:
                decided = append_documents(store, folder, texts, mesh=devices, progress=work.update)
            _say_problems(texts)
        _run(decided, store, console, most=most, as_json=as_json)


def _refuse_more(decided: "ExtractPlan", most: int | None) -> None:
    """Refuses a plan that writes more bytes than were allowed.

    Raises:
        InputError: says how many.
    """
    size = decided.bytes
    if most is not None and size > most:
        raise InputError(
            f"the run would write {human_bytes(size)} of activations, --max-bytes is {human_bytes(most)}; keep fewer "
            "sites, layers or rows (--layers, --rows), or add --yes"
        )


def _run(decided: "ExtractPlan", store: str, console: RunConsole, *, most: int | None, as_json: bool) -> None:
    """Runs a plan and says what was done.

    Raises:
        InputError: it writes more than `most` bytes.
    """
    if console.rank.rank == 0:
        say("plan" if logs_json() else decided.describe(), **decided.as_json())
    _refuse_more(decided, most)
    state = console.run(decided, store)
    summary = {
        "url": store, "blocks": state.blocks, "blocks_before": state.blocks_before,
        "blocks_computed": state.blocks_computed, "samples_computed": state.samples_computed,
        "tokens_computed": state.tokens_computed, "bytes_written": state.bytes_written,
        "seconds": round(state.seconds, 3), "tokens_per_second": round(state.tokens_per_second, 1),
        "rank": state.rank, "workers": state.workers,
        "seconds_for_storage": round(state.seconds_for_storage, 3),
        "seconds_for_device": round(state.seconds_for_device, 3),
        "seconds_for_host": round(state.seconds_for_host, 3), "limit": state.limit,
    }  # fmt: skip
    typer.echo(json.dumps(summary) if as_json else _summary(state, store))


@takes(documents_of)
def generate(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="where to write: a .jsonl file, which extract reads")],
    model: ModelOption,
    max_tokens: Annotated[int, typer.Option(help="most tokens to add to each prompt")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token, always")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from this many of the most likely tokens")] = None,
    top_p: Annotated[float, typer.Option(help="draw from the most likely tokens that have this share together")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="a token that ends a completion, may be repeated; default the model's own")
    ] = None,
    batch: Annotated[int, typer.Option(help="prompts at a time")] = 8,
    chat_date: Annotated[str | None, typer.Option(help="for chat templates that write a date: 2026-07-26")] = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Continue prompts and write the completions as JSONL. Stopped or killed, the same command continues."""
    from extract.completions import plan_completions, write_completions
    from extract.gathering import check_target
    from extract.models.errors import ModelError
    from extract.models.sampling import Sampling

    check_target(path)  # before minutes of tokenising
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    except ModelError as error:
        raise InputError(str(error)) from None
    folder = folder_of(model)
    prompts = documents_of(**options)
    with Work("tokenise", unit="documents") as work:
        decided = plan_completions(
            folder,
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            batch=batch,
            chat_date=chat_date,
            progress=work.update,
        )
    _say_problems(prompts)
    typer.echo(decided.describe(), err=True)
    with Work("generate", unit="prompts") as work:
        state = write_completions(
            decided, path,
            progress=lambda state: work.update(
                state.prompts_before + state.prompts_computed, state.prompts, f"{state.tokens_per_second:,.0f} tokens/s"
            ),
        )  # fmt: skip
    summary = {
        "path": str(path), **dataclasses.asdict(state), "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens_per_second, 1),
    }  # fmt: skip
    typer.echo(json.dumps(summary) if as_json else _written(state, path))


def demo(
    folder: Annotated[Path, typer.Option(help="where to leave the store, the plot and the features")] = Path("demo"),
    model: Annotated[
        str | None, typer.Option(help="as in extract; default smollm2, or tiny-qwen2 where that cannot be fetched")
    ] = None,
    tokens: Annotated[int, typer.Option(help="about how many tokens to read")] = 100_000,
    steps: Annotated[int, typer.Option(help="training steps of the SAE")] = 300,
) -> None:
    """Text to activations to a trained SAE, on a real model: the whole path in a few minutes."""
    from extract.demo.path import run_demo

    run_demo(folder, model=folder_of, name=model, tokens=tokens, steps=steps, say=typer.echo)


def folder_of(model: str) -> Path:
    """The folder of a model, with progress where it has to be fetched first.

    Raises:
        InputError: it cannot be fetched.
    """
    with Work("fetch the model", unit="steps or bytes") as work:
        return model_folder(model, progress=lambda label, done, total: work.update(done, total, label))


def _plan(model: str, options: dict[str, Any]) -> "ExtractPlan":
    """The plan of a command's options.

    Raises:
        InputError: anything in them that would fail later.
    """
    from extract.planning import make_plan

    texts, where, how = (chosen(function, options) for function in (documents_of, places, reading))
    folder = folder_of(model)
    with Work("tokenise", unit="documents") as work:
        decided = make_plan(folder, texts, progress=work.update, **where, **how)
    _say_problems(texts)
    return decided


def _say_problems(documents: "Documents") -> None:
    """Says what was passed over."""
    if problems := documents.describe_problems():
        say(problems)


def _summary(state: "Progress", store: str) -> str:
    """What a run did, for a person."""
    if state.blocks_before == state.blocks:
        return f"{store} is complete; all {state.blocks} blocks were there before, nothing was computed"
    here = "" if state.workers == 1 else f" by this worker, {state.rank} of {state.workers}"
    seconds = max(state.seconds, 1e-9)
    return (
        f"{store} is complete: {state.blocks_computed} of {state.blocks} blocks computed{here}, {state.blocks_before} "
        f"were there before; {state.samples_computed:,} samples, {human_bytes(state.bytes_written)} written in "
        f"{state.seconds:.1f} s: {state.tokens_per_second:,.0f} tokens/s, "
        f"{human_bytes(int(state.bytes_per_second))}/s\n"
        f"limited by the {state.limit}: {state.seconds_for_device / seconds:.0%} of the time waiting for the device, "
        f"{state.share_for_storage:.0%} for storage, {state.seconds_for_host / seconds:.0%} on input and "
        "copying"
    )


def _written(state: "Written", path: Path) -> str:
    """What `generate` did, for a person."""
    if not state.prompts_computed:
        return f"{path} is complete; all {state.prompts:,} completions were there before, nothing was computed"
    return (
        f"{path} is complete: {state.prompts_computed:,} of {state.prompts:,} prompts computed, "
        f"{state.prompts_before:,} were there before; {state.tokens_computed:,} tokens, {state.stopped:,} stopped by "
        f"themselves, in {state.seconds:.1f} s, {state.tokens_per_second:,.0f} tokens/s"
    )
