"""The report: complete, honest about what is missing, and safe against what was crawled."""

import bz2
import gzip
import html
import json
import lzma
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.report.charts import binned, histogram_svg
from pipeline.report.duplicates import (
    Copy,
    Duplicates,
    GroupLoss,
    compare,
    differing,
    similarities,
)
from pipeline.report.page import bound, clean, percent
from pipeline.report.report import write_report
from pipeline.report.run_data import gather
from pipeline.report.sample import MAX_PARTS, spread
from pipeline.run.status import run_status
from stages.storage.ledger import Commit
from tests.support.inline import make_config, run_inline
from tests.support.paths import ROOT

CHROMIUM = shutil.which("chromium", path="/usr/bin")
SECTIONS = (
    "funnel",
    "scores",
    "sources",
    "origin",
    "duplicates",
    "pii",
    "corpus",
    "time",
    "failures",
    "rejected",
    "run",
)

ATTACK = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"
RTL = "שלום עולם, زيارة الموقع \u202eoverride"
STORY = (
    "harbour morning ferry letters winter teacher garden bridge copper violin market orchard river stone lantern "
    "weather captain village kitchen meadow thunder pencil island mirror travel honest quiet seventh golden basket"
)
GOPHER = 'extract.filters=["gopher_quality"]'
JSONL = (
    "input.format=jsonl",
    "input.url_column=url",
    "refine.filters=[]",
    "language.allowed=[]",
    "language.score=off",
)


def prose(seed: int, sentences: int = 40) -> str:
    """English enough for the filters: the same words in another order for every seed."""
    draw, words = np.random.default_rng(seed), STORY.split()
    lines = []
    for _ in range(sentences):
        picked = " ".join(words[i] for i in draw.integers(0, len(words), 9))
        lines.append(f"The {picked} is of the kind that we have seen with him and her.")
    return "\n".join(lines)


def write_jsonl(path: Path, documents: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"url": u, "text": t}) + "\n" for u, t in documents))
    return path


def hostile_documents() -> list[tuple[str, str]]:
    base = prose(1)
    rejected = [
        (f"https://gone.example/{i}?q={ATTACK}&amp='\"", f'{ATTACK} {RTL} "quoted" & short {i}')
        for i in range(6)
    ]
    copies = [
        (f"https://{ATTACK}.example/{i}", base + f"\nThe {word} {ATTACK} ends it.")
        for i, word in enumerate("abc")
    ]
    kept = [(f"https://kept.example/{i}", prose(i + 10)) for i in range(5)]
    mail = [
        (
            "https://kept.example/mail",
            prose(50) + f"\nWrite to {ATTACK} at anna.smith@example.org & wait for the answer.",
        )
    ]
    return rejected + copies + kept + mail


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory) -> Path:
    """A finished run over documents whose texts and URLs try to get out of the page."""
    folder = tmp_path_factory.mktemp("hostile")
    source = write_jsonl(folder / "in.jsonl", hostile_documents())
    config = make_config(folder, [source], *JSONL, "extract.keep_rejected_text=1.0", GOPHER)
    outcome = run_inline(config)
    assert not outcome.failed and outcome.published is not None
    return folder / "run"


@pytest.fixture(scope="module")
def hostile_page(hostile_run) -> str:
    return Path(write_report(str(hostile_run))).read_text()


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page)


# --- safety ---------------------------------------------------------------------------------------


def test_crawled_markup_is_shown_and_never_live(hostile_page):
    assert "<script" not in hostile_page.lower()
    assert ESCAPED in hostile_page
    assert "&#34;quoted&#34; &amp; short" in hostile_page
    assert "שלום עולם" in hostile_page
    assert "\u202e" not in hostile_page, "a bidirectional override would turn the page around"


def test_page_is_self_contained(hostile_page):
    assert not re.search(r'(src|href)="(?!#|data:,")', hostile_page)
    assert "@import" not in hostile_page and "url(" not in hostile_page


def test_every_crawled_place_is_reached_by_the_attack(hostile_run):
    data = gather(str(hostile_run))
    assert any("<script>" in g.name for g in data.groups["host"].groups)
    assert any(ATTACK in e.text for e in data.examples["gopher_quality.word_count"])
    members = data.duplicates.clusters[0].members
    assert any(ATTACK in m.url and ATTACK in "".join(p.text for p in m.pieces) for m in members)
    assert ATTACK in "".join(p.text for p in next(e for e in data.entities if e.values).contexts[0])


