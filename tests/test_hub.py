"""Models by the name of a hub, fetched from a real server on this machine, and found in the cache without it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hub_server import TOKEN, Hub, Repository, running_hub
from safetensors.numpy import load_file, save_file

import extract
from extract.hub import INDEX, _is_final, hub_identity, is_hub_name

ROOT = Path(extract.__path__[0]).parent
TINY = ROOT / "extract" / "demo" / "tiny-qwen2"
COMMIT, OTHER = "a" * 40, "b" * 40
NEEDED = {"chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

FETCH = """
import sys

from actstore.errors import ActstoreError
from extract.named import model_folder

for name in sys.argv[1:]:
    try:
        print(model_folder(name))
    except ActstoreError as error:
        print(error)
"""


class Served(NamedTuple):
    """A hub that runs, and the folder of its repositories."""

    hub: Hub
    folder: Path


def write_shards(folder: Path) -> Path:
    """The tiny model in two shards and an index."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("repositories")
    full = folder / "full"
    shutil.copytree(TINY, full)
    (full / "chat_template.jinja").write_text("{{ messages }}")
    (full / "onnx").mkdir()
    for unwanted in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "onnx/model.safetensors"):
        (full / unwanted).write_bytes(b"never fetched")
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"never fetched")
    sharded, short = write_shards(folder / "sharded"), write_shards(folder / "short")
    (short / "part-1.safetensors").unlink()
    repositories = {
        "org/tiny": Repository(full, COMMIT),
        "org/gated": Repository(full, OTHER, gated=True),
        "org/pickled": Repository(pickled, OTHER),
        "org/sharded": Repository(sharded, COMMIT),
        "org/short": Repository(short, COMMIT),
        "org/cut": Repository(full, OTHER, cut="model.safetensors"),
    }
    with running_hub(repositories) as hub:
        yield Served(hub, folder)


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return (
        kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more
    )


def fetch(home: Path, endpoint: str, *names: str, **more: str) -> list[str]:
    """The folders, or what the errors say, one line each: of a process of its own, which reads the environment."""
    command = [sys.executable, "-W", "error", "-c", FETCH, *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(home, endpoint, **more))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(names), "an error is one line"
    return lines


@pytest.fixture(scope="module")
def home(served, tmp_path_factory) -> Path:
    """A cache in which `org/tiny` is."""
    home = tmp_path_factory.mktemp("home")
    served.hub.requests.clear()
    fetch(home, served.hub.endpoint, "org/tiny")
    return home


def snapshot(home: Path) -> Path:
    return home / "hub" / "models--org--tiny" / "snapshots" / COMMIT


def test_a_model_is_fetched_without_code_and_without_pickles(served, home):
    assert {path.name for path in snapshot(home).rglob("*")} == NEEDED
    for name in NEEDED:
        assert (snapshot(home) / name).read_bytes() == (served.folder / "full" / name).read_bytes()
    got = {request.split("/")[-1] for request in served.hub.requests if "resolve" in request}
    assert got == NEEDED


def test_a_finished_copy_is_found_without_the_hub(served, home):
    gone = "http://127.0.0.1:9"
    expected = [str(snapshot(home))]
    assert fetch(home, gone, "org/tiny") == expected
    assert fetch(home, gone, f"org/tiny@{COMMIT}", HF_HUB_OFFLINE="1") == expected
    served.hub.requests.clear()
    assert fetch(home, served.hub.endpoint, "org/tiny", HF_HUB_OFFLINE="1") == expected
    assert served.hub.requests == []


def test_a_pinned_commit_that_is_there_is_not_asked_for_again(served, home):
    served.hub.requests.clear()
    assert fetch(home, served.hub.endpoint, f"org/tiny@{COMMIT}") == [str(snapshot(home))]
    assert [request for request in served.hub.requests if "org/tiny" in request] == []


def test_the_token_opens_a_gated_model(served, tmp_path):
    (found,) = fetch(tmp_path, served.hub.endpoint, "org/gated", HF_TOKEN=TOKEN)
    assert {path.name for path in Path(found).iterdir()} == NEEDED


REFUSED = {
    "org/none": "there is no folder org/none, and the hub knows no model org/none or keeps it private; check the "
    "spelling, or log in with `hf auth login` if it is yours",
    "org/tiny@nope": "the model org/tiny has no revision 'nope'; give a branch, a tag or a commit that it has",
    "org/gated": "the model org/gated is gated: its owner has to let you in; accept its terms on its page of the hub, "
    "then log in with `hf auth login` or set HF_TOKEN",
    "org/pickled": f"the model org/pickled has no safetensors at revision {OTHER}; expected model.safetensors or its "
    "shards: pickled weights are never read; give another revision or model",
}


