"""Tokens that are kept on a disk: after real kills, and where the documents are not those it was begun with."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
from parts import part_and_all_of
from tokenizers import normalizers, processors
from watched import WATCH

from actstore.errors import InputError, PlanMismatchError
from extract.documents import Document
from extract.named import model_folder
from extract.planning import make_plan
from extract.sources import Documents, open_documents
from extract.tokenising import digest, tokenise
from extract.tokens import load_tokenizer

TINY = model_folder("tiny-qwen2")
TOKENIZER = load_tokenizer(TINY)
DOCS = open_documents("python-docs", limit=1500)


@pytest.fixture(scope="module")
def whole() -> str:
    return digest(tokenise(DOCS, TOKENIZER))


CHILD = """
import sys
from pathlib import Path
from extract import spool, tokenising, tokens
from extract.sources import open_documents
spool.CHECKPOINT_BYTES, tokenising._DOCUMENTS_AT_ONCE = 200_000, 50
def say(done, total): print(done, flush=True)
tokenising.tokenise(
    open_documents("python-docs", limit=1500), tokens.load_tokenizer(sys.argv[1]), folder=Path(sys.argv[2]),
    progress=say,
)
"""


def stored(folder) -> int:
    return json.loads((folder / "state.json").read_bytes())["count"] if (folder / "state.json").exists() else 0


def test_killed_again_and_again_it_gives_the_same_table(tmp_path, whole, monkeypatch):
    folder = tmp_path / "tokens"
    for most in (300, 900):
        child = subprocess.Popen([sys.executable, "-c", CHILD, TINY, folder], stdout=subprocess.PIPE, text=True)
        while int(child.stdout.readline()) < most or stored(folder) < most - 200:
            pass
        child.kill()
        child.communicate()
    there = stored(folder)
    assert 0 < there < 1500
    encoded: list[int] = []
    from extract import tokenising

    plain = tokenising.encode
    monkeypatch.setattr(tokenising, "_DOCUMENTS_AT_ONCE", 50)
    monkeypatch.setattr(tokenising, "encode", lambda part, *more: encoded.append(len(part)) or plain(part, *more))
    assert digest(tokenise(DOCS, TOKENIZER, folder=folder)) == whole
    assert sum(encoded) == 1500 - there, "what was there is not tokenised again"
    encoded.clear()
    table = tokenise(iter(DOCS), TOKENIZER, folder=folder)
    assert not encoded
    assert isinstance(table.token_id, np.memmap)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda docs: [*docs[:3], Document("other", docs[3].text, docs[3].columns, "x:1"), *docs[4:]],
            "id of some from",
        ),
        (
            lambda docs: [*docs[:3], Document(docs[3].id, "other", docs[3].columns, "x:1"), *docs[4:]],
            "text of some from",
        ),
        (
            lambda docs: [Document(d.id, d.text, {"kind": "x"}, d.source) for d in docs],
            "kind of some from 'topics/assert'",
        ),
        (
            lambda docs: [Document(d.id, d.text, {}, d.source, completion=1) for d in docs],
            "completion_start of some from",
        ),
        (lambda docs: docs[:-1], "holds 20 documents, the source has 19; expected the same source and limit"),
    ],
)
def test_other_documents_are_refused(tmp_path, change, message):
    docs = [Document(each.id, each.text, {"kind": each.columns["kind"]}, each.source) for each in DOCS[:20]]
    tokenise(docs, TOKENIZER, folder=tmp_path)
    if "completion" in message:
        docs = [Document(each.id, each.text, {}, each.source) for each in docs]
        tokenise(docs, TOKENIZER, folder=tmp_path / "b")
        with pytest.raises(PlanMismatchError, match=message):
            tokenise(change(docs), TOKENIZER, folder=tmp_path / "b")
        return
    with pytest.raises(PlanMismatchError, match=message):
        tokenise(change(docs), TOKENIZER, folder=tmp_path)


def test_more_documents_are_added(tmp_path):
    tokenise(DOCS[:512], TOKENIZER, folder=tmp_path)
    table = tokenise(DOCS[:700], TOKENIZER, folder=tmp_path)
    assert digest(table) == digest(tokenise(DOCS[:700], TOKENIZER))


def test_completions_begin_where_the_prompt_ends():
    records = [
        {"id": "a", "prompt": "naïve ", "completion": "text"}, {"id": "b", "text": "no completion"},
    ]  # fmt: skip
    table = tokenise(Documents(records), TOKENIZER)
    assert table.columns["completion_start"].tolist() == [len("naïve ".encode()), len("no completion")]
    plain = tokenise(Documents(records[1:]), TOKENIZER)
    assert "completion_start" not in plain.columns


def test_tokens_that_are_given_are_kept_as_they_are():
    ids = TOKENIZER.engine.encode("def f(x):\n    return x", add_special_tokens=False).ids
    table = tokenise(Documents([{"id": "a", "input_ids": ids}, {"id": "b", "input_ids": ids[::-1]}]), TOKENIZER)
    assert table.token_id.tolist() == ids + ids[::-1]
    assert table.texts[0] == "def f(x):\n    return x"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([{"n": 1}, {"n": "x"}], r"column 'n' holds \['int', 'str'\] \(s:0, s:1\); expected only text or only numbers"),
        ([{"n": 1 << 63}], r"column 'n' has numbers over 64 bits \(s:0\); give them as text"),
        ([{"text_bytes/..": 1}], "document column"),
        ([{"token_id": 1}], "column name 'token_id' is used by the format itself"),
        ([{"completion_start": 1}], "column name 'completion_start' is used by the format itself"),
        ([{"a": 1}, {"b": 1}], r"document 'd0' \(s:0\) has no field 'b', which s:1 has|'d1' \(s:1\) has no field 'a'"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(columns, message):
    docs = [Document(f"d{number}", "text", each, f"s:{number}") for number, each in enumerate(columns)]
    with pytest.raises(InputError, match=message):
        tokenise(docs, TOKENIZER)


def test_whole_numbers_and_fractions_make_a_column_of_fractions():
    docs = [Document(f"d{number}", "text", {"n": value, "m": 3}, "s") for number, value in enumerate([1, 0.5])]
    table = tokenise(docs, TOKENIZER)
    assert table.columns["n"].tolist() == [1.0, 0.5]
    assert table.columns["n"].dtype == np.float64
    assert table.columns["m"].dtype == np.int64


def test_nothing_to_read_is_refused():
    with pytest.raises(InputError, match="there are no documents to read; expected at least one"):
        tokenise([], TOKENIZER)


# Tokens around texts, and chats


def llama_like(folder: Path) -> Path:
    """The tiny tokenizer with a token that it puts before every text, as Llama's does, and a chat template."""
    engine = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    engine.add_special_tokens(["<s>", "</s>"])
    bos = engine.token_to_id("<s>")
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    engine.save(str(folder / "tokenizer.json"))
    template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TEXTS = [("d0", "naïve text"), ("d1", "a 😀"), ("d2", "<s>rendered before")]


