"""Documents to a document table: read, tokenised and kept a few hundred at a time, in memory or on a disk."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import InputError, PlanMismatchError
from actstore.table import DocumentTable
from extract.columns import Columns
from extract.documents import Document, Problem
from extract.sources import Documents
from extract.spool import spool
from extract.tokens import Encoded, Tokenizer, begin_encoding, encode, prepare, size_problem

if TYPE_CHECKING:
    import tokenizers

_PARTS_AT_ONCE = 2  # so that the tokenizer's threads have work while the last of one part are awaited
_DOCUMENTS_AT_ONCE = 2048
_CHARACTERS_AT_ONCE = 1 << 18  # of a part: the library takes about 60 bytes for each until its tokens are kept
_HASHED_AT_ONCE = 16 << 20

Progress = Callable[[int, int | None], None]
Refuse = Callable[[Problem], None]


def tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    source: Iterable[Document] | None = None,
    folder: Path | None = None,
    like: Collection[str] | None = None,
    progress: Progress | None = None,
) -> DocumentTable:
    """Token ids of every document, with the place of each token in its document's UTF-8.

    Args:
        documents: at least one; they are read once, a few hundred at a time.
        tokenizer: of the model.
        source: where `documents` were read from, which counts those that are left out; None for `documents` itself.
        folder: where to keep the tokens while they are made, and after; None keeps them in memory. Killed, the same
            call continues: what is there is compared with the documents and not tokenised again.
        like: names of the columns of a store that the documents are appended to; None for a new one.
        progress: called with (documents done, documents in all, or None where nobody knows).

    Costs the texts and about 12 bytes per token, of disk or of memory. A character that is split over several tokens
    belongs to each of them. The table has a column `read_from`, where each document was read, and where one has a
    completion also `completion_start`.

    A chat that the template refuses, a token that the tokenizer does not have, and a document that has no tokens or
    more than a store reads at once are problems of their source, which `Documents` counts where it is told to skip
    them. Nothing of such a document is in the table.

    Raises:
        InputError: such a problem, or a document has other columns than the first one.
        PlanMismatchError: the folder holds other documents, or those of another tokenizer.
    """
    total = len(documents) if isinstance(documents, Sequence) else None
    with spool(folder, {"tokenizer": tokenizer.provenance()}) as kept:
        there = kept.arrays() if kept.count else {}
        columns, at, done = Columns(like), Counter({"token": len(there.get("token_id", ()))}), 0
        source = documents if source is None else source
        refuse = source.refuse if isinstance(source, Documents) else _raise
        prepared = _prepared(documents, tokenizer, refuse)
        if kept.count:
            prepared = _as_before(prepared, tokenizer, refuse, there, count=kept.count)
        for read, found in _ahead(_parts(prepared, edge=kept.count), tokenizer, passed_over=kept.count):
            part, made = (read, None) if found is None else _with_tokens(read, tokenizer, refuse, found.result())
            if not part:
                continue
            described = columns.arrays(part, at)
            if made is None:
                _refuse_others(there, described, at, part, folder)
            else:
                tokens = encode(part, tokenizer, made)
                kept.add(described | _arrays(tokens, first=at["token"]), count=len(part))
                at["token"] += len(tokens.ids)
            at.update({name: len(values) for name, values in described.items()})
            done += len(part)
            if progress:
                progress(done, total)
        if done < kept.count:
            raise PlanMismatchError(
                f"{folder} holds {kept.count:,} documents, the source has {done:,}; expected the same source and "
                "limit; give those, or another folder"
            )
        if not done:
            raise InputError(
                f"there are no documents to read{_passed_over(source)}; expected at least one; check the source and "
                "its --limit"
            )
        return columns.table(kept.arrays())


def _raise(problem: Problem) -> None:
    raise InputError(problem.message)


def _prepared(documents: Iterable[Document], tokenizer: Tokenizer, refuse: Refuse) -> Iterator[Document]:
    """Documents with their texts. What cannot have one is refused, or left out if the source is told to."""
    for document in documents:
        found = prepare(document, tokenizer)
        if isinstance(found, Document):
            yield found
        else:
            refuse(found)


def _with_tokens(
    part: Sequence[Document], tokenizer: Tokenizer, refuse: Refuse, found: "Sequence[tokenizers.Encoding]"
) -> "tuple[list[Document], list[tokenizers.Encoding]]":
    """Documents with what the library made of them. Those with too few or too many tokens are refused, or left out."""
    kept: list[Document] = []
    made: list[tokenizers.Encoding] = []
    for document, each in zip(part, found, strict=True):
        if problem := size_problem(document, tokenizer, each):
            refuse(problem)
        else:
            kept.append(document)
            made.append(each)
    return kept, made


def _as_before(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    refuse: Refuse,
    there: Mapping[str, np.ndarray],
    *,
    count: int,
) -> Iterator[Document]:
    """Documents without those that were left out among the first `count` that are there.

    A document whose id is not the next one there is tokenised to see why: either it has to be left out again, or the
    documents are others, which is found later.
    """
    data, ends = np.asarray(there["id.bytes"]), np.asarray(there["id.ends"])
    number, first = 0, 0
    for document in documents:
        if number < count:
            last = int(ends[number])
            if data[first:last].tobytes() != document.id.encode():
                (found,) = begin_encoding([document], tokenizer)
                if problem := size_problem(document, tokenizer, found):
                    refuse(problem)
                    continue
            number, first = number + 1, last
        yield document


def _ahead(
    parts: Iterable[list[Document]], tokenizer: Tokenizer, *, passed_over: int
) -> "Iterator[tuple[list[Document], Future[list[tokenizers.Encoding]] | None]]":
    """Each part with its tokens, which the next parts' are made beside; None for documents to pass over."""
    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        waiting: deque[Any] = deque()
        for part in parts:
            passed_over -= len(part)
            waiting.append((part, pool.submit(begin_encoding, part, tokenizer) if passed_over < 0 else None))
            if len(waiting) > _PARTS_AT_ONCE:
                yield waiting.popleft()
        yield from waiting


