"""The report of a series: tokens published and consumed, hours of supply, its batches."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.batches.batch import batches, decisions
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
    published = [(b.done["finished"], float(b.done["tokens"])) for b in begun if b.done]
    start = min([b.started for b in begun], default=0.0)
    curves = {"published": [(start, 0.0), *_sums(published)]} if begun else {}
    reading = feedback.read_summaries(f"{root}/feedback")
    for trainer in sorted({s.trainer for s in reading.summaries}):
        lines = feedback.read_lines(f"{root}/feedback", trainer).summaries
        times = [datetime.fromisoformat(line.time).timestamp() for line in lines]
        curves[f"consumed by {trainer}"] = list(
            zip(times, map(float, feedback.consumed(lines)), strict=True)
        )
    last_seen = max((at for line in curves.values() for at, _ in line), default=0.0)
    if begun:
        curves["published"].append((last_seen, curves["published"][-1][1]))
    hours = [
        (r.inputs.now, r.decision.supply_hours)
        for r in records
        if r.decision.supply_hours is not None
    ]
    last = records[-1].decision if records else None
    return SeriesData(root, curves, hours, _rows(begun, records), last, reading.faults)


def write_report(root: str) -> str:
    """Write SERIES/report.html and return its path."""
    uri = f"{root.rstrip('/')}/report.html"
    data = gather(root.rstrip("/"))
    charts = {
        "tokens": _chart(data.curves, "tokens"),
        "supply": _chart({"supply": data.supply_hours}, "hours of supply"),
    }
    write_page(uri, "series.html.j2", d=data, charts=charts)
    return uri


def _chart(curves: dict[str, Points], title: str) -> Markup:
    times = [at for points in curves.values() for at, _ in points] or [0.0]
    first, last = (
        f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M:%S} UTC" for t in (min(times), max(times))
    )
    return lines_svg(curves, title, ends=(first, last))


def _rows(begun: Sequence[Any], records: Sequence[Record]) -> list[Row]:
    """Each batch with the last decision that was made before it."""
    decided = {len(record.inputs.batches) + 1: record.decision for record in records}
    rows = []
    for batch in begun:
        decision, done = decided.get(batch.number), batch.done or {}
        yielded = decision.production.tokens_per_input if decision else None
        rows.append(
            Row(
                number=batch.number,
                begun=datetime.fromtimestamp(batch.started, UTC),
                state=decision.state if decision else "",
                planned=decision.inputs if decision else None,
                taken=len(batch.inputs),
                expected=None if yielded is None else yielded * len(batch.inputs),
                tokens=done.get("tokens"),
                seconds=done["finished"] - batch.started if done else None,
                generation=done.get("generation"),
            )
        )
    return rows


def _sums(points: Sequence[tuple[float, float]]) -> Points:
    total, sums = 0.0, []
    for at, value in sorted(points):
        # a step: a batch is published as a whole
        sums += [
            (at, total),
            (at, total := total + value),
        ]
    return sums
