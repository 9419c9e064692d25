"""Parquet files and datasets to records of named fields, one at a time, each with the place it stands at."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from actstore.errors import InputError
from extract.lines import Found, Share, opened

PARQUET_ENDING = ".parquet"
DATASETS = "datasets:"  # what a name begins with that the `datasets` library knows

_ROWS_AT_ONCE = 512  # of a parquet file


def read_parquet(path: Path, *, name: str | None = None, progress: Share | None = None) -> Iterator[Found]:
    """Yields each row of a parquet file, a few in memory at a time. Rows count from 0.

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
    row = 0
    try:
        with opened(path) as raw, parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for number, record in enumerate(batch.to_pylist(), start=row):
                    yield f"{name or path.name}:{number}", record
                row += batch.num_rows
                if progress:
                    progress(row / max(file.metadata.num_rows, 1))
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read from row {row} on ({str(error)[:120]}); expected a parquet file. Copy it again."
        ) from None


def open_saved(path: Path) -> Any:
    """The dataset that the `datasets` library saved to a folder, as a map of its files.

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
    return found


def is_saved(path: Path) -> bool:
    """Whether the `datasets` library saved this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def open_stream(source: str) -> Iterable[Any]:
    """A dataset by its name, or that of a folder, and a split: `datasets:NAME:SPLIT`; one row at a time.

    Raises:
        InputError: datasets is not installed, or does not find it.
    """
    name, _, split = source.removeprefix(DATASETS).partition(":")
    expected = "expected datasets:NAME or datasets:NAME:SPLIT"
    if not name:
        raise InputError(f"{source!r} names no dataset; {expected}; give its name")
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source} needs the datasets library, which is not installed; expected it; pip install datasets"
        ) from None
    try:
        return cast("Iterable[Any]", datasets.load_dataset(name, split=split or "train", streaming=True))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source} cannot be loaded ({str(error)[:160]}); {expected}. Check the name, the split and the network."
        ) from None


def stream_name(source: str) -> str:
    """The name of a stream without the folders above it: no path of a machine goes into a store."""
    name, *split = source.removeprefix(DATASETS).split(":")
    return DATASETS + ":".join([Path(name).name if Path(name).exists() else name, *split])
