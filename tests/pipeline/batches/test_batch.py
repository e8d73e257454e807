"""Batches of a series: sized, taken once, deduplicated against those before, finished after any
crash.
"""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.batches import batch as batching
from pipeline.batches.batch import batches, decisions
from pipeline.controller.decide import replay
from pipeline.controller.records import Record, from_json
from pipeline.engine.lease import Held, lease
from pipeline.inspect.verify import verify_path
from pipeline.run import execute, publish
from pipeline.run.execute import RunFailed
from tests.support.paths import ROOT
from tests.support.quickstart import bytes_of
from tests.support.series import published_urls, run_one_batch, series_config, write_listing

CONTROLLER = Path(__file__).parents[1] / "controller"


@pytest.fixture
def listing(tmp_path):
    return write_listing(tmp_path / "crawl")


def test_a_listing_is_eaten_batch_by_batch_and_every_document_is_published_once(tmp_path, listing):
    settings = series_config(tmp_path, listing)
    done = [run_one_batch(settings) for _ in range(4)]
    assert [d.batch and [Path(p).name for p in d.batch.files] for d in done] == [
        ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"],
        ["4.jsonl", "5.jsonl", "6.jsonl", "7.jsonl"],
        ["8.jsonl", "9.jsonl"],
        None,
    ]
    assert [d.batch.done["generation"] for d in done[:3]] == ["gen-0001", "gen-0002", "gen-0003"]
    published = published_urls(tmp_path)
    # 40 documents; the copies in files 4 and 8 are found by the index of the batch before
    assert [len(found) for found in published] == [16, 16, 8]
    assert len({url.rsplit("/", 1)[1] for found in published for url in found}) == 40
    assert verify_path(f"{tmp_path}/series")[0].faults == []
    ordinals = [
        json.loads(line)["ordinal"]
        for line in (tmp_path / "series" / "inputs.jsonl").read_text().splitlines()
    ]
    assert ordinals == list(range(10))


def test_ids_never_meet_those_of_another_batch(tmp_path, listing):
    settings = series_config(tmp_path, listing)
    for _ in range(3):
        run_one_batch(settings)
    ids = [
        set(pq.read_table(p)["doc_id"].to_pylist())
        for p in sorted((tmp_path / "series" / "generations").glob("*/provenance.parquet"))
    ]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 40


@pytest.mark.parametrize("before", ["batch.json", "publish", "catalog.jsonl", "done.json"])
def test_a_batch_that_was_cut_off_anywhere_is_finished_before_another_is_begun(
    tmp_path, listing, monkeypatch, before
):
    """The corpus is byte for byte that of batches that nothing disturbed."""
    for _ in range(3):
        run_one_batch(series_config(tmp_path, listing, series="undisturbed"))

    class Killed(BaseException):
        pass

    def dying(module, name, *, file):
        original, left = getattr(module, name), iter([True])

        def maybe(*args, **options):
            if (file is None or str(args[0]).endswith(file)) and next(left, False):
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(module, name, maybe)

    settings = series_config(tmp_path, listing)
    run_one_batch(settings)
    if before == "publish":
        dying(execute, "publish", file=None)
    else:
        writes = {"catalog.jsonl": (publish, "replace_if"), "batch.json": (batching, "create_only")}
        dying(*writes.get(before, (batching, "write_atomically")), file=before)
    with pytest.raises(Killed):
        run_one_batch(settings)
    again = run_one_batch(settings)
    assert (again.batch.number, again.decision is None) == (2, before != "batch.json")
    run_one_batch(settings)
    assert run_one_batch(settings).batch is None
    for name in ("gen-0001", "gen-0002", "gen-0003"):
        here, there = (
            bytes_of(tmp_path / series / "generations" / name)
            for series in ("series", "undisturbed")
        )
        assert {**here, "manifest.json": b""} == {**there, "manifest.json": b""}
    assert published_urls(tmp_path) == published_urls(tmp_path, "undisturbed")


def test_two_schedulers_do_not_work_on_one_series(tmp_path, listing):
    settings = series_config(tmp_path, listing)
    with lease(settings.run.directory), pytest.raises(Held, match="is in use by process"):
        run_one_batch(settings)
    assert batches(settings.run.directory) == []


def test_a_batch_of_which_nothing_is_kept_is_done_and_publishes_nothing(tmp_path, listing):
    settings = series_config(
        tmp_path, listing, "language.allowed=['de']", "language.score=[0.9, 1.0]"
    )
    done = run_one_batch(settings)
    assert done.batch.done["generation"] is None and done.batch.done["tokens"] == 0
    assert run_one_batch(settings).batch.number == 2


