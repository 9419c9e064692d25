"""Rows with their tokens marked: every letter is there and seen, nothing is obeyed, lines fit."""

import itertools
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsed import parsed
from rich.cells import cell_len
from stores import TEXTS

import actstore
from actstore import TokenInContext, marked
from actstore.errors import InputError
from actstore.marked import TokenRows
from actstore.visible import clusters, columns_of, first_columns, joined, last_columns, visible

ROWS = [
    TokenInContext("the cat ", "sat", " on the mat"),
    TokenInContext("", "日本", "語のテキスト"),
    TokenInContext("Grüße aus ", "Kö", "ln"),
]


@pytest.fixture(scope="module")
def rows(finished):
    """Every row of a store whose texts have letters of one to four bytes, joined emoji, flags and marks."""
    found = list(actstore.open(finished).text(range(53), window=5))
    assert len({row.token for row in found}) > 20
    return found


# What is seen


SEEN = {
    "plain": ("a b", "a b"),
    "line breaks": ("a\nb\r\nc", "a\u23ceb\u240d\u23cec"),
    "tab": ("\ta", "\u21e5a"),
    "controls": ("\x00\x07\x08\x1b[2J\x7f", "\u2400\u2407\u2408\u241b[2J\u2421"),
    "C1 controls": ("\x9b31m\x85", r"\x9b31m\x85"),
    "other line breaks": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "bidi overrides": ("\u202eabc\u202c\u2066\u2069\u200f", r"\u202eabc\u202c\u2066\u2069\u200f"),
    "invisible": ("\ufeff\u00ad\u200b\u2060", r"\ufeff\xad\u200b\u2060"),
    "tags": ("\U000e0041", r"\U000e0041"),
    "lone surrogates": ("a\ud800\udfffb", r"a\ud800\udfffb"),
    "private and unknown": ("\ue000\U0010ffff", r"\ue000\U0010ffff"),
    "other spaces": ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
    "a mark with nothing before it": ("\u0301a", "\u25cc\u0301a"),
    "a joiner with nothing before it": ("\u200d\U0001f469", "\u25cc\u200d\U0001f469"),
    "a mark on a letter": ("e\u0301", "e\u0301"),
    "joiners of Persian": ("\u0645\u06cc\u200c\u062e\u0648", "\u0645\u06cc\u200c\u062e\u0648"),
    "joined emoji": ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "shown"), SEEN.values(), ids=SEEN)
