"""Replace personal data by typed placeholders: 'write to a@b.org' becomes 'write to <EMAIL_ADDRESS>'.

Presidio's own recognisers find the values (microsoft.github.io/presidio/supported_entities); names, which need NER, are
out of scope. Two things are added. Speed: a line goes to a recogniser only if it holds what every value of that kind
holds. Policy: what is formally a match and yet no one's (127.0.0.1, 1.2.3.4.5, a decimal fraction) stays.
"""

import difflib
import ipaddress
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from filters import STRICT


class Span(NamedTuple):
    """Where a placeholder stands in the scrubbed text, `text[start:end]`; the value itself is kept nowhere."""

    entity: str
    start: int
    end: int


class Scrubbed(NamedTuple):
    text: str
    spans: list[Span]


def counts(spans: Iterable[Span]) -> dict[str, int]:
    """Replaced values by entity, in the entities' alphabetical order."""
    return dict(sorted(Counter(span.entity for span in spans).items()))


# What phonenumbers allows between two blocks of digits (its _VALID_PUNCTUATION, at most four in a row).
_BETWEEN = r"[-x‐-―−ー－／ \xa0\xad\u200b\u2060\u3000()（）［］.\[\]/~⁓∼～]{0,4}"

# Every value we accept of an entity contains its trigger, so a line without the trigger holds no value. None looks
# around itself: what is found in a value is found in its line. Each starts with a literal or a small class, for speed.
_TRIGGERS = {
    "CREDIT_CARD": re.compile(r"\d(?:[- ]?\d){12}"),
    "CRYPTO": re.compile(r"(?:bc1|[13])[a-zA-Z0-9]{25}"),
    "EMAIL_ADDRESS": re.compile(r"@\w"),
    "IBAN_CODE": re.compile(r"[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}"),
    "IP_ADDRESS": re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:|\d\.\d{1,3}\.\d{1,3}\.\d"),
    # seven digits: the shortest subscriber numbers in wide use; for region DE Presidio takes the year 1648 for a pager
    "PHONE_NUMBER": re.compile(rf"\d(?:{_BETWEEN}\d){{6}}"),
    "US_SSN": re.compile(r"[0-9](?:[-. ]?[0-9]){8}"),
}
_ANY = re.compile(r"[@\d]")

_PHONE_REGIONS = ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR")  # Presidio's
# Presidio's words without 'number' (orders and parts have one), and the labels of pages
_LABELS_EN = ("phone", "telephone", "tel", "cell", "cellphone", "mobile", "call", "fax", "text", "sms", "whatsapp")
_LABELS = ("telefon", "mobil", "handy", "téléphone", "portable", "teléfono", "móvil", "telefone", "telefono")
_PHONE_CONTEXT = _LABELS_EN + _LABELS


def _known(entities: tuple[str, ...]) -> tuple[str, ...]:
    return _all_in(entities, "entity", _TRIGGERS)


def _regions(regions: tuple[str, ...]) -> tuple[str, ...]:
    import phonenumbers

    return _all_in(regions, "phone region", phonenumbers.SUPPORTED_REGIONS)