def digest(table: DocumentTable) -> str:
    """SHA-256 over ids, texts, tokens and columns: equal documents and tokenizer give equal digests."""
    total = hashlib.sha256()
    for name, values in sorted(table.arrays().items()):
        total.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
        step = _HASHED_AT_ONCE // values.itemsize
        for first in range(0, len(values), step):
            total.update(np.ascontiguousarray(values[first : first + step]).data)
    return total.hexdigest()


def _parts(documents: Iterable[Document], *, edge: int) -> Iterator[list[Document]]:
    """Documents to be tokenised together; none from both sides of the edge, before which they are there already."""
    part: list[Document] = []
    characters = 0
    for number, document in enumerate(documents):
        if number == edge and part:
            yield part
            part, characters = [], 0
        part.append(document)
        characters += len(document.text) + len(document.token_ids or ())
        if len(part) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _arrays(tokens: Encoded, *, first: int) -> dict[str, np.ndarray]:
    """Tokens as they are kept; `first` are there before."""
    return {
        "token.ends": np.cumsum(tokens.counts) + first,
        "token_id": tokens.ids,
        "token_start": tokens.start,
        "token_end": tokens.end,
    }


def _refuse_others(
    there: Mapping[str, np.ndarray],
    described: Mapping[str, np.ndarray],
    at: Mapping[str, int],
    part: Sequence[Document],
    folder: Path | None,
) -> None:
    """Raises where what was kept is not what the documents are now."""
    for name, values in described.items():
        stored = there.get(name, np.zeros(0))[at[name] : at[name] + len(values)]
        if not np.array_equal(stored, values, equal_nan=name.endswith(".float")):
            raise PlanMismatchError(
                f"{folder} holds other documents: {name.split('.')[0]} of some from {part[0].id!r} ({part[0].source}) "
                "on differs; expected those it was begun with; give them, or another folder"
            )


def _passed_over(documents: Iterable[Document]) -> str:
    found = documents.describe_problems() if isinstance(documents, Documents) else ""
    return f" ({found})" if found else ""
