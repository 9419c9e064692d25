"""Damages of a store as data: which files change, and into what. Made from the files of sound stores.

A subject is a small store and its relatives: the same plan with other values, with other last bits, before its seal,
and another plan. Every generator below gives one kind of damage; `damages_of` gives them all.
"""

import dataclasses
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from kill_points import block_keys
from stores import Contents, make_contents, make_documents, tree

import actstore
from actstore import Column, DocumentTable, Layout, Site
from actstore.layout import Codec
from actstore.markers import MANIFEST_KEY, PLAN_KEY, SEAL_KEY, TABLE_KEY, marker_key

Change = bytes | Literal["missing", "folder", "loop", "locked"]
Changes = dict[str, Change]
Found = Iterator[tuple[str, Changes]]  # what it is, and the files it changes
NOWHERE = (1 << 64) - 1  # offset and length of a chunk that a shard does not hold


@dataclasses.dataclass(frozen=True)
class Damage:
    """Some files of a subject that are not what they were."""

    kind: str
    what: str
    changes: Changes

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A store that is damaged, and the files of its relatives."""

    name: str
    contents: Contents
    blocks: tuple[int, ...]
    """Those that are committed. The store is sealed if they are all."""
    url: Path
    files: Mapping[str, bytes]
    other_values: Mapping[str, bytes]
    other_bits: Mapping[str, bytes]
    other_plan: Mapping[str, bytes]
    before_seal: Mapping[str, bytes]

    @property
    def sealed(self) -> bool:
        return SEAL_KEY in self.files

    def chunks(self, key: str) -> list[tuple[int, int]]:
        """Offset and length of every chunk of a shard, from its index."""
        layout = self.contents.layout
        count = layout.block_samples // layout.chunk_samples
        numbers = struct.unpack(f"<{2 * count}Q", self.files[key][-16 * count - 4 : -4])
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def shards(self) -> list[str]:
        """Keys of the site shards that are committed."""
        names = [site.name for site in self.contents.layout.sites]
        return [key for block in self.blocks for key in self.keys(block) if key.split("/")[0] in names]

    def keys(self, block: int) -> list[str]:
        """Keys of all data of a block, `valid` too."""
        return [*block_keys(self.contents.layout, block), f"valid/c/{block}"]

    def chosen(self) -> list[str]:
        """Two files of every array or folder: those of a later block are treated alike."""
        folders: dict[str, list[str]] = {}
        for key in self.files:
            folders.setdefault(key.split("/c/")[0] if "/c/" in key else key.rpartition("/")[0] or key, []).append(key)
        found = [key for keys in folders.values() for key in (keys if keys[0].startswith(".act/") else keys[:2])]
        return [key for key in found if self.files[key]]


# Subjects

SITES = (  # shards of one size: any may lie in the place of any
    Site("resid_post", 4, (0, 4)),
    Site("mlp_out", 4, (4, 9), "float16"),
    Site("final_norm", 2, None, "float32"),
)
COLUMNS = (
    Column("document", "int32"),
    Column("position", "int32"),
    Column("score", "float32"),
    Column("flag", "uint8"),
)
SMALL = {"samples": 19, "block_samples": 8, "chunk_samples": 2, "columns": COLUMNS}
PAGES = {"samples": 100, "block_samples": 64, "chunk_samples": 32, "columns": (Column("position", "int64"),)}
SUBJECTS: dict[str, tuple[dict[str, Any], Codec, tuple[int, ...]]] = {
    "crc32c": (SMALL, "crc32c", (0, 1, 2)),
    "none": (SMALL, "none", (0, 1, 2)),
    "zstd": (SMALL, "zstd", (0, 1, 2)),
    "unfinished": (SMALL, "crc32c", (0, 2)),
    "pages": (PAGES, "crc32c", (0, 1)),
    "pages of no codec": (PAGES, "none", (0, 1)),
}
OLD_FIELDS = {"format", "block", "samples", "fingerprint", "checksums"}
MOST_OF_A_KIND = {"crc32c": 24, "none": 8, "zstd": 8, "unfinished": 10, "pages": 8, "pages of no codec": 8}
ASSETS = {"config.json": b'{"model_type": "made-up"}', "words.txt": b"twenty-five bytes of text"}


def make_subject(name: str, folder: Path) -> Subject:
    """Writes a subject and its relatives below `folder`."""
    sizes, codec, blocks = SUBJECTS[name]
    sites = SITES if sizes is SMALL else (Site("resid_post", 128, (3,)), Site("embed", 64, None, "float32"))
    contents = make_contents(Layout(sites, codec=codec, **sizes))
    table = dataclasses.replace(make_documents(), columns={"pages": [3, -1, 0, 2**62, 7]})
    contents = dataclasses.replace(contents, documents=table if codec == "crc32c" and sizes is SMALL else None)
    other = dataclasses.replace(make_contents(contents.layout, seed=1), documents=_other_documents(contents))
    last_bits = {name: _last_bits(values) for name, values in (contents.rows | contents.columns).items()}
    close = dataclasses.replace(
        contents,
        rows={name: last_bits[name] for name in contents.rows},
        columns={name: last_bits[name] for name in contents.columns},
        documents=_other_documents(contents),
    )
    plan = dataclasses.replace(contents, provenance={"model": {"name": "another"}})
    sealed = len(blocks) == contents.layout.blocks
    relatives = {"files": contents, "other_values": other, "other_bits": close, "other_plan": plan}
    urls = {key: _write(folder / f"{key}.acts.zarr", value, blocks, sealed) for key, value in relatives.items()}
    urls["before_seal"] = _write(folder / "before_seal.acts.zarr", contents, blocks, False)
    return Subject(name, contents, blocks, urls["files"], **{key: tree(url) for key, url in urls.items()})


def _write(url: Path, contents: Contents, blocks: tuple[int, ...], seal: bool) -> Path:
    with actstore.create(
        url, contents.layout, contents.provenance, documents=contents.documents, assets=ASSETS, seal=seal
    ) as writer:
        for block in blocks:
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns)
    return url


def _last_bits(values: np.ndarray) -> np.ndarray:
    """The same with the last bit of every value turned."""
    return (values.view(f"u{values.itemsize}") ^ 1).view(values.dtype)


def _other_documents(contents: Contents) -> DocumentTable | None:
    """Documents of the same sizes."""
    table = contents.documents
    if table is None:
        return None
    turned = {"token_id": _last_bits(table.token_id), "token_start": table.token_end, "token_end": table.token_end}
    texts = [text.replace("e", "a") for text in table.texts]
    ids = [name.replace("d", "b") for name in table.ids]
    edges = table.token_offsets + np.array([0, 1, 0, 0, 0, 0])
    return dataclasses.replace(table, ids=ids, texts=texts, token_offsets=edges, columns={"pages": range(5)}, **turned)


# To a store and back


@contextmanager
def damaged(subject: Subject, damage: Damage) -> Iterator[None]:
    """The subject's store is damaged inside, and as it was afterwards."""
    try:
        for key, change in damage.changes.items():
            _put(subject.url / key, change)
        yield
    finally:
        for key in damage.changes:
            _put(subject.url / key, subject.files.get(key, "missing"))


