"""Read documents from the records of WARC and WET files, damaged ones included."""

import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from stages.read.frames import Accounts, Frame, read_frames
from stages.read.http import MAX_HEADER, Body, decode_body, parse_response
from stages.read.members import Plain, members_of
from stages.read.ranges import WHOLE, ByteRange, bounds

Kind = Literal["html", "text", "other"]

SKIP_REASONS = (
    "not_response",  # warcinfo, request, metadata (WAT too), continuation, unknown
    "revisit",
    "no_url",  # a page without WARC-Target-URI: no policy can be applied to it
    "not_http",  # a response of dns:, ftp:, ...
    "bad_http_header",
    "http_status",  # not 2xx
    "not_html",
    "not_text",  # a conversion that is not text/plain
    "too_large",  # before or after decoding
    "bad_encoding",
    "empty_payload",
    "unsupported",  # the whole file: ARC, or a compression other than gzip
)


class Record(NamedTuple):
    """A record of a WARC file.

    `payload` is decoded and not empty if `skipped` is None, else b"". `index` is the ordinal among
    the records read from the file, `offset` the position in bytes of its gzip member (which several
    records may share) or, in an uncompressed file, of the record. `date` is in UTC. `headers` are
    the HTTP headers, names in lower case, the last value where a name is repeated. `truncated`: the
    record may not be whole: the crawler or the end of the file cut it short, it is one of several
    segments, or its length is wrong.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    offset: int
    kind: Kind
    url: str
    date: datetime | None
    status: int | None
    headers: dict[str, str]
    payload: bytes
    truncated: bool
    skipped: str | None


@dataclass
class ReadStats(Accounts):
    """Counts of records that were read, skipped by reason, and of what was lost.

    `records` less the sum of `skipped` have a payload, which `truncated` of them have in part.
    """

    records: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    bytes_total: int = 0


def read_records(
    path: str | Path, *, max_payload_bytes: int, stats: ReadStats, byte_range: ByteRange = WHOLE
) -> Iterator[Record]:
    """Every readable record of a local file, or of a range of it, in order; `skipped` says why one
    is no document.

    The format is detected from the content, never the name. `stats` accounts for the bytes that are
    in no record; the last record of a file that was cut off is yielded as far as it goes, with
    `truncated` set. Ranges that cover a file give its records and add up to its `stats`, but that a
    damaged place on a bound counts on both sides. OSError only if the file cannot be opened;
    ValueError if it cannot be read in ranges.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        return  # mmap refuses an empty file
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first, stop = bounds(data, byte_range)
        if first == stop:
            return
        stats.bytes_total += stop - first
        for index, record in enumerate(_records(data, first, stop, max_payload_bytes, stats)):
            stats.records += 1
            if record.skipped is None:
                stats.truncated += record.truncated
            else:
                stats.skipped[record.skipped] += 1
            yield record._replace(index=index)


def begins_as_warc(path: Path) -> bool:
    """Whether a file begins with a record of a WARC or ARC, or with a damaged member."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = _head(data)
    return head is None or head.startswith((b"WARC/", b"filedesc://"))


def _head(data: mmap.mmap) -> bytes | None:
    """The first bytes of a file, decompressed; None if they cannot be."""
    members = members_of(data)
    return data[:64] if isinstance(members, Plain) else members.head(members.skip_filling(0))


# ARC, lz4, bzip2
_UNSUPPORTED = (b"filedesc://", b"\x04\x22\x4d\x18", b"BZh")


def _records(
    data: mmap.mmap, first: int, stop: int, limit: int, stats: ReadStats
) -> Iterator[Record]:
    if data[:16].startswith(_UNSUPPORTED) or (_head(data) or b"").startswith(_UNSUPPORTED):
        if first == 0:
            yield _empty_record(0)._replace(skipped="unsupported")
        return
    for frame in read_frames(data, first, stop, keep=limit + 1 + MAX_HEADER, accounts=stats):
        yield _read_document(frame, limit)


# --- one record -----------------------------------------------------------------------------------


def _empty_record(offset: int) -> Record:
    return Record(0, offset, "other", "", None, None, {}, b"", False, None)


def _read_document(frame: Frame, limit: int) -> Record:
    fields = frame.fields
    record = _empty_record(frame.offset)._replace(
        url=clean_url(fields.get("warc-target-uri", "")),
        date=_utc(fields.get("warc-date", "")),
        # a page may be in several segments, which follow in this or another file (ISO 28500, 7)
        truncated=frame.truncated or "warc-truncated" in fields or "warc-segment-number" in fields,
    )
    content_type = fields.get("content-type", "")
    warc_type = fields.get("warc-type", "").lower()
    if warc_type in ("response", "resource", "conversion") and not record.url:
        return record._replace(skipped="no_url")
    match warc_type:
        case "response":
            return _read_response(frame, record, limit)
        case "resource":
            record = record._replace(headers={"content-type": content_type})
            return _read_payload(frame, 0, record, limit)
        case "conversion":
            if _media_type(content_type) != "text/plain":
                return record._replace(skipped="not_text")
            return _read_payload(frame, 0, record, limit, is_text=True)
        case "revisit":
            return record._replace(skipped="revisit")
    return record._replace(skipped="not_response")


def _utc(date: str) -> datetime | None:
    try:
        parsed = datetime.fromisoformat(date)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # the year 1 or 9999, with an offset
        return None


def clean_url(url: str) -> str:
    """wget writes <http://...>, some crawlers leave spaces; anything else stays as it is."""
    return url.strip().removeprefix("<").removesuffix(">").strip().replace(" ", "%20")


