"""Presidio's recognizers, one per entity, and what is added to them."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from filters.pii.context import CJK, CJK_LETTER
from filters.pii.phones import blank_whole_numbers
from filters.pii.spans import Hit
from filters.pii.triggers import is_triggered

_CLASSES = {
    "CRYPTO": "CryptoRecognizer",
    "EMAIL_ADDRESS": "EmailRecognizer",
    "IBAN_CODE": "IbanRecognizer",
    "IP_ADDRESS": "IpRecognizer",
    "US_SSN": "UsSsnRecognizer",
}
# Card numbers that Presidio's expression leaves out
_FOUR = r"[- ]?\d{4}"
_MORE_CARDS = (
    rf"2[2-7]\d\d(?:{_FOUR}){{3}}",  # Mastercard's 2221 to 2720
    r"(?:2131|1800)\d{11}",  # old JCB
    rf"(?:5[0678]|6\d)\d\d(?:{_FOUR}){{2}}",  # Maestro of 12 digits
    rf"(?:4\d|5[0678]|6\d)\d\d(?:{_FOUR}){{3}}[- ]?\d{{3}}",  # Visa and Maestro of 19
)

# an address may contain these, but Presidio refuses one that starts with them: a@b.org/c@d.org
_AFTER_MARK = re.compile(r"[/?#][^\s/?#@]{1,64}@")
_MARKS_TO_SPACES = str.maketrans("/?#=&", "     ")
_TO_UPPER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LOWER_IBAN = re.compile(r"[a-z]{2}[0-9]{2}[ -]?[a-z0-9]{4}")
_TOUCHES_CJK = re.compile(rf"[0-9A-Za-z](?:(?<=[{CJK}].)|(?=[{CJK}]))")
# info@firm.comTel, jim@firm.org-Director, ann@firm.de_old: the start of a word after the domain
# ?email=jane@doe.org: Presidio takes all of the address of the page for a part of this one
_PARAMETER = re.compile(r"[=/?&:;](?=[\w.+%-]{1,64}@)")
_NEXT_WORD = re.compile(r"(@[A-Za-z0-9.-]{1,250}?\.[a-z]{2,4})([-._]?[A-Z](?=[a-z])|_)")


def recognize(
    entity: str, text: str, *, offset: int, phone_regions: tuple[str, ...] = ()
) -> Iterator[Hit]:
    """The values that Presidio finds in a text, which begins at `offset` of its line."""
    for variant in variants(entity, text):
        if is_triggered(entity, variant):
            for raw in recognizer(entity, phone_regions).analyze(variant, [entity]):
                yield Hit(entity, offset + raw.start, offset + raw.end, raw.score)


def variants(entity: str, line: str) -> list[str]:
    """The line, and forms of it of equal length in which Presidio finds values that it misses.

    These are account numbers in lower case, and values that touch a CJK letter or the next word.
    """
    forms = [line]
    if entity == "IBAN_CODE" and _LOWER_IBAN.search(line):
        forms.append(line.translate(_TO_UPPER))
    if entity != "PHONE_NUMBER" and not line.isascii() and _TOUCHES_CJK.search(line):
        forms.append(CJK_LETTER.sub(" ", line))
    if entity == "EMAIL_ADDRESS" and _AFTER_MARK.search(line):
        forms.append(line.translate(_MARKS_TO_SPACES))
    if entity == "EMAIL_ADDRESS" and _NEXT_WORD.search(line):
        forms.append(_NEXT_WORD.sub(lambda m: m[1] + " " * len(m[2]), line))
    if entity == "EMAIL_ADDRESS" and _PARAMETER.search(line):
        forms += [_PARAMETER.sub(" ", form) for form in forms]
    return forms


@lru_cache
def context_words(entity: str) -> tuple[str, ...]:
    """Presidio's context words of an entity."""
    return tuple(word.strip() for word in recognizer(entity).context)


@lru_cache
def recognizer(entity: str, phone_regions: tuple[str, ...] = ()) -> Any:
    """Presidio's recognizer of an entity, one per process; importing it takes a second."""
    import tldextract.tldextract

    # Presidio and spaCy import these where they are installed, which takes two seconds more, for
    # models that are not used here
    with _hidden("stanza", "torch", "transformers"):
        from presidio_analyzer import Pattern, predefined_recognizers

    # the e-mail recognizer uses it for public suffixes; by default it downloads the list and caches
    # it on disk
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    if entity == "PHONE_NUMBER":
        return _phone_recognizer(phone_regions)
    if entity == "CREDIT_CARD":
        cards = predefined_recognizers.CreditCardRecognizer
        more = [Pattern(f"more cards {i}", rf"\b{c}\b", 0.3) for i, c in enumerate(_MORE_CARDS)]
        return cards(patterns=[*cards.PATTERNS, *more])
    return getattr(predefined_recognizers, _CLASSES[entity])()


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let imports of these packages fail, unless they have been imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _phone_recognizer(regions: tuple[str, ...]) -> Any:
    """Presidio's, which gives every number to every region, and explains each hit."""
    from phonenumbers import PhoneNumberMatcher
    from presidio_analyzer import RecognizerResult
    from presidio_analyzer.predefined_recognizers import PhoneRecognizer

    class Phones(PhoneRecognizer):
        def analyze(self, text: str, entities: Any, nlp_artifacts: Any = None) -> list[Any]:
            results = []
            for region in regions:
                matches = PhoneNumberMatcher(text, region, leniency=self.leniency or 0)
                numbers = [(match.start, match.end) for match in matches]
                results += [RecognizerResult(entities[0], *n, self.SCORE) for n in numbers]
                text = blank_whole_numbers(text, numbers)
            return self.remove_duplicates(results)

    return Phones(supported_regions=regions)
