"""Formats of phone numbers: which text the phone recognizer reads, and which of its hits count.

The phonenumbers package accepts any seven to fifteen digits that some country could have assigned,
however they are grouped: two numbers of a table, a size 600/800/1000. And it knows no number
outside its tables. So a number without a context word must be in a format of phone numbers
(`PHONE_FORMAT`), while one right after its label (`labeled_numbers`) and one with a country code
(`international_numbers`) need not be known to it.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

# What phonenumbers allows between two blocks of digits: its _VALID_PUNCTUATION, up to four in a row
BETWEEN = r"[-x‐-―−ー－／ \xa0\xad\u200b\u2060\u3000()（）［］.\[\]/~⁓∼～]{0,4}"

# The shortest subscriber numbers in wide use have seven digits; for region DE Presidio takes the
# year 1648 for a pager.
SEVEN_DIGITS = re.compile(rf"\d(?:{BETWEEN}\d){{6}}")

_SPACE = r"[ \xa0\u2009]"
_DASH = r"[-\u2010-\u2013]"
_REST_OF_DATE = (
    # after its first digit
    r"(?:(?:(?<=1)9|(?<=2)0)\d\d[-.][01]\d[-.][0-3]\d|(?<=[0-3])\d[-.][0-3]\d[-.](?:19|20)\d\d)(?!\d)"
    rf"|(?:(?:(?<=1)9|(?<=2)0)\d\d{_SPACE}[01]\d{_SPACE}[0-3]\d|(?<=[0-3])\d{_SPACE}[0-3]\d{_SPACE}(?:19|20)\d\d)(?!{_SPACE}?\d)"
)
_MORE = r"(?![-‐-–./]?\d)"
_NO_MORE_BEFORE = rf"(?<!\d[-‐-–./]\d)(?<!\d{_SPACE}\d)"
# The formats of a number without a label, after its first character. Each needs a + or (), a
# leading 0, or a grouping that tables rarely have and that does not continue on either side; two
# blocks only as in 98765 43210 (India) and 212-5550147.
_FORMATS = (
    rf"(?<=[+＋]){BETWEEN}\d(?:{BETWEEN}\d){{6}}",
    rf"(?<=[(（\[]){_SPACE}?\d(?:[-/ \xa0]?\d){{0,5}}{_SPACE}?[)）\]]"
    r"(?:[-‐-―−－./ \xa0\u2009]{0,3}\d){5}",
    rf"(?<=0)(?<!\d[-./:]\d)(?<!\d{_SPACE}\d)\d(?:{BETWEEN}\d){{5}}",
    rf"(?<=1)[-. \xa0]{{0,2}}\(\d{{3}}\)(?:{BETWEEN}\d){{7}}",
    rf"(?<!\d[-‐-–./]\d)(?:(?<=1){_DASH}\d)?\d{{1,4}}+(?:{_DASH}\d{{2,5}}+){{2,4}}{_MORE}",
    rf"(?<!\d[-./]\d)(?!\d{{0,2}}(?:\.\d{{1,3}}){{3}}(?!\.?\d))\d{{1,3}}+(?:\.\d{{2,4}}+){{2,4}}{_MORE}",
    # after a 1, as in North America: 1.2.840.113549 is no phone number, nor is 1 754 696 090
    rf"(?<=1)(?<!\d[-./]\d)\.\d{{3}}\.\d{{3}}\.\d{{4}}{_MORE}",
    rf"{_NO_MORE_BEFORE}"
    rf"(?:(?<=1){_SPACE}\d(?=\d\d(?:{_SPACE}|/)\d{{3}}(?:{_SPACE}|{_DASH})\d{{4}}(?!\d)))?"
    rf"\d{{1,3}}+(?:{_SPACE}|/)\d{{2,5}}+(?:(?:{_SPACE}|{_DASH})\d{{2,5}}+){{1,3}}"
    rf"{_MORE}(?!{_SPACE}\d)",
    rf"(?<=[6-9]){_NO_MORE_BEFORE}\d{{4}}[- \xa0]\d{{5}}{_MORE}(?!{_SPACE}\d)",
    rf"(?<=[2-9])(?<!\d[-‐-–./]\d)\d\d{_DASH}\d{{7}}{_MORE}",
    # Russia's 8 (495) 123-45-67
    rf"(?<=[78]){_NO_MORE_BEFORE}(?:{_SPACE}|{_DASH})?\(?\d{{3}}\)?"
    rf"(?:{_SPACE}|{_DASH})?\d{{3}}(?:(?:{_SPACE}|{_DASH})\d\d){{2}}{_MORE}(?!{_SPACE}\d)",
)
# begins with a class of characters, which makes the search fast
PHONE_FORMAT = re.compile(rf"[+＋(（\[\d](?<!\d\d)(?!{_REST_OF_DATE})(?:{'|'.join(_FORMATS)})")

# Not a phone number, but often valid as one in some region: dates, ranges of years, dotted quads
# (except after '+45 '), degrees, times, fractions; and tables: more than 40 digits in a row, as of
# four numbers, none of them in a phone format. The phone recognizer does 15 kB/s on them.
_NO_PHONE = re.compile(
    r"(?<![\d.+-])(?<!\+\d )(?<!\+\d\d )(?<!\+\d{3} )"
    r"(?:[12]\d{3}([-/.])[01]?\d\1[0-3]?\d(?![.-]?\d)|[0-3]?\d([-/.])[0-3]?\d\2[12]\d{3}(?![.-]?\d)"
    r"|[0-3]?\d[ \xa0](?<!\d \d.)(?<!\d \d\d.)[0-3]?\d[ \xa0](?:19|20)\d\d(?![-. \xa0]?\d)"
    r"|(?:19|20)\d\d[ \xa0](?<!\d \d{4}.)[01]?\d[ \xa0][0-3]?\d(?![-. \xa0]?\d)"
    r"|(?:1\d|20)\d\d ?[-‐-―/] ?(?:1\d|20)\d\d(?!\d)|[1-9]\d{2,3}/\d{2,4} ?[–—] ?1\d{3}(?!\d)"
    r"|\d{1,3}(?:\. ?\d{1,3}){3}(?: ?/ ?\d{1,3})?(?!\.?\d))"
    r"|(?<!\d)\d\d?:\d\d(?::\d\d)?(?!\d)|\+(?<=[Zz][Ii][Pp].)4\b"
    r"|(?<![\d.])0\.\d+(?!\.?\d)"
    # degrees; the numbers of the registries of domains, +1.2125550147, have eight digits and more
    r"|\+(?<![\w+].)\d{1,3}\.(?:\d{4,7}(?!\d)|\d{4,}[,; ]{1,2}[-+]?\d{1,3}\.\d{4,}(?!\d))"
)
_TABLE = re.compile(rf"\d(?:{BETWEEN}\d){{40,}}")

# Right before a number these always mean a phone number …
_PHONE = (
    r"(?:tele)?phones?|t[eé]l(?:[eé]phone)?|tel[eé]fon[eo]?|fax|telefax|whatsapp|wa\.me/"
    r"|fon[eo]?|тел(?:ефон)?|τηλ(?:έφωνο)?|tlf|tlph|tfn|telefoon|puhelin|rufnummer|durchwahl|gsm"
    r"|(?:my|your|h(?:is|er)|our|their|(?:tele)?phone|contact|mobile|cell|direct|office|home|work|fax)"
    r" (?:number|no\.)(?: (?:is|was|at|to|from|as))?|dial(?:l?ed|l?ing)?|my registered|telefonn\w+"
    r"|hotline|helpline|toll[- ]free|(?:new|old) number(?: is)?"
    r"|(?:update|change)d? (?:the|my|his|her|our) (?:\w{1,9} )?number (?:from|to)"
    r"|(?:my|your|h(?:is|er)|our|their) (?:cell|mobile|landline)(?: is)?"
)
# … also with up to three words before the preposition, as in 'not answering my calls at'
_CALLING = (
    r"(?:call|ring|reach|phone|text|contact|dial|message|messages|sms|answer|fax|whatsapp)(?:s|ed|ing)?"
    r"(?: [\w']{1,12}){0,3}?(?: (?:at|on|to|via|from)\b|:)"
)
_PHONE_CJK = "电话|電話|手机|手機|전화"  # also inside a sentence
# … and these, which have other meanings too (a cell, a mobile), only with a colon.
_PHONE_COLON = (
    r"mobile|cell|cellphone|cellular|m[oó]vil|portable|mobil|handy|desk|landline|ph"
    r"|contact|reservations?|bookings?|enquiries|inquiries|customer service|reception|emergency"
)
_LABEL = (
    rf"(?:(?<![^\W\d])(?:{_PHONE}|{_CALLING})(?:\b|(?<=[/:]))(?: ?(?:no|nr|number)\b)?[.:#=]{{0,2}}"
    rf"|(?:{_PHONE_CJK})[:：]?"
    rf"|(?<![^\W\d])(?:{_PHONE_COLON})(?: ?(?:phone|no|nr|number))?\b[.]?[:：])"
)
_NUMBER = r"\+?\(?\d(?:[-‐-– ./()\xa0]{0,3}\d){6,14}"
_AFTER_LABEL = re.compile(rf"{_LABEL}{_SPACE}{{0,3}}({_NUMBER})(?![-/]?\d|\.\d)", re.IGNORECASE)
# … or after it, at the end of a line or of its part: '69 987 88 37 office'
_LABEL_AFTER = (
    r"(?:[-– \xa0,]{0,3}\(?(?:office|fax|mobile|cell|cellphone|home|work|tel|telephone|phone|direct"
    r"|landline|whatsapp|büro|privat|portable)\b\)?(?=\s*(?:\Z|[\\,;|()/.]))"
    r"| is (?:my|the|his|her|our|your) (?:(?:tele)?phone |mobile |cell )?number\b)"
)
_BEFORE_LABEL = re.compile(rf"(?<![\w.+-])({_NUMBER}){_LABEL_AFTER}", re.IGNORECASE)
_NEXT = re.compile(
    rf"\s*(?:[,;/|&]|\b(?:and|or|to|und|oder|ou|et|y)\b)\s*({_NUMBER})(?![-/]?\d|\.\d)"
)
# 1 234 567 is a quantity where a noun follows
_QUANTITY = re.compile(r"[1-9]\d{0,2}(?:[ \xa0.]\d{3})+")
_NOUN_AFTER = re.compile(
    r" (?!(?:and|or|if|for|to|from|during|when|at|before|after|in|with|about|any)\b)[^\W\d_]{2}"
)
_LABEL_ENDS = re.compile(rf"{_LABEL}\s*\Z", re.IGNORECASE)
_BEGINS = re.compile(rf"\s*({_NUMBER})(?![-/]?\d|\.\d)")
_PLUS = re.compile(r"(?<![\w+])\+[1-9](?:[-‐-– .()\xa0]{0,3}\d){7,14}(?![-/.]?\d)")


# a word of each label
_LABEL_WORDS = (
    "phone telephone tel fax telefax whatsapp call ring reach mobile cell cellphone "
    "cellular desk landline hotline tél téléphone teléphone télephone telefon teléfon "
    "telefone teléfone telefono teléfono movil móvil portable mobil handy ph tlf tlph "
    "тел телефон τηλ τηλέφωνο 电话 電話 手机 手機 전화 wa.me tfn telefoon puhelin rufnummer "
    "durchwahl gsm number dial text contact message messages sms answer answering registered "
    "fon fono fone contact reservation reservations booking bookings enquiries inquiries "
    "reception emergency helpline office home work direct büro privat telefonnummer"
)
LABELS = tuple(_LABEL_WORDS.split())


def blank_non_phones(line: str) -> str:
    """Blank what is certainly no phone number; all other characters keep their positions."""
    line = _NO_PHONE.sub(_blank, line)
    return _TABLE.sub(_blank_table, line)


def _blank_table(match: re.Match[str]) -> str:
    if PHONE_FORMAT.search(match.string, max(0, match.start() - 2), match.end()):
        # numbers between slashes: the phonenumbers package would try the rest after each of them
        return match[0].replace("/", "\0")
    return _blank(match)


def _blank(match: re.Match[str]) -> str:
    return "\0" * len(match[0])


_DIGIT_BEFORE = re.compile(rf"\d{BETWEEN}\Z")
_DIGIT_AFTER = re.compile(rf"{BETWEEN}\d")


def blank_whole_numbers(text: str, numbers: Sequence[tuple[int, int]]) -> str:
    """Blank the numbers that touch no digits but of each other: no region can find more there."""
    without = _with_blanks(text, numbers)
    return _with_blanks(
        text,
        [
            (start, end)
            for start, end in numbers
            if not _DIGIT_BEFORE.search(without[max(0, start - 5) : start])
            and not _DIGIT_AFTER.match(without, end)
        ],
    )


def _with_blanks(text: str, spans: Sequence[tuple[int, int]]) -> str:
    parts, at = [], 0
    for start, end in spans:
        parts += [text[at:start], "\0" * (end - start)]
        at = end
    return "".join([*parts, text[at:]])


_CHAIN = re.compile(rf"\d(?:{BETWEEN}\d){{6,}}")
_DIGIT = re.compile(r"\d")
_LEAD, _EXTENSION = 12, 40  # characters: '+ (', and ' ext. 12345'
_REACH = 80  # characters in which a context word can be, and the word itself


def blank_unlikely_digits(line: str, above: str, words: re.Pattern[str]) -> str:
    """Blank digits that are neither in a phone format nor near one of `words`.

    The phonenumbers package would try to parse every year, for each region.
    """
    parts, at = [], 0
    for match in _CHAIN.finditer(line):
        start, end = max(at, match.start() - _LEAD), match.end() + _EXTENSION
        near = (above[-_REACH:] + "\n" if start < _REACH else "") + line[
            max(0, start - _REACH) : end + _REACH
        ]
        if PHONE_FORMAT.search(line, max(0, match.start() - _LEAD), match.end()) or words.search(
            near
        ):
            parts += [_DIGIT.sub("\0", line[at:start]), line[start:end]]
            at = end
    return "".join([*parts, _DIGIT.sub("\0", line[at:])])


_OPENED = re.compile(rf"[(（\[]{_SPACE}?")


def is_in_format(line: str, start: int, end: int) -> bool:
    """Whether line[start:end] is in a format of phone numbers that needs no context word."""
    opened = _OPENED.match(line, start)
    written = PHONE_FORMAT.match(line, start) or (opened and PHONE_FORMAT.match(line, opened.end()))
    return written is not None and written.end() <= end


def skip_unclosed_bracket(line: str, start: int, end: int) -> int:
    """The start of line[start:end] without an opening bracket that is not closed within it.

    In '(0171 2345678)' only the number itself is replaced.
    """
    opened = _OPENED.match(line, start)
    return opened.end() if opened and not re.search(r"[)）\]]", line[start:end]) else start


def labeled_numbers(line: str, above: str) -> Iterator[tuple[int, int]]:
    """Numbers of seven to fifteen digits beside their label, which may be on the line above."""
    if _LABEL_ENDS.search(above[-40:]) and (match := _BEGINS.match(line)):
        yield match.span(1)
    for match in _AFTER_LABEL.finditer(line):
        if not (_QUANTITY.fullmatch(match[1]) and _NOUN_AFTER.match(line, match.end(1))):
            yield match.span(1)
            yield from _listed(line, match)
    for match in _BEFORE_LABEL.finditer(line):
        yield match.span(1)


def _listed(line: str, first: re.Match[str]) -> Iterator[tuple[int, int]]:
    """Numbers of the same form that follow a labeled one: 'Tel.: 624-6456; 225-8452'."""
    shape, end = re.sub(r"\d", "0", first[1]), first.end(1)
    while (match := _NEXT.match(line, end)) and re.sub(r"\d", "0", match[1]) == shape:
        yield match.span(1)
        end = match.end(1)


def international_numbers(line: str) -> Iterator[tuple[int, int]]:
    """Numbers that start with + and a country code and have a length used in that country."""
    for match in _PLUS.finditer(line):
        if _is_possible(re.sub(r"\D", "", match[0])):
            yield match.span()


# + or 00; an area code in brackets; or one after a 0, as Germans and their neighbors group at will
_PREFIX = re.compile(
    r"\D{0,2}(?:[+＋]|00)|(?:[178][-. ]{0,2})?\(\d{2,5}\)[-. ]{0,2}\d"
    r"|\(?0[1-9]\d{1,4}\)?[-/ –]{1,3}[1-9]|0\d(?: \d\d)? ?/ ?\d"
    r"|(?:1[-. ])?\d{3}([-. ])\d{3}\1\d{4}\Z"  # of North America, also where it was never assigned
)


@lru_cache(maxsize=1024)
def is_plausible(value: str, regions: tuple[str, ...]) -> bool:
    """Whether the digits are grouped as some region does, or have a prefix that says enough."""
    import phonenumbers

    if _PREFIX.match(value):
        return True
    strict = phonenumbers.Leniency.STRICT_GROUPING
    return any(
        phonenumbers.PhoneNumberMatcher(value, region, leniency=strict, max_tries=5).has_next()
        for region in regions
    )


@lru_cache(maxsize=1024)
def _is_possible(digits: str) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_possible_number(phonenumbers.parse("+" + digits, None))
    except phonenumbers.NumberParseException:
        return False
