"""Plan, markers and seal: every step may be repeated, may be cut off anywhere, and ends in the same bytes."""

import hashlib
import json
import shutil
import tracemalloc

import pytest
import xxhash
from stores import make_contents, raw_tensorstore, tree

import actstore
from actstore import Layout, Plan, Site
from actstore.commits import Manifest, Marker, Seal
from actstore.errors import (
    CorruptStoreError,
    InputError,
    PlanMismatchError,
    SealedStoreError,
    StorageError,
    StoreNotFoundError,
    UnfinishedStoreError,
)
from actstore.kvstore import Root
from actstore.ledger import create_plan, read_plan, read_status, write_assets
from actstore.markers import committed_blocks, marker_key, missing_blocks, read_marker, vouched_arrays, write_marker
from actstore.metadata import shard_key
from actstore.sealing import create_nodes, seal
from actstore.untrusted import canonical_json

SMALL = make_contents(Layout((Site("resid_post", 3, (0, 4)),), 11, 4, 2), documents=False)


@pytest.fixture
def root(tmp_path):
    return Root.of(tmp_path / "run.acts.zarr")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """All blocks committed, not sealed. Copy it before changing it."""
    return SMALL.write(tmp_path_factory.mktemp("ready") / "run.acts.zarr", seal=False)


@pytest.fixture
def written(ready, tmp_path):
    shutil.copytree(ready, tmp_path / "run.acts.zarr")
    return tmp_path / "run.acts.zarr"


# Plan


def test_a_plan_is_created_once(root):
    create_plan(root, SMALL.plan)
    create_plan(root, SMALL.plan)
    assert (root.path / ".act" / "plan.json").read_bytes() == SMALL.plan.to_json()
    assert read_plan(root) == SMALL.plan


def test_another_plan_is_refused_by_name(root):
    create_plan(root, SMALL.plan)
    other = Plan.make(SMALL.layout, {**SMALL.provenance, "model": {"name": "another"}})
    with pytest.raises(PlanMismatchError) as caught:
        create_plan(root, other)
    assert str(caught.value).startswith(
        f"{root.url} holds another run, with 1 differing fields (provenance.model.name: there \"made-up\", here "
        '"another"); choose another target'
    )  # fmt: skip
    assert read_plan(root) == SMALL.plan


def test_a_place_without_a_store_is_said_to_be_one(root):
    with pytest.raises(StoreNotFoundError) as caught:
        read_plan(root)
    assert str(caught.value) == (
        f"no activation store at {root.url}: found no .act/plan.json, expected a folder made by `actstore extract` or "
        "`actstore.create`; check the path: nothing is there"
    )


def test_what_is_there_instead_of_a_store_is_said(written, tmp_path):
    store, folder = written, tmp_path / "beside"
    (folder / "empty").mkdir(parents=True)
    (folder / "file").touch()
    above = shutil.copytree(store, folder / "outer" / "run.acts.zarr").parent
    near = {
        folder / "empty": "; check the path",
        folder / "file": "; check the path: a file is there",
        folder / "file" / "x": "; check the path: nothing is there",
        above: f"; check the path; a store lies in it: {above / 'run.acts.zarr'}",
        store / "resid_post": f"; check the path; the folder above is a store: {store}",
        store / "none": f"; check the path: nothing is there; the folder above is a store: {store}",
    }
    for place, end in near.items():
        with pytest.raises(StoreNotFoundError) as caught:
            read_plan(Root.of(place))
        assert str(caught.value).startswith(f"no activation store at {place}: found no .act/plan.json, expected a")
        assert str(caught.value).endswith(end)


def test_a_damaged_plan_is_refused(root):
    root.write(".act/plan.json", SMALL.plan.to_json().replace(b"made-up", b"changed"))
    with pytest.raises(
        CorruptStoreError, match=r"plan\.json has the fingerprint .* it was changed after it was written"
    ):
        read_plan(root)


