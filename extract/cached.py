"""Folders that are made once and kept: whole or not there, whoever else makes them at the same time."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from actstore.errors import InputError

_ABANDONED_SECONDS = 24 * 3600  # far longer than the slowest download: another process may still be at work


def default_cache() -> Path:
    """The environment variable `ACTSTORE_CACHE`, else `$XDG_CACHE_HOME/actstore`, else `~/.cache/actstore`."""
    if os.environ.get("ACTSTORE_CACHE"):
        return Path(os.environ["ACTSTORE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "actstore"


def made_once(target: Path, make: Callable[[Path], Path], *, files: Sequence[str]) -> Path:
    """Gives the folder `target`, making it if it is not there.

    It appears complete or not at all, so two processes may do this at once, and one that was killed leaves just a
    hidden folder, which a later call for the same target removes when it is a day old.

    Args:
        target: The folder.
        make: Called with an empty folder to work in; gives the finished folder, inside it.
        files: Names that the folder must hold.

    Raises:
        InputError: The folder is there and lacks files.
    """
    if target.exists():
        return _complete(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    _remove_abandoned(target.parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as name:
        finished = make(Path(name))
        for path in (*finished.iterdir(), finished):
            _sync(path)
        try:
            finished.replace(target)
        except OSError:
            if not target.exists():
                raise
            _complete(target, files)  # another process was faster; the two folders are equal
        _sync(target.parent)
    return target


def _complete(folder: Path, files: Sequence[str]) -> Path:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}; expected the finished folder. Remove it and run again.")
    return folder


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # its owner may remove it at the same moment
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
