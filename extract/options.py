"""Options that several commands share, written once."""

import inspect
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from actstore.errors import InputError
from actstore.logs import log_as_json, logs_json

if TYPE_CHECKING:
    from extract.costs import Speeds
    from extract.ranks import Rank
    from extract.sources import Documents, OnError

MOST_PORTS = 1 << 16
Command = TypeVar("Command", bound=Callable[..., Any])


def takes(*shared: Callable[..., Any]) -> Callable[[Command], Command]:
    """Gives a command the options of other functions, which come to it as keywords.

    Args:
        shared: Functions whose parameters are options. The command has `**name` for them; where it has one of the
            same name, its own is taken.
    """

    def join(command: Command) -> Command:
        functions: list[Callable[..., Any]] = [command, *shared]
        signatures = [inspect.signature(function) for function in functions]
        parameters: dict[str, inspect.Parameter] = {}
        for signature in signatures:
            for name, parameter in signature.parameters.items():
                if parameter.kind is not parameter.VAR_KEYWORD:
                    parameters.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY))
        joined = signatures[0].replace(parameters=[*parameters.values()])
        command.__signature__ = joined  # type: ignore[attr-defined]
        command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
        return command

    return join


def documents_of(
    documents: Annotated[
        str,
        typer.Option(
            "--documents",
            help="a .jsonl (also .gz, .zst), .parquet, .txt, .md or .rst file, a folder of such files or of a saved "
            "dataset, datasets:NAME[:SPLIT], or python-docs",
        ),
    ],
    text_field: Annotated[str, typer.Option(help="field of a record that holds the text")] = "text",
    id_field: Annotated[str, typer.Option(help="field that holds the id, if there is one")] = "id",
    columns: Annotated[
        str | None, typer.Option(help="fields to keep, with commas between; default all numbers and texts")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a column with one value for all documents; may be repeated")
    ] = None,
    splits: Annotated[
        str | None, typer.Option(help="a column `split`, by a hash of the id: train=0.9,val=0.05,test=0.05")
    ] = None,
    on_error: Annotated[str, typer.Option(help="of what is no document: error, or skip and count it")] = "error",
    skip: Annotated[int, typer.Option(help="pass over this many documents of the source")] = 0,
    limit: Annotated[int | None, typer.Option(help="read this many documents and no more")] = None,
) -> "Documents":
    """The documents of a command's options, not read yet.

    Raises:
        InputError: an option that cannot be.
    """
    from extract.documents import Fields
    from extract.sources import Documents
    from extract.splits import Splits

    names = None if columns is None else tuple(name.strip() for name in columns.split(",") if name.strip())
    return Documents(
        documents, fields=Fields(text=text_field, id=id_field, columns=names), limit=limit, skip=skip,
        on_error=cast("OnError", on_error), labels=_labels(label or []),
        splits=None if splits is None else Splits.parse(splits),
    )  # fmt: skip


def reading(
    context: Annotated[int, typer.Option(help="tokens the model sees at once")] = 256,
    batch: Annotated[int, typer.Option(help="contexts per forward pass")] = 8,
    packing: Annotated[
        str,
        typer.Option(
            help="best-fit, best-fit-decreasing, auto (whichever of both pads less), single (a context for each piece) "
            "or concatenated (one stream, cut)"
        ),
    ] = "auto",
    too_long: Annotated[str, typer.Option(help="of documents longer than a context: cut, truncate or error")] = "cut",
    rows: Annotated[
        str,
        typer.Option(
            help='tokens to keep: all, last, first(4), every(8), fraction(0.1), completion, kind("word"), ...'
        ),
    ] = "all",
    rows_per_document: Annotated[int | None, typer.Option(help="at most so many rows of a document, at random")] = None,
    bos: Annotated[
        str, typer.Option(help="before every text: model (what its tokenizer puts), always or never")
    ] = "model",
    eos: Annotated[str, typer.Option(help="after every text: always or never")] = "never",
    answer: Annotated[
        bool, typer.Option("--answer", help="end chats of a user's last message with what comes before an answer")
    ] = False,
    chat_date: Annotated[str | None, typer.Option(help="for chat templates that write a date: 2026-07-26")] = None,
    tokens_folder: Annotated[
        str | None, typer.Option(help="keep tokens there while they are made, for more than memory holds")
    ] = None,
) -> dict[str, Any]:
    """How documents become rows, as `make_plan` takes it."""
    return {
        "context": context, "batch": batch, "packing": packing, "too_long": too_long, "rows": rows,
        "rows_per_document": rows_per_document, "bos": bos, "eos": eos, "answer": answer, "chat_date": chat_date,
        "tokens_folder": tokens_folder,
    }  # fmt: skip