def test_what_the_hub_does_not_give_is_said_in_one_line(served, tmp_path):
    assert fetch(tmp_path, served.hub.endpoint, *REFUSED) == list(REFUSED.values())


def test_neither_hub_nor_copy(served, tmp_path):
    (line,) = fetch(tmp_path, "http://127.0.0.1:9", "org/tiny")
    assert line.startswith("there is no folder org/tiny, and no finished copy of that model in the hub's cache, and ")
    assert line.endswith("Connection refused); fetch it once with a network, or give a folder")
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/tiny", HF_HUB_OFFLINE="1")
    assert line.endswith("and HF_HUB_OFFLINE is set; fetch it once without HF_HUB_OFFLINE, or give a folder")


# --- copies of which a part is there ---

LACKS = f"lacks 1 of the 2 shards that {INDEX} names (part-1.safetensors)"
ANOTHER = "or another revision if the hub lacks it too"


@pytest.fixture
def half(served, tmp_path) -> Path:
    """A cache with a half of `org/sharded`, as a library leaves it that fetches files one by one; and its snapshot."""
    fetch(tmp_path, served.hub.endpoint, "org/sharded")
    copy = tmp_path / "hub" / "models--org--sharded"
    (copy / "snapshots" / COMMIT / "part-1.safetensors").unlink()
    shutil.rmtree(copy / "trees", ignore_errors=True)  # newer releases keep there what a whole copy has
    return copy / "snapshots" / COMMIT


def test_half_a_copy_is_named_and_fetched_to_its_end(served, half, tmp_path):
    begin = f"the copy of org/sharded in the hub's cache is half there: it {LACKS}; expected all of the model; "
    for name in ("org/sharded", f"org/sharded@{COMMIT}"):
        (line,) = fetch(tmp_path, served.hub.endpoint, name, HF_HUB_OFFLINE="1")
        assert line == begin + "give that name without HF_HUB_OFFLINE, which fetches the rest"
    (line,) = fetch(tmp_path, "http://127.0.0.1:9", "org/sharded")
    assert line == begin + "give that name with a network, which fetches the rest, " + ANOTHER
    assert fetch(tmp_path, served.hub.endpoint, "org/sharded") == [str(half)]
    assert fetch(tmp_path, served.hub.endpoint, "org/sharded", HF_HUB_OFFLINE="1") == [str(half)]


def test_half_a_copy_of_which_the_library_knows_the_whole(served, tmp_path):
    fetch(tmp_path, served.hub.endpoint, "org/sharded")
    snapshot = tmp_path / "hub" / "models--org--sharded" / "snapshots" / COMMIT
    (snapshot / "part-1.safetensors").unlink()
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/sharded", HF_HUB_OFFLINE="1")
    assert f"it {LACKS}" in line
    assert "in the hub's cache" in line
    assert re.search("without HF_HUB_OFFLINE, (or give a folder|which fetches the rest)$", line)


def test_a_copy_without_weights_is_half_a_copy(served, half, tmp_path):
    for path in (*half.glob("*.safetensors"), half / INDEX):
        path.unlink()
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/sharded", HF_HUB_OFFLINE="1")
    assert "is half there: it has config.json, tokenizer.json, tokenizer_config.json, and no safetensors; " in line


def test_a_hub_that_lacks_a_shard_itself(served, tmp_path):
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/short")
    assert line.startswith(f"the copy of org/short in the hub's cache is half there: it {LACKS}; ")
    assert line.endswith(ANOTHER)


def test_the_folder_of_half_a_copy_says_what_fetches_the_rest(half):
    with pytest.raises(
        ValueError,
        match=r"found shard 'part-1.safetensors' in .*; this copy in the hub's cache lacks 1 of the 2 shards that "
        rf"{INDEX} names \(part-1.safetensors\): model_folder\('org/sharded@{COMMIT}'\) fetches the rest, with a net",
    ):
        extract.load_model(half)


