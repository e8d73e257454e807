"""The report of a run: one HTML file that an engineer reads after each run, and while it works."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.report.charts import Column, columns_svg, histogram_svg
from pipeline.report.duplicates import Alarm
from pipeline.report.groups import LOST, MANY
from pipeline.report.run_data import ReportData, gather
from pipeline.report.texts import clean
from pipeline.run.execute import STAGES
from stages.storage.files import write_atomically


def write_report(root: str) -> str:
    """Write RUN/report.html, for a finished run or one under way, and return where it lies."""
    root = root.rstrip("/")
    uri = f"{root}/report.html"
    write_atomically(uri, render(gather(root)).encode("utf-8", "replace"))
    return uri


def render(data: ReportData) -> str:
    """The page. Every crawled string passes through autoescape."""
    return render_page("report.html.j2", d=data, notices=list(notices(data)))


def render_page(template: str, **values: Any) -> str:
    """A page of this package, with the style and the formats that all of them share."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "size": size,
        "duration": duration,
        "bound": bound,
    }
    environment.filters |= {"counted": count, "limited": limited, "clean": clean}
    environment.globals |= {
        "histogram_svg": histogram_svg,
        "columns_svg": columns_svg,
        "Column": Column,
    }
    here = Path(__file__).parent
    style = Markup((here / "page.css").read_text(encoding="utf-8"))
    return environment.from_string((here / template).read_text(encoding="utf-8")).render(
        style=style, **values
    )


def notices(data: ReportData) -> Iterator[tuple[str, str]]:
    """(level, sentence): what an engineer should see before anything else."""
    if data.failures:
        yield (
            "bad",
            f"{count(len(data.failures), 'unit')} failed; see Failures. "
            "The same command tries them again.",
        )
    for phase in data.phases:
        left = phase.units - phase.done - phase.failed
        if phase.done and left:
            yield "note", f"{phase.name}: {left:,} of {count(phase.units, 'unit')} are still to do."
    done = {p.name for p in data.phases if p.done}
    missing = [s for s in STAGES[: STAGES.index(data.last) + 1] if _ENDS.get(s, s) not in done]
    if missing:
        yield "note", f"Not run yet under these keys: {', '.join(missing)}."
    extract = data.phases[0]
    if extract.lost_bytes or extract.lost_members:
        places = count(extract.lost_members, "damaged place")
        yield "bad", f"{size(extract.lost_bytes)} of input could not be read, at {places}."
    hosts = data.groups["host lost"]
    if hosts.groups:
        named = ", ".join(
            f"{clean(g.name) or '(no host)'} ({g.main_rule})" for g in hosts.groups[:3]
        )
        number_lost = len(hosts.groups) + hosts.others
        more = f" and {number_lost - 3:,} more" if number_lost > 3 else ""
        yield (
            "bad",
            f"{count(number_lost, 'host')} lost over {LOST:.0%} of {MANY} or more pages: "
            f"{named}{more}.",
        )
    if data.lost_inputs:
        yield (
            "bad",
            f"{count(data.lost_inputs, 'input file')} lost over {LOST:.0%} of the pages; "
            "see Sources.",
        )
    if data.duplicates.alarm.first:
        yield "bad", _dropped_most(data.duplicates.alarm)
    if data.refined and not data.totals.get("documents"):
        yield "bad", "No document was kept."


_ENDS = {"dedup": "dedup keep"}  # the phase that a stage has not run without


def _dropped_most(alarm: Alarm) -> str:
    listed = sum(alarm.kinds.values())
    kinds = ", ".join(
        count(n, {"input": "input file"}.get(kind, kind)) for kind, n in sorted(alarm.kinds.items())
    )
    named = ", ".join(f"{w.name} ({w.dropped:,} of {w.documents:,})" for w in alarm.first[:3])
    more = f" and {alarm.total - 3:,} more" if alarm.total > 3 else ""
    least = "at least " if alarm.total > listed else ""
    share = number(100 * alarm.share)
    return f"dedup dropped over {share}% of {least}{kinds}: {named}{more}; see Duplicates."


# --- numbers for reading --------------------------------------------------------------------------


def number(value: float | None) -> str:
    """1234567 as '1,234,567', 0.12345 as '0.123', None as '–'."""
    if value is None:
        return "–"
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return {math.inf: "∞", -math.inf: "−∞"}.get(value, f"{value:.4g}")


def percent(share: float) -> str:
    """A share in [0, 1] for reading; never '0 %' or '100 %' for what is not quite that."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{share:.1%}".replace("%", " %")


def size(value: float) -> str:
    """Bytes for reading, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for reading: '0.12 s', '3 min 05 s', '12 h 30 min'."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def bound(limits: tuple[float, float] | None) -> str:
    """A bound as '0.2 to 1', 'at most 5', 'at least 50' or 'off'."""
    if limits is None:
        return "off"
    low, high = limits
    if low == high:
        return f"exactly {number(low)}"
    if math.isinf(low) or math.isinf(high):
        sides = [f"at least {number(low)}"] * math.isfinite(low) + [
            f"at most {number(high)}"
        ] * math.isfinite(high)
        return sides[0] if sides else "any value"
    return f"{number(low)} to {number(high)}"


def count(value: int, noun: str) -> str:
    """'1 unit', '2,000 units'."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def limited(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """The first of some items."""
    return items[:limit]
