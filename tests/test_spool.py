"""Arrays on a disk: continued after real kills, refused where they are not what they seem."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import InputError, PlanMismatchError
from extract import spool as module
from extract.spool import spool

PARTS = [np.arange(start, start + size, dtype=np.int32) for start, size in [(0, 3), (3, 0), (3, 5), (8, 1)]]


def added(kept, parts) -> None:
    for part in parts:
        kept.add({"a": part, "b.c": part.astype(np.float64) / 2}, count=len(part))


def assert_holds(arrays, count: int) -> None:
    assert arrays["a"].tolist() == list(range(count))
    assert arrays["a"].dtype == np.int32
    assert arrays["b.c"].tolist() == [number / 2 for number in range(count)]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_parts_follow_each_other(tmp_path, where):
    with spool(tmp_path / "x" if where == "disk" else None, {}) as kept:
        added(kept, PARTS)
        assert kept.count == 9
        assert_holds(kept.arrays(), 9)
        assert isinstance(kept.arrays()["a"], np.memmap) == (where == "disk")


@given(checkpoints=st.sets(st.integers(0, 4)), killed=st.integers(0, 4))
def test_what_came_after_the_last_checkpoint_is_forgotten(tmp_path_factory, checkpoints, killed):
    folder = tmp_path_factory.mktemp("spool")
    with spool(folder, {"of": {"x": 1}}) as kept:
        sure = 0
        for number, part in enumerate(PARTS[:killed]):
            added(kept, [part])
            if number in checkpoints:
                kept.checkpoint()
                sure = number + 1
    with spool(folder, {"of": {"x": 1}}) as kept:
        assert kept.count == sum(map(len, PARTS[:sure]))
        added(kept, PARTS[sure:])
        assert_holds(kept.arrays(), 9)


CHILD = """
import sys, numpy as np
from pathlib import Path
from extract import spool
spool.CHECKPOINT_BYTES = 4000
with spool.spool(Path(sys.argv[1]), {}) as kept:
    print("begin", kept.count, flush=True)
    while True:
        kept.add({"a": np.arange(kept.count, kept.count + 7, dtype=np.int64)}, count=7)
"""


def stored_count(folder: Path) -> int:
    state = folder / "state.json"
    return json.loads(state.read_bytes())["count"] if state.exists() else 0


def test_a_killed_writer_is_continued(tmp_path):
    counts = []
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        counts.append(int(child.stdout.readline().split()[1]))
        while stored_count(tmp_path) <= counts[-1]:
            assert child.poll() is None
        child.kill()
        child.communicate()
    assert counts == sorted({*counts}), "each went on where the one before was"
    with spool(tmp_path, {}) as kept:
        assert kept.arrays()["a"].tolist() == list(range(kept.count))


def test_a_checkpoint_comes_when_enough_was_added(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_BYTES", 60)
    with spool(tmp_path, {}) as kept:
        kept.add({"a": np.zeros(7, np.int64)}, count=1)
        assert not (tmp_path / "state.json").exists()
        kept.add({"a": np.zeros(1, np.int64)}, count=1)
        assert json.loads((tmp_path / "state.json").read_bytes()) == {"count": 2, "arrays": {"a": ["<i8", 8]}}


def test_other_settings_are_refused_by_name(tmp_path):
    with spool(tmp_path, {"tokenizer": "x", "more": {"n": 1}}):
        pass
    with (
        pytest.raises(
            PlanMismatchError, match=r"holds another run, with 1 differing fields \(more.n: there 1, here 2\);"
        ),
        spool(tmp_path, {"tokenizer": "x", "more": {"n": 2}}),
    ):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    with (
        pytest.raises(
            InputError, match=r"holds thesis.md and no settings.json; expected nothing there, or what a run left"
        ),
        spool(tmp_path, {}),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]


def test_two_writers_at_once_are_refused(tmp_path):
    busy = "is being written by another process; expected one at a time"
    with spool(tmp_path, {}), pytest.raises(InputError, match=busy), spool(tmp_path, {}):
        pass


@pytest.mark.parametrize(
    ("name", "data"),
    [("state.json", b"{"), ("state.json", b'{"count": 1}'), ("state.json", b'{"count": 1, "arrays": {"a": ["x", 1]}}'),
     ("a.int32", b"\0" * 35)],
)  # fmt: skip
def test_damage_is_refused(tmp_path, name, data):
    with spool(tmp_path, {}) as kept:
        added(kept, PARTS)
        kept.checkpoint()
    (tmp_path / name).write_bytes(data)
    with (
        pytest.raises(
            InputError, match=rf"is damaged \({name.split('.')[0]}[a-z0-9.]*\); expected what a run left; remove"
        ),
        spool(tmp_path, {}),
    ):
        pass
