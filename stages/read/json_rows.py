"""Read the rows of a file of JSON, however it is laid out.

Most files have a value on each line (JSONL). Others are one array, or have values over several
lines, or a record separator before each (RFC 7464); the first bytes tell.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any, Literal, NamedTuple

from stages.read.compression import Damaged, stream_of

_HEAD, _LONG_HEAD = 1 << 16, 1 << 24
# in bytes: a longer one would need more memory than a worker has
_MAX_ROW = 1 << 28
_BLANK = b" \t\r\n\x1e"
_SEPARATORS = re.compile(r"[\s,\[\]\x1e\ufeff]*")
_NOT_UTF_8 = re.compile("[\udc80-\udcff]")
_decode = json.JSONDecoder().raw_decode


class JsonRow(NamedTuple):
    """A value, and the line on which it starts; if it is not JSON, `error` says why."""

    line: int
    value: Any
    error: str | None = None


def json_rows(
    stream: IO[bytes], *, arrays_are: Literal["rows", "lists of rows"] = "lists of rows"
) -> Iterator[JsonRow]:
    """The rows of a file in UTF-8, UTF-16 or UTF-32, in order, without blank lines.

    `arrays_are` says what an array on a line of its own is.
    """
    head, stream = read_head(stream, _HEAD)
    encoding = json.detect_encoding(head[:4])
    if encoding not in ("utf-8", "utf-8-sig"):
        text = codecs.iterdecode(_chunks(stream), encoding, "replace")
        head, stream = read_head(stream_of(codecs.iterencode(text, "utf-8", "replace")), _HEAD)
    if b"\n" not in head.strip():
        head, stream = read_head(stream, _LONG_HEAD)
    start = head.decode("utf-8", "surrogateescape").lstrip("\ufeff \t\r\n\x1e")
    if start.startswith("[") and arrays_are == "rows":
        is_row = _parsed(1, start.partition("\n")[0].encode("utf-8", "replace")).error is None
        return _lines(stream) if is_row else _values(stream)
    return _lines(stream) if _has_value_on_each_line(start) else _values(stream)


def read_head(stream: IO[bytes], size: int) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a stream, and the stream from its start on.

    An error in the first bytes is raised by the stream, after what precedes it.
    """
    if stream.seekable():
        head = stream.read(size)
        stream.seek(0)
        return head, stream
    read, rest = b"", _chunks(stream)
    try:
        while len(read) < size and (chunk := next(rest, b"")):
            read += chunk
    except Damaged as error:
        rest = _raised(error)
    return read[:size], stream_of(itertools.chain([read], rest))


def _chunks(stream: Any) -> Iterator[bytes]:
    """A stream in pieces as they come, so that an error takes none with it."""
    return iter(lambda: stream.read1(_HEAD), b"")


def _raised(error: Exception) -> Iterator[Any]:
    raise error
    yield


def _has_value_on_each_line(start: str) -> bool:
    """Whether a file that begins so is JSONL, of which any line may be damaged."""
    if not start.startswith("{"):
        return not start.startswith("[")
    line, *others = start.split("\n")
    try:
        rest = line[_decode(line)[1] :].strip()
        return not rest.startswith(("{", "[", ",", "\x1e"))
    except (ValueError, RecursionError) as error:
        if not others or not _is_incomplete(error, line):
            return True
    return any(
        _parsed(0, o.encode("utf-8", "replace")).error is None for o in others if o[:1] == "{"
    )