def places(
    sites: Annotated[
        str, typer.Option(help="places to keep, patterns such as resid_*, or names of hooks, with commas between")
    ] = "resid_post",
    layers: Annotated[
        str | None, typer.Option(help="layers to keep, with commas between; default 6,12,18,23 or quarters")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the stored rows: bfloat16, float16 or float32")] = "bfloat16",
    codec: Annotated[str, typer.Option(help="of the stored chunks: crc32c, none or zstd")] = "crc32c",
    block_samples: Annotated[
        int | None, typer.Option(help="samples per block; default aims at shards of 128 MiB")
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="devices as DATA,MODEL; default as many as divide --batch, and 1; a CPU has JAX_NUM_CPU_DEVICES"
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="kernel: chunked anywhere, splash on TPUs, cudnn on NVIDIA GPUs (default there); part of the plan"
        ),
    ] = None,
) -> dict[str, Any]:
    """What is computed and how it is stored, as `make_plan` takes it.

    Raises:
        InputError: layers or a mesh that are no numbers.
    """
    return {
        "sites": [site.strip() for site in sites.split(",")], "layers": layer_numbers(layers), "dtype": dtype,
        "codec": codec, "block_samples": block_samples, "mesh": mesh_sizes(mesh), "attention": attention,
    }  # fmt: skip


def workers(
    num_processes: Annotated[
        int | None, typer.Option(help="how many run this command; default what the launcher says, or 1")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(help="number of this one, from 0; default what the launcher says")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of process 0, or auto for what the launcher says; only for a --mesh that spans processes: "
            "they compute together"
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(help="what says which process this is: auto, openmpi, slurm, tpu (GKE too), kubernetes or none"),
    ] = "auto",
) -> "Rank":
    """Which worker this process is. Joins the others where they compute together, before anything else of JAX.

    On a host of a TPU slice a process that does not join the others takes the chips of its own host.

    Raises:
        InputError: options or a launcher's variables that do not fit; others that cannot be reached.
    """
    from extract.ranks import resolve
    from extract.tpu_vm import TpuVm

    machine = TpuVm(os.environ)
    rank = resolve(process_id, num_processes, machine, launcher=launcher)
    if logs_json():
        log_as_json(worker=rank.rank, workers=rank.workers)
    if coordinator is not None:
        _join(rank, coordinator)
    elif rank.workers > 1 and launcher != "none":
        os.environ.update(machine.alone())
    return rank


def reporting(
    log: Annotated[str, typer.Option(help="on standard error: text, or json for one object a line")] = "text",
    metrics_port: Annotated[
        int | None, typer.Option(help="serve metrics for Prometheus on this port of all interfaces while it runs")
    ] = None,
) -> int | None:
    """The port for metrics; sets up the log.

    Raises:
        InputError: another kind of log, or no port.
    """
    if log not in ("text", "json"):
        raise InputError(f"--log is {log!r}; expected text or json")
    if log == "json":
        log_as_json()
    if metrics_port is not None and not 0 < metrics_port < MOST_PORTS:
        raise InputError(f"--metrics-port is {metrics_port}; expected 1 to {MOST_PORTS - 1}")
    return metrics_port


