"""Charts of all pages as inline SVG: histograms, columns, lines. Colors are in page.css."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

Floats = npt.NDArray[np.float64]
BINS = 48
Point = tuple[float, float]
WIDTH, HEIGHT, BASELINE, TOP = 340, 128, 108, 14
LINES_WIDTH, LINES_HEIGHT, LINES_LEFT, LINES_BASELINE = 700, 200, 56, 176
LINE_COLORS = 5  # classes c0, c1, ... of page.css
_LABEL_PIXELS = 34  # room that a label under an axis needs
_MAX_POINTS = 400  # of a line: with more, each point is the mean of several, over a band


class Histogram(NamedTuple):
    """Counts per bin by series; `bound` as configured (None: no limit), `median` of all values."""

    scale: Literal["linear", "log"]
    edges: Floats
    series: dict[str, list[int]]
    bound: tuple[float, float] | None
    median: float


class Column(NamedTuple):
    """A column of a chart: its label and its counts by series."""

    label: str
    series: dict[str, int]


def binned(
    values: Mapping[str, Floats], bound: tuple[float, float] | None = None
) -> Histogram | None:
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
    low, high, median = (
        float(everything.min()),
        float(everything.max()),
        float(np.median(everything)),
    )
    scale: Literal["linear", "log"] = (
        "log" if low >= 0 and high > 30 and high > 12 * median else "linear"
    )
    low, high = _with_bound(low, high, bound, scale)
    if scale == "log":
        edges = np.expm1(np.linspace(math.log1p(low), math.log1p(high), BINS + 1))
        edges[0], edges[-1] = low, high  # rounding must not push the extremes out
    elif _few_integers(everything, low, high):
        edges = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high, BINS + 1)
    return Histogram(
        scale,
        edges,
        {n: np.histogram(v, edges)[0].tolist() for n, v in finite.items()},
        bound,
        median,
    )


def _few_integers(values: Floats, low: float, high: float) -> bool:
    # low and high may be those of the bound: that of a ratio is no integer, or 1
    whole = (
        low.is_integer() and high.is_integer() and bool(np.array_equal(values, np.round(values)))
    )
    return whole and 1 < high - low <= BINS


def _with_bound(
    low: float, high: float, bound: tuple[float, float] | None, scale: str
) -> tuple[float, float]:
    span = (high - low) or 1.0
    for limit in bound or ():
        far = 0.0 if scale == "log" and limit >= 0 else max(low - limit, limit - high) / span
        if math.isfinite(limit) and (far <= 2 or low == high):
            low, high = min(low, limit), max(high, limit)
    return (low, high) if low < high else (low, low + 1.0)


def histogram_svg(histogram: Histogram, title: str) -> Markup:
    """Stacked bars, the area outside the bound tinted, the limits as lines."""
    total = np.sum(list(histogram.series.values()), axis=0)
    at, peak = _axis(histogram), _cut(total)
    marks = [_bar(histogram, i, at, peak) for i in range(len(total)) if total[i]]
    ends = _peak(int(total.max()), cut=int(total.max()) > peak)
    return _figure(
        title,
        [*_outside(histogram, at), *marks, *_limits(histogram, at), *_ticks(histogram, at), ends],
    )


def columns_svg(columns: Sequence[Column], title: str) -> Markup:
    """Stacked columns with a label each; labels are thinned out where they would touch."""
    peak = max([1, *(sum(c.series.values()) for c in columns)])
    step = WIDTH / max(1, len(columns))
    widest = max([1, *(len(c.label) for c in columns)])
    every = math.ceil((widest * 6 + 8) / step)
    marks = []
    for i, column in enumerate(columns):
        # at most 40 wide, however few columns there are
        width = min(40.0, step * 0.8)
        counts = ", ".join(f"{name} {count:,}" for name, count in column.series.items())
        stack = _stack(i * step + (step - width) / 2, width, column.series, peak)
        marks.append(Markup("<g><title>{}: {}</title>{}</g>").format(column.label, counts, stack))
        if i % every == 0:
            marks.append(_text((i + 0.5) * step, HEIGHT - 6, column.label, "middle"))
    return _figure(title, [*marks, _peak(peak)])


def lines_svg(
    lines: Mapping[str, Sequence[Point]],
    title: str,
    *,
    ends: tuple[str, str],
    from_zero: bool = True,
    label: Callable[[float], str] | None = None,
) -> Markup:
    """Lines by name over one x axis, whose ends are labeled; empty when there is no point.

    The lines have the classes c0, c1, ... `from_zero`: the y axis begins at 0.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = ticks_between(0.0 if from_zero else min(ys), max(ys))
    corners = (min(xs), max(xs) if len(set(xs)) > 1 else min(xs) + 1, ticks[0], ticks[-1])
    marks = [_y_tick(tick, _place((corners[0], tick), corners)[1], label) for tick in ticks]
    for i, (name, line) in reversed(list(enumerate(lines.items()))):  # the first lies on top
        marks.append(_line(name, line, corners, i % LINE_COLORS))
    places = ((LINES_LEFT, "start"), (LINES_WIDTH, "end"))
    for (x, anchor), text in zip(places, ends, strict=True):
        marks.append(_text(x, LINES_HEIGHT - 6, text, anchor))
    return _svg(LINES_WIDTH, LINES_HEIGHT, title, marks)


