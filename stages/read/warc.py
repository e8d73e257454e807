"""Reads records from WARC and WET files, damaged ones included, and undoes HTTP's transfer and
content encodings.

FastWARC does the reading. Where it stops before the end of a file, silently or not, zlib says
whether the last gzip member was whole, and reading goes on at the next place where a record starts.
A record is handed out only after the next one was begun, that is after the checksum of its member
was seen: no damaged member of one record gets through.
"""

import mmap
import re
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import brotli
import zstandard
from fastwarc.stream_io import GzipReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

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
    """A record of a WARC file; `payload` is decoded and not empty if `skipped` is None, and b""
    otherwise.

    `index` is the ordinal among the records read from the file, `offset` the place in the file, in
    bytes, of its gzip member (which several records may share) or, in an uncompressed file, of the
    record. `date` is in UTC. `headers` are HTTP's, names in lower case, the last value where a name
    is repeated. `truncated`: the crawler or the end of the file cut the record short.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses
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
    """What was read, skipped by reason, and lost; `records` less the sum of `skipped` were
    delivered.

    `lost_bytes` are bytes of the file in `lost_members` damaged places, each from the start of the
    damaged member or record to where reading went on. In a member of many records the start is
    known to FastWARC's buffer size (64 kB).
    """

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lost_bytes: int = 0
    lost_members: int = 0
    bytes_total: int = 0


def read_records(path: str | Path, *, max_payload_bytes: int, stats: ReadStats) -> Iterator[Record]:
    """Every readable record of a local file, in order; the ones that are no document say why in
    `skipped`.

    The kind of file is told by its content, never its name. A record in a damaged place is not
    delivered but counted in `stats`; the last record of a file that was cut off is delivered as far
    as it goes, with `truncated` set. OSError only if the file cannot be opened.
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


# -- from one damaged place to the next
# --------------------------------------------------------------------------------

_GZIP_MAGIC = b"\x1f\x8b\x08"
_UNSUPPORTED = (
    b"filedesc://",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"BZh",
)  # ARC, zstd, lz4, bzip2
_PADDING = b"\0\r\n\t "
_PLAIN_START = re.compile(rb"WARC/[01]\.\d+\r?\n(?:WARC|Content)-[A-Za-z-]+:")


def begins_as_warc(path: Path) -> bool:
    """Whether a file's first bytes are those of a record, plain or packed by gzip, or cannot be
    told for damage.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(_GZIP_MAGIC):
        head = _gunzip_head(head, 0) or b"WARC/"
    return head.startswith(b"WARC/")


class _Stop(NamedTuple):
    """Where a run ended: bytes from `lost_from` on are undelivered, the next record starts behind
    `search_from`.
    """

    lost_from: int
    search_from: int


_Run = Generator[Record, None, _Stop]


def _walk(path: Path, data: mmap.mmap, limit: int, stats: ReadStats) -> Iterator[Record]:
    gzipped = data[:2] == _GZIP_MAGIC[:2]
    if (_gunzip_head(data, 0) if gzipped else data[:16]).startswith(_UNSUPPORTED):
        yield _blank_record(0)._replace(skipped="unsupported")
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
    """Deliver records from the member at `start` on, until FastWARC stops; zlib then judges the
    member it was in.
    """
    at, mark, held, swallowed = start, start, None, False
    quirks = _only_line_feeds(_gunzip_head(data, start))
    with open(path, "rb") as file:
        file.seek(start)
        reader = GzipReader(file)
        try:
            for warc in ArchiveIterator(reader, parse_http=False, quirks_mode=quirks):
                if held is not None:
                    yield held.record
                member = _frame(reader)
                mark = warc.stream_pos if held is not None and member == at else member
                at, held = member, None
                held = _take(warc, at, limit)
                swallowed = _frame(reader) != at and _starts_record(
                    data, _member_end(data, at).offset
                )
                if held.missing != 0 or swallowed:
                    break
        except OSError:
            pass  # FastWARC's word for any damage; what it means is found out below
        stopped_in = _frame(reader)
    if held is None:
        return _Stop(mark, at + 1)
    end = _member_end(data, at)
    if (
        end.state == "corrupt"
        or held.missing is None
        or (end.state == "whole" and (swallowed or held.missing))
    ):
        return _Stop(mark, max(end.offset, at + 1))
    yield held.record
    if end.state == "cut":
        return _Stop(mark, len(data))
    # the member is whole: either it holds more, which FastWARC did not take for a record, or what
    # follows is bad
    inside = end.offset < len(data) and stopped_in == at and _starts_record(data, end.offset)
    return _Stop(mark if inside else end.offset, end.offset)


def _run_plain(path: Path, data: mmap.mmap, start: int, limit: int) -> _Run:
    """Deliver records from byte `start` on, until the next one is not where the length of the last
    one says.
    """
    at, held = start, None
    quirks = _only_line_feeds(data[start : start + 16])
    with open(path, "rb") as file:
        file.seek(start)
        try:
            for warc in ArchiveIterator(
                file, parse_http=False, quirks_mode=quirks, stream_detect=False
            ):
                if held is not None:
                    yield held.record
                at, held = warc.stream_pos, None
                held = _take(warc, at, limit)
                if held.missing != 0:
                    break
        except OSError:
            pass
    if held is None or held.missing is None:
        return _Stop(at, at + 1)
    if held.missing == 0:
        yield held.record
        end = _plain_end(data, at, held.length)
        return _Stop(end, end)
    if _next_plain(data, at + 1) is None:
        yield held.record
    return _Stop(at, at + 1)  # cut off, or a length that lies and swallowed the records after it


def _count_loss(data: mmap.mmap, start: int, end: int, stats: ReadStats) -> None:
    """Count the bytes from `start` to `end` as one damaged place, but not padding or empty gzip
    members.
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


