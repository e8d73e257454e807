"""The whole job on real pages: golden funnel, resume, kills, and what a config change touches.

On Ray where Ray is tested, else in this process.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engine.dispatch import on_ray
from pipeline.engine.lease import Held, is_held, lease
from pipeline.engine.units import in_process
from pipeline.inspect import export, why
from pipeline.inspect.verify import verify_path
from pipeline.report.report import write_report
from pipeline.run import results
from pipeline.run.execute import RunFailed, execute, plan
from pipeline.run.phases import SPECS
from pipeline.run.state import read_state
from pipeline.run.status import run_status
from stages.extract.extract import ExtractTask
from stages.read.fetch import printable
from tests.support.inline import make_config, run_inline
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.quickstart import RecordedProgress, bytes_of, quickstart_config


def go(config, only=None, first=None):
    progress = RecordedProgress()
    return execute(config, progress, in_process, only=only, first=first), progress


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run over two sample files."""
    folder = tmp_path_factory.mktemp("run") / "r"
    outcome, progress = go(quickstart_config(folder))
    return folder, outcome, progress


def test_every_record_is_accounted_for(done):
    folder, outcome, _ = done
    state = read_state(str(folder))
    commits = results.all_commits(str(folder), state)
    for commit in commits["extract"]:
        assert sum(commit.counts.values()) == commit.rows_in
        assert commit.counts["kept"] == commit.rows_out
    kept = sum(c.rows_out for c in commits["extract"])
    assert sum(c.rows_in for c in commits["dedup keep"]) == kept
    for commit in commits["dedup keep"]:
        assert sum(commit.counts.values()) == commit.rows_in
    assert sum(c.rows_in for c in commits["refine"]) == sum(
        c.rows_out for c in commits["dedup keep"]
    )
    assert sum(c.rows_in for c in commits["pack"]) == sum(c.rows_out for c in commits["refine"])
    for commit in commits["pack"]:
        assert sum(commit.counts.values()) == commit.rows_in
    assert outcome.published.manifest["tokens"] == sum(c.result.tokens for c in commits["pack"])


def test_golden_funnel(done):
    """Exact counts on two bundled files: a change here is a change of policy, and belongs into the
    changelog.
    """
    folder, _, _ = done
    go(quickstart_config(folder))
    rows = [
        [row.stage, row.rule or f"= {row.unit}", row.count]
        for row in results.run_funnel(str(folder))
    ]
    golden = Path(__file__).with_name("golden_funnel.json")
    assert rows == json.loads(golden.read_text())


@pytest.mark.ray
def test_on_ray_the_generation_has_the_bytes_of_one_process(ray_session, done, tmp_path):
    _, outcome, _ = done
    on_workers = execute(quickstart_config(tmp_path / "r"), RecordedProgress(), on_ray())
    assert bytes_of(on_workers.published.uri) == bytes_of(outcome.published.uri)


def test_published_generation_verifies_and_is_in_the_catalog(done):
    folder, outcome, _ = done
    [result] = verify_path(str(folder))
    assert result.faults == [] and result.rows == outcome.published.manifest["rows"] > 0


@pytest.mark.train
def test_streaming_reads_every_row_and_token_that_the_manifest_counts(done):
    pytest.importorskip("torch")
    from trainer.data.order import import_streaming

    _, outcome, _ = done
    dataset = import_streaming().StreamingDataset(
        local=outcome.published.uri, batch_size=1, shuffle=False
    )
    rows = [dataset[i] for i in range(len(dataset))]
    manifest = outcome.published.manifest
    assert len(rows) == manifest["rows"]
    assert {row["tokens"].shape for row in rows} == {(manifest["seq_len"],)}
    assert sum(int(row["spans"].sum()) for row in rows) == manifest["tokens"]


def test_provenance_leads_from_a_row_back_to_its_document(done):
    from stages.formats import mds
    from stages.formats.tiktoken_encodings import load_encoding

    folder, outcome, _ = done
    encoding = load_encoding("cl100k_base")
    corpus = {
        row["doc_id"]: row["text"]
        for t in export.tables(str(folder), "corpus")
        for row in t.to_pylist()
    }
    uri, manifest = outcome.published.uri, outcome.published.manifest
    pieces = {}
    for part, shards in (
        (uri, manifest["shards"]),
        (f"{uri}/held_out", manifest["held_out"]["shards"]),
    ):
        rows = [row for s in shards for row in mds.read_shard(f"{part}/{s['basename']}")]
        for span in pq.read_table(f"{part}/provenance.parquet").to_pylist():
            ids = rows[span["row"]]["tokens"][span["start"] : span["start"] + span["length"]]
            pieces.setdefault(span["doc_id"], []).append((span["offset"], ids.tolist()))
    assert pieces.keys() == corpus.keys()
    for doc_id, found in pieces.items():
        ids = [i for _, part in sorted(found) for i in part]
        assert ids[-1] == encoding.eot_token and encoding.decode(ids[:-1]) == corpus[doc_id]


