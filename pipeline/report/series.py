"""The report of a series: tokens published and consumed, the supply between them, each batch as
planned and as it came.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from pipeline.batches.batch import batches, decisions
from pipeline.controller.decide import Decision, Record, from_json
from pipeline.report.charts import compact
from pipeline.report.report import render_page
from stages.storage.files import write_atomically
from trainer.telemetry import feedback

Points = list[tuple[float, float]]  # (Unix time, value), in order of time
WIDTH, HEIGHT, LEFT, BASELINE, TOP = 700, 200, 60, 176, 12
COLOURS = ("#1f5fd0", "#e0862c", "#2f8f5b", "#8a4fbf", "#b03a48")


class Row(NamedTuple):
    """A batch in the report; `expected` are the tokens that its plan counted on, None where nothing
    was known of the yield.
    """

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
    """What the report shows. Curves are by name: tokens published, and consumed by each trainer."""

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
    """Write SERIES/report.html and return where it lies."""
    uri = f"{root.rstrip('/')}/report.html"
    data = gather(root.rstrip("/"))
    lines = {
        "curves": lines_svg(data.curves, "tokens"),
        "supply": lines_svg({"supply": data.supply_hours}, "hours of supply"),
    }
    write_atomically(
        uri,
        render_page("series.html.j2", d=data, lines=lines, colours=COLOURS).encode(
            "utf-8", "replace"
        ),
    )
    return uri


def _rows(begun: Sequence[Any], records: Sequence[Record]) -> list[Row]:
    """Each batch with the decision before it: the last one made when there were as many batches as
    before it.
    """
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
        sums += [
            (at, total),
            (at, total := total + value),
        ]  # a step: nothing is there before all of it is
    return sums


# --- chart ----------------------------------------------------------------------------------------


def lines_svg(series: dict[str, Points], title: str) -> Markup:
    """Lines over time from 0 on, one colour each; an empty figure when there is no point."""
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup("")
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    high = max(value for _, value in points) or 1.0

    def place(at: float, value: float) -> str:
        x = LEFT + (at - first) / ((last - first) or 1.0) * (WIDTH - LEFT)
        return f"{x:.1f},{BASELINE - value / high * (BASELINE - TOP):.1f}"

    marks = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(
            WIDTH, HEIGHT, title
        )
    ]
    for share in (0.0, 0.5, 1.0):
        y = BASELINE - share * (BASELINE - TOP)
        marks.append(
            Markup('<line class="axis" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH, y, y
            )
        )
        marks.append(_text(LEFT - 6, y + 4, compact(share * high), "end"))
    for (name, line), colour in zip(series.items(), COLOURS * len(series), strict=False):
        path = " ".join(place(at, value) for at, value in line)
        drawn = Markup(
            '<polyline fill="none" stroke="{}" stroke-width="1.8" points="{}"><title>{}</title></polyline>'
        )
        marks.append(drawn.format(colour, path, name))
    ends = ((LEFT, first, "start"), (WIDTH, last, "end"))
    marks += [
        _text(x, HEIGHT - 6, f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC", anchor)
        for x, at, anchor in ends
    ]
    return Markup("").join([*marks, Markup("</svg>")])


def _text(x: float, y: float, label: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, escape(label)
    )
