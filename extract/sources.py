"""The front door of documents: a source by its name, checked across its documents, read as it is asked for."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from actstore.errors import InputError
from extract.alike import Alike
from extract.documents import Column, Document, Fields, Problem
from extract.lines import has_ending
from extract.python_docs import python_docs
from extract.readers import ENDINGS, TEXT_ENDINGS, Found, files_of, read_file, read_records
from extract.records import DATASETS, is_saved, open_saved, open_stream, stream_name
from extract.seen import Seen
from extract.splits import COLUMN as SPLIT
from extract.splits import Splits

PYTHON_DOCS, SAE_LENS = "python-docs", "sae_lens.json"
_NAMED = 5  # problems of which the places are kept
_AT_ONCE = 512  # documents whose ids are compared together

OnError = Literal["error", "skip"]
Source = str | Path | Iterable[Document | Mapping[str, Any]]


class Documents(Iterable[Document]):
    """The documents of a source, in order, read while they are iterated over and checked across each other.

    Args:
        source: `"python-docs"`; the path of a `.jsonl` file (also `.gz` and `.zst`), of a `.parquet` file, of a text
            file (`.txt`, `.md`, `.rst`), or of a folder of these; a folder that the `datasets` library saved;
            `"datasets:NAME"` or `"datasets:NAME:SPLIT"`, streamed by that library; or any iterable of mappings, such as
            a dataset that is open, or of documents.
        fields: Which fields of a record mean what.
        limit: Read this many documents and no more; None reads all. What follows is neither read nor checked.
        skip: Pass over this many first.
        labels: Columns with one value for all documents.
        splits: For a column `split`, by a hash of each id.
        on_error: What to do with a line that is no document, with an id that was there before, with other columns than
            the first document has, and, when documents are tokenised, with a chat that the model's template refuses and
            a document of no tokens or too many: raise, or count it and go on.

    Attributes:
        problems: After iterating, how many there were of each kind.
        first_problems: The first of them, with file and line.

    Iterating raises:
        InputError: The source cannot be read, holds no documents, or something is no document.
    """

    def __init__(
        self,
        source: Source,
        *,
        fields: Fields | None = None,
        limit: int | None = None,
        skip: int = 0,
        on_error: OnError = "error",
        labels: Mapping[str, Column] | None = None,
        splits: Splits | None = None,
    ) -> None:
        if isinstance(source, str) and not source:
            raise InputError(
                "the source of the documents is empty; expected a path or python-docs; is a variable not set?"
            )
        if limit is not None and limit < 1:
            raise InputError(
                f"limit is {limit}; expected at least 1, or None for all documents. Leave it out to read all."
            )
        if skip < 0:
            raise InputError(f"skip is {skip}; expected a number of documents from 0. Leave it out to read all.")
        if on_error not in ("error", "skip"):
            raise InputError(f"on_error is {on_error!r}; expected 'error' or 'skip'; give one of them")
        self._source, self._fields = source, fields or Fields()
        self._limit, self._skip, self._on_error = limit, skip, on_error
        self._labels, self._splits = dict(labels or {}), splits
        self.problems: Counter[str] = Counter()
        self.first_problems: list[str] = []
        self._check()

    def __iter__(self) -> Iterator[Document]:
        self.problems, self.first_problems = Counter(), []
        stop = None if self._limit is None else self._skip + self._limit
        count = 0
        for document in itertools.islice(self._checked(stop), self._skip, stop):
            yield self._labelled(document)
            count += 1
        if not count:
            raise InputError(
                f"{self._name} holds no documents{self._where_left()}; expected at least one. A folder needs files "
                f"that end in {_listed(TEXT_ENDINGS)} or hold records, a JSONL file one JSON object per line."
            )

    def _labelled(self, document: Document) -> Document:
        added = self._labels | ({} if self._splits is None else {SPLIT: self._splits.of(document.id)})
        if there := sorted({*added} & {*document.columns}):
            raise InputError(
                f"document {document.id!r} ({document.source}) has a column {there[0]!r}, which is to be added too; "
                "expected other names; choose the fields to keep with --columns"
            )
        return dataclasses.replace(document, columns={**document.columns, **added}) if added else document

    @property
    def context(self) -> int | None:
        """Tokens of each document, where SAELens made contexts of one length; None for documents of any length.

        Raises:
            InputError: its `sae_lens.json` does not say.
        """
        if not isinstance(self._source, str | Path) or not (path := Path(self._source) / SAE_LENS).is_file():
            return None
        try:
            size = json.loads(path.read_bytes())["context_size"]
        except (ValueError, TypeError, KeyError):
            size = None
        if type(size) is not int or size < 1:
            raise InputError(f"{path} has no context_size; expected what SAELens writes; save the dataset again")
        return size

    def describe_problems(self) -> str:
        """What was passed over, with the first places; empty where there was nothing."""
        if not self.problems:
            return ""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.problems.items()))
        places = "; ".join(message.split(";")[0] for message in self.first_problems)
        return f"passed over {self.problems.total():,} that are no documents ({counts}): {places}"

    @property
    def _name(self) -> str:
        return str(self._source) if isinstance(self._source, str | Path) else "the source"

    def _where_left(self) -> str:
        after = f" after the first {self._skip:,}" if self._skip else ""
        return after + (f" ({self.describe_problems()})" if self.problems else "")

    def _check(self) -> None:
        """Refuses a source that is not there or of no known kind, before anything is read."""
        found: object = self._source
        if isinstance(found, bytes | Mapping) or not isinstance(found, str | Path | Iterable):
            raise InputError(
                f"the source of the documents is a {type(found).__name__}; expected a path, {PYTHON_DOCS!r} or "
                "an iterable of dictionaries; for a DatasetDict give one of its splits"
            )
        if not isinstance(self._source, str | Path) or str(self._source) == PYTHON_DOCS:
            return
        if str(self._source).startswith(DATASETS):
            return
        path = Path(self._source)
        if not path.exists():
            raise InputError(
                f"There is nothing at {self._source}; expected a file, a folder or {PYTHON_DOCS!r}. "
                f"Check the path (the working folder is {Path.cwd()})."
            )
        if not path.is_dir() and not has_ending(path, *ENDINGS):
            raise InputError(
                f"{self._source} ends in {path.suffix!r}; expected {_listed(ENDINGS)}, a folder of such files or "
                f"{PYTHON_DOCS!r}. Convert the file to JSONL: one object per line, with a string field 'text'; of ARC "
                "tasks, `actstore arc prompts` makes one."
            )

    def _found(self) -> Iterator[Found]:
        """Everything in the source."""
        if not isinstance(self._source, str | Path):
            yield from read_records(self._source, self._fields)
        elif str(self._source) == PYTHON_DOCS:
            yield from python_docs()
        elif str(self._source).startswith(DATASETS):
            name = str(self._source)
            yield from read_records(open_stream(name), self._fields, name=stream_name(name))
        elif not (path := Path(self._source)).is_dir():
            yield from read_file(path, path.name, self._fields)
        elif is_saved(path):
            yield from read_records(open_saved(path), self._fields, name=path.name)
        else:
            for name, file in files_of(path).items():
                yield from read_file(file, name, self._fields)

    def _checked(self, stop: int | None) -> Iterator[Document]:
        """Documents with ids of their own; problems are raised or counted."""
        found, seen, alike, count = self._found(), Seen(), Alike(), 0
        while stop is None or count < stop:
            part = list(itertools.islice(found, _AT_ONCE if stop is None else min(_AT_ONCE, stop - count)))
            if not part:
                return
            documents = [each for each in part if isinstance(each, Document)]
            hashes = np.fromiter((xxhash.xxh3_64_intdigest(each.id.encode()) for each in documents), np.uint64)
            twice = iter(seen.add(hashes).tolist())
            for each in part:
                if isinstance(each, Problem):
                    self.refuse(each)
                elif next(twice):
                    self.refuse(Problem("duplicate id", self._again(each)))
                elif problem := alike.problem(each):
                    self.refuse(problem)
                else:
                    count += 1
                    yield each

    def refuse(self, problem: Problem) -> None:
        """Counts something that is no document, or raises.

        Raises:
            InputError: the source is not told to skip it.
        """
        if self._on_error == "error":
            raise InputError(problem.message)
        self.problems[problem.kind] += 1
        if len(self.first_problems) < _NAMED:
            self.first_problems.append(problem.message)

    def _again(self, document: Document) -> str:
        """Why a document whose id was there before is refused. The first one is looked for only to be named."""
        first = "an earlier place"
        if self._on_error == "error" and isinstance(self._source, str | Path):
            same = (each for each in self._found() if isinstance(each, Document) and each.id == document.id)
            first = next(same, document).source
        return (
            f"The id {document.id!r} stands at {first} and again at {document.source}; expected every id once. "
            "Rename one, or drop the id field: ids are then made from file name and line."
        )


def open_documents(source: Source, *, limit: int | None = None) -> list[Document]:
    """Reads the documents of `source`, checked and in order.

    Args:
        source: As in `Documents`, which reads them one at a time and has more options.
        limit: Read this many documents and no more; `None` reads all. What follows is neither read nor checked.

    Returns:
        At least one document. All texts are held in memory.

    Raises:
        InputError: The source is missing, of an unknown kind, malformed, empty, or has an identifier twice.

    Example:
        >>> [document.id for document in open_documents("python-docs", limit=2)]
        ['topics/assert', 'topics/assignment']
    """
    return list(Documents(source, limit=limit))


def _listed(endings: tuple[str, ...]) -> str:
    return f"{', '.join(endings[:-1])} or {endings[-1]}"
