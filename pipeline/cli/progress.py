"""Shows the progress of a run: bars and a funnel for people, JSON lines for log collectors."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pipeline.cli import number_table
from pipeline.engine.units import UnitOutcome
from pipeline.run.funnel import FunnelRow, stage_bases
from stages.storage.ledger import Commit


@dataclass
class _Sums:
    task: TaskID
    rows_in: int = 0
    rows_out: int = 0
    before: int = 0  # rows of units that an earlier run did: they do not count in the rate

    @property
    def kept(self) -> str:
        return f"{self.rows_out / self.rows_in:.0%} kept" if self.rows_in else ""


class Bars:
    """Shows a bar per phase on a terminal: units, rows per second, share kept, time left.

    Shows only failures if the console is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._sums: dict[str, _Sums] = {}
        self._bars = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(
                "units  {task.fields[rate]:>10}  {task.fields[kept]:>9}  {task.fields[failed]}"
            ),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Commit]) -> None:
        """Start the bar of a phase; `done` are the commits of an earlier run."""
        task = self._bars.add_task(
            phase, total=units, completed=len(done), rate="", kept="", failed=""
        )
        rows_in = sum(c.rows_in for c in done)
        self._sums[phase] = _Sums(task, rows_in, sum(c.rows_out for c in done), rows_in)

    def advance(self, phase: str, outcome: UnitOutcome) -> None:
        """Count a unit that ended."""
        sums = self._sums[phase]
        if outcome.commit is not None:
            sums.rows_in += outcome.commit.rows_in
            sums.rows_out += outcome.commit.rows_out
        else:
            self.console.print(
                f"[red]failed[/red] {phase} unit {outcome.unit}: {outcome.error}", highlight=False
            )
        elapsed = self._bars.tasks[sums.task].elapsed or 0.0
        rate = f"{(sums.rows_in - sums.before) / elapsed:,.0f} rows/s" if elapsed else ""
        kept = sums.kept if phase in ("extract", "dedup keep", "refine") else ""
        self._bars.update(sums.task, advance=1, rate=rate, kept=kept)

    def end(self, phase: str) -> None:
        """Stop the bar of a phase."""
        self._bars.stop_task(self._sums[phase].task)


class JsonLog:
    """Writes one JSON object per line and event: begin and end of a phase, done and failed of a
    unit, stopped of a run that ends with an error.

    Each has time (ISO 8601, UTC), level ("info" or "error"), run, stage, phase, unit, event,
    seconds and error, null where they do not apply. "done" also has rows_in and rows_out; "begin"
    has units, and done: the number of units that an earlier run completed.
    """

    def __init__(self, stream: TextIO, run: str) -> None:
        self._stream, self._run = stream, run
        self._began: dict[str, float] = {}

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._write("stopped", error=f"{type(error).__name__}: {error}")

    def begin(self, phase: str, *, run: str, units: int, done: Sequence[Commit]) -> None:
        """Log the start of a phase; `run` is the directory of the run, or of the batch."""
        self._run, self._began[phase] = run, time.monotonic()
        self._write("begin", phase, units=units, done=len(done))

    def advance(self, phase: str, outcome: UnitOutcome) -> None:
        """Log that a unit ended."""
        if outcome.commit is None:
            self._write("failed", phase, unit=outcome.unit, error=outcome.error)
        else:
            commit = outcome.commit
            self._write(
                "done",
                phase,
                unit=outcome.unit,
                seconds=commit.seconds,
                rows_in=commit.rows_in,
                rows_out=commit.rows_out,
            )

    def end(self, phase: str) -> None:
        """Log the end of a phase."""
        self._write("end", phase, seconds=round(time.monotonic() - self._began.pop(phase), 3))

    def _write(
        self, event: str, phase: str | None = None, *, error: str | None = None, **more: object
    ) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "info" if error is None else "error",
            "run": self._run,
            "stage": phase and phase.split()[0],
            "phase": phase,
            "event": event,
            "unit": None,
            "seconds": None,
            "error": error,
        }
        print(json.dumps(line | more), file=self._stream, flush=True)


def funnel_table(rows: Sequence[FunnelRow]) -> Table:
    """The funnel as a table; shares are of the rows that a stage began with."""
    table = number_table("stage", "rule", "count", "share", text_columns=2)
    for column in table.columns:
        column.no_wrap = True
    totals = stage_bases(rows)
    for row in rows:
        if row.rule is None:
            unit, count = f"[bold]= {row.unit}[/bold]", f"[bold]{row.count:,}[/bold]"
            table.add_row(row.stage, unit, count, "")
        else:
            share = f"{row.count / max(1, totals[row.stage]):.1%}"
            table.add_row("", f"  − {row.rule}", f"{row.count:,}", share)
    return table
