"""Machine-readable opt-outs from text and data mining, in HTTP headers and in the page.

`noai` (DeviantArt 2022, adopted by others) and `noml` (noml.info) in X-Robots-Tag or in a meta
element for robots or for one of them, and `tdm-reservation: 1` as header or meta element (W3C TDM
Reservation Protocol, final report 2024, sections 4 and 5). Where a page says yes and no, the
refusal counts, as does one that names another robot than ours.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise

from pydantic.dataclasses import dataclass

from filters import STRICT

_DIRECTIVE = re.compile(r"[\w-]+")
_REFUSALS = ("noai", "noml")
_META = re.compile(r"<[mM][eE][tT][aA][\s/]")  # ten times as fast as with IGNORECASE
_MAX_META = 4096  # characters of a meta element that are looked at
# also GPTBot, anthropic-ai, Google-Extended, ChatGPT-User, img2dataset, Bytespider, Claude-Web
_ROBOT = re.compile(
    r"robots|x-robots-tag|.*bot\b.*|.*(?:crawler|spider|scraper|agent|fetcher|extended|dataset)"
    r"|.+-(?:ai|web|user)|slurp|googleother|omgili"
)


@dataclass(frozen=True, config=STRICT)
class OptOut:
    """Record opt-out signals, and reject pages that have one.

    `reject` = false keeps such pages; the column `opt_out` has the signal in both cases.
    """

    reject: bool = True


def in_headers(headers: Mapping[str, str]) -> str | None:
    """The opt-out signal of a response, such as 'x-robots-tag: noai', or None.

    Header names are lower-case.
    """
    if refusal := _refusal(headers.get("x-robots-tag", "")):
        return f"x-robots-tag: {refusal}"
    if _is_reserved(headers.get("tdm-reservation", "")):
        return "tdm-reservation: 1"
    return None


def in_html(html: str) -> str | None:
    """The opt-out signal in the meta elements of a page, or None."""
    if not any(word in meta for meta in _metas(html) for word in (*_REFUSALS, "tdm-reservation")):
        return None  # nearly every page; the others are parsed, which knows comments and scripts
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse_from_bytes(html.encode("utf-8", "replace"), "utf-8")
    for element in tree.document.query_selector_all("meta") if tree.document else ():
        name = (element.getattr("name") or element.getattr("http-equiv") or "").strip().lower()
        content = element.getattr("content") or ""
        if _ROBOT.fullmatch(name) and (refusal := _refusal(content)):
            return f"meta {name}: {refusal}"
        if name == "tdm-reservation" and _is_reserved(content):
            return "meta tdm-reservation: 1"
    return None


def _metas(html: str) -> Iterator[str]:
    """What begins like a meta element, in lower case, up to the next one."""
    starts = [match.start() for match in _META.finditer(html)]
    for start, end in pairwise([*starts, len(html)]):
        yield html[start : min(end, start + _MAX_META)].lower()


def _refusal(value: str) -> str | None:
    """The first refusal among the directives, however they are separated."""
    return next((word for word in _DIRECTIVE.findall(value.lower()) if word in _REFUSALS), None)


def _is_reserved(value: str) -> bool:
    return "1" in _DIRECTIVE.findall(value)