# -- where records start and members end
# -------------------------------------------------------------------------------


class _MemberEnd(NamedTuple):
    """`offset` is behind the member if it is whole, the end of the file if cut, 0 if corrupt (its
    end is unknown).
    """

    state: Literal["whole", "cut", "corrupt"]
    offset: int


def _member_end(data: mmap.mmap, start: int) -> _MemberEnd:
    """Unpack the gzip member at `start`, checksum and all. Costs as much as reading it: only where
    FastWARC stopped.
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
    """First bytes (at most 16) of what the gzip member at `start` holds; b"" if there is none."""
    try:
        return zlib.decompressobj(31).decompress(data[start : start + 4096], 16)
    except zlib.error:
        return b""


def _starts_record(data: mmap.mmap, offset: int) -> bool:
    return data[offset : offset + 3] == _GZIP_MAGIC and _gunzip_head(data, offset).startswith(
        b"WARC/"
    )


def _next_member(data: mmap.mmap, start: int) -> int | None:
    """Offset of the first gzip member at or behind `start` that begins with a WARC record."""
    at = data.find(_GZIP_MAGIC, start)
    while at >= 0 and not _gunzip_head(data, at).startswith(b"WARC/"):
        at = data.find(_GZIP_MAGIC, at + 1)
    return at if at >= 0 else None


def _next_plain(data: mmap.mmap, start: int) -> int | None:
    match = _PLAIN_START.search(data, start)
    return match.start() if match else None


def _plain_end(data: mmap.mmap, start: int, length: int) -> int:
    """Offset behind the block of the record at `start`, whose header ends at the first empty line."""
    blank = re.compile(rb"\r?\n\r?\n").search(data, start)
    return min((blank.end() if blank else start) + length, len(data))


def _only_line_feeds(head: bytes) -> bool:
    """Whether a header ends its lines by LF alone, as rewritten files do. FastWARC reads these only
    when asked to be lenient, and then skips garbage between records without a word: so only for
    them."""
    return b"\n" in head and b"\r\n" not in head


def _frame(reader: GzipReader) -> int:
    position = reader.frame_start_position()
    return 0 if position is None else position


# -- one record
# --------------------------------------------------------------------------------------------------------

_NOT_DOCUMENTS = (
    WarcRecordType.warcinfo
    | WarcRecordType.request
    | WarcRecordType.metadata
    | WarcRecordType.continuation
    | WarcRecordType.unknown
)


class _Held(NamedTuple):
    """A record whose member is not yet known to be whole; `missing` bytes of its block were not
    there, None if it does not say how long the block of `length` bytes should be."""

    record: Record
    length: int
    missing: int | None


def _take(warc: WarcRecord, offset: int, limit: int) -> _Held:
    """Read a record to its end. OSError where the file is damaged."""
    length = (warc.headers.get("Content-Length") or "").strip()
    record = _blank_record(offset)._replace(
        url=_clean_url(warc.headers.get("WARC-Target-URI") or ""),
        date=_utc(warc.record_date),
        truncated=warc.headers.get("WARC-Truncated") is not None,
    )
    record = _read_document(warc, record, limit)
    warc.consume()
    missing = (
        warc.content_length - warc.reader.tell()
    )  # both count from behind the HTTP header, once it was parsed
    if missing:
        record = record._replace(truncated=True)
    known = length.isascii() and length.isdigit()
    return _Held(record, int(length) if known else 0, missing if known else None)


def _blank_record(offset: int) -> Record:
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
        if _bare(content_type) != "text/plain":
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
    except OSError:  # longer than 32 kB; if the file is damaged, the next read says so again
        return record._replace(skipped="bad_http_header")
    http = warc.http_headers
    status = http.status_code
    headers = {name.lower(): value for name, value in http.to_tuples()}
    robots = [value for name, value in http.to_tuples() if name.lower() == "x-robots-tag"]
    if robots:  # often sent twice, and the last must not hide a refusal in the first
        headers["x-robots-tag"] = ", ".join(robots)
    record = record._replace(status=status, headers=headers)
    if status is None:
        return record._replace(skipped="bad_http_header")
    if not 200 <= status <= 299:
        return record._replace(skipped="http_status")
    return _read_payload(warc, record, record.headers.get("content-type", ""), limit)


def _read_payload(warc: WarcRecord, record: Record, content_type: str | None, limit: int) -> Record:
    """Read the body if it may be HTML, or in any case if `content_type` is None, and decode it."""
    says_html: bool | None = True
    if content_type is not None:
        says_html = _says_html(warc.headers.get("WARC-Identified-Payload-Type") or "", content_type)
    if says_html is False:
        return record._replace(skipped="not_html")
    body = _Body(warc.reader.read(limit + 1), None)
    if len(body.data) <= limit:
        body = decode_body(body.data, record.headers, limit=limit)
    if len(body.data) > limit:
        return record._replace(skipped="too_large")
    if body.problem is not None:
        return record._replace(skipped=body.problem)
    if not body.data.strip():
        return record._replace(skipped="empty_payload")
    if content_type is not None and not _looks_like_html(body.data, sure=says_html is True):
        return record._replace(skipped="not_html")
    return record._replace(kind="html", payload=body.data)


# -- is it HTML?
# -------------------------------------------------------------------------------------------------------

_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
_GENERIC_TYPES = frozenset(
    {"", "*/*", "text", "html", "unknown/unknown", "application/unknown", "application/octet-stream",
     "binary/octet-stream", "application/x-unknown-content-type", "content/unknown"}
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


def _bare(content_type: str) -> str:
    """'Text/HTML; charset=x' -> 'text/html'."""
    return content_type.partition(";")[0].partition(",")[0].strip().lower()


def _says_html(identified: str, content_type: str) -> bool | None:
    """What the crawler found out, else what the server said; None if neither says anything."""
    for name in (_bare(identified), _bare(content_type)):
        if name not in _GENERIC_TYPES:
            return name in _HTML_TYPES
    return None


def _looks_like_html(body: bytes, *, sure: bool) -> bool:
    """A body declared as HTML counts unless it bears another format's magic; any other must show a
    tag in 1 kB.
    """
    if sure:
        return not body.startswith(_BINARY)
    return _HTML_TAG.search(body, 0, 1024) is not None


# -- HTTP's encodings
# --------------------------------------------------------------------------------------------------


class _Body(NamedTuple):
    data: bytes
    problem: str | None


def decode_body(body: bytes, headers: dict[str, str], *, limit: int) -> _Body:
    """Undo chunking and content encodings, up to `limit` + 1 bytes: a bomb costs no more than that.

    Headers lie: rebuilt and Common Crawl's records hold decoded bodies. What does not decode and
    looks like text stays as it is; else the problem is 'bad_encoding'. A stream that was cut gives
    what it held.
    """
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _dechunk(body)
    names = [name.strip().lower() for name in headers.get("content-encoding", "").split(",")]
    for name in reversed(names[:4]):  # more than one is rare, more than four an attack
        if name in _NO_ENCODING or not body:
            continue
        try:
            body = _DECODERS[name](body, limit)
        except (KeyError, zlib.error, brotli.error, zstandard.ZstdError):
            if not _looks_like_text(body):
                return _Body(b"", "bad_encoding")
    return _Body(body, None)


_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def _dechunk(body: bytes) -> bytes:
    """Join the chunks; from the first place on that is no chunk, keep the bytes as they are."""
    chunks: list[bytes] = []
    at = 0
    while at < len(body):
        size = _CHUNK_SIZE.match(body, at)
        if size is None:
            chunks.append(body[at:])
            break
        length = int(size[1], 16)
        if length == 0:
            break
        chunks.append(body[size.end() : size.end() + length])
        at = size.end() + length
        at += 2 if body.startswith(b"\r\n", at) else body.startswith(b"\n", at)
    return b"".join(chunks)


def _gunzip(body: bytes, limit: int) -> bytes:
    return zlib.decompressobj(31).decompress(body, limit + 1)


def _inflate(body: bytes, limit: int) -> bytes:
    """'deflate' should be zlib's format, but many servers send the bare stream."""
    try:
        return zlib.decompressobj(15).decompress(body, limit + 1)
    except zlib.error:
        return zlib.decompressobj(-15).decompress(body, limit + 1)


def _unbrotli(body: bytes, limit: int) -> bytes:
    unpacked: bytes = brotli.Decompressor().process(
        body, output_buffer_limit=limit + 1
    )  # may overshoot by a block
    return unpacked[: limit + 1]


def _unzstd(body: bytes, limit: int) -> bytes:
    # 8 MB is the window that RFC 8878 asks of every reader; a larger one lets a few bytes claim
    # gigabytes
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 23)
    return decompressor.stream_reader(body, read_across_frames=True).read(limit + 1)


_NO_ENCODING = frozenset({"", "identity", "none", "utf-8", "binary", "8bit", "7bit"})
_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip, "x-gzip": _gunzip, "deflate": _inflate, "br": _unbrotli, "zstd": _unzstd
}  # fmt: skip
_CONTROLS = bytes({*range(32)} - {9, 10, 12, 13, 27})


def _looks_like_text(body: bytes) -> bool:
    """No control characters in the first 1 kB: compressed bytes have about one in nine."""
    head = body[:1024]
    return len(head.translate(None, _CONTROLS)) == len(head)
