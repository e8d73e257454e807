"""Charts of all pages as inline SVG: histograms, columns, lines.

Here values become positions, as fractions of the axes; charts.svg.j2 draws them. Colors are in
page.css.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from filters import Bound

Floats = npt.NDArray[np.float64]
Scale = Literal["linear", "log"]
BINS = 48
Point = tuple[float, float]
LINE_COLORS = 5  # classes c0, c1, ... of page.css
_MAX_POINTS = 400  # of a line: with more, each point is the mean of several, over a band


class Histogram(NamedTuple):
    """Counts per bin by series; `bound` as configured (None: no limit), `median` of all values."""

    scale: Scale
    edges: Floats
    series: dict[str, list[int]]
    bound: Bound
    median: float


class Line(NamedTuple):
    """A line of points, or of the means of `bundled` points between their lowest and highest."""

    name: str
    bundled: bool
    x: Floats
    mean: Floats
    lowest: Floats
    highest: Floats


def binned(values: Mapping[str, Floats], bound: Bound = None) -> Histogram | None:
    """Bin series over the same edges; None without a finite value. Infinities and NaN are left out.

    The bins are logarithmic (of 1 + value) where a few values are far above the rest. Else they
    are equal, and one per integer if the values are few integers. The range includes the bound
    unless that would squeeze the data.
    """
    # clipped, so that no difference of two values overflows
    finite = {name: v[np.isfinite(v)].clip(-1e300, 1e300) for name, v in values.items()}
    everything = np.concatenate([np.empty(0), *finite.values()])
    if not len(everything):
        return None
    low, high, median = (float(f(everything)) for f in (np.min, np.max, np.median))
    scale: Scale = "log" if low >= 0 and high > max(30, 12 * median) else "linear"
    low, high = _with_bound(low, high, bound, scale)
    if scale == "log":
        edges = np.expm1(np.linspace(math.log1p(low), math.log1p(high), BINS + 1))
        edges[0], edges[-1] = low, high  # rounding must not push the extremes out
    elif _few_integers(everything, low, high):
        edges = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high, BINS + 1)
    series = {name: np.histogram(v, edges)[0].tolist() for name, v in finite.items()}
    return Histogram(scale, edges, series, bound, median)


def _few_integers(values: Floats, low: float, high: float) -> bool:
    # low and high may be those of the bound: that of a ratio is no integer, or 1
    whole = low.is_integer() and high.is_integer() and np.array_equal(values, np.round(values))
    return whole and 1 < high - low <= BINS


def _with_bound(low: float, high: float, bound: Bound, scale: Scale) -> tuple[float, float]:
    span = (high - low) or 1.0
    for limit in bound or ():
        far = 0.0 if scale == "log" and limit >= 0 else max(low - limit, limit - high) / span
        if math.isfinite(limit) and (far <= 2 or low == high):
            low, high = min(low, limit), max(high, limit)
    return (low, high) if low < high else (low, low + 1.0)


def histogram_svg(histogram: Histogram, title: str) -> Markup:
    """Stacked bars, the area outside the bound tinted, the limits as lines."""
    scaled = np.log1p if histogram.scale == "log" else np.asarray
    first, last = map(float, histogram.edges[[0, -1]])

    def position(value: float) -> float:
        return float((scaled(value) - scaled(first)) / (scaled(last) - scaled(first)))

    bins = zip(pairwise(histogram.edges), zip(*histogram.series.values(), strict=True), strict=True)
    bars = [
        (
            f"{left:.4g} to {right:.4g}",
            position(left),
            position(right),
            {name: n for name, n in zip(histogram.series, counts, strict=True) if n},
        )
        for (left, right), counts in bins
        if any(counts)
    ]
    low, high = histogram.bound or (math.nan, math.nan)
    limits = {
        # at the left edge (of a ratio: 0) it has nothing outside it
        "low": position(low) if first < low <= last else None,
        "high": position(high) if first <= high <= last else None,
    }
    ticks = [(tick, position(tick)) for tick in _ticks_inside(first, last, histogram.scale)]
    second, highest = sorted([0, 0, *np.sum(list(histogram.series.values()), axis=0).tolist()])[-2:]
    # a bar far above all others is cut; most scores have one, at 0
    peak = max(1, highest if highest <= 4 * second or not second else 2 * second)
    return Markup(_macros().histogram(title, bars, limits, ticks, peak, highest))


def columns_svg(columns: Mapping[str, Mapping[str, int]], title: str) -> Markup:
    """Stacked columns of counts by label; labels are thinned out where they would touch."""
    peak = max([1, *(sum(counts.values()) for counts in columns.values())])
    return Markup(_macros().columns(title, columns, peak))


def compact(value: float) -> str:
    """A number short enough for an axis: 1,500 as '1.5k'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def lines_svg(
    lines: Mapping[str, Sequence[Point]],
    title: str,
    *,
    ends: tuple[str, str],
    from_zero: bool = True,
    label: Callable[[float], str] = compact,
) -> Markup:
    """Lines by name over one x axis, whose ends are labeled; empty when there is no point.

    The lines have the classes c0, c1, ... `from_zero`: the y axis begins at 0.
    """
    points = np.array([point for line in lines.values() for point in line])
    if not len(points):
        return Markup("")
    (left, low), (right, high) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    ticks = ticks_between(0.0 if from_zero else low, high)
    origin = np.array([left, ticks[0]])
    size = np.array([right - left or 1.0, ticks[-1] - ticks[0]])
    drawn = [
        _line(name, (np.reshape(line, (-1, 2)) - origin) / size) for name, line in lines.items()
    ]
    return Markup(_macros().lines(title, drawn, list(map(label, ticks)), ends))


def _line(name: str, points: Floats) -> Line:
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    starts, y = np.arange(0, len(points), size), points[:, 1]
    counts = np.diff(starts, append=len(points))
    x, mean = (np.add.reduceat(values, starts) / counts for values in points.T)
    lowest, highest = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    return Line(name, size > 1, x, mean, lowest, highest)


def ticks_between(low: float, high: float) -> list[float]:
    """Three to eight round numbers that take in [low, high]: multiples of 1, 2 or 5 times a power
    of ten.
    """
    # or the labels of a line that hardly moves would all read alike
    span = max(high - low, 0.05 * abs(low))
    span = span if span > 1e-30 else 1.0
    step = _round_step(span)
    return [i * step for i in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]


def _ticks_inside(low: float, high: float, scale: Scale) -> list[float]:
    if scale == "log":
        inside = [p for p in (0.0, *(10.0**n for n in range(16))) if low <= p <= high]
        return inside if len(inside) > 1 else [low, high]
    step = _round_step(high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _round_step(span: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides a span into at most five steps."""
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= span / 5 * 0.999)


# --- templates ------------------------------------------------------------------------------------


def environment() -> Environment:
    """The templates of this folder; every crawled string is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


@cache
def _macros() -> Any:
    templates = environment()
    templates.filters |= {"compact": compact, "tenths": "{:.1f}".format, "pairs": _pairs}
    templates.globals["LINE_COLORS"] = LINE_COLORS
    return templates.get_template("charts.svg.j2").module


def _pairs(points: tuple[Floats, Floats]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(*points, strict=True))