def test_everything_is_seen(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters()))
def test_nothing_is_obeyed_and_nothing_is_lost(text):
    shown = visible(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", shown)
    shown.encode()
    plain = [letter for letter in text if letter.isprintable()]
    left = iter(shown)
    assert all(letter in left for letter in plain), "every printable letter is there, in order"


COLUMNS = {
    "ASCII": ("abc", 3),
    "Latin": ("Köln", 4),
    "mark": ("e\u0301", 1),
    "Japanese": ("日本語", 6),
    "full width": ("\uff21\uff22", 4),
    "half width": ("ｱｲ", 2),
    "Korean": ("한", 2),
    "Korean, taken apart": ("\u1112\u1161\u11ab", 2),
    "emoji": ("🙂", 2),
    "family": ("👩\u200d👩\u200d👧", 2),
    "rainbow flag": ("🏳\ufe0f\u200d🌈", 2),
    "heart as emoji": ("❤\ufe0f", 2),
    "heart as text": ("❤", 1),
    "skin tone": ("👋\U0001f3fd", 2),
    "skin tone alone": ("\U0001f3fd", 2),
    "flag": ("🇩🇪", 2),
    "two flags": ("🇩🇪🇫🇷", 4),
    "half a flag": ("🇩", 1),
    "joiner in a word": ("ab\u200dc", 3),
    "Devanagari": ("\u0915\u094d\u200d\u0937", 2),
    "wide ligature": ("﷽", 1),
    "dotted circle": ("\u0301", 1),
    "mark of two joined": ("\u25cc\u200d👩", 3),
    "escape": ("\u202e", 6),
    "a stack of marks": ("e" + "\u0301" * 100, 4),
}


@pytest.mark.parametrize(("text", "columns"), COLUMNS.values(), ids=COLUMNS)
def test_columns(text, columns):
    assert columns_of(clusters(text)) == columns


def test_columns_of_single_letters_are_those_of_rich():
    """Rich has tables of its own. Ranges that no version of Unicode changed."""
    ranges = [(0x20, 0x7F), (0xA1, 0xAD), (0xAE, 0x300), (0x391, 0x3A2), (0x3041, 0x3097), (0x4E00, 0x9FA6),
              (0xAC00, 0xD7A4), (0xFF01, 0xFF5F), (0x1F600, 0x1F645)]  # fmt: skip
    letters = [chr(code) for start, stop in ranges for code in range(start, stop)]
    assert [letter for letter in letters if columns_of(clusters(letter)) != cell_len(letter)] == []


@given(st.text(max_size=60), st.integers(0, 30))
def test_ends_of_a_text_fit_and_are_its_ends(text, columns):
    whole = visible(text)
    for found, taken in ((first_columns(text, columns), str.startswith), (last_columns(text, columns), str.endswith)):
        shown = joined(found)
        assert columns_of(found) <= columns
        if columns_of(clusters(text)) <= columns:
            assert shown == whole
        else:
            kept = shown[:-1] if taken is str.startswith else shown[1:]
            assert shown in ("", kept + "\u2026", "\u2026" + kept)
            assert taken(whole, kept)
            assert columns_of(found) >= columns - 1, "no more than half a wide letter is left empty"


def test_a_cut_goes_between_letters_as_they_are_drawn():
    assert joined(first_columns("ab👩\u200d👧c", 4)) == "ab\u2026"
    assert joined(first_columns("ab👩\u200d👧c", 5)) == "ab👩\u200d👧c"
    assert joined(first_columns("e\u0301e\u0301e\u0301", 2)) == "e\u0301\u2026"
    assert joined(last_columns("日本語", 5)) == "\u2026本語"
    assert joined(last_columns("日本語", 4)) == "\u2026語"
    assert joined(last_columns("🇩🇪🇫🇷", 3)) == "\u2026🇫🇷"


# Text


def test_tokens_stand_below_each_other():
    assert marked.text(ROWS) == (
        "  the cat \u27e6sat\u27e7 on the mat\n"  #
        "          \u27e6日本\u27e7語のテキスト\n"
        "Grüße aus \u27e6Kö\u27e7ln"
    )


def test_every_letter_of_a_store_is_shown(rows):
    for row, line in zip(rows, marked.text(rows, width=500).split("\n"), strict=True):
        before, token, after = re.fullmatch(r" *(.*)\u27e6(.*)\u27e7(.*)", line).groups()
        for found, wanted in ((before, row.before.lstrip(" ")), (token, row.token), (after, row.after)):
            assert found.replace("\u25cc", "") == wanted
        assert marked.line(row).lstrip() == line.lstrip()


@pytest.mark.parametrize("width", [1, 23, 40, 80, 200])
def test_lines_fit_and_tokens_are_aligned(rows, width):
    lines = marked.text(rows, width=width).split("\n")
    assert len(lines) == len(rows)
    widths = [columns_of(clusters(line)) for line in lines]
    assert max(widths) <= max(width, marked.LEAST_TEXT + 2)
    assert len({columns_of(clusters(line.partition("\u27e6")[0])) for line in lines}) == 1
    if width == 40:
        assert any("\u2026" in line for line in lines) == (
            max(columns_of(clusters(marked.line(row))) for row in rows) > 40
        )


def test_colour_is_reverse_video_and_nothing_else():
    shown = marked.text([*ROWS, TokenInContext("a\x1b[31m", "", "b")], colour=True)
    assert re.findall("\x1b[^m]*m", shown) == ["\x1b[7m", "\x1b[27m"] * 4
    assert "Grüße aus \x1b[7mKö\x1b[27mln" in shown
    assert "a\u241b[31m\x1b[7m\u2205\x1b[27mb" in shown, "a token without text is seen"
    assert "\x1b" not in marked.text(ROWS)


def test_labels_stand_before_the_rows_with_their_digits_below_each_other():
    labels = {"score": np.array([0.5, 12.25, 1e-9], np.float32), "id": ["a", "日本", "a\nb"]}
    assert [line[:18] for line in marked.text(ROWS, labels=labels).split("\n")] == [
        "  0.5     a    the",
        "12.25  日本         ",
        "1e-09   a\u23ceb  Grüße",
    ]


def test_no_rows():
    assert marked.text([]) == marked.html([]) == ""
    assert repr(TokenRows([])) == "no rows"
    assert parsed(TokenRows([])._repr_html_()).text == "no rows"
    assert marked.text([], labels={"score": []}) == ""


# HTML


def test_html_has_every_letter_of_a_store(rows):
    page = parsed(marked.html(rows))
    assert len(page.rows) == len(page.inside["mark"]) == 53
    for (cell,), mark, row in zip(page.rows, page.inside["mark"], rows, strict=True):
        assert cell.replace("\u25cc", "") == row.before + (mark if not row.token.strip(" ") else row.token) + row.after


MARKS = {
    "a word": (" the", " the"),
    "a line break": ("\n", "\u23ce"),
    "line breaks": ("\r\n\n", "\u240d\u23ce\u23ce"),
    "a space": (" ", "\u2423"),
    "spaces": ("   ", "\u2423" * 3),
    "a tab": ("\t", "\u21e5"),
    "no text": ("", "\u2205"),
    "a joiner": ("\u200d", "\u25cc\u200d"),
    "a mark": ("\u0301", "\u25cc\u0301"),
    "nothing that is seen": ("\u200b", r"\u200b"),
    "an end of HTML": (
        "</mark></bdi></td><script>alert('1')</script>",
        "</mark></bdi></td><script>alert('1')</script>",
    ),
    "entities": ("&lt;&amp;#60;", "&lt;&amp;#60;"),
    "quotes": ("\" onload='x'", "\" onload='x'"),
    "an override": ("\u202ecod.exe", r"\u202ecod.exe"),
    "a lone surrogate": ("\ud800", r"\ud800"),
    "a null": ("\x00", "\u2400"),
}


@pytest.mark.parametrize(("token", "shown"), MARKS.values(), ids=MARKS)
def test_every_token_is_seen_as_a_mark(token, shown):
    page = parsed(marked.html([TokenInContext(f"x{token}y", token, f"z{token}")]))
    assert page.inside["mark"] == [shown]
    assert page.rows == [[f"{visible(f'x{token}y')}{shown}{visible(f'z{token}')}"]]


@given(st.lists(st.tuples(*[st.text(st.characters(), max_size=8)] * 3), min_size=1, max_size=4))
def test_html_of_anything_is_its_visible_text(pieces):
    rows = [TokenInContext(*each) for each in pieces]
    page = parsed(marked.html(rows, labels={"<b>": [row.token for row in rows]}))
    assert page.rows[0] == ["<b>", "text"]
    for cells, mark, row in zip(page.rows[1:], page.inside["mark"], rows, strict=True):
        assert mark
        assert cells[1] == visible(row.before) + mark + visible(row.after)


def test_text_from_the_right_is_isolated_from_labels_and_rows():
    row = TokenInContext("السلام ", "عليكم", " ورحمة")
    page = marked.html([row, *ROWS], labels={"عنوان": ["א", 1, 2, 3]})
    assert parsed(page).inside["bdi"] == [
        "عنوان", "א", "السلام عليكم ورحمة", "1", *[each for row, number in zip(ROWS, (2, 3, ""), strict=True)
        for each in (row.before + row.token + row.after, str(number))][:-1],
    ]  # fmt: skip
    assert page.count("<bdi>") == page.count("</bdi>") == 9


def test_a_megabyte_is_cut_everywhere():
    for letter in ("<", "\x00", "\u0301", "日", " ", "\U0001f469\u200d"):
        long = letter * (1 << 20)
        row = TokenInContext(f"{long}before", f"token{long}", f"after{long}")
        page, lines = marked.html([row], labels={"id": [long]}), marked.text([row], labels={"id": [long]})
        assert len(page) < 60 * marked.MOST_LETTERS
        assert len(lines) < 33 * 250
        assert "\n" not in lines
        assert [mark[:5] for mark in parsed(page).inside["mark"]] == ["token"]
        assert re.search(r"before<mark>token.*\u2026</mark>after", page)
    assert parsed(marked.html([TokenInContext("", " " * (1 << 20), "")])).inside["mark"] == ["\u2423" * 2000]


def test_the_time_of_a_cut_does_not_grow_with_the_text():
    """Counted, not timed: only the end of a text is ever looked at."""

    class Watched(str):
        taken: list[int] = []  # noqa: RUF012  of the one instance

        def __getitem__(self, place):
            found = super().__getitem__(place)
            self.taken.append(len(found))
            return found

    text = Watched("ab" * 10**6)
    assert joined(first_columns(text, 10)) == "ababababa\u2026"
    assert joined(last_columns(text, 10)) == "\u2026babababab"
    assert max(text.taken) < 1000


# A sequence that shows itself


def test_rows_are_a_sequence(rows):
    found = TokenRows(rows, labels={"row": range(53)})
    assert len(found) == 53
    assert list(found) == rows
    assert (found[0], found[-1]) == (rows[0], rows[-1])
    assert found[5:9] == TokenRows(rows[5:9], labels={"row": range(5, 9)})
    assert found[5:9] != TokenRows(rows[5:9])
    assert (found == rows, found == tuple(rows), found == rows[1:], found == "x") == (True, True, False, False)
    assert rows[7] in found
    with pytest.raises(IndexError):
        found[53]
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)


