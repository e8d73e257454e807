"""The report: complete, honest about what is missing, and safe against what was crawled."""

import gzip
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.charts import binned, histogram_svg
from pipeline.findings import clean, compare, covered, differing, gather
from pipeline.report import bound, percent, write_report
from pipeline.sample import MAX_PARTS, spread
from stages.ledger import Commit
from tests.inline import make_config, run_inline

ROOT = Path(__file__).parents[2]
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
JSONL = ("input.format=jsonl", "input.url_column=url", "refine.filters=[]", "language.allowed=[]", "language.score=off")


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
    rejected = [(f"https://gone.example/{i}?q={ATTACK}&amp='\"", f'{ATTACK} {RTL} "quoted" & short {i}') for i in range(6)]
    copies = [(f"https://{ATTACK}.example/{i}", base + f"\nThe {word} {ATTACK} ends it.") for i, word in enumerate("abc")]
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


# --- safety ----------------------------------------------------------------------------------------------------------


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
    assert any(ATTACK in m.url and ATTACK in "".join(p.text for p in m.pieces) for m in data.clusters[0].members)
    assert ATTACK in "".join(p.text for p in next(e for e in data.entities if e.values).contexts[0])


def test_control_characters_go_and_lines_stay():
    assert clean("a\0b\x1bc\u2066d\ne\tf\x85") == "abcd\ne\tf"


# --- truth -----------------------------------------------------------------------------------------------------------


def test_page_has_all_sections_and_the_run_s_numbers(hostile_page, hostile_run):
    assert tuple(sections(hostile_page)) == SECTIONS
    data = gather(str(hostile_run))
    assert data.generation == "gen-0001" and "gen-0001" in hostile_page
    assert data.totals["records"] == 15 and data.totals["documents"] == 7
    assert f"{data.totals['tokens']:,}" in hostile_page
    extract, dedup, refine = data.funnel
    assert [(x.rule, x.taken, x.left) for x in extract.losses] == [("gopher_quality.word_count", 6, 9)]
    assert (dedup.start, dedup.end, refine.end) == (9, 7, 7)


def test_a_host_that_lost_everything_is_pointed_out(hostile_run, hostile_page):
    gone = next(g for g in gather(str(hostile_run)).groups["host"].groups if g.name == "gone.example")
    assert gone.lost and (gone.kept, gone.dropped, gone.main_rule) == (0, 6, "gopher_quality.word_count")
    assert "1 host lost over 90% of 5 or more pages: gone.example (gopher_quality.word_count)." in hostile_page


def test_scores_carry_their_bound_and_the_share_outside(hostile_run):
    score = next(s for s in gather(str(hostile_run)).scores if s.name == "gopher_quality.word_count")
    assert (score.stage, score.bound, score.measured, score.first_dropped) == ("extract", (50, 100_000), 15, 6)
    assert math.isclose(score.outside, 6 / 15)
    assert {n: sum(c) for n, c in score.histogram.series.items()} == {"kept": 9, "other rule": 0, "this rule": 6}


def test_clusters_show_the_kept_copy_first(hostile_run):
    cluster = gather(str(hostile_run)).clusters[0]
    assert cluster.size == 3
    assert [m.kept for m in cluster.members] == [True, False, False]
    assert all(m.similarity > 0.8 for m in cluster.members[1:])
    assert next(p.text for p in cluster.members[1].pieces if p.marked) in "abc"


def test_personal_data_is_shown_from_scrubbed_text_only(hostile_run, hostile_page):
    mail = next(e for e in gather(str(hostile_run)).entities if e.name == "EMAIL_ADDRESS")
    assert (mail.values, mail.documents) == (1, 1)
    assert mail.contexts[0][1] == ("<EMAIL_ADDRESS>", True)
    assert "anna.smith" not in hostile_page


def test_same_ledger_same_page(hostile_run, hostile_page):
    assert Path(write_report(str(hostile_run))).read_text() == hostile_page


# --- runs that are not whole -----------------------------------------------------------------------------------------


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


def test_a_run_that_did_nothing_yet(tmp_path):
    from pipeline.run import Run

    config = make_config(tmp_path, [write_jsonl(tmp_path / "in.jsonl", [])], *JSONL)
    Run(config).remember(stage="extract")
    assert "Not run yet under these keys: extract, dedup, refine, pack." in Path(write_report(config.run.directory)).read_text()


def test_failed_units_are_listed(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", hostile_documents()), tmp_path / "b.jsonl"
    bad.write_bytes(b"\x1f\x8bno gzip")
    config = make_config(tmp_path, [good, bad], *JSONL, "extract.filters=[]", "run.max_failed_share=1.0")
    outcome = run_inline(config, until="extract")
    (failure,) = outcome.failed["extract"]
    page = Path(write_report(config.run.directory)).read_text()
    assert "1 unit failed; see Failures." in page and html.escape(failure.partition(": ")[2]) in page


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
        page("https://a.example/1", '<meta charset="utf-8">') + page(f"https://b.example/{ATTACK}", "", "X-Robots-Tag: noai\r\n")
    )
    config = make_config(tmp_path, [warc], "refine.filters=[]", "refine.scrub_pii=false", "language.score=off")
    assert not run_inline(config, until="extract").failed
    groups = gather(config.run.directory).groups
    assert [(g.name, g.total) for g in groups["crawl_month"].groups] == [("2024-03", 2)]
    assert [(g.name, g.total) for g in groups["opt_out"].groups] == [("x-robots-tag: noai", 1)]
    assert ("meta", 1) in [(g.name, g.total) for g in groups["charset_source"].groups]
    assert "<script" not in Path(write_report(config.run.directory)).read_text()


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, rows, expected", [(0, 0, 0), (1, 10**9, 1), (63, 1, 63), (1000, 10, 64), (1000, 50_000, 20)])
def test_sample_is_spread_and_bounded(parts, rows, expected):
    chosen = spread([Commit(f"{i:06d}", "", rows_in=rows) for i in range(parts)], rows=lambda c: c.rows_in)
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
    before, after = ({"url": u, "text": common + end, "kept": u == "a"} for u, end in (("a", "left end"), ("b", "right end")))
    _, member = compare([before, after], ngram=5)
    text = "".join(p.text for p in member.pieces)
    assert text.startswith("… ") and text.endswith("right end") and len(text) < 300
    assert [p.text for p in member.pieces if p.marked] == ["right"]
    assert differing("", "") == [("", False)]


def test_wall_time_counts_overlaps_once_and_pauses_not():
    assert covered([(0, 10), (5, 12), (100, 101)]) == 13
    assert covered([]) == 0


@pytest.mark.parametrize("share, text", [(0, "0.0 %"), (1e-9, "<0.1 %"), (0.99999, ">99.9 %"), (1, "100.0 %"), (0.123, "12.3 %")])
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


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no /usr/bin/chromium: apt-get install chromium")
def test_browser_renders_all_sections_without_errors(hostile_run, tmp_path):
    page = write_report(str(hostile_run))
    picture = ROOT / "artifacts" / "report.png"
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    _chromium(tmp_path / "a", "--window-size=1200,6000", f"--screenshot={picture}", f"file://{page}")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    shown = _chromium(tmp_path / "b", "--enable-logging=stderr", "--dump-dom", f"file://{page}")
    assert tuple(sections(shown.stdout)) == SECTIONS
    assert "<script" not in shown.stdout.lower()
    assert "CONSOLE" not in shown.stderr, shown.stderr


def _chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, f"--user-data-dir={profile}"]
    return subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True)
