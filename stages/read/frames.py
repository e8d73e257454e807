"""Cut a WARC file into records, damaged or not, and account for every byte.

A file is a sequence of gzip members or zstd frames (both are called members here), or is not
compressed. ISA-L and zstandard decompress the members and check them. A member usually contains one
record; it may also contain all records of the file, or a part of one.

After damage, reading continues at the next place where a member or a record starts. A record at the
end of a damaged member is not delivered, as nobody can tell whether it is right.
"""

import mmap
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import zstandard
from isal import isal_zlib

# a record's start, unmistakable even in the middle of a line
START = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n(?:WARC|Content)-[A-Za-z-]{1,40}[ \t]*:")
_START_LENGTH = 100  # bytes of the longest match that matters
_VERSION = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n")
# what every header has at most once
_SINGLE_FIELDS = re.compile(
    rb"^(warc-(?:type|date|record-id|target-uri)|content-length)[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_BLANK_LINE = re.compile(rb"\n\r?\n")
_NOT_PADDING = re.compile(rb"[^\0\r\n\t ]")
_MAX_HEADER = 1 << 20

# Compressed bytes per step. What precedes damage is known to this size, and zstd can pack 128 MiB
# into it.
_CHUNK = 1 << 12
_PLAIN_CHUNK = 1 << 16
# Damage may be noticed only after a stored block of 64 kB, in which the next member may start.
_NOTICED_WITHIN = 1 << 17
# A longer block in which a record starts has a wrong length, whatever comes after it.
_MAX_LOOKAHEAD = 64 << 20


class Frame(NamedTuple):
    """A record as it is in the file.

    `offset` is the position in bytes of its member (which several records may share) or, in an
    uncompressed file, of the record. `fields` is the header, names in lower case. `block` is the
    record's content, or as much of it as was asked for. `truncated`: it does not end where the
    header says, as the file was cut off or the header is wrong.
    """

    offset: int
    fields: dict[str, str]
    block: bytes
    truncated: bool


@dataclass
class Accounts:
    """Where the bytes of a file went.

    Of the decompressed bytes, `framed_bytes` are in records or are white space and zeros around
    them, and all others are `lost_bytes`. `unreadable_bytes` of the file cannot be decompressed.
    `damaged_places` are runs of lost or unreadable bytes, and records that are cut short.
    """

    framed_bytes: int = 0
    lost_bytes: int = 0
    unreadable_bytes: int = 0
    damaged_places: int = 0
    _is_in_damage: bool = False

    def frame(self, size: int, *, is_whole: bool) -> None:
        self.framed_bytes += size
        self._is_in_damage = False
        if not is_whole:
            self.note_damage()

    def lose(self, size: int, *, unreadable: int = 0) -> None:
        self.lost_bytes += size
        self.unreadable_bytes += unreadable
        if size or unreadable:
            self.note_damage()

    def note_damage(self) -> None:
        self.damaged_places += not self._is_in_damage
        self._is_in_damage = True


def read_frames(data: mmap.mmap, *, keep: int, accounts: Accounts) -> Iterator[Frame]:
    """Every record of a file, in order, with at most `keep` bytes of its block."""
    members = members_of(data)
    at = members.skip_filling(0)
    while at < len(data):
        start = members.find(at)
        accounts.lose(0, unreadable=(len(data) if start is None else start) - at)
        if start is None:
            break
        stream = _Stream(members, start)
        yield from _cut(stream, keep, accounts)
        at = members.skip_filling(stream.resume)


# --- members: where they start, and how to decompress them ----------------------------------------


class Gzip:
    """The gzip members of a file."""

    magic = b"\x1f\x8b\x08"
    errors: tuple[Any, ...] = (isal_zlib.error,)

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def decompressor(self) -> Any:
        return isal_zlib.decompressobj(31)  # twice as fast as zlib

    def head(self, offset: int) -> bytes | None:
        """First bytes in the member at `offset`; None if there is no member."""
        if self.data[offset : offset + len(self.magic)] != self.magic:
            return None
        try:
            return bytes(self.decompressor().decompress(self.data[offset : offset + 512])[:64])
        except self.errors:
            return None

    def find(self, at: int, *, until: int | None = None, of_record: bool = False) -> int | None:
        """Where the next member starts from `at` on; with `of_record`, one that begins a record."""
        stop = len(self.data) if until is None else until
        while (at := self.data.find(self.magic, at, stop)) >= 0:
            head = self.head(at)
            if head is not None and (not of_record or _VERSION.match(head)):
                return at
            at += 1
        return None

    def skip_filling(self, at: int) -> int:
        """The position after what belongs to no member and is no damage."""
        match = _NOT_PADDING.search(self.data, at)
        return len(self.data) if match is None else match.start()


class Zstd(Gzip):
    """The zstd frames of a file, whose first one may be their dictionary (IIPC, WARC-zstd 1.0)."""

    magic = b"\x28\xb5\x2f\xfd"
    errors = (zstandard.ZstdError,)

    def __init__(self, data: mmap.mmap) -> None:
        super().__init__(data)
        self._dictionary = None
        if data[:4] == b"\x5d\x2a\x4d\x18":
            raw = data[8 : self._end_of_skippable(0)]
            if raw.startswith(self.magic):
                raw = zstandard.ZstdDecompressor().decompress(raw, max_output_size=1 << 27)
            self._dictionary = zstandard.ZstdCompressionDict(raw)

    def decompressor(self) -> Any:
        return zstandard.ZstdDecompressor(dict_data=self._dictionary).decompressobj()

    def skip_filling(self, at: int) -> int:
        at = super().skip_filling(at)
        while is_skippable_zstd(self.data[at : at + 4]):
            at = super().skip_filling(self._end_of_skippable(at))
        return at

    def _end_of_skippable(self, at: int) -> int:
        return min(len(self.data), at + 8 + int.from_bytes(self.data[at + 4 : at + 8], "little"))


def is_skippable_zstd(magic: bytes) -> bool:
    """Whether these 4 bytes begin a zstd frame without data (RFC 8878, 3.1.2)."""
    return len(magic) == 4 and magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5


class Plain:
    """A file that is not compressed: one member."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def find(self, at: int) -> int:
        return at

    def skip_filling(self, at: int) -> int:
        return at


def members_of(data: mmap.mmap) -> Gzip | Plain:
    """The members of a file by its content, never by its name."""
    if data[:2] == Gzip.magic[:2]:
        return Gzip(data)
    if data[:4] == Zstd.magic or is_skippable_zstd(data[:4]):
        return Zstd(data)
    if not START.search(data):  # noise before the first member
        for members in (Gzip(data), Zstd(data)):
            if members.find(0, of_record=True) is not None:
                return members
    return Plain(data)


class _Stream:
    """The decompressed bytes of a member, and of those after it that do not begin with a record.

    Positions count from the start of the stream. `state` is how it ended: 'whole', 'corrupt', 'cut'
    (the file ends in a member), or 'end' of an uncompressed file. `offset` is where reading is in
    the file, `resume` where the next stream can start.
    """

    def __init__(self, members: Gzip | Plain, start: int) -> None:
        self.members, self.offset, self.resume = members, start, start
        self.state: Literal["whole", "corrupt", "cut", "end"] | None = None
        self.starts, self.offsets = [0], [start]  # of members, here and in the file
        self._first, self._buffer = 0, bytearray()
        self._pieces = self._decompress() if isinstance(members, Gzip) else self._copy()

    @property
    def end(self) -> int:
        """Position after what has been decompressed so far."""
        return self._first + len(self._buffer)

    def offset_of(self, position: int) -> int:
        """The place in the file to seek to for the record at `position`."""
        if isinstance(self.members, Plain):
            return self.offsets[0] + position
        return self.offsets[bisect_right(self.starts, position) - 1]

    def is_damaged_at(self, end: int) -> bool:
        """Whether the member in which `end` is turned out to be damaged."""
        return self.state == "corrupt" and end > self.starts[-1]

    def fill(self, end: int) -> bool:
        """Decompress up to position `end`; whether the stream is that long."""
        while self.end < end and (piece := next(self._pieces, None)) is not None:
            if len(self._buffer) > 2 * _MAX_LOOKAHEAD:
                self.forget(self.end - _MAX_LOOKAHEAD)
            self._buffer += piece
        return self.end >= end

    def forget(self, position: int) -> None:
        """Free the memory of what is before `position`."""
        del self._buffer[: max(0, position - self._first)]
        self._first = max(self._first, position)

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on."""
        self.fill(start + size)
        with memoryview(self._buffer) as view:
            return bytes(view[start - self._first : start + size - self._first])

    def match(self, pattern: re.Pattern[bytes], position: int) -> bool:
        self.fill(position + _START_LENGTH)
        return pattern.match(self._buffer, position - self._first) is not None

    def find(
        self, pattern: re.Pattern[bytes], start: int, end: int | None = None
    ) -> tuple[int, int] | None:
        """Start and end of the first match from `start` on, and before `end`."""
        at = max(start, self._first)
        while True:
            goes_on = self.fill(max(at + _START_LENGTH, self.end + 1))
            stop = self.end if end is None else min(end, self.end)
            match = pattern.search(self._buffer, at - self._first, stop - self._first)
            if match is not None:
                return match.start() + self._first, match.end() + self._first
            if not goes_on or stop == end:
                return None
            at = max(start, self.end - _START_LENGTH)

    def _copy(self) -> Iterator[bytes]:
        data = self.members.data
        for at in range(self.offset, len(data), _PLAIN_CHUNK):
            self.offset = min(at + _PLAIN_CHUNK, len(data))
            yield data[at : self.offset]
        self.state, self.resume = "end", len(data)

    def _decompress(self) -> Iterator[bytes]:
        members = self.members
        assert isinstance(members, Gzip)
        while True:
            decompressor = members.decompressor()
            while not decompressor.eof:
                chunk = members.data[self.offset : self.offset + _CHUNK]
                try:
                    piece = decompressor.decompress(chunk)
                except members.errors:
                    self._end_early("corrupt")
                    return
                if not chunk:
                    self._end_early("cut")
                    return
                self.offset += len(chunk) - len(decompressor.unused_data)
                yield piece
            head = members.head(self.offset)
            if head is None or _VERSION.match(head):
                self.state, self.resume = "whole", self.offset
                return
            self.starts.append(self.end)
            self.offsets.append(self.offset)

    def _end_early(self, state: Literal["corrupt", "cut"]) -> None:
        """End inside a member, where the next one that begins a record may have started already."""
        members = self.members
        assert isinstance(members, Gzip)
        low = max(self.offsets[-1] + 1, self.offset - _NOTICED_WITHIN)
        resume = members.find(low, until=self.offset + _CHUNK, of_record=True)
        if resume is not None:
            state = "corrupt"
        elif state == "corrupt":
            resume = members.find(max(low, self.offset))
        self.state, self.resume = state, len(members.data) if resume is None else resume


# --- records --------------------------------------------------------------------------------------


def _cut(stream: _Stream, keep: int, accounts: Accounts) -> Iterator[Frame]:
    """The records of a stream."""
    position = 0
    while (start := stream.find(_NOT_PADDING, position)) is not None:
        accounts.framed_bytes += start[0] - position
        position = start[0]
        frame, following = _frame_at(stream, position, keep)
        if following is None:
            break
        if frame is None:
            accounts.lose(following - position)
        else:
            accounts.frame(following - position, is_whole=not frame.truncated)
            yield frame
        position = following
        stream.forget(position)
    left = stream.end - position
    if start is None:
        accounts.framed_bytes, left = accounts.framed_bytes + left, 0
    if stream.state in ("whole", "end"):
        accounts.lose(left)
    elif position <= stream.starts[-1]:  # the last member gave nothing: its bytes count as they are
        accounts.lose(
            max(0, left - (stream.end - stream.starts[-1])),
            unreadable=stream.resume - stream.offsets[-1],
        )
    else:
        accounts.lose(left, unreadable=stream.resume - stream.offset)
        accounts.note_damage()


def _frame_at(stream: _Stream, start: int, keep: int) -> tuple[Frame | None, int | None]:
    """The record at `start` and the position after it.

    None if nothing there can be delivered, and where the next one starts, None if the stream has no
    other.
    """
    header = _read_header(stream, start)
    if header is None:
        return None, _start_in(stream, start + 1)
    inner = START.search(header, 1)
    if inner is not None:  # cut short in the header
        return None, start + inner.start()
    fields, body = _fields(header), start + len(header)
    length = _length(fields)
    block = stream.read(body, keep if length is None else min(length, keep))
    end, is_cut = _end_of_block(stream, body, length)
    if end is None:
        return None, None
    if not is_cut and (swallowed := _swallowed(stream, block, body, end)) is not None:
        end, is_cut = swallowed, True
    if is_cut:
        block = block[: end - body].removesuffix(b"\r\n\r\n").removesuffix(b"\n\n")
    # two headers that have run into one, or one without its most important line
    names = [name.lower() for name in _SINGLE_FIELDS.findall(header)]
    is_damaged = len(set(names)) < len(names) or b"warc-type" not in names
    return Frame(stream.offset_of(start), fields, block, is_cut or is_damaged), end


def _end_of_block(stream: _Stream, body: int, length: int | None) -> tuple[int | None, bool]:
    """Where a block ends, None if in damage; and whether that is not where its length says.

    A length is right if the next record starts after so many bytes. If it does not, but inside the
    block, or if there is no length, the block ends where the next record starts.
    """
    end = sys.maxsize if length is None else body + length
    if end - body > _MAX_LOOKAHEAD or not stream.fill(end):
        place = _start_in(stream, body, end)
        if place is not None:
            return place, True
        if stream.fill(end):
            return end, False
        return None if stream.is_damaged_at(stream.end) else stream.end, True
    next_start = stream.find(_NOT_PADDING, end)
    if next_start is None:
        # zeros at the end of a file are what its writer had no time to write
        is_cut = stream.read(end - 1, 2) == b"\0\0"
        return None if stream.is_damaged_at(end) else end, is_cut
    if stream.match(_VERSION, next_start[0]):
        return end, False
    place = _start_in(stream, body, end)
    if place is not None:
        return place, True
    # noise after the record; or its length is too small, and its last line goes on
    return end, not stream.read(end, 2).startswith((b"\n", b"\r\n"))


def _swallowed(stream: _Stream, block: bytes, body: int, end: int) -> int | None:
    """Where the first of the records starts that a wrong length has made a part of a block.

    They reach exactly to its end. Those in a WARC file that was itself downloaded do too, but begin
    right after the HTTP header.
    """
    place = START.search(block, block.find(b"WARC/")) if b"WARC/" in block else None
    first_blank = _BLANK_LINE.search(block)
    if place is None or first_blank is None or first_blank.end() >= place.start():
        return None
    following, at = _next_content(stream, end), body + place.start()
    while at < end:
        header = _read_header(stream, at)
        length = None if header is None else _length(_fields(header))
        if header is None or length is None or length > end - at:
            return None
        at = _next_content(stream, at + len(header) + length)
    return body + place.start() if at == following else None


def _next_content(stream: _Stream, position: int) -> int:
    """The position after white space and zeros."""
    place = stream.find(_NOT_PADDING, position)
    return stream.end if place is None else place[0]


def _start_in(stream: _Stream, start: int, end: int = sys.maxsize) -> int | None:
    """Where the next record starts, from `start` on and before `end`."""
    place = stream.find(START, start, end + _START_LENGTH)
    return None if place is None or place[0] >= end else place[0]


def _read_header(stream: _Stream, start: int) -> bytes | None:
    """The header of a record with its blank line; None if no header starts at `start`."""
    if not stream.match(_VERSION, start):
        return None
    end = stream.find(_BLANK_LINE, start, start + _MAX_HEADER)
    return None if end is None else stream.read(start, end[1] - start)


def _length(fields: dict[str, str]) -> int | None:
    length = fields.get("content-length", "")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _fields(header: bytes) -> dict[str, str]:
    """The fields of a header, names in lower case; of a name that is repeated, the first."""
    fields: dict[str, str] = {}
    name = ""
    for line in header.decode("utf-8", "replace").split("\n")[1:]:
        if line[:1] in (" ", "\t") and name in fields:  # continues the line before
            fields[name] = f"{fields[name]} {line.strip()}"
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if colon and name not in fields:
            fields[name] = value.strip()
    return fields
