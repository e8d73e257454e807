"""The command line: `gristmill`, also `python -m pipeline`.

Exit codes: 0 well; 1 a fault was found, or the run could not be completed; 2 the command line or the configuration is wrong;
3 the run ended, but some units failed within run.max_failed_share; 4 the run directory is in use; 130 interrupted.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.config import Config, ConfigError, absolute_path, load, show
from pipeline.lease import Held

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", help=__doc__.split("\n\n")[0])
WIDE = 140  # columns that a table of numbers needs; a narrower terminal wraps its lines rather than lose digits
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

Stage = StrEnum("Stage", ["extract", "dedup", "refine", "pack"])
Kind = StrEnum("Kind", ["documents", "keep", "corpus", "rejected"])
Format = StrEnum("Format", ["jsonl", "parquet"])
Log = StrEnum("Log", ["bars", "json"])

ConfigFile = Annotated[Path, typer.Argument(help="TOML file, e.g. configs/quickstart.toml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file", metavar="[SECTION.KEY=VALUE]...")]
RunFolder = Annotated[str, typer.Argument(help="run directory (run.directory of the config)", metavar="RUN")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to use (else $RAY_ADDRESS, else this machine)")]
LogAs = Annotated[
    Log, typer.Option("--log", envvar="GRISTMILL_LOG", help="on stderr: bars on a terminal, or a JSON line for each unit")
]
INTERRUPTED = 130
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


@contextmanager
def _told() -> Iterator[None]:
    """Errors that are the user's to mend are told in a line; anything else is ours, and keeps its traceback."""
    from pipeline.catalog import PublishError
    from pipeline.run import RunFailed

    try:
        yield
    except ConfigError as error:
        _fail(error, 2)
    except Held as error:
        _fail(error, 4)
    except (RunFailed, PublishError, OSError, ValueError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted; what was committed stays: the same command goes on from there", INTERRUPTED)


def _fail(message: object, code: int) -> None:
    err.print(f"[bold red]error[/bold red] {_escaped(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[Stage | None, typer.Option(help="run this stage alone; the ones before must be done")] = None,
    first: Annotated[Stage | None, typer.Option("--from", help="begin at this stage; the ones before must be done")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and stop")] = False,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Run a config: extract, dedup, refine, pack, publish. The same command again goes on where it stopped."""
    from pipeline.engine import on_ray
    from pipeline.progress import funnel_table
    from pipeline.run import execute, plan

    with _told():
        if only and first:
            raise ConfigError("--only and --from exclude each other; give one")
        settings = load(config, overrides or [])
        if dry_run:
            _print_plan(plan(settings, only=only, first=first), as_json)
            return
        with _progress(settings, log) as progress:
            outcome = execute(settings, progress, on_ray(address), only=only, first=first)
        from pipeline.explain import run_funnel
        from pipeline.report import write_report

        rows = run_funnel(settings.run.directory)
        page = write_report(settings.run.directory)
        published = outcome.published
        if as_json:
            generation = {"name": published.name, "uri": published.uri, **_brief(published.manifest)} if published else None
            body = {"funnel": [r.__dict__ for r in rows], "generation": generation, "failed": outcome.failed, "report": page}
            print(json.dumps(body, indent=1))
        else:
            out.print(funnel_table(rows))
            if published:
                state = "published" if published.new else "unchanged, published before:"
                out.print(f"\n[bold]{published.name}[/bold] {state} {published.uri}", soft_wrap=True)
            out.print(f"report {page}", soft_wrap=True)
        _print_alarm(settings.run.directory)
        if outcome.failed:
            raise typer.Exit(3)


def _progress(settings: Config, log: Log) -> Any:
    from pipeline.progress import Bars, JsonLog

    return JsonLog(sys.stderr, settings.run.directory) if log == Log.json else Bars(err)


@app.command()
def batch(
    config: ConfigFile,
    overrides: Overrides = None,
    inputs: Annotated[int | None, typer.Option(help="take so many inputs, whatever the controller says", min=0)] = None,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Publish the next generation of a series, of as many inputs as trainers want; or finish the batch that was begun."""
    with _told():
        _batch(load(config, overrides or []), inputs, address, log, as_json)


@app.command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
    every: Annotated[str, typer.Option(help="time from one batch to the next, as 30m, 6h or 1d")] = "6h",
    address: Address = None,
    log: LogAs = Log.bars,
) -> None:
    """`gristmill batch` again and again, for as long as this process lives; one that fails is finished the next time."""
    from pipeline.batch import seconds_of

    with _told():
        pause = seconds_of(every)
        settings = load(config, overrides or [])
    horizon = settings.schedule.horizon_hours
    if horizon * 3600 <= pause:
        err.print(f"[yellow]warning[/yellow] schedule.horizon_hours = {horizon:g} is no longer than --every {every}")
    while True:
        begun = time.monotonic()
        try:
            with _told():
                _batch(load(config, overrides or []), None, address, log, False)
        except typer.Exit as ended:  # told already; what was committed stays, and the next time goes on from there
            if ended.exit_code == INTERRUPTED:
                raise
        time.sleep(max(0.0, pause - (time.monotonic() - begun)))


def _batch(settings: Config, inputs: int | None, address: str | None, log: Log, as_json: bool) -> None:
    from pipeline.batch import run_batch
    from pipeline.engine import on_ray

    with _progress(settings, log) as progress:
        done = run_batch(settings, progress, on_ray(address), inputs=inputs)
    decision = done.decision
    if as_json:
        said = decision and {name: getattr(decision, name) for name in ("state", "inputs", "reasons")}
        print(json.dumps({"batch": done.batch and done.batch._asdict(), "decision": said}))
    else:
        for line in () if decision is None else (*decision.reasons, f"{decision.state}: {decision.inputs} inputs"):
            out.print(_escaped(line), soft_wrap=True)
        if done.batch:
            found = done.batch.done or {}
            what = f"{found['generation']}, {found['tokens']:,} tokens" if found.get("generation") else "nothing was kept"
            out.print(f"batch {done.batch.number}: {len(done.batch.inputs)} inputs, {what}", soft_wrap=True)
    if done.outcome and done.outcome.failed:
        raise typer.Exit(3)


@app.command()
def decisions(run: RunFolder, as_json: AsJson = False) -> None:
    """Why each batch of a series had its size."""
    from pipeline.batch import decisions as logged
    from pipeline.schedule import Record, from_json

    with _told():
        lines = logged(absolute_path(run))
        if as_json:
            print("\n".join(line.decode() for line in lines))
            return
        for record in (from_json(Record, line) for line in lines):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.inputs.now))
            out.print(f"[bold]{when} {record.decision.state}[/bold] {record.decision.inputs} inputs", soft_wrap=True)
            for reason in record.decision.reasons:
                out.print(f"  {_escaped(reason)}", soft_wrap=True)


@app.command()
def replay(run: RunFolder) -> None:
    """Decide each logged batch anew from what was known then. Exit 1 where this version decides otherwise."""
    from pipeline.batch import decisions as logged
    from pipeline.schedule import replay as decided_anew

    with _told():
        lines = logged(absolute_path(run))
        mismatches = decided_anew(lines)
        for line, what in mismatches:
            err.print(f"decision {line}: {_escaped(what)}", soft_wrap=True)
        out.print(f"{len(lines)} decisions, {len({m.line for m in mismatches})} decided otherwise")
        if mismatches:
            raise typer.Exit(1)


@app.command()
def metrics(
    run: RunFolder,
    port: Annotated[int | None, typer.Option("--serve", help="answer GET /metrics on this port", min=0, max=65535)] = None,
    host: Annotated[str, typer.Option(help="address to serve on")] = "127.0.0.1",
) -> None:
    """How a run or series does, as Prometheus reads it; from its files alone. Exit 1 if some cannot be read: the rest is told."""
    from prometheus_client import generate_latest

    from pipeline.metrics import Metrics, serve

    found = Metrics(absolute_path(run), lambda fault: err.print(fault, markup=False, soft_wrap=True))
    with _told():
        if port is not None:
            address, thread = serve(found, host=host, port=port)
            err.print(address)
            thread.join()
        print(generate_latest(found).decode(), end="")
        if found.faults:
            raise typer.Exit(1)


@app.command()
def retry(
    config: ConfigFile,
    named: Annotated[
        list[str] | None, typer.Argument(help="failed units (none: all), and overrides", metavar="[UNIT|SECTION.KEY=VALUE]...")
    ] = None,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Run again after forgetting which units failed or were set aside; of a series, in the batch that was begun."""
    from pipeline.batch import batches
    from pipeline.run import forget_failures

    overrides = [name for name in named or [] if "=" in name]
    with _told():
        settings = load(config, overrides)
        begun = batches(settings.run.directory)
        if begun and begun[-1].done:
            raise ConfigError(f"batch {begun[-1].number} is done, and published without them: a generation never changes")
        root = begun[-1].directory if begun else settings.run.directory
        forgotten = forget_failures(root, [name for name in named or [] if "=" not in name])
        err.print(f"{len(forgotten)} failures forgotten")
        if begun:
            _batch(settings, None, address, log, as_json)
    if not begun:
        run(config, overrides, address=address, log=log, as_json=as_json)


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[str, typer.Option(help="share of the input to run, as a percentage")] = "0.1%",
    price_per_core_hour: Annotated[float, typer.Option(help="of a processor core, in any currency")] = 0.0,
    nodes: Annotated[int, typer.Option(help="machines that the run will have", min=1)] = 1,
    cores_per_node: Annotated[int, typer.Option(help="cores of each; 0: as many as this machine has", min=0)] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """What a run will cost, from a sample of its input: core-seconds, hours, bytes, requests, money, tokens. Publishes nothing.

    Writes RUN/estimate.json, which the report compares with the run.
    """
    from pipeline.engine import on_ray
    from pipeline.estimate import estimate as measure
    from pipeline.estimate import lines_of, share_of
    from pipeline.progress import Bars

    with _told():
        cores = nodes * (cores_per_node or os.cpu_count() or 1)
        settings, share = load(config, overrides or []), share_of(sample)
        with Bars(err) as bars:
            found = measure(settings, bars, on_ray(address), share=share, price=price_per_core_hour, cores=cores)
        if as_json:
            from dataclasses import asdict

            print(json.dumps(asdict(found), indent=1))
            return
        heads = ("stage", "units", "core-seconds", "of them fixed", "wall", "bytes", "GET", "PUT", "cost")
        table = Table(*heads, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        rows, notes = lines_of(found)
        for row in rows:
            table.add_row(*row)
        Console(highlight=False, width=max(out.width, WIDE)).print(table)
        for note in notes:
            out.print(note, soft_wrap=True)


@app.command("gc")
def collect_garbage(
    run: RunFolder,
    delete: Annotated[bool, typer.Option("--delete", help="remove it; without this it is only listed")] = False,
    intermediate: Annotated[bool, typer.Option(help="of published batches also what only `why` still reads")] = False,
    keep_days: Annotated[float, typer.Option(help="leave what is newer", min=0)] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List or remove what nothing in a run or series refers to any more. Published generations are never touched."""
    from pipeline import gc
    from pipeline.report import size

    with _told():
        root, before = absolute_path(run), time.time() - keep_days * 86_400 if keep_days else None
        if delete:
            found = gc.collect(root, intermediate=intermediate, older_than=before)
        else:
            listed = gc.find(root, intermediate=intermediate)
            found = [g for g in listed if before is None or (g.modified is not None and g.modified < before)]
        if as_json:
            print(json.dumps([g._asdict() for g in found]))
            return
        for g in found:
            out.print(f"{g.reason:12} {size(g.bytes):>8}  {_escaped(g.uri)}", soft_wrap=True)
        what = "removed" if delete else "can go; --delete removes it" if found else "there is nothing to remove"
        out.print(f"{len(found)} of {size(sum(g.bytes for g in found))}: {what}")


@app.command()
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(help="documents to measure, about", min=100)] = 5000,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sample of the run's own documents, so that bounds can be percentiles: perplexity.perplexity = ["p0", "p60"].

    Extracts and deduplicates first, as a run would. Writes RUN/calibration.json, which the next run reads, and a plot.
    """
    from pipeline.calibrate import SHOWN, write_plot
    from pipeline.calibrate import calibrate as measure
    from pipeline.engine import on_ray
    from pipeline.progress import Bars

    with _told():
        with Bars(err) as bars:
            found = measure(load(config, overrides or [], calibrated=False), bars, on_ray(address), sample=sample)
        calibrated = load(config, overrides or [])
        plot = write_plot(calibrated, found.distributions)
        cuts = [row for row in show(calibrated) if "percentiles" in row[2]]
        if as_json:
            described = [d._asdict() | {"values": None} for d in found.distributions]
            cut = {key: {"value": value, "origin": origin} for key, value, origin in cuts}
            print(json.dumps({"table": found.table, "plot": plot, "scores": described, "bounds": cut}, indent=1))
            return
        table = Table("score", "language", "documents", *(f"p{p}" for p in SHOWN), box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for d in found.distributions:
            values = (f"{d.percentiles[p]:.4g}" for p in SHOWN)
            table.add_row(d.score, d.language or "all", f"{d.documents:,}", *values)
        Console(highlight=False, width=max(out.width, WIDE)).print(table)
        for key, value, origin in cuts:
            out.print(f"{_escaped(f'{key} = {value}')}  [green]# {_escaped(origin)}[/green]", soft_wrap=True)
        out.print(f"{found.table}\nplot {plot}", soft_wrap=True)


@app.command()
def dedup(
    paths: Annotated[
        list[str], typer.Argument(help="JSONL (.gz, .zst) or Parquet files, folders, patterns, s3:// URIs", metavar="PATH...")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="folder for keep.parquet, the report, and the state to resume from")
    ],
    text_column: Annotated[str, typer.Option(help="column of the text")] = "text",
    id_column: Annotated[str, typer.Option(help="column of the id; '' if there is none")] = "id",
    against: Annotated[list[str] | None, typer.Option(help="output of an earlier dedup with dedup.write_index=kept")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, e.g. dedup.num_bands=26", metavar="KEY=VALUE")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Find near-duplicates in JSONL or Parquet files: writes keep.parquet with id, cluster_id, cluster_size, keep."""
    from pipeline.dedup_command import configure, dedup_files
    from pipeline.engine import on_ray
    from pipeline.progress import Bars
    from pipeline.report import write_report

    with _told():
        if not output:
            raise ConfigError("-o is empty: name the folder to write to")
        config = configure(
            [absolute_path(p) for p in paths],
            absolute_path(output),
            text_column=text_column,
            id_column=id_column,
            against=[absolute_path(p) for p in against or []],
            overrides=settings or [],
        )
        with Bars(err) as bars:
            result = dedup_files(config, bars, on_ray(address))
        page = write_report(config.run.directory)
        if as_json:
            print(json.dumps(result._asdict() | {"report": page}, indent=1))
        else:
            total = max(1, sum(result.rows.values()))
            table = Table("rule", "rows", "share", box=None, pad_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for rule, count in sorted(result.rows.items(), key=lambda item: -item[1]):
                table.add_row(rule, f"{count:,}", f"{count / total:.1%}")
            out.print(table)
            out.print(f"{result.clusters:,} clusters\n{result.table}\nreport {page}", soft_wrap=True)
        _print_alarm(config.run.directory)
        if result.failed:
            raise typer.Exit(3)


def _print_alarm(root: str) -> None:
    from pipeline.explain import alarm

    message = alarm(root)
    if message is not None:
        err.print(f"[yellow]alarm[/yellow] {message}", soft_wrap=True)


def _brief(manifest: dict[str, Any]) -> dict[str, Any]:
    return {k: manifest[k] for k in ("rows", "tokens", "documents", "seq_len")}


def _print_plan(phases: list[Any], as_json: bool) -> None:
    from pipeline.phase import OPTIONAL

    rows = [{"phase": p.name, "units": len(p.units), "pending": len(p.pending), "store": p.store.root} for p in phases]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("phase", "units", "done", "to do", box=None)
    table.add_column("folder", overflow="fold")
    for row, phase in zip(rows, phases, strict=True):
        if phase.name in OPTIONAL and not phase.units:
            continue
        done = len(phase.units) - len(phase.pending)
        table.add_row(phase.name, str(row["units"]), str(done), str(row["pending"]), phase.store.root)
    out.print(table)
    if phases and phases[-1].pending and phases[-1].name != "pack":
        out.print("what comes after depends on what these units write; nothing was run")


@app.command("show-config")
def show_config(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved configuration, with where each value came from."""
    with _told():
        values = list(show(load(config, overrides or [])))
        if as_json:
            print(json.dumps({key: {"value": value, "origin": origin} for key, value, origin in values}, indent=1))
            return
        width = min(70, max(len(f"{key} = {value}") for key, value, _ in values))
        section = ""
        for key, value, origin in values:
            head = key.split(".")[0]
            if head != section:
                out.print(end="\n" if section else "")
                section = head
            style = "dim" if origin == "default" else "green"
            out.print(f"{_escaped(f'{key} = {value}'.ljust(width))}  [{style}]# {_escaped(origin)}[/{style}]", soft_wrap=True)


@app.command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """How far a run is: units done, failed and left per phase, rate, time left; of a series its batches and the one at work."""
    from pipeline.batch import is_series
    from pipeline.explain import status as read_status
    from pipeline.phase import OPTIONAL

    with _told():
        root = absolute_path(run)
        if is_series(root):
            under_way = _series_status(root, as_json)
            if as_json or under_way is None:
                return
            root = under_way
        state = read_status(root)
        if as_json:
            print(json.dumps(state, indent=1))
            return
        generation = f", generation {state['generation']}" if state["generation"] else ""
        out.print(f"{state['run']}  stage {state['stage']}{generation}", soft_wrap=True)
        table = Table("phase", "done", "failed", "left", "rows in", "rows out", "rows/s", "time left", box=None)
        for phase, s in state["phases"].items():
            if phase in OPTIONAL and not s["done"] + s["failed"] + s["left"]:
                continue
            eta = f"{s['eta_seconds']} s" if s["eta_seconds"] is not None else ""
            rate = f"{s['rows_per_second']:,.0f}" if s["rows_per_second"] else ""
            numbers = (s["done"], s["failed"], s["left"], s["rows_in"], s["rows_out"])
            table.add_row(phase, *(f"{n:,}" for n in numbers), rate, eta)
        out.print(table)
        for phase, s in state["phases"].items():
            for unit, error in s["errors"].items():
                out.print(f"[red]failed[/red] {phase} {unit}: {_escaped(error)}", soft_wrap=True)


def _series_status(root: str, as_json: bool) -> str | None:
    """Tell of the batches of a series; the directory of the one under way."""
    from pipeline.series import gather

    data = gather(root)
    if as_json:
        rows = [{**r._asdict(), "begun": r.begun.isoformat()} for r in data.rows]
        print(json.dumps({"series": root, "batches": rows, "consumed": {name: c[-1][1] for name, c in data.curves.items() if c}}))
        return None
    table = Table("batch", "begun (UTC)", "decided", "inputs", "tokens", "generation", box=None)
    for r in data.rows:
        state = "under way" if r.seconds is None else r.generation or "nothing kept"
        tokens = "" if r.tokens is None else f"{r.tokens:,}"
        table.add_row(str(r.number), f"{r.begun:%Y-%m-%d %H:%M}", r.state, f"{r.taken:,}", tokens, state)
    out.print(f"{_escaped(root)}", soft_wrap=True)
    out.print(table)
    for name, curve in data.curves.items():
        out.print(f"tokens {_escaped(name)}: {curve[-1][1] if curve else 0:,.0f}")
    if data.last:
        out.print(f"last decision: {data.last.state}, {data.last.inputs} inputs")
    under_way = data.rows and data.rows[-1].seconds is None
    return f"{root}/batches/{data.rows[-1].number:04d}" if under_way else None


@app.command()
def report(run: RunFolder) -> None:
    """Rebuild the HTML report of a run or of a series of batches, and print its path."""
    from pipeline.batch import is_series
    from pipeline.report import write_report
    from pipeline.series import write_report as write_series_report

    with _told():
        root = absolute_path(run)
        print(write_series_report(root) if is_series(root) else write_report(root))


@app.command()
def why(run: RunFolder, url: Annotated[str, typer.Argument(metavar="URL|ID")], as_json: AsJson = False) -> None:
    """What became of a page, by URL or input's id: rule, value and bound; or cluster and kept copy; or generation and rows."""
    from pipeline.explain import to_json
    from pipeline.why import why as read_why

    with _told():
        fates = read_why(absolute_path(run), url)
        if as_json:
            print(to_json(fates, indent=1))
        for fate in fates if not as_json else ():
            _print_fate(fate)
        if not fates:
            err.print(f"{_escaped(url)}: this run has no document of that URL (records that are no documents are only counted)")
            raise typer.Exit(1)


def _print_fate(fate: dict[str, Any]) -> None:
    name = fate["url"] or fate["source_id"] or str(fate["doc_id"])
    out.print(f"[bold]{_escaped(name)}[/bold]  doc_id {fate['doc_id']}", soft_wrap=True)
    out.print(f"  read from {_escaped(fate['warc_file'])} at {fate['warc_offset']}", soft_wrap=True)
    if fate["fate"] == "rejected":
        bound = "" if fate["bound"][0] is None else f" outside [{fate['bound'][0]:g}, {fate['bound'][1]:g}]"
        value = "" if fate["value"] is None else f" = {fate['value']:.6g}"
        out.print(f"  [red]rejected[/red] in {fate['stage']} by {fate['rule']}{value}{bound}")
    elif fate["fate"] == "duplicate":
        kept, how = fate["kept_copy"], {"dedup.exact": "exact", "dedup.near": "near"}.get(fate["rule"], "of an earlier batch")
        similar = "" if fate["similarity"] is None else f", similarity {fate['similarity']:.3f}"
        of = f"cluster {fate['cluster_id']} of {fate['cluster_size']} documents{similar}"
        out.print(f"  [yellow]duplicate[/yellow] ({how}): {of}", soft_wrap=True)
        where = f" in {_escaped(kept['documents'])}" if kept["documents"] else ""
        out.print(
            f"  kept copy: {_escaped(str(kept['url'] or kept['source_id']))}  doc_id {kept['doc_id']}{where}", soft_wrap=True
        )
    elif fate["fate"] == "published":
        for g in fate["generations"]:
            word, of = ("held out", " of its held-out part") if g["held_out"] else ("published", "")
            out.print(f"  [green]{word}[/green] in {g['name']}: {g['tokens']} tokens in rows {_ranges(g['rows'])}{of}")
    else:
        out.print(f"  waiting for stage {fate['stage']}")
    if "lines_cut" in fate:
        cut = f"{len(fate['lines_cut']):,} lines or paragraphs ({fate['chars_cut']:,} characters)"
        out.print(f"  lost {cut} that earlier documents have")
    for name, score in fate["scores"].items():
        rank = fate["percentiles"].get(name)
        out.print(f"    {name:<48} {score:<12.6g}" + (f" p{rank:.0f}" if rank is not None else ""), style="dim")
    for name, note in fate["notes"].items():
        out.print(f"    {name:<48} {_escaped(note)}", style="dim", soft_wrap=True)


def _ranges(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


@app.command()
def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    drop: Annotated[list[str] | None, typer.Option(help="filter or rule to take out, e.g. c4 or c4.sentence_count")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for the second side", metavar="KEY=VALUE")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="the config of the second side, if it is another file")] = None,
    as_json: AsJson = False,
) -> None:
    """What other bounds would change, from the scores that the run stored: documents, tokens, overlap. Runs nothing."""
    from pipeline.ablate import ablate as compare
    from pipeline.ablate import rows_of, without

    with _told():
        before = load(config, overrides or [])
        after = without(load(against or config, [*(overrides or []), *(settings or [])]), drop or [])
        found = compare(before, after)
        if as_json:
            sides = {"before": found.before._asdict(), "after": found.after._asdict()}
            print(json.dumps(found._asdict() | sides | {"hosts": [h._asdict() for h in found.hosts]}, indent=1))
            return
        table = Table("", "before", "after", "change", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for what, left, right in rows_of(found):
            if left is not None and right is not None:
                table.add_row(what, f"{left:,}", f"{right:,}", f"{right - left:+,}" if left != right else "")
        Console(highlight=False, width=max(out.width, WIDE)).print(table)
        shared = f"{found.both:,} documents in both, {found.only_before:,} only before, {found.only_after:,} only after"
        out.print(f"overlap {found.jaccard:.1%}: {shared}; read {found.parts[0]:,} of {found.parts[1]:,} parts", soft_wrap=True)
        for host in found.hosts:
            out.print(f"  {_escaped(host.host or '(no host)')}: {host.before:,} → {host.after:,}", soft_wrap=True)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="a generation, or a run for all of its")], as_json: AsJson = False
) -> None:
    """Re-read the shards of a generation against index and manifest: counts, sizes, hashes. Exit 1 on any fault."""
    from pipeline.verify import verify_path

    with _told():
        results = verify_path(absolute_path(path))
        if as_json:
            print(json.dumps([r._asdict() | {"faults": [f._asdict() for f in r.faults]} for r in results], indent=1))
        for result in results if not as_json else ():
            word = f"[red]{len(result.faults)} faults[/red]" if result.faults else "[green]whole[/green]"
            out.print(
                f"{result.path}: {word}; {result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens", soft_wrap=True
            )
            for fault in result.faults:
                line = f"  {fault.shard}: {fault.what}: expected {fault.expected}, found {fault.found}"
                out.print(_escaped(line), soft_wrap=True)
        if any(r.faults for r in results):
            raise typer.Exit(1)


@app.command()
def export(
    run: RunFolder,
    stage: Annotated[Kind, typer.Option(help="which documents")],
    format: Annotated[Format, typer.Option(help="file format")] = Format.jsonl,
    output: Annotated[str, typer.Option("-o", "--output", help="file to write")] = "",
) -> None:
    """Write the documents, the keep table, the corpus or the rejected documents of a run to one file."""
    from pipeline.explain import export as write_export

    with _told():
        if not output:
            raise ConfigError("-o PATH is missing: name the file to write")
        count = write_export(absolute_path(run), stage, format=format, output=absolute_path(output))
        err.print(f"{count:,} rows → {_escaped(output)}", soft_wrap=True)


Licence = Annotated[str, typer.Option(help="licence of the sources, for the model's card, e.g. CC-BY-SA-4.0")]


SOURCE = "text: .txt, .jsonl[.gz|.zst], .parquet, or rows of a run: RUN:corpus, RUN:rejected:quality.score<0.1"


def _numbers(option: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ConfigError(f"{option} {given}: write numbers, parted by commas") from None


@app.command("train-lm")
def train_lm(
    sources: Annotated[list[str], typer.Argument(help=SOURCE)],
    output: Annotated[Path, typer.Option("-o", "--output", help="model to write; its card lies beside it")],
    licence: Licence,
    order: Annotated[int, typer.Option(help="n-gram order")] = 5,
    prune: Annotated[str, typer.Option(help="drop n-grams seen at most so often, one count per order")] = "0,0,1",
    memory: Annotated[str, typer.Option(help="memory for lmplz, e.g. 4G")] = "1G",
    bits: Annotated[int, typer.Option(help="of quantised probabilities and back-offs; 0: not quantised")] = 8,
    sentencepiece: Annotated[int, typer.Option(help="train SentencePiece to this vocabulary; 0: words")] = 0,
    sentencepiece_model: Annotated[Path | None, typer.Option(help="or use this SentencePiece model")] = None,
    lmplz_option: Annotated[list[str] | None, typer.Option(help="passed to lmplz as it stands; repeat for more")] = None,
    held_out: Annotated[float, typer.Option(help="share of documents kept out of training")] = 0.02,
    text_column: Annotated[str, typer.Option(help="column of the text in .jsonl and .parquet")] = "text",
) -> None:
    """Train a KenLM model for the filter `perplexity`, with KenLM's lmplz (make kenlm)."""
    from pipeline.train_lm import train_lm as train

    with _told():
        counts = tuple(int(n) for n in _numbers("--prune", prune))
        train(
            sources,
            output=output,
            licence=licence,
            order=order,
            prune=counts,
            memory=memory,
            bits=bits,
            sentencepiece=sentencepiece,
            sentencepiece_model=sentencepiece_model,
            lmplz_options=tuple(lmplz_option or ()),
            held_out=held_out,
            text_column=text_column,
        )


@app.command("train-classifier")
def train_classifier(
    output: Annotated[Path, typer.Option("-o", "--output", help="model to write: .ftz is quantised, .bin whole")],
    licence: Licence,
    positive: Annotated[list[str] | None, typer.Option(help=f"the same as --source hq={SOURCE}")] = None,
    negative: Annotated[list[str] | None, typer.Option(help="the same as --source lq=…")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="texts of a label, LABEL=…; repeat for more", metavar="LABEL=SOURCE")
    ] = None,
    epochs: int = 5,
    learning_rate: float = 0.5,
    dimensions: int = 16,
    word_ngrams: int = 2,
    buckets: int = 200_000,
    features: int = 50_000,
    seed: int = 0,
    held_out: Annotated[float, typer.Option(help="share of documents that precision and recall are measured on")] = 0.1,
    sample: Annotated[str, typer.Option(help="texts like those to be filtered, to calibrate the threshold on")] = "",
    keep_best: Annotated[str, typer.Option(help="percentages of the sample to find thresholds for")] = "5,10,20,50",
    text_column: Annotated[str, typer.Option(help="column of the text in .jsonl and .parquet")] = "text",
) -> None:
    """Train a fastText classifier for the filter `quality`, with two labels or more. The same texts make the same bytes."""
    from pipeline.train_classifier import train_classifier as train

    with _told():
        named = [f"hq={path}" for path in positive or []] + [f"lq={path}" for path in negative or []] + (source or [])
        labels: dict[str, list[str]] = {}
        for one in named:
            label, equals, path = one.partition("=")
            if not equals or not label or not path:
                raise ConfigError(f"--source {one}: write LABEL=SOURCE, e.g. --source sports=sports.jsonl")
            labels.setdefault(label, []).append(path)
        train(
            labels,
            output=output,
            licence=licence,
            epochs=epochs,
            learning_rate=learning_rate,
            dimensions=dimensions,
            word_ngrams=word_ngrams,
            buckets=buckets,
            features=features,
            seed=seed,
            held_out=held_out,
            sample=sample or None,
            keep_best=_numbers("--keep-best", keep_best),
            text_column=text_column,
        )


@app.command("index-benchmarks")
def index_benchmarks(
    files: Annotated[list[str], typer.Argument(help="evaluation sets: .jsonl, .json, .csv, .parquet, folders, .tar[.zst]")],
    output: Annotated[Path, typer.Option("-o", "--output", help="index to write, for decontamination.index")],
    background: Annotated[
        list[str] | None, typer.Option(help="clean text whose n-grams are no evidence; repeat for more")
    ] = None,
    n: Annotated[int, typer.Option(help="words of an n-gram")] = 13,
    min_words: Annotated[int, typer.Option(help="passages shorter than this are left out")] = 10,
    max_items: Annotated[int, typer.Option(help="n-grams of more items of a set than this are its template")] = 20,
) -> None:
    """Build the index of evaluation sets that the filter `decontamination` compares documents with."""
    from pipeline.benchmark_index import build_index, by_benchmark

    with _told():
        header = build_index(files, output=output, background=background or [], n=n, min_words=min_words, max_items=max_items)
        columns = ("rows", "bad_rows", "empty_rows", "passages", "common_passages", "ngrams")
        table = Table("benchmark", *columns, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, sums in sorted(by_benchmark(header).items()):
            table.add_row(_escaped(name), *(f"{sums[c]:,}" for c in columns))
        Console(highlight=False, width=max(out.width, WIDE)).print(table)
        out.print(f"{output}  {output.stat().st_size:,} bytes", soft_wrap=True)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ray: Annotated[bool, typer.Option(help="workers of Ray Train, restarted when one dies; --no-ray: this process alone")] = True,
) -> None:
    """Train a model on published generations, from its last checkpoint if it has one. Ranks of torchrun train together."""
    from trainer.launch import ConfigError as TrainConfigError
    from trainer.launch import TrainingError, launch

    with _told():
        try:
            ended = launch(config, overrides or [], on_ray=ray)
        except TrainConfigError as error:
            raise ConfigError(str(error)) from None
        except TrainingError as error:
            _fail(error, 1)
        out.print(f"{ended.steps:,} steps, loss {ended.loss:.4f} nats a token; {ended.why}", soft_wrap=True)
        if ended.plot:
            out.print(f"plot {_escaped(str(ended.plot))}", soft_wrap=True)


@app.command("why-step")
def why_step_command(
    directory: Annotated[Path, typer.Argument(help="directory of a training", metavar="TRAINING")],
    step: Annotated[int, typer.Argument(help="the step, as its figures name it", min=1)],
    as_json: AsJson = False,
) -> None:
    """Print the rows and documents that a training step was taken on; of a spike by falling loss."""
    from trainer.launch import TrainingError, why_step

    with _told():
        try:
            blamed = why_step(directory, step)
        except TrainingError as error:
            _fail(error, 1)
        if as_json:
            print(json.dumps([row._asdict() | {"documents": [d._asdict() for d in documents]} for row, documents in blamed]))
            return
        table = Table("generation", "row", "loss", "tokens", "document", "URL", box=None, padding=(0, 2, 0, 0))
        for row, documents in blamed:
            for document in documents:
                loss = "" if row.loss is None else f"{row.loss:.3f}"
                where = (row.generation, f"{row.row:,}", loss, f"{document.length:,}")
                table.add_row(*where, str(document.doc_id), _escaped(document.url or ""))
        Console(highlight=False, width=max(out.width, WIDE)).print(table)


@app.command("export-model")
def export_model(
    training: Annotated[str, typer.Argument(help="directory of a training, or folder or URL of its checkpoints")],
    output: Annotated[str, typer.Argument(help="folder or URL to write config.json and model.safetensors to")],
    step: Annotated[int | None, typer.Option(help="a checkpoint's step (else the newest)")] = None,
) -> None:
    """Write a checkpoint's weights as transformers loads them: LlamaForCausalLM.from_pretrained(OUTPUT)."""
    from trainer.launch import TrainingError, export

    with _told():
        try:
            exported = export(training, output, step=step)
        except TrainingError as error:
            _fail(error, 1)
        out.print(f"step {exported:,} written to {_escaped(output)}", soft_wrap=True)


def main() -> None:
    """Entry point of `python -m pipeline`."""
    app()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
