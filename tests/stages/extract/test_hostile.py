"""Pages built to cost time or memory: each is a row, with its text or with a reason.

CPU time and memory are limited by the child as in a run, not measured here: a page that takes more
is a Loss.
"""

import pyarrow.parquet as pq
import pytest

from filters.language import Language
from stages.extract.config import ExtractConfig
from stages.extract.extract import ExtractTask, extract_unit
from stages.extract.extractor import ExtractorOptions, Page, make_extract
from stages.isolation.child import Child, Limits
from stages.read.listing import fingerprint
from stages.storage.ledger import Store, Unit
from tests.stages.extract.test_extract import make_plan, warc
from tests.support.hostile_pages import PAGES

URL = "https://mill.example/wheels"
LIMITS = Limits(seconds=5.0, memory_bytes=1_000_000_000, recycle_after=5)
MARKDOWN = {"format": "markdown", "rules_see_code": False}
# of all pages these cost the most
COSTLY = ["tiny-words", "nested-tables", "short-words"]
# at full size these stand for the others, which take ten minutes
LARGE = [
    *(*COSTLY, "tiny-blocks", "nested-with-text", "options", "distinct-ids", "distinct-classes"),
    *("cells", "rows", "links", "lines", "text-without-spaces", "chinese", "json-ld-nested"),
    *("title", "headings", "many-attributes", "code", "blocks-of-code"),
]
LOSSES = {f"extract.{reason}" for reason in ("timeout", "memory", "crash", "error")}


def options(**settings):
    return ExtractorOptions(ExtractConfig(engine="blocks", **settings), Language(), True)


@pytest.fixture(scope="module")
def extract_page():
    work = make_extract(options())
    return lambda html: work((html, "text/html; charset=utf-8", URL))


def payload(name, size):
    return PAGES[name](size).encode("utf-8", "surrogatepass")


def assert_text_or_reason(page):
    assert isinstance(page, Page), page
    assert (page.text is None) == (page.rejected_by is not None)
    assert page.text is None or (page.text.strip() and "\0" not in page.text)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_has_a_text_or_a_reason(name, extract_page):
    html = payload(name, 60_000)
    assert_text_or_reason(extract_page(html))
    assert_text_or_reason(extract_page(html[: len(html) // 2]))
    assert_text_or_reason(extract_page(html[len(html) // 2 :]))


@pytest.fixture
def child():
    made = []

    def make(**settings):
        made.append(Child(make_extract, options(**settings), LIMITS))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("name", COSTLY)
def test_costly_pages_stay_in_5_seconds_and_1_gigabyte(name, child):
    html = payload(name, 3_000_000)
    assert_text_or_reason(child().result((html, "text/html; charset=utf-8", URL)))


@pytest.mark.kill
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("settings", [{}, MARKDOWN], ids=["text", "markdown"])
def test_the_largest_pages_stay_in_5_seconds_and_1_gigabyte(name, settings, child):
    html = payload(name, ExtractConfig().max_html_bytes - 1_000)
    assert_text_or_reason(child(**settings).result((html, "text/html; charset=utf-8", URL)))


@pytest.mark.kill
@pytest.mark.parametrize("name", ["text", "short-words"])
def test_50_megabytes_of_text_stay_in_5_seconds_and_1_gigabyte(name, child):
    html = payload(name, 50_000_000)
    assert_text_or_reason(child().result((html, "text/html; charset=utf-8", URL)))


# --- the whole stage ------------------------------------------------------------------------------


def rows_of(path, store):
    """What the stage writes for a WARC file, and its commit."""
    unit = Unit("000000", fingerprint(str(path)), ExtractTask(str(path), 0))
    plan = make_plan(engine="blocks", filters=ExtractConfig().filters)
    commit = extract_unit(unit, plan, Store(str(store)))
    return pq.read_table(store / "documents" / "000000.parquet").to_pylist(), commit


def assert_rows_have_text_or_reason(rows, commit):
    not_documents = commit.counts.get("warc.not_response", 0)
    assert commit.rows_in == len(rows) + not_documents == sum(commit.counts.values())
    assert LOSSES.isdisjoint(commit.counts)
    for row in rows:
        assert row["rejected_by"] or row["text"], row["url"]


def test_every_page_of_a_file_is_a_row(tmp_path):
    path = tmp_path / "hostile.warc.gz"
    warc(path, *(make(20_000) for make in PAGES.values()))
    rows, commit = rows_of(path, tmp_path / "store")
    assert len(rows) == len(PAGES)
    assert_rows_have_text_or_reason(rows, commit)


@pytest.mark.corpus
@pytest.mark.parametrize("folder", ["data/warc/edge", "data/warc/real", "cases"])
def test_every_page_of_real_files_is_a_row(folder, corpus, tmp_path):
    paths = sorted(path for path in (corpus.parent / folder).glob("*warc*") if path.suffix != ".md")
    assert paths
    for path in paths:
        try:
            rows, commit = rows_of(path, tmp_path / path.name)
        except ValueError as error:
            assert "no WARC record" in str(error), path
            continue
        assert_rows_have_text_or_reason(rows, commit)