def test_running_again_does_nothing_and_publishes_nothing_new(done):
    folder, outcome, _ = done
    again, progress = go(quickstart_config(folder))
    assert progress.stages() == set()
    assert not again.published.new and again.published.name == outcome.published.name


@pytest.mark.parametrize(
    "override, stages",
    [
        ("pack.packing=best_fit", {"pack"}),
        ("refine.scrub_pii=false", {"refine", "pack"}),
        ("dedup.keep_rule=first", {"dedup", "refine", "pack"}),
    ],
)
def test_a_change_reruns_exactly_the_stages_it_touches(done, override, stages):
    folder, _, _ = done
    _, progress = go(quickstart_config(folder, override))
    assert progress.stages() == stages


def test_a_changed_bound_is_reapplied_without_extracting_and_gives_the_same_bytes_as_a_fresh_run(
    done, tmp_path
):
    folder, _, _ = done
    changes = (
        "gopher_quality.alpha_word_ratio=[0.8, 1.0]",
        "c4.curly_bracket_count=off",
        "dedup.num_bands=26",
    )
    reapplied, _ = go(quickstart_config(folder, *changes))
    state = read_state(str(folder))
    assert all(c.result.reapplied for c in results.all_commits(str(folder), state)["extract"])
    fresh, _ = go(quickstart_config(tmp_path / "fresh", *changes))
    ours, theirs = bytes_of(reapplied.published.uri), bytes_of(fresh.published.uri)
    assert {k: v for k, v in ours.items() if k != "manifest.json"} == {
        k: v for k, v in theirs.items() if k != "manifest.json"
    }


def test_loosening_a_bound_whose_texts_were_not_kept_extracts_again(tmp_path):
    strict = ("extract.keep_rejected_text=0.0", "gopher_quality.word_count=[300, 100000]")
    go(quickstart_config(tmp_path / "r", *strict, samples="{debian-handbook}"), only="extract")
    loose = quickstart_config(
        tmp_path / "r", "extract.keep_rejected_text=0.0", samples="{debian-handbook}"
    )
    go(loose, only="extract")
    [commit] = results.all_commits(str(tmp_path / "r"), read_state(str(tmp_path / "r")))["extract"]
    assert not commit.result.reapplied


def test_new_inputs_are_appended_and_old_ones_not_extracted_again(tmp_path):
    go(quickstart_config(tmp_path / "r", samples="{sqlite3-doc}"))
    outcome, progress = go(
        quickstart_config(tmp_path / "r", samples="{debian-handbook,sqlite3-doc}")
    )
    assert progress.ran["extract"] == ["000001"]
    assert outcome.published.name == "gen-0002"
    assert len(verify_path(str(tmp_path / "r"))) == 2


@pytest.mark.parametrize(
    "pick, expected",
    [
        (
            lambda row, keep: row["rejected_by"] == "gopher_quality.word_count",
            {"fate": "rejected", "rule": "gopher_quality.word_count"},
        ),
        (lambda row, keep: keep is not None and not keep["keep"], {"fate": "duplicate"}),
    ],
)
def test_why_explains_a_document(done, pick, expected):
    folder, _, _ = done
    go(quickstart_config(folder))
    keep = {r["doc_id"]: r for t in export.tables(str(folder), "keep") for r in t.to_pylist()}
    rows = [r for t in export.tables(str(folder), "documents") for r in t.to_pylist()]
    row = next(r for r in rows if pick(r, keep.get(r["doc_id"])))
    fate = next(f for f in why.why(str(folder), row["url"]) if f["doc_id"] == row["doc_id"])
    assert expected.items() <= fate.items()
    if expected["fate"] == "duplicate":
        assert (
            fate["kept_copy"]["doc_id"] == keep[row["doc_id"]]["kept_id"]
            and fate["kept_copy"]["url"]
        )
    else:
        assert not fate["bound"][0] <= fate["value"] <= fate["bound"][1]


