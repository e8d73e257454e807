"""The course of a run as one picture: loss, tokens a second, data wait, from the lines that
telemetry wrote.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.telemetry.sinks import METRICS

WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 170, 70, 46, 66
_BUCKETS = (
    400  # a picture has no room for more steps than that; each bucket shows its mean and its range
)


class Panel(NamedTuple):
    """A diagram: its title, what it reads (a second series is orange), whether it starts at 0, how
    ticks are written.
    """

    title: str
    keys: tuple[str, ...]
    from_zero: bool
    shape: str


PANELS = (
    Panel("Loss, nats a token (orange: held out)", ("loss", "held_out/loss"), False, "{:.3g}"),
    Panel(
        "Tokens per second (orange: without stalls)",
        ("tokens_per_second", "tokens_per_second_without_stalls"),
        True,
        "{:,.5g}",
    ),
    Panel("Data wait, share of step time", ("data_wait",), True, "{:.3g} %"),
)


def plot(folder: str | Path, output: str | Path) -> None:
    """Draw FOLDER/metrics.jsonl to a .svg or .html file; ValueError for another kind, or when no
    step was written.
    """
    if Path(output).suffix not in (".svg", ".html"):
        raise ValueError(f"a plot is an .svg or .html file, got {output}")
    records = read_metrics(Path(folder) / METRICS)
    if not records:
        raise ValueError(
            f"{Path(folder) / METRICS} holds no step; was telemetry told to write 'jsonl'?"
        )
    svg = draw(records)
    Path(output).write_text(svg if Path(output).suffix == ".svg" else _page(svg))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records by step, the last of each (replayed steps come twice); half lines are left out.

    None where there is no file.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            steps[record["step"]] = record
    return [steps[step] for step in sorted(steps)]


def draw(records: Sequence[dict[str, Any]]) -> str:
    """The panels under each other as one SVG, over the same steps."""
    first, last = records[0]["step"], records[-1]["step"]
    height = TOP + len(PANELS) * (HEIGHT + GAP)
    parts = [
        _panel(panel, records, TOP + i * (HEIGHT + GAP), (first, max(last, first + 1)))
        for i, panel in enumerate(PANELS)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + LEFT + 30} {height}" font-family="system-ui, sans-serif">'
    return head + '<rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>"


def _panel(
    panel: Panel, records: Sequence[dict[str, Any]], top: float, steps: tuple[int, int]
) -> str:
    series = [
        [(r["step"], v) for r in records if (v := _value(r, key)) is not None] for key in panel.keys
    ]
    title = f'<text x="{LEFT}" y="{top - 12}" font-size="15" font-weight="600" fill="#222">{panel.title}</text>'
    values = [value for points in series for _, value in points]
    if not values:
        return (
            title
            + f'<text x="{LEFT}" y="{top + 30}" font-size="13" fill="#666">nothing was recorded</text>'
        )
    low, high = (0.0 if panel.from_zero else min(values)), max(values)
    ticks = ticks_between(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def at(step: float, value: float) -> str:
        x = LEFT + (step - steps[0]) / (steps[1] - steps[0]) * WIDTH
        return f"{x:.1f},{top + HEIGHT - (value - low) / (high - low) * HEIGHT:.1f}"

    grid = [_tick(tick, at(steps[0], tick), panel.shape) for tick in ticks]
    lines = [
        _curve(points, at, steps, second=i > 0)
        for i, points in reversed(list(enumerate(series)))
        if points
    ]
    return title + "".join(grid) + "".join(lines) + _step_axis(steps, top + HEIGHT)


def _value(record: dict[str, Any], key: str) -> float | None:
    if key == "data_wait":
        seconds = record.get("seconds") or {}
        wait, compute = seconds.get("data_wait") or 0.0, seconds.get("compute") or 0.0
        return 100 * (wait / (wait + compute)) if wait + compute else None
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else None


def _curve(
    points: Sequence[tuple[int, float]], at: Any, steps: tuple[int, int], *, second: bool
) -> str:
    """Means of buckets as a line over a band of their extremes."""
    buckets: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        buckets.setdefault((step - steps[0]) * _BUCKETS // (steps[1] - steps[0] + 1), []).append(
            (step, value)
        )
    middle = [(sum(s for s, _ in b) / len(b), [v for _, v in b]) for b in buckets.values()]
    band = [at(s, max(vs)) for s, vs in middle] + [at(s, min(vs)) for s, vs in reversed(middle)]
    line = " ".join(at(s, sum(vs) / len(vs)) for s, vs in middle)
    colour = "#e0862c" if second else "#1f5fd0"
    dot = (
        f'<circle cx="{line.split(",")[0]}" cy="{line.split(",")[1]}" r="2.5" fill="{colour}"/>'
        if len(middle) == 1
        else ""
    )
    return (
        f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity=".18"/>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>{dot}'
    )


def ticks_between(low: float, high: float) -> list[float]:
    """Four to ten round numbers, in steps of 1, 2 or 5 times a power of ten, that take in [low,
    high].
    """
    span = max(
        high - low, 0.05 * abs(low)
    )  # or the labels of a curve that hardly moves would all read alike
    span = span if span > 1e-30 else 1.0
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = power * max(m for m in (1, 2, 5) if m == 1 or power * m <= span / 3)
    return [i * step for i in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]


def _tick(value: float, at: str, shape: str) -> str:
    y = float(at.split(",")[1])
    return (
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#e3e3e3"/>'
        f'<text x="{LEFT - 8}" y="{y + 4}" font-size="12" fill="#555" text-anchor="end">{shape.format(value)}</text>'
    )


def _step_axis(steps: tuple[int, int], y: float) -> str:
    ends = ((LEFT, "start", f"step {steps[0]:,}"), (LEFT + WIDTH, "end", f"step {steps[1]:,}"))
    return "".join(
        f'<text x="{x}" y="{y + 17}" font-size="12" fill="#555" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in ends
    )


def _page(svg: str) -> str:
    return f'<!doctype html><meta charset="utf-8"><title>Training run</title><body style="max-width:60rem;margin:2rem auto">{svg}'