def _join(rank: "Rank", coordinator: str) -> None:
    """Makes this process one of several that compute together.

    Raises:
        InputError: nobody says where process 0 is, or it cannot be reached.
    """
    from extract.mesh import join

    place = rank.coordinator if coordinator == "auto" else coordinator
    if rank.workers == 1:
        raise InputError("--coordinator was given, and this is process 0 of 1; give --num-processes and --process-id")
    if place is None:
        raise InputError(
            f"--coordinator is auto, and this is {rank}: nothing says where process 0 is; give --coordinator HOST:PORT"
        )
    if not re.fullmatch(r"[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", place):
        raise InputError(f"--coordinator is {place!r}; expected HOST:PORT of process 0, such as host-0:8476, or auto")
    join(place, processes=rank.workers, process=rank.rank)


def limits(
    max_bytes: Annotated[
        str, typer.Option(help="refuse to write more than this, such as 100GB, before anything is computed")
    ] = "1TB",
    yes: Annotated[bool, typer.Option("--yes", help="write it, however much it is")] = False,
) -> int | None:
    """The most bytes that may be written; None for any number.

    Raises:
        InputError: it is no number of bytes.
    """
    most = bytes_of(max_bytes, "--max-bytes")
    return None if yes else most


def speeds(
    hosts: Annotated[int, typer.Option(help="how many will run it")] = 1,
    rate: Annotated[
        str | None,
        typer.Option(help="tokens that one host computes in a second, or measure: as many as this one does"),
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="bytes that the storage takes from all hosts in a second, such as 25GB")
    ] = None,
) -> "Speeds":
    """What decides how long a run takes.

    Raises:
        InputError: they are no positive numbers.
    """
    from extract.costs import Speeds

    if hosts < 1:
        raise InputError(f"--hosts is {hosts}; expected at least 1")
    tokens: float | None = None
    if rate is not None and rate != "measure":
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", rate) or float(rate) == 0:
            raise InputError(f"--rate is {rate!r}; expected tokens in a second, such as 250000, or measure")
        tokens = float(rate)
    size = None if bandwidth is None else float(bytes_of(bandwidth, "--bandwidth"))
    return Speeds(hosts, tokens, size, measured=rate == "measure")


def chosen(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a function of options makes of those of a command that are its own."""
    return function(**{name: given[name] for name in inspect.signature(function).parameters})


def layer_numbers(text: str | None) -> list[int] | None:
    """Numbers of layers.

    Raises:
        InputError: they are none.
    """
    if text is None:
        return None
    for part in text.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", part):
            raise InputError(f"--layers has {part!r}; expected whole numbers with commas between, such as 6,12,18,23")
    return [int(part) for part in text.split(",")]


def mesh_sizes(text: str | None) -> tuple[int, int] | None:
    """The sizes of the two axes of a mesh.

    Raises:
        InputError: it is not two whole numbers.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", text)
    if not found:
        raise InputError(f"--mesh is {text!r}; expected two whole numbers, DATA,MODEL, such as 4,2 for 8 devices")
    return int(found[1]), int(found[2])


def bytes_of(text: str, option: str) -> int:
    """A number of bytes such as `100GB`, `1.5 TiB` or `4096`.

    Raises:
        InputError: it is none, or less than one byte.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kKMGTP]?)(i?)B?\s*", text)
    if found is None or (found[3] and not found[2]):
        raise InputError(f"{option} is {text!r}; expected a number of bytes, such as 100GB, 1.5TB or 64GiB")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGTP".index(found[2].upper() or " "))
    if not size:
        raise InputError(f"{option} is {text!r}; expected at least 1 byte")
    return size


def _labels(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or name in found:
            raise InputError(f"--label is {text!r}; expected NAME=VALUE, each name once, such as run=baseline")
        found[name] = value
    return found
