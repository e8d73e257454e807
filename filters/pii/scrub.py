"""Replace personal data by typed placeholders: 'write to a@b.org' becomes 'write to
<EMAIL_ADDRESS>'.

Presidio's own recognisers find the values (microsoft.github.io/presidio/supported_entities); names,
which need NER, are in `filters.names`. Three things are added. Speed: a line goes to a recogniser
only if it holds what every value of that kind holds. Policy: what is formally a match and yet no
one's (127.0.0.1, 1.2.3.4.5, a decimal fraction) stays. Secrets: keys of services, found in the
whole text as private keys have many lines (`filters.secrets`).
"""

import ipaddress
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File
from filters.pii import phones, secrets
from filters.pii.surrogates import inert, load_key, surrogate
from filters.suggest import did_you_mean


class Span(NamedTuple):
    """Where a placeholder or surrogate stands in the scrubbed text, `text[start:end]`; the value
    itself is kept nowhere.
    """

    entity: str
    start: int
    end: int


class Scrubbed(NamedTuple):
    text: str
    spans: list[Span]


def counts(spans: Iterable[Span]) -> dict[str, int]:
    """Replaced values by entity, in the entities' alphabetical order."""
    return dict(sorted(Counter(span.entity for span in spans).items()))


# Every value we accept of an entity contains one of its triggers, so a line without holds no value.
# None looks further than the ends of words: what is found in a value is found in its line. Each
# starts with a digit, a sign or a literal, for speed. (Secrets have their own in filters.secrets.)
# Chinese and Japanese letters may touch a value, hence ASCII's \b.
_TRIGGERS = {
    "CREDIT_CARD": (
        re.compile(
            r"[1-68](?<!(?a:\w).)\d{3}(?:[- ]?\d{4}[- ]?\d{4}|[- ]?\d{3,4}[- ]?\d{3,4}[- ]?\d{3,5})(?:[- ]?\d{3,4})?(?a:\b)"
        ),
    ),
    "CRYPTO": (re.compile(r"[13][a-zA-Z0-9]{25}"),),
    "EMAIL_ADDRESS": (re.compile(r"@\w"),),
    "IBAN_CODE": (re.compile(r"[0-9](?<=[A-Za-z].)[0-9](?<=[A-Za-z]{2}..)[ -]?[A-Za-z0-9]{4}"),),
    # the last three numbers of four, of which no fifth makes an OID; and two colons
    "IP_ADDRESS": (
        re.compile(
            r"\.(?<=\d.)(?<!\d\.\d.)(?<!\d\.\d\d.)(?<!\d\.\d{3}.)\d{1,3}\.\d{1,3}\.\d{1,3}(?!\.?\d)"
        ),
        re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:"),
    ),
    "PHONE_NUMBER": (phones.DIGITS,),
    "US_SSN": (
        re.compile(
            r"[0-9](?<!(?a:\w).)[0-9]{2}(?:[- .][0-9]{2}[- .][0-9]{4}|[0-9]{2}-?[0-9]{4}|-[0-9]{6})(?a:\b)"
        ),
    ),
}
# What is believed of these without a word that says so near it; the rest of their values needs one.
_ALONE = {
    "CREDIT_CARD": re.compile(
        r"[1-68](?<!(?a:\w).)(?:\d{13,15}|\d{3}([ -])(?:\d{4}\1\d{4}\1\d{3,4}|\d{6}\1\d{4,5}))(?a:\b)"
    ),
    "PHONE_NUMBER": phones.WRITTEN,
    "US_SSN": re.compile(r"[0-9](?<!(?a:\w).)[0-9]{2}[- .][0-9]{2}[- .][0-9]{4}(?a:\b)"),
}
# their triggers hold phones.DIGITS
_LONG_NUMBERS = ("CREDIT_CARD", "PHONE_NUMBER", "US_SSN")

