"""Decode the bytes of a web page: find the charset as browsers do, and check that it fits."""

import codecs
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

Source = Literal["bom", "header", "meta", "detector"]


class Decoded(NamedTuple):
    """`text` has no NUL and no lone surrogate; `charset` is Python's name, `source` its origin."""

    text: str
    charset: str
    source: Source


def decode_html(payload: bytes, content_type: str | None) -> Decoded:
    """Decode a page by the first charset that fits: HTTP header, byte order mark, <meta>, detector.

    A byte order mark overrides a header that contradicts it, as in browsers; labels have the
    WHATWG's meaning (encoding.spec.whatwg.org: 'iso-8859-1' is windows-1252). A charset that the
    bytes contradict is skipped; if none fits, the first known one is used, with U+FFFD for what it
    cannot decode. Any bytes and any content type give a text.
    """
    first: tuple[str, Source] | None = None
    for charset, source in _candidates(payload, content_type):
        text = _decode_if_it_fits(payload, charset)
        if text is not None:
            return Decoded(_clean(text), charset, source)
        first = first or (charset, source)
    charset, source = first or ("utf-8", "detector")
    return Decoded(_clean(payload.decode(charset, "replace")), charset, source)


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
_META_CHARSET = re.compile(
    rb"<(?:meta\b[^>]*?\bcharset|\?xml\b[^>]*?\bencoding)\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)",
    re.IGNORECASE,
)


def _candidates(payload: bytes, content_type: str | None) -> Iterator[tuple[str, Source]]:
    header = _HEADER_CHARSET.search(content_type or "")
    declared = _python_codec(header[1]) if header else None
    bom = next((name for mark, name in _BOMS if payload.startswith(mark)), None)
    if bom is not None and declared != bom:
        # a header that contradicts it is wrong: no text in another charset begins like this
        yield bom, "bom"
    if declared is not None:
        yield declared, "header"
    meta = _META_CHARSET.search(payload, 0, 2048)
    if meta and (charset := _python_codec(meta[1].decode("ascii"))):
        # bytes with a readable ASCII <meta> are not UTF-16, whatever it says; the standard reads
        # them as UTF-8, too
        yield ("utf-8" if charset.startswith("utf-16") else charset), "meta"
    yield "utf-8", "detector"  # text in another charset is almost never valid UTF-8
    detected = detect_encoding(payload)
    if detected and (charset := _python_codec(detected)):
        yield charset, "detector"


# Python's codecs with these names lack characters of the WHATWG's decoders with the same names.
_SUPERSETS = {
    "shift_jis": "cp932",
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "iso8859-11": "cp874",
}


def _python_codec(label: str) -> str | None:
    """Python's codec for a WHATWG label, None for an unknown one."""
    name = map_encoding_to_html5(label.strip().lower(), fallback_utf8=False)
    if name is None:
        return None
    try:
        return codecs.lookup(_SUPERSETS.get(name, name)).name
    except LookupError:
        return None


# A UTF-8 page with a broken byte (cut titles, pasted snippets) is still UTF-8: a single-byte
# charset would accept it and garble every accent. In a page that is not UTF-8 nearly every
# character beyond ASCII is an error.
_MAX_BROKEN_SHARE = 0.1


def _decode_if_it_fits(payload: bytes, charset: str) -> str | None:
    """The text, None if the bytes do not fit the charset.

    A character cut off at the end and a few errors in UTF-8 are allowed.
    """
    try:
        return codecs.getincrementaldecoder(charset)("strict").decode(payload, False)
    except UnicodeDecodeError:
        if charset != "utf-8":
            return None
    text = payload.decode("utf-8", "replace")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    return text if text.count("�") <= _MAX_BROKEN_SHARE * beyond_ascii else None


def _clean(text: str) -> str:
    """Without lone surrogates (a few decoders pass them), which Arrow rejects, and without NULs."""
    if "\0" in text:
        text = text.replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode()
    return text.removeprefix("\ufeff")
