"""Line dedup against a dictionary, and its texts against what they were."""

import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from filters.text.words import normalize
from stages.dedup import lines, shuffle
from stages.dedup.config import DedupConfig
from stages.dedup.lines import (
    CUTS,
    LINES,
    LinesTask,
    cut_text,
    cuts_unit,
    line_hashes,
    lines_unit,
    repeats_layout,
    repeats_unit,
)
from stages.dedup.shuffle import PartitionTask, Source
from stages.storage.ledger import Store, Unit
from stages.storage.parts import PartRef
from tests.support.examples import at_most

UNITS = st.sampled_from(["line", "paragraph"])
# equal when normalised, empty when normalised, sensitive to what stands beside them, and the word
# that is put between lines
PIECES = [
    "Home",
    "home!",
    "HOME ",
    "About 12",
    "about 99",
    "x",
    "",
    " ",
    "***",
    "\r",
    "\u0301",
    "ΑΣ",
    "Σ",
    "İ",
    "e\u0301",
    "é",
]
PIECES += [
    lines._BETWEEN,
    f"a {lines._BETWEEN.upper()} b",
    "\x00",
    "\u05b0",
    "ǅ",
    "가",
    "\U0001d15e",
    "\u2028",
]
texts = st.lists(
    st.sampled_from([*PIECES, "\n", "\n\n", " \n"]) | st.text(max_size=3), max_size=12
).map("".join)
line_texts = st.lists(st.sampled_from(PIECES), max_size=8).map("\n".join)


class Doc(NamedTuple):
    """`keep` None: rejected before dedup, so that the keep table does not know it."""

    text: str | None
    keep: bool | None


_IN_CONTEXT = {"Lu", "Lt", "Lm", "Mn", "Mc", "Me", "Cf", "Sk", "Zs"}
docs = st.builds(Doc, line_texts | texts, st.sampled_from([True, True, True, False, None]))
batches = st.lists(st.lists(docs, max_size=4), min_size=1, max_size=6)


def slow_pieces(text, unit):
    """[(separator before, text)] of the lines or paragraphs."""
    in_lines = text.split("\n")
    if unit == "line":
        return [("\n" if n else "", line) for n, line in enumerate(in_lines)]
    found, separator, held = [], "", [in_lines[0]]
    n = 1
    while n < len(in_lines):
        blank = n
        while blank < len(in_lines) - 1 and in_lines[blank].strip() == "":
            blank += 1  # the last line has no end: it separates nothing
        if blank > n:
            found.append((separator, "\n".join(held)))
            separator, held = (
                "\n" + "".join(line + "\n" for line in in_lines[n:blank]),
                [in_lines[blank]],
            )
        else:
            held.append(in_lines[n])
        n = blank + 1
    return [*found, (separator, "\n".join(held))]


def slow_cut(text, cut, unit):
    kept = [piece for n, piece in enumerate(slow_pieces(text, unit)) if n not in cut]
    return "".join(separator * (n > 0) + piece for n, (separator, piece) in enumerate(kept))


def slow_cuts(parts, unit):
    """{doc_id: (cut, chars_cut)} by a set of everything seen."""
    seen, found = set(), {}
    for number, part in enumerate(parts):
        for n, (text, keep) in enumerate(part):
            cut = []
            for place, (_, piece) in enumerate(slow_pieces(text, unit) if keep else []):
                line = normalize(piece)
                if line and line in seen:
                    cut.append(place)
                seen.add(line)
            if cut:
                found[number << 32 | n * 3] = (cut, len(text) - len(slow_cut(text, cut, unit)))
    return found


