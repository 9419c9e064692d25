"""Ids, texts and user columns of documents as arrays, a few hundred at a time, and all of them as a table."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from actstore.errors import InputError
from actstore.strings import Strings
from actstore.table import ColumnValues, DocumentTable
from extract.alike import COMPLETION, SOURCE, Alike
from extract.documents import Document


class Columns:
    """The columns of documents, all those of the first one, and no more.

    Args:
        like: Names of the columns of a store that the documents are appended to; None for a new one.
    """

    def __init__(self, like: Collection[str] | None = None) -> None:
        self._like = like
        self._alike, self._begun = Alike(), False
        self._texts: list[str] = []
        self._numbers: list[str] = []
        self._fractions: set[str] = set()

    def arrays(self, documents: Sequence[Document], at: Mapping[str, int]) -> dict[str, np.ndarray]:
        """What is kept of some documents beside their tokens.

        Args:
            documents: the next ones, with their texts.
            at: how many values of each array there are already.

        Raises:
            InputError: a document has other columns than the first, or a column of another type.
        """
        for document in documents:
            self._check(document)
        strings = {"id": [document.id for document in documents], "text": [document.text for document in documents]}
        strings[SOURCE] = [document.source for document in documents]
        strings |= {name: [str(document.columns[name]) for document in documents] for name in self._texts}
        arrays: dict[str, np.ndarray] = {}
        for name, values in strings.items():
            column = Strings.of(values)
            arrays[f"{name}.bytes"], arrays[f"{name}.ends"] = column.data, column.offsets[1:] + at[f"{name}.bytes"]
        for name in self._numbers:
            numbers = [document.columns[name] for document in documents]
            whole = [number if isinstance(number, int) else 0 for number in numbers]
            arrays[f"{name}.int"], arrays[f"{name}.float"] = np.array(whole, np.int64), np.array(numbers, np.float64)
        begins = [
            len((document.text if document.completion is None else document.text[: document.completion]).encode())
            for document in documents
        ]
        return arrays | {COMPLETION: np.array(begins, np.int64)}

    def table(self, arrays: Mapping[str, np.ndarray]) -> DocumentTable:
        """The table of all that was kept."""

        def strings(name: str) -> Strings:
            return Strings(arrays[f"{name}.bytes"], np.concatenate([[0], arrays[f"{name}.ends"]]))

        texts = strings("text")
        columns: dict[str, ColumnValues] = {name: strings(name) for name in self._texts}
        for name in self._numbers:
            columns[name] = arrays[f"{name}.{'float' if name in self._fractions else 'int'}"]
        if (arrays[COMPLETION] < texts.sizes).any() or (self._like is not None and COMPLETION in self._like):
            columns[COMPLETION] = arrays[COMPLETION]
        if self._like is None or SOURCE in self._like:  # stores of before there was one have none
            columns[SOURCE] = strings(SOURCE)
        return DocumentTable(
            ids=strings("id"), texts=texts, token_offsets=np.concatenate([[0], arrays["token.ends"]]),
            token_id=arrays["token_id"], token_start=arrays["token_start"], token_end=arrays["token_end"],
            columns=columns,
        )  # fmt: skip

    def _check(self, document: Document) -> None:
        if problem := self._alike.problem(document):
            raise InputError(problem.message)
        if not self._begun:
            self._begun = True
            for name, value in document.columns.items():
                (self._texts if isinstance(value, str) else self._numbers).append(name)
        self._fractions.update(name for name, value in document.columns.items() if isinstance(value, float))
