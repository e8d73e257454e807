"""Commands for series of batches, and to operate runs."""

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Argument, Exit, Option

from pipeline.cli import (
    INTERRUPTED,
    Address,
    AsJson,
    ConfigFile,
    Dashboard,
    Log,
    LogAs,
    NewLineage,
    Overrides,
    RunFolder,
    app,
    err,
    fail,
    load_config,
    out,
    print_json,
    print_table,
    print_template,
    ray_units,
    user_errors,
    warn,
)
from pipeline.cli.runs import NOTHING_PUBLISHED
from pipeline.cli.runs import run as run_command
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.batches.batch import BatchResult
    from pipeline.config.sections import Config
    from pipeline.engine.units import RunUnits

command = partial(app.command, rich_help_panel="Batches and operations")


@command()
def batch(
    config: ConfigFile,
    overrides: Overrides = None,
    inputs: Annotated[
        int | None, Option(help="number of inputs, instead of the controller's", min=0)
    ] = None,
    address: Address = None,
    dashboard: Dashboard = False,
    log: LogAs = "bars",
    as_json: AsJson = False,
) -> None:
    """Publish the next generation of a series, sized for its trainers; or finish the batch that has
    begun.
    """
    run_units = ray_units(address, dashboard)
    _run_batch(load_config(config, overrides), inputs, run_units, log, as_json)


@command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
    every: Annotated[str, Option(help="time from one batch to the next, as 30m, 6h or 1d")] = "6h",
    address: Address = None,
    dashboard: Dashboard = False,
    log: LogAs = "bars",
) -> None:
    """Repeat `gristmill batch` until this process ends; a failed batch is finished next time.

    After a batch for a trainer that was short of data the next one is decided at once.
    """
    from pipeline.batches.batch import parse_interval

    pause = parse_interval(every)
    horizon = load_config(config, overrides).schedule.horizon_hours
    if horizon * 3600 <= pause:
        warn(
            f"schedule.horizon_hours = {horizon:g} is no longer than --every {every}: trainers "
            "have little left when a batch lands, and wait for one that is late"
        )
    run_units = ray_units(address, dashboard)
    while True:
        began, at_once = time.monotonic(), False
        try:
            with user_errors():
                settings = load_config(config, overrides)
                result = _run_batch(settings, None, run_units, log, False, period_seconds=pause)
                at_once = result.was_too_late
        except Exit as exit:  # already reported; the next batch resumes what is committed
            if exit.exit_code == INTERRUPTED:
                raise
        if not at_once:
            time.sleep(max(0.0, pause - (time.monotonic() - began)))


def _run_batch(
    settings: "Config",
    inputs: int | None,
    run_units: "RunUnits",
    log: Log,
    as_json: bool,
    *,
    period_seconds: float | None = None,
) -> "BatchResult":
    from pipeline.batches.batch import run_batch
    from pipeline.cli.progress import open_progress

    with open_progress(settings, log) as progress:
        result = run_batch(
            settings, progress, run_units, inputs=inputs, period_seconds=period_seconds
        )
    if as_json:
        d = result.decision
        decision = d and {"state": d.state, "inputs": d.inputs, "reasons": d.reasons}
        print_json({"batch": result.batch, "decision": decision}, indent=None)
    else:
        print_template("batch.txt.j2", decision=result.decision, batch=result.batch)
    if result.outcome and result.outcome.published is None:
        fail(NOTHING_PUBLISHED, 1)
    if result.outcome and result.outcome.failed:
        raise Exit(3)
    return result


@command()
def decisions(run: RunFolder, as_json: AsJson = False) -> None:
    """Show why each batch of a series has its size."""
    from pipeline.batches.batch import decisions as read_decisions
    from pipeline.controller.records import Record, from_json

    lines = read_decisions(run)
    if as_json:
        print("\n".join(line.decode() for line in lines))
        return
    for record in (from_json(Record, line) for line in lines):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.inputs.now))
        decision = record.decision
        heading = (f"{when} {decision.state}", "bold")
        out.print(Text.assemble(heading, f" {decision.inputs} inputs"))
        for reason in decision.reasons:
            out.print(f"  {reason}")


@command()
def replay(run: RunFolder) -> None:
    """Decide each logged batch again from its logged inputs.

    Exit 1 where this version decides differently.
    """
    from pipeline.batches.batch import decisions as read_decisions
    from pipeline.controller.decide import replay as decide_again

    lines = read_decisions(run)
    mismatches = decide_again(lines)
    for line, what in mismatches:
        err.print(f"decision {line}: {what}")
    different = len({m.line for m in mismatches})
    out.print(f"{len(lines)} decisions, {different} decided differently")
    if mismatches:
        raise Exit(1)


