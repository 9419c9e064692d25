"""Tokens per second from documents to a table, beside the tokenizers library alone; and a plan of many documents."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from actstore.schema import Plan
from actstore.strings import Strings
from actstore.table import DocumentTable
from extract.arrangement import Arrangement
from extract.named import model_folder
from extract.planning import stream_of
from extract.selection import Selection
from extract.sources import open_documents
from extract.tokenising import digest, tokenise
from extract.tokens import load_tokenizer
from tests.benchmarks.timing import median_seconds


def measure(folder: Path, *, repeats: int, documents: int) -> dict[str, object]:
    """Rates of tokenising in turns, then seconds and memory of planning in a process of its own."""
    tokenizer = load_tokenizer(model_folder("tiny-qwen2"))
    docs = open_documents("python-docs")
    texts = [document.text for document in docs]
    tokens = len(tokenise(docs, tokenizer).token_id)
    places = (folder / f"tokens-{number}" for number in range(10_000))
    seconds = median_seconds(
        {
            "tokenizers.encode_batch": lambda: tokenizer.engine.encode_batch(texts, add_special_tokens=False),
            "actstore, in memory": lambda: tokenise(docs, tokenizer),
            "actstore, to a folder": lambda: tokenise(docs, tokenizer, folder=next(places)),
        },
        repeats=repeats,
    )
    rates = {name: tokens / value for name, value in seconds.items()}
    for name, rate in rates.items():
        share = rate / rates["tokenizers.encode_batch"]
        print(f"tokenise       {name:<34} {rate:>12,.0f} tokens/s {share:>6.2f} of the library alone")
    child = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.reading", str(documents), str(folder)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    plan_seconds, peak = map(float, child.stdout.split())
    print(f"plan           {documents:,} documents in {plan_seconds:.1f} s, {peak / 1e9:.2f} GB at most")
    return {
        "tokenise": {name: round(rate) for name, rate in rates.items()}
        | {"documents": documents, "plan_seconds": round(plan_seconds, 1), "plan_bytes": round(peak)}
    }


def plan_many(documents: int, folder: Path) -> tuple[float, float]:
    """Seconds, and peak bytes of its own memory, of planning documents that are tokenised: checks to plan."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(2.5, 0.8, documents).astype(np.int64).clip(1, 2000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.memmap(folder / "ids", np.int32, "w+", shape=(int(offsets[-1]),))
    start, end = (np.memmap(folder / name, np.uint32, "w+", shape=ids.shape) for name in ("start", "end"))
    for first in range(0, len(ids), 1 << 22):
        here = slice(first, min(first + (1 << 22), len(ids)))
        ids[here] = generator.integers(0, 1024, here.stop - first)
        document = np.searchsorted(offsets, np.arange(here.start, here.stop), side="right") - 1
        start[here] = np.arange(here.start, here.stop) - offsets[document]
        end[here] = start[here] + 1
    names = np.memmap(folder / "names", np.uint8, "w+", shape=(17 * documents,))
    for number in range(0, documents, 10_000):
        some = b"".join(b"document-%08d" % each for each in range(number, min(number + 10_000, documents)))
        names[17 * number : 17 * number + len(some)] = np.frombuffer(some, np.uint8)
    text_bytes = np.memmap(folder / "text", np.uint8, "w+", shape=ids.shape)
    text_bytes[:] = ord("x")
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    begun = time.perf_counter()
    table = DocumentTable(
        ids=Strings(names, np.arange(0, len(names) + 1, 17)), texts=Strings(text_bytes, offsets), token_offsets=offsets,
        token_id=ids, token_start=start, token_end=end,
    )  # fmt: skip
    arrangement = Arrangement(1024, selection=Selection("last or fraction(0.1)"))
    tokenizer = load_tokenizer(model_folder("tiny-qwen2"))
    part = arrangement.part(stream_of(table), tokenizer.words)
    from actstore.layout import Layout, Site

    layout = Layout.fit([Site("resid_post", 896, (12,), "bfloat16")], samples=part.packing.rows)
    Plan.make(layout, {"documents": digest(table)} | arrangement.as_json(), table.layout)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    return seconds, float(peak[0])


def watch(peak: list[int], done: threading.Event) -> None:
    """Keeps the most memory of its own that the process had; pages of mapped files are the system's."""
    status = Path("/proc/self/status")
    while not done.wait(0.01):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak[0] = max(peak[0], 1024 * int(lines["RssAnon"].split()[0]))


if __name__ == "__main__":
    print(*plan_many(int(sys.argv[1]), Path(sys.argv[2])))
