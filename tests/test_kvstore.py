"""The storage under a store: real files, real races, real full and read-only disks, and one line per error."""

import errno
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorstore as ts

from actstore.errors import (
    ActstoreError,
    CorruptStoreError,
    CredentialsError,
    InputError,
    StorageError,
    StorageFullError,
    StoragePermissionError,
    StoreError,
)
from actstore.kvstore import Operation, Root, storage_errors
from actstore.metadata import array_metadata


@pytest.fixture
def root(tmp_path):
    return Root.of(tmp_path / "run.acts.zarr")


@contextmanager
def mounted(folder: Path, *options: str):
    """A small file system in memory at `folder`. Skips where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"cannot mount a small disk here: {error}")
    if answer.returncode:
        pytest.skip(f"cannot mount a small disk here: {answer.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def check_message(error: BaseException, *parts: str) -> None:
    """One line for a person: what was done, why it failed, what to do; none of TensorStore's spec."""
    message = str(error)
    assert all(part in message for part in parts), message
    assert not any(part in message for part in ("\n", '{"', "kvstore", "tensorstore", "source locations"))
    assert "; " in message
    assert len(message) < 400


# Objects


def test_an_object_is_a_file(root):
    root.write("a/b.json", b"one")
    root.write("a/b.json", b"two")
    root.write("empty", b"")
    assert (root.path / "a" / "b.json").read_bytes() == root.read("a/b.json") == b"two"
    assert root.read("empty") == b""
    assert root.read("a/c.json") is None
    assert root.read("missing/folder") is None


def test_list_gives_what_is_under_a_prefix(root):
    names = ["c/1", "c/10", "c/2", "c-1", "c", "d/1", "b/9", "c/ü"]
    for name in names:
        if name != "c":  # a file and a folder cannot share a name
            root.write(name, b"")
    found = [str(path.relative_to(root.path)) for path in root.path.rglob("*") if path.is_file()]
    assert root.keys("") == sorted(found)
    assert root.keys("c/") == sorted(name for name in found if name.startswith("c/"))
    assert root.keys("c/1") == ["c/1", "c/10"]
    assert root.keys("x/") == []


def test_nothing_is_there_before_the_first_write(root):
    assert root.keys("") == []
    assert root.read("zarr.json") is None
    assert not root.path.exists()
    root.delete("zarr.json")
    assert root.keys("") == []


def test_delete_removes_one_object(root):
    root.write("a", b"1")
    root.write("b", b"2")
    root.delete("a")
    root.delete("a")
    assert root.keys("") == ["b"]


def test_create_keeps_what_is_there(root):
    assert root.create("plan", b"mine") == b"mine"
    assert root.create("plan", b"other") == b"mine"
    assert (root.path / "plan").read_bytes() == b"mine"
    root.delete("plan")
    assert root.create("plan", b"other") == b"other"


@pytest.fixture(params=["a folder", "memory"])
def either(request, tmp_path):
    """A folder, or objects of which many are written at once."""
    return Root.of(
        tmp_path / "run.acts.zarr" if request.param == "a folder" else f"memory://{tmp_path.name}/run.acts.zarr"
    )


def test_many_are_created_and_what_is_there_stays(either):
    values = {f"{number}/zarr.json": b"%d" % number for number in range(150)}
    either.write("7/zarr.json", b"theirs")
    either.create_all(values)
    assert list(either.read_all(values)) == [b"theirs" if key.startswith("7/") else values[key] for key in values]
    either.create_all({})


def test_many_are_written_over_what_is_there(either):
    values = {f"{number}/zarr.json": b"%d" % number for number in range(150)}
    either.write("7/zarr.json", b"theirs")
    either.write_all(values)
    assert dict(zip(values, either.read_all(values), strict=True)) == values


def test_what_another_removes_while_many_are_created_is_written_again(monkeypatch):
    root, begin = Root.of("memory://removed/run.acts.zarr"), Root._begin

    def busy(self, doing, start, **details):
        if doing == "write a" and root.read("b") is None:
            refused = SimpleNamespace(result=lambda timeout: None)  # as b"a" is there, and is gone when it is read
            return Operation(doing, lambda: refused, self.place.patience(0))
        return begin(self, doing, start, **details)

    monkeypatch.setattr(Root, "_begin", busy)
    root.create_all({"a": b"1", "b": b"2"})
    assert list(root.read_all("ab")) == [b"1", b"2"]


