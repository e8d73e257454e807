"""Where models get their texts: files, and the rows of a run.

A source is a path, or `RUN:KIND` with KIND one of corpus, rejected and documents, or
`RUN:KIND:CONDITION`, the condition being a column of that kind compared to a value:
`runs/first:corpus:quality.score>=0.9`, `runs/first:rejected:language==en`. Documents are read one
after the other; no source is held in memory.
"""

import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from filters.model_card import digest
from stages.read.records import Unpacked
from stages.storage.digests import bytes_sha256

RUN_KINDS = ("corpus", "rejected", "documents")

_RUN = re.compile(r"(?P<run>.+?):(?P<kind>\w+)(?::(?P<condition>.*))?")
_CONDITION = re.compile(
    r"\s*(?P<column>[^\s<>=!]+)\s*(?P<sign>>=|<=|==|!=|=|>|<)\s*(?P<value>.*?)\s*"
)
_COMPARE = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    "==": pc.equal,
    "=": pc.equal,
    "!=": pc.not_equal,
    ">": pc.greater,
    "<": pc.less,
}


class RunRows(NamedTuple):
    """Rows of a run: of one kind, and if there is a condition of those only that meet it."""

    run: str
    kind: str
    condition: str | None


class Source:
    """The documents of a source, and, when they have been read, its entry on the card."""

    def __init__(self, name: str | Path, *, text_column: str = "text") -> None:
        self.name = str(name)
        self.documents = 0
        self._rows = parsed(self.name)
        self._text_column = text_column
        self._texts = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        found = documents(self.name, text_column=self._text_column)
        self.documents, self._texts = 0, hashlib.sha256()
        for text in found:
            self.documents += 1
            if self._rows:
                self._texts.update(text.encode("utf-8", "surrogatepass") + b"\0")
            yield text

    def entry(self, *, words: int) -> dict[str, Any]:
        """Path, sha256 (of the file, or of the texts of a run's rows), documents, words; ValueError
        without a word.
        """
        if words == 0:
            raise ValueError(
                f"source {self.name}: {self.documents} documents without a word; give one with text{self._advice()}"
            )
        sha256 = self._texts.hexdigest() if self._rows else digest(Path(self.name))
        return {"path": self.name, "sha256": sha256, "documents": self.documents, "words": words}

    def _advice(self) -> str:
        if self._rows is None or self._rows.kind == "corpus":
            return ""
        return " (texts stay with a run's rows as extract.keep_text and keep_rejected_text of its stages say)"


def fingerprint(entries: Iterable[dict[str, Any]]) -> str:
    """sha256 over the digests of all sources in order: the same for the same texts, wherever they
    lie.
    """
    return bytes_sha256("".join(entry["sha256"] for entry in entries).encode())


def documents(source: str | Path, *, text_column: str = "text") -> Iterator[str]:
    """Documents of a file: .txt (parted by blank lines), .jsonl, each also .gz or .zst, or
    .parquet; or of a run's rows.
    """
    rows = parsed(str(source))
    if rows:
        return _run_documents(rows, source=str(source))
    path = Path(source)
    if (path / "run.json").is_file():
        raise ValueError(
            f"source {path}: is a run; say which of its rows: {', '.join(f'{path}:{kind}' for kind in RUN_KINDS)}"
        )
    if not path.is_file():
        raise ValueError(
            f"source {path}: no such file; files are named by their paths, a run's rows as RUN:corpus"
        )
    kind = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    if kind == ".parquet":
        return _parquet_documents(path, text_column=text_column)
    if kind in (".txt", ".jsonl"):
        return _line_documents(path, kind=kind, text_column=text_column)
    raise ValueError(
        f"source {path}: must be .txt, .jsonl (each also .gz or .zst) or .parquet, or rows of a run, RUN:corpus"
    )


def parsed(source: str) -> RunRows | None:
    """The rows of a run that a source names, None for a file; ValueError for a kind of rows that
    there is not.
    """
    found = _RUN.fullmatch(source)
    if found is None or Path(source).is_file():
        return None
    rows = RunRows(found["run"], found["kind"], found["condition"])
    if rows.kind not in RUN_KINDS:
        raise ValueError(
            f"source {source}: no rows '{rows.kind}' in a run{_suggestion(rows.kind, RUN_KINDS)}"
        )
    return rows


