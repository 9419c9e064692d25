"""The running Python's own documentation: text that every machine has, without a network."""

import ast
import itertools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from extract.documents import Document, encodable

_DOCSTRING_CHARACTERS = 60  # shorter docstrings ("Return self.") are noise to a language model
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def python_docs() -> Iterator[Document]:
    """Yields the documents.

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
        if len(text) > _DOCSTRING_CHARACTERS and encodable(text):
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
