"""Values that belong to no one, chosen by a keyed hash: the same value gets the same one in every
document.

Each comes from a range that its own standard keeps free, or that its check digits can never have.
The ranges are smaller than the world, so two values may meet in one (IPv4: 762 addresses,
telephone: 71,100 numbers); without the key none can be traced or tried out. Every surrogate has a
form that nothing real has (`FORM`), and that form is never taken for a value again.
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
# North American area codes are [2-9][0-8]x; x11 are services. In each 555-0100 to 555-0199 are kept
# for fiction, but in 800 only 555-0199 is (ATIS-0300115).
_AREAS = tuple(f"{n}" for n in range(200, 990) if n // 10 % 10 != 9 and n % 100 != 11 and n != 800)

_FORMS = {
    "EMAIL_ADDRESS": r"user-[0-9a-f]{12}@example\.(?:com|net|org)",
    "PHONE_NUMBER": r"(?!800)[2-9][0-8]\d-555-01\d\d",
    "IP_ADDRESS": r"(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}|2001:db8(?::[0-9a-f]{4}){6}",
    # a card's first digit is its industry: 0 has no issuer of cards (ISO/IEC 7812-1)
    # … and no grouping of an IBAN, in fours, holds this one
    "CREDIT_CARD": r"0000 \d{6} \d{5}",
    # no country is ZZ (ISO 3166-1), and check digits are 02 to 98 (ISO 13616)
    "IBAN_CODE": r"ZZ00 \d{4} \d{4} \d{4} \d{4}",
    # never an area (Social Security Administration, POMS RM 10201.035)
    "US_SSN": r"666-\d\d-\d{4}",
    # regtest, a chain that ends with the program that started it (BIP 173)
    "CRYPTO": r"bcrt1q[02-9ac-hj-np-z]{38}",
}
FORM = re.compile("|".join(_FORMS.values()))
# cheap: what every form starts with
_MAY_HOLD = re.compile(
    r"user-|-555-01|192\.0\.2|198\.51\.1|203\.0\.1|2001:db8|0000 |ZZ00|666-|bcrt1"
)


def surrogate(entity: str, value: str, *, key: bytes) -> str:
    """The value of no one that stands for `value`; the placeholder for entities that have none,
    such as SECRET.
    """
    if entity not in _FORMS:
        return f"<{entity}>"
    known = normalized(entity, value)
    digest = hashlib.blake2b(
        f"{entity}\0{known}".encode("utf-8", "surrogatepass"), key=_hash_key(key)
    ).digest()
    number = int.from_bytes(digest, "big")
    if entity == "EMAIL_ADDRESS":
        return f"user-{_spelled(number, _HEX, 12)}@{_DOMAINS[number % 3]}"
    if entity == "PHONE_NUMBER":
        return f"{_AREAS[number // 100 % len(_AREAS)]}-555-01{number % 100:02}"
    if entity == "IP_ADDRESS":
        groups = _spelled(number, _HEX, 24)
        six = "2001:db8:" + ":".join(groups[i : i + 4] for i in range(0, 24, 4))
        return six if ":" in known else f"{_TEST_NETS[number % 3]}.{1 + number // 3 % 254}"
    if entity == "US_SSN":
        return f"666-{1 + number % 99:02}-{1 + number // 99 % 9999:04}"
    if entity == "CRYPTO":
        return "bcrt1q" + _spelled(number, _BECH32, 38)
    if entity == "CREDIT_CARD":
        return f"0000 {_spelled(number, _DIGITS, 6)} {_spelled(number, _DIGITS, 5, skip=6)}"
    return "ZZ00 " + " ".join(_spelled(number, _DIGITS, 4, skip=4 * i) for i in range(4))


def normalized(entity: str, value: str) -> str:
    """The value without the accidents of its writing: case, separators, a phone number's country
    code.
    """
    if entity == "EMAIL_ADDRESS":
        return value.lower()
    if entity == "IP_ADDRESS":
        ip = ipaddress.ip_address(re.split("[/%]", value)[0])
        return str(getattr(ip, "ipv4_mapped", None) or ip)
    if entity == "PHONE_NUMBER":
        # +44 20 …, 0044 20 … and 020 … end alike; nine digits tell nearly all numbers apart
        return "".join(
            str(int(c)) for c in re.split(r"(?i)[ ,;]*(?:e?xt|x|#)", value)[0] if c.isdecimal()
        )[-9:]
    if entity == "CRYPTO":
        return value
    return "".join(c for c in value.upper() if c.isalnum())


def inert(text: str) -> str:
    """The text with '<' for every character of a surrogate, also where two overlap: no value
    reaches across a '<'.
    """
    if not _MAY_HOLD.search(text):
        return text
    parts, at, match = [], 0, FORM.search(text)
    while match:
        parts += [text[at : match.start()], "<" * (match.end() - max(at, match.start()))]
        at = max(at, match.end())
        match = FORM.search(text, match.start() + 1)
    return "".join([*parts, text[at:]])


@lru_cache(maxsize=4)
def load_key(path: str) -> bytes:
    """The key in a file, without white space around it; ValueError says what is wrong with one that
    cannot be used.
    """
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"key file '{path}': {error.strerror}; make one with: head -c 32 /dev/urandom | base64 > FILE"
        ) from None
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"key file {path}: {len(key)} bytes, at least {MIN_KEY_BYTES} are needed")
    return key


@lru_cache(maxsize=4)
def _hash_key(key: bytes) -> bytes:
    return hashlib.blake2b(key).digest()  # blake2b itself takes no more than 64 bytes of key


def _spelled(number: int, alphabet: str, length: int, *, skip: int = 0) -> str:
    """`length` digits of a number in base len(alphabet), lowest first, after `skip` of them."""
    number //= len(alphabet) ** skip
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        letters.append(alphabet[digit])
    return "".join(letters)