def test_everybody_who_creates_at_once_gets_the_same(tmp_path):
    """Each thread has a root of its own, with connections of its own, and an answer of its own."""
    for attempt in range(10):
        with ThreadPoolExecutor(8) as pool:
            roots = [Root.of(tmp_path / f"{attempt}.acts.zarr") for _ in range(8)]
            values = [f"writer {number}".encode() * 100 for number in range(8)]
            answers = set(pool.map(lambda root, value: root.create("plan", value), roots, values))
        assert len(answers) == 1
        assert answers < set(values)
        assert answers == {roots[0].read("plan")}


def test_create_writes_again_what_another_removes_in_between(root, monkeypatch):
    """As claims are: the conditional write is refused, and what was there is gone when it is read back."""
    begin, calls = Root._begin, []

    def busy(self, doing, start, **details):
        calls.append(doing)
        if len(calls) == 2:
            refused = SimpleNamespace(result=lambda timeout: None)  # and then removed
            return Operation(doing, lambda: refused, self.place.patience(0))
        return begin(self, doing, start, **details)

    monkeypatch.setattr(Root, "_begin", busy)
    assert root.create("claim", b"mine") == b"mine"
    assert len(calls) == 5
    nothing = begin(root, "read", lambda kv: kv.read("nothing"))
    monkeypatch.setattr(Root, "_begin", lambda self, doing, start, **details: nothing)
    with pytest.raises(StorageError, match="it was gone each of 8 times; expected that it stays"):
        root.create("claim", b"mine")


def test_replace_changes_only_what_it_was_told(root):
    assert root.replace("claim", b"theirs", b"mine") == b""
    root.write("claim", b"theirs")
    assert root.replace("claim", b"others", b"mine") == b"theirs"
    assert root.replace("claim", b"theirs", b"mine") == b"mine"
    assert root.read("claim") == b"mine"


def test_create_reads_back_a_lost_answer(root, monkeypatch):
    """A conditional write that won, but is reported as lost: what is there counts, not the answer."""
    real = ts.KvStore.write

    def write(store, key, value, if_equal=None):
        real(store, key, value, if_equal=if_equal).result()
        return real(store, key, value, if_equal=if_equal)  # the second attempt of a retry finds its own first

    monkeypatch.setattr(ts.KvStore, "write", write)
    assert root.create("plan", b"mine") == b"mine"


# Addresses


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("runs/x.acts.zarr", "{cwd}/runs/x.acts.zarr"),
        ("runs/x.acts.zarr/", "{cwd}/runs/x.acts.zarr"),
        ("../x.acts.zarr", "{cwd.parent}/x.acts.zarr"),
        ("a/../../x.acts.zarr", "{cwd.parent}/x.acts.zarr"),
        ("./x.acts.zarr", "{cwd}/x.acts.zarr"),
        ("file:///tmp/x.acts.zarr", "/tmp/x.acts.zarr"),
        ("~/x.acts.zarr", "{home}/x.acts.zarr"),
    ],
    ids=["relative", "slash", "parent", "dots", "dot", "file", "home"],
)
def test_an_address_becomes_a_path(tmp_path, monkeypatch, address, path):
    monkeypatch.chdir(tmp_path)
    root = Root.of(address)
    assert str(root.path) == path.format(cwd=tmp_path, home=Path.home())
    assert Root.of(Path(address.removeprefix("file://"))).path == root.path


@pytest.mark.parametrize("name", ["ä ö.acts.zarr", "a%20b.acts.zarr", "a#b?c.acts.zarr", "'.acts.zarr"])
def test_odd_names_work(tmp_path, contents, name):
    root = Root.of(tmp_path / name)
    root.write("a", b"1")
    assert (tmp_path / name / "a").read_bytes() == b"1"
    assert root.keys("") == ["a"]
    root.open_array("layer", array_metadata(contents.plan, complete=True)["layer"]).write([2, 5, 11]).result()
    assert (tmp_path / name / "layer" / "c" / "0").is_file()


def test_dots_and_links_lead_to_the_same_store(tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    Root.of(tmp_path / "real" / "x.acts.zarr").write("a", b"1")
    monkeypatch.chdir(tmp_path)
    assert Root.of("link/../x.acts.zarr").read("a") == b"1"  # as the operating system reads it: `..` of the link's end


@pytest.mark.parametrize("address", ["", "/", "file:///", "."])
def test_an_address_needs_a_name(address):
    with pytest.raises(InputError, match="is not a place for a store; expected a path such as runs/qwen"):
        Root.of(address)


def test_a_backslash_is_refused():
    """TensorStore would write to `a/b.acts.zarr`."""
    with pytest.raises(InputError, match="holds a backslash, which TensorStore reads as /; rename the folder"):
        Root.of("a\\b.acts.zarr")


# Before work begins


@pytest.mark.parametrize("name", ["x.zarr", ".acts.zarr", "x", "x.acts.zarr.bak"])
def test_a_target_needs_the_suffix(tmp_path, name):
    with pytest.raises(InputError, match="is not a name for a store; expected one that ends in"):
        Root.of(tmp_path / name).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "deeper/"], ids=["the store itself", "a folder above"])