def test_a_size_given_by_hand_overrules_the_decision_which_is_logged(tmp_path, listing):
    settings = series_config(tmp_path, listing)
    assert len(run_one_batch(settings, inputs=1).batch.inputs) == 1
    [line] = decisions(settings.run.directory)
    record = from_json(Record, line)
    assert (record.decision.state, record.decision.inputs, record.inputs.inputs_left) == (
        "BLIND",
        4,
        10,
    )


def test_decisions_follow_the_trainer_and_replay_identically(tmp_path, listing):
    from trainer.telemetry.feedback import Report, Source
    from trainer.telemetry.feedback_writer import Writer

    settings = series_config(
        tmp_path,
        listing,
        "schedule.horizon_hours=0.01",
        "schedule.starved_hours=0.0001",
        "schedule.slew=10.0",
    )
    first = run_one_batch(settings, inputs=2)
    tokens, rows = (
        first.outcome.published.manifest["tokens"],
        first.outcome.published.manifest["rows"],
    )

    def told(state, read):
        sources = {settings.run.directory: Source("gen-0001", {"gen-0001": read}, 1, 1.0)}
        speed = tokens / 60.0  # a batch of two inputs lasts a minute, the horizon is 36 s
        return Report(state, 1, 1, 1, speed, speed, 0.0, None, None, 1.0, 0, sources, None, None)

    def tell(*report):
        Writer(f"{settings.run.directory}/feedback", trainer="t", every_seconds=30.0).close(
            told(*report)
        )

    tell("running", 0)
    glut = run_one_batch(settings)
    tell("waiting", rows)
    starved = run_one_batch(settings)
    assert (glut.decision.state, glut.batch) == ("GLUT", None)
    assert starved.decision.state == "STARVED" and 1 <= len(starved.batch.inputs) <= 3
    lines = decisions(settings.run.directory)
    assert len(lines) == 3 and replay(lines) == []
    [mismatch] = replay([lines[0].replace(b'"BLIND"', b'"GLUT"')])
    assert "state was 'GLUT', is 'BLIND'" in mismatch.what


def test_the_schedule_does_not_pause_while_a_trainer_is_short(tmp_path, monkeypatch):
    """Short twice, then not: one pause before it is interrupted."""
    record = from_json(Record, (CONTROLLER / "decisions_v2.jsonl").read_bytes().splitlines()[0])
    short, enough = (replace(record.decision, state=state) for state in ("STARVED", "BALANCED"))
    batch = batching.Batch(1, str(tmp_path), (), 0.0, None)
    results = iter([(batch, short), (batch, short), (None, short), (batch, enough)])
    periods, paused = [], []

    def run(*_, period_seconds, **options):
        periods.append(period_seconds)
        found = next(results, None)
        if found is None:
            raise KeyboardInterrupt
        return batching.BatchResult(found[0], None, found[1])

    monkeypatch.setattr(batching, "run_batch", run)
    monkeypatch.setattr("pipeline.cli.batches.time.sleep", paused.append)
    config = str(ROOT / "configs" / "quickstart.toml")
    told = CliRunner().invoke(
        app, ["schedule", config, f"run.directory={tmp_path}", "--every", "2h"]
    )
    assert told.exit_code == 130 and periods == [7200.0] * 5
    assert len(paused) == 2  # where nothing was left to take, and where none was short


def test_ctrl_c_ends_the_schedule_and_a_failed_batch_does_not(tmp_path, monkeypatch):
    """The third time it is interrupted; before that the batch fails, and the schedule waits for the
    next time.
    """
    ends, paused = (
        iter([OSError("the store is away"), RunFailed("a unit failed"), KeyboardInterrupt()]),
        [],
    )

    def ending(*args, **options):
        raise next(ends)

    monkeypatch.setattr(batching, "run_batch", ending)
    monkeypatch.setattr("pipeline.cli.batches.time.sleep", paused.append)
    told = CliRunner().invoke(
        app,
        [
            "schedule",
            str(ROOT / "configs" / "quickstart.toml"),
            f"run.directory={tmp_path}",
            "--every",
            "2h",
        ],
    )
    assert (
        told.exit_code == 130 and len(paused) == 2 and all(7000 < pause <= 7200 for pause in paused)
    )
