"""A run whose commits are sealed, here three at a time: the same bytes, the same answers, and a
kill while they are sealed loses nothing and does nothing twice.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.config.load import load
from pipeline.engine.lease import Fenced, lease
from pipeline.engine.units import in_process
from pipeline.inspect.metrics import Metrics
from pipeline.run.execute import Run, execute
from pipeline.run.phase import Phase
from pipeline.run.phases import SPECS
from pipeline.run.results import all_commits
from pipeline.run.state import read_state
from stages.storage import ledger
from stages.storage.files import names_in, write_atomically
from stages.storage.ledger import Commit, Store
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.quickstart import RecordedProgress, bytes_of
from tests.support.series import document_text

PHASES = ("extract", "dedup keep", "refine", "pack")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Seven files of two documents each."""
    folder = tmp_path_factory.mktemp("pages")
    for file in range(7):
        lines = [
            json.dumps({"text": document_text(n), "url": f"https://mill.example/{n}"})
            for n in (2 * file, 2 * file + 1)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def configure(directory, pages, *overrides):
    fixed = ["input.format=jsonl", "input.url_column=url", "language.allowed=[]"]
    fixed += ["extract.filters=[]", "refine.filters=[]", "dedup.documents_per_unit=2"]
    fixed += ["pack.seq_len=64", "pack.group_bytes=1", "pack.held_out=0"]
    fixed += [f"run.directory={directory}", f"input.paths=['{pages}/*.jsonl']"]
    return load(None, [*fixed, *overrides])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pages):
    """The run with a file per commit."""
    folder = tmp_path_factory.mktemp("plain") / "r"
    return execute(configure(folder, pages), RecordedProgress(), in_process).published


@pytest.fixture
def three_at_a_time(monkeypatch):
    monkeypatch.setattr(ledger, "SEGMENT", 3)


@pytest.fixture
def run(tmp_path, pages, three_at_a_time):
    """The run with sealed commits: its directory."""
    published = execute(configure(tmp_path / "r", pages), RecordedProgress(), in_process).published
    assert published is not None
    return str(tmp_path / "r")


def stores(root):
    state = read_state(root)
    return [SPECS[phase].store(root, state.keys) for phase in PHASES]


def gristmill(*command):
    result = CliRunner().invoke(app, [*command])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_sealed_run_publishes_the_same_and_does_nothing_again(run, pages, plain):
    assert bytes_of(f"{run}/generations/gen-0001") == bytes_of(plain.uri)
    for store in stores(run):
        assert len(names_in(f"{store.root}/sealed")) == 2
        assert len(names_in(f"{store.root}/commits")) == 1
    again = RecordedProgress()
    outcome = execute(configure(run, pages), again, in_process)
    assert not any(again.ran.values()) and not outcome.published.new


def test_a_sealed_run_is_asked_about_like_any_other(run):
    phases = json.loads(gristmill("status", run, "--json"))["phases"]
    assert {p: (phases[p]["units"], phases[p]["done"], phases[p]["left"]) for p in PHASES} == {
        p: (7, 7, 0) for p in PHASES
    }
    assert phases["extract"]["rows_in"] == 14
    assert phases["extract"]["bytes_read"] == sum(
        c.result.bytes_in for c in all_commits(run, read_state(run))["extract"]
    )
    [verified] = json.loads(gristmill("verify", run, "--json"))
    assert verified["faults"] == []
    assert '"fate": "published"' in gristmill("why", run, "https://mill.example/3", "--json")
    rows = json.loads(gristmill("sql", run, "SELECT count(*) AS n FROM commits", "--json"))
    assert rows[0]["n"] == sum(map(len, all_commits(run, read_state(run)).values()))
    gristmill("export", run, "--stage", "corpus", "-o", f"{run}-corpus.jsonl")
    assert len(Path(f"{run}-corpus.jsonl").read_text().splitlines()) == 14
    assert b"<html" in Path(gristmill("report", run).strip()).read_bytes()
    gristmill("gc", run, "--delete")
    assert all(len(names_in(f"{store.root}/sealed")) == 2 for store in stores(run))
    faults = []
    families = {f.name: f for f in Metrics(run, faults.append).collect()}
    assert (
        faults == []
        and sum(
            s.value
            for s in families["gristmill_documents"].samples
            if s.labels["stage"] == "extract" and s.labels["reason"] == "kept"
        )
        == 14
    )


