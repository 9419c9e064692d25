"""Documents: the texts a run reads, from a JSONL file, text files, or the running Python's own documentation.

Every reader is lazy and yields `Document`s in a fixed order. `open_documents` is the front door: it picks the reader
from the name of the source, checks what can only be seen across documents (identifiers, emptiness) and returns a list.
"""

import ast
import dataclasses
import itertools
import json
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from actstore.errors import InputError

PYTHON_DOCS = "python-docs"
TEXT_ENDINGS = (".txt", ".md", ".rst")
JSONL_ENDINGS = (".jsonl", ".ndjson")

_DOCSTRING_CHARACTERS = 60  # shorter docstrings ("Return self.") are noise to a language model
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

Column = int | float | str


@dataclasses.dataclass(frozen=True)
class Document:
    """One input text, with where it came from.

    Attributes:
        id: Unique among the documents of a run.
        text: What is tokenised; never empty, always encodable as UTF-8.
        columns: Scalars that describe the document, such as its kind. Kept in the store.
        source: Where to find it again: `"texts.jsonl:17"`, `"notes/a.md"`, `"pydoc_data.topics:assert"`.
    """

    id: str
    text: str
    columns: Mapping[str, Column]
    source: str


def open_documents(source: str, *, limit: int | None = None) -> list[Document]:
    """Reads the documents of `source`, checked and in order.

    Args:
        source: `"python-docs"`, or the path of a `.jsonl` file, of a text file (`.txt`, `.md`, `.rst`), or of a folder
            of text files.
        limit: Read this many documents and no more; `None` reads all. What follows is neither read nor checked.

    Returns:
        At least one document. All texts are held in memory; use the readers themselves to stream.

    Raises:
        InputError: The source is missing, of an unknown kind, malformed, empty, or has an identifier twice.

    Example:
        >>> [document.id for document in open_documents("python-docs", limit=2)]
        ['topics/assert', 'topics/assignment']
    """
    if not source:
        raise InputError("the source of the documents is empty; expected a path or python-docs; is a variable not set?")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1, or None for all documents. Leave it out to read all.")
    first: dict[str, Document] = {}
    for document in itertools.islice(_reader(source), limit):
        earlier = first.setdefault(document.id, document)
        if earlier is not document:
            raise InputError(
                f"The id {document.id!r} stands at {earlier.source} and again at {document.source}; expected every id "
                "once. Rename one, or drop the id field: ids are then made from file name and line."
            )
    if not first:
        raise InputError(
            f"{source} holds no documents; expected at least one. "
            f"A folder needs files that end in {_listed(TEXT_ENDINGS)}, a JSONL file one JSON object per line."
        )
    return list(first.values())


def read_jsonl(path: str | Path, *, text_field: str = "text", id_field: str = "id") -> Iterator[Document]:
    """Yields one document per line of a JSONL file, reading line by line. Blank lines are skipped.

    Args:
        path: The file, in UTF-8.
        text_field: The field that holds the text.
        id_field: The field that holds the identifier, a string or an integer. Where a line has none, the identifier is
            the file's name and the line: `"texts.jsonl:17"`.

    Yields:
        Documents whose columns are the other fields that are numbers or strings; booleans become 0 and 1. Nulls, lists
        and objects are left out.

    Raises:
        InputError: While iterating, naming file and line: not JSON, not an object, text missing, not a string or empty.
    """
    path = Path(path)
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            text = _decoded(line, where).removeprefix("\ufeff")
            if text.strip():
                yield _from_fields(_json_object(text, where), where, text_field=text_field, id_field=id_field)


def read_text(path: str | Path) -> Iterator[Document]:
    """Yields one document for a text file, or one for each text file in a folder and below it.

    Args:
        path: A file of any ending, or a folder, where `.txt`, `.md` and `.rst` files are taken in the order of their
            relative paths. Names that start with a dot are passed over.

    Yields:
        Documents whose id is the file's name, or its path relative to the folder. They have no columns.

    Raises:
        InputError: While iterating: a file is missing, is not UTF-8, or is empty.
    """
    path = Path(path)
    if not path.is_dir():
        yield _from_file(path, path.name)
        return
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.suffix in TEXT_ENDINGS}
    for name, file in sorted(names.items()):
        if file.is_file() and not any(part.startswith(".") for part in name.split("/")):
            yield _from_file(file, name)