def _all_in(names: tuple[str, ...], what: str, known: Iterable[str]) -> tuple[str, ...]:
    for name in names:
        if name not in set(known):
            close = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.4)
            raise ValueError(f"unknown {what} '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    return names


@dataclass(frozen=True, config=STRICT)
class Pii:
    """Scrub e-mail addresses, phone, card, account and social security numbers, public IP and Bitcoin addresses.

    Scrubbing twice changes nothing, and placeholders that the text came with stay.
    """

    entities: Annotated[tuple[str, ...], AfterValidator(_known)] = (
        "EMAIL_ADDRESS",
        "PHONE_NUMBER",
        "CREDIT_CARD",
        "IBAN_CODE",
        "IP_ADDRESS",
        "US_SSN",
        "CRYPTO",
    )
    # numbers that start with + are recognised for every country
    phone_regions: Annotated[tuple[str, ...], AfterValidator(_regions)] = _PHONE_REGIONS
    # Presidio's scores: 1 checksum or domain holds, .6 IP, .5 SSN with separators, .4 phone, .05 bare digits.
    # At .4 a phone number passes as written and bare digits need a context word close by.
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.4
    phone_context: tuple[str, ...] = _PHONE_CONTEXT

    def scrub(self, text: str) -> Scrubbed:
        """The text with placeholders, and where they stand. Total: defined for every string.

        Line by line, as no value crosses one. A number's label may stand on the line above: that line is read scrubbed,
        as a second scrub would find it.
        """
        lines = text.split("\n")
        spans: list[Span] = []
        offset = 0
        for i, line in enumerate(lines):
            if _ANY.search(line):
                lines[i], found = self._scrub_line(line, above=lines[i - 1] if i else "")
                spans += [Span(entity, offset + start, offset + end) for entity, start, end in found]
            offset += len(lines[i]) + 1
        return Scrubbed("\n".join(lines) if spans else text, spans)

    def _scrub_line(self, line: str, above: str) -> tuple[str, list[Span]]:
        """Replace until nothing is found: what is left of a replaced value may be one in its new surroundings.

        Ends, as every value holds a digit or an @ and no placeholder does; no value can reach across < or >.
        """
        spans: list[Span] = []
        while hits := _without_overlap(self._find(line, above)):
            line, spans = _replace(line, sorted([*spans, *hits], key=lambda mark: mark.start))
        return line, spans

    def _find(self, line: str, above: str) -> Iterator["_Hit"]:
        for entity in self.entities:
            trigger = _TRIGGERS[entity]
            if not trigger.search(line):
                continue
            for offset, piece in _pieces(_shown_to(entity, line)):
                if not trigger.search(piece):
                    continue
                recognizer = _recognizer(entity, self.phone_regions)
                words = self.phone_context if entity == "PHONE_NUMBER" else tuple(recognizer.context)
                for raw in recognizer.analyze(piece, [entity]):
                    hit = _Hit(entity, offset + raw.start, offset + raw.end, raw.score)
                    score = _score(hit, line, above, words)
                    if score >= self.min_score:
                        yield hit._replace(score=score)


class _Hit(NamedTuple):
    entity: str
    start: int
    end: int
    score: float


def _without_overlap(hits: Iterable[_Hit]) -> list[_Hit]:
    """Of overlapping hits the one with the higher score, then the longer, then the earlier; in reading order."""
    kept: list[_Hit] = []
    for hit in sorted(hits, key=lambda h: (-h.score, h.start - h.end, h.start, h.entity)):
        i = bisect_right(kept, hit.start, key=lambda k: k.end)
        if i == len(kept) or hit.end <= kept[i].start:
            kept.insert(i, hit)
    return kept


def _replace(line: str, marks: Iterable[Span | _Hit]) -> tuple[str, list[Span]]:
    """Put its placeholder in the place of each mark (an earlier placeholder or a hit; in reading order)."""
    parts: list[str] = []
    spans: list[Span] = []
    at = length = 0
    for mark in marks:
        placeholder = f"<{mark.entity}>"
        start = length + mark.start - at
        parts += [line[at : mark.start], placeholder]
        at, length = mark.end, start + len(placeholder)
        spans.append(Span(mark.entity, start, length))
    return "".join([*parts, line[at:]]), spans


# No phone number, yet often the like of one in some region: dates, ranges of years, dotted quads (none after '+45 '),
# times, fractions and tables (more than 40 digits in a row, four numbers' worth). Blanked for the phone recogniser,
# which does 15 kB/s on them.
_NO_PHONE = re.compile(
    r"(?<![\d.+-])(?<!\+\d )(?<!\+\d\d )(?<!\+\d{3} )"
    r"(?:[12]\d{3}([-/.])[01]?\d\1[0-3]?\d(?![.-]?\d)|[0-3]?\d([-/.])[0-3]?\d\2[12]\d{3}(?![.-]?\d)"
    r"|(?:1\d|20)\d\d ?[-‐-―/] ?(?:1\d|20)\d\d(?!\d)|\d{1,3}(?:\. ?\d{1,3}){3}(?: ?/ ?\d{1,3})?(?!\.?\d))"
    r"|(?<!\d)\d\d?:\d\d(?::\d\d)?(?!\d)"
    r"|(?<![\d.])0\.\d+(?!\.?\d)"
    rf"|\d(?:{_BETWEEN}\d){{40,}}"
)


def _shown_to(entity: str, line: str) -> str:
    """The line as the recogniser of `entity` sees it, with every character in its place."""
    return _NO_PHONE.sub(lambda m: "\0" * len(m[0]), line) if entity == "PHONE_NUMBER" else line


# On long lines recognisers are slower than linear (e-mail: quadratic), so a long one is cut between two words.
_LONG = 2000
_GAP = re.compile(r"[^\W\d_]{2} (?=[^\W\d_]{2})")


def _pieces(line: str) -> Iterator[tuple[int, str]]:
    """(offset, piece) of a line. A run of 1,000 characters without a gap, which is no prose, is cut anywhere."""
    start = 0
    while len(line) - start > _LONG:
        gap = _GAP.search(line, start + _LONG // 2, start + _LONG)
        end = gap.end() if gap else start + _LONG
        yield start, line[start:end]
        start = end
    yield start, line[start:]


_BARE_DIGITS = 0.05  # Presidio's score for nine digits as an SSN: nothing but their number speaks for them
_CATALOGUE = re.compile(r"\b(?:ISBN|ISSN|EAN|UPC|DOI|OID)\b(?:-1[03])?[\s:#]*$", re.IGNORECASE)
_PART_BEFORE = re.compile(r"\d[.:]$")  # of a time or a fraction
_PART_AFTER = re.compile(r"[.:]\d|\.[a-z]")  # … or of a host name: 192-168-0-131.example.net


def _score(hit: _Hit, line: str, above: str, context: tuple[str, ...]) -> float:
    """Presidio's score, or 0 for what cannot be personal data; raised, as Presidio does, if a context word is near."""
    value, after = line[hit.start : hit.end], line[hit.end : hit.end + 12]
    before = f"{above[-40:]}\n{line[max(0, hit.start - 40) : hit.start]}"[-40:]
    score = hit.score
    if hit.entity == "IP_ADDRESS":
        return score if _is_someones(value, before, after) else 0
    if hit.entity == "PHONE_NUMBER":
        if not _TRIGGERS[hit.entity].search(value) or ".." in value:
            return 0
        score = _BARE_DIGITS if value.isdecimal() else score
    if hit.entity in ("PHONE_NUMBER", "US_SSN"):
        if _CATALOGUE.search(before) or _PART_BEFORE.search(before) or _PART_AFTER.match(after):
            return 0
        near = _any_word(context)
        return max(score + 0.35, 0.4) if near.search(before) or near.search(after) else score
    return score


def _is_someones(address: str, before: str, after: str) -> bool:
    """Public, as in datatrove's PIIFormatter (FineWeb); no version 1.2.3.4, no part of a longer OID, no C++ ad::be."""
    if re.search(r"\d\.$", before) or re.match(r"\.\d", after):
        return False
    try:
        ip = ipaddress.ip_address(re.split("[/%]", address)[0])
    except ValueError:
        return False
    if ip.version == 4:
        # two numbers of two digits: not section 4.2.13.1; one real address in 4,000 is lost
        return ip.is_global and sum(byte > 9 for byte in ip.packed) >= 2
    groups = [group for group in address.split(":") if group]
    return ip.is_global and len(groups) >= 3 and any(c.isdigit() for c in address)


@lru_cache
def _any_word(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b" if words else r"(?!)", re.IGNORECASE)


@lru_cache
def _recognizer(entity: str, phone_regions: tuple[str, ...]) -> Any:
    """Presidio's recogniser for an entity, one per process; importing it takes seconds, so when a line asks for it."""
    import tldextract.tldextract
    from presidio_analyzer import predefined_recognizers as presidio

    # the e-mail recogniser asks it for the public suffix; by default it would download the list and cache it on disk
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    if entity == "PHONE_NUMBER":
        return presidio.PhoneRecognizer(supported_regions=phone_regions)
    return {
        "CREDIT_CARD": presidio.CreditCardRecognizer,
        "CRYPTO": presidio.CryptoRecognizer,
        "EMAIL_ADDRESS": presidio.EmailRecognizer,
        "IBAN_CODE": presidio.IbanRecognizer,
        "IP_ADDRESS": presidio.IpRecognizer,
        "US_SSN": presidio.UsSsnRecognizer,
    }[entity]()
