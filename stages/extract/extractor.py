"""From a page's bytes to its main text: decoding, one walk over the page, the gate, the metadata
and the extraction of each page, which run in a killable child (`stages.isolation.child`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from filters import validated
from filters.language import Language
from filters.opt_out import in_metas
from filters.text.words import normalize
from stages.extract.blocks.metadata import metadata
from stages.extract.blocks.walk import Blocks, Head, walk
from stages.extract.config import ExtractConfig
from stages.extract.engines import Engine, make_engine
from stages.read.charset import decode_html

# what the gate identifies a page's language by: this many characters
GATE_CHARS = 2_000
_MIN_PROSE_CHARS = 40  # of a block, for that: menus are full of names
_ENOUGH_CHARS = 500


@validated
class ExtractorOptions:
    """Settings of the child."""

    config: ExtractConfig
    language: Language
    reject_opt_out: bool


class Page(NamedTuple):
    """The result of a page, as columns of its row: its text, or None and why it was rejected."""

    text: str | None = None
    rejected_by: str | None = None
    rejected_value: float | None = None
    rejected_low: float | None = None
    rejected_high: float | None = None
    charset: str | None = None
    charset_source: str | None = None
    opt_out: str | None = None
    language: str | None = None
    language_score: float | None = None
    title: str | None = None
    canonical_url: str | None = None
    author: str | None = None
    published: str | None = None
    declared_language: str | None = None
    schema_types: tuple[str, ...] | None = None
    license: str | None = None
    extract_confidence: float | None = None
    # no columns: as in Extracted
    code: tuple[tuple[int, int], ...] = ()
    plain: str | None = None


Document = tuple[bytes, str, str]  # payload, Content-Type, URL


def make_extract(options: ExtractorOptions) -> Callable[[Document], Page]:
    """What decodes a page, given its bytes, Content-Type and URL, and extracts its main text."""
    engine = make_engine(options.config)
    options.language.guess("a model that cannot be loaded must fail the child, not every page")
    return lambda document: _page(*document, options, engine)


def _page(
    payload: bytes, content_type: str, url: str, options: ExtractorOptions, engine: Engine
) -> Page:
    html, charset, source = decode_html(payload, content_type)
    blocks = walk(html)
    page = Page(charset=charset, charset_source=source, opt_out=_opt_out(blocks.head))
    if page.opt_out and options.reject_opt_out:
        return page._replace(rejected_by="opt_out.reject")
    if options.config.gate.enabled:
        page = _gate(page, blocks, options)
    if page.rejected_by:
        return page
    page = page._replace(**_metadata_columns(blocks.head, url))
    extracted = engine(blocks, html, url)
    confidence = extracted.confidence
    if confidence is not None and not math.isnan(confidence):
        page = page._replace(extract_confidence=confidence)
    text, code = _stripped(extracted.text or "", extracted.code)
    if not text:
        return page._replace(rejected_by="extract.empty")
    plain = None if extracted.plain is None else _stripped(extracted.plain, ())[0]
    return page._replace(text=text, code=code, plain=plain)


def _opt_out(head: Head) -> str | None:
    names = ((meta.get("name") or meta.get("http-equiv", ""), meta) for meta in head.metas)
    return in_metas((name, meta.get("content", "")) for name, meta in names)


def _metadata_columns(head: Head, url: str) -> dict[str, Any]:
    said = asdict(metadata(head, url))
    return said | {"schema_types": said["schema_types"] or None}


def _stripped(
    text: str, code: tuple[tuple[int, int], ...]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without white space around it and without what Arrow cannot store."""
    clean = text.strip().encode("utf-8", "replace").decode()
    start = len(text) - len(text.lstrip())
    spans = ((max(a - start, 0), min(b - start, len(clean))) for a, b in code)
    code = tuple((a, b) for a, b in spans if a < b)
    if "\0" in clean:
        code = tuple((a - clean.count("\0", 0, a), b - clean.count("\0", 0, b)) for a, b in code)
    return clean.replace("\0", ""), code


# --- the gate -------------------------------------------------------------------------------------


def _gate(page: Page, blocks: Blocks, options: ExtractorOptions) -> Page:
    gate, language = options.config.gate, options.language
    words = _words_up_to(gate.min_words, blocks.texts)
    if words < gate.min_words:
        return page._replace(
            rejected_by="gate.min_words",
            rejected_value=float(words),
            rejected_low=gate.min_words,
            rejected_high=float("inf"),
        )
    guesses = language.guesses(_sample(blocks), k=10)
    probability = language.probability_allowed(guesses)
    if probability < gate.language_probability:
        return page._replace(
            rejected_by="gate.language_probability",
            rejected_value=probability,
            rejected_low=gate.language_probability,
            rejected_high=1.0,
            language=guesses[0].language,
            language_score=guesses[0].score,
        )
    return page


def _sample(blocks: Blocks) -> str:
    """The first GATE_CHARS characters of the blocks that may be prose: not short, and less than
    half of it links. All blocks follow where these have under _ENOUGH_CHARS.
    """
    sample, size = [], 0
    for text, link_chars in zip(blocks.texts, blocks.link_chars, strict=True):
        if len(text) >= _MIN_PROSE_CHARS and 2 * link_chars < len(text):
            sample.append(text)
            size += len(text)
            if size >= GATE_CHARS:
                break
    if size < _ENOUGH_CHARS:
        sample += blocks.texts
    return "\n".join(sample)[:GATE_CHARS]


def _words_up_to(enough: int, texts: list[str]) -> int:
    """The number of words in the texts, or one of at least `enough`."""
    words = 0
    for text in texts:
        head = text[: 20 * enough]  # enough in nearly every page
        count = _word_count(head)
        if len(head) < len(text) and words + count < enough:
            count = _word_count(text)
        words += count
        if words >= enough:
            break
    return words


def _word_count(text: str) -> int:
    """Number of words as dedup counts them: Chinese, Japanese and Thai have no spaces."""
    return len(normalize(text).split())