# Bytes by kind, as `in` looks for a run of kinds ten times as fast as `re`: a letter or digit, and
# which of the two.
_ALNUM = bytes(97 if chr(c).isalnum() and c < 128 else 32 for c in range(256))
_LETTER_DIGIT = bytes(48 if 48 <= c < 58 else _ALNUM[c] for c in range(256))
# In UTF-8 a decimal digit beyond ASCII starts with one of these, each taken for a digit. What may
# stand between digits goes: punctuation (phones.BETWEEN), and all other bytes beyond ASCII, as some
# of that is among them.
_DIGIT_LEADS = b"\xd9\xdb\xdf\xe0\xe1\xea\xef\xf0"
_DIGITS = bytes(48 if 48 <= c < 58 or c in _DIGIT_LEADS else 32 for c in range(256))
_NO_DIGITS = b"-x ().[]/~" + bytes(c for c in range(128, 256) if c not in _DIGIT_LEADS)
_ENTITIES = (*_TRIGGERS, "SECRET")

_PHONE_REGIONS = ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR")  # Presidio's
# Presidio's words without 'number' (orders and parts have one), and the labels of pages
_LABELS_EN = (
    "phone",
    "telephone",
    "tel",
    "cell",
    "cellphone",
    "mobile",
    "call",
    "fax",
    "text",
    "sms",
    "whatsapp",
)
_LABELS = (
    "telefon",
    "mobil",
    "handy",
    "téléphone",
    "portable",
    "teléfono",
    "móvil",
    "telefone",
    "telefono",
)
_PHONE_CONTEXT = _LABELS_EN + _LABELS


def _known(entities: tuple[str, ...]) -> tuple[str, ...]:
    return _all_in(entities, "entity", _ENTITIES)


def _regions(regions: tuple[str, ...]) -> tuple[str, ...]:
    import phonenumbers

    return _all_in(regions, "phone region", phonenumbers.SUPPORTED_REGIONS)


def _all_in(names: tuple[str, ...], what: str, known: Iterable[str]) -> tuple[str, ...]:
    for name in names:
        if name not in set(known):
            raise ValueError(f"unknown {what} '{name}'{did_you_mean(name, known)}")
    return names


