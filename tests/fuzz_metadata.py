"""Reads fuzzed documents and shards. Run as a program it is guided by coverage: `python tests/fuzz_metadata.py`.

Needs atheris then; its arguments are libFuzzer's, such as `-max_total_time=600`.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from actstore import Layout, Plan, Site
from actstore.commits import Manifest, Marker, Ranges, Seal, TableMarker
from actstore.errors import CorruptStoreError, InputError
from actstore.kvstore import Root
from actstore.metadata import array_metadata
from actstore.objects import Objects
from actstore.schema import DocumentTableLayout, RootAttributes
from actstore.untrusted import canonical_json, parse_json

LAYOUT = Layout((Site("a", 4, (1, 3)), Site("b", 8, None, "float16")), 12, 8, 4)
PLAN = Plan.make(
    LAYOUT,
    {"model": {"name": "tiny"}, "list": [1, 2.5, None, True, {"deep": "é"}]},
    DocumentTableLayout(documents=3, tokens=40, numbers={"pages": "int64"}, strings={"id": 9, "text": 120}),
    {"tokenizer.json": b"{}"},
)
MARKER = Marker(
    format=1, block=1, samples=(8, 12), fingerprint=PLAN.fingerprint,
    checksums={"a": ("0" * 32, "f" * 32), "b": ("1" * 32,)},
    ranges={"document": (0, 2), "position": (0, 40), "token_id": (-1, 9)},
)  # fmt: skip
RANGES = Ranges(format=1, fingerprint=PLAN.fingerprint, columns={"document": "AAAAAAAAAAACAAAAAAAAAA=="})
SHARD_LAYOUT = Layout((Site("a", 6, None),), 16, 16, 4, ())
SHARD_ROWS = (np.arange(96) % 7 - 3).reshape(16, 6)
SHARD_METADATA = array_metadata(Plan.make(SHARD_LAYOUT, {}), complete=True)["a"]


def _root_attributes(data: bytes) -> Any:
    """What the ledger makes of the root group; other parts of the document are never looked at."""
    try:
        return RootAttributes.model_validate(parse_json(data, where="x")["attributes"]["actstore"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CorruptStoreError | InputError):
            raise
        raise CorruptStoreError("no valid attribute") from None


def _reader(kind: Any) -> Callable[[bytes], Any]:
    return lambda data: kind.from_json(data, where="x")


ROOT_GROUP = {
    "zarr_format": 3, "node_type": "group",
    "attributes": {"actstore": {"format": 1, "status": "complete", "fingerprint": PLAN.fingerprint}},
}  # fmt: skip
DOCUMENTS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "plan": (_reader(Plan), PLAN.to_json()),
    "marker": (_reader(Marker), MARKER.to_json()),
    "documents marker": (
        _reader(TableMarker),
        TableMarker(format=1, fingerprint=PLAN.fingerprint, checksums={"text_bytes": "a" * 32}).to_json(),
    ),
    "manifest": (_reader(Manifest), Manifest(format=1, fingerprint=PLAN.fingerprint, blocks=(MARKER,)).to_json()),
    "ranges": (_reader(Ranges), RANGES.to_json()),
    "seal": (_reader(Seal), Seal(format=1, fingerprint=PLAN.fingerprint, manifest_sha256="0" * 64).to_json()),
    "root group": (_root_attributes, canonical_json(ROOT_GROUP)),
}


def check_document(read: Callable[[bytes], Any], data: bytes) -> str:
    """Reads a document: `refused`, or `read` if it says what an ordinary JSON parser finds in it.

    Raises:
        Exception: whatever is none of actstore's errors.
        AssertionError: what was read is not what is there.
    """
    try:
        document = read(data)
    except CorruptStoreError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert len(message) < 600, f"a message of {len(message)} letters"
        assert message.isprintable(), f"a message that is not plain text: {message!r}"
        return "refused"
    found = json.loads(data)
    found = found["attributes"]["actstore"] if isinstance(document, RootAttributes) else found
    said = json.loads(canonical_json(document.model_dump(mode="json")))
    missing = {
        key: value for key, value in found.items() if said.get(key) != value and not _grown(value, said.get(key))
    }
    assert not missing, f"{missing} comes back as { {key: said.get(key) for key in missing} }"
    return "read"


def _grown(found: Any, said: Any) -> bool:
    """Whether `said` is `found` with the defaults of fields that were left out."""
    if isinstance(found, dict) and isinstance(said, dict):
        return all(key in said and _grown(value, said[key]) for key, value in found.items())
    if isinstance(found, list) and isinstance(said, list):
        return len(found) == len(said) and all(map(_grown, found, said))
    return bool(found == said)


def sound_shard(index: np.ndarray | None = None) -> bytes:
    """A shard of 16 rows in 4 chunks; `index` replaces the offsets and lengths, its checksum right."""
    chunks = [_with_checksum(rows.tobytes()) for rows in SHARD_ROWS.astype("bfloat16").reshape(4, 4, 6)]
    size = len(chunks[0])
    if index is None:
        index = np.array([[size * number, size] for number in range(4)])
    return b"".join(chunks) + _with_checksum(index.astype("<u8").tobytes())


def _with_checksum(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def check_shard(url: Path, data: bytes) -> str:
    """Reads every chunk of a shard with these bytes: `refused`, or the rows of one of its chunks each."""
    place = url / "a" / "c" / "0" / "0"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    objects = Objects.of(Root.of(url), "a", SHARD_METADATA)
    refused = 0
    for start in range(0, 16, 4):
        try:
            rows = np.asarray(objects.begin(f"read a of {url}", slice(start, start + 4)).result())
        except CorruptStoreError:
            refused += 1
            continue
        chunks = SHARD_ROWS.reshape(4, 4, 6)
        assert any(np.array_equal(rows.astype(np.float64), chunk) for chunk in chunks), "rows that were never written"
    return "refused" if refused else "right"


def one_input(data: bytes) -> None:
    """What libFuzzer calls: the first byte chooses the document."""
    if not data:
        return
    kinds = list(DOCUMENTS.values())
    read, sound = kinds[data[0] % len(kinds)]
    check_document(read, data[1:])
    place = data[0] * len(sound) // 256  # a sound document with the given bytes in it comes further
    check_document(read, sound[:place] + data[1:] + sound[place + len(data) - 1 :])


def main() -> None:
    """Fuzzes until it is told to stop."""
    import atheris

    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as corpus:
        for number, (_, data) in enumerate(DOCUMENTS.values()):
            (Path(corpus) / str(number)).write_bytes(bytes([number]) + data)
        atheris.Setup([*sys.argv, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