def _is_incomplete(error: Exception, text: str) -> bool:
    """Whether an error may only be that the text is not all there."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 12


# --- a value on each line -------------------------------------------------------------------------


def _lines(stream: IO[bytes]) -> Iterator[JsonRow]:
    for number, line in enumerate(_split(stream), start=1):
        if len(line) > _MAX_ROW:
            yield JsonRow(number, None, f"longer than {_MAX_ROW:,} bytes")
        elif line := line.removeprefix(codecs.BOM_UTF8).strip(_BLANK):
            yield _parsed(number, line)


def _parsed(number: int, line: bytes) -> JsonRow:
    try:
        return JsonRow(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return JsonRow(number, None, str(error))


def _split(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream; of one longer than _MAX_ROW, little more than that."""
    parts: list[bytes] = []  # of the line at the end of what was read
    size = 0
    try:
        for chunk in _chunks(stream):
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                yield b"".join((*parts, end))
                parts, size = [], 0
            if size <= _MAX_ROW:
                parts.append(rest)
                size += len(rest)
    except Damaged:
        if _parsed(0, b"".join(parts)).error is None:  # the damage is after it
            yield b"".join(parts)
        raise
    yield b"".join(parts)


# --- values over several lines --------------------------------------------------------------------

_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


class _Text:
    """The part of a stream's text that is in memory; `at` is the position in it."""

    def __init__(self, stream: IO[bytes]) -> None:
        # an invalid byte becomes a surrogate, which JSON can only have as an escape sequence
        self._chunks: Iterator[str] = codecs.iterdecode(_chunks(stream), "utf-8", "surrogateescape")
        self.text, self.at, self.line = "", 0, 1
        self.separators, self.open_arrays = "", 0  # before the value at `at`

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def read_on(self) -> bool:
        """Read as much again, so that a long value is parsed a few times only; False at the end."""
        pieces, wanted = [self.text[self.at :]], max(_HEAD, len(self.text) - self.at)
        try:
            while wanted > 0 and (chunk := next(self._chunks, "")):
                pieces.append(chunk)
                wanted -= len(chunk)
        except Damaged as error:
            if len(pieces) == 1:
                raise
            self._chunks = _raised(error)
        self.text, self.at = "".join(pieces), 0
        return len(pieces) > 1

    def find_value(self) -> bool:
        """Go to the next value; False if there is none."""
        self.separators = ""
        while True:
            match = _SEPARATORS.match(self.text, self.at)
            assert match is not None  # it matches the empty string
            self.separators += match[0]
            self.open_arrays += match[0].count("[") - match[0].count("]")
            self.advance(match.end())
            if self.at < len(self.text):
                return True
            if not self.read_on():
                return False

    def decode(self) -> tuple[Any, int]:
        """The value here, and its end. ValueError or RecursionError if it is no JSON."""
        while True:
            try:
                return _decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                is_too_long = len(self.text) - self.at > _MAX_ROW
                if is_too_long or not _is_incomplete(error, self.text) or not self.read_on():
                    raise

    def skip_to_row(self, key: str) -> None:
        """Go to the next object with this first key that is as indented as the value here."""
        _, newline, indent = self.separators.rpartition("\n")
        if newline or ("\n" in self.text and not self.separators):
            before = f"(?<=\n{re.escape(indent)})"
        else:
            before = r"(?<![^\s,}\x1e])"
        beginning = re.compile(before + (rf"\{{\s*{re.escape(key)}\s*:" if key else r"\{"))
        self.advance(self.at + 1)
        while (match := beginning.search(self.text, self.at)) is None:
            # a beginning may be cut in two
            self.advance(max(self.at, len(self.text) - _HEAD))
            if not self.read_on():
                self.advance(len(self.text))
                self.open_arrays = 0
                return
        self.advance(match.start())


def _values(stream: IO[bytes]) -> Iterator[JsonRow]:
    text, key = _Text(stream), ""
    while text.find_value():
        line = text.line
        try:
            value, end = text.decode()
        except (ValueError, RecursionError) as error:
            yield JsonRow(line, None, str(error))
            text.skip_to_row(key)
            continue
        if not key and (first := _FIRST_KEY.match(text.text, text.at)):
            key = first[1]
        is_utf_8 = _NOT_UTF_8.search(text.text, text.at, end) is None
        yield JsonRow(line, value) if is_utf_8 else JsonRow(line, None, "not UTF-8")
        text.advance(end)
    if text.open_arrays > 0:
        yield JsonRow(text.line, None, "the file ends inside an array")
