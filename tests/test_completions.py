"""`actstore generate`: completions as JSONL, killed and continued, and captured in one pass by `extract`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tokenizers import Tokenizer, normalizers

import extract
from actstore import cli
from actstore.errors import ActstoreError, InputError, PlanMismatchError
from extract.completions import _own_stop
from extract.gathering import PARTIAL, SETTINGS, Gathering
from extract.models import Model, load_model
from extract.models.generate import generate

TINY = extract.model_folder("tiny-qwen2")
TEXTS = [
    "The assert statement",
    "Return a list of the names in the module, sorted by name. If the optional argument is given,",
    "Raise",
    "für Grüße",
    "If the optional argument is given, only names",
    "A string",
]
COLUMNS = {"kind": "topic", "score": 1.5, "page": 3}
OPTIONS = ["--model", "tiny-qwen2", "--max-tokens", "12", "--batch", "2"]
LINE = re.compile(rb"\{.*\}\n")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(TINY)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{number}", "text": text, **COLUMNS} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plan(model: Model, prompts: Path, **settings: Any) -> extract.CompletionPlan:
    documents = extract.open_documents(str(prompts))
    return extract.plan_completions(TINY, documents, model=model, **{"max_tokens": 12, "batch": 2} | settings)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# --- what is written ---


def test_every_line_is_what_the_model_says(model: Model, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    stop = ["."]
    written = extract.write_completions(plan(model, prompts, stop=stop, max_tokens=20), path)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    lines = lines_of(path)
    for text, line in zip(TEXTS, lines, strict=True):
        ids = tokenizer.encode(text).ids
        (tokens,) = generate(model, [ids], max_tokens=20, stop=[tokenizer.token_to_id(".")], padded=(1, 64)).tokens
        assert line["tokens"] == tokens.tolist()
        said = tokens[:-1] if line["finish"] == "stop" else tokens
        assert line["completion"] == tokenizer.decode([*ids, *said])[len(text) :]
        assert line["text"] == line["prompt"] + line["completion"]
        assert line["finish"] == ("stop" if tokens[-1] == tokenizer.token_to_id(".") else "length")
    assert [list(line) for line in lines] == [["id", "prompt", "completion", "text", "tokens", "finish", *COLUMNS]] * 6
    assert [(line["id"], line["prompt"]) for line in lines] == [(f"p{row}", text) for row, text in enumerate(TEXTS)]
    assert {line["finish"] for line in lines} == {"stop", "length"}
    assert (written.prompts_computed, written.stopped) == (6, [line["finish"] for line in lines].count("stop"))
    assert written.tokens_computed == sum(len(line["tokens"]) for line in lines)
    assert sorted(it.name for it in tmp_path.iterdir()) == [
        "answers.jsonl",
        f"answers.jsonl{SETTINGS}",
        "prompts.jsonl",
    ]


def test_drawn_completions_do_not_depend_on_the_other_prompts(model: Model, prompts: Path, tmp_path: Path) -> None:
    sampling = extract.Sampling(temperature=1.0, seed=5)
    extract.write_completions(plan(model, prompts, sampling=sampling), tmp_path / "all.jsonl")
    documents = extract.open_documents(str(prompts))[::-2]
    some = extract.plan_completions(TINY, documents, model=model, max_tokens=12, batch=2, sampling=sampling)
    extract.write_completions(some, tmp_path / "some.jsonl")
    assert lines_of(tmp_path / "some.jsonl") == lines_of(tmp_path / "all.jsonl")[::-2]


def test_few_shapes_are_computed_and_the_widest_first(model: Model, prompts: Path) -> None:
    decided = plan(model, prompts)
    shapes = [(decided.width(batch[0]), len(batch)) for batch in decided.batches(range(6))]
    assert shapes == sorted(shapes, key=lambda shape: -shape[0])
    assert {width for width, _ in shapes} <= {16, 32, 64}
    assert sorted(number for batch in decided.batches({5, 0, 2}) for number in batch) == [0, 2, 5]
    assert all(decided.width(number) >= len(decided.prompt(number)) for number in range(6))
    assert re.search(r"memory +\d+ MB at most, beside the model", decided.describe())


def test_extract_captures_prompt_and_completion_in_one_pass(model: Model, prompts: Path, tmp_path: Path) -> None:
    path, store = tmp_path / "answers.jsonl", tmp_path / "run.acts.zarr"
    extract.write_completions(plan(model, prompts), path)
    documents = extract.open_documents(str(path))
    extract.run(extract.make_plan(TINY, documents, layers=[2], context=128, dtype="float32", model=model), str(store))
    dataset, tokenizer = xr.open_dataset(store), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for number, line in enumerate(lines_of(path)):
        ids = np.array(tokenizer.encode(line["text"]).ids)[None]
        _, expected = model.apply(model.params, ids, return_activations=True, layers=(2,))
        rows = dataset.isel(sample=np.flatnonzero(dataset.document.values == number))
        order = np.argsort(rows.position.values)
        np.testing.assert_array_equal(rows.token_id.values[order], ids[0])
        np.testing.assert_allclose(
            rows.resid_post.values[0, order], np.asarray(expected["layer_2"])[0], rtol=1e-4, atol=2e-5
        )
    assert documents[0].columns.keys() >= {"prompt", "completion", "finish", *COLUMNS}


# --- killed, torn, changed ---


def test_killed_by_sigkill_it_continues_to_the_same_bytes(prompts: Path, tmp_path: Path) -> None:
    once, killed = tmp_path / "once.jsonl", tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "actstore", "generate"]
    rest = ["--documents", str(prompts), *OPTIONS, "--temperature", "1", "--top-p", "0.9", "--seed", "3", "--json"]
    subprocess.run([*command, str(once), *rest], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed), *rest], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = killed.with_name(killed.name + PARTIAL)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = len(LINE.findall(partial.read_bytes()))
    assert there >= 1
    assert not killed.exists()
    with partial.open("ab") as file:
        file.write(b'{"row": 5, "tokens": [1, 2')  # a kill in the middle of a write
    again = subprocess.run([*command, str(killed), *rest], check=True, capture_output=True, text=True)
    summary = json.loads(again.stdout)
    assert (summary["prompts_before"], summary["prompts_computed"]) == (there, 6 - there)
    assert killed.read_bytes() == once.read_bytes()
    assert not partial.exists()


TORN = {
    "half a line": b'{"row": 2, "tok',
    "a line without its end": b'{"row": 2, "tokens": [7], "finish": "length"}',
    "zeros after a power failure": bytes(100) + b"\n",
    "a number that is there": b'{"row": 0, "tokens": [7], "finish": "length"}\n',
    "a number that cannot be": b'{"row": 9, "tokens": [7], "finish": "length"}\n',
}


@pytest.mark.parametrize("end", TORN.values(), ids=TORN)
def test_a_torn_end_is_dropped_and_written_again(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "x.jsonl"
    with Gathering(path, {"a": 1}, count=3) as gathering:
        gathering.add({0: {"value": "zero"}, 1: {"value": "one"}})
    with path.with_name("x.jsonl.partial").open("ab") as file:
        file.write(end)
    with Gathering(path, {"a": 1}, count=3) as gathering:
        assert gathering.known == {0, 1}
        gathering.add({2: {"value": "two"}})
        gathering.finish(lambda number, result: {"n": number, "value": result["value"]})
    assert [line["value"] for line in lines_of(path)] == ["zero", "one", "two"]
    with Gathering(path, {"a": 1}, count=3) as gathering:
        assert gathering.complete
        assert gathering.known == {0, 1, 2}


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        Gathering(tmp_path / "x.jsonl", {}, count=3),
        pytest.raises(InputError, match=r"x.jsonl is being written by another process; expected one at a time"),
        Gathering(tmp_path / "x.jsonl", {}, count=3),
    ):
        pass


def test_a_file_that_another_process_finished_is_complete_and_leaves_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    late = Gathering(path, {"a": 1}, count=1)
    assert not late.complete
    with Gathering(path, {"a": 1}, count=1) as first:
        first.add({0: {"value": "zero"}})
        first.finish(lambda _, result: result)
    with late:
        assert late.complete
        assert late.known == {0}
    assert {it.name for it in tmp_path.iterdir()} == {path.name, path.name + SETTINGS}
    assert [line["value"] for line in lines_of(path)] == ["zero"]


def test_other_settings_are_refused_by_name(model: Model, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    extract.write_completions(plan(model, prompts), path)
    before = path.read_bytes()
    drawn = plan(model, prompts, sampling=extract.Sampling(temperature=1.0), max_tokens=13)
    with pytest.raises(
        PlanMismatchError,
        match=r"answers.jsonl holds another run, with 2 differing fields \(max_tokens: there 12, here 13; "
        r"sampling.temperature: there 0.0, here 1.0\); choose another target",
    ):
        extract.write_completions(drawn, path)
    prompts.write_text(prompts.read_text().replace('"page": 3', '"page": 4'))
    with pytest.raises(PlanMismatchError, match=r"1 differing fields \(prompts.sha256"):
        extract.write_completions(plan(model, prompts), path)
    assert path.read_bytes() == before


# --- what is refused ---


OWN_STOPS: dict[str, tuple[dict[str, str], str | tuple[int, ...]]] = {
    "one": ({"generation_config.json": '{"eos_token_id": 7}'}, (7,)),
    "several": ({"generation_config.json": '{"eos_token_id": [9, 7]}'}, (7, 9)),
    "none there": ({"generation_config.json": "{}", "config.json": '{"eos_token_id": 5}'}, (5,)),
    "nowhere": ({"config.json": "{}"}, ()),
    "no JSON": (
        {"generation_config.json": "{'eos'"},
        r"found generation_config.json that is not JSON \(.*\); expected a JSON object; write or download .*; or give",
    ),
    "no object": (
        {"generation_config.json": "[7]"},
        "found generation_config.json with a list; expected a JSON object; write or download .* again; or give --stop",
    ),
    "a word": (
        {"generation_config.json": '{"eos_token_id": "x"}'},
        "eos_token_id 'x' in .*generation_config.json; expected the number of a token, or a list of such; corr",
    ),
    "words": ({"generation_config.json": '{"eos_token_id": [7, "x"]}'}, r"found eos_token_id \[7, 'x'\] in .*generat"),
    "half": ({"config.json": '{"eos_token_id": 2.5}'}, "found eos_token_id 2.5 in .*/config.json; expected the number"),
    "true": (
        {"config.json": '{"eos_token_id": true}'},
        "found eos_token_id True in .*config.json; expected the number",
    ),
}


@pytest.mark.parametrize(("files", "expected"), OWN_STOPS.values(), ids=OWN_STOPS)
def test_the_end_of_text_of_a_model(tmp_path: Path, files: dict[str, str], expected: str | tuple[int, ...]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if isinstance(expected, tuple):
        assert _own_stop(tmp_path) == expected
    else:
        with pytest.raises(InputError, match=expected):
            _own_stop(tmp_path)


def test_a_broken_generation_config_is_one_line_before_the_model_is_loaded(prompts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "generation_config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"^found generation_config.json that is not JSON .*; or give --stop$"):
        extract.plan_completions(folder, extract.open_documents(str(prompts)))


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PLANS = {
    "no tokens asked for": ({"max_tokens": 0}, [{"text": "a"}], "max_tokens is 0; expected at least 1"),
    "no batch": ({"batch": 0}, [{"text": "a"}], "batch is 0; expected at least 1"),
    "unknown stop token": (
        {"stop": ["<|im_ned|>"]}, [{"text": "a"}],
        r"stop '<\|im_ned\|>' is not a token of the tokenizer; expected one token, such as <\|endoftext\|>, <",
    ),
    "too long": (
        {"max_tokens": 2040}, [{"id": "a", "text": "word " * 50}, {"id": "b", "text": "x"}],
        r"1 prompts are too long, the first is 'a' with \d+ tokens: expected at most 8, since 2040 more must fit into",
    ),
    "fields of its own": ({}, [{"text": "a", "finish": "b", "prompt": "c"}], "the prompts have fields finish, prompt,"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "lines", "message"), PLANS.values(), ids=PLANS)
def test_what_cannot_be_completed(model: Model, tmp_path: Path, settings: Any, lines: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(model, write(tmp_path / "p.jsonl", *lines), **settings)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["actstore", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


COMMANDS = {
    "negative temperature": (["--temperature", "-1"], "temperature is -1.0; expected 0, which is greedy, or more"),
    "share of nothing": (["--temperature", "1", "--top-p", "0"], "top_p is 0.0; expected more than 0 and at most 1"),
    "without effect": (["--top-k", "5"], "top_k or top_p is given with temperature 0"),
    "unknown end": (["--stop", "nonsense here"], "stop 'nonsense here' is not a token of the tokenizer"),
}


@pytest.mark.parametrize(("options", "message"), COMMANDS.values(), ids=COMMANDS)
def test_wrong_options_are_one_line_and_code_2(
    monkeypatch: Any, capsys: Any, tmp_path: Path, prompts: Path, options: list[str], message: str
) -> None:
    assert run(monkeypatch, tmp_path / "x.jsonl", "--documents", prompts, *OPTIONS, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "x.jsonl").exists()


TARGETS = {
    "ending": ("x.txt", r"x.txt ends in '.txt'; expected .jsonl, so that `extract` can read it; rename it"),
    "in the way": ("prompts.jsonl", r"prompts.jsonl is there, without prompts.jsonl.settings.json that would say"),
    "folder": ("folder.jsonl", r"folder.jsonl is a folder; expected a file or nothing there"),
    "below a file": (
        "prompts.jsonl/x.jsonl",
        r"could not write to .*: (File exists|Not a directory); check the target",
    ),
}


@pytest.mark.parametrize(("name", "message"), TARGETS.values(), ids=TARGETS)
def test_targets_that_are_refused(tmp_path: Path, prompts: Path, name: str, message: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ActstoreError, match=message):
        Gathering(tmp_path / name, {}, count=1)


def test_a_second_run_computes_nothing_and_says_so(
    monkeypatch: Any, capsys: Any, tmp_path: Path, prompts: Path
) -> None:
    arguments = [tmp_path / "x.jsonl", "--documents", prompts, *OPTIONS]
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert re.match(r".*x.jsonl is complete: 6 of 6 prompts computed, 0 were there before; \d+ tokens", shown.out)
    assert re.search(r"^generate: 6 of 6 prompts, [\d,]+ tokens/s$", shown.err, re.M)
    assert run(monkeypatch, *arguments, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["prompts_before"], summary["prompts_computed"]) == (6, 6, 0)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """The tiny model with a chat template that takes no system message, and a tokenizer that drops tildes."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    engine = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    engine.normalizer = normalizers.Replace("~", "")
    engine.save(str(folder / "tokenizer.json"))
    return folder