def _put(path: Path, change: Change) -> None:
    """Makes the file what `change` says. Folders that are empty then go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    match change:
        case bytes():
            path.write_bytes(change)
        case "folder":
            (path / "inside").mkdir(parents=True)
        case "loop":
            path.symlink_to(path.name)
        case "locked":
            path.touch(mode=0)
        case "missing":
            with suppress(OSError):
                path.parent.rmdir()


# Kinds of damage


def _flipped(data: bytes, place: int, *, seed: str = "") -> bytes:
    """One bit of one byte; which bit depends on the place."""
    place %= len(data)
    bit = zlib.crc32(f"{seed}{place}".encode()) % 8
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def bits(subject: Subject) -> Found:
    """First, middle and last byte of a file; of shards also their chunks' checksums and their index."""
    for key in subject.files if subject.name == "crc32c" else subject.chosen():
        data = subject.files[key]
        places = {"the first byte": 0, "the last byte": -1, "the middle": len(data) // 2} if data else {}
        if key in subject.shards():
            (_, length), *_ = chunks = subject.chunks(key)
            places = {
                "the first byte": 0,
                "the first chunk": length // 2,
                "the last byte of the first chunk": length - 1,
                "an offset of the index": -4 - 16 * len(chunks),
                "a length of the index": -4 - 8,
                "the last byte": -1,
            }
            if subject.contents.layout.codec != "none":
                places["a chunk's checksum"] = length - 4
        for what, place in places.items():
            yield f"{what} of {key}", {key: _flipped(data, place, seed=key)}


def zeros(subject: Subject) -> Found:
    """Pages of 4,096 and 512 bytes at their boundaries, as a file system loses them, and whole files."""
    for key in subject.chosen():
        yield f"all of {key}", {key: bytes(len(subject.files[key]))}
    for key in subject.shards():
        data = subject.files[key]
        start, stop = subject.contents.layout.block_range(_block(key))
        used = (stop - start) * subject.contents.layout.site(key.split("/")[0]).row_bytes
        for page in (4096, 512):
            starts = range(0, used, page) if page == 4096 else range(page, used, 7 * page)
            for start in starts if used > page else []:
                lost = data[:start] + bytes(len(data[start : start + page])) + data[start + page :]
                yield f"bytes {start} to {start + page} of {key}", {key: lost}


def cuts(subject: Subject) -> Found:
    """The end of a file is not there."""
    for key in subject.chosen():
        data = subject.files[key]
        for keep in sorted({1, len(data) // 2, len(data) - 4, len(data) - 1} - {len(data)}):
            if 0 < keep < len(data):
                yield f"{key} after {keep} of {len(data)} bytes", {key: data[:keep]}


def empties(subject: Subject) -> Found:
    for key in subject.chosen():
        yield key, {key: b""}


def longer(subject: Subject) -> Found:
    """A file has more bytes than were written."""
    for key in subject.chosen():
        data = subject.files[key]
        yield f"junk in front of {key}", {key: b"\x07" * 16 + data}
        yield f"junk behind {key}", {key: data + b"\x07junk"}
        if subject.contents.layout.codec != "zstd" and key in subject.shards():
            hole = sum(length for _, length in subject.chunks(key))
            yield f"a hole in {key}", {key: data[:hole] + b"a hole" + data[hole:]}
            yield f"{key} twice", {key: data * 2}


def missing(subject: Subject) -> Found:
    """Any file. A marker that is missing from an unfinished store is a block that was not written yet: no damage."""
    for key in subject.files if subject.name == "crc32c" else subject.chosen():
        if subject.sealed or not key.startswith((".act/commits/", TABLE_KEY)):
            yield key, {key: "missing"}


def folders(subject: Subject) -> Found:
    for key in subject.chosen():
        if subject.sealed or not key.startswith((".act/commits/", TABLE_KEY)):
            yield key, {key: "folder"}


def loops(subject: Subject) -> Found:
    """A link to itself: a file that no user may read, root neither."""
    for key in subject.chosen():
        yield key, {key: "loop"}


def swaps(subject: Subject) -> Found:
    """Two files of the same size in each other's place: other layers, blocks, sites, columns."""
    for one, other in _alike(subject):
        yield f"{one} and {other}", {one: subject.files[other], other: subject.files[one]}


def copies(subject: Subject) -> Found:
    for one, other in _alike(subject):
        yield f"{one} over {other}", {other: subject.files[one]}
    for key in (".act/documents.json", *map(marker_key, subject.blocks)):
        if key in subject.files:
            yield f"the plan over {key}", {key: subject.files[PLAN_KEY]}


def _alike(subject: Subject) -> Iterator[tuple[str, str]]:
    """Pairs of files that differ and have the same size, or are markers or metadata."""
    groups: dict[object, list[str]] = {}
    for key, data in subject.files.items():
        if key in {f"{name}/c/{subject.contents.layout.blocks - 1}" for name in ("valid", "flag")}:
            continue  # few bytes, the rest is padding: they may agree with others where it matters
        folder = key.startswith(".act/commits/") or (key.endswith("/zarr.json") and "nodes")
        groups.setdefault(folder or len(data), []).append(key)
    for keys in groups.values():
        for step in (1, 2, 5):
            for one, other in zip(keys, keys[step:], strict=False):
                if subject.files[one] != subject.files[other]:
                    yield one, other


def stale(subject: Subject) -> Found:
    """A file of an earlier run of the same plan, whose values were others, a little or altogether."""
    for name, files in [("other values", subject.other_values), ("other last bits", subject.other_bits)]:
        for key in (key for key, data in subject.files.items() if files[key] != data):
            if subject.name == "crc32c" or key in subject.chosen():
                yield f"{key} with {name}", {key: files[key]}
        for block in subject.blocks:
            changed = [key for key in subject.keys(block) if files[key] != subject.files[key]]
            yield f"all of block {block} with {name}", {key: files[key] for key in changed}


def mixtures(subject: Subject) -> Found:
    """Shards of which some chunks come from another run, or chunks lie in another order, each with its checksum."""
    for key in subject.shards():
        data, (first, second, *_) = subject.files[key], subject.chunks(key)
        for name, files in [("other values", subject.other_values), ("other last bits", subject.other_bits)]:
            if len(files[key]) == len(data):
                half = second[0]
                yield f"half of {key} with {name}", {key: files[key][:half] + data[half:]}
        yield f"chunks of {key} in another order", {key: _indexed(data, [second, first, *subject.chunks(key)[2:]])}
        yield f"a chunk twice in {key}", {key: _indexed(data, [second, *subject.chunks(key)[1:]])}
        nowhere = (NOWHERE, NOWHERE)
        yield f"a chunk taken out of {key}", {key: _indexed(data, [nowhere, *subject.chunks(key)[1:]])}


def rewritten(subject: Subject) -> Found:
    """Another value with the checksum that belongs to it."""
    for key in subject.chosen():
        if "/c/" not in key:
            continue
        data = subject.files[key]
        if key not in subject.shards():
            yield f"the first value of {key}", {key: _with_checksum(_flipped(data[:-4], 0, seed=key))}
        elif subject.contents.layout.codec == "crc32c":
            chunk = subject.chunks(key)[0][1]
            yield f"the first value of {key}", {key: _with_checksum(_flipped(data[: chunk - 4], 0)) + data[chunk:]}


def blocks(subject: Subject) -> Found:
    """All objects of a block in the place of another, with its marker or without."""
    for one, other in [(subject.blocks[0], subject.blocks[1]), (subject.blocks[1], subject.blocks[0])]:
        pairs = zip(block_keys(subject.contents.layout, other), block_keys(subject.contents.layout, one), strict=True)
        changes: Changes = {key: subject.files[source] for key, source in pairs}
        changes = {key: data for key, data in changes.items() if data != subject.files[key]}
        yield f"block {one} over block {other}", changes
        marker: Changes = {marker_key(other): subject.files[marker_key(one)]}
        yield f"block {one} over block {other} with its marker", changes | marker


def foreign(subject: Subject) -> Found:
    """Documents of a run with another plan."""
    for key, data in subject.files.items():
        if subject.other_plan[key] != data:
            yield key, {key: subject.other_plan[key]}


def unsealed(subject: Subject) -> Found:
    """Metadata from before the seal, in a sealed store."""
    for key, data in subject.before_seal.items():
        if subject.sealed and subject.files[key] != data:
            yield key, {key: data}


def edits(subject: Subject) -> Found:
    """One field of one document is another, lacks, or is too many."""
    for key, data in subject.files.items():
        if not key.endswith(".json") or key.startswith("assets/") or key == MANIFEST_KEY:
            continue
        found = [*_edits(json.loads(data))]
        if key.endswith("zarr.json"):  # compared as bytes: one field is as good as another
            found = found[:: max(len(found) // 3, 1)]
        elif subject.name not in ("crc32c", "unfinished"):
            found = found[::4]
        if "/commits/" in key and not subject.sealed:  # a marker of an older version: see `harmless`
            found = [(what, document) for what, document in found if what not in ("no chunks", "no ranges")]
        for what, document in found:
            if not what.endswith(".codec crc32c") and not what.endswith(".dtype bfloat16"):  # defaults: see `harmless`
                yield f"{what} of {key}", {key: _canonical(document)}


def _edits(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every way to change one place of a JSON value, with the changed value."""
    match value:
        case dict():
            for name, inner in value.items():
                shown = f" {inner}" if isinstance(inner, str) and len(inner) < 20 else ""
                yield f"no {path}{name}{shown}", {key: other for key, other in value.items() if key != name}
                for what, changed in _edits(inner, f"{path}{name}."):
                    yield what, value | {name: changed}
            yield f"one field more in {path or 'all'}", value | {"more": 1}
        case list():
            for place, inner in enumerate(value):
                for what, changed in _edits(inner, f"{path}{place}."):
                    yield what, [*value[:place], changed, *value[place + 1 :]]
            yield f"one item more in {path}", [*value, value[-1] if value else 1]
        case str():
            last = "1" if value.endswith("0") else "0"
            yield f"another {path}", value[:-1] + last
        case bool() | None:
            yield f"another {path}", not value
        case _:
            yield f"another {path}", value + 1


KINDS: dict[str, Callable[[Subject], Found]] = {
    "one bit": bits,
    "zeros": zeros,
    "cut": cuts,
    "empty": empties,
    "longer": longer,
    "missing": missing,
    "a folder": folders,
    "a loop of links": loops,
    "swapped": swaps,
    "copied": copies,
    "stale": stale,
    "a mixture of chunks": mixtures,
    "rewritten with its checksum": rewritten,
    "a block in another's place": blocks,
    "of another plan": foreign,
    "from before the seal": unsealed,
    "an edited document": edits,
}


def damages_of(subject: Subject, *, most_of_a_kind: int | None = None) -> list[Damage]:
    """The damages of a subject, each once. Of a kind with too many, some evenly among them; None takes the usual."""
    found: dict[tuple[tuple[str, Change], ...], Damage] = {}
    most = most_of_a_kind or MOST_OF_A_KIND[subject.name]
    for kind, generator in KINDS.items():
        all_of_kind = [Damage(kind, what, changes) for what, changes in generator(subject)]
        for damage in all_of_kind[:: -(-len(all_of_kind) // most) or 1]:
            assert all(subject.files[key] != change for key, change in damage.changes.items()), damage
            found.setdefault(tuple(sorted(damage.changes.items())), damage)
    return list(found.values())


# Changes that harm nothing


def harmless(subject: Subject) -> dict[str, Changes]:
    """Changed files by the reason why no value depends on them."""
    layout, last = subject.contents.layout, subject.contents.layout.blocks - 1
    shard = next(key for key in subject.shards() if key.startswith("resid_post/") and key.endswith(f"/{last}/0"))
    data, chunks, used = subject.files[shard], subject.chunks(shard), _used(subject, shard)
    hole = sum(length for _, length in chunks)
    found: dict[str, Changes] = {
        "a file that is none of the format's": {"notes.txt": b"mine"},
        "a lock file of a dead writer": {f"{shard}.__lock": b"half a sha"},
        "a shard of a block that is not there": {shard.replace(f"/{last}/0", f"/{last + 1}/0"): data},
    }
    if SEAL_KEY not in subject.files:  # the manifest has the markers as they were written
        older = {
            name: value for name, value in json.loads(subject.files[marker_key(last)]).items() if name in OLD_FIELDS
        }
        found["a marker of an older version"] = {marker_key(last): _canonical(older)}
        found["spaces in a marker"] = {marker_key(last): subject.files[marker_key(last)] + b" \n"}
    found["the padding of valid"] = {f"valid/c/{last}": _with_checksum(b"\1" * layout.block_samples)}
    if layout.codec == "zstd":  # nobody knows how long its shards have to be
        found["bytes that no entry of the index points to"] = {shard: data[:hole] + b"a hole" + data[hole:]}
    if layout.codec == "crc32c":
        plan = json.loads(subject.files[PLAN_KEY])
        del plan["layout"]["codec"]
        found["a default that the plan does not say"] = {PLAN_KEY: _canonical(plan)}
    if len(used) < len(chunks):
        found["a chunk of padding"] = {shard: _flipped(data, chunks[-1][0])}
    if layout.codec == "none":
        found["padding beside the last sample"] = {shard: _flipped(data, sum(used[-1]) - 1)}
    if not subject.sealed:
        block = next(block for block in range(layout.blocks) if block not in subject.blocks)
        key = block_keys(layout, block)[-1]
        found["data of a block without a marker"] = {key: b"torn"}
    return found


def _used(subject: Subject, key: str) -> list[tuple[int, int]]:
    """Chunks of a shard that hold samples."""
    layout = subject.contents.layout
    start, stop = layout.block_range(_block(key))
    return subject.chunks(key)[: -(-(stop - start) // layout.chunk_samples)]


def _block(shard: str) -> int:
    return int(shard.split("/")[-2])


def _indexed(data: bytes, chunks: list[tuple[int, int]]) -> bytes:
    """A shard with another index."""
    index = struct.pack(f"<{2 * len(chunks)}Q", *(number for chunk in chunks for number in chunk))
    return data[: -len(index) - 4] + _with_checksum(index)


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _with_checksum(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")