STATUS_ERRORS = {
    "not json": (b"{", "is not valid JSON"),
    "no attributes": (b"{}", r"has no valid attribute `actstore` \(KeyError\); restore it from a copy"),
    "a list": (b"[]", r"has no valid attribute `actstore` \(TypeError\)"),
    "odd status": (
        canonical_json(
            {"attributes": {"actstore": {"format": 1, "status": "done", "fingerprint": SMALL.plan.fingerprint}}}
        ),
        r"has no valid attribute `actstore` \(ValidationError\)",
    ),
    "another store": (
        canonical_json({"attributes": {"actstore": {"format": 1, "status": "complete", "fingerprint": "0" * 64}}}),
        "belongs to the plan 000000000000, .* two stores were mixed",
    ),
}


@pytest.mark.parametrize(("data", "message"), STATUS_ERRORS.values(), ids=STATUS_ERRORS.keys())
def test_a_damaged_group_is_refused(root, data, message):
    root.write("zarr.json", data)
    with pytest.raises(CorruptStoreError, match=message):
        read_status(root, SMALL.plan)


def test_a_store_killed_before_its_group_is_being_written(root):
    create_plan(root, SMALL.plan)
    assert read_status(root, SMALL.plan) == "writing"
    assert missing_blocks(root, SMALL.plan) == [0, 1, 2]


# Markers


def test_only_markers_count_as_committed(root):
    (root.path / ".act" / "commits").mkdir(parents=True)
    for key in ["00000002.json", "00000000.json", "00000001.json.__lock", "x.json", "0000000a.json", "notes.txt"]:
        (root.path / ".act" / "commits" / key).touch()
    assert committed_blocks(root, SMALL.plan) == {0, 2}
    assert missing_blocks(root, SMALL.plan) == [1]


def test_a_marker_comes_back(root):
    digests = {name: ("0" * 32,) * count for name, count in vouched_arrays(SMALL.plan).items()}
    marker = Marker(format=1, block=1, samples=(4, 8), fingerprint=SMALL.plan.fingerprint, checksums=digests)
    write_marker(root, SMALL.plan, marker)
    assert read_marker(root, SMALL.plan, 1) == marker
    assert json.loads((root.path / ".act/commits/00000001.json").read_bytes())["block"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": (4, 7)}, r"vouches for samples \(4, 7\) of .*; the plan has \(4, 8\) of "),
        ({"checksums": {"x": ("0" * 32,)}}, r"vouches for samples \(4, 8\) of x x 1; the plan has "),
        ({"chunks": {"resid_post": ("0" * 8,)}}, "does not vouch for every chunk of resid_post"),
        ({"fingerprint": "0" * 64}, "is of block 1 of plan 000000000000, expected block 1 of "),
        ({"block": 2}, "is of block 2 of plan "),
        (None, "is missing; block 1 must be written again"),
    ],
    ids=["other samples", "other arrays", "too few chunks", "another plan", "another block", "missing"],
)
def test_a_marker_of_something_else_is_refused(root, changes, message):
    digests = {name: ("0" * 32,) * count for name, count in vouched_arrays(SMALL.plan).items()}
    marker = Marker(format=1, block=1, samples=(4, 8), fingerprint=SMALL.plan.fingerprint, checksums=digests)
    if changes is not None:
        root.write(".act/commits/00000001.json", marker.model_copy(update=changes).to_json())
    with pytest.raises(CorruptStoreError, match=message):
        read_marker(root, SMALL.plan, 1)


@pytest.mark.parametrize("folder", ["finished", "unfinished"])
def test_checksums_are_those_of_the_decoded_values(request, contents, folder):
    """xxh3-128 over bytes that TensorStore itself reads, compared with every marker."""
    path = request.getfixturevalue(folder)
    markers = [json.loads(marker.read_bytes()) for marker in sorted((path / ".act" / "commits").glob("*.json"))]
    assert len(markers) == (4 if folder == "finished" else 2)
    layered = {site.name for site in contents.layout.sites if site.layers is not None}
    layered |= {f"{name}_norm" for name in layered}
    expected = {site.name for site in contents.layout.sites} | {f"{site.name}_norm" for site in contents.layout.sites}
    for marker in markers:
        assert set(marker["checksums"]) == expected | set(contents.columns)
        start, stop = marker["samples"]
        assert (start, stop) == contents.layout.block_range(marker["block"])
        for name, digests in marker["checksums"].items():
            values = raw_tensorstore(path, name)[
                (slice(None), slice(start, stop)) if name in layered else slice(start, stop)
            ]
            values = values.read().result()
            shards = list(values) if name in layered else [values]
            assert digests == [xxhash.xxh3_128(shard.tobytes()).hexdigest() for shard in shards]


