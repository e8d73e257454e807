"""The loop closed: batches are published while a trainer eats them, tells how fast, and so sizes
the next.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.train, pytest.mark.kill]
pytest.importorskip("torch")

from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.batches.batch import decisions
from pipeline.controller.decide import replay
from pipeline.controller.records import Record, from_json
from pipeline.report import series
from stages.storage.catalog import read_catalog
from tests.support.live_training import LIVE_TRAINING, step_records
from tests.support.paths import ROOT
from tests.support.series import run_one_batch, series_config, write_listing
from trainer.telemetry.feedback import (
    consumed,
    read_lines,
)


def until(condition, process):
    """Wait for it, as long as the trainer lives."""
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """Five batches, published as the trainer asks for them; the folder, and the decisions."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "train.toml").write_text(LIVE_TRAINING.format(folder=folder))
    settings = series_config(
        folder,
        write_listing(folder / "crawl"),
        "schedule.max_inputs=2",
        "schedule.horizon_hours=0.001",
        "schedule.starved_hours=0.0002",
    )
    command = [sys.executable, "-m", "pipeline", "train", str(folder / "train.toml"), "--no-ray"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        published = 0
        while published < 5:
            published += until(lambda: run_one_batch(settings).batch is not None, process)
            until(lambda: step_records(folder), process)  # from the second on it is heard
        rows = sum(entry["rows"] for entry in read_catalog(settings.run.directory))
        until(lambda: len(step_records(folder)) == rows, process)
        (folder / "training" / "stop").touch()
        assert process.wait(600) == 0
    finally:
        process.kill()
    return folder


def test_the_trainer_reads_every_row_once_across_generations_without_a_restart(looped):
    taken = Counter()
    for step in step_records(looped):
        [[[name, epoch, start, stop]]] = step["data"].values()
        taken.update((name, epoch, place) for place in range(start, stop))
    entries = read_catalog(f"{looped}/series")
    assert len(entries) == 5
    assert taken == {
        (entry["name"], 0, place): 1 for entry in entries for place in range(entry["rows"])
    }
    summaries = read_lines(f"{looped}/series/feedback", "training").summaries
    assert {line.incarnation for line in summaries} == {summaries[0].incarnation} and summaries[
        -1
    ].report.restarts == 0
    assert {line.report.state for line in summaries} >= {"running", "waiting", "stopped"}
    assert consumed(summaries)[-1] == sum(entry["tokens"] for entry in entries)


def test_what_the_trainer_told_decided_and_decides_again(looped):
    records = [from_json(Record, line) for line in decisions(f"{looped}/series")]
    assert records[0].decision.state == "BLIND" and {
        record.decision.state for record in records[1:]
    } - {"BLIND"}
    assert any(record.decision.demand_tokens_per_second > 0 for record in records)
    assert replay(decisions(f"{looped}/series")) == []


def test_the_report_of_the_series_shows_supply_and_demand(looped):
    data = series.gather(f"{looped}/series")
    tokens = sum(entry["tokens"] for entry in read_catalog(f"{looped}/series"))
    assert data.curves["published"][-1][1] == data.curves["consumed by training"][-1][1] == tokens
    assert all(row.taken in (1, 2) and row.planned >= row.taken for row in data.rows)
    assert [row.generation for row in data.rows] == [f"gen-000{n}" for n in range(1, 6)]
    page = Path(series.write_report(f"{looped}/series")).read_text()
    assert "consumed by training" in page and page.count("<polyline") >= 2


def test_the_series_is_told_by_the_commands(looped):
    told = {
        command: CliRunner().invoke(app, [command, f"{looped}/series"])
        for command in ("status", "decisions", "replay")
    }
    assert {command: result.exit_code for command, result in told.items()} == dict.fromkeys(told, 0)
    assert (
        "gen-0005" in told["status"].output
        and "tokens consumed by training" in told["status"].output
    )
    assert (
        "BLIND" in told["decisions"].output and ", 0 decided differently" in told["replay"].output
    )
    state = json.loads(CliRunner().invoke(app, ["status", f"{looped}/series", "--json"]).output)
    assert [row["generation"] for row in state["batches"]] == [f"gen-000{n}" for n in range(1, 6)]