def test_a_file_in_the_way_is_named(tmp_path, contents, inside):
    (tmp_path / "x.acts.zarr").write_bytes(b"a file")
    target = tmp_path / "x.acts.zarr" / f"{inside}y.acts.zarr" if inside else tmp_path / "x.acts.zarr"
    with pytest.raises(InputError) as caught:
        contents.create(target)
    check_message(caught.value, f"{tmp_path / 'x.acts.zarr'} is a file, expected a folder; choose another target")
    assert (tmp_path / "x.acts.zarr").read_bytes() == b"a file"


def test_missing_folders_are_made(tmp_path, contents):
    contents.write(tmp_path / "a" / "b" / "x.acts.zarr")
    assert (tmp_path / "a" / "b" / "x.acts.zarr" / "zarr.json").is_file()


def test_too_little_space_is_said_before_anything_is_written(root):
    with pytest.raises(StorageFullError) as caught:
        root.check_space(1 << 60)
    check_message(caught.value, "the run needs 1,152,921,504,606,846,976 bytes, ", " are free in ", "free some space")
    assert not root.path.exists()


def test_a_folder_that_may_not_be_written_is_refused():
    """Root may write everywhere, so a process asks that has become `nobody`. One folder is not even searchable."""
    program = (
        "import os, sys\n"
        "from actstore.kvstore import Root\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "for target in sys.argv[1:]:\n"
        "    try:\n"
        "        Root.of(target).check_writable()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        targets = []
        for name, mode in [("readable", 0o555), ("closed", 0o000)]:
            (Path(folder) / name).mkdir()
            (Path(folder) / name).chmod(mode)
            targets.append(Path(folder) / name / "x.acts.zarr")
        answer = subprocess.run([sys.executable, "-c", program, *map(str, targets)], capture_output=True, text=True)
        for target in targets:
            target.parent.chmod(0o755)
    assert answer.stdout.splitlines() == [
        f"StoragePermissionError cannot write {target}: {target.parent} is read-only for this user; choose a target "
        "that can be written"
        for target in targets
    ]  # fmt: skip


# When the storage fails


def test_a_full_disk(tmp_path, contents):
    with mounted(tmp_path / "small", "size=1m") as disk:
        root = Root.of(disk / "x.acts.zarr")
        root.write("before", b"1")
        with pytest.raises(StorageFullError) as caught:
            root.write("large", bytes(2 << 20))
        check_message(caught.value, "could not write large of ", "No space left on device", "free some space, then run")
        assert root.read("large") is None
        assert root.read("before") == b"1"
        with pytest.raises(StorageFullError, match="are free in"):
            root.check_space(2 << 20)


def test_a_disk_that_fills_up_commits_nothing_more(tmp_path, contents):
    """The space check is passed first: other programs may take the space later."""
    with mounted(tmp_path / "small", "size=1m") as disk:
        target = disk / "x.acts.zarr"
        writer = contents.create(target)
        for number in range(2):
            activations, columns = contents.block(number)
            writer.write(number, activations, samples=columns).result()
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1024))
        activations, columns = contents.block(2)
        future = writer.write(2, activations, samples=columns)
        assert isinstance(future.exception(), StorageFullError)
        check_message(future.exception(), "could not write ", "No space left on device")
        with pytest.raises(StorageFullError):
            writer.close()
        assert writer.missing() == [2, 3]
        filler.unlink()
        contents.write(target, blocks=[2, 3])
        assert (target / ".act" / "SEALED.json").is_file()


def test_a_disk_without_inodes_left(tmp_path):
    with mounted(tmp_path / "small", "size=1m", "nr_inodes=6") as disk:
        root = Root.of(disk / "x.acts.zarr")
        with suppress(OSError):
            for number in range(10):
                (disk / f"{number}").touch()
        with pytest.raises(StorageFullError) as caught:
            root.write("a", b"1")
        check_message(caught.value, "No space left on device")


