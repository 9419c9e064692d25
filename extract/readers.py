"""Files and records to documents, one at a time and in a fixed order.

Every reader yields a `Document`, or a `Problem` where one should have been: what to do about it is for the caller to
decide. What makes the rest unreadable, such as a file that cannot be opened or a torn archive, is raised.
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from actstore.errors import InputError
from extract.documents import JSONL_ENDINGS, Document, Fields, Problem, checked_text, document_of

TEXT_ENDINGS = (".txt", ".md", ".rst")
PACKED_ENDINGS = tuple(ending + packed for ending in JSONL_ENDINGS for packed in (".gz", ".zst"))
PARQUET_ENDINGS = (".parquet",)
ENDINGS = (*JSONL_ENDINGS, *PACKED_ENDINGS, *PARQUET_ENDINGS, *TEXT_ENDINGS)

_ROWS_AT_ONCE = 512  # of a parquet file

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
    if path.name.endswith((*JSONL_ENDINGS, *PACKED_ENDINGS)):
        return read_jsonl(path, fields, name=name)
    if path.name.endswith(PARQUET_ENDINGS):
        return read_parquet(path, fields, name=name)
    return read_text(path, name=name)


def read_jsonl(path: str | Path, fields: Fields | None = None, *, name: str | None = None) -> Iterator[Found]:
    """Yields one document per line of a JSONL file, plain, `.gz` or `.zst`, line by line. Blank lines are skipped.

    Args:
        path: The file, in UTF-8.
        fields: Which fields of an object mean what.
        name: What places are named by; None is the file's name.

    Raises:
        InputError: While iterating: the file cannot be opened or unpacked.
    """
    path, fields = Path(path), fields or Fields()
    name = name or path.name
    with _unpacked(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            where = f"{name}:{number}"
            text = _decoded(line, where)
            if isinstance(text, Problem):
                yield text
            elif text.strip():
                record = _json_object(text, where)
                yield record if isinstance(record, Problem) else document_of(record, where, fields)


def read_text(path: str | Path, *, name: str | None = None) -> Iterator[Found]:
    """Yields the one document of a text file. Its id is the name; it has no columns.

    Raises:
        InputError: The file cannot be opened.
    """
    path = Path(path)
    name = name or path.name
    with _opened(path) as file:
        text = _decoded(file.read(), name)
    text = text if isinstance(text, Problem) else checked_text(text, name)
    yield text if isinstance(text, Problem) else Document(id=name, text=text, columns={}, source=name)


def read_parquet(path: str | Path, fields: Fields | None = None, *, name: str | None = None) -> Iterator[Found]:
    """Yields one document per row of a parquet file, a few rows in memory at a time. Rows count from 0.

    Raises:
        InputError: pyarrow is not installed, or the file is no parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{path} is a parquet file, and pyarrow is not installed; expected it; pip install 'actstore[parquet]'"
        ) from None
    path, row = Path(path), 0
    try:
        with _opened(path) as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from _records(batch.to_pylist(), name or path.name, fields or Fields(), first=row)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read from row {row} on ({str(error)[:120]}); expected a parquet file. Copy it again."
        ) from None


def read_records(records: Iterable[Any], fields: Fields | None = None, *, name: str = "record") -> Iterator[Found]:
    """Yields one document per mapping of an iterable, such as a `datasets.Dataset`, streaming or not.

    Args:
        records: Mappings of field names to values; a `Document` is passed on as it is.
        fields: Which fields mean what.
        name: What places are named by: `record:17`, counting from 0.
    """
    return _records(records, name, fields or Fields())


def read_dataset(path: Path, fields: Fields) -> Iterator[Found]:
    """Yields the documents of a dataset that the `datasets` library saved to a folder, from its memory map.

    Raises:
        InputError: datasets is not installed, the folder is damaged, or holds several splits.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{path} was saved by the datasets library, which is not installed; expected it; pip install datasets"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({str(error)[:120]}); expected a folder made by save_to_disk. Save it again."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        raise InputError(
            f"{path} holds the splits {', '.join(found)}; expected one dataset; give the folder of one of them, such "
            f"as {path / next(iter(found))}"
        )
    return _records(found, path.name, fields)


def is_dataset(path: Path) -> bool:
    """Whether the `datasets` library saved this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def files_of(folder: Path) -> dict[str, Path]:
    """Files of a folder and below that can be read, by their relative names and in the order of these.

    Names that start with a dot are passed over.
    """
    names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.name.endswith(ENDINGS)}
    return {
        name: file
        for name, file in sorted(names.items())
        if file.is_file() and not any(part.startswith(".") for part in name.split("/"))
    }


def _records(records: Iterable[Any], name: str, fields: Fields, *, first: int = 0) -> Iterator[Found]:
    for number, record in enumerate(records, start=first):
        if isinstance(record, Document):
            yield record
        elif isinstance(record, Mapping):
            yield document_of(record, f"{name}:{number}", fields)
        else:
            yield Problem(
                "wrong type",
                f"{name}:{number} is a {type(record).__name__}; expected a mapping such as "
                "{'id': 'a', 'text': '...'}. Wrap the value.",
            )


def _lines(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be unpacked to its end ({error}); expected a whole file. Copy it again."
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] != "zstandard":
            raise
        raise InputError(
            f"{path} cannot be unpacked to its end ({error}); expected a whole file. Copy it again."
        ) from None


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Iterable[bytes]]:
    """A file, unpacked as it is read where its name says that it is packed."""
    with _opened(path) as file:
        if path.suffix == ".gz":
            with gzip.open(file) as plain:
                yield plain
        elif path.suffix == ".zst":
            yield _zstd_lines(file)
        else:
            yield file


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a Zstandard file of one frame or several. The library's own stream ends quietly where a file is torn.

    Raises:
        EOFError: the last frame is not whole.
    """
    import zstandard

    engine, begun, rest = zstandard.ZstdDecompressor().decompressobj(), False, b""
    while data := file.read(1 << 16):
        while data:
            rest, begun = rest + engine.decompress(data), True
            data = engine.unused_data
            if engine.eof:
                engine, begun = zstandard.ZstdDecompressor().decompressobj(), False
        *lines, rest = rest.split(b"\n")
        yield from lines
    if begun:
        raise EOFError("the last frame is not whole")
    if rest:
        yield rest


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); expected a readable file. Check the path and its permissions."
        ) from error


def _decoded(raw: bytes, where: str) -> str | Problem:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return Problem(
            "broken",
            f"{where} has the byte 0x{raw[error.start]:02x} at offset {error.start}, which is not UTF-8; "
            "expected UTF-8 text. Convert the file, for example with iconv.",
        )


def _json_object(line: str, where: str) -> dict[str, Any] | Problem:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(
            "broken",
            f"{where} is not JSON ({error}); expected one JSON object on the line. "
            "Correct the line; a text's line breaks must be written as \\n.",
        )
    if not isinstance(value, dict):
        return Problem(
            "wrong type",
            f"{where} holds a JSON {type(value).__name__}; expected an object such as "
            '{"id": "a", "text": "..."}. Wrap the value in an object.',
        )
    return value