# Assets


def test_assets_are_stored_under_their_names(root):
    assets = {"tokenizer.json": b"{}", "config.json": b"[]"}
    plan = Plan.make(SMALL.layout, {}, None, assets)
    write_assets(root, plan, assets)
    write_assets(root, plan, assets)
    assert {path.name: path.read_bytes() for path in (root.path / "assets").iterdir()} == assets
    assert plan.assets == {name: hashlib.sha256(data).hexdigest() for name, data in assets.items()}


@pytest.mark.parametrize("assets", [{}, {"config.json": b"other"}, {"config.json": b"[]", "more": b""}], ids=len)
def test_assets_of_another_plan_are_refused(root, assets):
    plan = Plan.make(SMALL.layout, {}, None, {"config.json": b"[]"})
    with pytest.raises(
        InputError, match=r"assets: found \[.*\], the plan has others \(\['config.json'\]\); plan again"
    ):
        write_assets(root, plan, assets)
    assert root.keys("") == []


# Seal


def test_a_store_that_lacks_blocks_is_not_sealed(unfinished, contents):
    before = tree(unfinished)
    with pytest.raises(UnfinishedStoreError) as caught:
        seal(Root.of(unfinished), contents.plan)
    assert str(caught.value) == (
        f"{unfinished} cannot be sealed: 2 of 4 blocks are not committed, first [0, 2]; write them, then seal again"
    )
    assert tree(unfinished) == before


def test_a_store_that_lacks_its_documents_is_not_sealed(tmp_path, contents):
    path = contents.write(tmp_path / "x.acts.zarr", seal=False)
    (path / ".act" / "documents.json").unlink()
    with pytest.raises(UnfinishedStoreError, match="its documents are not written; write them, then seal"):
        seal(Root.of(path), contents.plan)


def test_sealing_writes_manifest_status_and_seal(written):
    seal(Root.of(written), SMALL.plan)
    data = (written / ".act" / "manifest.json").read_bytes()
    manifest = Manifest.from_json(data, where="manifest")
    stored = [(written / ".act" / "commits" / f"{block:08d}.json").read_bytes() for block in range(3)]
    assert [marker.to_json() for marker in manifest.blocks] == stored
    sealed = Seal.from_json((written / ".act" / "SEALED.json").read_bytes(), where="seal")
    assert sealed.manifest_sha256 == hashlib.sha256(data).hexdigest()
    assert read_status(Root.of(written), SMALL.plan) == "complete"


def test_sealing_shrinks_shapes_and_touches_no_chunk(written):
    chunks = {name: data for name, data in tree(written).items() if "/c/" in name}
    assert raw_tensorstore(written, "resid_post").shape == (2, 12, 3)
    seal(Root.of(written), SMALL.plan)
    assert {name: data for name, data in tree(written).items() if "/c/" in name} == chunks
    assert raw_tensorstore(written, "resid_post").shape == (2, 11, 3)
    assert raw_tensorstore(written, "valid").shape == (11,)


def test_sealing_twice_changes_nothing(written):
    seal(Root.of(written), SMALL.plan)
    once = tree(written)
    seal(Root.of(written), SMALL.plan)
    assert tree(written) == once


def test_a_damaged_marker_stops_the_seal(written):
    (written / ".act" / "commits" / "00000001.json").write_bytes(b"{")
    with pytest.raises(CorruptStoreError, match=r"00000001\.json is not valid JSON"):
        seal(Root.of(written), SMALL.plan)
    assert read_status(Root.of(written), SMALL.plan) == "writing"


