"""The card of a store against what was written, with hostile values, and at a size where only few bytes may be read."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from appending import ADDITIONS
from benchmarks.scale import sealed, with_markers
from hypothesis import given
from hypothesis import strategies as st
from parsed import parsed
from stores import LAYOUT, make_contents

import actstore
from actstore import Layout, Site, card
from actstore.commits import Marker
from actstore.errors import CorruptStoreError
from actstore.kvstore import Root
from actstore.markers import checksum, committed_ranges
from actstore.metadata import array_metadata
from actstore.schema import Plan

SITE_LINES = [
    "resid_post [2, 5, 11] x 6 bfloat16",
    "mlp_out [2, 5, 11] x 4 float16",
    "attn_out [5] x 6 float32",
    "final_norm x 3 bfloat16",
]


def opened(url):
    store = actstore.open(url, partial=True)
    return Root.of(url), store.plan


def by_name(shown):
    """A text card as a dictionary of its lines."""
    found, name = {}, ""
    for line in shown.splitlines():
        name = line[:12].strip() or name
        found.setdefault(name, []).append(line[13:])
    return found


def norms_of(contents, samples=slice(None)):
    """Site, layer, median and largest of the rows in memory, by NumPy alone."""
    rows = [["site", "layer", "median", "largest"]]
    for site in contents.layout.sites:
        norms = np.atleast_2d(np.linalg.norm(contents.rows[site.name].astype(np.float64), axis=-1))[:, samples]
        labels = [""] if site.layers is None else map(str, site.layers)
        rows += [[site.name, label, np.median(each), each.max()] for label, each in zip(labels, norms, strict=True)]
    return rows


def assert_norms(lines, expected):
    """Lines of a text card, or rows of a table, against `norms_of`: to the four digits that are shown."""
    head, *rows = lines
    assert head == expected[0]
    assert [row[:-2] for row in rows] == [row[:2] for row in expected[1:]]
    for row, wanted in zip(rows, expected[1:], strict=True):
        assert [float(cell) for cell in row[-2:]] == pytest.approx(wanted[2:], rel=6e-4)


# What it says


def test_facts_are_those_that_were_written(finished, contents):
    assert card.facts(*opened(finished)) == {
        "url": str(finished),
        "status": "complete",
        "committed": "4 of 4 blocks",
        "percent": 100.0,
        "generation": 1,
        "model": "made-up",
        "sites": SITE_LINES,
        "samples": 53,
        "documents": 5,
        "bytes": sum(rows.nbytes for rows in contents.rows.values()),
        "shards": "16 samples, chunks of 4, crc32c",
        "columns": ["document", "position", "token_id", "score", "flag"],
        "format": 1,
        "fingerprint": contents.plan.fingerprint,
    }


def test_the_text_has_a_line_for_each_fact_and_site_and_layer(finished, contents):
    found = by_name(card.text(*opened(finished)))
    assert list(found) == [*card.facts(*opened(finished)), "norms"]
    assert found["sites"] == SITE_LINES
    assert found["fingerprint"] == [contents.plan.fingerprint]
    assert found["columns"] == ["document, position, token_id, score, flag"]
    assert found["bytes"] == ["4.8 kB"]
    said, *lines = found["norms"]
    assert said == "median and largest of all 53 samples"
    columns = [[*line.split()] for line in lines]
    layerless = columns.pop()  # has no layer: a cell less
    expected = norms_of(contents)
    assert_norms(columns, expected[:-1])
    assert layerless[0] == "final_norm"
    assert [float(cell) for cell in layerless[1:]] == pytest.approx(expected[-1][2:], rel=6e-4)
    assert len({len(line) for line in lines}) == 1, "aligned"


def test_the_html_says_what_the_text_says(finished, contents):
    plain, page = by_name(card.text(*opened(finished))), parsed(card.html(*opened(finished)))
    facts = {row[0]: row[1].split("\n") for row in page.rows if row[0] in plain and row[0] != "norms"}
    assert facts == {name: lines for name, lines in plain.items() if name != "norms"}
    assert plain["norms"][0] in page.text
    assert_norms([row for row in page.rows if len(row) == 4], norms_of(contents))


def test_a_store_shows_itself(finished, capsys):
    store = actstore.open(finished)
    store.card()
    assert capsys.readouterr().out == card.text(*opened(finished)) + "\n"
    assert store._repr_html_() == card.html(*opened(finished))
    assert "\n" not in repr(store)


def test_info_is_the_card(finished, capsys, monkeypatch):
    from actstore import cli

    facts = json.dumps(card.facts(*opened(finished)))
    for options, expected in {(): card.text(*opened(finished)), ("--json",): facts}.items():
        monkeypatch.setattr("sys.argv", ["actstore", "info", str(finished), *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert capsys.readouterr().out == expected + "\n"


# How much is there


PARTS = {"nothing": [], "one block": [2], "the last, short": [3], "two": [1, 3], "all, not sealed": [0, 1, 2, 3]}
PERCENT = {0: 0.0, 1: 25.0, 2: 50.0, 4: 99.9}


@pytest.mark.parametrize("blocks", PARTS.values(), ids=PARTS)
def test_an_unfinished_store_says_how_much_is_there(tmp_path, contents, blocks):
    url = contents.write(tmp_path / "x.acts.zarr", blocks=blocks, seal=False)
    facts, found = card.facts(*opened(url)), by_name(card.text(*opened(url)))
    assert (facts["status"], facts["committed"]) == ("unfinished", f"{len(blocks)} of 4 blocks")
    assert facts["percent"] == PERCENT[len(blocks)]
    samples = [sample for block in sorted(blocks) for sample in range(*LAYOUT.block_range(block))]
    if not blocks:
        assert found["norms"] == ["none yet, no block is committed"]
        assert "none yet" in parsed(card.html(*opened(url))).text
        return
    of = "all 53" if len(samples) == 53 else f"{len(samples)} of 53"
    assert found["norms"][0] == f"median and largest of {of} samples"
    assert_norms([row for row in parsed(card.html(*opened(url))).rows if len(row) == 4], norms_of(contents, samples))


def test_percent_is_rounded_down(tmp_path):
    url = with_markers(tmp_path / "x.acts.zarr", 2999)
    assert card.facts(*opened(url))["percent"] == 99.9
    (url / ".act/commits/99999999.json").write_text("{}")  # of no block of this store
    assert card.facts(*opened(url))["committed"] == "2999 of 3000 blocks"


SMALL = {
    "without documents": (LAYOUT, False),
    "without columns": (dataclasses.replace(LAYOUT, columns=()), False),
    "without layers": (dataclasses.replace(LAYOUT, sites=(LAYOUT.sites[3],)), True),
    "bfloat16": (dataclasses.replace(LAYOUT, sites=(Site("resid_post", 6, (2, 5)),)), True),
    "float16": (dataclasses.replace(LAYOUT, sites=(Site("resid_post", 6, (2, 5), "float16"),)), True),
    "float32": (dataclasses.replace(LAYOUT, sites=(Site("resid_post", 6, (2, 5), "float32"),)), True),
    "one sample": (dataclasses.replace(LAYOUT, samples=1), True),
    "blocks that are one chunk": (dataclasses.replace(LAYOUT, block_samples=32, chunk_samples=32), True),
    "zstd": (dataclasses.replace(LAYOUT, codec="zstd"), True),
}


@pytest.mark.parametrize(("layout", "documents"), SMALL.values(), ids=SMALL)
def test_stores_of_all_kinds(tmp_path, layout, documents):
    contents = make_contents(layout, documents=documents)
    url = contents.write(tmp_path / "x.acts.zarr")
    found, page = by_name(card.text(*opened(url))), parsed(card.html(*opened(url)))
    assert found["documents"] == ["5" if documents else "0"]
    assert found["columns"] == [", ".join(column.name for column in layout.columns) or "none"]
    assert [line.split()[-1] for line in found["sites"]] == [site.dtype for site in layout.sites]
    assert found["norms"][0] == f"median and largest of all {layout.samples} samples"
    assert_norms([row for row in page.rows if len(row) == 4], norms_of(contents))


@pytest.mark.parametrize("name", ["samples, inside a chunk", "documents", "layers and sites"])
def test_an_appended_store(tmp_path, name):
    addition = ADDITIONS[name]()
    url = addition.before.write(tmp_path / "x.acts.zarr")
    first = addition.append(url).missing()[0]
    addition.write(url, blocks=[first], seal=False)
    _, plan = opened(url)
    facts = card.facts(*opened(url))
    blocks = len(plan.blocks)
    assert (facts["status"], facts["generation"]) == ("unfinished", 2)
    assert facts["committed"] == f"1 of {blocks} blocks"
    assert facts["percent"] == (99.9 if blocks == 1 else np.floor(1000 / blocks) / 10)
    samples = [each for start, stop in committed_ranges(*opened(url)) for each in range(start, stop)]
    page = parsed(card.html(*opened(url)))
    assert_norms([row for row in page.rows if len(row) == 4], norms_of(addition.whole, samples))
    before = actstore.open(url)  # readers see what was complete
    assert card.facts(Root.of(url), before.plan)["samples"] == addition.before.layout.samples
    assert card.facts(Root.of(url), before.plan)["percent"] == 100.0
    addition.write(url)
    facts = card.facts(*opened(url))
    assert (facts["status"], facts["percent"], facts["generation"]) == ("complete", 100.0, 2)
    assert (facts["samples"], facts["bytes"]) == (53, sum(rows.nbytes for rows in addition.whole.rows.values()))
    assert facts["documents"] == (len(addition.whole.documents.ids) if addition.whole.documents else 0)
    page = parsed(card.html(*opened(url)))
    assert_norms([row for row in page.rows if len(row) == 4], norms_of(addition.whole))


# Damage and hostility


DAMAGES = {
    "missing norms": (lambda url: (url / "mlp_out_norm/c/1/2").unlink(), "mlp_out_norm, layer 5, block 2 of"),
    "swapped norms": (
        lambda url: shutil.copy(url / "mlp_out_norm/c/1/2", url / "mlp_out_norm/c/1/1"),
        "their commit marker has",
    ),
    "missing marker": (lambda url: (url / ".act/commits/00000001.json").unlink(), "cannot be compared with its commit"),
    "a folder": (
        lambda url: ((url / "mlp_out_norm/c/1/2").unlink(), (url / "mlp_out_norm/c/1/2").mkdir()),
        "mlp_out_norm, layer 5, block 2 of",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_norms_that_cannot_be_read_are_said_and_the_rest_is_shown(finished, tmp_path, damage, said):
    url = Path(shutil.copytree(finished, tmp_path / "x.acts.zarr"))
    damage(url)
    (line,) = by_name(card.text(*opened(url)))["norms"]
    assert line.startswith("could not be read: ")
    assert said in line
    page = parsed(card.html(*opened(url)))
    assert line in page.text
    assert SITE_LINES[0] in page.text


def test_a_damaged_root_group_is_an_error(finished, tmp_path):
    url = Path(shutil.copytree(finished, tmp_path / "x.acts.zarr"))
    root, plan = opened(url)
    (url / "zarr.json").write_text("{}")
    for show in (card.text, card.html, card.facts):
        with pytest.raises(CorruptStoreError, match=r"zarr\.json has no valid attribute"):
            show(root, plan)


MODELS = {
    "a name": ({"model": {"name": "Qwen/Qwen2.5-0.5B"}}, "Qwen/Qwen2.5-0.5B"),
    "only a name": ({"model": "gpt2"}, "gpt2"),
    "no model": ({}, "unknown"),
    "no name": ({"model": {"family": "qwen2"}}, "unknown"),
    "an empty name": ({"model": ""}, "unknown"),
    "a number": ({"model": 7}, "unknown"),
    "a list": ({"model": ["a", "b"]}, "unknown"),
    "null": ({"model": None}, "unknown"),
    "a name that is a tree": ({"model": {"name": {"a": [1, 2]}}}, "unknown"),
    "script": ({"model": "</td><script>alert(1)</script>"}, "</td><script>alert(1)</script>"),
    "quotes": ({"model": "\" onmouseover='x' a=\""}, "\" onmouseover='x' a=\""),
    "entities": ({"model": "&lt;b&gt; &#60; &amp"}, "&lt;b&gt; &#60; &amp"),
    "comment": ({"model": "<!-- --><![CDATA[ <?php"}, "<!-- --><![CDATA[ <?php"),
    "escape codes": ({"model": "\x1b[2Jgone\r\x07\x00\x9b31m"}, r"\x1b[2Jgone\r\x07\x00\x9b31m"),
    "lines": ({"model": "a\nstatus       complete\u2028b"}, r"a\nstatus       complete\u2028b"),
    "bidi overrides": ({"model": "a\u202egnp.exe\u2066b"}, r"a\u202egnp.exe\u2066b"),
    "joiners": ({"model": "a\u200db\ufeff"}, r"a\u200db\ufeff"),
    "from the right": ({"model": "نموذج"}, "نموذج"),
    "a megabyte": ({"model": "<" * (1 << 20)}, "<" * 297 + "..."),
    "a megabyte that is not printable": ({"model": "\x01" * (1 << 20)}, r"\x01" * 297 + "..."),
}


@pytest.mark.parametrize(("provenance", "shown"), MODELS.values(), ids=MODELS)
def test_the_model_whatever_the_provenance_holds(tmp_path, provenance, shown):
    contents = dataclasses.replace(make_contents(), provenance=provenance)
    url = contents.write(tmp_path / "x.acts.zarr", blocks=[], seal=False)
    plain = card.text(*opened(url))
    assert by_name(plain)["model"] == [shown]
    assert all(line.isprintable() for line in plain.split("\n"))
    page = parsed(card.html(*opened(url)))
    assert ["model", shown] in page.rows
    assert shown in page.inside["bdi"]


def test_lone_surrogates(finished):
    """JSON may hold them; they are in no encoding that a terminal has."""
    root, plan = opened(finished)
    plan = plan.model_copy(update={"provenance": {"model": "a\ud800b"}})
    for shown in (card.text(root, plan), card.html(root, plan)):
        assert r"a\ud800b" in shown
        shown.encode()


def test_a_hostile_folder_is_escaped(finished, tmp_path):
    url = Path(shutil.copytree(finished, tmp_path / "<img src=x onerror=alert(1)>\x1b[31m.acts.zarr"))
    page = parsed(card.html(*opened(url)))
    assert "<img src=x onerror=alert(1)>\\x1b[31m" in page.text
    assert "\x1b" not in card.text(*opened(url))


def test_the_parser_would_notice():
    for page in ("<script>x</script>", "<b onclick='x'>a</b>", "<b>a", "a</b>", "<!-- a -->", "<a href='x'>a</a>",
                 "<b style='background:url(x)'>a</b>", "<b style='color:black'>a</b>"):  # fmt: skip
        with pytest.raises(AssertionError):
            parsed(page)


def test_many_layers_are_cut_in_the_middle(tmp_path):
    layout = Layout((Site("resid_post", 1, tuple(range(1000)), "float32"),), 16, 16, 16, ())
    url = make_contents(layout, documents=False).write(tmp_path / "x.acts.zarr", blocks=[], seal=False)
    (line,) = by_name(card.text(*opened(url)))["sites"]
    assert line.startswith("resid_post [0, 1, 2, ")
    assert line.endswith(", 998, 999] x 1 float32")
    assert len(line) <= card.MOST_LETTERS
    assert card.facts(*opened(url))["sites"] == [f"resid_post {list(range(1000))} x 1 float32"]


# Which norms


@given(
    starts=st.lists(st.integers(0, 60), min_size=0, max_size=6, unique=True).map(sorted),
    length=st.integers(1, 40), block=st.integers(1, 9), most=st.integers(1, 5),
)  # fmt: skip
def test_blocks_are_spread_over_what_is_there(starts, length, block, most):
    stops = [min(start + length, after) for start, after in zip(starts, [*starts, 10**6][1:], strict=True)]
    ranges = list(zip(starts, stops, strict=True))
    there = [
        {sample for sample in range(start, stop) if sample // block == number}
        for start, stop in ranges
        for number in range(start // block, (stop - 1) // block + 1)
    ]
    found = card._spread(ranges, block, most)
    assert len(found) == min(most, len(there))
    places = [there.index(set(span)) for span in found]  # whole pieces of blocks, each there
    assert places == sorted(set(places))
    gaps = np.diff([-1, *places, len(there)])
    if found:
        assert gaps.max() <= len(there) / len(found) + 1


LARGE = {
    "a large block": Layout((Site("resid_post", 8, (0,)),), 10**9, 1 << 21, 1 << 10, ()),
    "many layers": Layout((Site("resid_post", 8, tuple(range(1000))),), 10**6, 64, 64, ()),
}


@pytest.mark.parametrize("layout", LARGE.values(), ids=LARGE)
def test_norms_are_left_out_where_one_block_has_too_many(tmp_path, layout):
    url = sealed(tmp_path / "x.acts.zarr", layout)
    (line,) = by_name(card.text(*opened(url)))["norms"]
    assert line.startswith("left out, one block has ")
    assert line.endswith("; `Store.stats` reads them")
    assert card.facts(*opened(url))["percent"] == 100.0


BILLION = Layout((Site("resid_post", 8, (6,)),), 10**9, 1 << 18, 1 << 10, ())


@pytest.fixture(scope="module")
def billion(tmp_path_factory):
    """A finished store of 10^9 samples with all its norms and markers, and no activations; every whole block alike."""
    url = sealed(tmp_path_factory.mktemp("billion") / "x.acts.zarr", BILLION)
    root, plan = opened(url)
    norms = np.random.default_rng(0).gamma(3, size=BILLION.block_samples).astype(np.float32)
    name = "resid_post_norm"
    array = root.open_array(name, array_metadata(plan, complete=True)[name])
    array[:, : BILLION.block_samples].write(norms[None]).result()
    (url / ".act/commits").mkdir()
    for block in range(BILLION.blocks):
        start, stop = BILLION.block_range(block)
        if block:
            os.link(url / name / "c/0/0", url / name / f"c/0/{block}")
        write_marker(url, plan, block, checksum(norms[: stop - start]))
    return url, norms


def write_marker(url: Path, plan: Plan, block: int, digest: str) -> None:
    checksums = {"resid_post": ("0" * 32,), "resid_post_norm": (digest,)}
    marker = Marker(
        format=1, block=block, samples=BILLION.block_range(block), fingerprint=plan.fingerprint, checksums=checksums
    )
    (url / f".act/commits/{block:08d}.json").write_bytes(marker.to_json())


def bytes_read(work) -> tuple[int, int]:
    """Bytes and calls by which this process read while it worked, all its threads together."""

    def counted() -> list[int]:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return [int(lines["rchar"]), int(lines["syscr"])]

    if not Path("/proc/self/io").exists():
        pytest.skip("NOT CHECKED: this system does not count what a process reads")
    before = counted()
    work()
    after = counted()
    return after[0] - before[0], after[1] - before[1]


def test_the_card_of_a_billion_samples_reads_few_bytes(billion):
    url, norms = billion
    root, plan = opened(url)
    shown = by_name(card.text(root, plan))
    (row,) = [line.split() for line in shown["norms"][2:]]
    assert shown["norms"][0] == "median and largest of 1,048,576 of 1,000,000,000 samples"
    assert (shown["samples"], shown["percent"]) == (["1,000,000,000"], ["100.0"])
    assert row == ["resid_post", "6", f"{np.median(norms):.4g}", f"{norms.max():.4g}"]
    for show in (card.text, card.html):
        count, calls = bytes_read(lambda show=show: show(root, plan))
        print(f"{count:,} bytes in {calls} reads for {BILLION.samples:,} samples in {BILLION.blocks:,} blocks")
        assert count < card.NORM_BYTES + (1 << 20)
        assert calls < 100
    count, calls = bytes_read(lambda: card.facts(root, plan))
    assert count < 1 << 16
    assert calls < 20


def test_reading_more_would_be_counted(billion, monkeypatch):
    root, plan = opened(billion[0])
    monkeypatch.setattr(card, "NORM_BLOCKS", 32)
    monkeypatch.setattr(card, "NORM_BYTES", 1 << 30)
    count, calls = bytes_read(lambda: card.text(root, plan))
    assert count > 32 << 20
    assert calls > 64
