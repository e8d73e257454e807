"""The report of a series: tokens published and consumed, hours of supply, its batches."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from markupsafe import Markup

from pipeline.batches.batch import Batch, batches, decisions
from pipeline.controller.records import Decision, Record, from_json
from pipeline.report.charts import Point, lines_svg
from pipeline.report.page import write_page
from trainer.telemetry import feedback

Points = list[Point]  # (Unix time, value), in order of time


class Row(NamedTuple):
    """A batch; `expected` are the tokens of its plan, None where the yield was unknown."""

    number: int
    begun: datetime
    state: str
    planned: int | None
    taken: int
    expected: float | None
    tokens: int | None
    seconds: float | None
    generation: str | None


class SeriesData(NamedTuple):
    """Data of the report. `curves` by name: tokens published, and consumed by each trainer."""

    root: str
    curves: dict[str, Points]
    supply_hours: Points
    rows: list[Row]
    last: Decision | None
    faults: list[feedback.Unreadable]


def gather(root: str) -> SeriesData:
    """Read a series: its batches, its log of decisions, its trainers' lines."""
    begun = batches(root)
    records = [from_json(Record, line) for line in decisions(root)]
    reading = feedback.read_summaries(f"{root}/feedback")
    curves = {"published": _published(begun)} if begun else {}
    for trainer in sorted({s.trainer for s in reading.summaries}):
        lines = feedback.read_lines(f"{root}/feedback", trainer).summaries
        times = [datetime.fromisoformat(line.time).timestamp() for line in lines]
        consumed = map(float, feedback.consumed(lines))
        curves[f"consumed by {trainer}"] = list(zip(times, consumed, strict=True))
    if begun:  # up to when anything was last seen
        last_seen = max(at for line in curves.values() for at, _ in line)
        curves["published"].append((last_seen, curves["published"][-1][1]))
    hours = [
        (r.inputs.now, r.decision.supply_hours)
        for r in records
        if r.decision.supply_hours is not None
    ]
    last = records[-1].decision if records else None
    return SeriesData(root, curves, hours, list(_rows(begun, records)), last, reading.faults)


def _published(begun: Sequence[Batch]) -> Points:
    """Tokens published so far, in steps: a batch is published as a whole."""
    points, total = [(min(b.started for b in begun), 0.0)], 0.0
    for finished, tokens in sorted((b.done["finished"], b.done["tokens"]) for b in begun if b.done):
        points += [(finished, total), (finished, total + tokens)]
        total += tokens
    return points


def write_report(root: str) -> str:
    """Write SERIES/report.html and return its path."""
    root = root.rstrip("/")
    data = gather(root)
    charts = {
        "tokens": _chart(data.curves, "tokens"),
        "supply": _chart({"supply": data.supply_hours}, "hours of supply"),
    }
    write_page(f"{root}/report.html", "series.html.j2", d=data, charts=charts)
    return f"{root}/report.html"


def _chart(curves: dict[str, Points], title: str) -> Markup:
    times = [at for points in curves.values() for at, _ in points] or [0.0]
    first, last = (
        f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M:%S} UTC" for t in (min(times), max(times))
    )
    return lines_svg(curves, title, ends=(first, last))


def _rows(begun: Sequence[Batch], records: Sequence[Record]) -> Iterator[Row]:
    """Each batch with the last decision that was made before it."""
    decided = {len(record.inputs.batches) + 1: record.decision for record in records}
    for batch in begun:
        decision, done, taken = decided.get(batch.number), batch.done or {}, len(batch.files)
        tokens_per_input = decision.production.tokens_per_input if decision else None
        yield Row(
            number=batch.number,
            begun=datetime.fromtimestamp(batch.started, UTC),
            state=decision.state if decision else "",
            planned=decision.inputs if decision else None,
            taken=taken,
            expected=None if tokens_per_input is None else tokens_per_input * taken,
            tokens=done.get("tokens"),
            seconds=done["finished"] - batch.started if done else None,
            generation=done.get("generation"),
        )