@pytest.mark.parametrize("bos", ["model", "never", "always"])
@pytest.mark.parametrize("eos", ["never", "always"])
def test_tokens_around_a_text_are_those_that_were_asked_for_and_have_no_place_in_it(tmp_path, bos, eos):
    tokenizer = load_tokenizer(llama_like(tmp_path), bos=bos, eos=eos)
    docs = [Document(name, text, {}, "s") for name, text in TEXTS] + [Document("d3", "", {}, "s", token_ids=(5, 6))]
    table = tokenise(docs, tokenizer)
    first, last = (tokenizer.engine.token_to_id(text) for text in ("<s>", "</s>"))
    own = [tokenizer.engine.encode(text, add_special_tokens=False).ids for _, text in TEXTS]
    expected = [
        ([first] if bos != "never" and ids[0] != first else []) + ids + ([last] if eos == "always" else [])
        for ids in own
    ] + [[5, 6]]
    edges = table.token_offsets
    assert [table.token_id[a:b].tolist() for a, b in itertools.pairwise(edges)] == expected
    for number, (_, text) in enumerate(TEXTS):
        spans = [(int(a), int(b)) for a, b in zip(table.token_start, table.token_end, strict=True)][
            edges[number] : edges[number + 1]
        ]
        size = len(text.encode())
        before = len(expected[number]) - len(own[number]) - (eos == "always")
        assert spans[:before] == [(0, 0)] * before
        assert spans[len(spans) - (eos == "always") :] == [(size, size)] * (eos == "always")
        assert {byte for a, b in spans for byte in range(a, b)} == set(range(size))