def test_why_finds_the_rows_of_a_published_document(done):
    folder, outcome, _ = done
    go(quickstart_config(folder))
    corpus = next(t for t in export.tables(str(folder), "corpus") if t.num_rows).to_pylist()[0]
    fate = next(f for f in why.why(str(folder), corpus["url"]) if f["doc_id"] == corpus["doc_id"])
    assert fate["fate"] == "published" and fate["generations"][0]["name"] == "gen-0001"
    assert fate["text"] == corpus["text"]


def test_why_finds_a_page_without_url_by_its_place(tmp_path):
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body>A page.</body></html>"
    record = (
        f"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    ).encode() + block
    members = [gzip.compress(record + b"\r\n\r\n") for _ in range(2)]
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pages [1] caf\xe9.warc.gz"))
    path.write_bytes(b"".join(members))
    run_inline(make_config(tmp_path, [tmp_path]), until="extract")
    assert r"caf\xe9" in Path(write_report(str(tmp_path / "run"))).read_text()
    path = Path(printable(str(path)))
    for place in (str(path), path.name):
        (fate,) = why.why(str(tmp_path / "run"), f"{place}:{len(members[0])}")
        assert (fate["rule"], fate["warc_offset"]) == ("warc.no_url", len(members[0]))
    assert why.why(str(tmp_path / "run"), f"{path}:1") == []


def test_export_writes_every_row(done, tmp_path):
    folder, _, _ = done
    for kind in ("documents", "keep", "corpus", "rejected"):
        lines = export.export(
            str(folder), kind, format="jsonl", output=str(tmp_path / f"{kind}.jsonl")
        )
        rows = export.export(
            str(folder), kind, format="parquet", output=str(tmp_path / f"{kind}.parquet")
        )
        assert lines == rows == pq.read_metadata(tmp_path / f"{kind}.parquet").num_rows > 0
        assert all(json.loads(line) for line in (tmp_path / f"{kind}.jsonl").open())


def test_status_counts_units_and_rows(done):
    folder, _, _ = done
    state = run_status(str(folder))
    assert (state.phases["extract"].done, state.phases["extract"].left) == (2, 0)
    assert state.stage == "done" and state.generation


def documents_of(run):
    return [r for t in export.tables(str(run), "documents") for r in t.to_pylist()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_text_inputs_go_through_everything_but_extraction(tmp_path, format):
    texts = [r["text"] for t in _sample_texts() for r in t][:30]
    rows = [
        {"body": text, "key": f"k{n}", "link": f"https://a.example/{n}"}
        for n, text in enumerate(texts)
    ]
    rows += [
        {"body": None, "key": "none", "link": None},
        {"body": texts[0], "key": "copy", "link": None},
    ]
    if format == "jsonl":
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(
            gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows) + b"{broken\n")
            + b"junk"
        )
    else:
        path = tmp_path / "in.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = ("input.text_column=body", "input.id_column=key", "input.url_column=link")
    config = quickstart_config(
        tmp_path / "r", f"input.format={format}", f'input.paths=["{path}"]', *columns
    )
    outcome, _ = go(config)
    documents = {r["source_id"]: r for r in documents_of(tmp_path / "r")}
    assert documents["none"]["rejected_by"] == "input.no_text"
    if format == "jsonl":
        status = run_status(str(tmp_path / "r")).phases["extract"]
        assert status.damage["000000"].startswith(f"{path}: at byte {path.stat().st_size - 4:,} ")
        reasons = [r["rejected_by"] for r in documents_of(tmp_path / "r") if not r["source_id"]]
        assert reasons == ["input.bad_json", "input.damaged"]
    keep = {
        r["doc_id"]: r for t in export.tables(str(tmp_path / "r"), "keep") for r in t.to_pylist()
    }
    if documents["copy"]["rejected_by"] is None:
        assert (
            keep[documents["copy"]["doc_id"]]["cluster_id"]
            == keep[documents["k0"]["doc_id"]]["cluster_id"]
        )
    assert outcome.published.manifest["documents"] > 0


def _sample_texts():
    from trafilatura import extract

    from stages.read.warc import ReadStats, read_records

    records = read_records(
        str(ROOT / "samples" / "sqlite3-doc.warc.gz"), max_payload_bytes=10**7, stats=ReadStats()
    )
    yield [
        {"text": extract(r.payload.decode("utf-8", "replace")) or ""}
        for r in records
        if r.skipped is None
    ][:40]


