"""Decompress files, whose content says how they are compressed, never their name."""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard
from isal import isal_zlib

# `zstd --long=31` and `xz -9` need as much; memory is used only as far as there is data
MAX_WINDOW = 1 << 31
_CHUNK = 1 << 12  # compressed bytes per step; zstd can pack at most 128 MiB into them
_PIECE = 1 << 20  # decompressed bytes per step, where the library can stop: bzip2 packs 4 GB


class Damaged(OSError):
    """A compressed file that cannot be decompressed from `offset` on; all before it was right."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Compression(NamedTuple):
    """A compression: its name, how its members begin, and a decompressor for one member."""

    name: str
    magic: re.Pattern[bytes]
    start: Callable[[], Any]


_COMPRESSIONS = (
    # twice as fast as zlib
    Compression("gzip", re.compile(rb"\x1f\x8b\x08"), lambda: isal_zlib.decompressobj(31)),
    Compression(  # pzstd begins with a frame without data, which is skipped
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(),
    ),
    Compression(
        "xz",
        re.compile(rb"\xfd7zXZ\0"),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW),
    ),
    Compression(
        "bzip2",
        re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),  # a block, or the end of an empty file
        bz2.BZ2Decompressor,
    ),
)
_MAGIC_BYTES = 10
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2")
_ERRORS: tuple[Any, ...] = (
    isal_zlib.error,
    zlib.error,
    zstandard.ZstdError,
    lzma.LZMAError,
    OSError,
    ValueError,
)


def compression_of(head: bytes) -> Compression | None:
    """The compression of a file that begins with these bytes."""
    return next((c for c in _COMPRESSIONS if c.magic.match(head)), None)


def decompressed(file: BinaryIO) -> io.BufferedReader:
    """The content of a file from its start on, decompressed if it is compressed.

    While it is read, Damaged says where it is cut short or damaged, or goes on with other data.
    """
    file.seek(0)
    compression = compression_of(file.read(_MAGIC_BYTES))
    file.seek(0)
    if compression is not None:
        return stream_of(_pieces(file, compression))
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # type: ignore[arg-type]


def stream_of(pieces: Iterator[bytes]) -> io.BufferedReader:
    """Pieces of a file as a stream."""
    return io.BufferedReader(_PieceStream(pieces), buffer_size=1 << 16)


class _PieceStream(io.RawIOBase):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or memoryview(next(filter(None, self._pieces), b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _pieces(file: BinaryIO, compression: Compression) -> Iterator[bytes]:
    """The content of all members, piece by piece.

    Zeros after a member are padding. zstandard's own stream reader takes a cut for the end.
    """
    data = file.read(_CHUNK)
    while data:
        member = compression.start()
        while not member.eof:
            yield from _decompress(member, data, file, compression.name)
            if not member.eof and not (data := file.read(_CHUNK)):
                raise Damaged(
                    f"{compression.name} data cut short at byte {file.tell():,}", file.tell()
                )
        data = member.unused_data.lstrip(b"\0")
        while len(data) < _MAGIC_BYTES and (more := file.read(_CHUNK)):
            data = (data + more).lstrip(b"\0")
        if data and not compression.magic.match(data):
            offset = file.tell() - len(data)
            raise Damaged(
                f"at byte {offset:,} the {compression.name} data ends and other data follows, "
                f"which begins with {data[:16]!r}",
                offset,
            )


def _decompress(member: Any, data: bytes, file: BinaryIO, name: str) -> Iterator[bytes]:
    """What a decompressor makes of the next bytes of its member."""
    try:
        if not hasattr(member, "needs_input"):
            yield member.decompress(data)
            return
        yield member.decompress(data, _PIECE)
        while not (member.eof or member.needs_input):
            yield member.decompress(b"", _PIECE)
    except _ERRORS as error:
        offset = max(0, file.tell() - len(data))
        raise Damaged(f"{name} data damaged after byte {offset:,} ({error})", offset) from None


# --- what else a file may be ----------------------------------------------------------------------

HEAD = 512  # bytes of a file that tell its kind
_KINDS = {
    rb"PAR1": "a Parquet file",
    rb"ARROW1|FEA1|\xff\xff\xff\xff.{4}\x10\0\0\0": "an Arrow or Feather file",
    rb"Obj\x01": "an Avro file",
    rb"ORC": "an ORC file",
    rb"WARC/": "a WARC file",
    rb"filedesc://": "an ARC file",
    rb"PK(?:\x03\x04|\x05\x06)": "a zip archive: unpack it",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    rb"Rar!\x1a\x07": "a rar archive: unpack it",
    rb".{257}ustar": "a tar archive: unpack it",
    rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18": "lz4 data: repack it as zstd or gzip",
    rb"\xff\x06\0\0sNaPpY": "snappy data: repack it as zstd or gzip",
    rb"\x1f\x9d": "data of compress (.Z): repack it as gzip",
    rb"LZIP": "lzip data: repack it as xz",
    rb"\x89LZO": "lzop data: repack it as zstd or gzip",
    rb"\x5d\0\0.{2}.{8}": "LZMA data without the xz container: repack it as xz",
    rb"%PDF": "a PDF file",
    rb"\x89HDF|\x93NUMPY|\x80[\x02-\x05]": "HDF5, NumPy or pickle data",
    rb"SQLite format 3\0": "an SQLite database",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    rb"(?i:\s*<(?:!doctype|html|\?xml))": "HTML or XML, as of an error page saved as the file",
    rb"\0{64}": "zeros, as of a file that was never written to its end",
}


def kind_of_file(path: Path) -> str | None:
    """`kind_of` a file."""
    with open(path, "rb") as file:
        return kind_of(file.read(HEAD))


def kind_of(head: bytes) -> str | None:
    """What a file that begins with these bytes is, if it is no text, in words."""
    if (compression := compression_of(head)) is not None:
        return f"{compression.name} data"
    return next((k for magic, k in _KINDS.items() if re.match(magic, head, re.DOTALL)), None)
