"""Commands of series, and of what it takes to run unattended."""

import json
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.cli import (
    INTERRUPTED,
    Address,
    AsJson,
    ConfigFile,
    Log,
    LogAs,
    Overrides,
    RunFolder,
    absolute_path,
    app,
    err,
    load_config,
    open_progress,
    out,
    print_wide,
    user_errors,
    warn,
)
from pipeline.cli.runs import run as run_command
from stages.formats.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.sections import Config

command = partial(app.command, rich_help_panel="Batches and operations")


@command()
def batch(
    config: ConfigFile,
    overrides: Overrides = None,
    inputs: Annotated[
        int | None, typer.Option(help="take so many inputs, whatever the controller says", min=0)
    ] = None,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Publish the next generation of a series, of as many inputs as trainers want; or finish the
    batch that was begun.
    """
    with user_errors():
        _batch(load_config(config, overrides), inputs, address, log, as_json)


@command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
    every: Annotated[
        str, typer.Option(help="time from one batch to the next, as 30m, 6h or 1d")
    ] = "6h",
    address: Address = None,
    log: LogAs = Log.bars,
) -> None:
    """`gristmill batch` again and again, for as long as this process lives; one that fails is
    finished the next time.
    """
    from pipeline.batches.batch import parse_interval

    with user_errors():
        pause = parse_interval(every)
        settings = load_config(config, overrides)
    horizon = settings.schedule.horizon_hours
    if horizon * 3600 <= pause:
        warn(f"schedule.horizon_hours = {horizon:g} is no longer than --every {every}")
    while True:
        begun = time.monotonic()
        try:
            with user_errors():
                _batch(load_config(config, overrides), None, address, log, False)
        except (
            typer.Exit
        ) as ended:  # already reported; the next batch continues from what is committed
            if ended.exit_code == INTERRUPTED:
                raise
        time.sleep(max(0.0, pause - (time.monotonic() - begun)))


def _batch(
    settings: "Config", inputs: int | None, address: str | None, log: Log, as_json: bool
) -> None:
    from pipeline.batches.batch import run_batch
    from pipeline.engine.ray_plan import on_ray

    with open_progress(settings, log) as progress:
        done = run_batch(settings, progress, on_ray(address), inputs=inputs)
    decision = done.decision
    if as_json:
        said = decision and {
            name: getattr(decision, name) for name in ("state", "inputs", "reasons")
        }
        print(json.dumps({"batch": done.batch and done.batch._asdict(), "decision": said}))
    else:
        for line in (
            ()
            if decision is None
            else (*decision.reasons, f"{decision.state}: {decision.inputs} inputs")
        ):
            out.print(escape(line), soft_wrap=True)
        if done.batch:
            found = done.batch.done or {}
            what = (
                f"{found['generation']}, {found['tokens']:,} tokens"
                if found.get("generation")
                else "nothing was kept"
            )
            out.print(
                f"batch {done.batch.number}: {len(done.batch.inputs)} inputs, {what}",
                soft_wrap=True,
            )
    if done.outcome and done.outcome.failed:
        raise typer.Exit(3)


@command()
def decisions(run: RunFolder, as_json: AsJson = False) -> None:
    """Why each batch of a series had its size."""
    from pipeline.batches.batch import decisions as logged
    from pipeline.controller.records import Record, from_json

    with user_errors():
        lines = logged(absolute_path(run))
        if as_json:
            print("\n".join(line.decode() for line in lines))
            return
        for record in (from_json(Record, line) for line in lines):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.inputs.now))
            out.print(
                f"[bold]{when} {record.decision.state}[/bold] {record.decision.inputs} inputs",
                soft_wrap=True,
            )
            for reason in record.decision.reasons:
                out.print(f"  {escape(reason)}", soft_wrap=True)


@command()
def replay(run: RunFolder) -> None:
    """Decide each logged batch anew from what was known then.

    Exit 1 where this version decides otherwise.
    """
    from pipeline.batches.batch import decisions as logged
    from pipeline.controller.replay import replay as decide_again

    with user_errors():
        lines = logged(absolute_path(run))
        mismatches = decide_again(lines)
        for line, what in mismatches:
            err.print(f"decision {line}: {escape(what)}", soft_wrap=True)
        out.print(f"{len(lines)} decisions, {len({m.line for m in mismatches})} decided otherwise")
        if mismatches:
            raise typer.Exit(1)


@command()
def retry(
    config: ConfigFile,
    named: Annotated[
        list[str] | None,
        typer.Argument(
            help="failed units (none: all), and overrides", metavar="[UNIT|SECTION.KEY=VALUE]..."
        ),
    ] = None,
    address: Address = None,
    log: LogAs = Log.bars,
    as_json: AsJson = False,
) -> None:
    """Run again after forgetting which units failed or were set aside; of a series, in the batch
    that was begun.
    """
    from pipeline.batches.batch import batches
    from pipeline.run.execute import forget_failures

    overrides = [name for name in named or [] if "=" in name]
    with user_errors():
        settings = load_config(config, overrides)
        begun = batches(settings.run.directory)
        if begun and begun[-1].done:
            raise ConfigError(
                f"batch {begun[-1].number} is done, and published without them: a generation never changes"
            )
        root = begun[-1].directory if begun else settings.run.directory
        forgotten = forget_failures(root, [name for name in named or [] if "=" not in name])
        err.print(f"{len(forgotten)} failures forgotten")
        if begun:
            _batch(settings, None, address, log, as_json)
    if not begun:
        run_command(config, overrides, address=address, log=log, as_json=as_json)


@command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    sample: Annotated[
        str, typer.Option(help="share of the input to run, as a percentage")
    ] = "0.1%",
    price_per_core_hour: Annotated[
        float, typer.Option(help="of a processor core, in any currency")
    ] = 0.0,
    nodes: Annotated[int, typer.Option(help="machines that the run will have", min=1)] = 1,
    cores_per_node: Annotated[
        int, typer.Option(help="cores of each; 0: as many as this machine has", min=0)
    ] = 0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Estimate core-seconds, wall time, bytes, cost and tokens of a run from a sample of its input.

    Publishes nothing. Writes RUN/estimate.json, which the report compares with the run.
    """
    from dataclasses import asdict

    from pipeline.cli.progress import Bars
    from pipeline.engine.ray_plan import on_ray
    from pipeline.study.estimate import estimate as measure
    from pipeline.study.estimate import summary
    from pipeline.study.sample import parse_share

    with user_errors():
        cores = nodes * (cores_per_node or os.cpu_count() or 1)
        settings, share = load_config(config, overrides), parse_share(sample)
        price = price_per_core_hour
        with Bars(err) as bars:
            result = measure(settings, bars, on_ray(address), share=share, price=price, cores=cores)
        if as_json:
            print(json.dumps(asdict(result), indent=1))
            return
        heads = ("stage", "units", "core-seconds", "wall", "bytes", "cost")
        table = Table(*heads, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        rows, notes = summary(result)
        for row in rows:
            table.add_row(*row)
        print_wide(table)
        for note in notes:
            out.print(note, soft_wrap=True)


@command()
def metrics(
    run: RunFolder,
    port: Annotated[
        int | None,
        typer.Option("--serve", help="answer GET /metrics on this port", min=0, max=65535),
    ] = None,
    host: Annotated[str, typer.Option(help="address to serve on")] = "127.0.0.1",
) -> None:
    """How a run or series does, as Prometheus reads it; from its files alone.

    Exit 1 if some cannot be read: the rest is user_errors.
    """
    from prometheus_client import generate_latest

    from pipeline.inspect.metrics import Metrics, serve

    found = Metrics(
        absolute_path(run), lambda fault: err.print(fault, markup=False, soft_wrap=True)
    )
    with user_errors():
        if port is not None:
            address, thread = serve(found, host=host, port=port)
            err.print(address)
            thread.join()
        print(generate_latest(found).decode(), end="")
        if found.faults:
            raise typer.Exit(1)


@command("gc")
def collect_garbage(
    run: RunFolder,
    delete: Annotated[
        bool, typer.Option("--delete", help="remove it; without this it is only listed")
    ] = False,
    intermediate: Annotated[
        bool, typer.Option(help="of published batches also what only `why` still reads")
    ] = False,
    keep_days: Annotated[float, typer.Option(help="leave what is newer", min=0)] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List or remove what nothing in a run or series refers to any more.

    Published generations are never touched.
    """
    from pipeline.batches import gc
    from pipeline.report.page import size

    with user_errors():
        before = time.time() - keep_days * 86_400 if keep_days else None
        find = gc.collect if delete else gc.find
        garbage = find(absolute_path(run), intermediate=intermediate, older_than=before)
        if as_json:
            print(json.dumps([g._asdict() for g in garbage]))
            return
        for g in garbage:
            out.print(f"{g.reason:12} {size(g.bytes):>8}  {escape(g.uri)}", soft_wrap=True)
        end = "can be removed with --delete" if garbage else "there is nothing to remove"
        total = size(sum(g.bytes for g in garbage))
        out.print(f"{len(garbage)} of {total}: {'removed' if delete else end}")
