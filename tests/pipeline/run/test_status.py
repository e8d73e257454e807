"""Status: every unit is in one state, and `gristmill status`, the report and the metrics agree."""

import json
from collections import Counter

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.inspect.metrics import Metrics
from pipeline.report.run_data import gather
from pipeline.run.results import store_of
from pipeline.run.state import read_state
from pipeline.run.status import covered, phase_status, run_status
from stages.extract.extract import ExtractResult
from stages.storage.ledger import Commit, Commits, Failure, Store, Unit
from tests.support.inline import make_config, run_inline


def test_covered_is_the_length_of_the_union():
    assert covered([(0, 10), (5, 12), (100, 101)]) == 13
    assert covered([]) == 0


def empty_store():
    """A store in memory, where listing is slow if earlier examples stay."""
    fsspec.filesystem("memory").store.clear()
    return Store("memory://status/run")


@st.composite
def stores(draw):
    """Units as listed, committed (perhaps of another input), failed (perhaps quarantined, of this
    input or another).
    """
    names = [f"{n:06d}" for n in range(draw(st.integers(1, 8)))]
    some, inputs = st.sets(st.sampled_from(names)), st.sampled_from("ab")
    listed = {name: draw(inputs) for name in draw(some)}
    rows, times = st.integers(0, 9), st.floats(1, 9)
    commits = [Commit(name, draw(inputs), draw(rows), finished=draw(times)) for name in draw(some)]
    failed = {name: draw(st.sampled_from([None, "a", "b"])) for name in draw(some)}
    return listed, commits, failed


@given(stores())
def test_every_unit_is_in_one_state(drawn):
    listed, commits, failed = drawn
    store = empty_store()
    store.list_units([Unit(name, fingerprint, None) for name, fingerprint in listed.items()])
    for commit in commits:
        store.commit(commit)
    for name, quarantined in failed.items():
        store.fail(Failure(name, "no", quarantined=quarantined))
    expected = Counter()
    for name, fingerprint in listed.items():
        if any(c.unit == name and c.fingerprint == fingerprint for c in commits):
            expected["done"] += 1
        elif name in failed:
            expected["failed"] += 1
            expected["quarantined"] += failed[name] == fingerprint
        else:
            expected["left"] += 1
    status = phase_status("extract", store, store.listed_commits(), since=0.0)
    assert status.units == len(listed) == status.done + status.failed + status.left
    assert {s: getattr(status, s) for s in ("done", "failed", "quarantined", "left")} == {
        s: expected[s] for s in ("done", "failed", "quarantined", "left")
    }


def test_rates_are_of_the_latest_invocation_without_pauses():
    store = Store(empty_store().root, ExtractResult)
    store.list_units([Unit(f"{n:06d}", "a", None) for n in range(6)])
    spans = [(0.0, 10.0), (100.0, 104.0), (102.0, 106.0), (200.0, 204.0)]
    for n, (begin, end) in enumerate(spans):
        result = ExtractResult(bytes_in=1000, reapplied=n == 3)
        store.commit(
            Commit(
                f"{n:06d}",
                "a",
                rows_in=30,
                rows_out=20,
                result=result,
                seconds=end - begin,
                finished=end,
            )
        )
    status = phase_status("extract", store, store.listed_commits(), since=50.0)
    assert (status.rows_in, status.wall_seconds) == (120, 20.0)
    assert status.rows_per_second == 90 / 10 and status.eta_seconds == pytest.approx(10 / 3 * 2)
    assert (status.bytes_read, status.bytes_per_second, status.reapplied) == (3000, 200.0, 1)
    assert status.last_commit == 204.0
    before = phase_status("extract", store, store.listed_commits(), since=300.0)
    assert before.rows_per_second == 120 / 20  # the latest invocation has finished nothing
    empty = phase_status("extract", store, Commits(), since=0.0)
    assert (empty.rows_per_second, empty.eta_seconds, empty.last_commit) == (None, None, None)
    assert empty.left == 6


@pytest.fixture
def root(tmp_path):
    """A run of two invocations: the second finished what the first had left, but for one unit."""
    for n in range(3):
        lines = [json.dumps({"text": f"{n} {i} mills grind wheat"}) + "\n" for i in range(9)]
        (tmp_path / f"{n}.jsonl").write_text("".join(lines))
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b torn")
    inputs = [*sorted(tmp_path.glob("*.jsonl")), tmp_path / "torn.jsonl.gz"]
    plain = ["input.format=jsonl", "language.allowed=[]", "extract.filters=[]", "refine.filters=[]"]
    limits = ["pack.seq_len=8", "run.max_failed_share=0.5"]
    config = make_config(tmp_path, inputs, *plain, *limits)
    run_inline(config)
    root = config.run.directory
    store_of(root, read_state(root), "extract").withdraw("000001")
    run_inline(config)
    store_of(root, read_state(root), "extract").withdraw("000002")
    return root


def test_status_report_and_metrics_agree(root):
    status = run_status(root).phases
    printed = json.loads(CliRunner().invoke(app, ["status", root, "--json"]).output)["phases"]
    reported = {phase.name: phase for phase in gather(root).phases}
    text = generate_latest(Metrics(root, pytest.fail)).decode()
    served = {
        (sample.name, sample.labels.get("phase"), sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    extract = status["extract"]
    assert (extract.done, extract.failed, extract.left) == (2, 1, 1)
    assert extract.rows_per_second > 0 and extract.eta_seconds > 0
    for name, phase in status.items():
        assert all(printed[name][key] == value for key, value in vars(phase).items())
        assert reported.get(name, phase) == phase
        if phase.units:
            for state in ("done", "failed", "quarantined", "left"):
                assert served["gristmill_units", name, state] == getattr(phase, state)
            for metric, value in (
                ("rows_per_second", phase.rows_per_second),
                ("cpu_seconds_total", phase.cpu_seconds),
                ("written_bytes_total", phase.bytes_written),
                ("last_commit_timestamp_seconds", phase.last_commit),
            ):
                assert served[f"gristmill_{metric}", name, None] == value
