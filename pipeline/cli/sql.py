"""`gristmill sql`: query a run."""

import csv
import itertools
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import AsJson, RunFolder, absolute_path, app, err, print_wide, user_errors


@app.command(rich_help_panel="Looking")
def sql(
    run: RunFolder,
    query: Annotated[str, typer.Argument(metavar="SELECT", help="one SELECT in DuckDB's SQL")],
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV with a header")] = False,
    rows: Annotated[int, typer.Option(help="rows of the table to print; the rest is cut")] = 50,
) -> None:
    """Query a run with SQL: the views documents, keep, corpus, rejected and commits. It reads only.

    documents: every page that was read, with scores; keep: what dedup decided; corpus: clean texts;
    rejected: what extract and refine dropped, and why; commits: the work done, one row per unit.
    --json and --csv print all rows. Quote names with a dot: "c4.sentence_count".
    """
    from pipeline.run.query import select
    from pipeline.run.results import open_results

    with (
        user_errors(),
        open_results(absolute_path(run)) as connection,
        select(connection, query) as reader,
    ):
        if as_json:
            _print_json_rows(reader)
        elif as_csv:
            _print_csv(reader)
        else:
            _print_rows(reader, rows)


def _rows_of(reader: Any) -> Iterator[dict[str, Any]]:
    for batch in reader:
        yield from batch.to_pylist(maps_as_pydicts="strict")


def _print_json_rows(reader: Any) -> None:
    from pipeline.run.json_output import to_json

    separator = "["
    for row in _rows_of(reader):
        print(separator, to_json(row), sep="\n", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")


def _print_csv(reader: Any) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(reader.schema.names)
    for row in _rows_of(reader):
        writer.writerow([_cell(value) for value in row.values()])


def _print_rows(reader: Any, limit: int) -> None:
    table = Table(*map(escape, reader.schema.names), box=None, pad_edge=False)
    for column, field in zip(table.columns, reader.schema, strict=True):
        column.overflow = "fold"
        column.justify = "right" if str(field.type).startswith(_NUMBERS) else "left"
    rows = _rows_of(reader)
    for row in itertools.islice(rows, limit):
        table.add_row(*(escape(_short(_cell(value))) for value in row.values()))
    print_wide(table)
    if next(rows, None) is not None:
        err.print(f"the first {limit:,} rows; --rows N prints more, --csv and --json print all")


_NUMBERS = ("int", "uint", "float", "double", "decimal")


def _cell(value: Any) -> str:
    """A value as text: nested ones as JSON, bytes as hex, null as nothing."""
    from pipeline.run.json_output import to_json

    if value is None:
        return ""
    return to_json(value) if isinstance(value, dict | list | bool) else _text_of(value)


def _text_of(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
