"""Whether documents have the columns of the first of them: a store has one list of columns for all."""

from actstore.errors import InputError
from actstore.layout import check_name
from actstore.table import TAKEN
from extract.documents import Document, Problem

COMPLETION = "completion_start"  # column: the byte of the text at which the completion begins
SOURCE = "read_from"  # column: where the document was read, such as texts.jsonl:17
_OWN = frozenset({COMPLETION, SOURCE})


class Alike:
    """Compares documents with the first one that it is asked about."""

    def __init__(self) -> None:
        self._first: Document | None = None

    def problem(self, document: Document) -> Problem | None:
        """What is wrong with the columns of a document, if anything is.

        Raises:
            InputError: the first document has a column that no store can have.
        """
        if self._first is None:
            _check_names(document)
            self._first = document
        first, columns = self._first, document.columns
        for one, other in ((document, first), (first, document)):
            if missing := [name for name in other.columns if name not in one.columns]:
                return _problem(
                    f"document {one.id!r} ({one.source}) has no field {missing[0]!r}, which {other.source} has; "
                    "give every document the same fields, or choose those that all have with --columns"
                )
        for name, value in columns.items():
            if isinstance(value, str) != isinstance(first.columns[name], str):
                kinds = sorted({type(value).__name__, type(first.columns[name]).__name__})
                return _problem(
                    f"documents: column {name!r} holds {kinds} ({first.source}, {document.source}); expected only text "
                    "or only numbers; correct the field, or choose other columns with --columns"
                )
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                return _problem(
                    f"documents: column {name!r} has numbers over 64 bits ({document.source}); give them as text"
                )
        return None


def _problem(message: str) -> Problem:
    return Problem("other columns", message)


def _check_names(document: Document) -> None:
    remedy = "rename the field, or choose other columns with --columns"
    for name in document.columns:
        try:
            check_name(name, "document column")  # it becomes the name of a file
        except InputError as error:
            raise InputError(f"{document.source}: {error}; {remedy}") from None
        if name in TAKEN | _OWN:
            raise InputError(
                f"documents: column name {name!r} is used by the format itself ({sorted(TAKEN | _OWN)}); {remedy}"
            )
