"""Rows of the extract stage: what the rules see of a page, and policy over stored rows."""

import gzip

import pyarrow.parquet as pq
import pytest

from filters import filter_class
from filters.language import Language
from filters.license import License
from filters.opt_out import OptOut
from filters.url_policy import UrlPolicy
from stages.dedup.config import DedupConfig
from stages.extract.config import ExtractConfig
from stages.extract.engines import between
from stages.extract.extract import (
    ExtractPlan,
    ExtractTask,
    _judge,
    _measured_row,
    content_settings,
    extract_unit,
    policy_settings,
)
from stages.extract.extractor import Page
from stages.formats.document import NamedFilter
from stages.read.fetch import FetchOptions
from stages.read.listing import fingerprint
from stages.read.records import InputConfig
from stages.storage.ledger import Store, Unit

PROSE = " ".join(["The quick brown fox jumps over the lazy dog near the quiet river bank."] * 12)
CODE = "```js\nif (javascript) { f(); }\n\n  g();\n```"
BY = "https://creativecommons.org/licenses/by/4.0/"


def make_plan(*, filters=(), license=(), **settings):
    return ExtractPlan(
        ExtractConfig(filters=filters, **settings),
        InputConfig(),
        FetchOptions(),
        UrlPolicy(),
        OptOut(),
        NamedFilter("language", Language()),
        License(allowed=license),
        tuple(NamedFilter(name, filter_class(name)()) for name in filters),
        DedupConfig().signature,
        0,
    )


def measure(page, plan):
    row = {"doc_id": 1, "url": "https://mill.example/", "language_line_share": None}
    return _measured_row(row, page, plan)


def with_code(*parts, sees_code=False):
    """A page of parts in lines of their own; those that begin like CODE are code."""
    text, code = "", []
    for part in parts:
        if part.startswith("```"):
            code.append((len(text), len(text) + len(part)))
        text += part + "\n"
    text = text.rstrip("\n")
    return Page(text=text, code=code, plain=None if sees_code else "".join(between(text, code)))


SENTENCES = "\n".join(f"This is the line number {i} of the page." for i in range(6))


@pytest.mark.parametrize("rules_see_code, reason", [(True, "c4.curly_bracket_count"), (False, None)])  # fmt: skip
def test_rules_may_look_away_from_code(rules_see_code, reason):
    plan = make_plan(filters=("c4",), engine="blocks", rules_see_code=rules_see_code)
    page = with_code(CODE.replace("javascript", "x"), SENTENCES, sees_code=rules_see_code)
    row = measure(page, plan)
    assert row["rejected_by"] == reason


@pytest.mark.parametrize(
    "parts, expected",
    [
        ((SENTENCES, CODE), (SENTENCES, CODE)),
        ((CODE, SENTENCES, CODE), (CODE, SENTENCES, CODE)),
        ((SENTENCES, CODE, CODE, SENTENCES), (SENTENCES, CODE, CODE, SENTENCES)),
        # C4 drops short lines of prose, and none of code
        ((SENTENCES, "Too short", CODE, "Menu", SENTENCES), (SENTENCES, CODE, SENTENCES)),
        (("Menu", CODE, "Menu", SENTENCES), (CODE, SENTENCES)),
    ],
)
def test_the_code_stays_in_the_text(parts, expected):
    plan = make_plan(filters=("c4",), engine="blocks", rules_see_code=False)
    row = measure(with_code(*parts), plan)
    assert row["rejected_by"] is None
    assert row["text"] == "\n".join(expected) and row["num_chars"] == len(row["text"])


def test_without_rules_that_edit_not_a_character_changes():
    plan = make_plan(filters=("fineweb",), engine="blocks", rules_see_code=False)
    page = with_code(PROSE, CODE, "", PROSE.replace("fox", "cat"))
    assert measure(page, plan)["text"] == page.text


def test_of_a_page_of_nothing_but_code_the_rules_see_no_word():
    plan = make_plan(
        filters=("gopher_quality",), engine="blocks", rules_see_code=False, keep_rejected_text=1.0
    )
    row = measure(with_code(CODE.replace("javascript", "the quick brown fox jumps")), plan)
    assert row["language"] != "und" and row["gopher_quality.word_count"] == 0
    assert row["text"].startswith("```js")


@pytest.mark.parametrize(
    "confidence, bound, reason",
    [
        (0.19, (0.2, 1.0), "extract.confidence"),
        (0.2, (0.2, 1.0), None),
        (0.19, None, None),
        (None, (0.2, 1.0), None),  # the engine does not say
    ],
)
def test_pages_of_low_confidence_are_dropped(confidence, bound, reason):
    plan = make_plan(engine="blocks", confidence=bound or "off")
    row = measure(Page(text=PROSE, extract_confidence=confidence), plan)
    assert row["rejected_by"] == reason
    assert row["rejected_value"] == (confidence if reason else None)


@pytest.mark.parametrize("license, reason", [("cc-by-4.0", None), ("gfdl", "license.allowed"), (None, "license.allowed")])  # fmt: skip
def test_pages_without_an_allowed_license_are_dropped(license, reason):
    row = measure(Page(text=PROSE, license=license), make_plan(license=("cc-*",)))
    assert row["rejected_by"] == reason and row["rejected_value"] is None


def test_policy_is_applied_to_stored_rows():
    stored = measure(Page(text=PROSE, license="gfdl", extract_confidence=0.6), make_plan())
    assert stored["rejected_by"] is None
    for policy, reason in (
        ({"license": ("cc-by*",)}, "license.allowed"),
        ({"confidence": (0.7, 1.0)}, "extract.confidence"),
        ({}, None),
    ):
        plan = make_plan(keep_rejected_text=1.0, **policy)
        stored = _judge(stored, plan)
        assert stored["rejected_by"] == reason
        assert content_settings(plan) == content_settings(make_plan())
        assert policy_settings(plan) != policy_settings(make_plan())


def test_settings_of_other_engines_are_no_content():
    for engine, is_equal in (("trafilatura", True), ("blocks", False)):
        one, other = (make_plan(engine=engine, rules_see_code=x) for x in (True, False))
        assert (content_settings(one) == content_settings(other)) == is_equal


def warc(path, *pages):
    records = b""
    for number, page in enumerate(pages):
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
        head = (
            "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
            f"WARC-Target-URI: https://mill.example/{number}\r\n"
            f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
        )
        records += gzip.compress(head.encode() + http + b"\r\n\r\n")
    path.write_bytes(records)


def test_a_license_list_needs_no_second_extraction(tmp_path):
    path = tmp_path / "a.warc.gz"
    free = f"<title>Free</title><link rel=license href={BY}><article><p>{PROSE}</p></article>"
    warc(path, free, f"<title>Other</title><article><p>{PROSE}</p></article>")
    commits = {}
    for name, license, reusable in (
        ("all", (), ()),
        ("free", ("cc-by-4.0",), (str(tmp_path / "all"),)),
    ):
        unit = Unit("000000", fingerprint(str(path)), ExtractTask(str(path), 0, reusable))
        store = Store(str(tmp_path / name))
        commits[name] = extract_unit(unit, make_plan(engine="resiliparse", license=license), store)
        store.commit(commits[name])
    assert commits["all"].counts == {"kept": 2}
    assert commits["free"].counts == {"kept": 1, "license.allowed": 1}
    assert commits["free"].result.reapplied
    rows = pq.read_table(tmp_path / "free" / "documents" / "000000.parquet").to_pylist()
    assert [(r["title"], r["license"]) for r in rows] == [("Free", "cc-by-4.0"), ("Other", None)]