def test_an_input_that_changed_is_done_again_though_its_commit_is_sealed(run, tmp_path, pages):
    changed = tmp_path / "pages"
    changed.mkdir()
    for file in pages.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    first = configure(tmp_path / "c", changed)
    execute(first, RecordedProgress(), in_process)
    (changed / "1.jsonl").write_text(json.dumps({"text": document_text(99), "url": "https://x/"}))
    progress = RecordedProgress()
    execute(first, progress, in_process)
    assert progress.ran["extract"] == ["000001"] and "000001" in progress.ran["refine"]
    extracted = Run(first).store("extract")
    assert [c.rows_in for c in extracted.commits()] == [2, 1, 2, 2, 2, 2, 2]
    fresh = configure(tmp_path / "fresh", changed)
    execute(fresh, RecordedProgress(), in_process)
    packed = [[c.digest for c in Run(config).store("pack").commits()] for config in (first, fresh)]
    assert packed[0] == packed[1]


def test_other_bounds_are_applied_to_rows_whose_commits_are_sealed(run, pages):
    bounded = configure(
        run, pages, "extract.filters=['gopher_quality']", "gopher_quality.word_count=[151,999]"
    )
    first = configure(run, pages, "extract.filters=['gopher_quality']")
    for config in (first, bounded):
        execute(config, RecordedProgress(), in_process, only="extract")
    commits = Run(bounded).store("extract").commits()
    assert len(commits) == 7 and all(c.result.reapplied for c in commits)


def test_units_from_a_million_on_follow_those_before(tmp_path, pages, three_at_a_time):
    root = tmp_path / "r"
    root.mkdir()
    (root / "inputs.jsonl").write_text('{"ordinal": 999996, "path": "/gone.jsonl"}\n')
    config = configure(root, pages)
    assert execute(config, RecordedProgress(), in_process).published.manifest["documents"] == 14
    units = [str(n) for n in range(999_997, 1_000_004)]
    for phase in ("extract", "refine"):
        assert [c.unit for c in Run(config).store(phase).commits()] == units
    query = "SELECT part, doc_id FROM corpus ORDER BY doc_id"
    rows = json.loads(gristmill("sql", str(root), query, "--json"))
    assert [Path(row["part"]).stem for row in rows] == [u for u in units for _ in range(2)]
    assert [row["doc_id"] >> 32 for row in rows] == [int(u) for u in units for _ in range(2)]
    assert '"fate": "published"' in gristmill("why", str(root), "https://mill.example/13", "--json")


def test_a_run_that_lost_its_lease_seals_nothing(tmp_path, three_at_a_time):
    """Its segment would count more than what the other run has done since."""
    root = f"memory://{tmp_path}"
    phase = Phase("extract", Store(f"{root}/extract/key"))
    with lease(root):
        write_atomically(f"{root}/lease.json", json.dumps({"nonce": "theirs"}).encode())
        with pytest.raises(Fenced, match="lost it to"):
            for n in range(3):
                phase.store.commit(Commit(f"{n:06d}", "f"))
                phase.add(phase.store.loose_commit(f"{n:06d}"))
    assert names_in(f"{phase.store.root}/sealed") == []
    assert len(names_in(f"{phase.store.root}/commits")) == 3


# --- kills ----------------------------------------------------------------------------------------


def run_until_killed(folder, pages, call, number):
    """A run that is killed before the `number`-th call of a function of the ledger."""
    ledger.SEGMENT, original, calls = 3, getattr(ledger, call), [0]

    def dying(*arguments):
        sealing = call != "create_only" or "/sealed/" in arguments[0]
        calls[0] += sealing
        if sealing and calls[0] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(ledger, call, dying)
    execute(configure(folder, pages), RecordedProgress(), in_process)


@pytest.mark.kill
@pytest.mark.parametrize("call", ["create_only", "remove_many"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_kill_while_commits_are_sealed_loses_and_doubles_nothing(
    tmp_path, pages, plain, three_at_a_time, call, number
):
    root = f"{tmp_path}/r"
    command = call_command(run_until_killed, root, pages, call, number)
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    config = configure(root, pages)
    done = list(Run(config).store("extract").commits())
    assert done
    progress = RecordedProgress()
    published = execute(config, progress, in_process).published
    assert bytes_of(published.uri) == bytes_of(plain.uri)
    after = list(Run(config).store("extract").commits())
    assert [c.unit for c in after] == [f"{n:06d}" for n in range(7)]
    assert [c for c in after if c in done] == done
    assert progress.ran["extract"] == [c.unit for c in after if c not in done]
