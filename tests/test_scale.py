"""The largest stores: what opening them costs does not grow with the samples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.scale import with_markers, without_data

import actstore
from actstore.errors import CorruptStoreError
from actstore.kvstore import Root
from actstore.markers import missing_blocks

CHILD = """
import json, sys
from pathlib import Path
from benchmarks.scale import opening
opening(Path(sys.argv[1]), 1)  # loads the libraries
print(json.dumps([opening(Path(url), 5) for url in sys.argv[1:]]))
"""


def test_opening_ten_billion_samples_takes_no_more_memory_than_ten(tmp_path: Path) -> None:
    urls = [str(without_data(tmp_path / f"{samples}.acts.zarr", samples)) for samples in (10, 10**10)]
    command = [sys.executable, "-c", CHILD, *urls]
    tests = str(Path(__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tests)
    (small, _), (large, megabytes) = json.loads(done.stdout)
    print(f"10 samples: {small:.4f} s; 10^10 samples: {large:.4f} s and {megabytes:.1f} MB more")
    assert megabytes < 100


def test_rows_that_are_not_there_are_an_error_wherever_they_are(tmp_path: Path) -> None:
    store = actstore.open(without_data(tmp_path / "large.acts.zarr", 10**10))
    rows = store.dataset().resid_post.sel(layer=12)
    for sample in (0, 5 * 10**9, 10**10 - 1):
        with pytest.raises(CorruptStoreError, match=f"resid_post, layer 12, block {sample // 65_536} of"):
            _ = rows.isel(sample=sample).values


def test_many_markers_are_listed(tmp_path: Path) -> None:
    url = with_markers(tmp_path / "markers.acts.zarr", 3000)
    assert missing_blocks(Root.of(url), actstore.open(url, partial=True).plan) == [3000]