def test_control_characters_go_and_lines_stay():
    assert clean("a\0b\x1bc\u2066d\ne\tf\x85") == "abcd\ne\tf"


# --- truth ----------------------------------------------------------------------------------------


def test_page_has_all_sections_and_the_run_s_numbers(hostile_page, hostile_run):
    assert tuple(sections(hostile_page)) == SECTIONS
    data = gather(str(hostile_run))
    assert data.generation == "gen-0001" and "gen-0001" in hostile_page
    assert data.totals["records"] == 15 and data.totals["documents"] == 7
    assert f"{data.totals['tokens']:,}" in hostile_page
    extract, dedup, refine = data.funnel
    assert [(x.rule, x.taken, x.left) for x in extract.losses] == [
        ("gopher_quality.word_count", 6, 9)
    ]
    assert (dedup.start, dedup.end, refine.end) == (9, 7, 7)


def test_a_host_that_lost_everything_is_pointed_out(hostile_run, hostile_page):
    gone = next(
        g for g in gather(str(hostile_run)).groups["host"].groups if g.name == "gone.example"
    )
    assert gone.lost and (gone.kept, gone.dropped, gone.main_rule) == (
        0,
        6,
        "gopher_quality.word_count",
    )
    assert (
        "1 host lost over 90% of 5 or more pages: gone.example (gopher_quality.word_count)."
        in hostile_page
    )


def test_scores_carry_their_bound_and_the_share_outside(hostile_run):
    score = next(
        s for s in gather(str(hostile_run)).scores if s.name == "gopher_quality.word_count"
    )
    assert (score.stage, score.bound, score.first_dropped) == ("extract", (50, 100_000), 6)
    assert math.isclose(score.outside, 6 / 15)
    assert {n: sum(c) for n, c in score.histogram.series.items()} == {
        "kept": 9,
        "other rule": 0,
        "this rule": 6,
    }


def test_personal_data_is_shown_from_scrubbed_text_only(hostile_run, hostile_page):
    mail = next(e for e in gather(str(hostile_run)).entities if e.name == "EMAIL_ADDRESS")
    assert (mail.values, mail.documents) == (1, 1)
    assert mail.contexts[0][1] == ("<EMAIL_ADDRESS>", True)
    assert "anna.smith" not in hostile_page


def test_same_ledger_same_page(hostile_run, hostile_page):
    assert Path(write_report(str(hostile_run))).read_text() == hostile_page


# --- duplicates -----------------------------------------------------------------------------------


def duplicates_of(run: str) -> tuple[Duplicates, str]:
    """What the report of a run finds of duplicates, and the page's section on them as text."""
    page = Path(write_report(run)).read_text()
    section = page[page.index('<section id="duplicates">') :]
    return gather(run).duplicates, text_of(section[: section.index("</section>")])


def text_of(markup: str) -> str:
    """What a reader sees: no tags, white space collapsed."""
    return " ".join(html.unescape(re.sub(r"<(?:[^>\"]|\"[^\"]*\")*>", " ", markup)).split())


def copies_of(base: str, host: str, endings: str) -> list[tuple[str, str]]:
    return [(f"https://{host}/{c}", base + f"\nThe {c} {ATTACK} ends it.") for c in endings]


@pytest.fixture(scope="module")
def first_batch(tmp_path_factory) -> Path:
    """A run whose index later ones deduplicate against: two documents, of which a second batch has
    copies.
    """
    folder = tmp_path_factory.mktemp("first")
    docs = [
        ("https://old.example/1", prose(1) + "\nThe first batch ends it."),
        ("https://old.example/2", prose(2)),
    ]
    config = make_config(
        folder, [write_jsonl(folder / "in.jsonl", docs)], *JSONL, GOPHER, "dedup.write_index=kept"
    )
    assert not run_inline(config).failed
    return folder / "run"


