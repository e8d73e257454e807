"""Replace personal data by typed placeholders: 'mail to a@b.org' becomes 'mail to <EMAIL_ADDRESS>'.

Presidio's recognizers find the values (microsoft.github.io/presidio/supported_entities). Added:

- speed: a line is given to a recognizer only if it contains a trigger of the entity (`triggers`);
- policy: what has the form of a value but belongs to nobody stays, such as 127.0.0.1, a version
  1.2.3.4.5 or a decimal fraction (`scores`, `phones`);
- secrets: keys of services, searched in the whole text, as private keys span lines (`secrets`).

Names of people and places need a model and are in `ner`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from filters import STRICT, Bound, File
from filters.pii import phones, pieces
from filters.pii.context import any_word, may_mention, mentions_word
from filters.pii.errors import hide_text
from filters.pii.folding import Folded, fold
from filters.pii.recognizers import context_words, recognize
from filters.pii.scores import BARE_DIGITS, LABELED, score, written_score
from filters.pii.secrets import find_secrets
from filters.pii.spans import (
    Hit,
    Scrubbed,
    Span,
    join_lines,
    replace_hits,
    spans_by_line,
    without_overlap,
)
from filters.pii.surrogates import inert, load_key, surrogate
from filters.pii.triggers import UNAMBIGUOUS, hinted_entities, is_triggered, triggered_lines
from filters.suggest import did_you_mean

_ENTITIES = (
    *("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE"),
    *("IP_ADDRESS", "US_SSN", "CRYPTO", "SECRET"),
)
_PHONE_REGIONS = ("US", "GB", "DE", "FR", "IL", "IN", "CA", "BR")  # Presidio's
# Presidio's words without 'number' (orders and parts have one), and the labels on pages
_PHONE_WORDS = (
    "phone telephone tel cell cellphone mobile call fax text sms whatsapp "
    "toll hotline helpline telefon mobil handy téléphone portable teléfono móvil telefone telefono"
)


def _known_entities(entities: tuple[str, ...]) -> tuple[str, ...]:
    return _check_known(entities, "entity", _ENTITIES)


def _known_regions(regions: tuple[str, ...]) -> tuple[str, ...]:
    import phonenumbers

    return _check_known(regions, "phone region", sorted(phonenumbers.SUPPORTED_REGIONS))


def _check_known(names: tuple[str, ...], what: str, known: Iterable[str]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} '{name}'{did_you_mean(name, known)}")
    return names


@dataclass(frozen=True, config=STRICT)
class Pii:
    """Replace e-mail addresses, phone, card, account and social security numbers, public IP and
    Bitcoin addresses, and secrets.

    `mode` says what replaces a value: its type, or a surrogate of the same kind that belongs to
    nobody. With the same key in `key_file` (16 bytes or more; keep it from those who get the
    corpus) a value always gets the same surrogate. Secrets become their type in both modes. `count`
    bounds the number of replaced values of a document. Scrubbing twice changes nothing, and
    placeholders that were in the text stay.
    """

    entities: Annotated[tuple[str, ...], AfterValidator(_known_entities)] = _ENTITIES
    # numbers that start with + are recognized for every country
    phone_regions: Annotated[tuple[str, ...], AfterValidator(_known_regions)] = _PHONE_REGIONS
    # Presidio's scores: 1 for a valid checksum or domain, .6 IP, .5 SSN with separators, .4 phone,
    # .05 bare digits. At .4 a number in the format of phone numbers passes, and bare digits need a
    # context word near them.
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.4
    phone_context: tuple[str, ...] = tuple(_PHONE_WORDS.split())
    mode: Literal["placeholder", "surrogate"] = "placeholder"
    key_file: File = ""
    count: Bound = None
    # "all": also private ones, such as 10.1.2.3 and fd12::1; never those of no machine in
    # particular, such as 127.0.0.1
    ip_addresses: Literal["public", "all"] = "public"

    def check(self, languages: tuple[str, ...]) -> None:
        """ValueError if surrogates are configured without a usable key."""
        if self.mode == "surrogate":
            if not self.key_file:
                raise ValueError(
                    'pii.mode = "surrogate" needs a key: '
                    "name a file of 16 bytes or more as pii.key_file"
                )
            load_key(self.key_file)

    def scrub(self, text: str) -> Scrubbed:
        """The text with placeholders or surrogates, and where they are; defined for every string.

        Errors do not quote the text.
        """
        if self.mode == "surrogate":
            load_key(self.key_file)  # its errors may be shown in full
        return hide_text("pii", self._scrub, text)

    def _scrub(self, text: str) -> Scrubbed:
        """Replace secrets, then other values line by line, until there is nothing more to replace.

        A replacement can turn what stands next to it into a value, or into the label of one.
        """
        scrubbed, done = Scrubbed(text, []), frozenset[str]()
        while True:
            again = self._scrub_secrets(scrubbed)
            if again is not scrubbed:
                done = frozenset()
            seen = self._readable(again.text).text
            checked = self._readable(text).text if done else ""
            present = done.union(self._present(seen, checked=checked))
            if present == done:
                return again
            scrubbed, done = self._scrub_lines(again, present), present

    def _present(self, text: str, *, checked: str = "") -> list[str]:
        """The entities that a text may contain: for most texts none, and they are done.

        Lines that are in the text `checked` too contain none. (A label that a replacement has set
        free was in that text as a part of a longer word.)
        """
        lines = text
        if checked:
            old = set(checked.split("\n"))
            lines = "\n".join(line for line in text.split("\n") if line not in old)
        hinted = hinted_entities(lines)
        return [
            entity
            for entity in self.entities
            if entity in hinted and self._may_hold(entity, lines, text, mentions=may_mention)
        ]

    def _may_hold(
        self,
        entity: str,
        text: str,
        context: str,
        *,
        mentions: Callable[[str, tuple[str, ...]], bool],
    ) -> bool:
        """Whether a text may contain a value; `context` is where its context words would be."""
        if not is_triggered(entity, text):
            return False
        if entity not in UNAMBIGUOUS or self.min_score <= BARE_DIGITS:
            return True
        if UNAMBIGUOUS[entity].search(text):
            return True
        is_phone = entity == "PHONE_NUMBER"
        return mentions(context, self._phone_words if is_phone else context_words(entity))

    @property
    def _phone_words(self) -> tuple[str, ...]:
        return self.phone_context + phones.LABELS

    def _scrub_secrets(self, scrubbed: Scrubbed) -> Scrubbed:
        while "SECRET" in self.entities and (
            places := find_secrets(self._without_surrogates(scrubbed.text))
        ):
            hits = [Hit("SECRET", start, end, 1.0) for start, end in places]
            scrubbed = replace_hits(*scrubbed, hits, self._replacement)
        return scrubbed

    def _scrub_lines(self, scrubbed: Scrubbed, entities: frozenset[str]) -> Scrubbed:
        """Replace values line by line, as no value but a secret continues on the next line.

        A number's label may be on the line above. That line is read scrubbed, as a second scrub
        would read it.
        """
        lines, spans = scrubbed.text.split("\n"), spans_by_line(scrubbed)
        for i in triggered_lines(self._readable(scrubbed.text).text, entities):
            above = self._readable(lines[i - 1]).text if i else ""
            lines[i], spans[i] = self._scrub_line(lines[i], spans.get(i, []), above, entities)
        return join_lines(lines, spans)

    def _scrub_line(
        self, line: str, spans: list[Span], above: str, entities: frozenset[str]
    ) -> Scrubbed:
        """Replace until nothing is found, as what is left beside a replaced value may be a value.

        This ends: every value contains a digit or an @, no placeholder does, and no value contains
        < or >, which stand for surrogates here. It takes few rounds for a line of any length, as a
        replacement moves the cuts of its own piece only (`cut_piece`).
        """
        while True:
            folded = self._readable(line)
            hits = without_overlap(self._find(folded.text, above, entities))
            if not hits:
                return Scrubbed(line, spans)
            hits = [folded.original(hit) for hit in hits]
            line, spans = replace_hits(line, spans, hits, self._replacement)

    def _readable(self, text: str) -> Folded:
        return fold(self._without_surrogates(text))

    def _without_surrogates(self, text: str) -> str:
        return inert(text) if self.mode == "surrogate" else text

    def _replacement(self, entity: str, value: str) -> str:
        if self.mode == "surrogate":
            return surrogate(entity, fold(value).text, key=load_key(self.key_file))
        return f"<{entity}>"

    def _find(self, line: str, above: str, entities: frozenset[str]) -> Iterator[Hit]:
        """The values of a line, piece by piece.

        A value that ends at a cut through a word may continue after it: it begins the next piece.
        """
        start, last = 0, None
        while start < len(line):
            piece = pieces.cut_piece(line, start)
            near = "" if piece.low else above
            before = last.moved(-piece.low) if last and last.start >= piece.low else None
            found = self._find_in_piece(piece.alone(), near, entities, before)
            hits = [hit.moved(piece.low) for hit in found]
            last = max(hits, key=lambda hit: hit.end, default=None)
            if piece.is_between_words:
                yield from hits
                start = piece.end
                continue
            cut = min((hit.start for hit in hits if hit.end >= piece.end), default=piece.end)
            whole = [hit for hit in hits if hit.end <= cut and hit.end < piece.end]
            yield from whole
            # after the last value, where its placeholder will end and the next round will cut
            start = max((hit.end for hit in whole), default=cut if cut > start else piece.end)

    def _find_in_piece(
        self, piece: pieces.Piece, above: str, entities: frozenset[str], before: Hit | None
    ) -> Iterator[Hit]:
        """The values in a piece, after the value `before`; telephone numbers last: those that are
        certainly another value are not read again for each region.
        """
        line, start, end, *_ = piece
        for entity in sorted(entities, key="PHONE_NUMBER".__eq__):
            near = f"{above[-40:]}\n{piece.line}"
            if not self._may_hold(entity, piece.line, near, mentions=mentions_word):
                continue
            if entity == "PHONE_NUMBER":
                hits, words = self._find_phones(piece, above), self.phone_context
            else:
                hits = recognize(entity, line[start:end], offset=start)
                words = context_words(entity)
            earlier, private = before, self.ip_addresses == "all"
            for hit in sorted(hits, key=lambda hit: (hit.start, -hit.end)):
                sure = score(hit, line, above, words, earlier=earlier, private=private)
                if sure >= self.min_score:
                    yield hit._replace(score=sure)
                    earlier = hit
                    piece = piece.blanked(hit.start, hit.end) if sure == 1 else piece

    def _find_phones(self, piece: pieces.Piece, above: str) -> Iterator[Hit]:
        """Labeled and international numbers, and those that the phonenumbers package knows.

        Of the latter, a number in no format of phone numbers scores as bare digits, and one whose
        digits no region groups so needs a context word too.
        """
        line, start, end, *_ = piece
        shown = phones.blank_non_phones(line)
        if self.min_score > BARE_DIGITS:
            shown = phones.blank_unlikely_digits(shown, above, any_word(self._phone_words))
        announced = [(span, LABELED) for span in phones.labeled_numbers(shown, above)]
        announced += [(span, 0.4) for span in phones.international_numbers(shown)]
        for (begin, stop), sure in announced:
            if start <= begin < end:
                yield Hit("PHONE_NUMBER", begin, stop, sure)
        for hit in sorted(
            recognize(
                "PHONE_NUMBER", shown[start:end], offset=start, phone_regions=self.phone_regions
            ),
            key=lambda hit: hit.start,
        ):
            sure = written_score(hit, piece.line, above, self.phone_regions)
            number_start = phones.skip_unclosed_bracket(line, hit.start, hit.end)
            yield hit._replace(start=number_start, score=sure)
            if sure >= hit.score:
                piece = piece.blanked(hit.start, hit.end)  # it is no part of the number after it
