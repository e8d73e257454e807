"""Commands that only look: at a config, a run, a document's fate."""

import csv
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import (
    AsJson,
    ConfigFile,
    Format,
    Kind,
    Overrides,
    RunFolder,
    absolute_path,
    app,
    err,
    load_config,
    out,
    print_wide,
    user_errors,
)
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.status import RunStatus

command = partial(app.command, rich_help_panel="Looking")


@command("show-config")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved configuration, with where each value came from."""
    from pipeline.config.show import show

    with user_errors():
        values = list(show(load_config(config, overrides)))
        if as_json:
            print(
                json.dumps(
                    {key: {"value": value, "origin": origin} for key, value, origin in values},
                    indent=1,
                )
            )
            return
        width = min(70, max(len(f"{key} = {value}") for key, value, _ in values))
        section = ""
        for key, value, origin in values:
            head = key.split(".")[0]
            if head != section:
                out.print(end="\n" if section else "")
                section = head
            style = "dim" if origin == "default" else "green"
            out.print(
                f"{escape(f'{key} = {value}'.ljust(width))}  [{style}]# {escape(origin)}[/{style}]",
                soft_wrap=True,
            )


@command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show how far a run is: units done, failed and left per phase, rate, time left.

    Of a series, show its batches and the one in progress.
    """
    from pipeline.batches.batch import is_series
    from pipeline.run.status import run_status

    with user_errors():
        root = absolute_path(run)
        if is_series(root):
            under_way = _series_status(root, as_json)
            if as_json or under_way is None:
                return
            root = under_way
        state = run_status(root)
        if as_json:
            print(json.dumps(_status_json(state), indent=1))
        else:
            _print_status(state)


def _print_status(state: "RunStatus") -> None:
    from pipeline.run.phases import SPECS

    generation = f", generation {state.generation}" if state.generation else ""
    out.print(f"{state.run}  stage {state.stage}{generation}", soft_wrap=True)
    heads = ("phase", "done", "failed", "left", "rows in", "rows out", "rows/s", "time left")
    table = Table(*heads, box=None)
    for name, p in state.phases.items():
        if p.units or not SPECS[name].optional:
            left = "" if p.eta_seconds is None else f"{p.eta_seconds:.0f} s"
            rate = f"{p.rows_per_second:,.0f}" if p.rows_per_second else ""
            numbers = (p.done, p.failed, p.left, p.rows_in, p.rows_out)
            table.add_row(name, *(f"{n:,}" for n in numbers), rate, left)
    out.print(table)
    for name, p in state.phases.items():
        for unit, error in p.errors.items():
            out.print(f"[red]failed[/red] {name} {unit}: {escape(error)}", soft_wrap=True)


def _status_json(state: "RunStatus") -> dict[str, Any]:
    phases = {
        name: asdict(p)
        | {"last_commit_age_seconds": p.last_commit and round(time.time() - p.last_commit)}
        for name, p in state.phases.items()
    }
    return asdict(state) | {"phases": phases}


def _series_status(root: str, as_json: bool) -> str | None:
    """Tell of the batches of a series; the directory of the one under way."""
    from pipeline.report.series import gather

    data = gather(root)
    if as_json:
        rows = [{**r._asdict(), "begun": r.begun.isoformat()} for r in data.rows]
        print(
            json.dumps(
                {
                    "series": root,
                    "batches": rows,
                    "consumed": {name: c[-1][1] for name, c in data.curves.items() if c},
                }
            )
        )
        return None
    table = Table("batch", "begun (UTC)", "decided", "inputs", "tokens", "generation", box=None)
    for r in data.rows:
        state = "under way" if r.seconds is None else r.generation or "nothing kept"
        tokens = "" if r.tokens is None else f"{r.tokens:,}"
        table.add_row(
            str(r.number), f"{r.begun:%Y-%m-%d %H:%M}", r.state, f"{r.taken:,}", tokens, state
        )
    out.print(f"{escape(root)}", soft_wrap=True)
    out.print(table)
    for name, curve in data.curves.items():
        out.print(f"tokens {escape(name)}: {curve[-1][1] if curve else 0:,.0f}")
    if data.last:
        out.print(f"last decision: {data.last.state}, {data.last.inputs} inputs")
    under_way = data.rows and data.rows[-1].seconds is None
    return f"{root}/batches/{data.rows[-1].number:04d}" if under_way else None


@command()
def report(run: RunFolder) -> None:
    """Rebuild the HTML report of a run or of a series of batches, and print its path."""
    from pipeline.batches.batch import is_series
    from pipeline.report.report import write_report
    from pipeline.report.series import write_report as write_series_report

    with user_errors():
        root = absolute_path(run)
        print(write_series_report(root) if is_series(root) else write_report(root))


@command()
def why(
    run: RunFolder, url: Annotated[str, typer.Argument(metavar="URL|ID")], as_json: AsJson = False
) -> None:
    """What became of a page, by URL or input's id: rule, value and bound; or cluster and kept copy;
    or generation and rows.
    """
    from pipeline.inspect.why import why as read_why
    from pipeline.run.json_output import to_json

    with user_errors():
        fates = read_why(absolute_path(run), url)
        if as_json:
            print(to_json(fates, indent=1))
        for fate in fates if not as_json else ():
            _print_fate(fate)
        if not fates:
            err.print(
                f"{escape(url)}: this run has no document of that URL (records that are no documents are only counted)"
            )
            raise typer.Exit(1)


