"""Files and records to documents, one at a time and in a fixed order.

Every reader yields a `Document`, or a `Problem` where one should have been: what to do about it is for the caller to
decide. What makes the rest unreadable, such as a file that cannot be opened or a torn archive, is raised.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from extract import lines, records
from extract.documents import Document, Fields, Problem, checked_text, document_of, encodable
from extract.lines import Broken, decoded, has_ending, opened

TEXT_ENDINGS = (".txt", ".md", ".rst")
ENDINGS = (*lines.LINES_ENDINGS, records.PARQUET_ENDING, *TEXT_ENDINGS)

Found = Document | Problem


def read_file(path: Path, name: str, fields: Fields) -> Iterator[Found]:
    """Yields the documents of one file, by its ending.

    Args:
        path: Of the file.
        name: What places in it are named by: `name:line`.
        fields: Which fields of a record mean what.

    Raises:
        InputError: While iterating: it cannot be read.
    """
    if not encodable(name):
        shown = name.encode(errors="surrogateescape").decode(errors="replace")
        yield Problem("broken", f"the name of {shown} is not UTF-8; expected one that is. Rename the file.")
    elif has_ending(path, *lines.LINES_ENDINGS):
        yield from read_jsonl(path, fields, name=name)
    elif has_ending(path, records.PARQUET_ENDING):
        yield from read_parquet(path, fields, name=name)
    else:
        yield from read_text(path, name=name)


def read_jsonl(path: str | Path, fields: Fields | None = None, *, name: str | None = None) -> Iterator[Found]:
    """Yields one document per line of a JSONL file, plain, `.gz` or `.zst`, line by line. Blank lines are skipped.

    Args:
        path: The file, in UTF-8.
        fields: Which fields of an object mean what.
        name: What places are named by; None is the file's name.

    Raises:
        InputError: While iterating: the file cannot be opened or unpacked.
    """
    return _documents(lines.read_lines(Path(path), name=name), fields or Fields())


def read_text(path: str | Path, *, name: str | None = None) -> Iterator[Found]:
    """Yields the one document of a text file. Its id is the name; it has no columns.

    Raises:
        InputError: The file cannot be opened.
    """
    path = Path(path)
    name = name or path.name
    with opened(path) as file:
        text = decoded(file.read())
    found = _problem(name, text) if isinstance(text, Broken) else checked_text(text, name)
    yield found if isinstance(found, Problem) else Document(id=name, text=found, columns={}, source=name)


def read_parquet(path: str | Path, fields: Fields | None = None, *, name: str | None = None) -> Iterator[Found]:
    """Yields one document per row of a parquet file, a few rows in memory at a time. Rows count from 0.

    Raises:
        InputError: pyarrow is not installed, or the file is no parquet file.
    """
    return _documents(records.read_parquet(Path(path), name=name), fields or Fields())


def read_records(found: Iterable[Any], fields: Fields | None = None, *, name: str = "record") -> Iterator[Found]:
    """Yields one document per mapping of an iterable, such as a `datasets.Dataset`, streaming or not.

    Args:
        found: Mappings of field names to values; a `Document` is passed on as it is.
        fields: Which fields mean what.
        name: What places are named by: `record:17`, counting from 0.
    """
    return _documents(((f"{name}:{number}", record) for number, record in enumerate(found)), fields or Fields())


def files_of(folder: Path) -> dict[str, Path]:
    """Files of a folder and below that can be read, by their relative names and in the order of these.

    Names that start with a dot are passed over; links to folders are not followed, those to files are.

    Raises:
        InputError: A folder cannot be listed.
    """
    found = {}
    for parent, folders, files in os.walk(folder, onerror=_unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(parent, file)
            if has_ending(path, *ENDINGS) and not file.startswith("."):
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _unlisted(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be listed ({error.strerror}); expected a folder that can be read. Check its "
        "permissions."
    ) from error


def _documents(found: Iterable[tuple[str, Any]], fields: Fields) -> Iterator[Found]:
    for where, record in found:
        if isinstance(record, Mapping):
            yield document_of(record, where, fields)
        elif isinstance(record, Broken):
            yield _problem(where, record)
        elif isinstance(record, Document):
            yield record
        else:
            yield Problem(
                "wrong type",
                f"{where} is a {type(record).__name__}; expected a mapping such as "
                "{'id': 'a', 'text': '...'}. Wrap the value.",
            )


def _problem(where: str, broken: Broken) -> Problem:
    return Problem(broken.kind, f"{where} {broken.found}; expected {broken.expected}. {broken.remedy}")
