"""The extraction engines: from a page to its main text.

Engine "blocks" is ours; trafilatura and resiliparse parse the page for themselves.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from resiliparse.extract.html2text import extract_plain_text

from stages.extract.blocks.walk import Blocks
from stages.extract.config import ExtractConfig, ResiliparseOptions, TrafilaturaOptions


class Extracted(NamedTuple):
    """The main text of a page, None or "" if there is none.

    `confidence` is the F1 that the engine expects of its text, in [0, 1]; None if it does not say.
    `code`: start and end of the text's parts that were <pre>, in characters, in order, whole lines.
    `plain` is what the rules read instead of the text, None if they read that.
    """

    text: str | None
    confidence: float | None = None
    code: tuple[tuple[int, int], ...] = ()
    plain: str | None = None


# of a page's blocks, its HTML and its URL
Engine = Callable[[Blocks, str, str], Extracted]


def make_engine(config: ExtractConfig) -> Engine:
    """The engine that a configuration names; ValueError if its model cannot be read."""
    if config.engine == "blocks":
        from stages.extract.blocks.engine import make_blocks

        return make_blocks(config)
    if config.engine == "resiliparse":
        text_of = _resiliparse(config.resiliparse)
    else:
        text_of = _trafilatura(config.trafilatura)
    return lambda page, html, url: Extracted(text_of(html))


def between(text: str, code: Sequence[tuple[int, int]]) -> list[str]:
    """The parts of a text around its code, without the line breaks that follow the code."""
    ends = [0, *(end for _, end in code)]
    starts = [*(start for start, _ in code), len(text)]
    parts = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    return [parts[0], *(part.lstrip("\n") for part in parts[1:])]


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
