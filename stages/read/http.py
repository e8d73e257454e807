"""Read HTTP responses as crawlers store them: status, headers, and the body without encodings."""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import brotli
import zstandard

MAX_HEADER = 1 << 18  # bytes, as in browsers
_STATUS_LINE = re.compile(
    rb"\s*(?:HTTPS?(?:/[0-9.]*)?|ICY)[ \t]+([0-9]{1,3})(?![0-9])([^\r\n]*)", re.I
)
_BLANK_LINE = re.compile(rb"\r?\n[ \t]*\r?\n")


class Response(NamedTuple):
    """The head of a response: its headers, names in lower case, and where its body starts."""

    status: int
    headers: dict[str, str]
    body_start: int


def parse_response(block: bytes) -> Response | None:
    """The final response in `block`; None if it does not begin with a status line and headers.

    What comes before it is skipped: interim responses (RFC 9110, 15.2) and those of a proxy to
    CONNECT. Of a header that is repeated the last value counts, of X-Robots-Tag all of them, as
    none may hide a refusal in another.
    """
    start = 0
    while (status_line := _STATUS_LINE.match(block, start)) is not None:
        blank = _BLANK_LINE.search(block, start, start + MAX_HEADER)
        if blank is None and len(block) > start + MAX_HEADER:
            return None
        body_start = len(block) if blank is None else blank.end()
        status = int(status_line[1])
        is_interim = 100 <= status < 200 or b"connection established" in status_line[2].lower()
        if is_interim and _STATUS_LINE.match(block, body_start):
            start = body_start
            continue
        head = block[status_line.end() : len(block) if blank is None else blank.start()]
        return Response(status, _parse_headers(head), body_start)
    return None


# repeated, each of their values counts (filters.opt_out); of other headers the last one does
_REFUSALS = ("x-robots-tag", "tdm-reservation")


def _parse_headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in re.sub(rb"\r?\n[ \t]+", b" ", head).decode("latin-1").split("\n"):
        name, colon, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in _REFUSALS and name in headers:
            value = f"{headers[name]}, {value}"
        if colon:
            headers[name] = value
    return headers


class Body(NamedTuple):
    """A decoded body; `problem` is a skip reason if it could not be decoded."""

    data: bytes
    problem: str | None


def decode_body(body: bytes, headers: dict[str, str], *, limit: int) -> Body:
    """Undo chunking and content encodings, up to `limit` + 1 bytes, which limits compression bombs.

    Headers are often wrong: rebuilt records and those of Common Crawl have decoded bodies. What
    does not decode and looks like text is kept unchanged; else the problem is 'bad_encoding'. A
    stream that was cut gives what it has.
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
                return Body(b"", "bad_encoding")
    return Body(body, None)


_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")


def _dechunk(body: bytes) -> bytes:
    """Join the chunks; bytes after the last valid chunk are kept unchanged."""
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
    """'deflate' should be zlib's format, but many servers send a raw stream."""
    try:
        return zlib.decompressobj(15).decompress(body, limit + 1)
    except zlib.error:
        return zlib.decompressobj(-15).decompress(body, limit + 1)


def _unbrotli(body: bytes, limit: int) -> bytes:
    # the output may exceed the limit by a block
    data: bytes = brotli.Decompressor().process(body, output_buffer_limit=limit + 1)
    return data[: limit + 1]


def _unzstd(body: bytes, limit: int) -> bytes:
    # 8 MB is the window that RFC 8878 requires of readers; with a larger one a few bytes can
    # claim gigabytes
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
