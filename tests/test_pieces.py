"""Bytes of tokens against the tokenizers library: byte-level and SentencePiece-like vocabularies."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from extract.documents import Document, Problem
from extract.named import model_folder
from extract.pieces import joined, pieces_of, whole_characters
from extract.tokens import Tokenizer, encode, load_tokenizer, prepare

TINY = load_tokenizer(model_folder("tiny-qwen2"))
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
CORPUS = ["def f(x): return x + 1", "Grüße aus Köln 数据", "one two three two three four", "spaces   and\ttabs\n"] * 5


def trained(kind: str) -> Tokenizer:
    """A tokenizer of one of the usual kinds, trained on a few lines."""
    special = ["<s>", "</s>"]
    if kind.startswith("byte-level"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte-level, prefix space")
        made.decoder = decoders.ByteLevel()
        if kind == "byte-level, NFC":
            made.normalizer = normalizers.NFC()
        if kind == "byte-level, trimmed":
            made.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "fallback to bytes":
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<s>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return Tokenizer(made, made.to_str().encode())


KINDS = (
    "byte-level",
    "byte-level, prefix space",
    "byte-level, NFC",
    "byte-level, trimmed",
    "fallback to bytes",
    "unigram",
)
TOKENIZERS = {kind: trained(kind) for kind in KINDS} | {"tiny-qwen2": TINY}


def document(text: str, **more) -> Document:
    return Document("d", text, {}, "test:1", **more)


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed", "tiny-qwen2"])
@given(text=ANY_TEXT)
def test_the_tokens_of_a_byte_level_tokenizer_are_the_bytes_of_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.engine.encode(text, add_special_tokens=False).ids
    assert b"".join(tokenizer.pieces[number] for number in ids) == text.encode()
    assert tokenizer.piece_bytes.tolist() == [len(piece) for piece in tokenizer.pieces]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_piece_is_what_the_library_decodes(kind):
    tokenizer = TOKENIZERS[kind]
    pieces = pieces_of(tokenizer.data)
    assert len(pieces) == tokenizer.engine.get_vocab_size()
    special = {number for number, _ in tokenizer.engine.get_added_tokens_decoder().items()}
    for number, piece in enumerate(pieces):
        if number not in special:
            decoded = tokenizer.engine.decode([number])
            assert "\ufffd" in decoded or decoded.strip() == piece.decode().strip()


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(ANY_TEXT.filter(str.strip), min_size=1, max_size=4))
def test_ids_and_places_are_those_of_the_library(kind, texts):
    tokenizer = TOKENIZERS[kind]
    expected = [tokenizer.engine.encode(text, add_special_tokens=False) for text in texts]
    if not all(each.ids for each in expected):
        return  # a normalizer may leave nothing; refused elsewhere
    found = encode([document(text) for text in texts], tokenizer)
    assert found.ids.tolist() == [number for each in expected for number in each.ids]
    assert found.counts.tolist() == [len(each.ids) for each in expected]
    edges = np.cumsum([0, *found.counts])
    for place, (text, each) in enumerate(zip(texts, expected, strict=True)):
        raw = text.encode()
        spans = [(int(a), int(b)) for a, b in zip(found.start, found.end, strict=True)][edges[place] : edges[place + 1]]
        shown = [raw[a:b].decode() for a, b in spans]
        theirs = [text[a:b] for a, b in each.offsets]
        if kind == "byte-level, trimmed":  # the library leaves the spaces out of a token's place
            shown, theirs = [text.strip() for text in shown], [text.strip() for text in theirs]
        assert shown == theirs
        if kind in ("byte-level", "byte-level, trimmed", "tiny-qwen2"):
            assert {byte for a, b in spans for byte in range(a, b)} == set(range(len(raw)))


@given(text=ANY_TEXT, cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_tokens_without_a_text_give_one_and_places_in_it(text, cuts):
    ids = TINY.engine.encode(text, add_special_tokens=False).ids
    ids = ids[cuts[0] : max(len(ids) - cuts[1], cuts[0] + 1)] or ids
    given_ids = document("", token_ids=tuple(ids))
    prepared = prepare(given_ids, TINY)
    assert isinstance(prepared, Document)
    whole = prepared.text
    raw = b"".join(TINY.pieces[number] for number in ids)
    assert whole == raw.decode(errors="replace")
    found = encode([prepared], TINY)
    assert found.ids.tolist() == ids
    shown = whole.encode()
    for number, start, end in zip(ids, found.start.tolist(), found.end.tolist(), strict=True):
        piece = shown[start:end].decode()
        try:
            assert TINY.pieces[number].decode() == piece
        except UnicodeDecodeError:
            assert start < end
    if "\ufffd" not in whole:
        assert whole == raw.decode()


@given(pieces=st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=9))
def test_torn_characters_have_a_place(pieces):
    text, first, last = joined(pieces)
    raw = text.encode()
    assert text == b"".join(pieces).decode(errors="replace")
    assert first[0] == 0
    assert last[-1] == len(raw)
    assert (first <= last).all()
    assert (first[1:] <= last[:-1]).all(), "none is left out"
    assert (np.diff(first) >= 0).all()
    for piece, start, stop in zip(pieces, first.tolist(), last.tolist(), strict=True):
        if piece.isascii():
            assert raw[start:stop] == piece


@given(text=ANY_TEXT, data=st.data())
def test_spans_grow_to_whole_characters(text, data):
    raw = np.frombuffer(text.encode(), np.uint8)
    start = data.draw(st.integers(0, len(raw) - 1))
    end = data.draw(st.integers(start + 1, len(raw)))
    (first,), (last,) = whole_characters(raw, np.array([start]), np.array([end]))
    assert first <= start
    assert end <= last
    assert start - first < 4
    assert last - end < 4
    raw[first:last].tobytes().decode()
    assert len(raw[first:last].tobytes().decode()) == len([c for c in _edges(text) if c[0] < end and c[1] > start])


def _edges(text: str) -> list[tuple[int, int]]:
    sizes = np.cumsum([0, *(len(character.encode()) for character in text)]).tolist()
    return [*zip(sizes[:-1], sizes[1:], strict=True)]  # noqa: RUF007


def test_tokens_that_the_tokenizer_does_not_have_are_refused():
    found = prepare(document("", token_ids=(5, 1024)), TINY)
    assert isinstance(found, Problem)
    assert found.message.startswith("document 'd' (test:1) has token 1024, the tokenizer has 0 to 1023; expected")
    nothing = Tokenizer(TINY.engine, json.dumps({"model": {"vocab": {}}}).encode())
    assert nothing.pieces == []
