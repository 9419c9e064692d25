"""Hostile stores by name: each begins as a sound small store, and one thing in it is made to cost or to crash.

Where a fingerprint or checksum has to be right for a reader to come as far as the hostile part, it is: an attacker can
compute them too. Huge files are sparse: they cost an attacker nothing.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from stores import LAYOUT, make_contents

PLAN, ROOT, SEAL, MANIFEST = ".act/plan.json", "zarr.json", ".act/SEALED.json", ".act/manifest.json"
RANGES = ".act/ranges.json"
MARKERS, TABLE = ".act/commits", ".act/documents.json"
MARKER = f"{MARKERS}/00000001.json"
SHARD = "resid_post/c/1/1/0"  # layer 5, block 1: four chunks of 4 rows, 6 wide, bfloat16
CHUNK_BYTES = 4 * 6 * 2 + 4
ENDLESS = 1 << 40  # sparse
CODECS = {"complete": "crc32c", "unfinished": "crc32c", "plain": "none", "zstd": "zstd"}

Change = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to make a store hostile, and which object the errors or findings name; None: nothing is wrong with it.

    `base` is the sound store it begins as. `silent`: reading may give other values, which only `verify` can tell.
    """

    make: Callable[[Path], None]
    names: str | None
    base: str = "complete"
    silent: bool = False


def make_sound(folder: Path) -> dict[str, Path]:
    """The stores that cases begin as."""
    stores = {}
    for base, codec in CODECS.items():
        contents = make_contents(dataclasses.replace(LAYOUT, codec=codec))
        blocks = range(2) if base == "unfinished" else None
        stores[base] = contents.write(folder / f"{base}.acts.zarr", blocks=blocks, seal=base != "unfinished")
    return stores


# Files


