"""Read a large WARC file in ranges of bytes, each on another machine.

A range consists of the records whose members (see `stages.read.members`) start in it. Its ends are
found in the file's content, by the reader of either side alone, so that every record is in one
range.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from stages.read.fetch import (
    FetchOptions,
    connection_slot,
    download_file,
    fetch_bytes,
    local_copy,
    object_size,
)
from stages.read.members import Gzip, Stream, compressed_members_of, is_skippable_zstd
from stages.storage.files import is_local

# Bytes before a range in which reading begins, to get into step with the members: more than a page
# has that is itself an archive. (Common Crawl cuts pages at 5 MiB.)
LOOK_BACK = 16 << 20
# Bytes after the last member of a range that reading may touch: damage is noticed within 128 KiB.
_LOOK_AHEAD = 1 << 20
_HEAD = 1 << 16  # bytes that tell what a file is


class ByteRange(NamedTuple):
    """A part of a file, from `start` on and before `end`; None is the end of the file."""

    start: int = 0
    end: int | None = None

    def size(self, whole: int) -> int:
        """Bytes of a range of a file that has `whole` bytes."""
        return max(0, (whole if self.end is None else self.end) - self.start)

    @property
    def name(self) -> str:
        """The range in a fingerprint, "" for a whole file."""
        end = "" if self.end is None else self.end
        return "" if self == WHOLE else f"#{self.start}-{end}"


WHOLE = ByteRange()


def equal_ranges(size: int | None, split_bytes: int) -> list[ByteRange]:
    """A file cut into as few equal ranges as have at most `split_bytes`; one if its size is unknown
    or `split_bytes` is 0. The last has no end: it also has what is appended later.
    """
    count = -(-size // split_bytes) if size and split_bytes else 1
    cuts = [(size or 0) * n // count for n in range(count)]
    return [ByteRange(*pair) for pair in zip(cuts, [*cuts[1:], None], strict=True)]


# --- where ranges begin and end -------------------------------------------------------------------


def bounds(data: mmap.mmap, byte_range: ByteRange) -> tuple[int, int]:
    """The first byte of the first member that starts in a range, and of the first one after it.

    (0, 0) if none does. Bounds of adjacent ranges meet, unless a member is an archive of more than
    LOOK_BACK bytes; ValueError then, from here or when the records are read.

    A file that begins with anything but a compressed member is not divided: all is in the range
    that begins at 0.
    """
    if byte_range.start and not _may_begin_in(data, byte_range):
        return 0, 0
    first = _boundary(data, byte_range.start)
    stop = len(data) if byte_range.end is None else _boundary(data, byte_range.end)
    return first, stop


def _may_begin_in(data: mmap.mmap, byte_range: ByteRange) -> bool:
    """Whether a record begins in a range or shortly before it, maybe in an archive inside the
    archive. If not, its bounds are equal without a look at the rest of the file.
    """
    members = compressed_members_of(data)
    if members is None:
        return False
    until = None if byte_range.end is None else byte_range.end + len(members.magic) - 1
    low = max(0, byte_range.start - LOOK_BACK)
    return low == 0 or members.find(low, until=until, of_record=True) is not None


def _boundary(data: mmap.mmap, position: int) -> int:
    """Where the first stream starts from `position` on, as far as can be seen from LOOK_BACK bytes
    before; the size of the file if there is none.
    """
    members = compressed_members_of(data)
    if position == 0:
        return 0
    if members is None:
        return len(data)
    low = position - LOOK_BACK
    start = _next_start(members, 0) if low <= 0 else members.find(low, of_record=True)
    while start is not None and start < position:
        stream = Stream(members, start)
        stream.skip()
        start = _next_start(members, stream.resume)
    return len(data) if start is None else start


def _next_start(members: Gzip, at: int) -> int | None:
    return members.find(members.skip_filling(at))


# --- ranges of objects ----------------------------------------------------------------------------


@contextmanager
def local_range(path: str, byte_range: ByteRange, *, options: FetchOptions) -> Iterator[Path]:
    """The path of a local file in which a range of `path` is read as in the whole file.

    Of an object, only the range is fetched, and what is needed to find its bounds: the copy has a
    hole before it and ends early. FetchError if it cannot be fetched.
    """
    if byte_range == WHOLE or is_local(path):
        with local_copy(path, options=options) as local:
            yield local
        return
    with download_file(path) as file:
        with connection_slot(options.connections):
            _fetch_range(path, byte_range, file)
        yield Path(file.name)


def _fetch_range(path: str, byte_range: ByteRange, file: IO[bytes]) -> None:
    size = object_size(path)
    at = _fetch_head(path, size, file)
    at = max(at, min(size, byte_range.start) - LOOK_BACK)
    end, ahead = size if byte_range.end is None else byte_range.end, 2 * _LOOK_AHEAD
    while at < size:
        stop = min(size, end + ahead)
        fetch_bytes(path, file, at, stop)
        if stop == size or _has_bounds(file, byte_range):
            return
        at, ahead = stop, 2 * ahead


def _fetch_head(path: str, size: int, file: IO[bytes]) -> int:
    """Fetch what tells the kind of a file, the dictionary of zstd frames too; where it ends."""
    end = min(size, _HEAD)
    fetch_bytes(path, file, 0, end)
    file.seek(0)
    magic, length = file.read(4), file.read(4)
    if not is_skippable_zstd(magic):
        return end
    whole = min(size, _HEAD + int.from_bytes(length, "little"))
    fetch_bytes(path, file, end, whole)
    return whole


def _has_bounds(file: IO[bytes], byte_range: ByteRange) -> bool:
    """Whether the bytes that were fetched are enough to read a range."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return bounds(data, byte_range)[1] + _LOOK_AHEAD <= len(data)
