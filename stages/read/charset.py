"""Decode the bytes of a web page into the text that its author wrote."""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from stages.read.prescan import declared_labels

Source = Literal["bom", "header", "meta", "detector"]


class Decoded(NamedTuple):
    """`text` has no NUL and no lone surrogate; `charset` is Python's name, `source` its origin."""

    text: str
    charset: str
    source: Source


def decode_html(payload: bytes, content_type: str | None) -> Decoded:
    """Decode a page by the first charset that fits: byte order mark, HTTP header, <meta>, detector.

    Labels have the WHATWG's meaning (encoding.spec.whatwg.org: 'iso-8859-1' is windows-1252).
    Unlike in browsers, UTF-8 that is declared as something else is UTF-8, and the escape sequences
    of 7-bit encodings are what they are. A few undefined bytes are damage: they become U+FFFD and
    overrule no declaration. A declaration that many bytes contradict is skipped; if nothing fits,
    the first one counts. Any bytes and any content type give a text.
    """
    declared = list(_declared(payload, content_type))
    for charset, tolerated in _candidates(payload, [charset for charset, _ in declared]):
        text, places, share = _decode(payload, charset)
        if share <= tolerated.share or (places <= tolerated.places and share < 1):
            source = next((s for c, s in declared if c == charset), _UNKNOWN[1])
            return Decoded(_clean(text, charset), charset, source)
    charset, source = next(iter(declared), _UNKNOWN)
    return Decoded(_clean(_decode(payload, charset)[0], charset), charset, source)


_UNKNOWN: tuple[str, Source] = ("utf-8", "detector")


# --- declarations ---------------------------------------------------------------------------------

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)


def _declared(payload: bytes, content_type: str | None) -> Iterator[tuple[str, Source]]:
    """Declared charsets in order of precedence; header and page may agree."""
    header = _HEADER_CHARSET.search(content_type or "")
    transport = _python_codec(header[1]) if header else None
    if transport in ("utf-16-le", "utf-16-be") and b"<\0" not in payload and b"\0<" not in payload:
        transport = None
    bom = next((charset for mark, charset in _BOMS if payload.startswith(mark)), None)
    if bom is not None and bom != transport:
        # a header that contradicts it is wrong: no text in another charset begins like this
        yield bom, "bom"
    if transport is not None:
        yield transport, "header"
    meta = next(filter(None, map(_python_codec, declared_labels(payload))), None)
    if meta is not None:
        # bytes with a readable ASCII <meta> are not UTF-16, whatever it says; the standard reads
        # them as UTF-8, too
        yield ("utf-8" if meta.startswith("utf-16") else meta), "meta"


# Python's codecs with these names lack characters of the WHATWG's decoders with the same names.
_SUPERSETS = {
    "shift_jis": "cp932",
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "iso8859-11": "cp874",
    "iso2022_jp": "iso2022_jp_ext",
}
# Labels that resiliparse does not know, some of them the detector's. Browsers show nothing of a
# page in HZ or ISO-2022-KR, to prevent attacks on them.
_LABELS = {
    "x-mac-cyrillic": "mac-cyrillic",
    "x-mac-ukrainian": "mac-cyrillic",
    "mac-cyrillic": "mac-cyrillic",
    "hz-gb-2312": "hz",
    "iso-2022-kr": "iso2022_kr",
    "csiso2022kr": "iso2022_kr",
    "cp949": "cp949",
    "x-user-defined": "cp1252",
}


def _python_codec(label: str) -> str | None:
    """Python's codec for a WHATWG label, None for an unknown one."""
    label = label.strip().lower()
    name = _LABELS.get(label) or map_encoding_to_html5(label, fallback_utf8=False)
    if name is None:
        return None
    try:
        return codecs.lookup(_SUPERSETS.get(name, name)).name
    except LookupError:
        return None


_ASCII, _HIGH = bytes(range(128)), bytes(range(128, 256))