def test_a_read_only_disk(tmp_path, contents):
    with mounted(tmp_path / "small", "size=4m") as disk:
        target = contents.write(disk / "x.acts.zarr", blocks=[0], seal=False)
        remount_read_only(disk)
        root = Root.of(target)
        for doing in (lambda: root.write("a", b"1"), lambda: root.create("a", b"1"), lambda: root.delete("zarr.json")):
            with pytest.raises(StoragePermissionError) as caught:
                doing()
            check_message(caught.value, "Read-only file system", "choose a target that can be written")
        with pytest.raises(StoragePermissionError, match="choose a target that can be written"):
            contents.create(target)
        assert root.read("zarr.json") is not None


def test_a_file_where_a_folder_is_needed(root):
    root.write("a", b"1")
    with pytest.raises(StorageError) as caught:
        root.write("a/b", b"2")
    check_message(caught.value, "could not write a/b of ", "; ")


def test_a_missing_chunk_is_an_error(root, contents):
    array = root.open_array("document", array_metadata(contents.plan, complete=True)["document"])
    with pytest.raises(CorruptStoreError) as caught, storage_errors("read document"):
        array.read().result()
    # which of the missing chunks is named first is TensorStore's choice
    check = r"could not read document: missing object at document/c/\d; run `actstore verify`"
    assert re.fullmatch(check, str(caught.value))


def test_a_chunk_of_fill_values_is_stored(root, contents):
    array = root.open_array("document", array_metadata(contents.plan, complete=False)["document"])
    array[:16].write(-1).result()
    assert (root.path / "document" / "c" / "0").is_file()
    assert array[:16].read().result().tolist() == [-1] * 16


def test_a_flipped_bit_is_an_error(root, contents):
    array = root.open_array("document", array_metadata(contents.plan, complete=False)["document"])
    array[:16].write(7).result()
    path = root.path / "document" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError) as caught, storage_errors("read document"):
        array[:16].read().result()
    check_message(
        caught.value, "could not read document: ", "Digest mismatch", " at document/c/0; run `actstore verify`"
    )


# Translation


STATUS = {
    "unknown": ("INTERNAL: something odd [source locations='x.cc:1']", StorageError, "run the same command again"),
    "denied": ("PERMISSION_DENIED: no [tensorstore_spec='{...}']", StoragePermissionError, "check the permissions"),
    "credentials": ("UNAUTHENTICATED: who are you", CredentialsError, "check your credentials"),
    "quota": ("RESOURCE_EXHAUSTED: Disk quota exceeded", StorageFullError, "raise the quota"),
    "too many requests": ("RESOURCE_EXHAUSTED: too many", StorageFullError, "free some space"),
    "deadline": ("DEADLINE_EXCEEDED: slow", StorageError, "too slow or gone"),
    "unavailable": ("UNAVAILABLE: gone", StorageError, "is not reachable"),
    "data loss": ("DATA_LOSS: torn", CorruptStoreError, "run `actstore verify`"),
    "two lines": ("INTERNAL: first\nsecond {spec}", StorageError, "first"),
}


@pytest.mark.parametrize(("text", "kind", "remedy"), STATUS.values(), ids=STATUS.keys())
def test_a_status_becomes_an_error_of_ours(text, kind, remedy):
    with pytest.raises(StoreError) as caught, storage_errors("do it"):
        raise ValueError(text)
    assert type(caught.value) is kind
    check_message(caught.value, "could not do it: ", remedy)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EROFS, StoragePermissionError),
        (errno.EACCES, StoragePermissionError),
        (errno.EIO, StorageError),
    ],
    ids=["space", "quota", "read-only", "access", "device"],
)
def test_an_error_of_the_system_becomes_one_of_ours(number, kind):
    with pytest.raises(StoreError) as caught, storage_errors("do it"):
        raise OSError(number, os.strerror(number), "/tmp/x")
    assert type(caught.value) is kind
    check_message(caught.value, f"could not do it: {os.strerror(number)}; ")


def test_a_time_out_becomes_an_error_of_ours():
    with pytest.raises(StorageError) as caught, storage_errors("do it"):
        raise TimeoutError
    assert str(caught.value) == "could not do it: no answer in 600 s; run the same command again later"


@pytest.mark.parametrize("kind", [InputError, CorruptStoreError, StorageFullError])
def test_errors_of_ours_pass_unchanged(kind):
    error = kind("found x, expected y; do z")
    with pytest.raises(ActstoreError) as caught, storage_errors("do it"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x")], ids=repr)
def test_our_mistakes_are_not_hidden(error):
    with pytest.raises(type(error)), storage_errors("do it"):
        raise error