@dataclass(frozen=True, config=STRICT)
class Pii:
    """Scrub e-mail addresses, phone, card, account and social security numbers, public IP and
    Bitcoin addresses, secrets.

    `mode` says what takes a value's place: its type, or a value of the same kind that is no one's
    and, for the key in `key_file` (16 bytes or more, kept from those who get the corpus), always
    the same. Secrets get their type in both. `count` bounds the values replaced in a document.
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
        "SECRET",
    )
    # numbers that start with + are recognised for every country
    phone_regions: Annotated[tuple[str, ...], AfterValidator(_regions)] = _PHONE_REGIONS
    # Presidio's scores: 1 checksum or domain holds, .6 IP, .5 SSN with separators, .4 phone, .05
    # bare digits. At .4 a phone number passes as written and bare digits need a context word close
    # by.
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.4
    phone_context: tuple[str, ...] = _PHONE_CONTEXT
    mode: Literal["placeholder", "surrogate"] = "placeholder"
    key_file: File = ""
    count: Bound = None

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError unless the key can be had that surrogates need."""
        if self.mode == "surrogate":
            if not self.key_file:
                raise ValueError(
                    'pii.mode = "surrogate" needs a key: name a file of 16 bytes or more as pii.key_file'
                )
            load_key(self.key_file)

    def scrub(self, text: str) -> Scrubbed:
        """The text with placeholders or surrogates, and where they stand. Total: defined for every
        string.

        Whatever goes wrong is told without a word of the text.
        """
        if self.mode == "surrogate":
            load_key(self.key_file)
        return discreetly("pii", self._scrub, text)

    def _scrub(self, text: str) -> Scrubbed:
        """Secrets, then whatever else the text may hold, line by line; again, as what stands next
        to a value may turn out to be one when that is gone.
        """
        scrubbed, done = Scrubbed(text, []), frozenset[str]()
        while True:
            again = self._scrub_secrets(scrubbed)
            if again is not scrubbed:
                done = frozenset()
            present = done.union(
                self._present(self._seen(again.text), known=self._seen(text) if done else "")
            )
            if present == done:
                return again
            scrubbed, done = self._scrub_lines(again, present), present

    def _present(self, text: str, *, known: str = "") -> Iterator[str]:
        """The entities that a text may hold a value of: most texts hold none, and are done.

        Lines of `known` hold none: a label that a replacement set free stood in the text before, as
        a part of a longer word.
        """
        old = set(known.split("\n")) if known else ()
        asked = "\n".join(line for line in text.split("\n") if line not in old) if old else text
        hinted = _hinted(asked)
        wanted = (entity for entity in self.entities if entity in hinted)
        return (
            entity
            for entity in wanted
            if self._may_hold(entity, asked, text, mentions=_may_mention)
        )

    def _may_hold(
        self,
        entity: str,
        text: str,
        context: str,
        *,
        mentions: Callable[[str, tuple[str, ...]], bool],
    ) -> bool:
        """Whether lines may hold a value, given the text in which a word could be that says so."""
        if not _is_triggered(entity, text):
            return False
        if entity not in _ALONE or self.min_score <= _BARE_DIGITS or _ALONE[entity].search(text):
            return True
        return mentions(
            context,
            self.phone_context + phones.LABELS if entity == "PHONE_NUMBER" else _context(entity),
        )

    def _scrub_secrets(self, scrubbed: Scrubbed) -> Scrubbed:
        while "SECRET" in self.entities and (found := secrets.find(self._seen(scrubbed.text))):
            hits = [_Hit("SECRET", start, end, 1.0) for start, end in found]
            scrubbed = self._replace(scrubbed.text, scrubbed.spans, hits)
        return scrubbed

    def _scrub_lines(self, scrubbed: Scrubbed, entities: frozenset[str]) -> Scrubbed:
        """Line by line, as no other value crosses one. A number's label may stand on the line
        above: that line is read scrubbed, as a second scrub would find it.
        """
        text = scrubbed.text
        parts: list[str] = []
        spans: list[Span] = []
        earlier = iter([*scrubbed.spans, Span("", len(text) + 1, 0)])
        span = next(earlier)
        line, was, now = "", 0, 0  # how far the text is done, before and after
        for start, end in _triggered_lines(self._seen(text), entities):
            between, own = text[was:start], list[Span]()
            while span.start < end:
                span, moved = next(earlier), span
                shift, its = (now - was, spans) if moved.start < start else (-start, own)
                its.append(Span(moved.entity, moved.start + shift, moved.end + shift))
            above = (line + between)[:-1].rpartition("\n")[2]
            line, own = self._scrub_line(text[start:end], own, above=above, entities=entities)
            parts += [between, line]
            now += len(between)
            spans += [Span(entity, now + start, now + end) for entity, start, end in own]
            was, now = end, now + len(line)
        spans += [
            Span(span.entity, span.start + now - was, span.end + now - was)
            for span in (span, *earlier)
            if span.entity
        ]
        return Scrubbed("".join([*parts, text[was:]]), spans)

    def _scrub_line(
        self, line: str, spans: list[Span], *, above: str, entities: frozenset[str]
    ) -> Scrubbed:
        """Replace until nothing is found: what is left of a replaced value may be one in its new
        surroundings. Few rounds on any length of line, as a replacement moves the cuts of its own
        piece only (`_piece`).

        Ends, as every value holds a digit or an @ and no placeholder does; no value can reach
        across < or >, which is what recognisers are shown in the place of surrogates.
        """
        while hits := _without_overlap(self._find(self._seen(line), above, entities)):
            line, spans = self._replace(line, spans, hits)
        return Scrubbed(line, spans)

    def _seen(self, text: str) -> str:
        return inert(text) if self.mode == "surrogate" else text

    def _replace(self, text: str, spans: Iterable[Span], hits: Iterable["_Hit"]) -> Scrubbed:
        """Put something in the place of each hit; earlier spans move along."""
        parts: list[str] = []
        moved: list[Span] = []
        at = length = 0
        marks: list[Span | _Hit] = [*spans, *hits]
        for mark in sorted(marks, key=lambda mark: mark.start):
            value = text[mark.start : mark.end]
            start = length + mark.start - at
            parts += [
                text[at : mark.start],
                value if isinstance(mark, Span) else self._instead_of(mark.entity, value),
            ]
            at, length = mark.end, start + len(parts[-1])
            moved.append(Span(mark.entity, start, length))
        return Scrubbed("".join([*parts, text[at:]]), moved)

    def _instead_of(self, entity: str, value: str) -> str:
        return (
            surrogate(entity, value, key=load_key(self.key_file))
            if self.mode == "surrogate"
            else f"<{entity}>"
        )

    def _find(self, line: str, above: str, entities: frozenset[str]) -> Iterator["_Hit"]:
        """Piece by piece. A value that ends at a cut through a word may go on beyond it: it begins
        the next piece.
        """
        start = 0
        while start < len(line):
            piece = _piece(line, start)
            hits = list(self._find_in(piece, above, entities))
            if piece.is_between_words:
                yield from hits
                start = piece.end
                continue
            cut = min((hit.start for hit in hits if hit.end >= piece.end), default=piece.end)
            whole = [hit for hit in hits if hit.end <= cut and hit.end < piece.end]
            yield from whole
            # behind the last value, where its placeholder will end and the next round cut
            start = max((hit.end for hit in whole), default=cut if cut > start else piece.end)

    def _find_in(self, piece: "_Piece", above: str, entities: frozenset[str]) -> Iterator["_Hit"]:
        line, start, end, low, high = piece
        near = line[low:high]
        above = "" if low else above
        for entity in entities:
            if not self._may_hold(entity, near, f"{above[-40:]}\n{near}", mentions=_mentions):
                continue
            words = self.phone_context if entity == "PHONE_NUMBER" else _context(entity)
            found = (
                self._phones(piece, above)
                if entity == "PHONE_NUMBER"
                else self._recognised(entity, line[start:end], start)
            )
            for hit in found:
                score = _score(hit, line, above, words)
                if score >= self.min_score:
                    yield hit._replace(score=score)

    def _phones(self, piece: "_Piece", above: str) -> Iterator["_Hit"]:
        """What phonenumbers knows; a number that is not written like one has only its digits to
        speak for it.
        """
        line, start, end, low, high = piece
        shown = phones.shown(line[low:high])
        if self.min_score > _BARE_DIGITS:
            shown = phones.worth_reading(
                shown, above, _any_word(self.phone_context + phones.LABELS)
            )
        announced = [(span, _LABELLED) for span in phones.labelled(shown, above)]
        announced += [(span, 0.4) for span in phones.international(shown)]
        for span, score in announced:
            if start <= low + span[0] < end:
                yield _Hit("PHONE_NUMBER", low + span[0], low + span[1], score)
        for hit in self._recognised("PHONE_NUMBER", shown[start - low : end - low], start):
            written = phones.is_written_like_one(line, hit.start, hit.end)
            hit = hit._replace(start=phones.unbracketed(line, hit.start, hit.end))
            yield hit if written else hit._replace(score=_BARE_DIGITS)

    def _recognised(self, entity: str, piece: str, offset: int) -> Iterator["_Hit"]:
        recognizer = _recognizer(entity, self.phone_regions if entity == "PHONE_NUMBER" else ())
        for text in _writings(entity, piece):
            if _is_triggered(entity, text):
                for raw in recognizer.analyze(text, [entity]):
                    yield _Hit(entity, offset + raw.start, offset + raw.end, raw.score)


