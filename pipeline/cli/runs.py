"""Commands that run stages."""

import json
from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.cli import (
    Address,
    AsJson,
    ConfigFile,
    Log,
    LogAs,
    Overrides,
    Stage,
    app,
    err,
    escaped,
    out,
    print_wide,
    progress_of,
    told,
    warn,
)
from pipeline.config.calibration import CALIBRATED
from pipeline.config.load import load
from pipeline.config.paths import absolute_path
from pipeline.config.show import show
from stages.formats.errors import ConfigError

command = partial(app.command, rich_help_panel="Runs")


@command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Stage | None, typer.Option(help="run this stage alone; the ones before must be done")
    ] = None,
    first: Annotated[
        Stage | None,
        typer.Option("--from", help="begin at this stage; the ones before must be done"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and stop")
    ] = False,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Run a config: extract, dedup, refine, pack, publish.

    The same command again goes on where it stopped.
    """
    from pipeline.cli.progress import funnel_table
    from pipeline.engine.ray_plan import on_ray
    from pipeline.run.execute import execute, plan
    from pipeline.study.calibrate import changed_since

    with told():
        if only and first:
            raise ConfigError("--only and --from exclude each other; give one")
        settings = load(config, overrides or [])
        if dry_run:
            _print_plan(plan(settings, only=only, first=first), as_json)
            return
        for key in changed_since(settings):
            warn(
                f"{key} has changed since the sample was drawn that percentiles are of; run `gristmill calibrate` again"
            )
        with progress_of(settings, log) as progress:
            outcome = execute(settings, progress, on_ray(address), only=only, first=first)
        from pipeline.report.report import write_report
        from pipeline.run.results import run_funnel

        rows = run_funnel(settings.run.directory)
        page = write_report(settings.run.directory)
        published = outcome.published
        if as_json:
            generation = (
                {"name": published.name, "uri": published.uri, **_brief(published.manifest)}
                if published
                else None
            )
            body = {
                "funnel": [r.__dict__ for r in rows],
                "generation": generation,
                "failed": outcome.failed,
                "report": page,
            }
            print(json.dumps(body, indent=1))
        else:
            out.print(funnel_table(rows))
            if published:
                state = "published" if published.new else "unchanged, published before:"
                out.print(
                    f"\n[bold]{published.name}[/bold] {state} {published.uri}", soft_wrap=True
                )
            out.print(f"report {page}", soft_wrap=True)
        _print_alarm(settings.run.directory)
        if outcome.failed:
            raise typer.Exit(3)


def _brief(manifest: dict[str, Any]) -> dict[str, Any]:
    return {k: manifest[k] for k in ("rows", "tokens", "documents", "seq_len")}


def _print_plan(phases: list[Any], as_json: bool) -> None:
    from pipeline.run.phase import OPTIONAL

    rows = [
        {"phase": p.name, "units": len(p.units), "pending": len(p.pending), "store": p.store.root}
        for p in phases
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("phase", "units", "done", "to do", box=None)
    table.add_column("folder", overflow="fold")
    for row, phase in zip(rows, phases, strict=True):
        if phase.name in OPTIONAL and not phase.units:
            continue
        done = len(phase.units) - len(phase.pending)
        table.add_row(
            phase.name, str(row["units"]), str(done), str(row["pending"]), phase.store.root
        )
    out.print(table)
    if phases and phases[-1].pending and phases[-1].name != "pack":
        out.print("what comes after depends on what these units write; nothing was run")


@command()
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(help="documents to measure, about", min=100)] = 5000,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sample of the run's own documents, so that bounds can be percentiles:
    perplexity.perplexity = ["p0", "p60"].

    Extracts and deduplicates first, as a run would. Writes RUN/calibration.json, which the next run
    reads, and a plot.
    """
    from pipeline.cli.progress import Bars
    from pipeline.engine.ray_plan import on_ray
    from pipeline.study.calibrate import SHOWN, write_plot
    from pipeline.study.calibrate import calibrate as measure

    with told():
        with Bars(err) as bars:
            found = measure(
                load(config, overrides or [], calibrated=False),
                bars,
                on_ray(address),
                sample=sample,
            )
        for language, count in found.few.items():
            warn(
                f"{count} documents of language '{language}': too few for percentiles of its own, those of all stand in for it"
            )
        calibrated = load(config, overrides or [])
        plot = write_plot(calibrated, found.distributions)
        cuts = [row for row in show(calibrated) if row[2].endswith(CALIBRATED)]
        if as_json:
            described = [d._asdict() | {"values": None} for d in found.distributions]
            cut = {key: {"value": value, "origin": origin} for key, value, origin in cuts}
            print(
                json.dumps(
                    {"table": found.table, "plot": plot, "scores": described, "bounds": cut},
                    indent=1,
                )
            )
            return
        table = Table(
            "score", "language", "documents", *(f"p{p}" for p in SHOWN), box=None, pad_edge=False
        )
        for column in table.columns[2:]:
            column.justify = "right"
        for d in found.distributions:
            values = (f"{d.percentiles[p]:.4g}" for p in SHOWN)
            table.add_row(d.score, d.language or "all", f"{d.documents:,}", *values)
        print_wide(table)
        for key, value, origin in cuts:
            out.print(
                f"{escaped(f'{key} = {value}')}  [green]# {escaped(origin)}[/green]", soft_wrap=True
            )
        out.print(f"{found.table}\nplot {plot}", soft_wrap=True)


@command()
def dedup(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="JSONL (.gz, .zst) or Parquet files, folders, patterns, s3:// URIs",
            metavar="PATH...",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="folder for keep.parquet, the report, and the state to resume from",
        ),
    ],
    text_column: Annotated[str, typer.Option(help="column of the text")] = "text",
    id_column: Annotated[str, typer.Option(help="column of the id; '' if there is none")] = "id",
    against: Annotated[
        list[str] | None,
        typer.Option(help="output of an earlier dedup with dedup.write_index=kept"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="section.key=value, e.g. dedup.num_bands=26", metavar="KEY=VALUE"
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Find near-duplicates in JSONL or Parquet files: writes keep.parquet with id, cluster_id,
    cluster_size, keep.
    """
    from pipeline.cli.progress import Bars
    from pipeline.engine.ray_plan import on_ray
    from pipeline.report.report import write_report
    from pipeline.run.dedup_command import configure, dedup_files

    with told():
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
            out.print(
                f"{result.clusters:,} clusters\n{result.table}\nreport {page}", soft_wrap=True
            )
        _print_alarm(config.run.directory)
        if result.failed:
            raise typer.Exit(3)


def _print_alarm(root: str) -> None:
    from pipeline.run.results import alarm

    message = alarm(root)
    if message is not None:
        err.print(f"[yellow]alarm[/yellow] {message}", soft_wrap=True)