def _print_fate(fate: dict[str, Any]) -> None:
    name = fate["url"] or fate["source_id"] or str(fate["doc_id"])
    out.print(f"[bold]{escape(name)}[/bold]  doc_id {fate['doc_id']}", soft_wrap=True)
    out.print(f"  read from {escape(fate['warc_file'])} at {fate['warc_offset']}", soft_wrap=True)
    if fate["fate"] == "rejected":
        bound = (
            ""
            if fate["bound"][0] is None
            else f" outside [{fate['bound'][0]:g}, {fate['bound'][1]:g}]"
        )
        value = "" if fate["value"] is None else f" = {fate['value']:.6g}"
        out.print(f"  [red]rejected[/red] in {fate['stage']} by {fate['rule']}{value}{bound}")
    elif fate["fate"] == "duplicate":
        kept, how = (
            fate["kept_copy"],
            {"dedup.exact": "exact", "dedup.near": "near"}.get(fate["rule"], "of an earlier batch"),
        )
        similar = "" if fate["similarity"] is None else f", similarity {fate['similarity']:.3f}"
        of = f"cluster {fate['cluster_id']} of {fate['cluster_size']} documents{similar}"
        out.print(f"  [yellow]duplicate[/yellow] ({how}): {of}", soft_wrap=True)
        where = f" in {escape(kept['documents'])}" if kept["documents"] else ""
        out.print(
            f"  kept copy: {escape(str(kept['url'] or kept['source_id']))}  doc_id {kept['doc_id']}{where}",
            soft_wrap=True,
        )
    elif fate["fate"] == "published":
        for g in fate["generations"]:
            word, of = ("held out", " of its held-out part") if g["held_out"] else ("published", "")
            out.print(
                f"  [green]{word}[/green] in {g['name']}: {g['tokens']} tokens in rows {_ranges(g['rows'])}{of}"
            )
    else:
        out.print(f"  waiting for stage {fate['stage']}")
    if "lines_cut" in fate:
        cut = f"{len(fate['lines_cut']):,} lines or paragraphs ({fate['chars_cut']:,} characters)"
        out.print(f"  lost {cut} that earlier documents have")
    for name, score in fate["scores"].items():
        rank = fate["percentiles"].get(name)
        out.print(
            f"    {name:<48} {score:<12.6g}" + (f" p{rank:.0f}" if rank is not None else ""),
            style="dim",
        )
    for name, note in fate["notes"].items():
        out.print(f"    {name:<48} {escape(note)}", style="dim", soft_wrap=True)


def _ranges(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


@command()
def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="filter or rule to take out, e.g. c4 or c4.sentence_count"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value for the second side", metavar="KEY=VALUE"),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="the config of the second side, if it is another file")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What other bounds would change, from the scores that the run stored: documents, tokens,
    overlap. Runs nothing.
    """
    from pipeline.study.ablate import ablate as compare
    from pipeline.study.ablate import comparison, without

    with user_errors():
        before = load_config(config, overrides)
        after = without(
            load_config(against or config, [*(overrides or []), *(settings or [])]), drop or []
        )
        found = compare(before, after)
        if as_json:
            sides = {"before": found.before._asdict(), "after": found.after._asdict()}
            print(
                json.dumps(
                    found._asdict() | sides | {"hosts": [h._asdict() for h in found.hosts]},
                    indent=1,
                )
            )
            return
        table = Table("", "before", "after", "change", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for what, left, right in comparison(found):
            if left is not None and right is not None:
                table.add_row(
                    what, f"{left:,}", f"{right:,}", f"{right - left:+,}" if left != right else ""
                )
        print_wide(table)
        shared = f"{found.both:,} documents in both, {found.only_before:,} only before, {found.only_after:,} only after"
        out.print(
            f"overlap {found.jaccard:.1%}: {shared}; read {found.parts[0]:,} of {found.parts[1]:,} parts",
            soft_wrap=True,
        )
        for host in found.hosts:
            out.print(
                f"  {escape(host.host or '(no host)')}: {host.before:,} → {host.after:,}",
                soft_wrap=True,
            )


@command()
def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a generation, or a run for all of its")
    ],
    as_json: AsJson = False,
) -> None:
    """Re-read the shards of a generation against index and manifest: counts, sizes, hashes.

    Exit 1 on any fault.
    """
    from pipeline.inspect.verify import verify_path

    with user_errors():
        results = verify_path(absolute_path(path))
        if as_json:
            print(
                json.dumps(
                    [r._asdict() | {"faults": [f._asdict() for f in r.faults]} for r in results],
                    indent=1,
                )
            )
        for result in results if not as_json else ():
            word = (
                f"[red]{len(result.faults)} faults[/red]"
                if result.faults
                else "[green]whole[/green]"
            )
            out.print(
                f"{result.path}: {word}; {result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens",
                soft_wrap=True,
            )
            for fault in result.faults:
                line = f"  {fault.shard}: {fault.what}: expected {fault.expected}, found {fault.actual}"
                out.print(escape(line), soft_wrap=True)
        if any(r.faults for r in results):
            raise typer.Exit(1)


@command()
def export(
    run: RunFolder,
    stage: Annotated[Kind, typer.Option(help="which documents")],
    format: Annotated[Format, typer.Option(help="file format")] = Format.jsonl,
    output: Annotated[str, typer.Option("-o", "--output", help="file to write")] = "",
) -> None:
    """Write the documents, the keep table, the corpus or the rejected documents of a run to one
    file.
    """
    from pipeline.inspect.export import export as write_export

    with user_errors():
        if not output:
            raise ConfigError("-o PATH is missing: name the file to write")
        count = write_export(absolute_path(run), stage, format=format, output=absolute_path(output))
        err.print(f"{count:,} rows → {escape(output)}", soft_wrap=True)


@command()
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
