"""Machine-readable opt-outs from text and data mining, in HTTP headers and in the page.

`noai` in X-Robots-Tag or a robots meta element (DeviantArt 2022, adopted by others), and
`tdm-reservation: 1` as header or meta element (W3C TDM Reservation Protocol, final report 2024,
sections 4 and 5).
"""

import re
from collections.abc import Mapping

from pydantic.dataclasses import dataclass

from filters import STRICT

_META = re.compile(r"<meta\b[^>]{0,1000}>", re.I)
_ATTRIBUTE = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
_HEAD_CHARS = 65_536


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
    if "noai" in _directives(headers.get("x-robots-tag", "")):
        return "x-robots-tag: noai"
    if headers.get("tdm-reservation", "").strip() == "1":
        return "tdm-reservation: 1"
    return None


def in_html(html: str) -> str | None:
    """The opt-out signal in the meta elements of a page's first 65,536 characters, or None."""
    for element in _META.findall(html[:_HEAD_CHARS]):
        attributes = {m[0].lower(): m[1] or m[2] or m[3] for m in _ATTRIBUTE.findall(element)}
        name, content = attributes.get("name", "").strip().lower(), attributes.get("content", "")
        if name == "robots" and "noai" in _directives(content):
            return "meta robots: noai"
        if name == "tdm-reservation" and content.strip() == "1":
            return "meta tdm-reservation: 1"
    return None


def _directives(value: str) -> set[str]:
    # "otherbot: noindex, noai" has a user agent before the colon; an opt-out for one counts for all
    return {part.rpartition(":")[2].strip() for part in value.lower().split(",")}