def test_a_model_without_such_tokens_adds_none_and_says_so(tmp_path):
    assert TOKENIZER.provenance()["special_tokens"] == "none"
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match=r"has no bos_token|names no bos_token"):
        load_tokenizer(tmp_path, bos="always")


def test_chats_are_rendered_by_the_template_and_know_their_completion(tmp_path):
    tokenizer = load_tokenizer(llama_like(tmp_path), answer=True)
    turns = [{"role": "user", "content": "2 + 2?"}]
    table = tokenise(
        Documents(
            [
                {"id": "asked", "messages": turns},
                {"id": "answered", "messages": [*turns, {"role": "assistant", "content": "4"}]},
            ]
        ),
        tokenizer,
    )
    assert list(table.texts) == ["<s>[user]2 + 2?</s>[assistant]", "<s>[user]2 + 2?</s>[assistant]4</s>"]
    assert table.columns["completion_start"].tolist() == [30, 30]
    ids = table.token_id.tolist()
    assert ids.count(tokenizer.engine.token_to_id("<s>")) == 2, "none is put before what the template wrote"


def test_chats_that_cannot_be_rendered_are_refused(tmp_path):
    chat = [{"id": "c", "messages": [{"role": "user", "content": "q"}]}]
    with pytest.raises(
        InputError, match=r"document 'c' \(record:0\) is a chat, and the model has no chat template; expected"
    ):
        tokenise(Documents(chat), TOKENIZER)
    folder = llama_like(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{{ strftime_now('%Y') }}{{ messages[0].content }}"})
    )
    with pytest.raises(InputError, match="writes today's date into it, so that tomorrow's run would be another"):
        tokenise(Documents(chat), load_tokenizer(folder))
    assert list(tokenise(Documents(chat), load_tokenizer(folder, chat_date="2024-07-26")).texts) == ["2024q"]
    with pytest.raises(InputError, match="the date of chats is 'soon'; expected one such as 2026-07-26"):
        load_tokenizer(folder, chat_date="soon")


def test_chats_and_tokens_that_cannot_be_are_counted_where_they_are_to_be_skipped(tmp_path):
    tokenizer = load_tokenizer(llama_like(tmp_path))
    good = [{"role": "user", "content": "q"}]
    records = [
        {"id": "a", "messages": good}, {"id": "b", "messages": [{"role": "user", "content": 5}]},
        {"id": "c", "input_ids": [3, 1 << 20]}, {"id": "d", "messages": good},
    ]  # fmt: skip
    source = Documents(records, on_error="skip")
    for folder in (None, tmp_path / "tokens", tmp_path / "tokens"):  # made, and continued
        table = tokenise(source, tokenizer, folder=folder)
        assert list(table.ids) == ["a", "d"]
        assert source.problems == {"refused chat": 1, "wrong type": 1}
    assert [message.split(":")[0] for message in source.first_problems] == ["record", "document 'c' (record"]
    with pytest.raises(InputError, match=r"^record:1: message 0 \(user\) has content of type int; expected a text"):
        tokenise(Documents(records), tokenizer)
    with pytest.raises(InputError, match=r"there are no documents to read \(passed over 1 .* token 1048576, the token"):
        tokenise(Documents([records[2]], on_error="skip"), tokenizer)


def test_a_document_of_too_many_tokens_is_named(monkeypatch):
    monkeypatch.setattr("extract.tokens.MAX_READ_BYTES", 120)
    with pytest.raises(InputError, match=r"document 'b' \(record:1\) has \d+ tokens; expected at most 10, which"):
        tokenise(Documents([{"id": "a", "text": "x"}, {"id": "b", "text": "word " * 30}]), TOKENIZER)


def dropping(folder: Path) -> Path:
    """The tiny tokenizer, for which a text of tildes has no tokens, and which puts a token before each."""
    engine = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    engine.normalizer = normalizers.Replace("~", "")
    engine.add_special_tokens(["<s>"])
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", engine.token_to_id("<s>"))]
    )
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


