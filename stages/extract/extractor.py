"""From a page's bytes to its main text: decoding, the gate and the extraction of each page, which
run in a killable child (`stages.isolation.child`).
"""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from resiliparse.extract.html2text import extract_plain_text

from filters import validated
from filters.language import Language
from filters.opt_out import in_html
from filters.text.words import normalize
from stages.extract.config import ExtractConfig, ResiliparseOptions, TrafilaturaOptions
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


def _page(
    payload: bytes,
    content_type: str,
    options: ExtractorOptions,
    engine: Callable[[str], str | None],
) -> Page:
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
    words = _word_count(plain[: 20 * gate.min_words])  # enough in nearly every page
    if words < gate.min_words and (words := _word_count(plain)) < gate.min_words:
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


def _word_count(text: str) -> int:
    """Number of words as dedup counts them: Chinese, Japanese and Thai have no spaces."""
    return len(normalize(text).split())


def _engine(config: ExtractConfig) -> Callable[[str], str | None]:
    if config.engine == "resiliparse":
        return _resiliparse(config.resiliparse)
    return _trafilatura(config.trafilatura)


def _resiliparse(options: ResiliparseOptions) -> Callable[[str], str | None]:
    arguments = asdict(options)
    return lambda html: extract_plain_text(html, **arguments)


# In HTML these end nothing: what follows is still in the body. libxml2 drops it.
_END_TAGS = re.compile(r"</(?:body|html)\b[^>]*+>", re.IGNORECASE)


def _trafilatura(options: TrafilaturaOptions) -> Callable[[str], str | None]:
    import logging

    from lxml.etree import ErrorTypes
    from lxml.html import HTMLParser
    from trafilatura import extract, utils
    from trafilatura.deduplication import LRUCache

    for name in ("trafilatura", "htmldate", "courlan"):  # they log for each page what we store
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # the library's parser drops what is nested deeper than 256 elements; huge_tree: 2,048
    parser = utils.HTML_PARSER = HTMLParser(
        collect_ids=False,
        default_doctype=False,
        encoding="utf-8",
        remove_comments=True,
        remove_pis=True,
        huge_tree=True,
    )
    sys.setrecursionlimit(20_000)  # the library recurses into lists and quotations
    arguments = asdict(options)
    deduplicate = arguments.pop("deduplicate")
    without_limit = _resiliparse(ResiliparseOptions())

    def main_text(html: str) -> str | None:
        tree = utils.load_html(_END_TAGS.sub("", html))
        if any(error.type == ErrorTypes.ERR_RESOURCE_LIMIT for error in parser.error_log):
            return without_limit(html)
        if tree is None:
            return None
        # a new cache for each page: the library's default cache is shared, and makes a page depend
        # on earlier ones
        return extract(
            tree, deduplicate=LRUCache(maxsize=4096) if deduplicate else False, **arguments
        )

    return main_text
