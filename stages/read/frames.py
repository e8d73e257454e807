"""Cut a WARC file into records, damaged or not, and account for every byte.

After damage, reading continues at the next place where a member or a record starts. A record at the
end of a damaged member is not delivered, as nobody can tell whether it is right.
"""

import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from stages.read.members import (
    MAX_LOOKAHEAD,
    NOT_PADDING,
    START,
    START_LENGTH,
    VERSION,
    Stream,
    members_of,
)

# what every header has at most once
_SINGLE_FIELDS = re.compile(
    rb"^(warc-(?:type|date|record-id|target-uri)|content-length)[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_BLANK_LINE = re.compile(rb"\n\r?\n")
_MAX_HEADER = 1 << 20


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


def read_frames(
    data: mmap.mmap, start: int, stop: int, *, keep: int, accounts: Accounts
) -> Iterator[Frame]:
    """Every record of a file between two places, in order, with at most `keep` bytes of its block.

    0 and the file's size, or places of `stages.read.ranges`. ValueError if a member from before
    `stop` goes on after it.
    """
    members = members_of(data)
    at = members.skip_filling(start)
    while at < stop:
        found = members.find(at)  # at `stop` at the latest, if a member starts there
        begin = stop if found is None else found
        accounts.lose(0, unreadable=begin - at)
        if begin == stop:
            return
        stream = Stream(members, begin)
        yield from _cut(stream, keep, accounts)
        at = members.skip_filling(stream.resume)
    if at > stop:
        raise ValueError(
            f"the file cannot be read in ranges: the member that contains byte {stop:,}, where a "
            f"range should end, goes on to byte {at:,}; it may be an archive inside the archive. "
            "Set input.split_bytes = 0, and another run.directory: a run keeps its ranges"
        )


def _cut(stream: Stream, keep: int, accounts: Accounts) -> Iterator[Frame]:
    """The records of a stream."""
    position = 0
    while (start := stream.find(NOT_PADDING, position)) is not None:
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


def _frame_at(stream: Stream, start: int, keep: int) -> tuple[Frame | None, int | None]:
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


def _end_of_block(stream: Stream, body: int, length: int | None) -> tuple[int | None, bool]:
    """Where a block ends, None if in damage; and whether that is not where its length says.

    A length is right if the next record starts after so many bytes. If it does not, but inside the
    block, or if there is no length, the block ends where the next record starts.
    """
    end = sys.maxsize if length is None else body + length
    # a longer block in which a record starts has a wrong length, whatever comes after it
    if end - body > MAX_LOOKAHEAD or not stream.fill(end):
        place = _start_in(stream, body, end)
        if place is not None:
            return place, True
        if stream.fill(end):
            return end, False
        return None if stream.is_damaged_at(stream.end) else stream.end, True
    next_start = stream.find(NOT_PADDING, end)
    if next_start is None:
        # zeros at the end of a file are what its writer had no time to write
        is_cut = stream.read(end - 1, 2) == b"\0\0"
        return None if stream.is_damaged_at(end) else end, is_cut
    if stream.match(VERSION, next_start[0]):
        return end, False
    place = _start_in(stream, body, end)
    if place is not None:
        return place, True
    # noise after the record; or its length is too small, and its last line goes on
    return end, not stream.read(end, 2).startswith((b"\n", b"\r\n"))


def _swallowed(stream: Stream, block: bytes, body: int, end: int) -> int | None:
    """Where the first of the records starts that a wrong length has made a part of a block.

    They reach exactly to its end. Those in a WARC file that was itself downloaded do too, but begin
    right after the HTTP header.
    """
    place = START.search(block, block.find(b"WARC/")) if b"WARC/" in block else None
    first_blank = _BLANK_LINE.search(block)
    if place is None or place.start() in (0, first_blank and first_blank.end()):
        return None
    following, at = _next_content(stream, end), body + place.start()
    while at < end:
        header = _read_header(stream, at)
        length = None if header is None else _length(_fields(header))
        if header is None or length is None or length > end - at:
            return None
        at = _next_content(stream, at + len(header) + length)
    return body + place.start() if at == following else None


def _next_content(stream: Stream, position: int) -> int:
    """The position after white space and zeros."""
    place = stream.find(NOT_PADDING, position)
    return stream.end if place is None else place[0]


def _start_in(stream: Stream, start: int, end: int = sys.maxsize) -> int | None:
    """Where the next record starts, from `start` on and before `end`."""
    place = stream.find(START, start, end + START_LENGTH)
    return None if place is None or place[0] >= end else place[0]


def _read_header(stream: Stream, start: int) -> bytes | None:
    """The header of a record with its blank line; None if no header starts at `start`."""
    if not stream.match(VERSION, start):
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