def test_a_unit_that_fails_is_recorded_named_and_tried_again(tmp_path):
    good, bad = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["one two three"]}), good)
    pq.write_table(pa.table({"wrong": ["x"]}), bad)
    config = quickstart_config(
        tmp_path / "r", "input.format=parquet", f'input.paths=["{good}", "{bad}"]'
    )
    with pytest.raises(
        RunFailed,
        match=r"1 of 2 units of 'extract' failed .*\n.*000001: ValueError: .*no column 'text'; it has wrong",
    ):
        go(config)
    assert run_status(str(tmp_path / "r")).phases["extract"].failed == 1
    tolerant = quickstart_config(
        tmp_path / "r",
        "input.format=parquet",
        f'input.paths=["{good}", "{bad}"]',
        "run.max_failed_share=0.5",
    )
    outcome, progress = go(tolerant)
    assert outcome.failed["extract"][0].startswith("000001") and progress.ran["extract"] == [
        "000001"
    ]
    pq.write_table(pa.table({"text": ["four five six"]}), bad)
    outcome, _ = go(tolerant)
    assert outcome.failed == {}


def test_a_run_may_end_after_its_first_stage(tmp_path):
    config = quickstart_config(tmp_path / "r", samples="{debian-handbook}")
    progress = RecordedProgress()
    outcome = execute(config, progress, in_process, last="extract")
    assert outcome.published is None and outcome.failed == {}
    assert progress.stages() == {"extract"}
    assert go(config)[1].stages() == {"dedup", "refine", "pack"}


def test_units_end_before_the_lease_when_the_run_fails_in_between(tmp_path):
    config = make_config(tmp_path, [ROOT / "samples" / "debian-handbook.warc.gz"])
    held = []

    def run_units(*arguments):
        try:
            yield from in_process(*arguments)
        finally:
            held.append(is_held(config.run.directory))

    class Broken(RecordedProgress):
        def advance(self, phase, done):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        execute(config, Broken(), run_units)
    assert held == [True] and not is_held(config.run.directory)


def test_a_done_unit_is_not_done_again_and_a_stale_commit_is_withdrawn(tmp_path):
    from pipeline.engine.units import PhaseWork, run_unit
    from stages.storage.ledger import Commit, Store, Unit

    store, calls = Store(str(tmp_path)), []

    def work(unit, plan, store):
        calls.append(store.commit_of(unit.name))
        return Commit(unit.name, unit.fingerprint)

    task = PhaseWork(work, None, store, 1, "i")
    # more often than there are attempts: a task that is retried after its commit
    for fingerprint in (
        "a",
        "a",
        "a",
    ):
        assert run_unit(Unit("u", fingerprint, ExtractTask("u", 0)), task).error is None
    assert (
        run_unit(
            Unit("u", "b", ExtractTask("u", 0)), task._replace(invocation="j")
        ).commit.fingerprint
        == "b"
    )
    assert calls == [None, None]  # no commit of "a" stood while "b" was at work


@pytest.mark.kill
@pytest.mark.ray
def test_a_unit_that_kills_its_worker_again_and_again_is_recorded_as_failed(ray_session, tmp_path):
    from pipeline.engine.units import PhaseWork, Resources
    from stages.storage.ledger import Store, Unit

    task = PhaseWork(_die_or_work, None, Store(str(tmp_path)), 2, "i")
    units = [Unit("bad", "f", ExtractTask("bad", 0)), Unit("good", "f", ExtractTask("good", 0))]
    ends = {done.unit: done for done in on_ray()("dies", task, units, Resources(1.0, 100_000_000))}
    assert "its worker died 2 times (the kernel killed none for memory" in ends["bad"].error
    assert ends["good"].commit.rows_in == 7


@pytest.mark.ray
def test_a_stage_that_asks_for_more_memory_than_any_node_has_still_runs(ray_session, tmp_path):
    from pipeline.engine.units import PhaseWork, Resources
    from stages.storage.ledger import Store, Unit

    # Ray would wait for such a node for ever
    task = PhaseWork(_die_or_work, None, Store(str(tmp_path)), 2, "i")
    [done] = on_ray()(
        "large", task, [Unit("good", "f", ExtractTask("good", 0))], Resources(1.0, 10**15)
    )
    assert done.commit.rows_in == 7


def _die_or_work(unit, plan, store):
    from stages.storage.ledger import Commit

    if unit.name == "bad":
        os._exit(1)
    return Commit(unit.name, unit.fingerprint, rows_in=7)


