"""Runs the notebooks in real kernels, and compares what they show with NumPy on plainly read arrays.

Each runs in a temporary copy of the folder. A first cell keeps figures open; a last one tells what they show and saves
named values of the notebook. Both are added here and stand in no notebook.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jupytext
import ml_dtypes
import nbformat
import numpy as np
import pytest
import xarray as xr
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from stores import tree

import actstore.bfloat16  # noqa: F401  zarr-python reads bfloat16 then
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.verify import Finding, verify

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TITLES = [
    "01_open_and_select", "02_norms_outliers_sinks", "03_train_an_sae", "04_top_activating_examples",
    "05_write_your_own_store",
]  # fmt: skip
SECONDS = 60
SAE = {
    "scale": "trained.scale",
    **{name: f"np.asarray(trained.sae.{name}[...])" for name in ("encoder", "decoder", "pre_bias")},
}
SAVED = {  # what the last cell saves of each notebook: expressions by name
    "01_open_and_select": {},
    "02_norms_outliers_sinks": {},
    "03_train_an_sae": SAE | {"losses": "[metrics.fvu for metrics in trained.history]", "whole": "whole"},
    "04_top_activating_examples": SAE,
    "05_write_your_own_store": {"activations": "activations", "document": "document", "position": "position"},
}
BEFORE = "%config InlineBackend.close_figures = False"
AFTER = """
import json, matplotlib.pyplot, numpy
numpy.savez("saved.npz", **{{name: eval(code) for name, code in {saved!r}.items()}})
print(json.dumps([
    {{
        "labels": [axes.get_xlabel(), axes.get_ylabel()],
        "lines": [numpy.asarray(line.get_ydata(), float).tolist() for line in axes.lines],
        "bars": float(sum(patch.get_height() for patch in axes.patches)),
    }}
    for number in matplotlib.pyplot.get_fignums() for axes in matplotlib.pyplot.figure(number).axes
]))
"""


# --- pairs ---


def texts(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    """What both files of a pair must agree about, cell by cell: kind, text, metadata."""
    return [(cell.cell_type, cell.source, json.dumps(cell.metadata, sort_keys=True)) for cell in notebook.cells]


def kept_outputs(notebook: NotebookNode) -> list[int]:
    """Code cells with outputs or an execution count."""
    code = [(number, cell) for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    return [number for number, cell in code if cell.outputs or cell.execution_count is not None]


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_each_notebook_is_there_as_a_pair():
    assert NAMES == TITLES == sorted(path.stem for path in FOLDER.glob("*.py")) == list(SAVED)


@pytest.mark.parametrize("name", TITLES)
def test_pairs_are_the_same(name):
    written, paired = jupytext.read(FOLDER / f"{name}.py"), read(name)
    assert texts(written) == texts(paired)
    assert len(texts(written)) >= 10
    for notebook in (written, paired):
        assert notebook.metadata.jupytext.formats == "ipynb,py:percent"
    nbformat.validate(paired)


@pytest.mark.parametrize("name", TITLES)
def test_meta_a_difference_would_be_found(name):
    paired = read(name)
    for change in (
        lambda cells: cells.pop(),
        lambda cells: cells.reverse(),
        lambda cells: cells[1].update(source=cells[1].source + "\n1"),
        lambda cells: cells[1].update(cell_type="markdown"),
        lambda cells: cells[1].metadata.update(tags=["hidden"]),
    ):
        other = copy.deepcopy(paired)
        change(other.cells)
        assert texts(other) != texts(paired)


@pytest.mark.parametrize("name", TITLES)
def test_no_outputs_are_kept(name):
    assert kept_outputs(read(name)) == []


def test_meta_outputs_would_be_found():
    shown = nbformat.v4.new_output("stream", text="1")
    cells = [new_code_cell("1"), new_code_cell("2", outputs=[shown]), new_code_cell("3", execution_count=1)]
    assert kept_outputs(new_notebook(cells=cells)) == [1, 2]


def test_the_page_names_each_notebook():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+)\.ipynb\)", page) == TITLES


# --- the store ---


def unlike(folder: Path, other: Path) -> list[str]:
    """Files in which two stores differ, apart from rows, norms and what vouches for them; rows that are not near.

    Documents are compared by their marker: another zstd may compress them otherwise.
    """
    ours, theirs = tree(folder), tree(other)
    computed = re.compile(
        r"resid_post(_norm)?/c/|documents/\w+/c/|\.act/(commits/|manifest\.json|SEALED\.json|ranges\.json)"
    )  # none at first
    plain = {name for name in ours.keys() | theirs.keys() if not computed.match(name)}
    found = sorted(name for name in plain if ours.get(name) != theirs.get(name))
    here, there = (xr.open_zarr(each, chunks=None).astype(np.float32) for each in (folder, other))
    for name in ("resid_post", "resid_post_norm"):
        # Another processor or JAX rounds otherwise: by a step or two of bfloat16 where values are up to 10 or so.
        if not np.allclose(here[name], there[name], rtol=2**-6, atol=0.1):
            found.append(name)
    return found


def damage(store: Path) -> list[Finding]:
    """What `actstore verify` finds."""
    root = Root.of(store)
    return list(verify(root, read_plan(root)).findings)


def test_the_store_is_sound_and_small():
    store = FOLDER / "tiny.acts.zarr"
    assert damage(store) == []
    assert sum(len(content) for content in tree(store).values()) < 2_500_000


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory):
    """The store, by the command that stands in the folder's page."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^actstore (extract .*)$", page, re.MULTILINE)
    folder = tmp_path_factory.mktemp("anew")
    (folder / "notebooks").mkdir()
    shutil.copy(FOLDER / "tiny.jsonl", folder / "notebooks")
    done = subprocess.run(
        [sys.executable, "-m", "actstore", *command.split()], cwd=folder, env=environment(folder), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "notebooks/tiny.acts.zarr"


@pytest.mark.slow
def test_the_store_is_what_its_command_makes(made_anew):
    assert unlike(FOLDER / "tiny.acts.zarr", made_anew) == []


@pytest.mark.slow
def test_meta_another_store_would_be_found(made_anew, tmp_path):
    (made_anew / "assets/config.json").write_text("{}")
    (made_anew / "more").write_text("")
    shards = [made_anew / f"resid_post/c/{layer}/0/0" for layer in (0, 1)]
    first, second = (shard.read_bytes() for shard in shards)
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    assert unlike(FOLDER / "tiny.acts.zarr", made_anew) == ["assets/config.json", "more", "resid_post"]


def ignored(names: Sequence[str], rules: str, folder: Path) -> list[str]:
    """Which files of notebooks/ git would leave out, by the rules of `.gitignore`, asked in a repository of its own."""
    (folder / ".gitignore").write_text(rules)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    done = subprocess.run(
        ["git", "check-ignore", "--stdin"], cwd=folder, input="\n".join(names), capture_output=True, text=True
    )
    assert done.returncode in {0, 1}, done.stderr  # 1: none
    return done.stdout.splitlines()


def test_git_keeps_the_store_and_leaves_outputs_out(tmp_path):
    rules = (ROOT / ".gitignore").read_text()
    names = [f"notebooks/tiny.acts.zarr/{name}" for name in tree(FOLDER / "tiny.acts.zarr")]
    assert len(names) > 30
    assert ignored([*names, "notebooks/output/own.acts.zarr/zarr.json"], rules, tmp_path) == [
        "notebooks/output/own.acts.zarr/zarr.json"
    ]
    without = rules.replace("!/notebooks/tiny.acts.zarr/\n", "")  # meta: the rule is needed
    assert ignored(names, without, tmp_path) == names


# --- running ---


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a notebook showed: text that was printed, warnings, pictures, axes with their data, saved values."""

    name: str
    folder: Path
    seconds: float
    printed: str
    warned: str
    pictures: int
    axes: list[dict]
    saved: Mapping[str, np.ndarray]


def environment(folder: Path) -> dict[str, str]:
    """For a process that has this code, the CPU, and no settings of whoever runs the tests."""
    wanted = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / ".ipython")}
    return {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | wanted


def execute(notebook: NotebookNode, folder: Path, *, name: str = "made", saved: Mapping[str, str] | None = None) -> Ran:
    """Runs a notebook in a kernel of its own, in `folder`."""
    cells = notebook.cells
    whole = new_notebook(cells=[new_code_cell(BEFORE), *cells, new_code_cell(AFTER.format(saved=dict(saved or {})))])
    client = NotebookClient(
        whole, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    started = time.monotonic()
    client.execute(env=environment(folder))
    seconds = time.monotonic() - started
    outputs = [[] if cell.cell_type != "code" else cell.outputs for cell in whole.cells]
    streams = [output for each in outputs[:-1] for output in each if output.output_type == "stream"]
    (told,) = [output.text for output in outputs[-1] if output.output_type == "stream"]
    with np.load(folder / "saved.npz") as values:
        return Ran(
            name,
            folder,
            seconds,
            printed="".join(output.text for output in streams if output.name == "stdout"),
            warned="".join(output.text for output in streams if output.name != "stdout"),
            pictures=sum("image/png" in output.get("data", {}) for each in outputs[:-1] for output in each),
            axes=json.loads(told),
            saved=dict(values),
        )


@pytest.fixture(scope="module", params=TITLES)
def ran(request, tmp_path_factory):
    """One notebook, run in a copy of the folder."""
    folder = tmp_path_factory.mktemp("notebooks") / "notebooks"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("output"))
    return execute(read(request.param), folder, name=request.param, saved=SAVED[request.param])


def check_shown(ran: Ran) -> None:
    """It is quick and warns of nothing; it draws, and says what is on the axes."""
    assert ran.seconds < SECONDS
    assert ran.warned == ""
    assert ran.pictures >= 1
    assert len(ran.axes) >= 1
    for axes in ran.axes:
        assert all(axes["labels"]), axes["labels"]


@pytest.mark.slow
def test_it_runs_quietly_and_draws(ran):
    check_shown(ran)


@pytest.mark.slow
def test_it_changes_nothing_beside_it_but_its_output(ran):
    new = tree(ran.folder).keys() - tree(FOLDER).keys()
    assert all(name == "saved.npz" or name.startswith(("output/", ".ipython/")) for name in new)
    for name, content in tree(ran.folder).items():
        assert name in new or name.startswith("output/") or content == (FOLDER / name).read_bytes(), name


@pytest.mark.slow
def test_meta_errors_warnings_and_bare_axes_would_be_found(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path)
    draw = "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 2])\n"
    label = "axes.set(xlabel='x', ylabel='y');\n"
    for code, wrong in [
        (draw + label, ""),
        (draw, "labels|''"),
        (draw + label + "import warnings\nwarnings.warn('look here')", "look here"),
        ("print(1)", ">= 1"),
    ]:
        shown = execute(new_notebook(cells=[new_code_cell(code)]), tmp_path)
        if not wrong:
            check_shown(shown)
            continue
        with pytest.raises(AssertionError, match=wrong):
            check_shown(shown)


# --- numbers ---


def numbers(pattern: str, printed: str) -> list[float]:
    """All groups of a pattern wherever it is printed, as numbers."""
    found = [group for match in re.finditer(pattern, printed, re.MULTILINE) for group in match.groups()]
    assert found, f"{pattern!r} is not in {printed!r}"
    return [float(each) for each in found]


@pytest.fixture(scope="module")
def plain():
    """The tiny store as zarr-python reads it, in float32: rows [layer, sample, hidden] and columns."""
    stored = xr.open_zarr(FOLDER / "tiny.acts.zarr", chunks=None).load()
    return stored.assign(resid_post=stored.resid_post.astype(np.float32))


def tokens_of(plain: xr.Dataset) -> list[bytes]:
    """The bytes of each sample's token, cut out of the stored texts by hand."""
    table = xr.open_zarr(FOLDER / "tiny.acts.zarr", group="documents", chunks=None).load()
    data, starts, first = (table[name].values for name in ("text_bytes", "text_offsets", "token_offsets"))
    whole = data.tobytes()
    places = first[plain.document.values] + plain.position.values
    offsets = starts[plain.document.values]
    edges = offsets + table.token_start.values[places], offsets + table.token_end.values[places]
    return [whole[start:end] for start, end in zip(*edges, strict=True)]


def check_01(ran: Ran, plain: xr.Dataset) -> None:
    rows = plain.resid_post.values.astype(np.float64)
    shown = numbers(r"^mean (.*), standard deviation (.*)$", ran.printed)
    np.testing.assert_allclose(shown, [rows[1, :1000].mean(), rows[1, :1000].std()], atol=1e-5)
    the = np.array([token == b" the" for token in tokens_of(plain)])
    documents = len(np.unique(plain.document.values[the]))
    assert numbers(r"stands (\d+) times in (\d+) documents", ran.printed) == [the.sum(), documents]
    for layer, shown in zip(rows, numbers(r"mean cosine (.*)$", ran.printed), strict=True):
        unit = layer[the] / np.sqrt(np.square(layer[the]).sum(1))[:, None]
        pairs = (np.square(unit.sum(0)).sum() - len(unit)) / (len(unit) * (len(unit) - 1))  # |sum|^2 is all pairs
        assert shown == pytest.approx(pairs, abs=1e-4)
    assert ran.axes[0]["bars"] == the.sum() * (the.sum() - 1)  # two layers of half as many pairs


def check_02(ran: Ran, plain: xr.Dataset) -> None:
    norms = np.sqrt(np.square(plain.resid_post.values.astype(np.float64)).sum(-1))
    place = plain.position.values % 256
    shown = numbers(r"^layer \d: median (.*), mean (.*), largest (.*)$", ran.printed)
    expected = [each for layer in norms for each in (np.median(layer), layer.mean(), layer.max())]
    np.testing.assert_allclose(shown, expected, atol=1e-3)
    histogram, by_position, dimensions = ran.axes
    assert histogram["bars"] == norms.size
    assert by_position["labels"] == ["position in the context", "median norm of a row"]
    for layer, line in zip(norms, by_position["lines"], strict=True):
        np.testing.assert_allclose(line, [np.median(layer[place == each]) for each in range(256)], rtol=1e-5)
    firsts = [np.median(layer[place == 0]) / np.median(layer) for layer in norms]
    shown = numbers(r"first tokens have (.*) times the median norm; (\d+) rows", ran.printed)
    np.testing.assert_allclose(shown, [firsts[0], 0, firsts[1], 0], atol=1e-3)
    assert f"of {(place == 0).sum()} planted sinks found" in ran.printed
    best = np.argsort(-norms[1])[:12]
    shown = numbers(r"^ *([\d.]+)  position +(\d+)", ran.printed)
    np.testing.assert_allclose(shown[::2], norms[1][best], atol=1e-3)
    assert shown[1::2] == plain.position.values[best].tolist()
    assert numbers(r"^(\d+) rows left out", ran.printed) == [(norms[1] > 2 * np.median(norms[1])).sum()]
    sizes = np.sqrt(np.square(plain.resid_post.values.astype(np.float64)).mean(1))
    np.testing.assert_allclose(dimensions["lines"], -np.sort(-sizes, axis=1), rtol=1e-4)


def codes(ran: Ran, rows: np.ndarray) -> np.ndarray:
    """Activations [row, feature] of a TopK SAE with 16 features per row, from its weights alone."""
    saved = ran.saved
    before = (rows / saved["scale"] - saved["pre_bias"]) @ saved["encoder"]
    least = -np.partition(-before, 15, axis=1)[:, 15:16]
    return np.where((before >= least) & (before > 0), before, 0)


def check_03(ran: Ran, plain: xr.Dataset) -> None:
    train, test = (
        [int(number) for number in documents.split(", ")]
        for documents in re.findall(r"samples of documents \[(.*)\]", ran.printed)
    )
    assert sorted([*train, *test]) == list(range(17))
    assert len(test) >= 2
    for documents, shown in zip(
        (train, test), numbers(r"unexplained: (.*) of train, (.*) of", ran.printed), strict=True
    ):
        rows = plain.resid_post.values[1][np.isin(plain.document.values, documents)].astype(np.float64)
        back = (codes(ran, rows) @ ran.saved["decoder"] + ran.saved["pre_bias"]) * ran.saved["scale"]
        expected = np.square(rows - back).sum() / np.square(rows - rows.mean(0)).sum()
        assert shown == pytest.approx(expected, abs=2e-3)
        assert 0.02 < expected < 0.4
    seen, unseen = numbers(r"unexplained: (.*) of train, (.*) of", ran.printed)
    assert seen < unseen  # as the notebook says
    first, second = ran.axes
    assert first["lines"] == [pytest.approx(ran.saved["losses"].tolist())]
    losses = ran.saved["losses"]
    assert len(losses) == 300
    assert losses[-20:].mean() < 0.3 * losses[:20].mean()
    assert "the same losses as without a stop: True" in ran.printed
    whole, before, after = second["lines"]
    assert (len(before), len(after)) == (40, 60)
    assert before + after == whole == ran.saved["whole"].tolist()
    assert whole[-1] < 0.5 * whole[0]


def check_04(ran: Ran, plain: xr.Dataset) -> None:
    rows = plain.resid_post.values[1].astype(np.float64)
    parts = re.split(r"\n(?=\nfeature)", ran.printed)
    quote = np.array([token == b' "' for token in tokens_of(plain)])
    direction = rows[quote].mean(0) - rows.mean(0)
    scores = rows @ (direction / np.sqrt(np.square(direction).sum()))
    assert len(np.unique(plain.token_id.values[quote])) == 1
    for shown, there in zip(np.split(examples(parts[0]), 2), (scores, np.where(quote, -np.inf, scores)), strict=True):
        same_top(shown, there)
    activations = codes(ran, rows)
    np.testing.assert_allclose(ran.axes[0]["lines"][0], -np.sort(-(activations > 0).sum(0)), atol=2)
    assert len(parts) == 6
    for part in parts[1:]:
        feature, fires = map(int, numbers(r"feature (\d+), fires on (\d+)", part))
        assert abs((activations[:, feature] > 0).sum() - fires) <= 2  # float32 may choose another 16th feature
        same_top(examples(part)[:6], activations[:, feature])


def examples(printed: str) -> np.ndarray:
    """Rows and scores that were shown."""
    return np.array(numbers(r"^ *(\d+) +(-?[\d.]+)  ['\"]", printed)).reshape(-1, 2)


def same_top(shown: np.ndarray, scores: np.ndarray) -> None:
    """The best scores in their order, each the score of the row that is named; ties may be in any order."""
    np.testing.assert_allclose(shown[:, 1], -np.sort(-scores)[: len(shown)], atol=5e-3)
    np.testing.assert_allclose(shown[:, 1], scores[shown[:, 0].astype(int)], atol=5e-3)


def check_05(ran: Ran, plain: xr.Dataset) -> None:
    written = xr.open_zarr(ran.folder / "output/own.acts.zarr", chunks=None).load()
    rows = written.resid_post.values.astype(np.float32)
    exact = ran.saved["activations"]
    np.testing.assert_array_equal(rows, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
    (error,) = numbers(r"largest relative error (\S+);", ran.printed)
    assert error == pytest.approx(np.abs(rows / exact - 1).max(), abs=1e-6)
    for number in range(4):  # layer 1 is the mean of the words so far
        vectors, means = exact[:, ran.saved["document"] == number]
        np.testing.assert_allclose(means[-1], vectors.mean(0), atol=1e-5)
    norms = np.sqrt(np.square(rows[1]).sum(-1))
    place = ran.saved["position"]
    expected = [norms[place == each].mean() for each in range(place.max() + 1)]
    np.testing.assert_allclose(ran.axes[0]["lines"][0], expected, rtol=1e-4)
    words = re.findall(r"^ *\d+  '.*' \[(\w+)\] '.*'$", ran.printed, re.MULTILINE)
    assert words == ["schläft", "frisch", "Butter"]  # the German words of six letters or more
    assert damage(ran.folder / "output/own.acts.zarr") == []


CHECKS = dict(zip(TITLES, (check_01, check_02, check_03, check_04, check_05), strict=True))


@pytest.mark.slow
def test_its_numbers_are_those_of_numpy(ran, plain):
    CHECKS[ran.name](ran, plain)


@pytest.mark.slow
def test_meta_other_numbers_would_be_found(ran, plain):
    check = CHECKS[ran.name]
    lines = [axes | {"lines": [[y + 3 for y in line] for line in axes["lines"]], "bars": 0} for axes in ran.axes]
    for wrong in (
        dataclasses.replace(ran, printed=""),
        dataclasses.replace(ran, printed=re.sub(r"\d\.\d+", "0.5", ran.printed)),
        dataclasses.replace(ran, axes=lines),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(wrong, plain)