def ticks_between(low: float, high: float) -> list[float]:
    """Three to eight round numbers that take in [low, high]: multiples of 1, 2 or 5 times a power
    of ten.
    """
    # or the labels of a line that hardly moves would all read alike
    span = max(high - low, 0.05 * abs(low))
    span = span if span > 1e-30 else 1.0
    step = _round_step(span)
    return [i * step for i in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]


def compact(value: float) -> str:
    """A number short enough for an axis: 1,500 as '1.5k'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


# --- parts of a chart -----------------------------------------------------------------------------


def _figure(title: str, marks: Sequence[Markup]) -> Markup:
    return _svg(WIDTH, HEIGHT, title, [*marks, _axis_line(0, WIDTH, BASELINE)])


def _svg(width: float, height: float, title: str, marks: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>')
    return head.format(width, height, title) + Markup("").join(marks) + Markup("</svg>")


def _axis_line(left: float, right: float, y: float) -> Markup:
    line = Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>')
    return line.format(left, right, y)


def _cut(total: npt.NDArray[Any]) -> int:
    """The count at full height. A bar far above all others is cut; most scores have one, at 0."""
    second, first = np.sort(np.append(total, [0, 0]))[-2:].tolist()
    return int(max(1, first if first <= 4 * second or not second else 2 * second))


def _axis(histogram: Histogram) -> Any:
    place = np.log1p if histogram.scale == "log" else np.asarray
    low, high = float(place(histogram.edges[0])), float(place(histogram.edges[-1]))
    return lambda value: float((place(value) - low) / (high - low) * WIDTH)


def _bar(histogram: Histogram, i: int, at: Any, peak: int) -> Markup:
    left, right = histogram.edges[i], histogram.edges[i + 1]
    counts = {name: counts[i] for name, counts in histogram.series.items()}
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    width = max(1.0, at(right) - at(left) - 0.8)
    label = f"{left:.4g} to {right:.4g}: {shown}"
    return Markup("<g><title>{}</title>{}</g>").format(label, _stack(at(left), width, counts, peak))


def _stack(x: float, width: float, counts: Mapping[str, int], peak: int) -> Markup:
    bottom, rects, whole = float(BASELINE), [], sum(counts.values())
    for name, count in counts.items():
        if count:
            # a cut bar keeps its proportions; a single document in a tall chart must be seen
            height = max(1.5, count / max(peak, whole) * (BASELINE - TOP))
            bottom -= height
            rect = Markup(
                '<rect class="s-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            )
            rects.append(rect.format(name.replace(" ", "-"), x, bottom, width, height))
    if whole > peak:
        zigzag = Markup('<path class="cut" d="M{:.1f} {} l{:.1f} -4"/>')
        rects.append(zigzag.format(x - 1, TOP + 9, width + 2))
    return Markup("").join(rects)


def _limits_in_range(histogram: Histogram) -> Iterator[tuple[str, float]]:
    first, last = histogram.edges[0], histogram.edges[-1]
    for side, limit in zip(("low", "high"), histogram.bound or (), strict=False):
        # a low limit at the left edge (of a ratio: 0) has nothing outside it
        inside = first < limit <= last if side == "low" else first <= limit <= last
        if math.isfinite(limit) and inside:
            yield side, limit


def _outside(histogram: Histogram, at: Any) -> Iterator[Markup]:
    rect = Markup('<rect class="outside" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>')
    for side, limit in _limits_in_range(histogram):
        x, width = (0.0, at(limit)) if side == "low" else (at(limit), WIDTH - at(limit))
        yield rect.format(x, TOP, width, BASELINE - TOP)


def _limits(histogram: Histogram, at: Any) -> Iterator[Markup]:
    for _, limit in _limits_in_range(histogram):
        line = Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
        yield line.format(min(max(at(limit), 0.75), WIDTH - 0.75), TOP - 4, BASELINE)


def _ticks(histogram: Histogram, at: Any) -> Iterator[Markup]:
    taken = -math.inf
    for value in _tick_values(
        float(histogram.edges[0]), float(histogram.edges[-1]), histogram.scale
    ):
        x = at(value)
        if x - taken >= _LABEL_PIXELS:
            anchor = "start" if x < 12 else "end" if x > WIDTH - 12 else "middle"
            yield _text(x, HEIGHT - 6, compact(value), anchor)
            taken = x


def _tick_values(low: float, high: float, scale: str) -> list[float]:
    if scale == "log":
        powers = [0.0, *(10.0**n for n in range(0, 16))]
        inside = [p for p in powers if low <= p <= high]
        return inside if len(inside) > 1 else [low, high]
    step = _round_step(high - low)
    return [
        n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _round_step(span: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides a span into at most five steps."""
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= span / 5 * 0.999)


