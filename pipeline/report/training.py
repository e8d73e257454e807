"""The page of a training: loss, tokens per second and data wait by step, from its telemetry."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report.charts import Point, compact, lines_svg
from pipeline.report.page import write_page
from trainer.telemetry.records import read_metrics

Record = dict[str, Any]


class Panel(NamedTuple):
    """A chart of the page: its lines, from records by key and named for the legend."""

    title: str
    keys: dict[str, str]
    from_zero: bool = True
    label: Callable[[float], str] = compact


class Chart(NamedTuple):
    """A panel as drawn: `svg` is empty when nothing was recorded. `names` are the lines' names."""

    title: str
    svg: Markup
    names: list[str]


PANELS = (
    Panel(
        "Loss, nats per token",
        {"loss": "training", "held_out/loss": "held out"},
        from_zero=False,
        label="{:.4g}".format,
    ),
    Panel(
        "Tokens per second",
        {"tokens_per_second": "all time", "tokens_per_second_without_stalls": "without stalls"},
    ),
    Panel(
        "Data wait, share of step time",
        {"data_wait": "data wait"},
        label="{:.3g} %".format,
    ),
)


def write_training_page(metrics: Path) -> Path | None:
    """Write training.html beside the records of a training's steps; None if they hold no step."""
    records = read_metrics(metrics)
    if not records:
        return None
    folder, path = metrics.parent, metrics.with_name("training.html")
    write_page(str(path), "training.html.j2", root=folder, charts=charts(records), last=records[-1])
    return path


def charts(records: Sequence[Record]) -> list[Chart]:
    """The panels, all over the same steps."""
    ends = (f"step {records[0]['step']:,}", f"step {records[-1]['step']:,}")
    drawn = []
    for panel in PANELS:
        lines = {name: _points(records, key) for key, name in panel.keys.items()}
        lines = {name: points for name, points in lines.items() if points}
        svg = lines_svg(lines, panel.title, ends=ends, from_zero=panel.from_zero, label=panel.label)
        drawn.append(Chart(panel.title, svg, list(lines)))
    return drawn


def _points(records: Sequence[Record], key: str) -> list[Point]:
    values = ((r["step"], _value(r, key)) for r in records)
    return [(step, value) for step, value in values if value is not None]


def _value(record: Record, key: str) -> float | None:
    """A finite number of a record, None if there is none; data wait in percent of the step."""
    if key == "data_wait":
        seconds = record.get("seconds") or {}
        wait, compute = seconds.get("data_wait") or 0.0, seconds.get("compute") or 0.0
        return 100 * (wait / (wait + compute)) if wait + compute else None
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else None