# --- evidence -------------------------------------------------------------------------------------


class _Tolerance(NamedTuple):
    """What damage may explain: so many undefined places, or this share of the bytes beyond ASCII.

    If all are undefined, they are no damage but another charset ("café" in a page of ASCII).
    In the Universal Declaration of Human Rights in 33 charsets, read as UTF-8, 45 % of these bytes
    and more are undefined; read as another legacy charset, sometimes only 2 %.
    """

    places: int
    share: float


_PROVEN, _PROVEN_AGREED = _Tolerance(0, 0.4), _Tolerance(3, 0.4)
_LEGACY, _LEGACY_AGREED = _Tolerance(2, 0.02), _Tolerance(3, 0.2)
_GUESSED = _Tolerance(0, 0.1)


def _candidates(payload: bytes, declared: list[str]) -> Iterator[tuple[str, _Tolerance]]:
    """Charsets to try, the likeliest first, with the damage that is tolerated in each."""
    if payload[:2] in (b"<\0", b"\0<"):
        yield ("utf-16-le" if payload[0] else "utf-16-be"), _GUESSED
    if shifted := _shifted(payload):
        yield shifted, _PROVEN if shifted in declared else _GUESSED
    if declared[:1] != ["utf-8"] and _is_utf8(payload, declared):
        yield "utf-8", _GUESSED
    for charset in declared:
        agreed = declared.count(charset) > 1
        if charset == "utf-8":
            yield charset, _PROVEN_AGREED if agreed else _PROVEN
        else:
            yield charset, _LEGACY_AGREED if agreed else _LEGACY
    if _high_bytes(payload) < _CHANCE:
        yield "utf-8", _GUESSED
    body = payload.partition(b"</title>")[2]  # titles are cut by their bytes
    detected = detect_encoding(payload if body.isascii() else body, html5_compatible=False)
    if detected and (codec := _python_codec(_DETECTED.get(detected, detected))):
        yield codec, _GUESSED


_DETECTED = {"koi8-r": "koi8-u"}  # has letters of Ukrainian in place of box drawings

_ESCAPE = re.compile(rb"\x1b\$(?:[@B]|\)C)")
_HZ = re.compile(rb"~\{(?:[!-w][!-~]){2,}~\}")


def _shifted(payload: bytes) -> str | None:
    """The 7-bit encoding of a page with escape sequences: its bytes are valid UTF-8, too."""
    if b"\x1b" in payload and (escape := _ESCAPE.search(payload)):
        return "iso2022_kr" if escape[0].endswith(b"C") else "iso2022_jp_ext"
    return "hz" if b"~" in payload and _HZ.search(payload) else None


_CHANCE = 8  # bytes
_TWO_BYTE = frozenset({"cp932", "euc_jp", "gb18030", "big5hkscs", "cp949"})


def _is_utf8(payload: bytes, declared: list[str]) -> bool:
    """Whether the bytes beyond ASCII are UTF-8 although something else is declared.

    A character of a two-byte charset is valid UTF-8 by chance one time in eight, a few characters
    of a single-byte charset never are.
    """
    enough = _high_bytes(payload) >= (_CHANCE if _TWO_BYTE.intersection(declared) else 1)
    return enough and _decode(payload, "utf-8")[2] <= _GUESSED.share


def _high_bytes(payload: bytes) -> int:
    return len(payload.translate(None, _ASCII))


# --- decoding -------------------------------------------------------------------------------------


def _decode(payload: bytes, charset: str) -> tuple[str, int, float]:
    """The text, the number of undefined places, and their share of the bytes beyond ASCII.

    A character that is cut off at the end of the page is dropped.
    """
    if charset in _SHIFTS:
        return _decode_shifted(payload, charset)
    try:
        return codecs.getincrementaldecoder(charset)("strict").decode(payload, False), 0, 0.0
    except UnicodeDecodeError:
        pass
    if charset == "utf-8":
        payload = _CESU8.sub(_joined_surrogates, payload)
    text = payload.decode(charset, _handler(charset))
    broken = text.count("�")
    return text, broken, broken / max(_high_bytes(payload), 1)


