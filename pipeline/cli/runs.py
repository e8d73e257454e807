"""Commands that run stages."""

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import (
    Address,
    AsJson,
    ConfigFile,
    Log,
    LogAs,
    Overrides,
    Stage,
    absolute_path,
    app,
    err,
    load_config,
    number_table,
    open_progress,
    out,
    print_wide,
    user_errors,
    warn,
)
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.execute import Outcome
    from pipeline.study.calibrate import Distribution

command = partial(app.command, rich_help_panel="Runs")


@command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Stage | None, typer.Option(help="run this stage only; those before it must be done")
    ] = None,
    first: Annotated[
        Stage | None,
        typer.Option("--from", help="begin at this stage; those before it must be done"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be done, and stop")
    ] = False,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Run a config: extract, dedup, refine, pack, publish.

    The same command resumes a run that was stopped.
    """
    from pipeline.engine.ray_plan import on_ray
    from pipeline.run.execute import execute, plan
    from pipeline.study.calibrate import changed_since

    with user_errors():
        if only and first:
            raise ConfigError("--only and --from exclude each other: give one")
        settings = load_config(config, overrides)
        if dry_run:
            _print_plan(plan(settings, only=only, first=first), as_json)
            return
        for key in changed_since(settings):
            warn(
                f"{key} has changed since the documents that percentiles refer to were sampled; "
                "run `gristmill calibrate` again"
            )
        with open_progress(settings, log) as progress:
            outcome = execute(settings, progress, on_ray(address), only=only, first=first)
        _print_outcome(settings.run.directory, outcome, as_json)


def _print_outcome(root: str, outcome: "Outcome", as_json: bool) -> None:
    """Write the report of a run, and print its funnel and generation; exit 3 if units failed."""
    from pipeline.cli.progress import funnel_table
    from pipeline.report.report import write_report
    from pipeline.run.results import run_funnel

    rows, page, published = run_funnel(root), write_report(root), outcome.published
    if as_json:
        generation = published and {
            "name": published.name,
            "uri": published.uri,
            **{k: published.manifest[k] for k in ("rows", "tokens", "documents", "seq_len")},
        }
        body = {
            "funnel": [row.__dict__ for row in rows],
            "generation": generation,
            "failed": outcome.failed,
            "report": page,
        }
        print(json.dumps(body, indent=1))
    else:
        out.print(funnel_table(rows))
        if published:
            state = "published" if published.new else "unchanged, published before:"
            out.print(f"\n[bold]{published.name}[/bold] {state} {published.uri}", soft_wrap=True)
        out.print(f"report {page}", soft_wrap=True)
    _print_alarm(root)
    if outcome.failed:
        raise typer.Exit(3)


def _print_plan(phases: list[Any], as_json: bool) -> None:
    from pipeline.run.phases import SPECS

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
        if SPECS[phase.name].optional and not phase.units:
            continue
        done = len(phase.units) - len(phase.pending)
        table.add_row(
            phase.name, str(row["units"]), str(done), str(row["pending"]), phase.store.root
        )
    out.print(table)
    if phases and phases[-1].pending and phases[-1].name != "pack":
        out.print("later phases depend on what these units write; nothing was run")


@command()
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[
        int, typer.Option(help="number of documents to measure, approximately", min=100)
    ] = 5000,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sample of the run's own documents, so that bounds can be percentiles:
    perplexity.perplexity = ["p0", "p60"].

    Extracts and deduplicates first, as a run would. Writes RUN/calibration.json, which the next run
    reads, and a plot.
    """
    from pipeline.cli.progress import Bars
    from pipeline.config.calibration import CALIBRATED
    from pipeline.config.show import show
    from pipeline.engine.ray_plan import on_ray
    from pipeline.study.calibrate import calibrate as measure
    from pipeline.study.calibrate import write_plot

    with user_errors():
        uncalibrated = load_config(config, overrides, calibrated=False)
        with Bars(err) as bars:
            measured = measure(uncalibrated, bars, on_ray(address), sample=sample)
        for language, count in measured.few.items():
            warn(
                f"{count} documents of language '{language}': too few for percentiles of its own, "
                "those of all documents are used"
            )
        calibrated = load_config(config, overrides)
        plot = write_plot(calibrated, measured.distributions)
        bounds = [setting for setting in show(calibrated) if setting.origin.endswith(CALIBRATED)]
        if as_json:
            body = {
                "table": measured.table,
                "plot": plot,
                "scores": [d._asdict() | {"values": None} for d in measured.distributions],
                "bounds": {
                    key: {"value": value, "origin": origin} for key, value, origin in bounds
                },
            }
            print(json.dumps(body, indent=1))
            return
        _print_distributions(measured.distributions)
        for key, value, origin in bounds:
            setting = escape(f"{key} = {value}")
            out.print(f"{setting}  [green]# {escape(origin)}[/green]", soft_wrap=True)
        out.print(f"{measured.table}\nplot {plot}", soft_wrap=True)


def _print_distributions(distributions: "Sequence[Distribution]") -> None:
    from pipeline.study.calibrate import SHOWN

    headings = ("score", "language", "documents", *(f"p{p}" for p in SHOWN))
    table = number_table(*headings, text_columns=2)
    for d in distributions:
        values = (f"{d.percentiles[p]:.4g}" for p in SHOWN)
        table.add_row(d.score, d.language or "all", f"{d.documents:,}", *values)
    print_wide(table)


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

    with user_errors():
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
            table = number_table("rule", "rows", "share")
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
