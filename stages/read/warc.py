"""Read records from WARC and WET files, damaged ones included.

FastWARC reads the records. Where it stops before the end of a file, silently or not, zlib checks
whether the last gzip member was whole, and reading continues at the next place where a record
starts. A record is yielded only after the next one was started, so after the checksum of its member
was checked: no damaged member with one record gets through.
"""

import mmap
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from fastwarc.stream_io import GzipReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from stages.read.http_body import Body, decode_body

Kind = Literal["html", "text", "other"]

SKIP_REASONS = (
    "not_response",  # warcinfo, request, metadata (WAT too), continuation, unknown
    "revisit",
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
    crawler or the end of the file cut the record short.
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
class ReadStats:
    """Counts of records that were read, skipped by reason, and of what was lost.

    `records` less the sum of `skipped` have a payload. `lost_bytes` are bytes of the file in
    `lost_members` damaged places, each from the start of the damaged member or record to where
    reading continued. In a member with many records the start is known to the size of FastWARC's
    buffer (64 kB).
    """

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lost_bytes: int = 0
    lost_members: int = 0
    bytes_total: int = 0


def read_records(path: str | Path, *, max_payload_bytes: int, stats: ReadStats) -> Iterator[Record]:
    """Every readable record of a local file, in order; `skipped` says why one is no document.

    The format is detected from the content, never the name. Records in a damaged place are not
    yielded, but their bytes are counted in `stats`; the last record of a file that was cut off is
    yielded as far as it goes, with `truncated` set. OSError only if the file cannot be opened.
    """
    path = Path(path)
    size = path.stat().st_size
    stats.bytes_total += size
    if size == 0:
        return  # mmap refuses an empty file
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for index, record in enumerate(_walk(path, data, max_payload_bytes, stats)):
            stats.records += 1
            if record.skipped is not None:
                stats.skipped[record.skipped] += 1
            yield record._replace(index=index)


# --- runs of records between damaged places -------------------------------------------------------

_GZIP_MAGIC = b"\x1f\x8b\x08"
# ARC, zstd, lz4, bzip2
_UNSUPPORTED = (
    b"filedesc://",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"BZh",
)
_PADDING = b"\0\r\n\t "
_PLAIN_START = re.compile(rb"WARC/[01]\.\d+\r?\n(?:WARC|Content)-[A-Za-z-]+:")


def begins_as_warc(path: Path) -> bool:
    """Whether a file begins with a record, plain or gzipped, or with a damaged gzip member."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(_GZIP_MAGIC):
        head = _gunzip_head(head, 0) or b"WARC/"
    return head.startswith(b"WARC/")


class _Stop(NamedTuple):
    """Where a run ended.

    Bytes from `lost_from` on were not yielded; the next record starts at or after `search_from`.
    """

    lost_from: int
    search_from: int


_Run = Generator[Record, None, _Stop]


def _walk(path: Path, data: mmap.mmap, limit: int, stats: ReadStats) -> Iterator[Record]:
    gzipped = data[:2] == _GZIP_MAGIC[:2]
    if (_gunzip_head(data, 0) if gzipped else data[:16]).startswith(_UNSUPPORTED):
        yield _empty_record(0)._replace(skipped="unsupported")
        return
    find, run = (
        (_next_member, _run_gzip)
        if gzipped or _next_plain(data, 0) is None
        else (_next_plain, _run_plain)
    )
    stop = _Stop(0, 0)
    while (start := find(data, stop.search_from)) is not None:
        _count_loss(data, stop.lost_from, start, stats)
        stop = yield from run(path, data, start, limit)
    _count_loss(data, stop.lost_from, len(data), stats)


def _run_gzip(path: Path, data: mmap.mmap, start: int, limit: int) -> _Run:
    """Yield records from the member at `start` on until FastWARC stops; then zlib checks the member
    that it was in.
    """
    at, mark, last, has_swallowed_next = start, start, None, False
    quirks = _only_line_feeds(_gunzip_head(data, start))
    with open(path, "rb") as file:
        file.seek(start)
        reader = GzipReader(file)
        try:
            for warc in ArchiveIterator(reader, parse_http=False, quirks_mode=quirks):
                if last is not None:
                    yield last.record
                member = _member_start(reader)
                mark = warc.stream_pos if last is not None and member == at else member
                at, last = member, None
                last = _read_record(warc, at, limit)
                has_swallowed_next = _member_start(reader) != at and _starts_record(
                    data, _member_end(data, at).offset
                )
                if last.missing != 0 or has_swallowed_next:
                    break
        except OSError:
            pass  # FastWARC raises it for any damage; what was damaged is checked below
        stopped_in = _member_start(reader)
    if last is None:
        return _Stop(mark, at + 1)
    end = _member_end(data, at)
    if (
        end.state == "corrupt"
        or last.missing is None
        or (end.state == "whole" and (has_swallowed_next or last.missing))
    ):
        return _Stop(mark, max(end.offset, at + 1))
    yield last.record
    if end.state == "cut":
        return _Stop(mark, len(data))
    # the member is whole: either it has more in it, which FastWARC did not recognize as a record,
    # or what follows is damaged
    inside = end.offset < len(data) and stopped_in == at and _starts_record(data, end.offset)
    return _Stop(mark if inside else end.offset, end.offset)


def _run_plain(path: Path, data: mmap.mmap, start: int, limit: int) -> _Run:
    """Yield records from byte `start` on, until the next one is not where the last one's length
    says.
    """
    at, last = start, None
    quirks = _only_line_feeds(data[start : start + 16])
    with open(path, "rb") as file:
        file.seek(start)
        try:
            for warc in ArchiveIterator(
                file, parse_http=False, quirks_mode=quirks, stream_detect=False
            ):
                if last is not None:
                    yield last.record
                at, last = warc.stream_pos, None
                last = _read_record(warc, at, limit)
                if last.missing != 0:
                    break
        except OSError:
            pass
    if last is None or last.missing is None:
        return _Stop(at, at + 1)
    if last.missing == 0:
        yield last.record
        end = _plain_end(data, at, last.length)
        return _Stop(end, end)
    if _next_plain(data, at + 1) is None:
        yield last.record
    return _Stop(at, at + 1)  # cut off, or its length is wrong and includes the next records


def _count_loss(data: mmap.mmap, start: int, end: int, stats: ReadStats) -> None:
    """Count the bytes from `start` to `end` as one damaged place, unless they are padding or empty
    gzip members.
    """
    gap = data[start : min(end, start + (1 << 16))].lstrip(_PADDING)
    while gap.startswith(_GZIP_MAGIC):
        unzip = zlib.decompressobj(31)
        try:
            if unzip.decompress(gap, 16).strip() or not unzip.eof:
                break
        except zlib.error:
            break
        gap = unzip.unused_data.lstrip(_PADDING)
    if gap or end - start > 1 << 16:
        stats.lost_bytes += end - start
        stats.lost_members += 1


# --- where records start and members end ----------------------------------------------------------


class _MemberEnd(NamedTuple):
    """`offset` is the byte after a whole member, the file's end if it is cut, 0 if corrupt."""

    state: Literal["whole", "cut", "corrupt"]
    offset: int


def _member_end(data: mmap.mmap, start: int) -> _MemberEnd:
    """Decompress the gzip member at `start` and check its checksum.

    As slow as reading it: only used where FastWARC stopped.
    """
    unzip, at = zlib.decompressobj(31), start
    try:
        while not unzip.eof and at < len(data):
            unzip.decompress(data[at : at + (1 << 16)])
            at = min(at + (1 << 16), len(data))
    except zlib.error:
        return _MemberEnd("corrupt", 0)
    return (
        _MemberEnd("whole", at - len(unzip.unused_data))
        if unzip.eof
        else _MemberEnd("cut", len(data))
    )


def _gunzip_head(data: mmap.mmap | bytes, start: int) -> bytes:
    """First bytes (at most 16) in the gzip member at `start`; b"" if there is none."""
    try:
        return zlib.decompressobj(31).decompress(data[start : start + 4096], 16)
    except zlib.error:
        return b""


def _starts_record(data: mmap.mmap, offset: int) -> bool:
    return data[offset : offset + 3] == _GZIP_MAGIC and _gunzip_head(data, offset).startswith(
        b"WARC/"
    )


def _next_member(data: mmap.mmap, start: int) -> int | None:
    """Offset of the first gzip member from `start` on that begins with a WARC record."""
    at = data.find(_GZIP_MAGIC, start)
    while at >= 0 and not _gunzip_head(data, at).startswith(b"WARC/"):
        at = data.find(_GZIP_MAGIC, at + 1)
    return at if at >= 0 else None


def _next_plain(data: mmap.mmap, start: int) -> int | None:
    match = _PLAIN_START.search(data, start)
    return match.start() if match else None


def _plain_end(data: mmap.mmap, start: int, length: int) -> int:
    """Offset after the block of the record at `start`; its header ends at the first empty line."""
    blank = re.compile(rb"\r?\n\r?\n").search(data, start)
    return min((blank.end() if blank else start) + length, len(data))


def _only_line_feeds(head: bytes) -> bool:
    """Whether the lines of a header end with LF alone, as in rewritten files.

    FastWARC reads these only in its lenient mode, which silently skips garbage between records: so
    that mode is used only for them.
    """
    return b"\n" in head and b"\r\n" not in head


def _member_start(reader: GzipReader) -> int:
    position = reader.frame_start_position()
    return 0 if position is None else position


# --- one record -----------------------------------------------------------------------------------

_NOT_DOCUMENTS = (
    WarcRecordType.warcinfo
    | WarcRecordType.request
    | WarcRecordType.metadata
    | WarcRecordType.continuation
    | WarcRecordType.unknown
)


class _ReadRecord(NamedTuple):
    """A record whose member is not yet known to be whole.

    `missing` bytes of its block of `length` bytes were absent; None if the header has no length.
    """

    record: Record
    length: int
    missing: int | None


def _read_record(warc: WarcRecord, offset: int, limit: int) -> _ReadRecord:
    """Read a record to its end. OSError where the file is damaged."""
    length = (warc.headers.get("Content-Length") or "").strip()
    record = _empty_record(offset)._replace(
        url=_clean_url(warc.headers.get("WARC-Target-URI") or ""),
        date=_utc(warc.record_date),
        truncated=warc.headers.get("WARC-Truncated") is not None,
    )
    record = _read_document(warc, record, limit)
    warc.consume()
    # once the HTTP header was parsed, both count from its end
    missing = warc.content_length - warc.reader.tell()
    if missing:
        record = record._replace(truncated=True)
    known = length.isascii() and length.isdigit()
    return _ReadRecord(record, int(length) if known else 0, missing if known else None)


def _empty_record(offset: int) -> Record:
    return Record(0, offset, "other", "", None, None, {}, b"", False, None)


def _utc(date: datetime | None) -> datetime | None:
    try:
        return None if date is None else date.astimezone(UTC)
    except OverflowError:  # the year 1 or 9999, with an offset
        return None


def _clean_url(url: str) -> str:
    """wget writes <http://...>, some crawlers leave spaces; anything else stays as it is."""
    return url.strip().removeprefix("<").removesuffix(">").strip().replace(" ", "%20")


def _read_document(warc: WarcRecord, record: Record, limit: int) -> Record:
    kind = warc.record_type
    if kind & _NOT_DOCUMENTS:
        return record._replace(skipped="not_response")
    if kind == WarcRecordType.revisit:
        return record._replace(skipped="revisit")
    if kind == WarcRecordType.response:
        return _read_response(warc, record, limit)
    content_type = warc.headers.get("Content-Type") or ""
    if kind == WarcRecordType.conversion:
        if _media_type(content_type) != "text/plain":
            return record._replace(skipped="not_text")
        return _read_payload(warc, record, None, limit)._replace(kind="text")
    return _read_payload(
        warc, record._replace(headers={"content-type": content_type}), content_type, limit
    )


def _read_response(warc: WarcRecord, record: Record, limit: int) -> Record:
    if not warc.is_http:
        if not record.url.lower().startswith(("http:", "https:")):
            return record._replace(skipped="not_http")
        warc.is_http = True
    try:
        warc.parse_http("none", quirks_mode=True)
    except OSError:  # longer than 32 kB; in a damaged file the next read raises again
        return record._replace(skipped="bad_http_header")
    http = warc.http_headers
    status = http.status_code
    headers = {name.lower(): value for name, value in http.to_tuples()}
    robots = [value for name, value in http.to_tuples() if name.lower() == "x-robots-tag"]
    if robots:  # often sent twice, and the last must not hide an opt-out in the first
        headers["x-robots-tag"] = ", ".join(robots)
    record = record._replace(status=status, headers=headers)
    if status is None:
        return record._replace(skipped="bad_http_header")
    if not 200 <= status <= 299:
        return record._replace(skipped="http_status")
    return _read_payload(warc, record, record.headers.get("content-type", ""), limit)


def _read_payload(warc: WarcRecord, record: Record, content_type: str | None, limit: int) -> Record:
    """Read the body if it may be HTML, or in any case if `content_type` is None, and decode it."""
    is_html: bool | None = True
    if content_type is not None:
        is_html = _is_declared_html(
            warc.headers.get("WARC-Identified-Payload-Type") or "", content_type
        )
    if is_html is False:
        return record._replace(skipped="not_html")
    body = Body(warc.reader.read(limit + 1), None)
    if len(body.data) <= limit:
        body = decode_body(body.data, record.headers, limit=limit)
    if len(body.data) > limit:
        return record._replace(skipped="too_large")
    if body.problem is not None:
        return record._replace(skipped=body.problem)
    if not body.data.strip():
        return record._replace(skipped="empty_payload")
    if content_type is not None and not _has_html_content(body.data, sure=is_html is True):
        return record._replace(skipped="not_html")
    return record._replace(kind="html", payload=body.data)


# --- HTML or not ----------------------------------------------------------------------------------

_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
_GENERIC_TYPES = frozenset(
    {"", "*/*", "text", "html", "unknown/unknown", "application/unknown", "content/unknown",
     "application/octet-stream", "binary/octet-stream", "application/x-unknown-content-type"}
)  # fmt: skip
_HTML_TAG = re.compile(rb"<(?:!doctype\s+html|html|head|body|title|meta)(?=[\s/>])", re.IGNORECASE)
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


def _media_type(content_type: str) -> str:
    """'Text/HTML; charset=x' -> 'text/html'."""
    return content_type.partition(";")[0].partition(",")[0].strip().lower()


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
    return _HTML_TAG.search(body, 0, 1024) is not None