def replaced(url: Path, key: str) -> Path:
    """The path of an object, with nothing there."""
    path = url / key
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def holds(key: str, data: bytes) -> Callable[[Path], None]:
    return lambda url: (url / key).parent.mkdir(parents=True, exist_ok=True) or _write(url / key, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def sparse(key: str, size: int = 1 << 30, *, tail: bytes = b"") -> Callable[[Path], None]:
    """A file of `size` zeros that takes no space, and `tail` at its end."""

    def make(url: Path) -> None:
        with replaced(url, key).open("wb") as file:
            file.truncate(size - len(tail))
            file.seek(0, os.SEEK_END)
            file.write(tail)

    return make


def fifo(key: str) -> Callable[[Path], None]:
    return lambda url: os.mkfifo(replaced(url, key))


def folder(key: str) -> Callable[[Path], None]:
    return lambda url: replaced(url, key).mkdir()


def link(key: str, target: str) -> Callable[[Path], None]:
    return lambda url: replaced(url, key).symlink_to(target)


def unix_socket(key: str) -> Callable[[Path], None]:
    def make(url: Path) -> None:
        path = replaced(url, key)
        before = Path.cwd()
        os.chdir(path.parent)  # the address of a socket has room for 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(before)

    return make


def several(*makes: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(url: Path) -> None:
        for each in makes:
            each(url)

    return make


def junk_markers(*names: bytes, count: int = 0) -> Callable[[Path], None]:
    def make(url: Path) -> None:
        place = os.fsencode(url / MARKERS)
        for name in [*names, *(b"junk-%09d.json" % number for number in range(count))]:
            os.close(os.open(place + b"/" + name, os.O_CREAT | os.O_WRONLY))

    return make


def deep_folders(key: str, levels: int) -> Callable[[Path], None]:
    """Folders in folders, deeper than a path can be long. Python cannot remove them, `rm` can."""

    def make(url: Path) -> None:
        place = os.open(url / key, os.O_RDONLY)
        for _ in range(levels):
            os.mkdir("d", dir_fd=place)
            inner = os.open("d", os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
        os.close(place)

    return make


# Documents


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def edited(key: str, change: Change) -> Callable[[Path], None]:
    """A stored document with a change, as canonical JSON."""

    def make(url: Path) -> None:
        document = json.loads((url / key).read_bytes())
        (url / key).write_bytes(canonical(change(document) or document))

    return make


def text_edited(key: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def make(url: Path) -> None:
        data = (url / key).read_bytes()
        assert old in data, f"{old!r} is not in {key}"
        (url / key).write_bytes(data.replace(old, new, 1))

    return make


def fingerprint_of(plan: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({key: value for key, value in plan.items() if key != "fingerprint"})).hexdigest()


def planned(change: Change, *, keep_markers: bool = True) -> Callable[[Path], None]:
    """A plan with a change and the right fingerprint, in every document that names it."""

    def make(url: Path) -> None:
        plan = json.loads((url / PLAN).read_bytes())
        before = plan["fingerprint"].encode()
        plan = change(plan) or plan
        plan["fingerprint"] = fingerprint_of(plan)
        (url / PLAN).write_bytes(canonical(plan))
        for path in [url / ROOT, *(url / ".act").rglob("*.json")]:
            path.write_bytes(path.read_bytes().replace(before, plan["fingerprint"].encode()))
        if (url / SEAL).exists():
            sealed(url)
        if not keep_markers:
            shutil.rmtree(url / MARKERS)

    return make


def sealed(url: Path) -> None:
    """A seal that fits the manifest."""
    seal = json.loads((url / SEAL).read_bytes())
    seal["manifest_sha256"] = hashlib.sha256((url / MANIFEST).read_bytes()).hexdigest()
    (url / SEAL).write_bytes(canonical(seal))


def in_layout(**fields: Any) -> Change:
    return lambda plan: plan["layout"].update(fields)


def in_site(**fields: Any) -> Change:
    return lambda plan: plan["layout"]["sites"][0].update(fields)


def in_documents(**fields: Any) -> Change:
    return lambda plan: plan["documents"].update(fields)


def in_provenance(**fields: Any) -> Change:
    return lambda plan: plan["provenance"].update(fields)


def small_sites(count: int, layers: int) -> list[dict[str, Any]]:
    return [
        {"name": f"site_{number}", "width": 4, "layers": list(range(layers)), "dtype": "bfloat16"}
        for number in range(count)
    ]


def tiny_objects(size: int) -> bytes:
    """A plan of about `size` bytes whose provenance is many tiny objects; what it is signed with does not matter."""
    plan = {
        "format": 1, "assets": {}, "documents": None,
        "layout": {"sites": small_sites(1, 1), "samples": 8, "block_samples": 4, "chunk_samples": 2, "columns": [],
                   "codec": "crc32c"},
        "provenance": {"many": "HERE"},
    }  # fmt: skip
    many = b"[" + b",".join([b'{"":0}'] * (size // 7)) + b"]"
    signed = canonical(plan).replace(b'"HERE"', many)
    digest = hashlib.sha256(signed).hexdigest().encode()
    return signed.replace(b'"format"', b'"fingerprint":"' + digest + b'","format"', 1)


# Arrays


def with_checksum(data: bytes) -> bytes:
    return data + google_crc32c.value(data).to_bytes(4, "little")


def values(key: str, array: np.ndarray) -> Callable[[Path], None]:
    """An object of documents, or a chunk of an array that is not sharded, with the right checksums."""
    return holds(key, packed(array) if key.startswith("documents/") else with_checksum(array.tobytes()))


def packed(array: np.ndarray) -> bytes:
    """An object of documents."""
    return one_chunk(Zstd(level=1).encode(array))


def one_chunk(compressed: bytes) -> bytes:
    """A shard of one chunk, with its checksum, and where it lies."""
    chunk = with_checksum(compressed)
    return chunk + index((0, len(chunk)))


def index(*entries: tuple[int, int]) -> bytes:
    return with_checksum(struct.pack(f"<{2 * len(entries)}Q", *(number for entry in entries for number in entry)))


def sound_index() -> list[tuple[int, int]]:
    return [(number * CHUNK_BYTES, CHUNK_BYTES) for number in range(4)]


def shard(entries: list[tuple[int, int]], data: bytes | None = None) -> Callable[[Path], None]:
    """A shard with another index, sound as far as its checksum tells, and maybe other data."""

    def make(url: Path) -> None:
        before = (url / SHARD).read_bytes()[: 4 * CHUNK_BYTES]
        (url / SHARD).write_bytes((before if data is None else data) + index(*entries))

    return make


def zstd_shard(first: bytes) -> Callable[[Path], None]:
    """A zstd shard whose first chunk is `first`, in a frame of its own or not, with its checksum; the others too."""
    chunk = with_checksum(first)
    return lambda url: _write(
        url / SHARD, chunk * 4 + index(*((number * len(chunk), len(chunk)) for number in range(4)))
    )


def zstd_bomb(blocks: int, *, window: int | None = None) -> bytes:
    """A zstd frame of `blocks` blocks of 128 KiB, each one byte repeated: RFC 8878, 3.1.1."""
    size, last = 128 << 10, 1
    header = b"\x28\xb5\x2f\xfd"
    header += bytes([0x00, (17 - 10) << 3]) if window is None else bytes([0x00, (window - 10) << 3])
    block = lambda end: ((size << 3) | (1 << 1) | end).to_bytes(3, "little") + b"\0"  # noqa: E731
    return header + block(0) * (blocks - 1) + block(last)


OFFSETS = np.array([0, 6, 12, 18, 24, 30], np.int64)
NAMES = {
    "dots": "..", "slash": "a/b", "up": "../../etc", "pipe": "a|b", "colons": "a::b", "scheme": "file://x",
    "kvstore": "file:", "NUL": "a\u0000b", "empty": "", "newline": "a\nb", "escape codes": "\u001b[2Jx",
    "a megabyte": "x" * 1_000_000, "surrogate pair": "\U0001f600",
}  # fmt: skip
JSON_FILES = {
    "plan": PLAN, "root group": ROOT, "marker": MARKER, "manifest": MANIFEST, "ranges": RANGES, "seal": SEAL,
    "documents marker": TABLE,
    "array metadata": "resid_post/zarr.json",
}  # fmt: skip
JSON_BYTES = {
    "empty": b"",
    "200,000 brackets": b"[" * 200_000,
    "200,000 objects": b'{"a":' * 200_000,
    "8 million escaped quotes": b'"' + b'\\"' * 8_000_000,
    "a pickle": pickle.dumps({"format": 1}),
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}
ODD_FILES = {
    "1 GiB sparse": sparse,
    "a FIFO": fifo,
    "a folder": folder,
    "a socket": unix_socket,
    "endless zeros": lambda key: link(key, "/dev/zero"),
    "a link to itself": lambda key: link(key, key.rpartition("/")[2]),
    "a link to a system file": lambda key: link(key, "/etc/passwd"),
}
ODD_CHUNKS = {
    "a terabyte, sparse": lambda key: sparse(key, ENDLESS),
    "empty": lambda key: holds(key, b""),
    "cut short": lambda key: lambda url: _write(url / key, (url / key).read_bytes()[:-5]),
    **{name: ODD_FILES[name] for name in ("a FIFO", "a folder", "endless zeros", "a link to itself")},
}
ARRAY_CHUNKS = {
    "shard": SHARD, "norms": "resid_post_norm/c/1/1", "column": "position/c/1", "valid": "valid/c/1",
    "layer labels": "layer/c/0", "text": "documents/text_bytes/c/0", "text offsets": "documents/text_offsets/c/0",
    "tokens": "documents/token_id/c/0", "number column": "documents/pages/c/0",
}  # fmt: skip


COMMON = {"200,000 brackets", "8 million escaped quotes", "1 GiB sparse", "a FIFO", "a folder", "a terabyte, sparse"}


def _table() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    # every JSON document: bytes that are hostile to a parser, files that are no files
    for name, key in JSON_FILES.items():
        for what, data in JSON_BYTES.items():
            if name == "plan" or what in COMMON:
                cases[f"{name}: {what}"] = Case(holds(key, data), key)
        for what, odd in ODD_FILES.items():
            if name == "plan" or what in COMMON:
                cases[f"{name}: {what}"] = Case(odd(key), key)
    cases["manifest: 3 GiB sparse"] = Case(sparse(MANIFEST, 3 << 30), MANIFEST)
    # every kind of chunk
    for name, key in ARRAY_CHUNKS.items():
        for what, odd in ODD_CHUNKS.items():
            if name == "shard" or what in COMMON:
                cases[f"{name}: {what}"] = Case(odd(key), key.partition("/c/")[0])

    # the plan
    cases |= {
        "plan: 16 MiB of tiny objects": Case(lambda url: _write(url / PLAN, tiny_objects((16 << 20) - 2000)), PLAN),
        "plan: 16 MiB of digits in a number": Case(
            text_edited(PLAN, b"2.5", b"2." + b"5" * ((16 << 20) - 20_000)), PLAN
        ),
        "plan: duplicate key": Case(text_edited(PLAN, b'"format":1', b'"format":1,"format":1'), PLAN),
        "plan: NaN": Case(text_edited(PLAN, b"2.5", b"NaN"), PLAN),
        "plan: 1e999": Case(text_edited(PLAN, b"2.5", b"1e999"), PLAN),
        "plan: integer of 5,000 digits": Case(text_edited(PLAN, b'"samples":53', b'"samples":' + b"9" * 5000), PLAN),
        "plan: half of a surrogate pair": Case(text_edited(PLAN, b'"made-up"', b'"\\ud800"'), PLAN),
        "plan: samples of 4,000 digits": Case(planned(in_layout(samples=10**3999)), PLAN),
        "plan: block of 4,000 digits": Case(planned(in_layout(block_samples=10**3999, chunk_samples=7)), PLAN),
        "plan: chunk of 4,000 digits": Case(planned(in_layout(block_samples=1, chunk_samples=10**3999)), PLAN),
        "plan: width of 4,000 digits": Case(planned(in_site(width=10**3999)), PLAN),
        "plan: layer of 4,000 digits": Case(planned(in_site(layers=[-(10**3999), 1, 2])), PLAN),
        "plan: chunk of 0": Case(planned(in_layout(chunk_samples=0)), PLAN),
        "plan: negative samples": Case(planned(in_layout(samples=-53)), PLAN),
        "plan: a million layers": Case(planned(in_site(layers=list(range(1_000_000)))), PLAN),
        "plan: 100,000 sites": Case(planned(in_layout(sites=small_sites(100_000, 1))), PLAN),
        "plan: 2,000,000 sites that are numbers": Case(planned(in_layout(sites=[0] * 2_000_000)), PLAN),
        "plan: 300,000 document columns": Case(
            planned(in_documents(strings={"id": 1, "text": 1} | {f"c{number}": 0 for number in range(300_000)})), PLAN
        ),
        "plan: 300,000 assets": Case(
            planned(lambda plan: plan.update(assets={f"a{number}": "0" * 64 for number in range(200_000)})), PLAN
        ),
        "plan: document columns over another's arrays": Case(
            planned(in_documents(numbers={"text_offsets": "float64"})), PLAN
        ),
        "plan: no text column": Case(planned(in_documents(strings={"kind": 4})), PLAN),
        "plan: true for format": Case(planned(lambda plan: plan.update(format=True)), PLAN),
        "plan: 1.0 for format": Case(text_edited(PLAN, b'"format":1', b'"format":1.0'), None),
        "plan: format 2": Case(planned(lambda plan: plan.update(format=2)), PLAN),
        "plan: digits in a string": Case(planned(in_layout(samples="53")), PLAN),
        "plan: true for a number": Case(planned(in_layout(chunk_samples=True)), PLAN),
        "plan: a float for a number": Case(planned(in_layout(samples=53.0)), PLAN),
        "plan: an unknown codec": Case(planned(in_layout(codec="pickle")), PLAN),
        "plan: dtype object": Case(planned(in_site(dtype="object")), PLAN),
        "plan: a kvstore": Case(planned(lambda plan: plan.update(kvstore="file:///etc/")), PLAN),
        "plan: edited": Case(text_edited(PLAN, b'"made-up"', b'"Made-up"'), PLAN),
        "plan: a list": Case(holds(PLAN, b"[]"), PLAN),
        "plan: an unknown field with a megabyte of name": Case(planned(lambda plan: plan.update({"x" * 1_000_000: 1})),
                                                              PLAN),
        "plan: an unknown field with escape codes": Case(planned(lambda plan: plan.update({"\u001b[2J\n": 1})), PLAN),
        "plan: a hundred unknown sites in a mismatch": Case(
            planned(in_provenance(**{"y" * 1000 + str(number): 1 for number in range(100)})), "holds another run"
        ),
        "plan: a model's name with escape codes": Case(
            planned(in_provenance(model={"name": "\u001b[2J\n" * 100_000})), None
        ),
    }  # fmt: skip
    for what, name in NAMES.items():
        cases[f"plan: site name, {what}"] = Case(planned(in_site(name=name)), PLAN)
        cases[f"plan: asset name, {what}"] = Case(
            planned(lambda plan, name=name: plan.update(assets={name: "0" * 64})), PLAN
        )
    # plans that are valid and huge: nothing of what they promise is there
    cases |= {
        "huge: 10^7 blocks of one sample": Case(
            planned(in_layout(samples=10_000_000, block_samples=1, chunk_samples=1)), "resid_post"
        ),
        "huge: 10^12 samples in one-sample chunks": Case(
            planned(in_layout(samples=1 << 40, block_samples=1 << 17, chunk_samples=1)), "resid_post"
        ),
        "huge: the largest blocks, one value wide": Case(
            planned(
                in_layout(
                    samples=1 << 26, block_samples=1 << 23, chunk_samples=1 << 20,
                    sites=[{"name": "resid_post", "width": 1, "layers": None, "dtype": "bfloat16"}],
                )
            ), "resid_post",
        ),
        "huge: 256 sites of 1,024 layers": Case(
            planned(in_layout(sites=small_sites(256, 1024), samples=1 << 40, block_samples=1 << 20,
                              chunk_samples=1 << 10)), PLAN,
        ),
        "huge: 256 sites of 64 layers": Case(
            planned(in_layout(sites=small_sites(256, 64), samples=1 << 40, block_samples=1 << 20,
                              chunk_samples=1 << 10)), "site_",
        ),
        "huge: 2^40 documents, 2^44 tokens and bytes": Case(
            planned(in_documents(documents=1 << 40, tokens=1 << 44, strings={"id": 1 << 44, "text": 1 << 44})),
            "documents/",
        ),
        "huge: one text of 2^44 bytes": Case(
            several(
                planned(in_documents(strings={"id": 45, "text": 1 << 44, "kind": 22})),
                values("documents/text_offsets/c/0", OFFSETS * ((1 << 44) // 30)),
            ), "documents/text",
        ),
        "huge: a document of 2^44 tokens": Case(
            several(planned(in_documents(tokens=1 << 44)),
                    values("documents/token_offsets/c/0", OFFSETS * ((1 << 44) // 30))), "documents/token",
        ),
        "huge: shards of 1 GiB whose chunks are one sparse chunk": Case(
            several(
                planned(in_layout(samples=1 << 23, block_samples=1 << 23, chunk_samples=1 << 19, columns=[],
                                  sites=[{"name": "resid_post", "width": 64, "layers": None, "dtype": "bfloat16"}])),
                lambda url: shutil.rmtree(url / MARKERS),
                _one_chunk_again_and_again,
            ), "resid_post",
        ),
        "huge: markers of blocks of millions, unfinished": Case(
            planned(in_layout(samples=1 << 40, block_samples=1 << 23, chunk_samples=1 << 20,
                              sites=[{"name": "resid_post", "width": 1, "layers": None, "dtype": "bfloat16"}])),
            "resid_post", base="unfinished",
        ),
        "huge: scattered markers of blocks of millions": Case(
            several(
                planned(in_layout(samples=1 << 40, block_samples=1 << 23, chunk_samples=1 << 20,
                                  sites=[{"name": "resid_post", "width": 1, "layers": None, "dtype": "bfloat16"}])),
                junk_markers(*(b"%08d.json" % (2 * number) for number in range(5, 500))),
            ),
            "resid_post", base="unfinished",
        ),
    }  # fmt: skip
    # the root group
    attributed = lambda **fields: edited(ROOT, lambda root: root["attributes"]["actstore"].update(fields))  # noqa: E731
    cases |= {
        "root group: a bomb of consolidated metadata": Case(
            edited(ROOT, lambda root: root["consolidated_metadata"].update(metadata=[{}] * 5_000_000)), ROOT
        ),
        "root group: consolidated metadata of other shapes": Case(
            edited(ROOT, lambda root: root["consolidated_metadata"]["metadata"]["valid"].update(shape=[1 << 62])), ROOT
        ),
        "root group: kvstore specs": Case(
            edited(ROOT, lambda root: root["attributes"].update(kvstore="file:///etc/|zarr3:", driver="file")), ROOT
        ),
        "root group: another plan": Case(attributed(fingerprint="0" * 64), ROOT),
        "root group: format 2": Case(attributed(format=2), ROOT),
        "root group: true for format": Case(attributed(format=True), ROOT),
        "root group: 1.0 for format": Case(attributed(format=1.0), ROOT),
        "root group: a status of its own": Case(attributed(status="x"), ROOT),
        "root group: an unknown field": Case(attributed(kvstore="file:"), ROOT),
        "root group: generation 10^18": Case(attributed(generation=10**18), ROOT),
        "root group: no attributes": Case(edited(ROOT, lambda root: root.pop("attributes") and root), ROOT),
        "root group: a list": Case(holds(ROOT, b"[]"), ROOT),
        "root group: complete before it is": Case(
            text_edited(ROOT, b'"status":"writing"', b'"status":"complete"'), ROOT, base="unfinished"
        ),
    }  # fmt: skip
    # metadata of arrays: nobody believes it
    stored = "resid_post/zarr.json"
    cases |= {
        "array metadata: another shape": Case(
            edited(stored, lambda array: array.update(shape=[1, 1 << 50, 1 << 10])), stored
        ),
        "array metadata: object dtype and pickle codec": Case(
            edited(stored, lambda array: array.update(data_type="object", codecs=[{"name": "pickle"}])), stored
        ),
        "array metadata: a chunk of 4 GiB": Case(
            edited(stored, lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[1, 1 << 31, 6])),
            stored,
        ),
        "array metadata: a storage transformer elsewhere": Case(
            edited(stored, lambda array: array.update(storage_transformers=[{"kvstore": "file:///etc/"}])), stored
        ),
        "array metadata: an external codec": Case(
            edited(stored, lambda array: array.update(codecs=[{"name": "https://example.org/codec"}])), stored
        ),
    }  # fmt: skip
    # markers
    sums = lambda marker: marker["checksums"]  # noqa: E731
    cases |= {
        "marker: an unknown array": Case(edited(MARKER, lambda marker: sums(marker).update(other=["0" * 32])), MARKER),
        "marker: an array elsewhere": Case(
            edited(MARKER, lambda marker: sums(marker).update({"../../x": ["0" * 32]})), MARKER
        ),
        "marker: documents as an array": Case(
            edited(MARKER, lambda marker: sums(marker).update({"documents/text_bytes": ["0" * 32]})), MARKER
        ),
        "marker: a layer too many": Case(
            edited(MARKER, lambda marker: sums(marker)["resid_post"].append("0" * 32)), MARKER
        ),
        "marker: a layer too few": Case(
            edited(MARKER, lambda marker: sums(marker)["resid_post"].pop() and None), MARKER
        ),
        "marker: an array too few": Case(edited(MARKER, lambda marker: sums(marker).pop("mlp_out") and None), MARKER),
        "marker: a million digests": Case(
            edited(MARKER, lambda marker: sums(marker).update(resid_post=["0" * 32] * 400_000)), MARKER
        ),
        "marker: huge samples": Case(edited(MARKER, lambda marker: marker.update(samples=[0, 1 << 62])), MARKER),
        "marker: samples of 4,000 digits": Case(
            edited(MARKER, lambda marker: marker.update(samples=[0, 10**3999])), MARKER
        ),
        "marker: of another block": Case(edited(MARKER, lambda marker: marker.update(block=3)), MARKER),
        "marker: of another plan": Case(edited(MARKER, lambda marker: marker.update(fingerprint="0" * 64)), MARKER),
        "marker: format 2": Case(edited(MARKER, lambda marker: marker.update(format=2)), MARKER),
        "marker: 20,000 junk names": Case(junk_markers(count=20_000), None),
        "marker: junk names of all kinds": Case(
            junk_markers("²".encode(), b"x", b"0", b"9" * 200 + b".json", b"-1.json", b"+1.json", b"1_0.json",
                         "²²²²²²²².json".encode(), "٣.json".encode(), b"\xff\xfe.json", b"00000000.json\n",
                         b"1e3.json"),
            None,
        ),
        "marker: of a block that is not there": Case(junk_markers(b"00000077.json"), "00000077"),
        "markers: a FIFO for a folder": Case(fifo(MARKERS), MARKERS),
        "markers: a link to everything": Case(link(f"{MARKERS}/everything", "/"), None),
        "markers: a link to the folder itself": Case(link(f"{MARKERS}/again", "."), None),
        "markers: 3,000 folders deep": Case(deep_folders(MARKERS, 3000), None),
        "store: 3,000 folders deep": Case(deep_folders("", 3000), None),
    }  # fmt: skip
    # the documents
    doc = "documents/"
    cases |= {
        "documents marker: a million arrays": Case(
            edited(TABLE, lambda table: table["checksums"].update({f"a{n}": "0" * 32 for n in range(300_000)})), TABLE
        ),
        "documents marker: no array": Case(edited(TABLE, lambda table: table.update(checksums={})), TABLE),
        "documents: offsets that span terabytes": Case(
            values(f"{doc}text_offsets/c/0", OFFSETS * (1 << 40)), f"{doc}text"
        ),
        "documents: offsets beyond the text": Case(values(f"{doc}text_offsets/c/0", OFFSETS * 1000), f"{doc}text"),
        "documents: offsets descend": Case(values(f"{doc}text_offsets/c/0", OFFSETS[::-1].copy()), f"{doc}text"),
        "documents: offsets are negative": Case(values(f"{doc}text_offsets/c/0", -OFFSETS), f"{doc}text"),
        "documents: offsets wrap around": Case(
            values(f"{doc}text_offsets/c/0", np.array([0, -(2**63), 2**63 - 1, 0, 1, 2], np.int64)), f"{doc}text"
        ),
        "documents: token offsets that span terabytes": Case(
            values(f"{doc}token_offsets/c/0", OFFSETS * (1 << 40)), f"{doc}token"
        ),
        "documents: text that is not UTF-8": Case(
            lambda url: values(
                f"{doc}text_bytes/c/0", np.full(_size(url, "text_bytes"), 0xFF, np.uint8)
            )(url),
            f"{doc}text_bytes",
        ),
        "documents: tokens beyond the text": Case(
            lambda url: values(
                f"{doc}token_start/c/0", np.full(_size(url, "token_start"), 2**32 - 1, np.uint32)
            )(url), f"{doc}token_start", silent=True,
        ),
        "documents: a bomb of 4 GiB": Case(holds(f"{doc}text_bytes/c/0", one_chunk(zstd_bomb(32 << 10))), f"{doc}text"),
        "documents: a bomb of 1 TiB": Case(
            holds(f"{doc}text_offsets/c/0", one_chunk(zstd_bomb(8 << 20))), f"{doc}text"
        ),
        "documents: a window of 2 GiB": Case(
            holds(f"{doc}token_id/c/0", one_chunk(zstd_bomb(2, window=31))), f"{doc}token_id"
        ),
        "documents: too short a chunk": Case(
            values(f"{doc}text_offsets/c/0", OFFSETS[:-1].copy()), f"{doc}text_offsets"
        ),
        "rows: of a document that is not there": Case(
            values("document/c/0", np.full(16, 2**31 - 1, np.int32)), "document", silent=True
        ),
        "rows: of a negative document": Case(
            values("document/c/0", np.full(16, -5, np.int32)), "document", silent=True
        ),
        "rows: at a position that is not there": Case(
            values("position/c/0", np.full(16, 2**31 - 1, np.int32)), "position", silent=True
        ),
        "rows: documents and positions that are no numbers": Case(
            several(
                planned(
                    lambda plan: [column.update(dtype="float32") for column in plan["layout"]["columns"][:2]] and None
                ),
                *(values(f"document/c/{number}", np.full(16, np.nan, np.float32)) for number in range(4)),
                *(values(f"position/c/{number}", np.full(16, np.nan, np.float32)) for number in range(4)),
            ), "document", silent=True,
        ),
        "rows: a document of 1.5": Case(
            several(
                planned(lambda plan: plan["layout"]["columns"][0].update(dtype="float32")),
                *(values(f"document/c/{n}", np.full(16, 1.5, np.float32)) for n in range(4)),
            ), "document", silent=True,
        ),
    }  # fmt: skip
    # shards
    beyond = [*sound_index()[:3], (1 << 50, CHUNK_BYTES)]
    cases |= {
        "shard: offset beyond the file": Case(shard(beyond), "resid_post"),
        "shard: offset and length wrap around": Case(
            shard([*sound_index()[:3], ((1 << 64) - 40, CHUNK_BYTES)]), "resid_post"
        ),
        "shard: a length of 2^63": Case(shard([*sound_index()[:3], (0, 1 << 63)]), "resid_post"),
        "shard: a length of 0": Case(shard([*sound_index()[:3], (0, 0)]), "resid_post"),
        "shard: overlapping chunks": Case(shard([sound_index()[0]] * 4), "resid_post", silent=True),
        "shard: missing chunks": Case(shard([((1 << 64) - 1, (1 << 64) - 1)] * 4), "resid_post"),
        "shard: a chunk of 300 GiB, sparse": Case(
            sparse(SHARD, ENDLESS, tail=index(*[(0, 300 << 30)] * 4)), "resid_post"
        ),
        "shard: chunks of 700 MiB, overlapping, sparse": Case(
            sparse(SHARD, 1 << 30, tail=index(*[(0, 700 << 20)] * 4)), "resid_post"
        ),
        "shard: a wrong checksum of the index": Case(
            lambda url: _write(url / SHARD, (url / SHARD).read_bytes()[:-1] + b"x"), "resid_post"
        ),
        "shard: a wrong checksum of a chunk": Case(
            lambda url: _write(url / SHARD, b"x" + (url / SHARD).read_bytes()[1:]), "resid_post"
        ),
        "shard: NaN and infinity": Case(
            lambda url: _write(url / SHARD, with_checksum(b"\xc0\x7f" * 24) * 4 + index(*sound_index())), "resid_post",
            silent=True,
        ),
        "plain shard: chunks of 700 MiB, overlapping, sparse": Case(
            sparse(SHARD, 1 << 30, tail=index(*[(0, 700 << 20)] * 4)), "resid_post", base="plain"
        ),
        "zstd shard: a bomb of 4 GiB": Case(zstd_shard(zstd_bomb(32 << 10)), "resid_post", base="zstd"),
        "zstd shard: a bomb of 1 TiB": Case(zstd_shard(zstd_bomb(8 << 20)), "resid_post", base="zstd"),
        "zstd shard: a window of 2 GiB": Case(zstd_shard(zstd_bomb(2, window=31)), "resid_post", base="zstd"),
        "zstd shard: a window of 128 MiB": Case(zstd_shard(zstd_bomb(2000, window=27)), "resid_post", base="zstd"),
        "zstd shard: a thousand frames": Case(
            zstd_shard(Zstd(level=1).encode(b"\0" * 48) * 1000), "resid_post", base="zstd"
        ),
        "zstd shard: too short a chunk": Case(zstd_shard(Zstd(level=1).encode(b"\0" * 47)), "resid_post", base="zstd"),
        "zstd shard: no zstd": Case(zstd_shard(b"\0" * 48), "resid_post", base="zstd"),
        "zstd shard: a chunk of 700 MiB, sparse": Case(
            sparse(SHARD, 1 << 30, tail=index(*[(0, 700 << 20)] * 4)), "resid_post", base="zstd"
        ),
    }  # fmt: skip
    # assets and what else may lie about
    asset = "assets/tokenizer.json"
    signed = planned(lambda plan: plan.update(assets={"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}))
    for what, odd in {**ODD_FILES, "a terabyte, sparse": lambda key: sparse(key, ENDLESS)}.items():
        cases[f"asset: {what}"] = Case(several(signed, odd(asset)), asset)
    cases |= {
        "asset: named as a lock": Case(
            several(planned(lambda plan: plan.update(assets={"x.__lock": hashlib.sha256(b"").hexdigest()})),
                    holds("assets/x.__lock", b"")), None,
        ),
        "lock file: a FIFO": Case(fifo("resid_post/c/0/2/0.__lock"), "resid_post/c/0/2/0", base="unfinished"),
        "lock file of a shard: a link to a file of the user": Case(
            link("resid_post/c/0/2/0.__lock", "../../../../../precious"), "resid_post/c/0/2/0", base="unfinished"
        ),
        "lock file of a marker: a link to a file of the user": Case(
            link(f"{MARKERS}/00000002.json.__lock", "../../../precious"), "00000002.json.__lock", base="unfinished"
        ),
        "lock file of the root group: a link to a file of the user": Case(
            several(link(f"{ROOT}.__lock", "../precious"), lambda url: (url / SHARD).unlink()), f"{ROOT}.__lock"
        ),
        "other files": Case(
            several(holds("evil.py", b"raise SystemExit"), holds("resid_post/c/x.pkl", pickle.dumps(1)),
                    holds("__init__.py", b"")), None,
        ),
        "store: a file": Case(lambda url: (shutil.rmtree(url), _write(url, b"x"))[0], ""),
        "store: a link to itself": Case(lambda url: (shutil.rmtree(url), url.symlink_to(url.name))[0], ""),
        "store: a FIFO": Case(lambda url: (shutil.rmtree(url), os.mkfifo(url))[0], ""),
        "store: empty": Case(lambda url: (shutil.rmtree(url), url.mkdir())[0], ""),
    }  # fmt: skip
    return cases


def _one_chunk_again_and_again(url: Path) -> None:
    """A shard of 64 MiB that decodes to 1 GiB, with the marker of its block."""
    plan = json.loads((url / PLAN).read_bytes())
    chunk = 64 << 20
    with replaced(url, "resid_post/c/0/0").open("wb") as file:
        file.truncate(chunk)
        file.seek(chunk)
        file.write(google_crc32c.value(bytes(chunk)).to_bytes(4, "little") + index(*[(0, chunk + 4)] * 16))
    marker = {
        "format": 1, "block": 0, "samples": [0, 1 << 23], "fingerprint": plan["fingerprint"], "chunks": {},
        "checksums": {"resid_post": ["0" * 32], "resid_post_norm": ["0" * 32]},
    }  # fmt: skip
    (url / MARKERS).mkdir()
    (url / MARKERS / "00000000.json").write_bytes(canonical(marker))


def _size(url: Path, name: str) -> int:
    """Values of an array of documents."""
    (size,) = json.loads((url / "documents" / name / "zarr.json").read_bytes())["shape"]
    return int(size)


CASES = _table()
