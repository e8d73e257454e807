"""Commands that only read: a configuration, a run, the history of a document."""

import json
import time
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
    number_table,
    out,
    print_line,
    print_wide,
    user_errors,
)
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.status import RunStatus

command = partial(app.command, rich_help_panel="Looking")


@command("show-config")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the resolved configuration, and where each value comes from."""
    from pipeline.config.show import show

    with user_errors():
        values = list(show(load_config(config, overrides)))
        if as_json:
            origins = {key: {"value": value, "origin": origin} for key, value, origin in values}
            print(json.dumps(origins, indent=1))
            return
        width = min(70, max(len(f"{key} = {value}") for key, value, _ in values))
        section = ""
        for key, value, origin in values:
            if key.split(".")[0] != section:
                out.print(end="\n" if section else "")
                section = key.split(".")[0]
            style = "dim" if origin == "default" else "green"
            line = escape(f"{key} = {value}".ljust(width))
            print_line(f"{line}  [{style}]# {escape(origin)}[/{style}]")


@command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Show how far a run is: units done, failed and left per phase, rate, time left.

    Of a series, show its batches and the one in progress.
    """
    from pipeline.batches.batch import is_series
    from pipeline.run.status import run_status

    with user_errors():
        root: str | None = absolute_path(run)
        if root and is_series(root):
            root = _series_status(root, as_json)
        if root is None:
            return
        state = run_status(root)
        if as_json:
            print(json.dumps(_status_json(state), indent=1))
        else:
            _print_status(state)


def _print_status(state: "RunStatus") -> None:
    from pipeline.run.phases import SPECS

    generation = f", generation {state.generation}" if state.generation else ""
    print_line(f"{state.run}  stage {state.stage}{generation}")
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
            print_line(f"[red]failed[/red] {name} {unit}: {escape(error)}")


def _status_json(state: "RunStatus") -> dict[str, Any]:
    phases = {
        name: asdict(p)
        | {"last_commit_age_seconds": p.last_commit and round(time.time() - p.last_commit)}
        for name, p in state.phases.items()
    }
    return asdict(state) | {"phases": phases}


def _series_status(root: str, as_json: bool) -> str | None:
    """Print the batches of a series; return the directory of the one in progress to print next."""
    from pipeline.report.series import gather

    data = gather(root)
    consumed = {name: curve[-1][1] if curve else 0.0 for name, curve in data.curves.items()}
    if as_json:
        rows = [{**r._asdict(), "begun": r.begun.isoformat()} for r in data.rows]
        consumed = {name: n for name, n in consumed.items() if data.curves[name]}
        print(json.dumps({"series": root, "batches": rows, "consumed": consumed}))
        return None
    table = Table("batch", "begun (UTC)", "decided", "inputs", "tokens", "generation", box=None)
    for r in data.rows:
        result = "in progress" if r.seconds is None else r.generation or "nothing kept"
        tokens = "" if r.tokens is None else f"{r.tokens:,}"
        begun = f"{r.begun:%Y-%m-%d %H:%M}"
        table.add_row(str(r.number), begun, r.state, f"{r.taken:,}", tokens, result)
    print_line(escape(root))
    out.print(table)
    for name, count in consumed.items():
        out.print(f"tokens {escape(name)}: {count:,.0f}")
    if data.last:
        out.print(f"last decision: {data.last.state}, {data.last.inputs} inputs")
    in_progress = data.rows and data.rows[-1].seconds is None
    return f"{root}/batches/{data.rows[-1].number:04d}" if in_progress else None


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
    """Show what happened to a page, found by URL or by the id in its input.

    Prints the rule, value and bound; or the cluster and the kept copy; or generation and rows.
    """
    from pipeline.inspect.why import why as read_why
    from pipeline.run.json_output import to_json

    with user_errors():
        fates = read_why(absolute_path(run), url)
        if as_json:
            print(to_json(fates, indent=1))
        else:
            for fate in fates:
                _print_fate(fate)
        if not fates:
            err.print(
                f"{escape(url)}: this run has no document of that URL "
                "(records that are no documents are only counted)",
                soft_wrap=True,
            )
            raise typer.Exit(1)


def _print_fate(fate: dict[str, Any]) -> None:
    name = fate["url"] or fate["source_id"] or str(fate["doc_id"])
    print_line(f"[bold]{escape(name)}[/bold]  doc_id {fate['doc_id']}")
    print_line(f"  read from {escape(fate['warc_file'])} at {fate['warc_offset']}")
    if fate["fate"] == "rejected":
        _print_rejection(fate)
    elif fate["fate"] == "duplicate":
        _print_duplicate(fate)
    elif fate["fate"] == "published":
        for g in fate["generations"]:
            word, of = ("held out", " of its held-out part") if g["held_out"] else ("published", "")
            rows = f"rows {_row_range(g['rows'])}{of}"
            print_line(f"  [green]{word}[/green] in {g['name']}: {g['tokens']} tokens in {rows}")
    else:
        print_line(f"  waiting for stage {fate['stage']}")
    if "lines_cut" in fate:
        cut = f"{len(fate['lines_cut']):,} lines or paragraphs ({fate['chars_cut']:,} characters)"
        print_line(f"  lost {cut} that earlier documents have")
    for name, score in fate["scores"].items():
        rank = fate["percentiles"].get(name)
        percentile = "" if rank is None else f" p{rank:.0f}"
        print_line(f"    {name:<48} {score:<12.6g}{percentile}", style="dim")
    for name, note in fate["notes"].items():
        print_line(f"    {name:<48} {escape(note)}", style="dim")