def test_prompts_that_the_model_cannot_read_are_counted_where_they_are_to_be_skipped(
    monkeypatch: Any, capsys: Any, tmp_path: Path, chat_model: Path
) -> None:
    user = {"role": "user", "content": "Return a list"}
    good = [{"id": "a", "messages": [user], "page": 1}, {"id": "d", "text": "Raise", "page": 4}]
    bad = [
        {"id": "b", "messages": [{"role": "system", "content": "Be brief."}, user], "page": 2},
        {"id": "c", "text": "~~", "page": 3},
    ]
    write(tmp_path / "good.jsonl", *good)
    write(tmp_path / "mixed.jsonl", good[0], *bad, good[1])
    write(tmp_path / "bad.jsonl", *bad)
    options = ["--model", chat_model, "--max-tokens", "4", "--batch", "2", "--stop", "."]
    assert run(monkeypatch, tmp_path / "x.jsonl", "--documents", tmp_path / "good.jsonl", *options) == 0
    capsys.readouterr()
    target = tmp_path / "y.jsonl"
    assert run(monkeypatch, target, "--documents", tmp_path / "mixed.jsonl", *options, "--on-error", "skip") == 0
    assert re.search(
        r"^passed over 2 that are no documents \(1 empty, 1 refused chat\): mixed.jsonl:2: the chat template of .* "
        r"refuses these messages: no system here; document 'c' \(mixed.jsonl:3\) has no tokens$",
        capsys.readouterr().err,
        re.M,
    )
    assert [(line["id"], line["page"]) for line in lines_of(target)] == [("a", 1), ("d", 4)]
    assert target.read_bytes() == (tmp_path / "x.jsonl").read_bytes()

    assert run(monkeypatch, tmp_path / "z.jsonl", "--documents", tmp_path / "mixed.jsonl", *options) == 2
    assert re.search(r"^error: mixed.jsonl:2: the chat template of .* refuses these", capsys.readouterr().err, re.M)
    skipped = [*options, "--on-error", "skip"]
    assert run(monkeypatch, tmp_path / "z.jsonl", "--documents", tmp_path / "bad.jsonl", *skipped) == 2
    assert re.search(
        r"^error: there are no documents to read \(passed over 2 that are no documents \(1 empty, 1 refused chat\)",
        capsys.readouterr().err,
        re.M,
    )
    assert not (tmp_path / "z.jsonl").exists()
