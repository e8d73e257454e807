"""Commands that run stages."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from pipeline.cli import (
    Address,
    AsJson,
    ConfigFile,
    Dashboard,
    LogAs,
    NewLineage,
    Overrides,
    Stage,
    absolute_path,
    app,
    fail,
    load_config,
    out,
    print_json,
    print_table,
    ray_units,
    warn,
)
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.execute import Outcome
    from pipeline.run.funnel import FunnelRow

NOTHING_PUBLISHED = "nothing was published: no document is left; see the funnel in the report"
command = partial(app.command, rich_help_panel="Runs")


@command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Stage | None, Option(help="run this stage only; those before it must be done")
    ] = None,
    first: Annotated[
        Stage | None,
        Option("--from", help="begin at this stage; those before it must be done"),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="print what would be done, and stop")
    ] = False,
    address: Address = None,
    dashboard: Dashboard = False,
    new_lineage: NewLineage = False,
    log: LogAs = "bars",
    as_json: AsJson = False,
) -> None:
    """Run a config: extract, dedup, refine, pack, publish.

    The same command resumes a run that was stopped. A rerun with other settings supersedes what it
    published: trainers read the newest. Exit 1 if nothing was published.
    """
    from pipeline.cli.progress import open_progress
    from pipeline.run.execute import execute, plan
    from pipeline.study.calibrate import changed_since

    if only and first:
        raise ConfigError("--only and --from exclude each other: give one")
    settings = load_config(config, overrides)
    if dry_run:
        _print_plan(plan(settings, only=only, first=first, new_lineage=new_lineage), as_json)
        return
    for key in changed_since(settings):
        warn(
            f"{key} has changed since the documents that percentiles refer to were sampled; "
            "run `gristmill calibrate` again"
        )
    with open_progress(settings, log) as progress:
        outcome = execute(
            settings,
            progress,
            ray_units(address, dashboard),
            only=only,
            first=first,
            new_lineage=new_lineage,
        )
    _print_outcome(settings.run.directory, outcome, as_json)
    if only in (None, "pack") and outcome.published is None:
        fail(NOTHING_PUBLISHED, 1)
    if outcome.failed:
        raise Exit(3)


def _print_outcome(root: str, outcome: "Outcome", as_json: bool) -> None:
    """Write the report of a run, and print its funnel and generation."""
    from pipeline.report.report import write_report
    from pipeline.run.results import run_funnel

    rows, page, published = run_funnel(root), write_report(root), outcome.published
    if as_json:
        generation = published and {
            "name": published.name,
            "uri": published.uri,
            **{k: published.manifest[k] for k in ("rows", "tokens", "documents", "seq_len")},
        }
        print_json(
            {"funnel": rows, "generation": generation, "failed": outcome.failed, "report": page}
        )
    else:
        _print_funnel(rows)
        if published:
            state = "published" if published.new else "unchanged, published before:"
            out.print(Text.assemble("\n", (published.name, "bold"), f" {state} {published.uri}"))
            if superseded := published.manifest.get("supersedes"):
                out.print(f"supersedes {', '.join(superseded)}: trainers read {published.name}")
        out.print(f"report {page}")
    _print_warnings(root)


def _print_funnel(rows: "Sequence[FunnelRow]") -> None:
    """Print the funnel; shares are of the rows that a stage began with."""
    from pipeline.run.funnel import stage_bases

    totals = stage_bases(rows)
    print_table(
        ("stage", "rule", "count", "share"),
        (
            (row.stage, Text(f"= {row.unit}", "bold"), Text(f"{row.count:,}", "bold"), "")
            if row.rule is None
            else (
                "",
                f"  − {row.rule}",
                f"{row.count:,}",
                f"{row.count / max(1, totals[row.stage]):.1%}",
            )
            for row in rows
        ),
        text_columns=2,
    )


def _print_warnings(root: str) -> None:
    """Warn of damaged inputs, and of hosts that lost nearly everything to dedup."""
    from pipeline.run.results import alarm
    from pipeline.run.status import run_status

    damage = list(run_status(root).phases["extract"].damage.values())
    for what in damage[:10]:
        warn(what, kind="damaged input")
    if len(damage) > 10:
        warn(f"{len(damage) - 10:,} more damaged inputs: see `gristmill status`")
    message = alarm(root)
    if message is not None:
        warn(message, kind="alarm")


def _print_plan(phases: list[Any], as_json: bool) -> None:
    from pipeline.run.phases import SPECS

    rows = [
        {"phase": p.name, "units": len(p.units), "pending": len(p.pending), "store": p.store.root}
        for p in phases
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("phase", "units", "done", "to do", box=None)
    table.add_column("folder", overflow="fold")
    for name, units, pending, store in map(dict.values, rows):
        if units or not SPECS[name].optional:
            table.add_row(name, str(units), str(units - pending), str(pending), store)
    out.print(table, soft_wrap=False)
    if phases and phases[-1].pending and phases[-1].name != "pack":
        out.print("later phases depend on what these units write; nothing was run")


@command()
def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[
        int, Option(help="number of documents to measure, approximately", min=100)
    ] = 5000,
    address: Address = None,
    dashboard: Dashboard = False,
    as_json: AsJson = False,
) -> None:
    """Measure a sample of the run's own documents, so that bounds can be percentiles:
    perplexity.perplexity = ["p0", "p60"].

    Extracts and deduplicates first, as a run would. Writes RUN/calibration.json, which the next run
    reads, and a plot.
    """
    from pipeline.cli.progress import open_progress
    from pipeline.config.percentiles import CALIBRATED
    from pipeline.config.show import by_key, show
    from pipeline.study.calibrate import SHOWN, write_plot
    from pipeline.study.calibrate import calibrate as measure

    uncalibrated = load_config(config, overrides, calibrated=False)
    with open_progress(uncalibrated) as progress:
        measured = measure(uncalibrated, progress, ray_units(address, dashboard), sample=sample)
    for language, count in measured.few.items():
        warn(
            f"{count} documents of language '{language}': too few for percentiles of its own, "
            "those of all documents are used"
        )
    calibrated = load_config(config, overrides)
    plot = write_plot(calibrated, measured.distributions)
    bounds = [setting for setting in show(calibrated) if setting.origin.endswith(CALIBRATED)]
    if as_json:
        scores = [d._asdict() | {"values": None} for d in measured.distributions]
        print_json(
            {"table": measured.table, "plot": plot, "scores": scores, "bounds": by_key(bounds)}
        )
        return
    print_table(
        ("score", "language", "documents", *(f"p{p}" for p in SHOWN)),
        (
            (
                d.score,
                d.language or "all",
                f"{d.documents:,}",
                *(f"{d.percentiles[p]:.4g}" for p in SHOWN),
            )
            for d in measured.distributions
        ),
        text_columns=2,
    )
    for key, value, origin in bounds:
        out.print(Text.assemble(f"{key} = {value}  ", (f"# {origin}", "green")))
    out.print(f"{measured.table}\nplot {plot}")


@command()
def dedup(
    paths: Annotated[
        list[str],
        Argument(
            help="JSONL (.gz, .zst) or Parquet files, folders, patterns, s3:// URIs",
            metavar="PATH...",
        ),
    ],
    output: Annotated[
        str,
        Option(
            "-o",
            "--output",
            help="folder for keep.parquet, the report, and the state to resume from",
        ),
    ],
    text_column: Annotated[str, Option(help="column of the text")] = "text",
    id_column: Annotated[str, Option(help="column of the id; '' if there is none")] = "id",
    against: Annotated[
        list[str] | None,
        Option(help="output of an earlier dedup with dedup.write_index=kept"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", help="section.key=value, e.g. dedup.num_bands=26", metavar="KEY=VALUE"),
    ] = None,
    address: Address = None,
    dashboard: Dashboard = False,
    as_json: AsJson = False,
) -> None:
    """Find near-duplicates in JSONL or Parquet files: writes keep.parquet with id, cluster_id,
    cluster_size, keep.
    """
    from pipeline.cli.progress import open_progress
    from pipeline.report.report import write_report
    from pipeline.run.dedup_command import configure, dedup_files

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
    with open_progress(config) as progress:
        result = dedup_files(config, progress, ray_units(address, dashboard))
    page = write_report(config.run.directory)
    if as_json:
        print_json(result._asdict() | {"report": page})
    else:
        total = max(1, sum(result.rows.values()))
        print_table(
            ("rule", "rows", "share"),
            (
                (rule, f"{count:,}", f"{count / total:.1%}")
                for rule, count in sorted(result.rows.items(), key=lambda item: -item[1])
            ),
        )
        out.print(f"{result.clusters:,} clusters\n{result.table}\nreport {page}")
    _print_warnings(config.run.directory)
    if result.failed:
        raise Exit(3)