def _print_rejection(fate: dict[str, Any]) -> None:
    low, high = fate["bound"]
    bound = "" if low is None else f" outside [{low:g}, {high:g}]"
    value = "" if fate["value"] is None else f" = {fate['value']:.6g}"
    print_line(f"  [red]rejected[/red] in {fate['stage']} by {fate['rule']}{value}{bound}")


def _print_duplicate(fate: dict[str, Any]) -> None:
    kinds = {"dedup.exact": "exact", "dedup.near": "near"}
    kind, kept = kinds.get(fate["rule"], "of an earlier batch"), fate["kept_copy"]
    similar = "" if fate["similarity"] is None else f", similarity {fate['similarity']:.3f}"
    cluster = f"cluster {fate['cluster_id']} of {fate['cluster_size']} documents{similar}"
    print_line(f"  [yellow]duplicate[/yellow] ({kind}): {cluster}")
    where = f" in {escape(kept['documents'])}" if kept["documents"] else ""
    name = escape(str(kept["url"] or kept["source_id"]))
    print_line(f"  kept copy: {name}  doc_id {kept['doc_id']}{where}")


def _row_range(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


@command()
def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="filter or rule to leave out, e.g. c4 or c4.sentence_count"),
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
    """Compare what other bounds would keep, by the scores that the run stored. Runs nothing.

    Prints documents, tokens, losses by rule, overlap and hosts.
    """
    from pipeline.run.json_output import to_json
    from pipeline.study.ablate import ablate as compare
    from pipeline.study.ablate import comparison, without

    with user_errors():
        before = load_config(config, overrides)
        after = load_config(against or config, [*(overrides or []), *(settings or [])])
        result = compare(before, without(after, drop or []))
        if as_json:
            print(to_json(asdict(result), indent=1))
            return
        table = number_table("", "before", "after", "change")
        for label, left, right in comparison(result):
            if left is not None and right is not None:
                change = f"{right - left:+,}" if left != right else ""
                table.add_row(label, f"{left:,}", f"{right:,}", change)
        print_wide(table)
        read, total = result.parts
        print_line(
            f"overlap {result.jaccard:.1%}: {result.both:,} documents in both, "
            f"{result.only_before:,} only before, {result.only_after:,} only after; "
            f"read {read:,} of {total:,} parts"
        )
        for host in result.hosts:
            name = escape(host.host or "(no host)")
            print_line(f"  {name}: {host.before:,} → {host.after:,}")


@command()
def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a generation, or a run for all of its")
    ],
    as_json: AsJson = False,
) -> None:
    """Read the shards of a generation again, and compare counts, sizes and hashes with its index
    and manifest.

    Exit 1 on any fault.
    """
    from pipeline.inspect.verify import verify_path

    with user_errors():
        results = verify_path(absolute_path(path))
        if as_json:
            faults = [r._asdict() | {"faults": [f._asdict() for f in r.faults]} for r in results]
            print(json.dumps(faults, indent=1))
        else:
            for result in results:
                _print_verified(result)
        if any(r.faults for r in results):
            raise typer.Exit(1)


def _print_verified(result: Any) -> None:
    state = f"[red]{len(result.faults)} faults[/red]" if result.faults else "[green]whole[/green]"
    counts = f"{result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens"
    print_line(f"{result.path}: {state}; {counts}")
    for fault in result.faults:
        what = f"{fault.what}: expected {fault.expected}, found {fault.actual}"
        print_line(escape(f"  {fault.shard}: {what}"))


@command()
def export(
    run: RunFolder,
    stage: Annotated[Kind, typer.Option(help="which documents")],
    format: Annotated[Format, typer.Option(help="file format")] = Format.jsonl,
    output: Annotated[str, typer.Option("-o", "--output", help="file to write")] = "",
) -> None:
    """Write documents, keep table, corpus or rejected documents of a run to one file."""
    from pipeline.inspect.export import export as write_export

    with user_errors():
        if not output:
            raise ConfigError("-o PATH is missing: name the file to write")
        count = write_export(absolute_path(run), stage, format=format, output=absolute_path(output))
        err.print(f"{count:,} rows → {escape(output)}", soft_wrap=True)
