"""What can go, and that nothing that is needed goes with it."""

import json
import os
from pathlib import Path

import pytest

from pipeline.batches import gc
from pipeline.batches.batch import run_batch
from pipeline.engine.lease import Held, lease
from pipeline.engine.units import in_process
from pipeline.inspect.verify import verify_path
from pipeline.inspect.why import why
from pipeline.run.execute import execute
from tests.support.quickstart import RecordedProgress, bytes_of
from tests.support.series import run_one_batch, series_config, write_listing


@pytest.fixture
def crawl(tmp_path):
    return write_listing(tmp_path / "crawl")


def run(settings):
    progress = RecordedProgress()
    execute(settings, progress, in_process)
    return progress.stages()


def test_a_finished_run_loses_nothing_but_what_another_configuration_has_left(tmp_path, crawl):
    run(series_config(tmp_path, crawl, "dedup.keep_rule=first"))
    settings = series_config(tmp_path, crawl)
    run(settings)
    root = Path(settings.run.directory)
    (root / "generations" / ".building-gen-0009").mkdir()
    (root / "estimate-1f").mkdir()
    before = {name: bytes_of(root / "generations" / name) for name in ("gen-0001", "gen-0002")}
    found = gc.find(str(root))
    assert {(Path(item.uri).parent.name, item.reason) for item in found} == {
        *((stage, "superseded") for stage in ("dedup", "refine", "pack")),
        ("generations", "unpublished"),
        (root.name, "scratch"),
    }
    assert all(item.bytes > 0 for item in found if item.reason == "superseded")
    gone = gc.collect(str(root))
    assert gone == found and gc.find(str(root)) == []
    assert {name: bytes_of(root / "generations" / name) for name in before} == before
    assert all(not verified.faults for verified in verify_path(str(root)))
    assert run(settings) == set()  # nothing is done again
    assert [found["fate"] for found in why(str(root), "https://mill.example/3/12")] == ["published"]


def test_a_series_goes_on_after_its_intermediate_data_are_gone(tmp_path, crawl):
    for series in ("series", "untouched"):
        for number in range(3):
            if number == 2 and series == "series":
                before = gc.find(f"{tmp_path}/{series}")
                gone = gc.collect(f"{tmp_path}/{series}", intermediate=True)
                assert (
                    before == []
                    and {item.reason for item in gone} == {"intermediate"}
                    and len(gone) == 4
                )
            run_one_batch(series_config(tmp_path, crawl, series=series))
    here, there = (
        bytes_of(tmp_path / series / "generations" / "gen-0003")
        for series in ("series", "untouched")
    )
    assert {**here, "manifest.json": b""} == {**there, "manifest.json": b""}


def test_an_index_that_later_batches_read_outlives_a_change_of_the_configuration(tmp_path, crawl):
    settings = series_config(tmp_path, crawl, "dedup.write_index=kept")
    run(settings)
    changed = series_config(tmp_path, crawl, "dedup.write_index=kept", "extract.filters=['c4']")
    execute(changed, RecordedProgress(), in_process, only="extract")
    found = [
        item.uri.removeprefix(f"{settings.run.directory}/")
        for item in gc.find(settings.run.directory)
    ]
    index = json.loads(Path(settings.run.directory, "index.json").read_text())
    assert not [
        name
        for name in ("root", "documents", "keep")
        for uri in found
        if index[name].startswith(uri)
    ]
    # of dedup what led to the index
    assert sorted(uri.split("/")[0] for uri in found) == [
        "dedup",
        "pack",
        "refine",
    ]
    gc.collect(settings.run.directory)
    later = series_config(
        tmp_path, crawl, f"dedup.against=['{settings.run.directory}']", series="later"
    )
    run(later)
    assert verify_path(settings.run.directory)[0].faults == []


def test_a_batch_that_was_begun_keeps_what_it_has(tmp_path, crawl, monkeypatch):
    monkeypatch.setattr(
        "pipeline.batches.batch._finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run_batch(series_config(tmp_path, crawl), RecordedProgress(), in_process)
    assert gc.find(f"{tmp_path}/series", intermediate=True) == []
    (
        tmp_path / "series" / "batches" / "0001" / "run.json"
    ).unlink()  # as it is until its run has begun
    (tmp_path / "series" / "estimate-1f").mkdir()
    assert [(Path(item.uri).name, item.reason) for item in gc.find(f"{tmp_path}/series")] == [
        ("estimate-1f", "scratch")
    ]


def test_what_is_newer_than_asked_for_stays_and_a_run_at_work_is_not_disturbed(tmp_path, crawl):
    settings = series_config(tmp_path, crawl)
    run(settings)
    root = Path(settings.run.directory)
    (root / "estimate-old").mkdir()
    (root / "estimate-old" / "part").write_text("x")
    os.utime(root / "estimate-old" / "part", (1000, 1000))
    (root / "estimate-new").mkdir()
    (root / "estimate-new" / "part").write_text("x")
    assert [Path(item.uri).name for item in gc.collect(str(root), older_than=2000)] == [
        "estimate-old"
    ]
    assert (root / "estimate-new").exists()
    with lease(str(root)), pytest.raises(Held):
        gc.collect(str(root))


def test_an_estimate_at_work_stays_and_what_killed_writers_left_goes(tmp_path, crawl):
    settings = series_config(tmp_path, crawl)
    run(settings)
    root = Path(settings.run.directory)
    [documents] = root.glob("extract/*/documents")
    (documents / ".000000.parquet.tmp-1f").write_bytes(b"cut")
    with lease(str(root / "estimate-1f")):
        [item] = gc.collect(str(root))
        assert (
            item[:3] == (str(documents / ".000000.parquet.tmp-1f"), "scratch", 3) and item.modified
        )
    assert [Path(item.uri).name for item in gc.collect(str(root))] == ["estimate-1f"]
    assert run(settings) == set() and gc.find(str(root)) == []


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run directory"):
        gc.find(str(tmp_path))
    assert json.dumps(gc.Garbage("a", "scratch", 1, None)._asdict())
