"""Confidence that a hit is personal data: Presidio's score, corrected by the text around it."""

import ipaddress
import re

from filters.pii import identifiers, phones
from filters.pii.context import any_word
from filters.pii.spans import Hit

BARE_DIGITS = 0.05  # Presidio's score for nine digits as an SSN, with nothing else to support it
MISGROUPED = 0.3  # a phone number whose digits no region groups so
LABELED = 0.75  # Presidio's score for a phone number with a context word
_NEAR = 40  # characters before a value in which a context word counts

# --- phone and social security numbers
_CATALOG = re.compile(
    r"\b(?:(?:ISBN|ISSN|EAN|UPC|DOI|OID)\b(?:-1[03])?"
    r"|(?:SKU|P/N|item|model|serial)\b(?:[ -]?(?:no|nr|number|code)\b)?"
    # 'to order 800 …' and 'part 2' alone do not count
    r"|(?:part|order)[ -]?(?:no|nr|number|code|id)\b|(?:part|order) ?(?=#))[.\s:#]*$",
    re.IGNORECASE,
)
_PART_BEFORE = re.compile(r"\d[.:]\Z")  # of a time or a fraction
_PART_AFTER = re.compile(r"[.:]\d|\.[a-z]")  # … or of a host name: 192-168-0-131.example.net
# another number beside a social security number: both are cells of a table; one with points,
# JAMA 279.18.2368, is a place in a journal
_CELL_BEFORE, _CELL_AFTER = re.compile(r"\d[ \t]+\Z"), re.compile(r"[ \t]+\d")
# a MAC address or a UUID around the value
_HEX = "[0-9A-Fa-f]"
_HEX_BEFORE = re.compile(
    rf"(?<![\w.])(?:(?:{_HEX}{{2}}-){{2,}}|{_HEX}{{8}}-(?:{_HEX}{{4}}-){{0,3}}|(?:{_HEX}{{4}}-){{2,3}})\Z"
)
_HEX_AFTER = re.compile(rf"-(?=\d*[A-Fa-f])(?=[A-Fa-f]*\d){_HEX}{{2,12}}\b")
# a version, a row of a table or a postal code, unless a label says that it is a phone number
_AMBIGUOUS = re.compile(
    r"(?!1\.\d{3}\.\d{3}\.\d{4}\Z|\d+\.\d+\.\d{4}\.\d{4}\Z)\d{1,2}(?:\.\d+){3}"
    r"|[1-9]\d(?: \d\d){3,}|\d{5}-\d{4}"
)
_ZIP = re.compile(r"\d{5}-\d{4}")  # Boston, MA 02110-1301
_STATE_BEFORE = re.compile(r"\b[A-Z]{2}\.?[ \xa0]+$")

# --- cards
# First digits and lengths of cards, from the issuers' ranges (ISO/IEC 7812): Visa, Mastercard,
# American Express, Diners, JCB, Discover, UnionPay, Maestro, RuPay, Mir, UATP.
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[0-8]\d{14}|2[2-7]\d{14}"
    r"|3(?:[47]\d{13}|[0689]\d{12}|[0689]\d{14}|5\d{14})|8[12]\d{14}"
    r"|(?:2131|1800)\d{11}|1\d{14}|(?:5[0678]|6\d)\d{10,17}"
)
_CARD_BLOCKS = re.compile(r"\d+|\d{4}([ -])\d{4}\1\d{4}\1\d{3,4}|\d{4}([ -])\d{6}\2\d{4,5}")
_FRACTION = re.compile(r"\d\.\d")
_MORE_BEFORE = re.compile(r"\d[- ]\Z")
# of a card: 0827, and the code on its back
_EXPIRY = r" (?:0[1-9]|1[0-2])[2-4]\d(?: \d{3})?(?![- ]?\d)"
_MORE_AFTER = re.compile(rf"(?!{_EXPIRY})[- ]\d{{4}}(?!\d)")

# --- IP addresses
_VERSION_BEFORE = re.compile(
    r"(?:\bv|\b(?:ver|versions?|releases?|released|build|firmware|update|patch|rev|revision|driver"
    r"|kernel|section|chapter|clause|oid)[.:]?)\s?$|[A-Za-z_](?<!\bip)(?<!_ip)[-_]$"
    r"|\w(?<!\bip)(?<!\bhost)(?<!\btcp)(?<!\budp)(?<!\bhttp)(?<!\bhttps)/$",
    re.IGNORECASE,
)
_VERSION_AFTER = re.compile(
    # but 93.184.216.34-93.184.216.40 is a range of addresses
    r"-(?!\d{1,3}(?:\.\d{1,3}){2})\d|[-.~+]?(?:rc|beta|alpha|tar|zip|exe|dmg|deb|rpm|jar|msi|dll)\b|-x(?:64|86)\b",
    re.IGNORECASE,
)

# of documentation (RFC 5737, RFC 3849), and broadcast
_EXAMPLES = [
    ipaddress.ip_network(net)
    for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "0.0.0.0/8", "2001:db8::/32")
]


