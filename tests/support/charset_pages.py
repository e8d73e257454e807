"""Pages of the Universal Declaration of Human Rights in legacy encodings, some of them damaged."""

import random
import unicodedata
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from stages.read.charset import decode_html
from tests.support.paths import CORPUS

Declared = Literal["both", "header", "meta", "neither"]
Damage = Literal["none", "cut title", "stray byte"]

# label on the web, Python's codec, languages of udhr.zip
ENCODINGS = [
    ("utf-8", "utf-8", "deu rus jpn cmn_hans heb tha hin vie"),
    ("windows-1250", "cp1250", "pol ces hun"),
    ("windows-1251", "cp1251", "rus bul ukr srp_cyrl"),
    ("windows-1252", "cp1252", "deu fra spa por_PT"),
    ("windows-1253", "cp1253", "ell_monotonic"),
    ("windows-1254", "cp1254", "tur"),
    ("windows-1255", "cp1255", "heb"),
    ("windows-1256", "cp1256", "arb"),
    ("windows-1257", "cp1257", "lit lav est"),
    ("windows-1258", "cp1258", "vie"),
    ("iso-8859-2", "iso8859-2", "pol ces hun"),
    ("iso-8859-3", "iso8859-3", "mlt epo"),
    ("iso-8859-4", "iso8859-4", "lav lit est"),
    ("iso-8859-5", "iso8859-5", "rus bul"),
    ("iso-8859-6", "iso8859-6", "arb"),
    ("iso-8859-7", "iso8859-7", "ell_monotonic"),
    ("iso-8859-8", "iso8859-8", "heb"),
    ("iso-8859-10", "iso8859-10", "isl sme"),
    ("iso-8859-13", "iso8859-13", "lit lav"),
    ("iso-8859-14", "iso8859-14", "cym gle"),
    ("iso-8859-15", "iso8859-15", "fra fin"),
    ("iso-8859-16", "iso8859-16", "ron_1993"),
    ("koi8-r", "koi8-r", "rus"),
    ("koi8-u", "koi8-u", "ukr"),
    ("ibm866", "cp866", "rus bul"),
    ("macintosh", "mac-roman", "fra deu"),
    ("x-mac-cyrillic", "mac-cyrillic", "rus"),
    ("windows-874", "cp874", "tha"),
    ("shift_jis", "cp932", "jpn"),
    ("euc-jp", "euc_jp", "jpn"),
    ("iso-2022-jp", "iso2022_jp", "jpn"),
    ("gb2312", "gbk", "cmn_hans"),
    ("gb18030", "gb18030", "cmn_hans cmn_hant"),
    ("hz-gb-2312", "hz", "cmn_hans"),
    ("big5", "cp950", "cmn_hant"),
    ("euc-kr", "cp949", "kor"),
    ("iso-2022-kr", "iso2022_kr", "kor"),
]
_PARAGRAPHS = 6


class CharsetPage(NamedTuple):
    """A page as its server sent it, and the paragraphs that its author wrote."""

    payload: bytes
    content_type: str
    paragraphs: list[str]

    def garbled(self) -> bool:
        """Whether more than the one damaged paragraph is decoded wrongly."""
        text = decode_html(self.payload, self.content_type).text
        return sum(f"<p>{p}</p>" not in text for p in self.paragraphs) > 1


def pages(
    label: str, codec: str, languages: str, *, declared: Declared, damage: Damage, number: int
) -> Iterator[CharsetPage]:
    """Different pages in an encoding; the same ones for equal arguments."""
    rng = random.Random(f"{label} {declared} {damage}")
    for n in range(number):
        names = languages.split()
        lines = _lines(names[n % len(names)], codec)
        paragraphs = rng.sample(lines, _PARAGRAPHS)
        yield _page(paragraphs, label, codec, declared, damage, rng)


def _page(
    paragraphs: list[str],
    label: str,
    codec: str,
    declared: Declared,
    damage: Damage,
    rng: random.Random,
) -> CharsetPage:
    title = paragraphs[0].encode(codec)
    if damage == "cut title":
        title = title[: rng.randint(3, min(60, len(title) - 1))]
    body = [f"<p>{p}</p>\n".encode(codec) for p in paragraphs]
    if damage == "stray byte":
        at = rng.randrange(len(body))
        where = rng.randrange(3, len(body[at]) - 4)
        body[at] = body[at][:where] + bytes([rng.randrange(0x80, 0x100)]) + body[at][where:]
    meta = f"<meta charset={label}>" if declared in ("both", "meta") else ""
    payload = b"".join(
        [f"<html><head>{meta}<title>".encode(), title, b"</title></head><body>\n", *body]
    )
    suffix = f"; charset={label}" if declared in ("both", "header") else ""
    return CharsetPage(payload, f"text/html{suffix}", paragraphs)


@lru_cache
def _lines(language: str, codec: str) -> list[str]:
    """Lines that the encoding can express; Vietnamese has its tones as combining marks there."""
    with zipfile.ZipFile(CORPUS / "text" / "udhr.zip") as archive:
        text = archive.read(f"udhr2/{language}.txt").decode()
    lines = [" ".join(line.split()) for line in text.splitlines() if len(line) > 20]
    if codec == "cp1258":
        lines = ["".join(c if _fits(c, codec) else _one_step_apart(c) for c in x) for x in lines]
    return [line for line in lines if _fits(line, codec)]


def _one_step_apart(character: str) -> str:
    return (
        "".join(chr(int(x, 16)) for x in unicodedata.decomposition(character).split()) or character
    )


def _fits(text: str, codec: str) -> bool:
    try:
        return text.encode(codec).decode(codec) == text
    except UnicodeEncodeError:
        return False
