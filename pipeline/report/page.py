"""Pages of this package: templates with one style, and numbers formatted for reading."""

import math
from datetime import UTC, datetime
from typing import Any

from filters import Bound
from pipeline.report.charts import LINE_COLORS, columns_svg, environment, histogram_svg
from stages.storage.files import write_atomically


def write_page(uri: str, template: str, **values: Any) -> None:
    """Write a page from a template of this folder; every crawled string is escaped."""
    templates = environment()
    for format in (number, percent, size, duration, moment, bound, counted, clean):
        templates.filters[format.__name__] = format
    for chart in (histogram_svg, columns_svg):
        templates.globals[chart.__name__] = chart
    templates.globals["LINE_COLORS"] = LINE_COLORS
    page = templates.get_template(template).render(**values)
    write_atomically(uri, page.encode("utf-8", "replace"))


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


def moment(seconds: float) -> str:
    """Unix time for reading, to the minute."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M UTC}"


def bound(limits: Bound) -> str:
    """A bound as '0.2 to 1', 'at most 5', 'at least 50' or 'off'."""
    if limits is None:
        return "off"
    low, high = limits
    if low == high:
        return f"exactly {number(low)}"
    if math.isinf(low):
        return "any value" if math.isinf(high) else f"at most {number(high)}"
    return f"at least {number(low)}" if math.isinf(high) else f"{number(low)} to {number(high)}"


def counted(value: int, noun: str) -> str:
    """'1 unit', '2,000 units'."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


# control characters have no place in HTML; bidirectional overrides would turn the page around the
# text
_CONTROLS = [*range(9), 11, 12, *range(14, 32), *range(127, 160)]
_UNWANTED = dict.fromkeys([*_CONTROLS, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def clean(text: str) -> str:
    """A crawled string without characters that would break the page.

    Escaping is the template's business.
    """
    return text.translate(_UNWANTED).encode("utf-8", "replace").decode()
