"""WARC files of every shape, damaged at random, and what a reader may not do with them."""

import gzip
import random
from pathlib import Path
from typing import Literal, NamedTuple

import zstandard

from stages.read.warc import ReadStats, read_records

SHAPES = ("plain", "members", "one member", "frames", "one frame", "blocks")
Shape = Literal["plain", "members", "one member", "frames", "one frame", "blocks"]
# what the files of other crawlers have in the wrong place, or what a damaged disk puts there
_JUNK = (
    b"\0" * 70,
    b"?",
    b"\r\n",
    b"junk\r\n",
    b"WARC/1.0\r\n",
    b"Content-Length: 7\r\n",
    b"\x1f\x8b\x08\0",
)


class Damaged(NamedTuple):
    """A file of pages, some of them in untouched records; `before_packing` is what it decompresses
    to, None if the compressed bytes were changed."""

    data: bytes
    pages: list[bytes]
    untouched: list[bool]
    before_packing: int | None


def damaged_file(seed: int) -> Damaged:
    """A file of 6 records, with 1 to 3 changes before or after it is compressed."""
    rng = random.Random(seed)
    end_of_line = rng.choice((b"\r\n", b"\n"))
    pages = [_page(rng, i) for i in range(6)]
    records = [record(page, i, end_of_line) for i, page in enumerate(pages)]
    shape = rng.choice(SHAPES)
    if shape == "plain" or rng.random() < 0.5:
        parts, touched = damage(rng, records)
        data = pack(parts, shape)
        return Damaged(data, pages, [not t for t in touched], sum(map(len, parts)))
    packed = [pack([record], shape) for record in records]
    if shape in ("one member", "one frame"):
        packed = [pack(records, shape)]
    parts, touched = damage(rng, packed)
    untouched = [not t for t in touched] if len(packed) == 6 else [False] * 6
    return Damaged(b"".join(parts), pages, untouched, None)


def pack(parts: list[bytes], shape: str) -> bytes:
    """A WARC file: plain; a gzip member or zstd frame for each part, or for all of them; or gzip
    members of 500 bytes each."""
    whole = b"".join(parts)
    if shape == "blocks":
        parts = [whole[i : i + 500] for i in range(0, len(whole), 500)]
    match shape:
        case "plain":
            return whole
        case "members" | "blocks":
            return b"".join(gzip.compress(part, 6, mtime=0) for part in parts)
        case "one member":
            return gzip.compress(whole, 6, mtime=0)
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    return compress(whole) if shape == "one frame" else b"".join(map(compress, parts))


def uncounted(file: Damaged, folder: Path) -> str | None:
    """What a reader did to the file without accounting for it; None if all is well."""
    path = folder / "damaged.warc"
    path.write_bytes(file.data)
    stats = ReadStats()
    records = list(read_records(path, max_payload_bytes=1 << 20, stats=stats))
    if file.before_packing is not None and (
        stats.framed_bytes + stats.lost_bytes != file.before_packing or stats.unreadable_bytes
    ):
        return f"{stats} does not add up to {file.before_packing}"
    payloads = [record.payload for record in records]
    absent = [i for i, page in enumerate(file.pages) if page not in payloads]
    if any(file.untouched[i] for i in absent):
        return f"an untouched record is not delivered: {absent}, {stats}"
    # a record may be changed or skipped, but not disappear
    others = sum(payload not in file.pages for payload in payloads)
    if len(absent) > others and not stats.damaged_places:
        return f"lost without being counted: {absent}, {stats}"
    return None


def _page(rng: random.Random, number: int) -> bytes:
    words = " ".join(
        rng.choices(("grist", "mill", "stone", "water", "wheel"), k=rng.randint(5, 300))
    )
    return f"<!doctype html><html><body>{number}<p>{words}</p></body></html>".encode()


def record(page: bytes, number: int, end_of_line: bytes) -> bytes:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    header = (
        b"WARC/1.0", b"WARC-Type: response", b"WARC-Target-URI: http://example.org/%d" % number,
        b"WARC-Date: 2024-05-01T10:00:00Z", b"Content-Type: application/http; msgtype=response",
        b"Content-Length: %d" % len(block), b"", b"",
    )  # fmt: skip
    return end_of_line.join(header) + block + end_of_line * 2


def damage(rng: random.Random, parts: list[bytes]) -> tuple[list[bytes], list[bool]]:
    """The parts with 1 to 3 changes, and which of them were changed; a cut takes all that follow."""
    parts, touched = list(parts), [False] * len(parts)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(parts))
        part = parts[i]
        # not between two records: nobody can see a cut there
        a = rng.randint(1, max(1, len(part.rstrip(b"\0\r\n")) - 1))
        b = min(len(part), a + rng.choice((1, 2, 10, 200)))
        kind = rng.choice(("flip", "delete", "insert", "truncate", "cut off"))
        if kind == "flip":
            parts[i] = part[:a] + bytes(byte ^ rng.randint(1, 255) for byte in part[a:b]) + part[b:]
        elif kind == "delete":
            parts[i] = part[:a] + part[b:]
        elif kind == "insert":
            parts[i] = part[:a] + rng.choice(_JUNK) + part[a:]
        elif kind == "truncate":
            parts[i] = part[:a]
        else:
            parts[i:] = [part[:a]] + [b""] * (len(parts) - i - 1)
            touched[i:] = [True] * (len(parts) - i)
        touched[i] = True
    return parts, touched
