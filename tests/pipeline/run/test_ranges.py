"""Runs that read WARC files in ranges: the same documents, and everything adds up over the ranges."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.batches.batch import batches, run_batch
from pipeline.engine.units import in_process
from pipeline.inspect import export, why
from pipeline.report import groups
from pipeline.report.sample import open_sample, read_ledger
from pipeline.run.execute import Run, execute
from pipeline.run.inputs import read_list, whole_files
from pipeline.run.phases import SPECS
from pipeline.run.results import all_commits, run_funnel
from pipeline.run.state import read_state
from pipeline.study.input_sample import draw
from stages.storage.files import write_atomically
from tests.support.quickstart import RecordedProgress, bytes_of, quickstart_config

SPLIT = "input.split_bytes=100_000"
SPLIT_UNITS = 5 + 6  # of 418 and 572 kB


def go(config, run_units=in_process, **options):
    progress = RecordedProgress()
    return execute(config, progress, run_units, **options), progress.ran


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "r"
    return str(folder), go(quickstart_config(folder))[0]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split") / "r"
    return str(folder), go(quickstart_config(folder, SPLIT))[0]


def rows(root, kind):
    """All rows in order; ids count from the first record of a range, and are left out."""
    found = [row for table in export.tables(root, kind) for row in table.to_pylist()]
    return [{k: v for k, v in row.items() if k not in ("doc_id", "cluster_id")} for row in found]


def documents(root):
    """Rows of extract in order, without ids and what is made from their order."""
    store = SPECS["extract"].store(root, read_state(root).keys)
    table = pa.concat_tables(store.read_part(c) for c in store.listed_commits())
    return table.drop_columns(["doc_id"]).to_pylist()


def test_ranges_give_the_documents_of_whole_files_in_their_order(whole, split):
    listed = read_list(split[0])
    assert [i.ordinal for i in listed] == list(range(SPLIT_UNITS))
    assert len(read_list(whole[0])) == 2
    for kind in ("corpus", "rejected"):
        assert rows(split[0], kind) == rows(whole[0], kind) != []
    assert documents(split[0]) == documents(whole[0])
    funnels = [[(r.stage, r.rule, r.count) for r in run_funnel(root)] for root, _ in (whole, split)]
    assert funnels[0] == funnels[1]


def test_what_counts_by_file_adds_up_over_its_ranges(whole, split):
    manifests = [outcome.published.manifest for _, outcome in (whole, split)]
    assert manifests[0]["sources"] == manifests[1]["sources"]
    assert manifests[0]["documents"] == manifests[1]["documents"]
    by_file = []
    for root, _ in (whole, split):
        ledger = read_ledger(root)
        with open_sample(ledger) as sample:
            by_file.append(groups.rankings(ledger, sample)["input"])
    assert by_file[0] == by_file[1]
    assert [g.total > 0 for g in by_file[0].groups] == [True, True]
    results = [
        [c.result for c in all_commits(root, read_state(root))["extract"]]
        for root, _ in (whole, split)
    ]
    assert sum(r.bytes_in for r in results[0]) == sum(r.bytes_in for r in results[1])
    assert sum(r.bytes_in for r in results[0]) == sum(
        Path(path).stat().st_size for path in manifests[0]["sources"]
    )


def test_a_page_of_a_range_is_found_by_its_place_in_the_file(whole, split):
    row = rows(split[0], "corpus")[-1]
    place = f"{row['warc_file']}:{row['warc_offset']}"
    fates = [why.why(root, place) for root, _ in (whole, split)]
    assert fates[0][0]["url"] == fates[1][0]["url"] == row["url"]
    assert fates[0][0]["fate"] == fates[1][0]["fate"] == "published"


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_with_the_ranges_that_it_has(split, tmp_path):
    """Even if the configuration has changed: document ids are made from the ranges."""

    def dying(name, work, units, resources):
        yield from itertools.islice(in_process(name, work, units, resources), 3)
        raise Killed

    with pytest.raises(Killed):
        go(quickstart_config(tmp_path / "r", SPLIT), dying)
    outcome, ran = go(quickstart_config(tmp_path / "r", "input.split_bytes=0"))
    assert len(ran["extract"]) == SPLIT_UNITS - 3
    expected = bytes_of(split[1].published.uri)
    found = bytes_of(outcome.published.uri)
    assert {n: d for n, d in found.items() if n != "manifest.json"} == {
        n: d for n, d in expected.items() if n != "manifest.json"
    }


def test_a_list_of_whole_files_keeps_them_and_new_files_are_split(whole, tmp_path):
    first = quickstart_config(tmp_path / "r", "input.split_bytes=0", samples="debian-handbook")
    go(first, only="extract")
    _, ran = go(quickstart_config(tmp_path / "r", SPLIT), only="extract")
    assert ran["extract"] == [f"{n:06d}" for n in range(1, 7)]
    listed = read_list(str(tmp_path / "r"))
    assert [i.ordinal for i in listed] == list(range(7))
    assert [i.byte_range.start for i in listed][:3] == [0, 0, listed[1].byte_range.end]
    lines = (tmp_path / "r" / "inputs.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"ordinal", "path"}  # as older versions write it
    assert documents(str(tmp_path / "r")) == documents(whole[0])


def test_the_sample_of_an_estimate_is_of_files(tmp_path):
    config = quickstart_config(tmp_path / "r", SPLIT)
    inputs = Run(config).inputs(extend=False)
    assert len(inputs) == SPLIT_UNITS
    samples = [
        draw(config, files, share=0.2, folder=str(tmp_path / name))
        for name, files in (
            ("split", whole_files(inputs)),
            ("whole", Run(quickstart_config(tmp_path / "w")).inputs(extend=False)),
        )
    ]
    assert samples[0].shares == samples[1].shares
    contents = [[Path(p).read_bytes() for p in s.paths] for s in samples]
    assert contents[0] == contents[1]


def test_batches_take_files_and_number_their_ranges_once(whole, tmp_path):
    root = tmp_path / "series"
    done = [
        run_batch(quickstart_config(root, SPLIT), RecordedProgress(), in_process, inputs=1)
        for _ in range(3)
    ]
    assert done[2].batch is None and len(done[0].batch.files) == len(done[1].batch.files) == 1
    listed = read_list(str(root))
    assert [i.ordinal for i in listed] == list(range(SPLIT_UNITS))
    assert [i for batch in batches(str(root)) for i in batch.inputs] == listed
    assert done[1].decision.inputs <= 1  # of files, of which one is left
    found = [row for b in batches(str(root)) for row in documents(b.directory)]
    assert found == documents(whole[0])


def test_ranges_of_objects_give_the_documents_of_a_local_file(split, s3_bucket, tmp_path):
    local = Path(read_list(split[0])[0].path)
    uri = f"{s3_bucket}/{local.name}"
    write_atomically(uri, local.read_bytes())
    config = quickstart_config(tmp_path / "r", SPLIT, f"input.paths=['{uri}']")
    assert len(go(config, only="extract")[1]["extract"]) == 5
    expected = [row for row in documents(split[0]) if row["warc_file"] == str(local)]
    assert documents(str(tmp_path / "r")) == [row | {"warc_file": uri} for row in expected]