def test_from_refuses_when_what_comes_before_is_not_done(tmp_path):
    with pytest.raises(RunFailed, match="stage 'extract' has 2 of 2 units to do under this config"):
        go(quickstart_config(tmp_path / "r"), first="dedup")


def test_dry_run_plans_without_writing(tmp_path):
    [phase] = plan(quickstart_config(tmp_path / "r"), only=None, first=None)
    assert (phase.name, len(phase.pending)) == ("extract", 2)
    assert not (tmp_path / "r").exists()


def hold_lease(folder):
    with lease(folder):
        print("held", flush=True)
        time.sleep(600)


def test_a_second_run_in_the_same_directory_is_refused_naming_the_first(tmp_path):
    command = call_command(hold_lease, tmp_path)
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    try:
        with (
            pytest.raises(Held, match=f"is in use by process {first.pid} on "),
            lease(str(tmp_path)),
        ):
            pass
    finally:
        first.kill()
        first.wait()
    with lease(str(tmp_path)):  # a killed run frees it at once
        pass


# tests/pipeline/test_dedup_command.py kills in all of dedup
PHASES = [
    "extract",
    "dedup match",
    "dedup keep",
    "refine",
    "pack",
]


@pytest.mark.ray
@pytest.mark.kill
def test_killed_at_every_stage_the_shards_are_the_same_bytes(done, tmp_path):
    """SIGKILL to the driver at a random moment of each phase; the same command goes on; nothing
    differs at the end.
    """
    folder, outcome, _ = done
    config = quickstart_config(tmp_path / "r")
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / "quickstart.toml")]
    command += [f"{key}={value}" for key, value in _overrides(config).items()]
    draw = random.Random("kill moments")
    for phase in PHASES:
        _kill_during(command, tmp_path / "r", phase, draw.uniform(0.0, 0.6))
    final = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert final.returncode == 0, final.stderr
    assert bytes_of(tmp_path / "r" / "generations" / "gen-0001") == _undisturbed(outcome)
    assert verify_path(str(tmp_path / "r"))[0].faults == []


def _undisturbed(outcome):
    return bytes_of(outcome.published.uri)


def _overrides(config):
    return {
        "run.directory": config.run.directory,
        "input.paths": json.dumps(list(config.input.paths)),
        "extract.engine": "resiliparse",
        "pack.seq_len": 512,
    }


def _kill_during(command, run, phase, delay):
    """Start the run, wait until it is in the phase, wait a little, kill it.

    It may have passed the phase by then: fine.
    """
    # a session of its own, so that the kill takes the driver alone and Ray's processes find out for
    # themselves
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    names = list(SPECS)
    reached = [*names[names.index(phase) :], "done"]
    while process.poll() is None:
        try:
            state = json.loads((run / "run.json").read_bytes())
            if (
                state.get("process")
                and state["process"]["pid"] == process.pid
                and state.get("stage") in reached
            ):
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.ray
def test_calibrate_then_run_then_ablate_from_the_command_line(ray_session, tmp_path):
    from typer.testing import CliRunner

    from pipeline.__main__ import app

    def call(command, *arguments):
        result = CliRunner().invoke(
            app, [command, str(ROOT / "configs" / "quickstart.toml"), *line, *arguments, "--json"]
        )
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    line = [
        f"run.directory={tmp_path}/r",
        f"input.paths=['{ROOT}/samples/debian-handbook.warc.gz']",
        "pack.seq_len=512",
    ]
    line += [
        "extract.engine=resiliparse",
        'perplexity.perplexity=["p10", "p60"]',
        f"perplexity.model={ROOT}/models/wiki-en.5gram.bin",
    ]
    line += [f"quality.model={ROOT}/models/quality-en.ftz"]
    bounds = call("calibrate", "--sample", "200")["bounds"]
    assert "percentiles p10 to p60" in bounds["perplexity.perplexity"]["origin"]
    counts = {row["rule"] or row["unit"]: row["count"] for row in call("run")["funnel"]}
    measured = (
        counts["documents"] + counts["perplexity.perplexity"] + counts.get("quality.score", 0)
    )
    assert counts["perplexity.perplexity"] == pytest.approx(measured / 2, abs=2)
    ablated = call("ablate", "--drop", "perplexity")
    assert ablated["before"]["documents"] == counts["documents"] and ablated["only_before"] == 0
    assert (
        ablated["only_after"] == ablated["after"]["documents"] - ablated["before"]["documents"] > 0
    )