def second_batch(folder: Path, first: Path, *overrides: str):
    """Near copies of a document of the first batch, an exact one of the other; a pair and a triple
    of its own.
    """
    docs = [*copies_of(prose(1), f"{ATTACK}.example", "abc"), ("https://new.example/2", prose(2))]
    docs += [
        ("https://new.example/3", prose(3)),
        ("https://other.example/3", prose(3).replace(".", "!")),
    ]
    docs += [*copies_of(prose(4), "near.example", "abc")]
    config = make_config(
        folder,
        [write_jsonl(folder / "in.jsonl", docs)],
        *JSONL,
        GOPHER,
        f'dedup.against=["{first}"]',
        *overrides,
    )
    assert not run_inline(config, until="dedup").failed
    return config


def test_clusters_show_the_kept_copy_first(hostile_run):
    cluster = gather(str(hostile_run)).duplicates.clusters[0]
    assert cluster.size == 3
    assert [m.rule for m in cluster.members] == [None, "dedup.near", "dedup.near"]
    assert all(0.8 < m.similarity < 1 for m in cluster.members[1:])
    assert next(p.text for p in cluster.members[1].pieces if p.marked) in "abc"


def test_rules_of_dedup_lead_from_the_funnel_to_their_section(hostile_page):
    assert re.findall(r'href="#duplicates">([\w.]+)</a>', hostile_page) == [
        "Duplicates",
        "dedup.near",
    ]


def test_without_a_measurement_the_page_says_how_to_get_one(hostile_run):
    _, section = duplicates_of(str(hostile_run))
    assert "2 of 9 documents dropped as copies." in section
    assert "Nothing was measured. Set dedup.verify_share to compare" in section
    assert (
        "No host, language or input file of at least 20 documents lost over 90 % of them."
        in section
    )
    assert "Giant buckets" not in section and "earlier" not in section


def test_copies_are_told_apart_by_rule_and_the_kept_one_of_an_earlier_batch_is_shown(
    tmp_path, first_batch
):
    duplicates, section = duplicates_of(
        second_batch(tmp_path, first_batch, "dedup.verify_share=1.0").run.directory
    )
    assert duplicates.rules == {"dedup.exact": 1, "dedup.near": 2, "dedup.earlier": 4}
    assert {n: c["clusters"] for n, c in duplicates.sizes.items()} == {"1": 1, "2": 1, "3–4": 2}
    assert [c.size for c in duplicates.clusters] == [3, 3, 2, 1]
    kept, *copies = duplicates.clusters[0].members
    assert (kept.url, kept.kept_in) == ("https://old.example/1", str(first_batch))
    assert [(m.url, m.rule, m.kept_in) for m in copies] == [
        (f"https://{ATTACK}.example/{c}", "dedup.earlier", None) for c in "ab"
    ]
    assert [p.text for p in copies[0].pieces if p.marked] == ["a", ATTACK]
    assert "7 of 9 documents dropped as copies, of this batch or of 1 earlier one." in section
    assert (
        f"3 copies of an earlier batch's document · https://old.example/1 kept, in an earlier batch {first_batch}"
        in section
    )
    assert "dedup.exact has the same words as the copy that stays 1 11.1 %" in section
    assert "4 clusters · 1: a single copy of a document of an earlier batch" in section


def test_a_kept_copy_that_is_no_longer_there_is_named_and_nothing_is_marked(tmp_path, first_batch):
    first = tmp_path / "first"
    shutil.copytree(first_batch, first)
    config = second_batch(tmp_path, first)
    shutil.rmtree(first)
    duplicates, section = duplicates_of(config.run.directory)
    kept, *copies = duplicates.clusters[0].members
    assert (kept.url, kept.kept_in, kept.pieces) == ("document 0", str(first), None)
    assert all(
        m.similarity is None and len(m.pieces) == 1 and not m.pieces[0].marked for m in copies
    )
    assert "Its text is not available." in section


