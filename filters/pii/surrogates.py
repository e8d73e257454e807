"""Surrogates: values that belong to nobody, chosen by a keyed hash of the value they replace.

The same value gets the same surrogate in every document. Surrogates come from ranges that standards
keep free, or with check digits that are never valid. Their number is limited (IPv4: 762 addresses,
telephone: 71,100 numbers), so two values may get the same one. Without the key nobody can guess
values and compare. Surrogates have a form that no real value has (`FORM`), and text of that form is
never replaced again.
"""

import hashlib
import ipaddress
import re
from functools import lru_cache
from pathlib import Path

MIN_KEY_BYTES = 16

_DIGITS = "0123456789"
_HEX = "0123456789abcdef"
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
# RFC 2606, section 3
_DOMAINS = ("example.com", "example.net", "example.org")
# RFC 5737: TEST-NET-1, 2 and 3
_TEST_NETS = ("192.0.2", "198.51.100", "203.0.113")
# North American area codes are [2-9][0-8]x; x11 are services. In each, 555-0100 to 555-0199 are
# reserved for fiction, but in 800 only 555-0199 is (ATIS-0300115).
_AREAS = tuple(f"{n}" for n in range(200, 990) if n // 10 % 10 != 9 and n % 100 != 11 and n != 800)

_FORMS = {
    "EMAIL_ADDRESS": r"user-[0-9a-f]{12}@example\.(?:com|net|org)",
    "PHONE_NUMBER": r"(?!800)[2-9][0-8]\d-555-01\d\d",
    "IP_ADDRESS": r"(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}|2001:db8(?::[0-9a-f]{4}){6}",
    # a card's first digit is its industry: 0 has no issuer of cards (ISO/IEC 7812-1);
    # and no IBAN, grouped in fours, contains this grouping
    "CREDIT_CARD": r"0000 \d{6} \d{5}",
    # no country is ZZ (ISO 3166-1), and check digits are 02 to 98 (ISO 13616)
    "IBAN_CODE": r"ZZ00 \d{4} \d{4} \d{4} \d{4}",
    # never an area (Social Security Administration, POMS RM 10201.035)
    "US_SSN": r"666-\d\d-\d{4}",
    # regtest, a chain that ends with the program that started it (BIP 173)
    "CRYPTO": r"bcrt1q[02-9ac-hj-np-z]{38}",
}
FORM = re.compile("|".join(_FORMS.values()))
# every form starts with one of these; a fast check
_FORM_STARTS = re.compile(
    r"user-|-555-01|192\.0\.2|198\.51\.1|203\.0\.1|2001:db8|0000 |ZZ00|666-|bcrt1"
)


def surrogate(entity: str, value: str, *, key: bytes) -> str:
    """The surrogate for a value; the placeholder for entities without, such as SECRET."""
    if entity not in _FORMS:
        return f"<{entity}>"
    normal = normalize_value(entity, value)
    digest = hashlib.blake2b(
        f"{entity}\0{normal}".encode("utf-8", "surrogatepass"), key=_hash_key(key)
    ).digest()
    number = int.from_bytes(digest, "big")
    if entity == "EMAIL_ADDRESS":
        return f"user-{_in_base(number, _HEX, 12)}@{_DOMAINS[number % 3]}"
    if entity == "PHONE_NUMBER":
        return f"{_AREAS[number // 100 % len(_AREAS)]}-555-01{number % 100:02}"
    if entity == "IP_ADDRESS":
        groups = _in_base(number, _HEX, 24)
        six = "2001:db8:" + ":".join(groups[i : i + 4] for i in range(0, 24, 4))
        return six if ":" in normal else f"{_TEST_NETS[number % 3]}.{1 + number // 3 % 254}"
    if entity == "US_SSN":
        return f"666-{1 + number % 99:02}-{1 + number // 99 % 9999:04}"
    if entity == "CRYPTO":
        return "bcrt1q" + _in_base(number, _BECH32, 38)
    if entity == "CREDIT_CARD":
        return f"0000 {_in_base(number, _DIGITS, 6)} {_in_base(number, _DIGITS, 5, skip=6)}"
    return "ZZ00 " + " ".join(_in_base(number, _DIGITS, 4, skip=4 * i) for i in range(4))


def normalize_value(entity: str, value: str) -> str:
    """The value without differences of format: case, separators, a phone number's country code."""
    if entity == "EMAIL_ADDRESS":
        return value.lower()
    if entity == "IP_ADDRESS":
        ip = ipaddress.ip_address(re.split("[/%]", value)[0])
        return str(getattr(ip, "ipv4_mapped", None) or ip)
    if entity == "PHONE_NUMBER":
        # +44 20 …, 0044 20 … and 020 … have the same end; nine digits are nearly always unique
        return "".join(
            str(int(c)) for c in re.split(r"(?i)[ ,;]*(?:e?xt|x|#)", value)[0] if c.isdecimal()
        )[-9:]
    if entity == "CRYPTO":
        return value
    return "".join(c for c in value.upper() if c.isalnum())


def inert(text: str) -> str:
    """The text with '<' for each character of a surrogate; no value can contain a '<'."""
    if not _FORM_STARTS.search(text):
        return text
    parts, at, match = [], 0, FORM.search(text)
    while match:  # also of surrogates that overlap
        parts += [text[at : match.start()], "<" * (match.end() - max(at, match.start()))]
        at = max(at, match.end())
        match = FORM.search(text, match.start() + 1)
    return "".join([*parts, text[at:]])


@lru_cache(maxsize=4)
def load_key(path: str) -> bytes:
    """The key in a file, without white space around it; ValueError if it cannot be used."""
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"key file '{path}': {error.strerror}; "
            "make one with: head -c 32 /dev/urandom | base64 > FILE"
        ) from None
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"key file {path}: {len(key)} bytes, at least {MIN_KEY_BYTES} are needed")
    return key


@lru_cache(maxsize=4)
def _hash_key(key: bytes) -> bytes:
    return hashlib.blake2b(key).digest()  # blake2b takes at most 64 bytes of key


def _in_base(number: int, alphabet: str, length: int, *, skip: int = 0) -> str:
    """`length` digits of a number in base len(alphabet), lowest first, without the first `skip`."""
    number //= len(alphabet) ** skip
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        letters.append(alphabet[digit])
    return "".join(letters)