_T = TypeVar("_T")


def discreetly(what: str, function: Callable[..., _T], *args: Any) -> _T:
    """What function(*args) returns; if it raises, a RuntimeError that says where, and nothing of
    what it was given.
    """
    try:
        return function(*args)
    except Exception as error:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        place = (
            f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"
            if traceback
            else "no place"
        )
        told = f"{type(error).__name__} in {place}"
    raise RuntimeError(
        f"{what}: {told}; its message is withheld, as it may quote the text"
    ) from None


class _Hit(NamedTuple):
    entity: str
    start: int
    end: int
    score: float


def _without_overlap(hits: Iterable[_Hit]) -> list[_Hit]:
    """Of overlapping hits the one with the higher score, then the longer, then the earlier; in
    reading order.
    """
    kept: list[_Hit] = []
    for hit in sorted(hits, key=lambda h: (-h.score, h.start - h.end, h.start, h.entity)):
        i = bisect_right(kept, hit.start, key=lambda k: k.end)
        if i == len(kept) or hit.end <= kept[i].start:
            kept.insert(i, hit)
    return kept


def _hinted(text: str) -> set[str]:
    """The entities of which a text has what `_TRIGGERS` ask for, and some that it does not: a first
    look at a whole text.
    """
    raw = text.encode("utf-8", "surrogatepass")
    hints = {"IP_ADDRESS"}  # its triggers begin with a rare mark, and are as fast
    if b"@" in raw:
        hints.add("EMAIL_ADDRESS")
    if b"aa00" in raw.translate(_LETTER_DIGIT):
        hints.add("IBAN_CODE")
    if b"a" * 26 in raw.translate(_ALNUM):
        hints.add("CRYPTO")
    if b"0" * 7 in raw.translate(_DIGITS, _NO_DIGITS):
        hints.update(_LONG_NUMBERS)
    return hints


