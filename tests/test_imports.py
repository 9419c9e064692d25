"""What may be imported, and where: each rule with a test that shows it would be noticed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import actstore

ROOT = Path(actstore.__file__).parent.parent
SOURCES = sorted(path for package in ("actstore", "extract") for path in (ROOT / package).rglob("*.py"))
HEAVY = ("extract", "flax", "gguf", "jax", "optax", "safetensors", "tokenizers", "torch", "transformers")


def loaded(program: str, *arguments: str) -> set[str]:
    """Top-level modules of a fresh process after `program`."""
    program += "\nimport sys; print('\\nLOADED', *{name.partition('.')[0] for name in sys.modules})"
    answer = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.rpartition("LOADED")[2].split())


COMMAND = (
    "import sys\nfrom actstore.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
)
EVERYTHING = (
    "import pkgutil, importlib, actstore\n"
    "for module in pkgutil.iter_modules(actstore.__path__, 'actstore.'):\n"
    "    if not module.name.endswith('__main__'):\n"
    "        importlib.import_module(module.name)\n"
    "for name in actstore.__all__:\n"
    "    getattr(actstore, name)\n"
)


def test_importing_actstore_is_light():
    """Nothing of it is loaded before it is used: neither a machine-learning library nor its own requirements."""
    assert not loaded("import actstore") & {*HEAVY, "tensorstore", "xarray", "zarr", "numpy", "pydantic"}


def test_all_of_actstore_needs_no_machine_learning_library():
    found = loaded(EVERYTHING)
    assert {"tensorstore", "xarray", "zarr"} <= found
    assert not found & set(HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "STORE"], ["head", "STORE", "--count", "2"]], ids=["help", "info", "head"]
)
def test_reading_commands_are_light(finished, arguments):
    """Commands of `extract` join the program, so `extract` is there, but nothing heavy with it."""
    arguments = [str(finished) if argument == "STORE" else argument for argument in arguments]
    found = loaded(COMMAND, *arguments)
    assert "typer" in found
    assert not found & ({*HEAVY} - {"extract"})


@pytest.mark.parametrize(
    "program", ["import actstore, {name}", "def f():\n    import {name}\nf()"], ids=["plain", "lazy"]
)
def test_the_import_test_would_fire(tmp_path, monkeypatch, program):
    (tmp_path / "optax.py").touch()  # an empty module of that name: the real one takes seconds
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert loaded(program.format(name="optax")) & set(HEAVY) == {"optax"}


# Rules about the source


def mentions(tree: ast.AST) -> Iterator[str]:
    """Dotted names and strings of a module, apart from its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield repr(node.value)


def spec_keys(tree: ast.AST) -> set[str]:
    """`driver` and `kvstore` where they are strings: keys of a TensorStore spec."""
    return {name for name in mentions(tree) if name in ("'driver'", "'kvstore'")}


def topology(tree: ast.AST) -> set[str]:
    """Whatever asks JAX for devices or processes."""
    asked = {"distributed", "process_index", "process_count", "devices", "local_devices", "device_count"}
    asked |= {"local_device_count", "host_id", "host_count"}
    return {name for name in mentions(tree) if name.startswith("jax.") and set(name.split(".")) & asked}


RULES = {
    "specs are made in kvstore": (
        spec_keys,
        {f"actstore/kvstore/{module}.py" for module in ("clouds", "local", "root")},
    ),
    "JAX is asked for devices in mesh": (topology, {"extract/mesh.py"}),
}


@pytest.mark.parametrize(("rule", "allowed"), RULES.values(), ids=RULES.keys())
def test_a_thing_is_done_in_one_file(rule, allowed):
    found = {
        str(path.relative_to(ROOT)): hits for path in SOURCES if (hits := rule(ast.parse(path.read_text("utf-8"))))
    }
    assert set(found) == allowed, found


BREACHES = {
    "literal spec": (spec_keys, "spec = {'driver': 'file', 'path': x}"),
    "keyword by name": (spec_keys, "spec['kvstore'] = y"),
    "distributed": (topology, "import jax\njax.distributed.initialize()"),
    "from import": (topology, "from jax import process_index"),
    "submodule": (topology, "import jax.distributed"),
    "count": (topology, "def f():\n    return jax.process_count()"),
    "devices": (topology, "mesh = make(jax.devices())"),
    "local devices": (topology, "jax.local_devices()[0]"),
}


@pytest.mark.parametrize(("rule", "source"), BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_of_a_rule_would_be_noticed(rule, source):
    assert rule(ast.parse(source))


HARMLESS = {
    "docstring": (spec_keys, '"""The driver and the \'kvstore\'."""\nx = 1'),
    "attribute": (spec_keys, "self.driver = kvstore"),
    "other devices": (topology, "from extract.mesh import Devices\nplan.devices_needed = 3"),
    "jax itself": (topology, "import jax.numpy as jnp\njax.jit(f)"),
}


@pytest.mark.parametrize(("rule", "source"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_allowed_is_not_noticed(rule, source):
    assert not rule(ast.parse(source))