def _place(point: Point, corners: tuple[float, float, float, float]) -> Point:
    """Where a point lies in a chart of lines whose range is (left, right, low, high)."""
    left, right, low, high = corners
    x = LINES_LEFT + (point[0] - left) / (right - left) * (LINES_WIDTH - LINES_LEFT)
    return x, LINES_BASELINE - (point[1] - low) / (high - low) * (LINES_BASELINE - TOP)


def _y_tick(value: float, y: float, label: Callable[[float], str] | None) -> Markup:
    text = _text(LINES_LEFT - 6, round(y + 4, 1), (label or compact)(value), "end")
    return _axis_line(LINES_LEFT, LINES_WIDTH, round(y, 1)) + text


def _line(
    name: str, line: Sequence[Point], corners: tuple[float, float, float, float], color: int
) -> Markup:
    """A line; where points are bundled, of their means, over a band of their extremes."""
    size = math.ceil(len(line) / _MAX_POINTS) or 1
    bundles = [line[i : i + size] for i in range(0, len(line), size)]

    def path(value: Callable[[list[float]], float], bundled: Sequence[Sequence[Point]]) -> str:
        points = [(_mean([x for x, _ in b]), value([y for _, y in b])) for b in bundled]
        return " ".join("{:.1f},{:.1f}".format(*_place(point, corners)) for point in points)

    middle, shape = path(_mean, bundles), Markup("")
    if size > 1:
        band = Markup('<polygon class="band c{}" points="{} {}"/>')
        shape = band.format(color, path(max, bundles), path(min, bundles[::-1]))
    if len(bundles) == 1:
        x, _, y = middle.partition(",")
        shape += Markup('<circle class="dot c{}" cx="{}" cy="{}" r="2.5"/>').format(color, x, y)
    drawn = Markup('<polyline class="line c{}" points="{}"><title>{}</title></polyline>')
    return shape + drawn.format(color, middle, name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _peak(peak: int, *, cut: bool = False) -> Markup:
    return _text(WIDTH, 9, f"highest {peak:,}, cut off" if cut else f"{peak:,}", "end")


def _text(x: float, y: float, label: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
        x, y, anchor, escape(label)
    )
