"""What a page says about itself: title, address, author, date, language, kinds and license.

None of it is checked against the text; a page may say what it likes.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any, Final
from urllib.parse import urljoin

from stages.extract.blocks.license_names import license_id
from stages.extract.blocks.walk import FOOTER, Head

_MAX_TITLE: Final = 1_000  # characters, as all below
_MAX_URL: Final = 2_000
_MAX_AUTHOR: Final = 200
_MAX_TYPES: Final = 20  # schema.org types of a page
_MAX_SCRIPTS: Final = 50  # JSON-LD
_MAX_NODES: Final = 1_000
_MAX_DECLARED: Final = 100  # values of one kind that are looked at


@dataclass(frozen=True, slots=True)
class Metadata:
    """Fields are columns of the page's row; None where the page does not say.

    `published` is a day, YYYY-MM-DD, as the page writes it, without a time zone.
    `declared_language` is a lower-case tag such as 'en' or 'pt-br'. `schema_types` are the types of
    the page's JSON-LD, sorted. `license` is what the page declares for itself, as 'cc-by-sa-4.0',
    or the URL of a license that has no such name here.
    """

    title: str | None = None
    canonical_url: str | None = None
    author: str | None = None
    published: str | None = None
    declared_language: str | None = None
    schema_types: tuple[str, ...] = ()
    license: str | None = None


def metadata(head: Head, url: str = "") -> Metadata:
    """Read the head of the page at `url`; defined for every head."""
    metas = _metas(head)
    nodes = list(_nodes(head.json_ld))
    documents = [node for node in nodes if not _is_media(node)]
    return Metadata(
        title=_clean(head.title or next(iter(metas.get("og:title", ())), ""), _MAX_TITLE),
        canonical_url=_canonical_url(head, metas, url),
        author=_author(documents, nodes, metas),
        published=_published(documents, metas),
        declared_language=_language(head, metas),
        schema_types=_types(nodes),
        license=_license(head, documents, metas, url),
    )


# --- the fields -----------------------------------------------------------------------------------

_AUTHOR = ("author", "article:author", "dc.creator", "dcterms.creator", "citation_author")
_PUBLISHED = (
    *("article:published_time", "datepublished", "dc.date", "dc.date.issued", "dcterms.issued"),
    *("dcterms.date", "dcterms.created", "citation_publication_date", "date"),
)
_LICENSE = (
    *("license", "dc.license", "dcterms.license", "dc.rights", "dcterms.rights"),
    *("dc.rights.license", "dcterms.rights.license"),
)
_TAG = re.compile(r"[a-z]{2,3}(?:-[a-z0-9]{2,8}){0,3}")
_DAY = re.compile(r"([0-9]{4})(?:([-/.])([0-9]{1,2})\2([0-9]{1,2})|([0-9]{2})([0-9]{2}))(?![0-9])")


def _metas(head: Head) -> dict[str, list[str]]:
    """Contents of meta elements by lower-case name, property or itemprop."""
    metas: dict[str, list[str]] = {}
    for meta in head.metas:
        name = meta.get("name") or meta.get("property") or meta.get("itemprop")
        name = (name or meta.get("http-equiv") or "").strip().lower()
        values = metas.setdefault(name, [])
        if name and len(values) < _MAX_DECLARED and (content := meta.get("content", "").strip()):
            values.append(content)
    return metas


def _canonical_url(head: Head, metas: dict[str, list[str]], url: str) -> str | None:
    declared = [href for rel, href in head.links if href and "canonical" in rel.split()]
    for href in (*declared[:1], *metas.get("og:url", ())[:1]):
        if address := _web_address(href, url):
            return address
    return None


def _web_address(href: str, base: str) -> str | None:
    """An absolute address of the web, None for others, too long ones and fragments."""
    href = href.strip()
    if not href or href.startswith("#") or len(href) > _MAX_URL:
        return None
    try:
        address = urljoin(base, href)
    except ValueError:  # "http://["
        return None
    is_web = address.lower().startswith(("http://", "https://"))
    return _clean(address, _MAX_URL) if is_web else None


def _author(
    documents: list[dict[str, Any]], nodes: list[dict[str, Any]], metas: dict[str, list[str]]
) -> str | None:
    by_id = {node["@id"]: node for node in nodes if isinstance(node.get("@id"), str)}
    names = [name for node in documents for name in _names(node.get("author"), by_id)]
    for key in _AUTHOR:
        # article:author is often the address of a profile
        names = names or [n for n in metas.get(key, ()) if not n.lower().startswith("http")]
    return _clean("; ".join(dict.fromkeys(" ".join(name.split()) for name in names)), _MAX_AUTHOR)


def _names(value: Any, by_id: dict[str, dict[str, Any]]) -> Iterator[str]:
    for person in _listed(value):
        if isinstance(person, dict) and "name" not in person:
            reference = person.get("@id")
            person = by_id.get(reference, {}) if isinstance(reference, str) else {}
        name = person.get("name") if isinstance(person, dict) else person
        if isinstance(name, str) and name.strip() and not name.startswith("http"):
            yield name


def _published(documents: list[dict[str, Any]], metas: dict[str, list[str]]) -> str | None:
    declared = [node.get("datePublished") for node in documents]
    declared += [content for key in _PUBLISHED for content in metas.get(key, ())]
    return next((day for text in declared if (day := iso_day(text))), None)


def iso_day(text: Any) -> str | None:
    """The day at the beginning of a date in ISO 8601 or nearly so, as YYYY-MM-DD, else None."""
    match = _DAY.match(text.strip()) if isinstance(text, str) else None
    if match is None or match[1] < "1000":  # 0001-01-01 is the empty date of .NET
        return None
    try:
        return date(int(match[1]), int(match[3] or match[5]), int(match[4] or match[6])).isoformat()
    except ValueError:
        return None


def _language(head: Head, metas: dict[str, list[str]]) -> str | None:
    declared = (head.language, *metas.get("og:locale", ()), *metas.get("content-language", ()))
    tags = (text.strip().lower().replace("_", "-") for text in declared)
    return next((tag for tag in tags if _TAG.fullmatch(tag)), None)


def _types(nodes: list[dict[str, Any]]) -> tuple[str, ...]:
    names = {name for node in nodes for name in _types_of(node)}
    return tuple(sorted(names)[:_MAX_TYPES])


def _types_of(node: dict[str, Any]) -> list[str]:
    names = [_clean(t, 64) for t in _listed(node.get("@type")) if isinstance(t, str)]
    return [name.rpartition("/")[2] or name for name in names if name]


def _is_media(node: dict[str, Any]) -> bool:
    """Whether a node describes an image or the like, whose license is not the page's."""
    return any(name.endswith(("ImageObject", "AudioObject")) for name in _types_of(node))