def test_documents_without_a_url_are_named_by_their_id(tmp_path):
    lines = [{"id": f"row-{i}", "text": prose(1) + f"\nThe {i} ends it."} for i in range(3)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = (
        "input.format=jsonl",
        "input.url_column=",
        "input.id_column=id",
        "language.allowed=[]",
        "language.score=off",
    )
    config = make_config(
        tmp_path, [source], *columns, GOPHER, "dedup.alarm_documents=2", "dedup.alarm_share=0.5"
    )
    run_inline(config, until="dedup")
    duplicates, _ = duplicates_of(config.run.directory)
    assert {m.url for m in duplicates.clusters[0].members} == {"row-0", "row-1", "row-2"}
    assert GroupLoss("input", str(source), 3, 2) in duplicates.alarm.first


def test_where_no_kept_copy_is_of_this_batch_nothing_can_be_measured(tmp_path, first_batch):
    source = write_jsonl(tmp_path / "in.jsonl", copies_of(prose(1), "a.example", "ab"))
    against = f'dedup.against=["{first_batch}"]'
    config = make_config(tmp_path, [source], *JSONL, GOPHER, against, "dedup.verify_share=1.0")
    run_inline(config, until="dedup")
    duplicates, section = duplicates_of(config.run.directory)
    assert (duplicates.rules["dedup.earlier"], duplicates.measured, duplicates.similarity) == (
        2,
        0,
        None,
    )
    assert "Nothing was measured. None of the drawn documents could be compared" in section


def test_measured_similarities(tmp_path, first_batch):
    config = second_batch(tmp_path, first_batch, "dedup.verify_share=1.0")
    duplicates, section = duplicates_of(config.run.directory)
    assert duplicates.rules == {"dedup.exact": 1, "dedup.near": 2, "dedup.earlier": 4}
    assert duplicates.measured == 3, "copies of earlier batches are not measured"
    assert {n: sum(c) for n, c in duplicates.similarity.series.items()} == {"dropped": 3}
    assert "3 measured · median" in section
    near = next(c for c in duplicates.clusters if "near.example" in c.members[0].url)
    assert [m.rule for m in near.members] == [None, "dedup.near", "dedup.near"]
    assert near.members[0].similarity is None and all(
        0.9 < m.similarity < 0.995 for m in near.members[1:]
    )


def test_who_lost_most_is_in_a_table_and_in_a_notice(tmp_path, first_batch):
    config = second_batch(tmp_path, first_batch, "dedup.alarm_documents=3", "dedup.alarm_share=0.6")
    duplicates, section = duplicates_of(config.run.directory)
    source = str(tmp_path / "in.jsonl")
    attacked, near = "<script>alert(1)<", "near.example"
    both = {GroupLoss("input", source, 9, 7), GroupLoss("language", "en", 9, 7)}
    assert set(duplicates.alarm.first[:2]) == both, "as many documents each: in either order"
    assert duplicates.alarm.first[2:] == [
        GroupLoss("host", attacked, 3, 3),
        GroupLoss("host", near, 3, 2),
    ]
    assert duplicates.alarm.total == 4 and duplicates.alarm.kinds == {
        "host": 2,
        "language": 1,
        "input": 1,
    }
    assert f"host {near} 3 2 66.7 %" in section and f"input file {source} 9 7 77.8 %" in section
    assert "that lost over 60 % of at least 3 documents" in section
    page = text_of(Path(config.run.directory, "report.html").read_text())
    lost = ", ".join(
        [*(f"{w.name} (7 of 9)" for w in duplicates.alarm.first[:2]), f"{attacked} (3 of 3)"]
    )
    assert (
        f"dedup dropped over 60% of 2 hosts, 1 input file, 1 language: {lost} and 1 more; see Duplicates."
        in page
    )


def test_giant_buckets_are_named_by_their_first_document(tmp_path, first_batch, monkeypatch):
    monkeypatch.setattr("stages.dedup.match.GIANT", 2)
    duplicates, section = duplicates_of(second_batch(tmp_path, first_batch).run.directory)
    assert [(g.url, g.documents) for g in duplicates.giants] == [
        (f"https://{ATTACK}.example/a", 4),  # the fourth is the earlier batch's
        ("https://near.example/a", 3),
    ]
    assert all(1 <= g.buckets <= 14 for g in duplicates.giants)
    assert (
        f"https://near.example/a 3 {duplicates.giants[1].buckets}"
        in section.partition("Giant buckets")[2]
    )


def test_deduplication_that_is_off_is_said_to_be(tmp_path, first_batch):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    config = make_config(tmp_path, [source], *JSONL, GOPHER, "dedup.enabled=false")
    run_inline(config, until="dedup")
    assert duplicates_of(config.run.directory)[1] == "Duplicates Deduplication is off."


def test_a_run_without_copies_says_so(tmp_path):
    source = write_jsonl(
        tmp_path / "in.jsonl", [(f"https://a.example/{i}", prose(i)) for i in range(3)]
    )
    config = make_config(tmp_path, [source], *JSONL, GOPHER)
    run_inline(config, until="dedup")
    duplicates, section = duplicates_of(config.run.directory)
    assert (duplicates.documents, duplicates.dropped, duplicates.sizes, duplicates.clusters) == (
        3,
        0,
        {},
        [],
    )
    assert (
        "0 of 3 documents dropped" in section
        and "No two documents are copies of one another." in section
    )


# --- runs that are not whole ----------------------------------------------------------------------


def test_empty_run(tmp_path):
    config = make_config(tmp_path, [write_jsonl(tmp_path / "in.jsonl", [])], *JSONL)
    outcome = run_inline(config)
    assert outcome.published is None and not outcome.failed
    page = Path(write_report(config.run.directory)).read_text()
    assert tuple(sections(page)) == SECTIONS
    assert "No document was kept." in page and "No generation published yet" in page


@pytest.mark.parametrize(
    "until, missing",
    [
        ("extract", "dedup, refine, pack"),
        ("dedup", "refine, pack"),
        ("refine", "pack"),
    ],
)
def test_a_partial_run_says_what_has_not_run(tmp_path, until, missing):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    config = make_config(tmp_path, [source], *JSONL, GOPHER, "refine.scrub_pii=false")
    run_inline(config, until=until)
    page = Path(write_report(config.run.directory)).read_text()
    assert tuple(sections(page)) == SECTIONS
    assert f"Not run yet under these keys: {missing}." in page


def test_dedup_that_was_interrupted_between_its_phases_has_not_run(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    config = make_config(tmp_path, [source], *JSONL, GOPHER)
    run_inline(config, until="dedup")
    for phase in ("keep", "alarm", "index"):
        for folder in Path(config.run.directory).glob(f"dedup/*/{phase}"):
            shutil.rmtree(folder)
    page = text_of(Path(write_report(config.run.directory)).read_text())
    assert "Not run yet under these keys: dedup, refine, pack." in page
    assert "Duplicates Has not run yet under the current keys." in page
    assert "dedup star" not in page and "dedup keep 0 of 0 0 not run yet" in page


def test_a_run_that_did_nothing_yet(tmp_path):
    from pipeline.run.execute import Run
    from pipeline.run.state import write_state

    config = make_config(tmp_path, [write_jsonl(tmp_path / "in.jsonl", [])], *JSONL)
    write_state(config.run.directory, Run(config).state().at_work(stage="extract"))
    assert (
        "Not run yet under these keys: extract, dedup, refine, pack."
        in Path(write_report(config.run.directory)).read_text()
    )


def test_failed_units_are_listed(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", hostile_documents()), tmp_path / "b.jsonl"
    bad.write_bytes(b"\x1f\x8b\x08no gzip")
    config = make_config(
        tmp_path, [good, bad], *JSONL, "extract.filters=[]", "run.max_failed_share=1.0"
    )
    outcome = run_inline(config, until="extract")
    (failure,) = outcome.failed["extract"]
    page = Path(write_report(config.run.directory)).read_text()
    assert (
        "1 unit failed; see Failures." in page and html.escape(failure.partition(": ")[2]) in page
    )


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_an_input_that_is_cut_short_keeps_the_rows_before_the_cut(tmp_path, pack):
    source = write_jsonl(tmp_path / "a.jsonl", hostile_documents())
    lines = source.read_bytes()
    source.write_bytes(pack(lines * 50)[:-20])
    config = make_config(tmp_path, [source], *JSONL)
    assert not run_inline(config, until="extract").failed
    extract = run_status(config.run.directory).phases["extract"]
    assert extract.lost_members == 1 and len(lines.splitlines()) < extract.rows_in
    assert f"{source}: " in extract.damage["000000"]
    page = Path(write_report(config.run.directory)).read_text()
    assert "of input could not be read, at 1 damaged place" in page and "input.damaged" in page


def test_a_file_that_is_no_warc_is_named_and_a_damaged_one_is_not_held_against_the_run(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", hostile_documents())
    files = {
        "b.jsonl.gz": (gzip.compress(texts.read_bytes()), "gzip data"),
        "c.warc.xz": (lzma.compress(b"WARC/1.0\r\n"), "xz data"),
        "d.warc": (bz2.compress(b"WARC/1.0\r\n"), "bzip2 data"),
        "e.warc": (b"PK\x03\x04" + bytes(99), "a zip archive"),
        "f.warc": (b"WARC/1.0\r\nWARC-Type", None),  # damaged
        "g.warc": (b"", None),
        "h.arc": (b"filedesc://a.arc", None),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [texts, *(tmp_path / name for name in files)]
    config = make_config(tmp_path, paths, "run.max_failed_share=1.0")
    failed = run_inline(config, until="extract").failed["extract"]
    assert len(failed) == 5 and all("input.format is warc" in message for message in failed)
    for message, (name, (_, kind)) in zip(failed[1:], files.items(), strict=False):
        assert f"{name}: no WARC record in" in message and f"it holds {kind}" in message


def test_texts_that_were_not_kept_are_said_to_be_missing(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    config = make_config(tmp_path, [source], *JSONL, "extract.keep_rejected_text=0.0", GOPHER)
    run_inline(config, until="extract")
    examples = gather(config.run.directory).examples["gopher_quality.word_count"]
    assert len(examples) == 3 and all(e.text is None and e.value < 50 for e in examples)
    page = Path(write_report(config.run.directory)).read_text()
    assert "no text was kept" in page and "Its text was not kept." in page


def test_not_a_run_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        write_report(str(tmp_path))


def test_warc_run_shows_charsets_dates_and_opt_outs(tmp_path):
    def page(url: str, head: str, headers: str = "") -> bytes:
        body = f"<html><head>{head}<title>{ATTACK}</title></head><body><article><p>".encode()
        body += prose(3, 20).replace("\n", "</p><p>").encode() + b"</p></article></body></html>"
        http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body
        record = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-03-01T00:00:00Z\r\n"
            f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{abs(hash(url)) % 10**12:012d}>\r\n"
            f"Content-Type: application/http;msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        )
        return gzip.compress(record.encode() + http + b"\r\n\r\n")

    warc = tmp_path / "a.warc.gz"
    warc.write_bytes(
        page(
            "https://a.example/1",
            '<meta charset="utf-8"><link rel=license href="/<script>alert(1)</script>">',
        )
        + page(f"https://b.example/{ATTACK}", "", "X-Robots-Tag: noai\r\n")
    )
    config = make_config(
        tmp_path, [warc], "extract.filters=[]", "language.allowed=[]", "language.score=off"
    )
    assert not run_inline(config, until="extract").failed
    groups = gather(config.run.directory).groups
    assert [(g.name, g.total) for g in groups["crawl_month"].groups] == [("2024-03", 2)]
    assert [(g.name, g.total) for g in groups["opt_out"].groups] == [("x-robots-tag: noai", 1)]
    assert ("meta", 1) in [(g.name, g.total) for g in groups["charset_source"].groups]
    assert "<script" not in Path(write_report(config.run.directory)).read_text()
    [license] = gather(config.run.directory).licenses
    assert license.name == "https://a.example/<script>alert(1)</script>"
    assert license.documents == 1 and license.characters > 100


def rewrite_documents(run: str, change) -> None:
    """Put what `change` makes of each documents part in its place."""
    for path in Path(run).glob("extract/*/documents/*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)


def test_confidence_of_an_engine_that_has_one_is_a_histogram(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    run = make_config(tmp_path, [source], *JSONL).run.directory
    run_inline(make_config(tmp_path, [source], *JSONL), until="extract")
    assert "extract.confidence" not in [score.name for score in gather(run).scores]

    def with_confidence(table):
        place = table.schema.get_field_index("extract_confidence")
        values = pa.array([0.1 + 0.9 * (i % 2) for i in range(table.num_rows)])
        return table.set_column(place, "extract_confidence", values)

    rewrite_documents(run, with_confidence)
    [score] = [score for score in gather(run).scores if score.name == "extract.confidence"]
    assert score.bound == (0.2, 1.0) and score.histogram and 0.4 < score.outside < 0.6


def test_parts_of_earlier_versions_lack_columns(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", hostile_documents())
    config = make_config(tmp_path, [source], *JSONL)
    run_inline(config, until="extract")
    before = gather(config.run.directory)
    rewrite_documents(
        config.run.directory, lambda table: table.drop_columns(["license", "extract_confidence"])
    )
    after = gather(config.run.directory)
    assert after.licenses == [] and after.groups == before.groups


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, rows, expected",
    [(0, 0, 0), (1, 10**9, 1), (63, 1, 63), (1000, 10, 64), (1000, 50_000, 20)],
)
def test_sample_is_spread_and_bounded(parts, rows, expected):
    chosen = spread(
        [Commit(f"{i:06d}", "", rows_in=rows) for i in range(parts)], rows=lambda c: c.rows_in
    )
    assert len(chosen) == expected <= MAX_PARTS
    names = [int(c.unit) for c in chosen]
    assert names == sorted(set(names))
    assert len(names) < 2 or max(np.diff(names)) - min(np.diff(names)) <= 1


@pytest.mark.parametrize(
    "values, limits",
    [
        ([], None),
        ([math.nan, math.inf], (0, 1)),
        ([0.0] * 5, (0, 0.3)),
        ([0, 1, 2, 3], (0, 0)),
        ([1, 10, 1e6], (50, 100_000)),
        ([-5.0, 5.0], (-math.inf, math.inf)),
        ([0.1, 0.2, math.nan], (0.65, 1)),
        ([1e308, -1e308], None),
    ],
)
def test_histogram_loses_no_finite_value(values, limits):
    histogram = binned({"kept": np.array(values, float), "this rule": np.array([])}, limits)
    finite = sum(map(math.isfinite, values))
    assert (histogram is None) == (finite == 0)
    if histogram is not None:
        assert sum(histogram.series["kept"]) == finite
        svg = histogram_svg(histogram, ATTACK)
        assert "nan" not in svg and "<script" not in svg
        assert all(0 <= float(x) <= 340 for x in re.findall(r'<rect[^>]* x="([-\d.]+)"', svg))


def test_copies_are_shown_around_the_first_difference():
    common = "word " * 200
    before, after = (Copy(u, common + end) for u, end in (("a", "left end"), ("b", "right end")))
    # has no difference: it must not take the others' excerpts to the beginning
    same = before._replace(rule="dedup.exact")
    _, equal, member = compare([before, same, after], ngram=5)
    assert equal.similarity == 1 and not any(p.marked for p in equal.pieces)
    text = "".join(p.text for p in member.pieces)
    assert text.startswith("… ") and text.endswith("right end") and len(text) < 300
    assert [p.text for p in member.pieces if p.marked] == ["right"]
    assert differing("", "") == [("", False)]


@pytest.mark.parametrize("values", [[1.0], [0.2, 1.0], [0.5, 0.5], [0.0], []])
def test_a_histogram_of_similarities_ends_at_one(values):
    histogram = similarities(np.array(values, float))
    assert (histogram is None) == (not values)
    if histogram is not None:
        assert histogram.edges[0] >= 0 and histogram.edges[-1] == 1.0
        assert sum(histogram.series["dropped"]) == len(values)


@pytest.mark.parametrize(
    "share, text",
    [(0, "0.0 %"), (1e-9, "<0.1 %"), (0.99999, ">99.9 %"), (1, "100.0 %"), (0.123, "12.3 %")],
)
def test_percent_never_rounds_something_to_nothing(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    "limits, text",
    [
        (None, "off"),
        ((50, 100_000), "50 to 100,000"),
        ((5, math.inf), "at least 5"),
        ((-math.inf, 0.3), "at most 0.3"),
        ((0, 0), "exactly 0"),
        ((-math.inf, math.inf), "any value"),
    ],
)
def test_bound_reads_aloud(limits, text):
    assert bound(limits) == text


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no /usr/bin/chromium: apt-get install chromium")
def test_browser_renders_all_sections_without_errors(hostile_run, tmp_path):
    page = write_report(str(hostile_run))
    picture = ROOT / "artifacts" / "report.png"
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    _chromium(
        tmp_path / "a", "--window-size=1200,6000", f"--screenshot={picture}", f"file://{page}"
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    shown = _chromium(tmp_path / "b", "--enable-logging=stderr", "--dump-dom", f"file://{page}")
    assert tuple(sections(shown.stdout)) == SECTIONS
    assert "<script" not in shown.stdout.lower()
    assert "CONSOLE" not in shown.stderr, shown.stderr


def _chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        *quiet,
        f"--user-data-dir={profile}",
    ]
    return subprocess.run(
        [CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
