"""Read the texts that models are trained on: files, and rows of a run.

A source is a path, or `RUN:KIND` with KIND one of corpus, rejected and documents. An SQL condition
(`where`) selects among the rows of a run: `"quality.score" >= 0.9`, `language = 'en'`. Documents
are read one after the other; no source is held in memory.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from filters.suggest import did_you_mean
from pipeline.models.evaluation_sets import format_of
from stages.read.compression import decompressed
from stages.read.json_rows import json_rows
from stages.read.records import (
    UNREADABLE,
    WrongColumn,
    parquet_rows,
)
from stages.storage.digests import bytes_sha256, file_sha256

RUN_KINDS = ("corpus", "rejected", "documents")

_RUN_ROWS = re.compile(r"(.+):(\w+)")


class RunRows(NamedTuple):
    """Rows of a run, of one kind."""

    run: str
    kind: str


@dataclass
class Source:
    """The documents of a source and, once they have been read, its entry on the card.

    `where` applies to rows of a run; files have no conditions.
    """

    name: str | Path
    text_column: str = "text"
    where: str = ""
    documents: int = 0

    def __post_init__(self) -> None:
        self._rows = run_rows(str(self.name))
        self._texts = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        self.documents, self._texts = 0, hashlib.sha256()
        for text in documents(self.name, text_column=self.text_column, where=self.where):
            self.documents += 1
            if self._rows:
                self._texts.update(text.encode("utf-8", "surrogatepass") + b"\0")
            yield text

    def entry(self, *, words: int) -> dict[str, Any]:
        """Path, sha256 (of the file, or of the texts of a run's rows), documents, words.

        ValueError if there are no words.
        """
        if words == 0:
            advice = ""
            if self._rows and self._rows.kind != "corpus":
                advice = (
                    " (a run keeps the texts that extract.keep_text and keep_rejected_text say)"
                )
            raise ValueError(
                f"source {self.name}: {self.documents} documents without a word; "
                f"use a source with text{advice}"
            )
        sha256 = self._texts.hexdigest() if self._rows else file_sha256(Path(self.name))
        condition = {"where": self.where} if self.where and self._rows else {}
        counts = {"documents": self.documents, "words": words}
        return {"path": str(self.name), **condition, "sha256": sha256, **counts}


def fingerprint(entries: Iterable[dict[str, Any]]) -> str:
    """sha256 of the digests of all sources in order: equal for equal texts, wherever they are."""
    return bytes_sha256("".join(entry["sha256"] for entry in entries).encode())


def check_where(where: str, sources: Sequence[str]) -> None:
    """ValueError for a condition although no source is rows of a run."""
    if where and not any(map(run_rows, sources)):
        raise ValueError(
            f"where {where}: selects rows of a run, and no source is one: {', '.join(sources)}; "
            "name one as RUN:corpus, or leave the condition out"
        )


def documents(source: str | Path, *, text_column: str = "text", where: str = "") -> Iterator[str]:
    """Documents of a file or of rows of a run, of these only the ones that meet `where`.

    Files are .txt (documents separated by blank lines), .jsonl, each also compressed, or .parquet.
    """
    rows = run_rows(str(source))
    if rows:
        return _run_texts(rows, source=str(source), where=where)
    path = Path(source)
    if (path / "run.json").is_file():
        kinds = ", ".join(f"{source}:{kind}" for kind in RUN_KINDS)
        raise ValueError(f"source {source}: is a run; name a kind of its rows: {kinds}")
    if not path.is_file():
        raise ValueError(f"source {source}: no such file; rows of a run are named as RUN:corpus")
    suffix = format_of(path)
    if suffix == ".txt":
        return _txt_texts(path)
    if suffix == ".parquet":
        return _column_texts(path, _parquet_rows(path, text_column), text_column)
    if suffix == ".jsonl":
        return _column_texts(path, _jsonl_rows(path), text_column)
    raise ValueError(
        f"source {path}: must be .txt, .jsonl (each also .gz, .zst, .xz or .bz2) or .parquet, "
        "or rows of a run, RUN:corpus"
    )


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON, compressed or not, each with its place.

    ValueError names the file, and the line of a row that is none.
    """
    if not path.is_file():
        raise ValueError(f"source {path}: no such file")
    with _errors_name(path):
        for place, row in _jsonl_rows(path):
            if not isinstance(row, dict):
                raise ValueError(
                    f"source {path}, {place}: not a JSON object but {type(row).__name__}"
                )
            yield place, row


# --- rows of a run --------------------------------------------------------------------------------


def run_rows(source: str) -> RunRows | None:
    """The rows of a run that a source names; None for a file. ValueError for an unknown kind."""
    match = _RUN_ROWS.fullmatch(source)
    if match is None or Path(source).is_file():
        return None
    rows = RunRows(*match.groups())
    if rows.kind not in RUN_KINDS:
        suggestion = did_you_mean(rows.kind, RUN_KINDS)
        raise ValueError(f"source {source}: no rows '{rows.kind}' in a run{suggestion}")
    return rows


def _run_texts(rows: RunRows, *, source: str, where: str) -> Iterator[str]:
    from pipeline.run import query  # these load DuckDB and much of the pipeline
    from pipeline.run.results import open_results

    # in parentheses on lines of their own, so that OR and a comment end with the condition
    condition = f" AND (\n{where}\n)" if where else ""
    sql = f"SELECT text FROM {rows.kind} WHERE text IS NOT NULL{condition}"
    try:
        with (
            open_results(rows.run) as connection,
            query.select(connection, sql, rows=1000) as batches,
        ):
            for batch in batches:
                yield from batch.column(0).to_pylist()
    except FileNotFoundError as error:
        raise ValueError(f"source {source}: {error}") from error
    except ValueError as error:
        hint = f'; in --where {where} (a column with a dot is quoted: "quality.score")'
        raise ValueError(f"source {source}: {error}{hint if where else ''}") from error


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Put the file's name into errors of the libraries that decompress and read it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {path}: not UTF-8 ({error.reason}: {error.object[error.start : error.end]!r})"
        ) from None
    except UNREADABLE as error:
        raise ValueError(
            f"source {path}: cannot be read ({error}); is it whole, and what its name says?"
        ) from None


def _txt_texts(path: Path) -> Iterator[str]:
    with _errors_name(path), path.open("rb") as file:
        stream = decompressed(file)
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
        for is_text, block in groupby(lines, key=lambda line: bool(line.strip())):
            if is_text:
                yield "".join(block)


def _column_texts(path: Path, rows: Iterable[tuple[str, Any]], column: str) -> Iterator[str]:
    """Texts of a column of rows, each with its place; null is no document."""
    with _errors_name(path):
        for place, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get(column, row), str | None):
                raise ValueError(
                    f"source {path}, {place}: no text in column '{column}', "
                    f"only {_description(row, column)}"
                )
            if row[column] is not None:
                yield row[column]


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    try:
        for number, row in enumerate(parquet_rows(path, [column]), start=1):
            yield f"row {number}", row
    except WrongColumn as error:
        raise ValueError(f"source {path}: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for row in json_rows(decompressed(file)):
            if row.error is not None:
                raise ValueError(f"source {path}, line {row.line}: not JSON ({row.error})")
            yield f"line {row.line}", row.value


def _description(row: Any, column: str) -> Any:
    """What a row has instead of a text: its columns, or the type of the value."""
    if isinstance(row, dict) and column not in row:
        return sorted(row)
    return type(row[column] if isinstance(row, dict) else row).__name__