def sized(tokens: int) -> str:
    """A text of so many tokens."""
    text = next("a" + " b" * n for n in range(50) if len(TOKENIZER.engine.encode("a" + " b" * n)) == tokens)
    assert len(text) < 400
    return text


def counted(*texts: tuple[str, str], score: float = 1) -> list[Document]:
    return [Document(name, text, {"score": 1 if text[0] == "g" else score}, f"x.jsonl:{name}") for name, text in texts]


GOOD = [(f"g{number}", f"good {number}") for number in range(7)]
BAD = [("b0", "~~"), ("b1", sized(10)), ("b2", "~"), ("b3", "~~~"), ("b4", sized(14))]
MIXED = [BAD[0], *GOOD[:2], *BAD[1:3], *GOOD[2:6], BAD[3], GOOD[6], BAD[4]]


@pytest.fixture
def ten_tokens(monkeypatch):
    """Ten tokens are the most that one document may have, for the table as well."""
    monkeypatch.setattr("extract.tokens.MAX_READ_BYTES", 120)
    monkeypatch.setattr("actstore.table.MAX_READ_BYTES", 120)


@pytest.mark.parametrize("at_once", [1, 2, 3, 2048])
def test_documents_of_no_tokens_or_too_many_are_left_out_whole_where_they_are_to_be_skipped(
    tmp_path, monkeypatch, ten_tokens, at_once
):
    tokenizer = load_tokenizer(dropping(tmp_path / "tokenizer"))
    monkeypatch.setattr("extract.tokenising._DOCUMENTS_AT_ONCE", at_once)
    expected = tokenise(counted(*GOOD), tokenizer)
    source = Documents(counted(*MIXED, score=0.5), on_error="skip")
    for folder in (None, tmp_path / "tokens", tmp_path / "tokens"):  # made, and continued
        table = tokenise(source, tokenizer, folder=folder)
        assert digest(table) == digest(expected)
        assert table.columns["score"].dtype == np.int64, "half a point stood only where nothing was kept"
        assert source.problems == {"empty": 3, "too long": 2}
        assert source.describe_problems().startswith(
            "passed over 5 that are no documents (3 empty, 2 too long): document 'b0' (x.jsonl:b0) has no tokens; "
            "document 'b1' (x.jsonl:b1) has 11 tokens; document 'b2' (x.jsonl:b2) has no tokens;"
        )


@pytest.mark.parametrize("there", range(2, len(MIXED)))
def test_what_was_left_out_is_left_out_again_by_who_continues(tmp_path, ten_tokens, there):
    tokenizer = load_tokenizer(dropping(tmp_path / "tokenizer"))
    folder = tmp_path / "tokens"
    tokenise(Documents(counted(*MIXED[:there]), on_error="skip"), tokenizer, folder=folder)
    source = Documents(counted(*MIXED), on_error="skip")
    assert digest(tokenise(source, tokenizer, folder=folder)) == digest(tokenise(counted(*GOOD), tokenizer))
    assert source.problems == {"empty": 3, "too long": 2}
    with pytest.raises(InputError, match=r"^document 'b0' \(x.jsonl:b0\) has no tokens; expected text that the"):
        tokenise(Documents(counted(*MIXED)), tokenizer, folder=folder)


def test_a_document_that_was_left_out_and_has_tokens_now_is_another(tmp_path, ten_tokens):
    tokenizer = load_tokenizer(dropping(tmp_path / "tokenizer"))
    tokenise(Documents(counted(*MIXED), on_error="skip"), tokenizer, folder=tmp_path / "tokens")
    mended = [(name, "mended" if name == "b2" else text) for name, text in MIXED]
    with pytest.raises(PlanMismatchError, match="holds other documents: id of some from 'g0' "):
        tokenise(Documents(counted(*mended), on_error="skip"), tokenizer, folder=tmp_path / "tokens")


