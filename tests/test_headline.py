"""What the system before this one kept: 50,000 samples of four layers of 896, then 720 MB and 750 with metadata."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import actstore
from actstore.table import DocumentTable

SAMPLES, LAYERS, HIDDEN = 50_000, (6, 12, 18, 23), 896
BEFORE_BYTES = 750_000_000


def tokens_of_documents() -> DocumentTable:
    """200 documents of 250 tokens of four random letters, with their texts: they compress worse than real ones."""
    each, generator = SAMPLES // 200, np.random.default_rng(1)
    start = np.tile(4 * np.arange(each, dtype=np.uint32), 200)
    letters = generator.integers(ord("a"), ord("z"), (200, 4 * each), np.uint8)
    return DocumentTable(
        ids=[f"{number:08x}" for number in range(200)], texts=[bytes(text).decode() for text in letters],
        token_offsets=np.arange(0, SAMPLES + 1, each), token_id=generator.integers(0, 151_936, SAMPLES, np.int32),
        token_start=start, token_end=start + 4, columns={"sample_idx": list(range(200))},
    )  # fmt: skip


def one_row_of_each_document() -> DocumentTable:
    """As before: every sample has an id, an index and a time of its own; here the id is random, of 32 bits."""
    generator, nothing = np.random.default_rng(2), np.zeros(SAMPLES, np.uint32)
    numbers = generator.permutation(1 << 20)[:SAMPLES] * 4093
    return DocumentTable(
        ids=[f"{number:08x}" for number in numbers], texts=[""] * SAMPLES,
        token_offsets=np.arange(SAMPLES + 1), token_id=generator.integers(0, 151_936, SAMPLES, np.int32),
        token_start=nothing, token_end=nothing,
        columns={"sample_idx": np.arange(SAMPLES), "timestamp": 1_750_000_000 + np.arange(SAMPLES) // 7},
    )  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "make",
    [tokens_of_documents, one_row_of_each_document],
    ids=["tokens of documents", "one row of each document"],
)
def test_bytes_of_the_headline(tmp_path: Path, make: object) -> None:
    """Everything on the disk, through the real writer: rows in bfloat16, then norms, columns, documents and markers."""
    assert callable(make)
    documents: DocumentTable = make()
    layout = actstore.Layout.fit([actstore.Site("resid_post", HIDDEN, LAYERS)], samples=SAMPLES)
    rows = np.random.default_rng(0).standard_normal((SAMPLES, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    document = np.searchsorted(documents.token_offsets, np.arange(SAMPLES), side="right") - 1
    columns = {
        "document": document, "position": np.arange(SAMPLES) - documents.token_offsets[document],
        "token_id": documents.token_id,
    }  # fmt: skip
    url = tmp_path / "x.acts.zarr"
    with actstore.create(url, layout, {}, documents=documents) as writer:
        for block in range(layout.blocks):
            span = slice(*writer.block_range(block))
            block_rows = np.broadcast_to(rows[span], (len(LAYERS), span.stop - span.start, HIDDEN))
            samples = {name: values[span] for name, values in columns.items()}
            writer.write(block, {"resid_post": block_rows}, samples=samples).result()
    sizes = {path: path.stat().st_size for path in url.rglob("*") if path.is_file()}
    activations = sum(size for path, size in sizes.items() if path.is_relative_to(url / "resid_post"))
    metadata = sum(sizes.values()) - activations
    pure = SAMPLES * len(LAYERS) * HIDDEN * 2
    assert pure == 358_400_000
    assert pure <= activations <= 360_000_000
    assert metadata <= 0.01 * 360_000_000
    assert activations + metadata < BEFORE_BYTES / 2
    assert np.array_equal(actstore.open(url).dataset(raw=True).resid_post.values[2, -100:], rows[-100:])
