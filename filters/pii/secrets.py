"""Find secrets in text: keys of services with a form of their own, JSON Web Tokens, private keys.

Only unmistakable forms are found: a password is a word like others, and 40 hexadecimal digits are
more often a commit than a key. Examples in documentation (AKIAIOSFODNN7EXAMPLE, sk_live_xxxx) stay.
"""

import base64
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator

# (text that every key of the kind contains, the key), from the services' own documentation. An
# expression begins with a literal where possible, for speed; what is beside a key is checked later.
_KEYS = [
    (prefix, re.compile(form))
    for prefix, form in [
        ("AKIA", r"AKIA[A-Z0-9]{16}"),  # AWS
        ("ASIA", r"ASIA[A-Z0-9]{16}"),
        ("gh", r"gh[pousr]_[A-Za-z0-9]{36,76}"),  # GitHub; 36 but for refresh tokens
        ("github_pat_", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
        ("glpat-", r"glpat-[A-Za-z0-9_-]{20,64}(?:\.[0-9a-z]{2}\.[0-9a-z]{9})?"),
        ("xox", r"xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{20,250}"),
        ("xapp-", r"xapp-\d-[A-Z0-9]{8,14}-\d{8,15}-[0-9a-f]{32,64}"),
        (
            "hooks.slack.com",
            r"hooks\.slack\.com/(?:services|workflows)/T[A-Z0-9]{7,12}/[AB][A-Z0-9]{7,12}/[A-Za-z0-9/]{20,60}",
        ),
        ("k_live_", r"[rs]k_live_[A-Za-z0-9]{20,250}"),
        ("whsec_", r"whsec_[A-Za-z0-9+/=]{32,64}"),
        ("AIza", r"AIza[A-Za-z0-9_-]{35}"),
        ("GOCSPX-", r"GOCSPX-[A-Za-z0-9_-]{28}"),
        ("sk-", r"sk-(?:ant-|proj-|svcacct-|admin-|or-v1-)?[A-Za-z0-9_-]{32,250}"),
        ("gsk_", r"gsk_[A-Za-z0-9]{48,56}"),
        ("hf_", r"hf_[A-Za-z0-9]{34}"),
        ("npm_", r"npm_[A-Za-z0-9]{36}"),
        ("pypi-AgE", r"pypi-AgE[A-Za-z0-9_-]{60,1000}"),
        ("SG.", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
        ("SK", r"SK[0-9a-f]{32}"),  # Twilio
        (":AA", r"(?:bot)?\d{8,10}:AA[A-Za-z0-9_-]{33}"),  # Telegram
        ("dop_v1_", r"dop_v1_[0-9a-f]{64}"),
        ("dapi", r"dapi[0-9a-f]{32}(?:-\d)?"),
        ("shp", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
        ("sq0", r"sq0(?:atp|csp)-[A-Za-z0-9_-]{22,43}"),
        ("AccountKey=", r"AccountKey=[A-Za-z0-9+/]{86}=="),  # Azure storage
        ("AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
        ("lin_api_", r"lin_api_[A-Za-z0-9]{40}"),
        ("PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
        ("ATATT3", r"ATATT3[A-Za-z0-9_=-]{60,250}"),
    ]
]
_CRC = ("gh", "npm_")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# the other half of an AWS key: after its usual name, or right after the first half
_AWS_NAMED = re.compile(  # from the e of secret on
    r"(?i:ecret(?:_?access_?key|(?:(?<=aws_secret)|(?<=awssecret))(?:_?key)?))"
    r"[\"'\]]{0,2}[ \t]*(?:[:=]|=>|is)?[ \t]*[\"']?([A-Za-z0-9/+]{40})"
)
_AWS_SECRET = re.compile(r"(?<![A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")
_AWS_NEAR = 120  # characters

_JWT = re.compile(
    r"eyJ(?<![A-Za-z0-9_-]eyJ)[A-Za-z0-9_-]{10,2000}+\.[A-Za-z0-9_-]{10,8000}+\.[A-Za-z0-9_-]{20,2000}"
)

_PEM_BEGIN = re.compile(r"-{4,5} ?BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)? ?-{4,5}")
_PEM_END = re.compile(r"-{4,5} ?END (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)? ?-{4,5}")
# Base 64 in lines, which a page may have quoted, commented out, numbered, indented, joined, or
# written as \n in a string; a line of lower-case letters is a word. Before the base 64 may be
# headers: Proc-Type, DEK-Info, Version. Possessive, as a long run of base 64 can be cut into lines
# in exponentially many ways.
_PEM_GAP = (
    r"(?:\s|\\+[nr]|[\"'>,;+|#*]|/{2,3}(?=[ \t])|<br ?/?>"
    r"|(?<![A-Za-z0-9+/=])\d{1,4}+[:.)|]?(?=[ \t]))*+"
)
_PEM_LINE = r"(?![a-z]+(?![A-Za-z0-9+/=]))[A-Za-z0-9+/=]{16,}+"
_PEM_HEADER = r"(?:Proc-Type|DEK-Info|Version|Comment|Hash|Charset|Subject): [^\n<>]{0,200}"
_PEM_BODY = re.compile(
    rf"(?:{_PEM_GAP}{_PEM_HEADER})*+(?:{_PEM_GAP}{_PEM_LINE})*+"
    rf"(?:{_PEM_GAP}[A-Za-z0-9+/=]{{1,15}}+(?={_PEM_GAP}-{{4,5}} ?END ))?"
)
_PEM_CLOSE = re.compile(_PEM_GAP + _PEM_END.pattern)
_BETWEEN_LINES = re.compile(_PEM_GAP)
_PEM_MAX = 20_000  # characters: RSA of 16,384 bits has 12,700

_WORDS = re.compile(
    r"example|sample|dummy|placeholder|your|xxxx|\*\*\*|redact|fake|insert|changeme|replace|secret|token|apikey|api_key"
    r"|abcdef|qwerty|foobar|123456|000000|aaaaa",
    re.IGNORECASE,
)
# jwt.io's example, on half of all pages on the subject: {"sub":"1234567890", …
_EXAMPLE_CLAIMS = ("eyJzdWIiOiIxMjM0NTY3ODkw",)

# Every key, and the 40 letters of AWS, is a run of these characters, and is at least as long as
# AWS's AKIA and 16 letters.
_IN_KEYS = bytes(
    97 if c < 128 and (chr(c).isalnum() or chr(c) in "+/=_.:-") else 32 for c in range(256)
)
_SHORTEST = 20
# what other secrets contain
_MARKERS = ("ecret", "ECRET", "eyJ", "PRIVATE KEY")


def find_secrets(text: str) -> list[tuple[int, int]]:
    """(start, end) of each secret, in reading order and without overlap.

    All lines of a private key are one secret.
    """
    signs = _signs(text)
    if not signs:
        return []
    secrets = [*_private_keys(text, signs), *_tokens(text, signs), *_keys(text, signs)]
    kept: list[tuple[int, int]] = []
    for start, end in sorted(secrets, key=lambda s: (s[0], -s[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def _signs(text: str) -> set[str]:
    """The prefixes and markers of secrets that a text contains; prefixes only if in a long run."""
    signs = {sign for sign in _MARKERS if sign in text}
    raw = text.encode("utf-8", "surrogatepass")
    kinds, run = raw.translate(_IN_KEYS) + b" ", b"a" * _SHORTEST
    runs, end = [], 0
    while (start := kinds.find(run, end)) >= 0:
        end = kinds.index(b" ", start)
        runs.append(raw[start:end])
    long = b" ".join(runs).decode()
    return signs.union(prefix for prefix, _ in _KEYS if prefix in long)


def _keys(text: str, signs: set[str]) -> Iterator[tuple[int, int]]:
    for prefix, form in _KEYS:
        if prefix not in signs:
            continue
        for match in form.finditer(text):
            if not _stands_alone(text, *match.span()) or not _is_key(prefix, match[0]):
                continue
            yield match.span()
            if prefix in ("AKIA", "ASIA"):
                near = _AWS_SECRET.search(text, match.end(), match.end() + _AWS_NEAR)
                if near and _is_random(near[0], classes=3):
                    yield near.span()
    for sign in signs & {"ecret", "ECRET"}:
        for place in re.finditer(sign, text):
            named = _AWS_NAMED.match(text, place.start())
            if named and _stands_alone(text, *named.span(1)) and _is_random(named[1], classes=3):
                yield named.span(1)


def _is_key(prefix: str, key: str) -> bool:
    payload = key[key.index(prefix) + len(prefix) :]
    if prefix in _CRC and has_checksum(key.rpartition("_")[2]):
        return True
    if prefix == "sk-":  # the prefix is short, and words-with-hyphens are long
        is_hex = "or-v1-" in key or re.fullmatch("[0-9a-f]{32}", payload)  # OpenRouter, DeepSeek
        return _is_random(payload, classes=2 if is_hex else 3)
    return _is_random(
        payload, classes=1 if prefix in ("AKIA", "ASIA", "hf_", "AGE-SECRET-KEY-1") else 2
    )


def has_checksum(payload: str) -> bool:
    """Whether the last six characters are the CRC-32 of those before, in base 62 (GitHub 2021,
    "Behind GitHub's new authentication token formats"; npm has the same)."""
    number, digits = zlib.crc32(payload[:-6].encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return payload[-6:] == digits


def _tokens(text: str, signs: set[str]) -> Iterator[tuple[int, int]]:
    """JSON Web Tokens (RFC 7519): a header that names its algorithm, claims and a signature."""
    if "eyJ" not in signs:
        return
    for match in _JWT.finditer(text):
        header, claims, signature = match[0].split(".")
        if (
            _stands_alone(text, *match.span())
            and not claims.startswith(_EXAMPLE_CLAIMS)
            and _is_random(signature, classes=2)
        ):
            try:
                decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
            except (ValueError, RecursionError):
                continue
            if isinstance(decoded, dict) and isinstance(decoded.get("alg"), str):
                yield match.span()


def _private_keys(text: str, signs: set[str]) -> Iterator[tuple[int, int]]:
    """Blocks of private keys, also without their end or their beginning."""
    if "PRIVATE KEY" not in signs:
        return
    for begin in _PEM_BEGIN.finditer(text):
        body = _PEM_BODY.match(text, begin.end(), begin.end() + _PEM_MAX)
        if body is not None and _is_base64(body[0]):
            end = _PEM_CLOSE.match(text, body.end())
            yield begin.start(), end.end() if end else body.end()
    behind = 0
    for end in _PEM_END.finditer(text):
        start = _start_of_base64(text, max(behind, end.start() - _PEM_MAX), end.start())
        if _is_base64(text[start : end.start()]):
            yield start, end.end()
        behind = end.end()


def _start_of_base64(text: str, low: int, high: int) -> int:
    """The start, from `low`, of lines of base 64 that end at `high`; only the last may be short."""
    start, between = high, 0
    for token in reversed(list(re.finditer(r"[A-Za-z0-9+/=]+", text[low:high]))):
        # the number of a line, its //, or the br of the line before; at most three in a row
        if (
            between < 3
            and len(token[0]) <= 4
            and _BETWEEN_LINES.fullmatch(text, low + token.start() - (token[0] == "br"), start)
        ):
            between += 1
            continue
        is_line = re.fullmatch(_PEM_LINE, token[0]) or (start == high and len(token[0]) < 16)
        if not is_line or not _BETWEEN_LINES.fullmatch(text, low + token.end(), start):
            break
        start, between = low + token.start(), 0
    return start


def _is_base64(body: str) -> bool:
    """Whether it has at least 40 characters of a key; the shortest keys, of Ed25519, have 64."""
    letters = "".join(re.findall(_PEM_LINE, body))
    return len(letters) >= 40 and _is_random(letters, classes=2)


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] is no part of something longer, such as base 64 or a word (task-)."""
    before, after = text[start - 1 : start], text[end : end + 1]
    # Chinese and Japanese put no spaces between words and keys
    return not (before.isascii() and (before.isalnum() or before in ("_", "-", "+"))) and not (
        after.isascii() and (after.isalnum() or after == "_")
    )


def _is_random(payload: str, *, classes: int) -> bool:
    """Whether it looks random: no word of documentation, no sequence, several character classes.

    Of 100,000 random keys of 16 letters in base 32, the shortest, all have at least 2.5 bits a
    letter.
    """
    if _WORDS.search(payload[:200]) is not None:
        return False
    kinds = (str.islower, str.isupper, str.isdigit)
    if sum(any(map(kind, payload)) for kind in kinds) < classes:
        return False
    steps = sum(0 <= ord(b) - ord(a) <= 1 for a, b in itertools.pairwise(payload))
    return steps < len(payload) / 2 and _bits(payload) >= 2.5


def _bits(text: str) -> float:
    """Shannon entropy per character, from the text's own frequencies."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)
