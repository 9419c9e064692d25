"""Runs the code of the documentation, and checks that every command, option and public name is documented.

A page with `executed: true` in its front matter is run from top to bottom, in one namespace and one temporary folder:
`python` blocks here, `console` lines in a shell. Blocks of another kind (`text`, `shell`) are not run.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import actstore
import extract
from actstore import errors
from actstore.cli import app
from extract import arc
from extract.cli import register

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts
}
TEXTS = PAGES | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
EXECUTED = [name for name, text in PAGES.items() if text.startswith("---\nexecuted: true\n---\n")]

LONG = {  # the slowest; what they show is tested elsewhere too
    "explanation/shuffling.md", "how-to/append.md", "how-to/arc.md", "how-to/documents-and-rows.md",
    "how-to/generate.md", "how-to/resume-and-kill.md", "how-to/several-processes.md",
}  # fmt: skip


class Block(NamedTuple):
    """One fenced block of a page."""

    kind: str
    line: int
    code: str


def blocks_of(text: str) -> list[Block]:
    return [
        Block(match[1], text[: match.start(2)].count("\n"), match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run_page(name: str, text: str, folder: Path) -> None:
    """Runs all blocks of a page in `folder`, which must be the working folder."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(text):
        if block.kind == "python":
            code = compile("\n" * block.line + block.code, name, "exec")  # tracebacks show lines of the page
            exec(code, namespace)
        elif block.kind == "console":
            run_console(block.code, folder)


def run_console(code: str, folder: Path) -> None:
    commands = [line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ ")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = "set -e\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"


# --- examples ---


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Pages start many processes that run the same small models: each program is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in EXECUTED]
)
def test_page_runs(name, compiled, tmp_path, monkeypatch):
    for library in ("anndata", "pyarrow", "torch"):
        if f"import {library}" in PAGES[name]:
            pytest.importorskip(library, reason=f"NOT CHECKED: {library} is not installed here, and {name} uses it")
    monkeypatch.chdir(tmp_path)
    run_page(name, PAGES[name], tmp_path)


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "extract").symlink_to(ROOT / "extract")
    code = [block for block in blocks_of(TEXTS["README.md"]) if block.kind == "python"]
    assert code
    run_page("README.md", "".join(f"```python\n{block.code}```\n" for block in code), tmp_path)


def test_meta_a_wrong_example_fails(tmp_path):
    with pytest.raises(AttributeError, match="no_such_name"):
        run_page("page", "```python\nimport actstore\n```\ntext\n```python\nactstore.no_such_name\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="false"):
        run_page("page", "```console\n$ false\n$ echo not reached\n```\n", tmp_path)


def test_every_page_with_code_is_run():
    assert len(EXECUTED) >= 6
    assert set(EXECUTED) > LONG
    for name, text in PAGES.items():
        kinds = {block.kind for block in blocks_of(text)}
        assert name in EXECUTED or not kinds & {"python", "console"}, name


def test_pages_speak_of_no_place_on_one_machine():
    for name, text in TEXTS.items():
        assert absolute_paths(text) == [], name


def absolute_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.:/<>*~}\])-])/(?:[a-z][\w.-]*/)+[\w.-]*", text)


def test_meta_an_absolute_path_would_be_found():
    assert absolute_paths("in `/tmp/lab/x`, see actstore/cli.py, https://zarr.dev/a/b and c/0/0") == ["/tmp/lab/x"]


# --- commands ---


@functools.cache
def program() -> Any:
    full = typer.Typer(add_completion=False)
    full.registered_commands = list(app.registered_commands)
    full.registered_groups = list(app.registered_groups)
    full.registered_callback = app.registered_callback
    if not any(command.callback and command.callback.__name__ == "demo" for command in full.registered_commands):
        register(full)
    group = typer.main.get_command(full)
    assert hasattr(group, "commands")
    return group


def actual_options(group: Any) -> dict[str, dict[str, str]]:
    """Per command: each option with its default, as the page writes it."""

    def options(command: Any) -> dict[str, str]:
        found = {}
        for parameter in command.params:
            if parameter.param_type_name != "option" or "--help" in parameter.opts:
                continue
            default = "" if parameter.default is None or parameter.is_flag else str(parameter.default)
            found[parameter.opts[0]] = "required" if parameter.required else default
        return found

    found = {"actstore": options(group)}
    for name, command in group.commands.items():
        within = getattr(command, "commands", {})  # of a group such as `arc`, which has no options of its own
        found |= {f"actstore {name} {part}": options(it) for part, it in within.items()}
        found |= {} if within else {f"actstore {name}": options(command)}
    return found