def score(
    hit: Hit,
    line: str,
    above: str,
    words: tuple[str, ...],
    *,
    earlier: Hit | None = None,
    private: bool = False,
) -> float:
    """The hit's score, raised if a context word is near, as Presidio does; 0 for a false positive.

    `above` is the line before, whose end is context too. `earlier` is the value before on the line,
    read as its placeholder: of thousands of cards in a row, none must wait for the one before.
    `private` IP addresses count only if asked for.
    """
    value, after = line[hit.start : hit.end], line[hit.end : hit.end + 12]
    before = line[max(0, hit.start - _NEAR) : hit.start]
    if earlier is not None and hit.start - _NEAR < earlier.end <= hit.start:
        start = max(0, earlier.start - _NEAR)
        before = f"{line[start : earlier.start]}<{hit.entity}>{line[earlier.end : hit.start]}"
    before = f"{above[-_NEAR:]}\n{before}"[-_NEAR:]
    if hit.entity == "IP_ADDRESS":
        if identifiers.has_label(line, hit.start, hit.end):
            return 0
        return hit.score if _is_address(value, before, after, private=private) else 0
    if hit.entity == "CREDIT_CARD":
        return _card_score(value, before, after, any_word(words))
    if hit.entity in ("PHONE_NUMBER", "US_SSN"):
        return _number_score(hit, line, before, after, any_word(words))
    return hit.score


def written_score(hit: Hit, line: str, above: str, regions: tuple[str, ...]) -> float:
    """The score of a phone number that the phonenumbers package knows, by the way it is written."""
    if not phones.is_in_format(line, hit.start, hit.end):
        return BARE_DIGITS
    value = line[hit.start : hit.end]
    alone = value == line.strip() and any(map(str.islower, above))  # under an address
    return hit.score if alone or phones.is_plausible(value, regions) else MISGROUPED


def _number_score(hit: Hit, line: str, before: str, after: str, context: re.Pattern[str]) -> float:
    score, value = hit.score, line[hit.start : hit.end]
    if hit.entity == "PHONE_NUMBER":
        is_zip_code = _ZIP.fullmatch(value) and _STATE_BEFORE.search(before)
        if not phones.SEVEN_DIGITS.search(value) or ".." in value or is_zip_code:
            return 0
        if score < LABELED and (value.isdecimal() or _AMBIGUOUS.fullmatch(value)):
            score = BARE_DIGITS
    if _CATALOG.search(before) or _PART_BEFORE.search(before) or _PART_AFTER.match(after):
        return 0
    if value[0].isdigit() and (_HEX_BEFORE.search(before) or _HEX_AFTER.match(after)):
        return 0
    unsure = score < LABELED and value[0] not in "+＋"
    if unsure and identifiers.is_named(line, hit.start, hit.end):
        return 0
    if context.search(before) or context.search(after):
        return max(score, min(score + 0.35, LABELED), 0.4)
    if unsure and identifiers.has_own_form(line, hit.start, hit.end):
        return 0
    if hit.entity == "US_SSN" and (
        "." in value or _CELL_BEFORE.search(before) or _CELL_AFTER.match(after)
    ):
        return BARE_DIGITS
    return score


def _card_score(value: str, before: str, after: str, context: re.Pattern[str]) -> float:
    """1 for the usual lengths in the usual blocks; other numbers need a context word.

    A tenth of all numbers pass Luhn's test, so rare lengths, other blocks, UATP's numbers and
    possible parts of a table or a fraction are not enough on their own.
    """
    digits = re.sub(r"\D", "", value)
    if not _CARD.fullmatch(digits):
        return 0
    is_fraction = value.isdecimal() and (
        _FRACTION.match(before[-2:] + "0") or _FRACTION.match("0" + after)
    )
    is_part = is_fraction or _MORE_BEFORE.search(before) or _MORE_AFTER.match(after)
    usual = len(digits) in (14, 15, 16) and digits[0] != "1" and _CARD_BLOCKS.fullmatch(value)
    if (usual and not is_part) or context.search(before) or context.search(after):
        return 1.0
    return BARE_DIGITS


def _is_address(address: str, before: str, after: str, *, private: bool) -> bool:
    """Whether it is a public IP address, as in datatrove's PIIFormatter (FineWeb), or a private
    one.

    A version 1.2.3.4, a part of a longer OID and C++ such as ad::be are not.
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
        is_version = _VERSION_BEFORE.search(before) or _VERSION_AFTER.match(after)
        if private and _is_private(ip):
            return not is_version
        return not is_version and ip.is_global and sum(byte > 9 for byte in ip.packed) >= 2
    if private and _is_private(ip):
        return True
    groups = [group for group in re.split("[/%]", address)[0].split(":") if group]
    # eight pairs are the name of a disk or a port (WWN, EUI-64)
    is_full = len(groups) >= 3 and ("::" in address or max(map(len, groups)) >= 3)
    return ip.is_global and is_full and any(c.isdigit() for c in address)


def _is_private(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is an address of one machine in a private network."""
    nobody = ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_reserved
    return (
        not ip.is_global
        and not nobody
        and not any(ip in net for net in _EXAMPLES if net.version == ip.version)
    )
