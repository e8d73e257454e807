"""The page of a training, and charts of lines."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.charts import lines_svg, ticks_between
from pipeline.report.training import charts, write_training_page
from trainer.telemetry.sinks import Telemetry

LINES = re.compile(r'<polyline class="line (c\d)" points="([^"]*)"><title>([^<]*)</title>')


def heights(svg: str) -> dict[str, list[float]]:
    """The y coordinates of each line by its name."""
    return {
        name: [float(point.split(",")[1]) for point in points.split()]
        for _, points, name in LINES.findall(svg)
    }


@given(st.floats(-1e90, 1e90), st.floats(0, 1e90))
def test_ticks_are_few_and_take_in_the_range(low, span):
    high = low + span
    ticks = ticks_between(low, high)
    assert 3 <= len(ticks) <= 8
    rounding = 1e-9 * (abs(low) + span)
    assert ticks[0] <= low + rounding and ticks[-1] >= high - rounding
    assert all(a < b for a, b in itertools.pairwise(ticks))


VALUES = st.none() | st.floats() | st.text(max_size=2)


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=20))
def test_any_record_can_be_drawn(values):
    records = [
        {
            "step": i,
            "loss": loss,
            "tokens_per_second": rate,
            "seconds": {
                "data_wait": abs(wait) if isinstance(wait, float) and math.isfinite(wait) else 0.0
            },
        }
        for i, (loss, rate, wait) in enumerate(values)
    ]
    assert not any("nan" in chart.svg for chart in charts(records))


def test_the_curve_goes_through_the_data():
    records = [
        {"step": i, "loss": 10.0 - i, "held_out/loss": 5.0, "tokens_per_second": 5.0}
        for i in range(1, 10)
    ]
    loss, rate, wait = charts(records)
    lines = heights(loss.svg)
    assert list(lines) == ["held out", "training"] and loss.names == ["training", "held out"]
    falling = lines["training"]
    assert len(falling) == 9 and falling == sorted(falling)  # a falling loss goes down the page
    steps = [b - a for a, b in itertools.pairwise(falling)]
    assert max(steps) - min(steps) < 0.2  # evenly, as the data do
    assert (rate.names, wait.names, wait.svg) == (["all time"], [], "")


def test_many_points_are_means_over_a_band_of_their_extremes():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    svg = lines_svg({"a": points}, "noise", ends=("0", "999"))
    drawn = heights(svg)["a"]
    assert len(drawn) == 334 and 'class="band c0"' in svg
    # means of three; the band spans the whole height
    assert max(drawn[:-1]) - min(drawn[:-1]) < 60
    assert 'class="band' not in lines_svg({"a": points[:400]}, "few", ends=("0", "399"))


def test_one_point_is_a_dot_and_no_point_is_no_chart():
    assert 'class="dot c0"' in lines_svg({"a": [(3.0, 0.0)]}, "one", ends=("3", "3"))
    assert lines_svg({"a": []}, "none", ends=("", "")) == ""


def test_a_page_is_written_beside_the_records(tmp_path):
    telemetry = Telemetry(tmp_path, run="r", sinks=("jsonl",))
    for step in range(1000):
        seconds = {"data_wait": 0.1, "compute": 0.9}
        record = {"step": step, "loss": 3.0, "tokens_per_second": 9.0, "seconds": seconds}
        telemetry.step(record)
    telemetry.close()
    page = write_training_page(tmp_path / "metrics.jsonl")
    assert page == tmp_path / "training.html" and page.stat().st_size < 100_000
    text = page.read_text()
    assert "10 %" in text and "step 999" in text and text.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!#|data:,")', text)


@pytest.mark.parametrize("content", [None, b'{"st'])
def test_records_without_a_step_make_no_page(tmp_path, content):
    if content:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert write_training_page(tmp_path / "metrics.jsonl") is None
    assert not (tmp_path / "training.html").exists()