def test_rows_show_themselves(rows, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    found = TokenRows(rows, labels={"row": range(53)})
    assert repr(found) == str(found) == marked.text(rows, labels={"row": range(53)}, width=60)
    assert found._repr_html_() == marked.html(rows, labels={"row": range(53)})
    monkeypatch.setenv("COLUMNS", "100")
    assert repr(found) == marked.text(rows, labels={"row": range(53)}, width=100)


def test_more_rows_than_are_shown_are_counted(rows):
    many = list(itertools.islice(itertools.cycle(rows), 1234 + marked.MOST_ROWS))
    found = TokenRows(many)
    lines = repr(found).split("\n")
    assert len(lines) == marked.MOST_ROWS + 1
    assert lines[-1] == "and 1,234 more: take a slice to see them"
    page = parsed(found._repr_html_())
    assert len(page.rows) == marked.MOST_ROWS
    assert page.inside["p"] == ["and 1,234 more: take a slice to see them"]
    assert len(marked.text(many).split("\n")) == len(many)


def test_rows_of_another_kind(tmp_path):
    class Other:
        before, token, after = "a", "b", "c"

    assert marked.text([Other()]) == "a\u27e6b\u27e7c"
    assert TokenRows([Other()])[0].token == "b"


ERRORS = {
    "too few": (
        lambda: marked.text(ROWS, labels={"score": [1]}),
        "labels 'score': found 1 values for 3 rows; give one",
    ),
    "too many": (
        lambda: marked.html(ROWS, labels={"a": [1, 2, 3], "b": [1] * 4}),
        "labels 'b': found 4 values for 3",
    ),
    "of none": (lambda: TokenRows([], labels={"score": [1]}), "labels 'score': found 1 values for 0 rows; give one"),
    "no width": (lambda: marked.text(ROWS, width=0), "width is 0; expected a number of columns, such as 120"),
}


@pytest.mark.parametrize(("work", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(work, message):
    with pytest.raises(InputError, match=re.escape(message)):
        work()


def test_the_texts_of_these_tests_have_what_they_test():
    """Marks, joiners, flags and wide letters are in the store's texts."""
    letters = {unicodedata.east_asian_width(letter) for text in TEXTS for letter in text}
    assert {"W", "Na", "N"} <= letters
    assert any("\u200d" in text and "\u0301" in text and "\U0001f1e9" in text for text in TEXTS)