def write_parts(folder: Path, parts):
    """Documents parts and their keep tables."""
    folder.mkdir(exist_ok=True)
    refs, tables = [], []
    for number, part in enumerate(parts):
        rows = [
            {
                "doc_id": number << 32 | n * 3,
                "text": d.text,
                "rejected_by": "rule" if d.keep is None else None,
                "keep": d.keep,
            }
            for n, d in enumerate(part)
        ]
        schema = {
            "doc_id": pa.uint64(),
            "rejected_by": pa.string(),
            "text": pa.large_string(),
            "keep": pa.bool_(),
        }
        table = pa.Table.from_pylist(rows, schema=pa.schema(schema))
        refs.append(PartRef(f"{number:06d}", str(folder / f"{number:06d}.parquet")))
        tables.append(str(folder / f"{number:06d}.keep.parquet"))
        pq.write_table(table.drop_columns(["keep"]), refs[-1].uri, row_group_size=2)
        pq.write_table(
            table.filter(table["keep"].is_valid()).select(["doc_id", "keep"]), tables[-1]
        )
    return refs, tables


def run_lines(folder: Path, parts, config, *, group_size=2, per_lane=1):
    """The three phases over groups of `group_size` parts; the cuts tables' rows, and the commits of
    every phase.
    """
    refs, tables = write_parts(folder, parts)
    found, repeated, cut = (Store(str(folder / name)) for name in ("lines", "repeats", "cuts"))
    starts = range(0, len(refs), group_size)
    tasks = [
        LinesTask(n, tuple(refs[i : i + group_size]), tuple(tables[i : i + group_size]))
        for n, i in enumerate(starts)
    ]
    commits = {
        "lines": [
            lines_unit(Unit(f"{n:05d}", "", task), config, found) for n, task in enumerate(tasks)
        ]
    }
    sources = [Source(found.uri("lines", c.unit)) for c in commits["lines"]]
    planned = shuffle.plan(repeated, sources, LINES, per_lane=per_lane, identity="")
    shuffle.transpose(planned)
    partitions = [PartitionTask(planned.uri, n, len(tasks)) for n in range(planned.partitions)]
    commits["repeats"] = [
        repeats_unit(Unit(f"{n:05d}", "", task), config, repeated)
        for n, task in enumerate(partitions)
    ]
    sources = [Source(repeated.uri("repeats", c.unit)) for c in commits["repeats"]]
    back = shuffle.plan(cut, sources, repeats_layout(len(tasks)), per_lane=1, identity="")
    shuffle.transpose(back)
    commits["cuts"] = [
        cuts_unit(Unit(f"{n:05d}", "", replace(task, repeats=back.uri)), config, cut)
        for n, task in enumerate(tasks)
    ]
    rows = [
        row
        for ref in refs
        for row in pq.read_table(cut.uri("cuts", f"{ref.unit}.parquet"), schema=CUTS).to_pylist()
    ]
    return rows, commits


@at_most(60)
@given(
    batches,
    UNITS,
    st.sampled_from([1, 2, 9]),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([16, 48, 64_000]),
)
def test_what_is_cut_is_what_a_dictionary_has_seen(
    tmp_path_factory, parts, unit, group_size, per_lane, read
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "MIN_READ", read)  # so that equal hashes come in several blocks
        patch.setattr(lines, "_TEXTS_AT_ONCE", 2)
        config = DedupConfig(line_level=unit, partition_bytes=100_000)
        folder = tmp_path_factory.mktemp("lines")
        rows, commits = run_lines(folder, parts, config, group_size=group_size, per_lane=per_lane)
    expected = slow_cuts(parts, unit)
    assert {row["doc_id"]: (row["cut"], row["chars_cut"]) for row in rows} == expected
    assert [row["doc_id"] for row in rows] == sorted(expected)
    totals = {
        name: sum(getattr(c.result, name) for c in commits["cuts"])
        for name in ("lines", "lines_cut", "chars_cut")
    }
    kept = [d.text for part in parts for d in part if d.keep]
    assert totals == {
        "lines": sum(len(slow_pieces(text, unit)) for text in kept),
        "lines_cut": sum(len(cut) for cut, _ in expected.values()),
        "chars_cut": sum(chars for _, chars in expected.values()),
    }
    assert sum(c.rows_in for c in commits["cuts"]) == len(kept)
    assert sum(c.rows_out for c in commits["cuts"]) == len(expected)
    assert sum(c.rows_in for c in commits["lines"]) == totals["lines"]


