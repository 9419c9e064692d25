"""What every place that holds a store must do, asked of each server, of memory and of the file system by TensorStore.

A promise that a place is known to break is listed with that place, and the test fails when it is kept after all.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tensorstore as ts
from servers.everywhere import SERVERS, Started
from servers.server import Missing, Server

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

SECONDS = 20  # of one operation; a server that takes longer hangs
RETRIES = {"max_retries": 3, "initial_delay": "20ms", "max_delay": "100ms"}
ABSENT = b"\2"  # TensorStore's generation of what is not there


class Broken(Exception):
    """A promise was not kept."""


class Place(NamedTuple):
    """A fresh, empty prefix."""

    name: str
    deviations: frozenset[str]
    kv: Any

    def write(self, key: str, value: bytes, **conditions: Any) -> bytes:
        """The generation that was written; empty where a condition did not hold."""
        return self.kv.write(key, value, **conditions).result(timeout=SECONDS).generation

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        found = self.kv.read(key, byte_range=slice(start, stop)).result(timeout=SECONDS)
        return bytes(found.value) if found.state == "value" else None

    def generation(self, key: str) -> bytes:
        return self.kv.read(key).result(timeout=SECONDS).stamp.generation

    def keys(self, start: str = "", stop: str = "") -> list[str]:
        found = self.kv.list(ts.KvStore.KeyRange(start, stop)).result(timeout=SECONDS)
        return [key.decode() for key in found]


def keep(*, found: Any, expected: Any) -> None:
    if found != expected:
        raise Broken(f"found {str(found)[:200]}, expected {str(expected)[:200]}")


# Promises


def reading_what_is_not_there(place: Place) -> None:
    keep(found=place.read("nothing"), expected=None)
    keep(found=place.read("no/thing", 3, 5), expected=None)
    keep(found=place.keys(), expected=[])


def writing_and_reading(place: Place) -> None:
    for value in (b"hello", bytes(range(256)) * 9, b"\r\n\r\n0\r\n\r\n"):
        place.write("x", value)
        keep(found=place.read("x"), expected=value)


def an_empty_object(place: Place) -> None:
    place.write("empty", b"")
    keep(found=place.read("empty"), expected=b"")
    keep(found=place.keys(), expected=["empty"])


def ranges(place: Place) -> None:
    value = random.Random(0).randbytes(100_000)
    place.write("x", value)
    for start, stop in [(0, 1), (10, 20), (99_999, 100_000), (50_000, None), (0, None), (-20, None), (-100_000, None)]:
        keep(found=place.read("x", start, stop), expected=value[start:stop])


def overwriting(place: Place) -> None:
    generations = set()
    for number in range(8):
        generations.add(place.write("x", b"%d" % number * (8 - number)))
        keep(found=place.read("x"), expected=b"%d" % number * (8 - number))
    keep(found=len(generations), expected=8)


def conditional_create(place: Place) -> None:
    keep(found=bool(place.write("x", b"first", if_equal=ABSENT)), expected=True)
    keep(found=place.write("x", b"second", if_equal=ABSENT), expected=b"")
    keep(found=place.read("x"), expected=b"first")


def conditional_overwrite(place: Place) -> None:
    first = place.write("x", b"first")
    keep(found=first, expected=place.generation("x"))
    keep(found=bool(place.write("x", b"second", if_equal=first)), expected=True)
    keep(found=place.write("x", b"third", if_equal=first), expected=b"")
    keep(found=place.read("x"), expected=b"second")


def one_winner_of_many(place: Place) -> None:
    """Eight writers create the same key at once."""
    for turn in range(4):
        started = [place.kv.write(f"{turn}", b"%d" % number, if_equal=ABSENT) for number in range(8)]
        won = [number for number, each in enumerate(started) if each.result(timeout=SECONDS).generation]
        keep(found=len(won), expected=1)
        keep(found=place.read(f"{turn}"), expected=b"%d" % won[0])


def writers_of_one_key_leave_one_whole_value(place: Place) -> None:
    values = [bytes([number]) * 200_000 for number in range(6)]
    started = [place.kv.write("x", value) for value in values]
    for each in started:
        each.result(timeout=SECONDS)
    keep(found=place.read("x") in values, expected=True)


def what_was_written_is_listed_at_once(place: Place) -> None:
    for number in range(10):
        place.write(f"a{number}", b"1")
        keep(found=len(place.keys()), expected=number + 1)


def many_keys_in_order(place: Place) -> None:
    """2,050 keys: more than two pages of 1,000."""
    names = [f"{number:05d}.json" for number in range(2050)]
    random.Random(1).shuffle(names)
    for each in [place.kv.write(name, b"x") for name in names]:
        each.result(timeout=SECONDS)
    keep(found=sorted(place.keys()), expected=sorted(names))
    keep(found=sorted(place.keys("00999", "01002")), expected=["00999.json", "01000.json", "01001.json"])
    keep(found=sorted(place.keys("020", "03")), expected=sorted(names)[2000:])


def a_prefix_is_no_folder(place: Place) -> None:
    for name in ("a/1", "a/2", "ab/1", "a-/1"):
        place.write(name, b"x")
    keep(found=sorted(place.keys("a/", "a0")), expected=["a/1", "a/2"])
    keep(found=sorted(place.keys("a", "b")), expected=["a-/1", "a/1", "a/2", "ab/1"])


def deleting(place: Place) -> None:
    place.write("x", b"1")
    place.kv.write("x", None).result(timeout=SECONDS)
    keep(found=place.read("x"), expected=None)
    place.kv.write("x", None).result(timeout=SECONDS)  # again: nothing is there, and that is no error
    keep(found=place.keys(), expected=[])


def deleting_a_prefix(place: Place) -> None:
    for name in ("a/1", "a/b/2", "a/b/c/3", "ab", "b/1"):
        place.write(name, b"x")
    place.kv.delete_range(ts.KvStore.KeyRange("a/", "a0")).result(timeout=SECONDS)
    keep(found=sorted(place.keys()), expected=["ab", "b/1"])


def a_large_object(place: Place) -> None:
    value = random.Random(2).randbytes(24 << 20)
    place.write("large", value)
    keep(found=place.read("large") == value, expected=True)
    keep(found=place.read("large", -1000), expected=value[-1000:])


def odd_keys(place: Place) -> None:
    """Characters that an address must escape, and that a shell, XML or JSON would take for something else."""
    names = [
        "a b", "ä/ö", "plus+plus", "per%20cent", "q?x=1", "h#ash", "amp&eq=", "tilde~", "quote'\"", "日本", "a*b",
        "c:d", "e@f", "<xml>&amp;", "[b]{c}|^`", "$HOME", "é", "e\u0301", "x" * 200,
    ]  # fmt: skip
    for each in [place.kv.write(name, name.encode()) for name in names]:
        each.result(timeout=SECONDS)
    for name in names:
        keep(found=place.read(name), expected=name.encode())
    keep(found=sorted(place.keys()), expected=sorted(names))


def a_key_below_a_key(place: Place) -> None:
    place.write("a", b"1")
    place.write("a/b", b"2")
    keep(found=[place.read("a"), place.read("a/b")], expected=[b"1", b"2"])


def keys_of_900_bytes(place: Place) -> None:
    place.write("x" * 900, b"1")
    keep(found=place.read("x" * 900), expected=b"1")


def keys_with_an_empty_part(place: Place) -> None:
    place.write("a//b", b"1")
    keep(found=place.read("a//b"), expected=b"1")
    keep(found=place.keys(), expected=["a//b"])


PROMISES: dict[str, Callable[[Place], None]] = {
    promise.__name__.replace("_", " "): promise
    for promise in (
        reading_what_is_not_there, writing_and_reading, an_empty_object, ranges, overwriting, conditional_create,
        conditional_overwrite, one_winner_of_many, writers_of_one_key_leave_one_whole_value,
        what_was_written_is_listed_at_once, many_keys_in_order, a_prefix_is_no_folder, deleting, deleting_a_prefix,
        a_large_object, odd_keys, a_key_below_a_key, keys_of_900_bytes, keys_with_an_empty_part,
    )
}  # fmt: skip
FILE_SYSTEM = frozenset({"a key below a key", "keys of 900 bytes", "keys with an empty part"})
PLACES = [*SERVERS, "memory", "file system"]
CONTEXT = ts.Context({"s3_request_retries": RETRIES, "gcs_request_retries": RETRIES})
"""One for all: the pool of memory belongs to it."""


@pytest.fixture(params=PLACES)
def place_of(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], "Place"]:
    """Makes a fresh place on one server."""
    if request.param in SERVERS:
        started: Started = request.getfixturevalue("started_servers")
        try:
            server: Server = started[request.param]
        except Missing as error:
            pytest.skip(f"NOT RUN: {error}")
        for name, value in server.client_environ().items():
            monkeypatch.setenv(name, value)
        spec, deviations = server.spec, server.deviations
    else:
        deviations = FILE_SYSTEM if request.param == "file system" else frozenset()
        driver = {"driver": "memory"} if request.param == "memory" else {"driver": "file"}
        root = "" if request.param == "memory" else f"{tmp_path}/"
        spec = lambda path: driver | {"path": f"{root}{path}"}  # noqa: E731

    def make(promise: str) -> Place:
        path = f"{promise.replace(' ', '-')}-{os.getpid()}-{random.getrandbits(40):x}/"
        kv = ts.KvStore.open(spec(path), context=CONTEXT).result(timeout=SECONDS)
        return Place(request.param, deviations, kv)

    return make


@pytest.mark.sampled(3)
@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_kept_or_known_to_be_broken(promise: str, place_of: Callable[[str], Place]) -> None:
    place = place_of(promise)
    if promise not in place.deviations:
        PROMISES[promise](place)
        return
    with pytest.raises((Broken, ValueError, TimeoutError)):
        PROMISES[promise](place)


def test_every_deviation_is_a_promise(started_servers: Started) -> None:
    for name in SERVERS:
        try:
            assert started_servers[name].deviations <= PROMISES.keys(), name
        except Missing as error:
            pytest.skip(f"NOT RUN: {error}")
