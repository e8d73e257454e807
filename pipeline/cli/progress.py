"""Shows the progress of a run: bars and a funnel for people, JSON lines for log collectors."""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.cli import PLAIN, Log
from pipeline.config.sections import Config
from pipeline.engine.units import UnitOutcome
from stages.storage.ledger import Commits


def open_progress(config: Config, log: Log = "bars") -> Any:
    """A context manager that shows the progress of a run on stderr."""
    return JsonLog(sys.stderr, config.run.directory) if log == "json" else Bars()


class Bars:
    """Shows a bar per phase on stderr: units, rows per second, share kept, time left.

    Shows only failures if stderr is no terminal.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, **PLAIN)
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("units  {task.fields[rate]:>10}  {task.fields[kept]:>9}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def begin(self, phase: str, *, run: str, units: int, done: Commits) -> None:
        """Start the bar of a phase; `done` are the commits of an earlier run."""
        rows_in, rows_out = done.total("rows_in"), done.total("rows_out")
        # rows of an earlier run do not count in the rate
        fields: dict[str, Any] = {"rows_in": rows_in, "rows_out": rows_out, "rows_before": rows_in}
        self._tasks[phase] = self._bars.add_task(
            phase, total=units, completed=len(done), rate="", kept="", **fields
        )

    def advance(self, phase: str, outcome: UnitOutcome) -> None:
        """Count a unit that ended."""
        task = self._bars.tasks[self._tasks[phase]]
        rows = task.fields
        if outcome.commit is not None:
            rows["rows_in"] += outcome.commit.rows_in
            rows["rows_out"] += outcome.commit.rows_out
        else:
            message = f" {phase} unit {outcome.unit}: {outcome.error}"
            self._bars.console.print(Text.assemble(("failed", "red"), message))
        rate = kept = ""
        if task.elapsed:
            rate = f"{(rows['rows_in'] - rows['rows_before']) / task.elapsed:,.0f} rows/s"
        if rows["rows_in"] and phase in ("extract", "dedup keep", "refine"):
            kept = f"{rows['rows_out'] / rows['rows_in']:.0%} kept"
        self._bars.update(task.id, advance=1, rate=rate, kept=kept)

    def end(self, phase: str) -> None:
        """Stop the bar of a phase."""
        self._bars.stop_task(self._tasks[phase])


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

    def begin(self, phase: str, *, run: str, units: int, done: Commits) -> None:
        """Log the start of a phase; `run` is the directory of the run, or of the batch."""
        self._run, self._began[phase] = run, time.monotonic()
        self._write("begin", phase, units=units, done=len(done))

    def advance(self, phase: str, outcome: UnitOutcome) -> None:
        """Log that a unit ended."""
        if outcome.commit is None:
            self._write("failed", phase, unit=outcome.unit, error=outcome.error)
        else:
            fields = vars(outcome.commit)
            names = ("unit", "seconds", "rows_in", "rows_out")
            self._write("done", phase, **{name: fields[name] for name in names})

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