def documented_options(text: str) -> dict[str, dict[str, str]]:
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0]: dict(re.findall(r"^\| `(--[\w-]+)` \| ?([^|]*?) ?\|", part, re.MULTILINE))
        for part in sections
    }


def test_every_command_and_option_is_documented():
    assert documented_options(PAGES["reference/cli.md"]) == actual_options(program())


def test_meta_a_missing_command_option_or_default_would_be_found():
    text, actual = PAGES["reference/cli.md"], actual_options(program())
    for wrong in (
        text.replace("## actstore head", "## actstore tail"),
        text.replace("| `--start` | 0 | first row |\n", ""),
        text.replace("| `--context` | 256 |", "| `--context` | 512 |"),
        text.replace("## actstore arc score", "## actstore arc scores"),
        text + "\n## actstore repair\n",
    ):
        assert wrong != text
        assert documented_options(wrong) != actual


def commands_of(text: str) -> list[list[str]]:
    """The arguments of every `actstore ...` line in blocks that a reader may copy."""
    lines = [
        re.split(r"\s+#|\s*\|\||\s*&", line)[0]
        for block in blocks_of(text)
        if block.kind in {"console", "shell"}
        for line in block.code.splitlines()
    ]
    return [shlex.split(line[line.index("actstore ") :])[1:] for line in lines if "actstore " in line]


def check_command(arguments: list[str]) -> None:
    """Parses the arguments of a command without running it."""
    command, rest = program(), arguments
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    command.make_context(name, rest)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if commands_of(text)])
def test_commands_of_the_pages_exist(name):
    for arguments in commands_of(TEXTS[name]):
        check_command(arguments)


def test_meta_a_wrong_command_would_be_found():
    (arguments,) = commands_of("```shell\nactstore extrct x.acts.zarr\n```\n")
    with pytest.raises(KeyError, match="extrct"):
        check_command(arguments)
    for wrong in ("info x.acts.zarr --no-such", "extract x.acts.zarr --model m", "head x.acts.zarr --count many"):
        (arguments,) = commands_of(f"```console\n$ actstore {wrong} || echo failed\n```\n")
        with pytest.raises(Exception, match=r"no-such|documents|integer"):
            check_command(arguments)


# --- names ---


def documented_names(text: str) -> set[str]:
    return set(re.findall(r"^\.\. auto(?:function|class|exception):: ([\w.]+)$", text, re.MULTILINE))


def public_names() -> set[str]:
    names = {f"actstore.{name}" for name in actstore.__all__} | {f"extract.{name}" for name in extract.__all__}
    names |= {f"extract.arc.{name}" for name in arc.__all__ if name not in {"Grid", "SYSTEM"}}  # values, in the text
    return names | {"actstore.accessor.Acts"}  # as `dataset.acts`


def test_every_public_name_is_documented():
    assert documented_names(PAGES["reference/api.md"]) == public_names()


def test_meta_an_undocumented_name_would_be_found():
    text = PAGES["reference/api.md"].replace(".. autofunction:: extract.run\n", "")
    assert public_names() - documented_names(text) == {"extract.run"}


def error_tree(text: str) -> str:
    found = re.search(r"^( *)ActstoreError .*?\n(?=```|\n)", text, re.MULTILINE | re.DOTALL)
    assert found
    return textwrap.dedent(found[0])


def test_the_tree_of_errors_is_that_of_the_code():
    tree = error_tree(PAGES["reference/errors.md"])
    assert tree == error_tree(errors.__doc__ or "")
    documented = {
        name: int(code) for name, code in re.findall(r"(\w+Error) +(?:exit code )?(\d+)(?:\s|$)", tree)
    }  # fmt: skip
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")}
    assert documented == {name: kind.exit_code for name, kind in classes.items() if name != "ClassVar"}


# --- architecture ---


def documented_modules(text: str, package: str) -> set[str]:
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    (section,) = [it for it in part if it.startswith(f"Storeys of {package}")]
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", section, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def modules_of(package: str) -> set[str]:
    inside = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    return inside - {"__init__", "__main__"}


@pytest.mark.parametrize("package", ["actstore", "extract"])
def test_every_module_has_its_storey(package):
    assert documented_modules(PAGES["explanation/architecture.md"], package) == modules_of(package)


def test_meta_a_module_without_a_storey_would_be_found():
    text = PAGES["explanation/architecture.md"].replace("`ledger`", "")
    assert modules_of("actstore") - documented_modules(text, "actstore") == {"ledger"}