def _license(
    head: Head, documents: list[dict[str, Any]], metas: dict[str, list[str]], url: str
) -> str | None:
    """The license that the page declares for itself.

    By rel=license, else schema.org, else a meta element, else a link to a Creative Commons license
    in the footer: a page that links to one elsewhere may only be writing about it. Several licenses
    in the same place, as in a gallery of images, are none of the page.
    """
    by_rel = [href for rel, href in head.links if "license" in rel.split()]
    in_json = [license for node in documents for license in _licenses_of(node)]
    in_metas = [content for key in _LICENSE for content in metas.get(key, ())]
    in_footer = [href for rel, href in head.links if rel == FOOTER]
    for declared, may_be_unknown in (
        *((by_rel, True), (in_json, True)),
        *((in_metas, False), (in_footer, False)),
    ):
        declared = declared[:_MAX_DECLARED]
        names = {name for text in declared if (name := license_id(text))}
        if not names and may_be_unknown:
            names = {a for text in declared if " " not in text and (a := _web_address(text, url))}
        if names:
            return min(names) if len(names) == 1 else None
    return None


def _licenses_of(node: dict[str, Any]) -> Iterator[str]:
    for license in _listed(node.get("license")):
        if isinstance(license, dict):
            license = license.get("url") or license.get("@id") or license.get("name")
        if isinstance(license, str) and license.strip():
            yield license.strip()


def _clean(text: str, limit: int) -> str | None:
    """A text in one line that Arrow can store, None for an empty one."""
    text = " ".join(text[:limit].replace("\0", " ").split())
    return text.encode("utf-8", "replace").decode() or None


# --- JSON-LD --------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    return value[:_MAX_TYPES] if isinstance(value, list) else [] if value is None else [value]


def _nodes(scripts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects at the top of JSON-LD scripts and of their @graph."""
    waiting = [value for script in list(scripts)[:_MAX_SCRIPTS] for value in parse_json_ld(script)]
    waiting.reverse()
    for _ in range(_MAX_NODES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value[:_MAX_NODES][::-1]
        elif isinstance(value, dict):
            yield value
            if isinstance(value.get("@graph"), list | dict):
                waiting.append(value["@graph"])


_WRAPPING = re.compile(r"<!\[CDATA\[|\]\]>|<!--|-->|^[ \t]*//.*$", re.MULTILINE)
_TRAILING_COMMA = re.compile(r",(?=\s*[}\]])")
_DECODER = json.JSONDecoder(strict=False)


def parse_json_ld(script: str) -> list[Any]:
    """The values in a script: usually one, none if it cannot be read.

    Comments, CDATA marks, escaped quotes and trailing commas are tolerated, as are several values
    in a row, in time linear in the script's length.
    """
    values, rest = _leading_values(script)
    if not rest:
        return values
    text = _WRAPPING.sub("", _without_comments(script))
    if '"' not in text:
        text = html.unescape(text)
    values, _ = _leading_values(_TRAILING_COMMA.sub("", text))
    return values


def _leading_values(text: str) -> tuple[list[Any], str]:
    """The JSON values that a text begins with, and what follows them."""
    values: list[Any] = []
    at = 0
    while at := _next_value(text, at):
        try:
            value, at = _DECODER.raw_decode(text, at - 1)
        except (ValueError, RecursionError):
            return values, text[at - 1 :]
        values.append(value)
    return values, ""


_BETWEEN = re.compile(r"[\s,;\ufeff]*")


def _next_value(text: str, at: int) -> int:
    """One more than the place of the next value, 0 at the end."""
    match = _BETWEEN.match(text, at)
    start = match.end() if match else at
    return start + 1 if start < len(text) else 0


def _without_comments(text: str) -> str:
    kept, (before, mark, rest) = [], text.partition("/*")
    while mark:
        inside, mark, after = rest.partition("*/")
        # a comment that never ends, or "/*" in a URL
        kept.append(before if mark else f"{before}/*{inside}")
        before, mark, rest = after.partition("/*")
    return "".join([*kept, before])