def _decode_shifted(payload: bytes, charset: str) -> tuple[str, int, float]:
    # high bytes are noise here; without them the pairs behind them are the right ones
    seven_bit = payload.translate(None, _HIGH)
    pattern, switched_off = _SHIFTS[charset]
    text = pattern.sub(switched_off, seven_bit).decode(charset, _handler(charset))
    noise = len(payload) - len(seven_bit)
    broken = text.count("�") + noise
    return text, broken, broken / max(len(text.encode()) - len(text) + noise, 1)


# A two-byte mode that is still on at an end tag (titles are cut by their bytes) would hide all tags
# up to the next text: what switches it off is put before the tag, half a character and half an
# escape sequence are removed. As two-byte characters, lower-case tags would be of the rarest ones.
_END_TAG = rb"(?=</(?:TITLE|[a-z][a-z0-9]*)>)"
_SHIFTS = {
    "iso2022_jp_ext": (
        re.compile(rb"(\x1b\$[@B](?:[!-~]{2})*?)[!-~]?%b|\x1b[$(]*(?=<)" % _END_TAG),
        b"\\1\x1b(B",
    ),
    "iso2022_kr": (
        re.compile(rb"(\x0e(?:[!-~]{2})*?)[!-~]?%b|\x1b[$)]*(?=<)" % _END_TAG),
        b"\\1\x0f",
    ),
    "hz": (re.compile(rb"(~\{(?:[!-}][!-~])*?)[!-~]?%b" % _END_TAG), b"\\1~}"),
}

# CESU-8 (Java, Oracle, MySQL) has two surrogates of three bytes each for a character beyond 16 bits
_CESU8 = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")


def _joined_surrogates(pair: re.Match[bytes]) -> bytes:
    surrogates = pair[0].decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    return surrogates.decode("utf-16").encode()


_JIS = {
    "euc_jp": re.compile(rb"[\xa1-\xfe]{2}"),
    "iso2022_jp_ext": re.compile(rb"[\x21-\x7e]{2}"),
}


def _handler(charset: str) -> str:
    return "gristmill.damage" if charset in _JIS else "replace"  # ours takes 20 times as long


def _damage(error: UnicodeError) -> tuple[str, int]:
    """Error handler: NEC's and IBM's characters in JIS, U+FFFD for everything else undefined.

    Python's EUC-JP and ISO-2022-JP lack these characters (rows 13 and 89 to 92, such as "①" and
    "㈱"); the standard's decoders and Python's cp932 have them.
    """
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    if error.encoding in _JIS and _JIS[error.encoding].fullmatch(pair):
        row, cell = (pair[0] & 0x7F) - 0x21, pair[1] & 0x7F
        lead = row // 2 + (0x81 if row < 62 else 0xC1)
        trail = cell + (0x7E if row % 2 else 0x1F + (cell > 0x5F))
        with suppress(UnicodeDecodeError):
            return bytes([lead, trail]).decode("cp932"), error.start + 2
    return "�", error.end


codecs.register_error("gristmill.damage", _damage)


# what Python's decoders make of a stray byte, and of a wide space that Chinese pages are full of
_UNLIKE_STANDARD = {
    "cp932": (re.compile("[\uf8f0-\uf8f3]"), "�"),
    "gb18030": (re.compile("\ue5e5"), "\u3000"),
}


def _clean(text: str, charset: str) -> str:
    """Without NULs, and without the lone surrogates of a few decoders, which Arrow rejects."""
    if charset in _UNLIKE_STANDARD:
        pattern, standard = _UNLIKE_STANDARD[charset]
        text = pattern.sub(standard, text)
    if charset != "utf-8":
        text = text.encode("utf-8", "replace").decode()
    return text.replace("\0", "").removeprefix("\ufeff")
