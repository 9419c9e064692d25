"""Fuzzing of all that is stored as JSON, and of a shard's index: whatever the bytes, a right value or a clear error.

The mutations here are the same in every run. `fuzz_metadata.py` looks further, guided by coverage, where atheris is
installed.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_metadata import DOCUMENTS, SHARD_LAYOUT, check_document, check_shard, sound_shard

from actstore.errors import CorruptStoreError
from actstore.schema import Plan

RUNS = 1500  # of each document and kind of mutation
TOKENS = [
    b"0", b"-1", b"1e999", b"1.0", b"true", b"null", b"NaN", b'"x"', b'"\\ud800"', b'"\\u0000"', b"[]", b"{}", b"[[]]",
    b"9" * 5000, b"18446744073709551616", b'"' + b"a" * 5000 + b'"', b'{"a":1,"a":2}', b"\xff", b'"..\\/x"',
    b'"file:|"',
]  # fmt: skip


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.choices(range(len(data) + 1), k=2))
    return data[:first] if chance.random() < 0.3 else data[:first] + data[last:]


def spliced(data: bytes, chance: random.Random) -> bytes:
    other = chance.choice([document for _, document in DOCUMENTS.values()])
    first, last = sorted(chance.choices(range(len(other) + 1), k=2))
    place = chance.randrange(len(data))
    return data[:place] + other[first:last] + data[place:]


def with_token(data: bytes, chance: random.Random) -> bytes:
    """One value of the document replaced: the commonest way in which a damaged or hostile document is nearly right."""
    path = chance.choice(_leaves(json.loads(data)))
    marked = json.dumps(_replaced(json.loads(data), path, "HERE"), sort_keys=True, separators=(",", ":")).encode()
    return marked.replace(b'"HERE"', chance.choice(TOKENS), 1)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, inner in items for leaf in _leaves(inner, (*path, key))]


def _replaced(value: Any, path: tuple[Any, ...], new: str) -> Any:
    if not path:
        return new
    value[path[0]] = _replaced(value[path[0]], path[1:], new)
    return value


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped, "cut": cut, "spliced": spliced, "with token": with_token,
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_mutated_document_is_read_right_or_refused(name: str, mutation: str) -> None:
    read, data = DOCUMENTS[name]
    chance = random.Random(f"{name} {mutation}")
    outcomes = Counter(check_document(read, MUTATIONS[mutation](data, chance)) for _ in range(RUNS))
    assert outcomes["refused"] > RUNS // 20, outcomes
    print(f"{name}, {mutation}: {dict(outcomes)}")


def test_a_document_that_is_misread_would_be_noticed() -> None:
    """A reader that lets an error of another library through, or that gives what no writer would write."""
    _, data = DOCUMENTS["plan"]
    with pytest.raises(json.JSONDecodeError):
        check_document(json.loads, data[:-1])
    with pytest.raises(AssertionError, match="comes back as"):
        check_document(lambda given: Plan.model_validate_json(given.replace(b"tiny", b"Tiny")), data)


@pytest.mark.parametrize("mutation", ["flipped", "cut"])
def test_a_mutated_shard_is_read_right_or_refused(mutation: str, tmp_path: Path) -> None:
    chance = random.Random(mutation)
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        outcomes[check_shard(tmp_path / "x.acts.zarr", MUTATIONS[mutation](sound_shard(), chance))] += 1
    assert outcomes["refused"] > 100, outcomes


def test_a_mutated_index_with_a_right_checksum_is_read_right_or_refused(tmp_path: Path) -> None:
    """The index is what a hostile store would forge: any offsets and lengths, its checksum right."""
    chance = random.Random("index")
    numbers = [0, 1, 52, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 52]
    chunks = SHARD_LAYOUT.block_samples // SHARD_LAYOUT.chunk_samples
    for _ in range(400):
        entries = [
            chance.choice(numbers) if chance.random() < 0.5 else chance.randrange(300) for _ in range(2 * chunks)
        ]
        check_shard(tmp_path / "x.acts.zarr", sound_shard(np.array(entries, np.uint64)))


def test_the_sound_shard_is_read(tmp_path: Path) -> None:
    assert check_shard(tmp_path / "x.acts.zarr", sound_shard()) == "right"


@pytest.mark.slow
@pytest.mark.long
def test_a_fuzz_guided_by_coverage_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: it has wheels for Linux on x86-64, Python <= 3.13")
    program = Path(__file__).parent / "fuzz_metadata.py"
    command = [sys.executable, program, "-runs=20000", "-seed=1", "-max_len=4096", "-rss_limit_mb=2000", "-timeout=100"]
    fresh = ["sh", "-c", '"$@"; exit $?', "sh"]  # a program begins with the peak memory of what started it
    answer = subprocess.run([*fresh, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    print(answer.stderr.splitlines()[-1])


def test_errors_of_a_hostile_document_are_one_short_line() -> None:
    _, data = DOCUMENTS["plan"]
    for token in TOKENS:
        for field in (b'"codec":"crc32c"', b'"samples":12', b'"name":"a"'):
            assert field in data
            key = field.partition(b":")[0]
            with pytest.raises(CorruptStoreError) as caught:
                Plan.from_json(data.replace(field, key + b":" + token, 1), where="x")
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 600
