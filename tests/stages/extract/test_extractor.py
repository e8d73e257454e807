"""The killable child: a hostile page is that page's fate, and no one else's."""

import signal

import pytest

from filters.language import Language
from stages.extract.config import ExtractConfig, Gate, TrafilaturaOptions
from stages.extract.extractor import ExtractorOptions, Page, make_extract
from stages.isolation.child import Child, Limits, Loss

PROSE = " ".join(["The quick brown fox jumps over the lazy dog near the quiet river bank."] * 12)
PAGE = f"<html><head><title>t</title></head><body><article><p>{PROSE}</p></article></body></html>".encode()
GERMAN = " ".join(
    ["Der schnelle braune Fuchs springt über den faulen Hund am stillen Ufer des Flusses."] * 12
)


@pytest.fixture
def extractor():
    made = []

    def make(*, engine="resiliparse", language=None, reject_opt_out=True, **settings):
        config = ExtractConfig(engine=engine, **settings)
        options = ExtractorOptions(config, language or Language(), reject_opt_out)
        limits = Limits(config.timeout_seconds, config.child_memory_bytes, config.recycle_after)
        made.append(Child(make_extract, options, limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def extract(extractor, payload, content_type="text/html; charset=utf-8"):
    page = extractor.result((payload, content_type))
    return Page(None, *page.rejection("extract")[:2]) if isinstance(page, Loss) else page


@pytest.mark.parametrize("engine", ["resiliparse", "trafilatura"])
def test_main_text_comes_out(extractor, engine):
    page = extract(extractor(engine=engine), PAGE)
    assert page.rejected_by is None
    assert page.text == PROSE
    assert (page.charset, page.charset_source) == ("utf-8", "header")


def test_a_page_that_takes_too_long_is_killed_and_its_neighbours_live(extractor):
    child = extractor(engine="trafilatura", timeout_seconds=1.0, gate=Gate(enabled=False))
    assert extract(child, PAGE).text == PROSE
    slow = "".join(
        f"<p>Paragraph {i} is here, with enough words to be a paragraph.</p>" for i in range(60_000)
    )
    page = extract(child, f"<html><body>{slow}</body></html>".encode())
    assert (page.rejected_by, page.rejected_value, page.text) == ("extract.timeout", 1.0, None)
    assert extract(child, PAGE).text == PROSE


def test_a_child_that_dies_is_one_rejected_page(extractor):
    child = extractor()
    assert extract(child, PAGE).text == PROSE
    child._process.send_signal(signal.SIGSEGV)
    child._process.wait()
    assert extract(child, PAGE).rejected_by == "extract.crash"
    assert extract(child, PAGE).text == PROSE


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_the_machine_kills_fails_the_unit_and_not_the_page(extractor, sign):
    child = extractor()
    assert extract(child, PAGE).text == PROSE
    child._process.send_signal(sign)
    child._process.wait()
    with pytest.raises(RuntimeError, match=f"ended with exit code -{sign.value}: out of memory"):
        extract(child, PAGE)
    assert extract(child, PAGE).text == PROSE


def test_a_child_that_cannot_start_fails_the_unit_and_not_every_page(extractor, tmp_path):
    (tmp_path / "broken.ftz").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="cannot start"):
        extract(extractor(language=Language(model=str(tmp_path / "broken.ftz"))), PAGE)


def test_children_are_replaced_after_their_share_of_pages(extractor):
    child = extractor(recycle_after=2)
    pids = []
    for _ in range(5):
        assert extract(child, PAGE).text == PROSE
        pids.append(child._process.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


@pytest.mark.parametrize(
    "html, reason",
    [
        ("<p>Too few words.</p>", "gate.min_words"),
        (f"<p>{GERMAN}</p>", "gate.language_probability"),
        (f"<meta name='robots' content='noindex, noai'><p>{PROSE}</p>", "opt_out.reject"),
        (f'<meta name="tdm-reservation" content="1"><p>{PROSE}</p>', "opt_out.reject"),
        (f"<nav>{PROSE}</nav>", "extract.empty"),
        ("", "gate.min_words"),
    ],
)
def test_reasons(extractor, html, reason):
    page = extract(extractor(), html.encode())
    assert page.rejected_by == reason
    assert page.text is None


def test_opt_out_is_recorded_when_it_does_not_reject(extractor):
    page = extract(extractor(reject_opt_out=False), b"<meta name=robots content=noai>" + PAGE)
    assert (page.opt_out, page.text) == ("meta robots: noai", PROSE)


def test_without_the_gate_other_languages_go_on_to_the_language_rule(extractor):
    page = extract(
        extractor(gate=Gate(enabled=False)), f"<article><p>{GERMAN}</p></article>".encode()
    )
    assert page.text == GERMAN


@pytest.mark.parametrize(
    "payload",
    [b"\0" * 5000, b"\xff\xfe\xfd" * 999, b"<" * 9999, b"<p>" + b"\xed\xa0\x80 words " * 90],
)
def test_text_is_safe_for_arrow_whatever_the_bytes(extractor, payload):
    page = extract(extractor(gate=Gate(enabled=False)), payload)
    assert page.text is None or ("\0" not in page.text and page.text.encode("utf-8"))


def test_deduplication_within_a_page_knows_nothing_of_other_pages(extractor):
    child = extractor(engine="trafilatura", trafilatura=TrafilaturaOptions(deduplicate=True))
    texts = [extract(child, PAGE).text for _ in range(5)]
    assert texts == [texts[0]] * 5 and texts[0]