def _triggered_lines(text: str, entities: Iterable[str]) -> list[tuple[int, int]]:
    """(start, end) of each line that holds a trigger of one of the entities, in reading order."""
    starts = set[int]()
    for trigger in (trigger for entity in entities for trigger in _TRIGGERS[entity]):
        start, match = 0, trigger.search(text)
        while match:
            starts.add(max(start, text.rfind("\n", start, match.start()) + 1))
            start = (text.find("\n", match.end()) + 1) or len(text) + 1
            match = trigger.search(text, start)
    ends = {start: text.find("\n", start) for start in starts}
    return [(start, ends[start] if ends[start] >= 0 else len(text)) for start in sorted(starts)]


def _is_triggered(entity: str, text: str) -> bool:
    return any(trigger.search(text) for trigger in _TRIGGERS[entity])


_LOWER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LOWER_IBAN = re.compile(r"[a-z]{2}[0-9]{2}[ -]?[a-z0-9]{4}")
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"  # kana, Han, Hangul: written without spaces
_GLUED = re.compile(rf"[0-9A-Za-z](?:(?<=[{_CJK}].)|(?=[{_CJK}]))")
_CJK_LETTER = re.compile(f"[{_CJK}]")
# info@firm.comTel, jim@firm.org-Director, ann@firm.de_old: what begins a word behind the domain
_NEXT_WORD = re.compile(r"(@[A-Za-z0-9.-]{1,250}?\.[a-z]{2,4})([-._]?[A-Z](?=[a-z])|_)")


def _writings(entity: str, line: str) -> list[str]:
    """The line, and what Presidio misses in it: account numbers not in capitals, values with a CJK
    letter or the next word right behind."""
    found = [line]
    if entity == "IBAN_CODE" and _LOWER_IBAN.search(line):
        found.append(line.translate(_LOWER))
    if entity != "PHONE_NUMBER" and not line.isascii() and _GLUED.search(line):
        found.append(_CJK_LETTER.sub(" ", line))
    if entity == "EMAIL_ADDRESS" and _NEXT_WORD.search(line):
        found.append(_NEXT_WORD.sub(lambda m: m[1] + " " * len(m[2]), line))
    return found


