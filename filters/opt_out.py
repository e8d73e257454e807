"""Machine-readable opt-outs from text and data mining, in HTTP headers and in the page.

`noai` (DeviantArt 2022, adopted by others) and `noml` (noml.info) in X-Robots-Tag or in a meta
element for robots or for one of them, and `tdm-reservation: 1` as header or meta element (W3C TDM
Reservation Protocol, final report 2024, sections 4 and 5). Where a page says yes and no, the
refusal counts, as does one that names another robot than ours.
"""

import re
from collections.abc import Iterable, Mapping

from pydantic.dataclasses import dataclass

from filters import STRICT

_DIRECTIVE = re.compile(r"[\w-]+")
_REFUSALS = ("noai", "noml")
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


def in_metas(metas: Iterable[tuple[str, str]]) -> str | None:
    """The opt-out signal in the meta elements of a page, as (name or http-equiv, content) pairs."""
    for name, content in metas:
        name = name.strip().lower()
        if name == "tdm-reservation" and _is_reserved(content):
            return "meta tdm-reservation: 1"
        if (refusal := _refusal(content)) and _ROBOT.fullmatch(name):
            return f"meta {name}: {refusal}"
    return None


def _refusal(value: str) -> str | None:
    """The first refusal among the directives, however they are separated."""
    return next((word for word in _DIRECTIVE.findall(value.lower()) if word in _REFUSALS), None)


def _is_reserved(value: str) -> bool:
    return "1" in _DIRECTIVE.findall(value)