@command()
def retry(
    config: ConfigFile,
    names: Annotated[
        list[str] | None,
        Argument(
            help="failed units (default: all), and overrides",
            metavar="[UNIT|SECTION.KEY=VALUE]...",
        ),
    ] = None,
    address: Address = None,
    dashboard: Dashboard = False,
    new_lineage: NewLineage = False,
    log: LogAs = "bars",
    as_json: AsJson = False,
) -> None:
    """Run failed and quarantined units again; of a series, those of the batch that has begun."""
    from pipeline.batches.batch import batches
    from pipeline.run.execute import forget_failures

    overrides = [name for name in names or [] if "=" in name]
    settings = load_config(config, overrides)
    series = batches(settings.run.directory)
    if series and series[-1].done:
        raise ConfigError(
            f"batch {series[-1].number} is done, and published without them: a generation "
            "never changes"
        )
    root = series[-1].directory if series else settings.run.directory
    forgotten = forget_failures(root, [name for name in names or [] if "=" not in name])
    err.print(f"{len(forgotten)} failures forgotten")
    if series:
        _run_batch(settings, None, ray_units(address, dashboard), log, as_json)
    else:
        run_command(
            config,
            overrides,
            address=address,
            dashboard=dashboard,
            new_lineage=new_lineage,
            log=log,
            as_json=as_json,
        )


@command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[str, Option(help="share of the input to run, as a percentage")] = "0.1%",
    price_per_core_hour: Annotated[
        float, Option(help="of a processor core, in any currency")
    ] = 0.0,
    nodes: Annotated[int, Option(help="machines that the run will have", min=1)] = 1,
    cores_per_node: Annotated[
        int, Option(help="cores of each; 0: as many as this machine has", min=0)
    ] = 0,
    address: Address = None,
    dashboard: Dashboard = False,
    as_json: AsJson = False,
) -> None:
    """Estimate core-seconds, wall time, bytes, cost and tokens of a run from a sample of its input.

    Publishes nothing. Writes RUN/estimate.json, which the report compares with the run.
    """
    from pipeline.cli.progress import open_progress
    from pipeline.study.estimate import estimate as measure
    from pipeline.study.estimate import table_rows, with_interval
    from pipeline.study.input_sample import parse_share

    settings = load_config(config, overrides)
    share, price = parse_share(sample), price_per_core_hour
    cores = nodes * (cores_per_node or os.cpu_count() or 1)
    with open_progress(settings) as progress:
        run_units = ray_units(address, dashboard)
        result = measure(settings, progress, run_units, share=share, price=price, cores=cores)
    if as_json:
        print_json(result)
        return
    print_table(("stage", "units", "core-seconds", "wall", "bytes", "cost"), table_rows(result))
    tokens = with_interval(result.tokens, ",.0f")
    print_template("estimate.txt.j2", result=result, tokens=tokens)


@command()
def metrics(
    run: RunFolder,
    port: Annotated[
        int | None,
        Option("--serve", help="answer GET /metrics on this port", min=0, max=65535),
    ] = None,
    host: Annotated[str, Option(help="address to serve on")] = "127.0.0.1",
) -> None:
    """Print the state of a run or series as Prometheus reads it; from its files alone.

    Exit 1 if some files cannot be read; the rest is printed.
    """
    from prometheus_client import generate_latest

    from pipeline.inspect.metrics import Metrics, serve

    metrics = Metrics(run, err.print)
    if port is not None:
        address, thread = serve(metrics, host=host, port=port)
        err.print(address)
        thread.join()
    print(generate_latest(metrics).decode(), end="")
    if metrics.faults:
        raise Exit(1)


@command("gc")
def collect_garbage(
    run: RunFolder,
    delete: Annotated[
        bool, Option("--delete", help="remove it; the default is to list it")
    ] = False,
    intermediate: Annotated[
        bool, Option(help="also what only `why` still reads of published batches")
    ] = False,
    keep_days: Annotated[float, Option(help="keep newer files", min=0)] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List or remove what nothing in a run or series refers to any more.

    Published generations are never touched.
    """
    from pipeline.batches import gc

    before = time.time() - keep_days * 86_400 if keep_days else None
    find = gc.collect if delete else gc.find
    garbage = find(run, intermediate=intermediate, older_than=before)
    if as_json:
        print_json(garbage, indent=None)
        return
    print_template("gc.txt.j2", garbage=garbage, delete=delete)