@pytest.mark.slow
def test_a_connection_that_breaks_is_an_error_and_leaves_no_model(served, tmp_path):
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/cut")
    assert line.startswith("the model org/cut could not be fetched (peer closed connection ")
    assert line.endswith("expected the hub to serve it; run the same command again, it continues")
    (line,) = fetch(tmp_path, served.hub.endpoint, "org/cut", HF_HUB_OFFLINE="1")
    assert "no finished copy" in line


def test_the_command_takes_a_name_and_the_plan_has_its_commit(served, home, tmp_path):
    """`--model org/tiny` end to end; then the same weights from a folder are known to be the same model."""
    url = tmp_path / "run.acts.zarr"
    command = [sys.executable, "-m", "actstore", "extract", str(url), "--model", "org/tiny", "--layers", "1"]
    run = subprocess.run(
        [*command, "--documents", "python-docs", "--limit", "3", "--context", "64"],
        capture_output=True, text=True, env=environment(home, served.hub.endpoint),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    plan = (url / ".act" / "plan.json").read_text()
    assert f'"revision":"{COMMIT}"' in plan.replace(" ", "")
    assert '"name":"org/tiny"' in plan.replace(" ", "")
    assert str(home) not in plan
    extract.run(extract.append_layers(str(url), TINY, layers=[2]), str(url))


def test_the_command_says_what_is_wrong_in_one_line(served, tmp_path):
    command = [sys.executable, "-m", "actstore", "plan", "--model", "org/none", "--documents", "python-docs"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path, served.hub.endpoint))
    assert (run.returncode, run.stderr) == (2, f"error: {REFUSED['org/none']}\n")


def test_a_hub_that_does_not_answer_may_be_asked_again_later(served, tmp_path):
    """3, which launchers try again; with the network switched off on purpose it is 2."""
    command = [sys.executable, "-m", "actstore", "plan", "--model", "org/tiny", "--documents", "python-docs"]
    for more, code in ({}, 3), ({"HF_HUB_OFFLINE": "1"}, 2):
        run = subprocess.run(
            command, capture_output=True, text=True, env=environment(tmp_path, "http://127.0.0.1:9", **more)
        )  # fmt: skip
        assert (run.returncode, run.stderr.startswith("error: there is no folder org/tiny, and no ")) == (code, True)


ROOTS = {
    "refused connection": (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
    "broken off": (RuntimeError("peer closed connection"), False),
    "full disk": (OSError(errno.ENOSPC, "no space left on device"), True),
    "read-only cache": (OSError(errno.EROFS, "read-only"), True),
    **{f"status {status}": (status, final) for status, final in {403: True, 404: True, 429: False, 503: False}.items()},
}


@pytest.mark.parametrize(("root", "final"), ROOTS.values(), ids=ROOTS)
def test_what_asking_again_would_not_change(root, final):
    if isinstance(root, int):
        status, root = root, OSError("status")  # as in any of the HTTP libraries that the hub's own uses
        root.response = SimpleNamespace(status_code=status)
    outer = OSError("could not be had")
    outer.__cause__ = root
    assert _is_final(outer) == final


NAMES = {
    "Qwen/Qwen2.5-0.5B": True, "org/model@v1.0": True, "org/model@refs/pr/3": True, f"org/model@{COMMIT}": True,
    "gpt2": False, "./org/model": False, "/org/model": False, "../model": False, "a/b/c": False, "org/model@": False,
    "org/": False, "org/mo del": False, "": False,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_of_a_hub_looks_like(name):
    assert is_hub_name(name) == NAMES[name]


FOLDERS = {
    f"hub/models--Qwen--Qwen2.5-0.5B/snapshots/{COMMIT}": ("Qwen/Qwen2.5-0.5B", COMMIT),
    f"models--gpt2/snapshots/{COMMIT}": ("gpt2", COMMIT),
    f"models--org--two--dashes/snapshots/{COMMIT}": ("org/two--dashes", COMMIT),
    "models--org--model/snapshots/main": None,
    "qwen": None,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_the_cache_says_which_model_it_is(tmp_path, folder):
    assert hub_identity(tmp_path / folder) == FOLDERS[folder]


def test_a_model_of_a_folder_has_no_revision():
    model = extract.load_model(TINY)
    assert (model.name, model.revision) == ("tiny-qwen2", None)


def test_a_name_where_a_folder_is_wanted_is_told_how_to_become_one():
    with pytest.raises(
        ValueError, match=r"found nothing at org/tiny; .*; if it is a model of a hub, give model_folder"
    ):
        extract.load_model("org/tiny")


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert extract.model_folder("org/tiny") == Path("org/tiny")
