"""From a page's bytes to its main text: decoding, the gate and the extraction of each page, which
run in a killable child (`stages.isolation.child`).
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from resiliparse.extract.html2text import extract_plain_text

from filters import validated
from filters.language import Language
from filters.opt_out import in_html
from stages.extract.config import ExtractConfig
from stages.read.charset import decode_html

# characters of a page's plain text that the gate identifies the language by
GATE_CHARS = 4_000


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


def make_extract(options: ExtractorOptions) -> Callable[[tuple[bytes, str]], Page]:
    """What decodes a page, given its bytes and Content-Type, and extracts its main text."""
    engine = _engine(options.config)
    options.language.guess("a model that cannot be loaded must fail the child, not every page")
    return lambda document: _page(*document, options, engine)


def _page(payload: bytes, content_type: str, options: ExtractorOptions, engine: Any) -> Page:
    html, charset, source = decode_html(payload, content_type)
    page = Page(charset=charset, charset_source=source, opt_out=in_html(html))
    if page.opt_out and options.reject_opt_out:
        return page._replace(rejected_by="opt_out.reject")
    if options.config.gate.enabled:
        page = _gate(page, html, options)
    if page.rejected_by:
        return page
    text = (engine(html) or "").strip().replace("\0", "").encode("utf-8", "replace").decode()
    if not text:
        return page._replace(rejected_by="extract.empty")
    return page._replace(text=text)


def _gate(page: Page, html: str, options: ExtractorOptions) -> Page:
    gate, language = options.config.gate, options.language
    # noscript: Discourse and similar forums put all their text there
    plain = extract_plain_text(
        html, preserve_formatting=False, main_content=False, alt_texts=False, noscript=True
    )
    words = len(plain.split())
    if words < gate.min_words:
        return page._replace(
            rejected_by="gate.min_words",
            rejected_value=float(words),
            rejected_low=gate.min_words,
            rejected_high=float("inf"),
        )
    guesses = language.guesses(plain, k=10, max_chars=GATE_CHARS)
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


def _engine(config: ExtractConfig) -> Any:
    if config.engine == "resiliparse":
        return partial(extract_plain_text, **asdict(config.resiliparse))
    import logging

    from trafilatura import extract
    from trafilatura.deduplication import LRUCache

    logging.disable(logging.CRITICAL)  # it logs for each page what we store for each page
    arguments = asdict(config.trafilatura)
    deduplicate = arguments.pop("deduplicate")
    # a new cache for each page: the library's default cache is shared, and makes a page depend on
    # earlier ones
    return lambda html: extract(
        html, deduplicate=LRUCache(maxsize=4096) if deduplicate else False, **arguments
    )
