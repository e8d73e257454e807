"""Decompress a WARC file member by member, damaged ones too.

A member is a gzip member or a zstd frame; a file that is not compressed is one member. ISA-L and
zstandard decompress the members and check them. A member usually contains one record; it may also
contain all records of the file, or a part of one.
"""

import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import zstandard
from isal import isal_zlib

from stages.read.compression import MAX_WINDOW

# a record's start, unmistakable even in the middle of a line
START = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n(?:WARC|Content)-[A-Za-z-]{1,40}[ \t]*:")
START_LENGTH = 100  # bytes of the longest match that matters
VERSION = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n")
NOT_PADDING = re.compile(rb"[^\0\r\n\t ]")

# Compressed bytes per step. What precedes damage is known to this size, and zstd can pack 128 MiB
# into it.
_CHUNK = 1 << 12
_PLAIN_CHUNK = 1 << 16
# Damage may be noticed only after a stored block of 64 kB, in which the next member may start.
_NOTICED_WITHIN = 1 << 17
MAX_LOOKAHEAD = 64 << 20  # the bytes that a stream keeps


class Gzip:
    """The gzip members of a file."""

    magic = b"\x1f\x8b\x08"
    first_block = 512  # bytes of a member that give its first ones decompressed
    errors: tuple[Any, ...] = (isal_zlib.error,)

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def decompressor(self) -> Any:
        return isal_zlib.decompressobj(31)  # twice as fast as zlib

    def head(self, offset: int) -> bytes | None:
        """First bytes in the member at `offset`; None if there is no member."""
        if self.data[offset : offset + len(self.magic)] != self.magic:
            return None
        head = b""
        try:
            decompressor = self.decompressor()
            for at in range(offset, offset + self.first_block, 512):
                head = decompressor.decompress(self.data[at : at + 512])
                if head or decompressor.eof:
                    break
        except self.errors:
            return None
        return bytes(head[:64])

    def find(self, at: int, *, until: int | None = None, of_record: bool = False) -> int | None:
        """Where the next member starts from `at` on; with `of_record`, one that begins a record."""
        stop = len(self.data) if until is None else until
        while (at := self.data.find(self.magic, at, stop)) >= 0:
            head = self.head(at)
            if head is not None and (not of_record or VERSION.match(head)):
                return at
            at += 1
        return None

    def skip_filling(self, at: int) -> int:
        """The position after what belongs to no member and is no damage."""
        match = NOT_PADDING.search(self.data, at)
        return len(self.data) if match is None else match.start()


class Zstd(Gzip):
    """The zstd frames of a file, whose first one may be their dictionary (IIPC, WARC-zstd 1.0)."""

    magic = b"\x28\xb5\x2f\xfd"
    first_block = (1 << 17) + 1024  # it comes as a whole, after two headers (RFC 8878, 3.1.1)
    errors = (zstandard.ZstdError,)

    def __init__(self, data: mmap.mmap) -> None:
        super().__init__(data)
        self._dictionary = None
        if data[:4] == b"\x5d\x2a\x4d\x18":
            raw = data[8 : self._end_of_skippable(0)]
            with suppress(zstandard.ZstdError):  # the frames that need it are then damaged
                if raw.startswith(self.magic):
                    raw = zstandard.ZstdDecompressor().decompress(raw, max_output_size=1 << 27)
                self._dictionary = zstandard.ZstdCompressionDict(raw)

    def decompressor(self) -> Any:
        decompressor = zstandard.ZstdDecompressor(self._dictionary, max_window_size=MAX_WINDOW)
        return decompressor.decompressobj()

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


def compressed_members_of(data: mmap.mmap) -> Gzip | None:
    """The members of a file that begins with a compressed one, None for any other."""
    if data[:2] == Gzip.magic[:2]:
        return Gzip(data)
    if data[:4] == Zstd.magic or is_skippable_zstd(data[:4]):
        return Zstd(data)
    return None


def members_of(data: mmap.mmap) -> Gzip | Plain:
    """The members of a file by its content, never by its name."""
    if (compressed := compressed_members_of(data)) is not None:
        return compressed
    if not START.search(data):  # noise before the first member
        for members in (Gzip(data), Zstd(data)):
            if members.find(0, of_record=True) is not None:
                return members
    return Plain(data)


class Stream:
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
            if len(self._buffer) > 2 * MAX_LOOKAHEAD:
                self.forget(self.end - MAX_LOOKAHEAD)
            self._buffer += piece
        return self.end >= end

    def skip(self) -> None:
        """Go to the end of the stream without keeping its bytes: only `resume` counts then."""
        for _ in self._pieces:
            pass

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
        self.fill(position + START_LENGTH)
        return pattern.match(self._buffer, position - self._first) is not None

    def find(
        self, pattern: re.Pattern[bytes], start: int, end: int | None = None
    ) -> tuple[int, int] | None:
        """Start and end of the first match from `start` on, and before `end`."""
        at = max(start, self._first)
        while True:
            goes_on = self.fill(max(at + START_LENGTH, self.end + 1))
            stop = self.end if end is None else min(end, self.end)
            match = pattern.search(self._buffer, at - self._first, stop - self._first)
            if match is not None:
                return match.start() + self._first, match.end() + self._first
            if not goes_on or stop == end:
                return None
            at = max(start, self.end - START_LENGTH)

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
            if head is None or VERSION.match(head):
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