def python_docs() -> Iterator[Document]:
    """Yields the running Python's own documentation: text that every machine has, without a network.

    First the language reference as `help()` shows it (`pydoc_data.topics`), then the docstrings of the standard
    library, each text once. Column `kind` is `"topic"` or `"docstring"`. About 5,400 documents and 2.1 MB; the
    docstrings are parsed from source, file by file, which takes some 3 CPU-seconds in all. The order is fixed; other
    versions of Python have other texts.

    Example:
        >>> next(python_docs()).source
        'pydoc_data.topics:assert'
    """
    seen: set[str] = set()
    for document in itertools.chain(_topics(), _docstrings(Path(sysconfig.get_path("stdlib")))):
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _reader(source: str) -> Iterator[Document]:
    path = Path(source)
    if source == PYTHON_DOCS:
        return python_docs()
    if not path.exists():
        raise InputError(
            f"There is nothing at {source}; expected a file, a folder or {PYTHON_DOCS!r}. "
            f"Check the path (the working folder is {Path.cwd()})."
        )
    if path.is_dir() or path.suffix in TEXT_ENDINGS:
        return read_text(path)
    if path.suffix in JSONL_ENDINGS:
        return read_jsonl(path)
    raise InputError(
        f"{source} ends in {path.suffix!r}; expected {_listed(JSONL_ENDINGS + TEXT_ENDINGS)}, a folder of text files "
        f"or {PYTHON_DOCS!r}. Convert the file to JSONL: one object per line, with a string field 'text'."
    )


def _listed(endings: tuple[str, ...]) -> str:
    return f"{', '.join(endings[:-1])} or {endings[-1]}"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); expected a readable file. Check the path and its permissions."
        ) from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} has the byte 0x{raw[error.start]:02x} at offset {error.start}, which is not UTF-8; "
            "expected UTF-8 text. Convert the file, for example with iconv."
        ) from error


def _json_object(line: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON ({error}); expected one JSON object on the line. "
            "Correct the line; a text's line breaks must be written as \\n."
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{where} holds a JSON {type(value).__name__}; expected an object such as "
            '{"id": "a", "text": "..."}. Wrap the value in an object.'
        )
    return value


def _from_fields(fields: dict[str, object], where: str, *, text_field: str, id_field: str) -> Document:
    if text_field not in fields:
        raise InputError(
            f"{where} has no field {text_field!r}, only {sorted(fields)}; expected the text there. "
            f"Rename the field that holds the text to {text_field!r}, or read the file with "
            "read_jsonl(path, text_field=...)."
        )
    identifier = fields.get(id_field, where)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise InputError(
            f"{where} has {identifier!r} in {id_field!r}; expected a string or an integer. Correct or drop the field."
        )
    columns = {
        name: int(value) if isinstance(value, bool) else value
        for name, value in fields.items()
        if name not in (text_field, id_field) and isinstance(value, int | float | str)
    }
    text = _checked_text(fields[text_field], f"{where}, field {text_field!r},")
    return Document(id=str(identifier), text=text, columns=columns, source=where)


def _from_file(path: Path, name: str) -> Document:
    with _opened(path) as file:
        text = _decoded(file.read(), name).removeprefix("\ufeff")
    return Document(id=name, text=_checked_text(text, name), columns={}, source=name)


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{where} holds a {type(text).__name__}; expected a string. Write the text in quotes.")
    if not text.strip():
        raise InputError(f"{where} holds an empty text; expected at least one visible character. Drop this document.")
    if not _encodable(text):
        raise InputError(
            f"{where} holds half of a surrogate pair, which has no UTF-8 form; expected whole characters. "
            "Remove the escape \\ud800 to \\udfff."
        )
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text, {"kind": "topic"}, f"pydoc_data.topics:{name}")


def _docstrings(library: Path) -> Iterator[Document]:
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield from _module_docstrings(path, relative)


def _module_docstrings(path: Path, relative: Path) -> Iterator[Document]:
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have escapes that newer parsers warn about
        tree = ast.parse(path.read_bytes())
    times: dict[str, int] = {}
    for name, line, text in _documented(tree, ""):
        times[name] = times.get(name, 0) + 1  # a property and its setter, or both branches of an `if`
        again = f"#{times[name]}" if times[name] > 1 else ""
        if len(text) > _DOCSTRING_CHARACTERS and _encodable(text):
            identifier = "/".join(filter(None, ("docstring", module, name))) + again
            yield Document(identifier, text, {"kind": "docstring"}, f"{relative.as_posix()}:{line}")


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Yields (qualified name, line, docstring) of a module and all that it defines, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield prefix, getattr(node, "lineno", 1), text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child, prefix)