# On long lines recognisers are slower than linear (e-mail: quadratic), so a long one is cut.
LONG = 2000
GAP = re.compile(r"[^\W\d_]{2} (?=[^\W\d_]{2})")
_SIDE = 120  # characters: no word is asked for further from a value


class _Piece(NamedTuple):
    """line[start:end], which is searched for values, within line[low:high], which says what they
    are.
    """

    line: str
    start: int
    end: int
    low: int
    high: int

    @property
    def is_between_words(self) -> bool:
        """Whether no value can reach across its end."""
        line, end = self.line, self.end
        return end == len(line) or line[end - 1] in "<>" or GAP.match(line, end - 3) is not None


def _piece(line: str, start: int) -> _Piece:
    """The piece of a line that begins at `start`: cut behind < or > or between two words, and where
    there is neither, which is no prose, behind a comma or anywhere.

    Angles go first: a cut through a word then lies where the last angle before it says, which is
    what placeholders bring, and not where the length of all before it says. Else each round would
    cut elsewhere, and find more.
    """
    end = start + LONG
    if end >= len(line):
        end = len(line)
    elif angle := max(line.rfind("<", start, end), line.rfind(">", start, end)) + 1:
        end = angle
    elif gap := GAP.search(line, start + LONG // 2, end):
        end = gap.end()
    else:
        end = max(line.rfind(mark, start + LONG // 2, end) for mark in ',;"') + 1 or end
    return _Piece(line, start, end, max(0, start - _SIDE), end + _SIDE)


_BARE_DIGITS = (
    0.05  # Presidio's score for nine digits as an SSN: nothing but their number speaks for them
)
_LABELLED = 0.75  # Presidio's score for a phone number with a context word
_CATALOGUE = re.compile(
    r"\b(?:(?:ISBN|ISSN|EAN|UPC|DOI|OID)\b(?:-1[03])?|(?:SKU|P/N|item|model|serial)\b(?:[ -]?(?:no|nr|number|code)\b)?"
    # 'to order 800 …' and 'part 2' alone say less
    r"|(?:part|order)[ -]?(?:no|nr|number|code|id)\b|(?:part|order) ?(?=#))[.\s:#]*$",
    re.IGNORECASE,
)
_PART_BEFORE = re.compile(r"\d[.:]\Z")  # of a time or a fraction
_PART_AFTER = re.compile(r"[.:]\d|\.[a-z]")  # … or of a host name: 192-168-0-131.example.net
_FRACTION = re.compile(r"\d\.\d")
# a MAC address or a UUID around it
_HEX = "[0-9A-Fa-f]"
_HEX_BEFORE = re.compile(
    rf"(?<![\w.])(?:(?:{_HEX}{{2}}-){{2,}}|{_HEX}{{8}}-(?:{_HEX}{{4}}-){{0,3}}|(?:{_HEX}{{4}}-){{2,3}})\Z"
)
_HEX_AFTER = re.compile(rf"-(?=\d*[A-Fa-f])(?=[A-Fa-f]*\d){_HEX}{{2,12}}\b")
# a version, a row of a table, a postal code, unless a word says what it is
_UNSAID = re.compile(
    r"(?!1\.\d{3}\.\d{3}\.\d{4}\Z|\d+\.\d+\.\d{4}\.\d{4}\Z)\d{1,2}(?:\.\d+){3}|[1-9]\d(?: \d\d){3,}|\d{5}-\d{4}"
)
_ZIP, _STATE_BEFORE = (
    re.compile(r"\d{5}-\d{4}"),
    re.compile(r"\b[A-Z]{2}\.?[ \xa0]+$"),
)  # Boston, MA 02110-1301
_MORE_BEFORE = re.compile(r"\d[- ]\Z")
_EXPIRY = (
    r" (?:0[1-9]|1[0-2])[2-4]\d(?: \d{3})?(?![- ]?\d)"  # of a card: 0827, and the code on its back
)
_MORE_AFTER = re.compile(rf"(?!{_EXPIRY})[- ]\d{{4}}(?!\d)")


def _score(hit: _Hit, line: str, above: str, context: tuple[str, ...]) -> float:
    """Presidio's score, or 0 for what cannot be personal data; raised, as Presidio does, if a
    context word is near.
    """
    value, after = line[hit.start : hit.end], line[hit.end : hit.end + 12]
    before = f"{above[-40:]}\n{line[max(0, hit.start - 40) : hit.start]}"[-40:]
    score = hit.score
    if hit.entity == "IP_ADDRESS":
        return score if _is_someones(value, before, after) else 0
    if hit.entity == "CREDIT_CARD":
        return _card_score(value, before, after, _any_word(context))
    if hit.entity == "PHONE_NUMBER":
        if (
            not phones.DIGITS.search(value)
            or ".." in value
            or (_ZIP.fullmatch(value) and _STATE_BEFORE.search(before))
        ):
            return 0
        is_said = score >= _LABELLED
        score = (
            _BARE_DIGITS
            if (value.isdecimal() or _UNSAID.fullmatch(value)) and not is_said
            else score
        )
    if hit.entity in ("PHONE_NUMBER", "US_SSN"):
        if _CATALOGUE.search(before) or _PART_BEFORE.search(before) or _PART_AFTER.match(after):
            return 0
        if value[0].isdigit() and (_HEX_BEFORE.search(before) or _HEX_AFTER.match(after)):
            return 0
        near = _any_word(context)
        return (
            max(score, min(score + 0.35, _LABELLED), 0.4)
            if near.search(before) or near.search(after)
            else score
        )
    return score


# First digits and lengths of cards, from the issuers' ranges (ISO/IEC 7812): Visa, Mastercard,
# American Express, Diners, JCB, Discover, UnionPay, Maestro, RuPay, Mir, UATP.
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[0-8]\d{14}|2[2-7]\d{14}|3(?:[47]\d{13}|[0689]\d{12}|[0689]\d{14}|5\d{14})|8[12]\d{14}"
    r"|(?:2131|1800)\d{11}|1\d{14}|(?:5[0678]|6\d)\d{10,17}"
)
_CARD_BLOCKS = re.compile(r"\d+|\d{4}([ -])\d{4}\1\d{4}\1\d{3,4}|\d{4}([ -])\d{6}\2\d{4,5}")


def _card_score(value: str, before: str, after: str, context: re.Pattern[str]) -> float:
    """1 for the usual lengths in the usual blocks. A tenth of all numbers pass Luhn's test, so rare
    lengths, other blocks, UATP's and what may be a part of a table or a fraction need a word that
    says card near them.
    """
    digits = re.sub(r"\D", "", value)
    if not _CARD.fullmatch(digits):
        return 0
    is_fraction = value.isdecimal() and (
        _FRACTION.match(before[-2:] + "0") or _FRACTION.match("0" + after)
    )
    usual = len(digits) in (14, 15, 16) and digits[0] != "1" and _CARD_BLOCKS.fullmatch(value)
    if usual and not (is_fraction or _MORE_BEFORE.search(before) or _MORE_AFTER.match(after)):
        return 1.0
    return 1.0 if context.search(before) or context.search(after) else _BARE_DIGITS


_VERSION = re.compile(
    r"(?:\bv|\b(?:ver|versions?|releases?|released|build|firmware|update|patch|rev|revision|driver|kernel|section|chapter|clause|oid)"
    r"[.:]?)\s?$|[A-Za-z_](?<!\bip)(?<!_ip)[-_]$"
    r"|\w(?<!\bip)(?<!\bhost)(?<!\btcp)(?<!\budp)(?<!\bhttp)(?<!\bhttps)/$",
    re.IGNORECASE,
)
_VERSION_AFTER = re.compile(
    r"-\d|[-.~+]?(?:rc|beta|alpha|tar|zip|exe|dmg|deb|rpm|jar|msi|dll)\b|-x(?:64|86)\b",
    re.IGNORECASE,
)


def _is_someones(address: str, before: str, after: str) -> bool:
    """Public, as in datatrove's PIIFormatter (FineWeb); no version 1.2.3.4, no part of a longer
    OID, no C++ ad::be.
    """
    if re.search(r"\d\.$", before) or re.match(r"\.\d", after):
        return False
    try:
        ip = ipaddress.ip_address(re.split("[/%]", address)[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip  # ::ffff:93.184.216.34, as servers log it
    except ValueError:
        return False
    if ip.version == 4:
        # two numbers of two digits: not section 4.2.13.1; one real address in 4,000 is lost
        is_version = _VERSION.search(before) or _VERSION_AFTER.match(after)
        return not is_version and ip.is_global and sum(byte > 9 for byte in ip.packed) >= 2
    groups = [group for group in re.split("[/%]", address)[0].split(":") if group]
    # eight pairs are the name of a disk or a port (WWN, EUI-64)
    is_full = len(groups) >= 3 and ("::" in address or max(map(len, groups)) >= 3)
    return ip.is_global and is_full and any(c.isdigit() for c in address)


@lru_cache
def _any_word(words: tuple[str, ...]) -> re.Pattern[str]:
    glued, spaced = (
        [re.escape(w) for w in words if bool(_CJK_LETTER.search(w)) == is_cjk]
        for is_cjk in (True, False)
    )
    return re.compile(
        "|".join([*glued, *([rf"\b(?:{'|'.join(spaced)})\b"] if spaced else [])]) or r"(?!)",
        re.IGNORECASE,
    )


def _mentions(text: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words is in the text."""
    return _may_mention(text, words) and _any_word(words).search(text) is not None


def _may_mention(text: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words, or a longer one, is in the text: ten times as fast as a search for
    whole words.
    """
    lower = text.lower()
    return any(stem in lower for stem in _stems(words))


@lru_cache
def _stems(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words that hold no other, in lower case: one of them is in every text that holds any."""
    lower = {word.lower() for word in words}
    return tuple(
        sorted(word for word in lower if not any(other in word for other in lower - {word}))
    )


@lru_cache
def _context(entity: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in _recognizer(entity, ()).context)


@lru_cache
def _recognizer(entity: str, phone_regions: tuple[str, ...]) -> Any:
    """Presidio's recogniser for an entity, one per process; importing it takes seconds, so when a
    line asks for it.
    """
    import tldextract.tldextract
    from presidio_analyzer import predefined_recognizers as presidio

    # the e-mail recogniser asks it for the public suffix; by default it would download the list and
    # cache it on disk
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    if entity == "PHONE_NUMBER":
        return presidio.PhoneRecognizer(supported_regions=phone_regions)
    if entity == "CREDIT_CARD":
        return presidio.CreditCardRecognizer(
            patterns=[*presidio.CreditCardRecognizer.PATTERNS, *_more_cards()]
        )
    return {
        "CRYPTO": presidio.CryptoRecognizer,
        "EMAIL_ADDRESS": presidio.EmailRecognizer,
        "IBAN_CODE": presidio.IbanRecognizer,
        "IP_ADDRESS": presidio.IpRecognizer,
        "US_SSN": presidio.UsSsnRecognizer,
    }[entity]()


def _more_cards() -> list[Any]:
    """Ranges that Presidio's expression leaves out: Mastercard's 2221 to 2720, old JCB, Maestro of
    12 and 19 digits, Visa of 19."""
    from presidio_analyzer import Pattern

    four = r"[- ]?\d{4}"
    forms = (
        rf"2[2-7]\d\d(?:{four}){{3}}",
        r"(?:2131|1800)\d{11}",
        rf"(?:5[0678]|6\d)\d\d(?:{four}){{2}}",
    )
    long = rf"(?:4\d|5[0678]|6\d)\d\d(?:{four}){{3}}[- ]?\d{{3}}"
    return [
        Pattern(f"more cards {i}", rf"\b{form}\b", 0.3) for i, form in enumerate([*forms, long])
    ]