def test_a_sealed_store_takes_no_nodes_and_no_writer(written):
    seal(Root.of(written), SMALL.plan)
    before = tree(written)
    for again in (lambda: create_nodes(Root.of(written), SMALL.plan), lambda: SMALL.create(written)):
        with pytest.raises(SealedStoreError) as caught:
            again()
        assert str(caught.value).startswith(f"{written} is complete: nothing is left to write; for another run")
    assert tree(written) == before


def stop_at(monkeypatch, number):
    """The `number`-th write of an object fails, and all after it: as if the process had been killed there."""
    left = iter(range(number))
    for name in ("write", "write_pieces", "create"):
        real = getattr(Root, name)

        def cut(root, key, value, real=real):
            if next(left, None) is None:
                raise StorageError("killed")
            return real(root, key, value)

        monkeypatch.setattr(Root, name, cut)


def test_a_seal_may_be_cut_off_anywhere(ready, tmp_path, monkeypatch):
    """After every cut the store is either refused as unfinished or whole, and sealing again gives the same bytes."""
    shutil.copytree(ready, tmp_path / "whole.acts.zarr")
    seal(Root.of(tmp_path / "whole.acts.zarr"), SMALL.plan)
    expected = tree(tmp_path / "whole.acts.zarr")
    cuts = 0
    while True:
        path = tmp_path / f"{cuts}.acts.zarr"
        shutil.copytree(ready, path)
        with monkeypatch.context() as patch:
            stop_at(patch, cuts)
            try:
                seal(Root.of(path), SMALL.plan)
            except StorageError:
                finished = False
            else:
                finished = True
        if finished:
            break
        status = read_status(Root.of(path), SMALL.plan)
        if status == "complete":
            assert (actstore.open(path).dataset().resid_post.values == SMALL.rows["resid_post"].astype("f4")).all()
        else:
            with pytest.raises(UnfinishedStoreError):
                actstore.open(path)
        seal(Root.of(path), SMALL.plan)
        assert tree(path) == expected
        cuts += 1
    assert cuts == 2 + 7 + 2  # manifest, ranges, seven arrays, group and seal: each was cut off once


def test_sealing_holds_no_more_than_the_markers_that_it_reads_at_once(root):
    """256 markers of 64 KiB, of which 64 are read at once."""
    layout = Layout((Site("x", 1, (0,)),), 256 * 8192, 8192, 1, columns=())
    plan = Plan.make(layout, {})
    create_plan(root, plan)
    create_nodes(root, plan)
    digests = {"x": ("0" * 32,), "x_norm": ("0" * 32,)}
    for block in plan.blocks:
        marker = Marker(
            format=1, block=block, samples=plan.block_range(block), fingerprint=plan.fingerprint, checksums=digests,
            chunks={"x": ("0123cdef" * 8192,)},
        )  # fmt: skip
        for key, data in {
            shard_key(layout.sites[0], 0, block): b"a shard",
            marker_key(block): marker.to_json(),
        }.items():
            (root.path / key).parent.mkdir(parents=True, exist_ok=True)
            (root.path / key).write_bytes(data)
    tracemalloc.start()
    try:
        seal(root, plan)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (root.path / ".act/manifest.json").stat().st_size
    assert size > 256 * 65536
    assert peak < size / 2
    assert read_status(root, plan) == "complete"


def test_a_start_may_be_cut_off_anywhere(ready, tmp_path, monkeypatch):
    cuts = 0
    while True:
        path = tmp_path / f"{cuts}.acts.zarr"
        with monkeypatch.context() as patch:
            stop_at(patch, cuts)
            try:
                SMALL.create(path).close()
            except StorageError:
                finished = False
            else:
                finished = True
        if finished:
            break
        SMALL.write(path, seal=False)
        assert tree(path) == tree(ready)
        cuts += 1
    assert cuts == 1 + 7 + 1 + 1  # plan, seven arrays, group, labels