def test_equal_hashes_are_told_from_empty_ones_over_any_number_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MIN_READ", 16)
    parts = [[Doc("same\n\n--\nown" + "abcdefghijkl"[n], True)] for n in range(12)]
    rows, commits = run_lines(
        tmp_path, parts, DedupConfig(line_level="line", partition_bytes=100_000), group_size=1
    )
    assert [(row["doc_id"] >> 32, row["cut"]) for row in rows] == [(n, [0]) for n in range(1, 12)]
    assert sum(c.rows_out for c in commits["repeats"]) == 11


def test_units_are_deterministic(tmp_path):
    parts = [[Doc(f"Home\nstory {'abc'[n]}\nAbout us\nHome", True)] for n in range(3)]
    _, first = run_lines(tmp_path / "a", parts, DedupConfig(line_level="line"))
    _, again = run_lines(tmp_path / "b", parts, DedupConfig(line_level="line"))
    for phase in ("lines", "repeats", "cuts"):
        assert [c.digest for c in first[phase]] == [c.digest for c in again[phase]]


def test_a_document_without_text_loses_nothing(tmp_path):
    rows, _ = run_lines(
        tmp_path,
        [[Doc(None, True), Doc("a\na", True), Doc("", True)]],
        DedupConfig(line_level="line"),
    )
    assert [(row["doc_id"], row["cut"]) for row in rows] == [(3, [1])]


def test_a_keep_table_of_other_documents_is_refused(tmp_path):
    refs, tables = write_parts(tmp_path, [[Doc("a", True)], [Doc("b", True)]])
    task = LinesTask(0, tuple(refs), tuple(tables[::-1]))
    with pytest.raises(ValueError, match=r"does not list the documents of .*; rerun stage 'dedup'"):
        lines_unit(Unit("00000", "", task), DedupConfig(line_level="line"), Store(str(tmp_path)))


@given(texts | st.text(), UNITS)
def test_hashes_are_those_of_each_line_normalised_alone(text, unit):
    expected = [
        xxhash.xxh3_64_digest(normalize(piece).encode()) for _, piece in slow_pieces(text, unit)
    ]
    assert line_hashes(text, unit) == b"".join(expected)


def test_a_line_is_normalised_alone_whatever_its_neighbours_begin_and_end_with():
    # letters with case or modifiers, marks, format characters: what lower-casing and NFD look at
    # beyond one character
    points = [
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in _IN_CONTEXT
    ]
    pieces = [piece for c in points for piece in (f"{c}aΣ", f"Σ{c}")]
    assert lines._normalized(pieces) == [normalize(piece).encode() for piece in pieces]


@given(texts | st.text(), UNITS)
def test_cutting_nothing_changes_nothing(text, unit):
    assert cut_text(text, [], unit) == text


@given(texts | st.text(), UNITS, st.sets(st.integers(0, 12)))
def test_what_is_not_cut_stays_byte_for_byte(text, unit, cut):
    pieces = slow_pieces(text, unit)
    assert "".join(separator + piece for separator, piece in pieces) == text
    assert cut_text(text, sorted(cut), unit) == slow_cut(text, cut, unit)
    if unit == "line":
        kept = [piece for n, (_, piece) in enumerate(pieces) if n not in cut]
        assert cut_text(text, sorted(cut), unit) == "\n".join(kept)


@pytest.mark.parametrize(
    "text, cut, expected",
    [
        ("a\n\nb\n \n\nc", [1], "a\n \n\nc"),
        ("a\n\nb\n \n\nc", [0], "b\n \n\nc"),
        ("a\nstill a\n\nb", [1], "a\nstill a"),
        ("a\r\n\r\nb", [1], "a\r"),
        ("\n\na", [1], ""),
        ("a\n\n", [0], ""),
        ("a", [0], ""),
    ],
)
def test_a_paragraph_goes_with_the_blank_lines_before_it(text, cut, expected):
    assert cut_text(text, cut, "paragraph") == expected
