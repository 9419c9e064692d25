"""The settings that files were made with, kept beside them and compared before anything is added."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actstore.durable import write_durably
from actstore.errors import InputError, PlanMismatchError
from actstore.kvstore import storage_errors
from actstore.untrusted import leaves


def settle(path: Path, settings: Mapping[str, Any], *, of: Path) -> None:
    """Keeps the settings at `path`, or compares them with those that are there.

    Args:
        path: Of the file of settings.
        settings: Everything that decides what is made: a JSON object of JSON objects and values.
        of: What is made with them, for errors.

    Raises:
        PlanMismatchError: Those that are there differ; names the fields.
        InputError: What is there are no settings.
        StorageError: It cannot be read or written.
    """
    with storage_errors(f"write {path}"):
        if path.exists():
            refuse_other(of, stored_settings(path), settings)
        else:
            write_durably(path, [memoryview(json.dumps(settings, indent=2).encode() + b"\n")])


def stored_settings(path: Path) -> dict[str, Any]:
    """The settings that are there.

    Raises:
        InputError: What is there are none.
    """
    try:
        stored = json.loads(path.read_bytes())
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not a JSON object; expected the settings of a run; move it and its file away")
    return stored


def refuse_other(target: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises where settings differ from those that are there.

    Raises:
        PlanMismatchError: Names the fields.
    """
    theirs, ours = dict(leaves(dict(there))), dict(leaves(json.loads(json.dumps(here))))
    fields = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if fields:
        shown = "; ".join(f"{name}: there {theirs.get(name)!r}, here {ours.get(name)!r}" for name in fields)
        raise PlanMismatchError(
            f"{target} holds another run, with {len(fields)} differing fields ({shown}); "
            "choose another target, or give the same settings to continue that run"
        )