def test_sizes_are_refused_unless_they_are_to_be_skipped(tmp_path, ten_tokens, monkeypatch):
    tokenizer = load_tokenizer(dropping(tmp_path / "tokenizer"))
    with pytest.raises(InputError, match=r"^document 'b0' \(x.jsonl:b0\) has no tokens; .*; remove the document$"):
        tokenise(Documents(counted(GOOD[0], BAD[0])), tokenizer)
    with pytest.raises(InputError, match=r"^document 'b1' \(x.jsonl:b1\) has 11 tokens; expected at most 10, which"):
        tokenise(counted(GOOD[0], BAD[1]), tokenizer)
    assert len(tokenise(counted(BAD[1]), TOKENIZER).token_id) == 10, "without the token before it, it may be read"
    with pytest.raises(
        InputError, match=r"no documents to read \(passed over 1 that are no documents \(1 empty\): doc"
    ):
        tokenise(Documents(counted(BAD[0]), on_error="skip"), tokenizer)
    monkeypatch.setattr("extract.documents.TEXT_BYTES", 30)
    ids = TOKENIZER.engine.encode("The assert statement is a line of it").ids[:9]
    source = Documents([{"id": "a", "text": "x"}, {"id": "b", "input_ids": ids}], on_error="skip")
    assert list(tokenise(source, TOKENIZER).ids) == ["a"]
    assert source.problems == {"too long": 1}
    assert source.first_problems[0].startswith("document 'b' (record:1) holds 3")


def test_contexts_that_sae_lens_made_are_read_as_they_are(tmp_path):
    ids = TOKENIZER.engine.encode("def f(x): return x + 1 and more", add_special_tokens=False).ids[:8]
    datasets.Dataset.from_dict({"input_ids": [ids, ids[::-1]]}).save_to_disk(tmp_path / "made")
    (tmp_path / "made" / "sae_lens.json").write_text(json.dumps({"context_size": 8, "tokenizer_name": "tiny"}))
    documents = Documents(tmp_path / "made")
    with pytest.raises(
        InputError, match=r"context is 256, the documents are contexts of 8 tokens by their sae_lens.json"
    ):
        make_plan(TINY, documents, layers=[0])
    plan = make_plan(TINY, documents, layers=[0], context=8)
    assert plan.parts[0].packing.contexts == 2
    assert plan.contexts(0).token_ids[:2].tolist() == [ids, ids[::-1]]
    (tmp_path / "made" / "sae_lens.json").write_text("{}")
    with pytest.raises(InputError, match=r"sae_lens.json has no context_size; expected what SAELens writes"):
        make_plan(TINY, documents, layers=[0], context=8)


MEASURED = (
    WATCH
    + """
from extract import spool, tokenising, tokens
from extract.documents import Document

spool.CHECKPOINT_BYTES = 4 << 20
text = " ".join(f"word {number} of a text" for number in range(200))
def documents(count):
    for number in range(count):
        yield Document(f"document {number}", f"{number} {text}", {"n": number}, f"made:{number}")

tokenizer = tokens.load_tokenizer(sys.argv[1])
folder = Path(sys.argv[3]) if sys.argv[3] else None
tokenising.tokenise(documents(100), tokenizer)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
table = tokenising.tokenise(documents(int(sys.argv[2])), tokenizer, folder=folder)
tokenising.digest(table)
done = True
thread.join()
print(json.dumps({"grown": peak[0] - before, "tokens": len(table.token_id), "text": int(table.texts.sizes.sum())}))
"""
)


def grown(count: int, folder: Path | str) -> dict[str, int]:
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, TINY, str(count), str(folder)], check=True, capture_output=True, text=True
    )
    return json.loads(child.stdout)


@pytest.mark.slow
@part_and_all_of("count", 12_000, 24_000)
def test_memory_does_not_grow_with_the_documents_of_a_folder(tmp_path, count):
    few, many = grown(3_000, tmp_path / "few"), grown(count, tmp_path / "many")
    assert many["tokens"] * 12 + many["text"] > 350e6 * count / 24_000, "there is something to hold"
    for each in (few, many):
        print(f"{each['grown'] / 1e6:.0f} MB for {each['tokens']:,} tokens")
    assert many["grown"] < few["grown"] + 150e6 * count / 24_000


@pytest.mark.long
@pytest.mark.slow
def test_meta_tokens_in_memory_would_be_seen():
    assert grown(24_000, "")["grown"] > 350e6