def _suggestion(name: str, names: Iterable[str]) -> str:
    known = sorted(names)
    close = difflib.get_close_matches(name, known, 1)
    return (
        f"; did you mean '{close[0]}'? There are {', '.join(known)}"
        if close
        else f"; there are {', '.join(known)}"
    )


def _run_documents(rows: RunRows, *, source: str) -> Iterator[str]:
    from pipeline.inspect import (
        export,  # brings the whole run with it, which texts in files do without
    )

    chosen = _Chosen(rows.condition, source=source) if rows.condition is not None else None
    try:
        for table in export.tables(rows.run, rows.kind):
            table = chosen.of(table) if chosen else table
            for batch in table.select(["text"]).to_batches(max_chunksize=1000):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except FileNotFoundError as error:
        raise ValueError(f"source {source}: {error}") from error
    if chosen:
        chosen.check()


class _Chosen:
    """The rows that meet a condition.

    A column that some parts of a run lack is null there, and no null meets any.
    """

    def __init__(self, condition: str, *, source: str) -> None:
        found = _CONDITION.fullmatch(condition)
        if found is None:
            raise ValueError(
                f"source {source}: condition '{condition}' must be a column, one of {' '.join(_COMPARE)}, and a value"
            )
        self._column, self._sign, self._value = found["column"], found["sign"], found["value"]
        self._source = source
        self._known: set[str] = set()

    def of(self, table: pa.Table) -> pa.Table:
        self._known.update(table.column_names)
        if self._column not in table.column_names:
            return table.slice(0, 0)
        column = table[self._column]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return table.filter(_COMPARE[self._sign](column, self._typed(column.type)))

    def check(self) -> None:
        """ValueError if no part had the column; known only when all are read."""
        if self._column not in self._known:
            raise ValueError(
                f"source {self._source}: no column '{self._column}'{_suggestion(self._column, self._known)}"
            )

    def _typed(self, type: pa.DataType) -> Any:
        if pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_null(type):
            return pa.scalar(self._value, pa.string() if pa.types.is_null(type) else type)
        try:
            return pa.scalar(self._value).cast(pa.float64() if pa.types.is_floating(type) else type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ValueError(
                f"source {self._source}: column '{self._column}' holds {type}, not '{self._value}'"
            ) from None


def _line_documents(path: Path, *, kind: str, text_column: str) -> Iterator[str]:
    with _named(path), _opened(path) as file:
        yield from (
            _blocks(file)
            if kind == ".txt"
            else _json_documents(file, path=path, text_column=text_column)
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of what unpacks and reads a file, which seldom say its name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {path}: not UTF-8 ({error.reason}: {error.object[error.start : error.end]!r})"
        ) from None
    except EOFError as error:
        raise ValueError(f"source {path}: is cut short ({error}); fetch or pack it again") from None
    except (OSError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        raise ValueError(
            f"source {path}: cannot be read ({error}); is it whole, and what its name says?"
        ) from None


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    file = path.open("rb")
    return io.TextIOWrapper(
        io.BufferedReader(Unpacked(file)) if path.suffix == ".zst" else file, encoding="utf-8-sig"
    )


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block)
            block = []


def _json_documents(lines: Iterable[str], *, path: Path, text_column: str) -> Iterator[str]:
    """Blank lines and nulls are no documents."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"source {path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_column, row), str | None):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            if isinstance(row, dict) and text_column in row:
                found = type(row[text_column]).__name__
            raise ValueError(
                f"source {path}, line {number}: no text in column '{text_column}', only {found}"
            )
        if row[text_column] is not None:
            yield row[text_column]


def _parquet_documents(path: Path, *, text_column: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with _named(path), pq.ParquetFile(path) as file:
        types = [field.type for field in file.schema_arrow if field.name == text_column]
        if not types:
            raise ValueError(
                f"source {path}: no column '{text_column}', only {file.schema_arrow.names}"
            )
        if not all(map(_is_text, types)):
            raise ValueError(
                f"source {path}: column '{text_column}' holds {types[0]}, not text; name one of strings"
            )
        for batch in file.iter_batches(columns=[text_column], batch_size=1000):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _is_text(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return any(
        is_such(type)
        for is_such in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
