"""The killable child: a hostile page is that page's fate, and no one else's."""

import signal

import pytest

from filters.language import Language
from stages.extract.blocks.walk import walk
from stages.extract.config import ExtractConfig, Gate, TrafilaturaOptions
from stages.extract.extractor import (
    ExtractorOptions,
    Page,
    _opt_out,
    _stripped,
    _words_up_to,
    make_extract,
)
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


URL = "https://mill.example/wheels"


def extract(extractor, payload, content_type="text/html; charset=utf-8"):
    page = extractor.result((payload, content_type, URL))
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
def test_a_child_that_the_machine_kills_costs_neither_the_page_nor_the_unit(extractor, sign):
    child = extractor()
    assert extract(child, PAGE).text == PROSE
    child._process.send_signal(sign)
    child._process.wait()
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


@pytest.mark.parametrize(
    "html, expected",
    [
        ('<meta title="a>b" name=robots content=no&#97;i><i>noai</i>', "meta robots: noai"),
        (f"<style>{'.a{}' * 20_000}</style><meta name=robots content=noai>", "meta robots: noai"),
        ("<noscript><meta name=robots content=noai></noscript>", "meta robots: noai"),
        ('<META HTTP-EQUIV="X-Robots-Tag" CONTENT="noai"/>', "meta x-robots-tag: noai"),
        *(
            (decoy.format("<meta name=robots content=noai>"), None)
            for decoy in (
                *("<!-- {} -->", "<script>s='{}'</script>", "<title>{}</title>", '<a title="{}">'),
                *("<template>{}</template>", "<textarea>{}</textarea>", "<p>&lt;meta noai&gt;"),
            )
        ),
        ("\ud800<meta name=robots content=noai>", "meta robots: noai"),
        ("<meta" * 5000, None),
    ],
)
def test_opt_outs_are_meta_elements_of_the_page(html, expected):
    assert _opt_out(walk(html).head) == expected


def test_metadata_stands_in_the_row_of_what_passes_the_gate(extractor):
    head = b"<html lang=en><title>Wheels</title><link rel=license href=https://creativecommons.org/licenses/by/4.0/>"
    page = extract(extractor(), head + PAGE)
    assert (page.title, page.declared_language, page.license) == ("Wheels", "en", "cc-by-4.0")
    assert page.schema_types is None and page.extract_confidence is None
    assert extract(extractor(), head + b"<p>Too few words.").title is None


@pytest.mark.parametrize(
    "text, code, expected",
    [
        (" \n a\nCODE\nb ", ((5, 10),), ("a\nCODE\nb", ((2, 7),))),
        ("  CODE  ", ((0, 8),), ("CODE", ((0, 4),))),
        ("a\0b\nC\0DE", ((4, 8),), ("ab\nCDE", ((3, 6),))),
        ("a\ud800b", (), ("a?b", ())),
        ("", ((0, 3),), ("", ())),
    ],
)
def test_places_of_code_are_those_of_the_stored_text(text, code, expected):
    assert _stripped(text, code) == expected


MENU = "<ul>" + "<li><a href=x>Startseite Sonderangebote</a>" * 100 + "</ul>"


def test_the_gate_reads_prose_before_menus(extractor):
    html = f"<html><body>{MENU}<article><p>{PROSE}</p></article></body></html>"
    assert extract(extractor(), html.encode()).rejected_by is None


@pytest.mark.parametrize(
    "texts, enough, at_least",
    [
        ([], 5, 0),
        (["one two", "three"], 5, 3),
        (["one two", "three four five", "six"], 5, 5),
        (["x" * 500 + " two three four five"], 5, 5),
        (["一二三四五六"], 5, 5),
        (["one"], 0, 0),
    ],
)
def test_words_are_counted_until_there_are_enough(texts, enough, at_least):
    counted = _words_up_to(enough, texts)
    assert counted >= at_least and (counted >= enough) == (at_least >= enough)


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


FIRST, LATER = (
    " ".join([f"{word} boats lie in the old harbour of the town."] * 9) for word in ("Red", "Blue")
)


@pytest.fixture(scope="module")
def trafilatura():
    options = ExtractorOptions(ExtractConfig(gate=Gate(enabled=False)), Language(), True)
    extract_page = make_extract(options)
    return lambda html: extract_page((html.encode(), "text/html; charset=utf-8", URL)).text


@pytest.mark.parametrize(
    "html",
    [
        "<html><body>{}</body></html><html><body>{}</body></html>",
        "<html><head><title>a</title></head><body>{}</body></html>\n<!doctype html><html lang=en>"
        "<head><title>b</title></head><body class=x>{}</BODY ></HTML\n>",
        "<html><body>{}</body></html>{}",
        "<html><body>{}</body><div>{}</div></html>",
        "<body>{}<script>document.write('</body></html>')</script>{}",
        "<html><head></head><body><nav>menu</nav></body></html><div>{}</div><div>{}</div>",
    ],
)
def test_text_after_the_end_of_the_page_is_kept(trafilatura, html):
    text = trafilatura(html.format(f"<p>{FIRST}</p>", f"<p>{LATER}</p>"))
    assert FIRST in text and LATER in text


@pytest.mark.parametrize("depth", [250, 260, 1000, 2040, 2060, 4000])
@pytest.mark.parametrize(
    "tags", [("<div>", "</div>"), ("<font size=2>", ""), ("<div><b>", ""), ("<blockquote>", "")]
)
def test_no_depth_hides_text(trafilatura, depth, tags):
    opening, closing = tags
    deep = f"{opening * depth}<p>{LATER}</p>{closing * depth}"
    text = trafilatura(f"<html><body><p>{FIRST}</p>{deep}</body></html>")
    assert FIRST in text and LATER in text


def test_a_list_in_a_list_in_a_list_is_read_to_its_end(trafilatura):
    items = [f"Boat number {i} lies in the old harbour of the town." for i in range(400)]
    text = trafilatura("<html><body>" + "".join(f"<ul><li>{item}" for item in items))
    assert all(item in text for item in items)


@pytest.mark.parametrize(
    "language, sentence",
    [
        ("zh", "北京的秋天总是来得很快，街道两旁的银杏树在一夜之间变成金黄色。"),
        ("ja", "秋になると、山の色が少しずつ変わり、朝の空気も冷たくなります。"),
        ("th", "ในฤดูฝนชาวนาในหมู่บ้านจะเริ่มปลูกข้าวตั้งแต่เช้ามืด"),
        ("km", "នៅរដូវវស្សាកសិករក្នុងភូមិចាប់ផ្តើមដាំស្រូវតាំងពីព្រឹកព្រលឹម"),
        ("lo", "ໃນລະດູຝົນຊາວນາໃນໝູ່ບ້ານຈະເລີ່ມປູກເຂົ້າຕັ້ງແຕ່ເຊົ້າມືດ"),
        ("my", "မိုးရာသီတွင်လယ်သမားများသည်မနက်စောစောကတည်းကစပါးစိုက်ကြသည်"),
    ],
)
def test_scripts_without_spaces_pass_the_gate(language, sentence):
    config = ExtractConfig(engine="resiliparse")
    extract_page = make_extract(ExtractorOptions(config, Language(allowed=(language,)), True))
    page = extract_page((f"<article><p>{sentence * 6}</p></article>".encode(), "text/html", URL))
    assert page.rejected_by is None and page.text == sentence * 6
    short = extract_page((f"<article><p>{sentence[:12]}</p></article>".encode(), "text/html", URL))
    assert short.rejected_by == "gate.min_words"