def _read_response(frame: Frame, record: Record, limit: int) -> Record:
    is_http = frame.fields.get("content-type", "").lower().startswith("application/http")
    if not is_http and not record.url.lower().startswith(("http:", "https:")):
        return record._replace(skipped="not_http")
    response = parse_response(frame.block)
    if response is None:
        return record._replace(skipped="bad_http_header")
    record = record._replace(status=response.status, headers=response.headers)
    if not 200 <= response.status <= 299:
        return record._replace(skipped="http_status")
    return _read_payload(frame, response.body_start, record, limit)


def _read_payload(
    frame: Frame, start: int, record: Record, limit: int, *, is_text: bool = False
) -> Record:
    """Decode the body of a record, which starts in its block at `start`, if it may be HTML."""
    content_type = record.headers.get("content-type", "")
    identified = frame.fields.get("warc-identified-payload-type", "")
    is_html = _is_declared_html(identified, content_type)
    if is_html is False and not is_text:
        return record._replace(skipped="not_html")
    body = Body(frame.block[start:], None)
    if len(body.data) <= limit:
        body = decode_body(body.data, record.headers, limit=limit)
    if len(body.data) > limit:
        return record._replace(skipped="too_large")
    if body.problem is not None:
        return record._replace(skipped=body.problem)
    if not body.data.strip():
        return record._replace(skipped="empty_payload")
    if is_text:
        return record._replace(kind="text", payload=body.data)
    if not _has_html_content(body.data, sure=is_html is True):
        return record._replace(skipped="not_html")
    return record._replace(kind="html", payload=body.data)


# --- HTML or not ----------------------------------------------------------------------------------

_HTML_TYPES = frozenset(
    {"text/html", "text/htm", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"}
)
# types that say nothing of a page; XML may be XHTML or a feed
_GENERIC_TYPES = frozenset(
    {"", "*/*", "unknown/unknown", "application/unknown", "content/unknown",
     "application/octet-stream", "binary/octet-stream", "application/x-unknown-content-type",
     "application/xml", "text/xml"}
)  # fmt: skip
_HTML_TAG = re.compile(rb"<(?:!doctype\s+html|html|head|body|meta)(?=[\s/>])", re.IGNORECASE)
_TITLE = re.compile(rb"\s*<title(?=[\s/>])", re.IGNORECASE)  # feeds have titles too, but not first
_BINARY = (
    b"%PDF",
    b"\x89PNG",
    b"GIF8",
    b"\xff\xd8\xff",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
    b"RIFF",
    b"{\\rtf",
)


_MEDIA_TYPE = re.compile(r"[\w!#$&^+.*-]+/[\w!#$&^+.*-]+", re.ASCII)


def _media_type(content_type: str) -> str:
    """'Text/HTML; charset=x' -> 'text/html'; "" for what is no type (MIME Sniffing, 4.4)."""
    name = content_type.partition(";")[0].partition(",")[0].strip().lower()
    return name if _MEDIA_TYPE.fullmatch(name) else ""


def _is_declared_html(identified: str, content_type: str) -> bool | None:
    """Whether the crawler, else the server, declared HTML; None if neither says."""
    for name in (_media_type(identified), _media_type(content_type)):
        if name not in _GENERIC_TYPES:
            return name in _HTML_TYPES
    return None


def _has_html_content(body: bytes, *, sure: bool) -> bool:
    """Whether a body is HTML: without another format's magic if it was declared as HTML (`sure`),
    else with a tag in the first 1 kB.
    """
    if sure:
        return not body.startswith(_BINARY)
    return (_HTML_TAG.search(body, 0, 1024) or _TITLE.match(body)) is not None
