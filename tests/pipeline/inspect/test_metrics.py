"""The metrics of a run or series for Prometheus, the dashboard that shows them, and the log for
collectors.
"""

import dataclasses
import json
import re
import shutil
import urllib.request
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.engine.units import in_process
from pipeline.inspect import metrics
from pipeline.inspect.metrics import Metrics, serve
from pipeline.run import results
from pipeline.run.state import read_state
from stages.extract.extract import ExtractResult
from stages.storage.catalog import read_catalog
from stages.storage.ledger import Commit, Output
from tests.support.inline import make_config, run_inline
from tests.support.paths import ROOT
from tests.support.series import run_one_batch, series_config, write_listing
from trainer.telemetry.feedback import Report, Source
from trainer.telemetry.feedback_writer import Writer

PLAIN = (
    "input.format=jsonl",
    "input.url_column=url",
    "language.allowed=[]",
    "extract.filters=[]",
    "refine.filters=[]",
)


def parsed(text, parse=text_string_to_metric_families):
    """Values by (name without prefix, labels but `run`); asserts that no number is given
    twice.
    """
    values = {}
    for sample in (s for family in parse(text) for s in family.samples):
        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "run"))
        key = (sample.name.removeprefix("gristmill_"), *labels)
        assert key not in values
        values[key] = sample.value
    return values


def scraped(root):
    """What one scrape gives, and what it could not read."""
    faults = []
    return parsed(generate_latest(Metrics(str(root), faults.append)).decode()), faults


def write_feedback(root, *, rows, speed, state="running"):
    sources = {str(root): Source("gen-0001", {"gen-0001": rows}, 1, 1.0)}
    report = Report(
        state, 5, 700, 900, speed and speed / 2, speed, 0.25, 0.4, None, 9.0, 3, sources, None, None
    )
    Writer(f"{root}/feedback", trainer="tiny", every_seconds=30.0).close(report)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Two batches of a listing, and a trainer who has read one row."""
    folder = tmp_path_factory.mktemp("metrics")
    settings = series_config(folder, write_listing(folder / "crawl"))
    run_one_batch(settings)
    write_feedback(folder / "series", rows=1, speed=50.0)
    run_one_batch(settings, inputs=3)
    return folder / "series"


@pytest.fixture
def copy(series, tmp_path):
    """The series, to be broken."""
    return Path(shutil.copytree(series, tmp_path / "series"))


def test_the_numbers_are_those_of_the_files(series):
    values, faults = scraped(series)
    assert (faults, values["up",]) == ([], 1)
    for batch, inputs in (("0001", 4), ("0002", 3)):
        root = f"{series}/batches/{batch}"
        commits = results.all_commits(root, read_state(root))
        for phase, stage in (
            ("extract", "extract"),
            ("dedup keep", "dedup"),
            ("refine", "refine"),
            ("pack", "pack"),
        ):
            counts = sum((Counter(c.counts) for c in commits[phase]), Counter())
            assert {
                k[2][1]: v
                for k, v in values.items()
                if k[0] == "documents_total" and k[1:][0][1] == batch and k[3][1] == stage
            } == counts
            assert sum(counts.values()) == sum(c.rows_in for c in commits[phase]) > 0
        labels = (("batch", batch), ("phase", "extract"))
        assert (
            values["units", *labels, ("state", "done")] == inputs
            and values["units", *labels, ("state", "left")] == 0
        )
        assert values["written_bytes_total", *labels] == sum(
            o.bytes for c in commits["extract"] for o in c.outputs
        )
        assert (
            values["read_bytes_total", *labels]
            == sum(c.result.bytes_in for c in commits["extract"])
            > 0
        )
        assert values["cpu_seconds_total", *labels] == pytest.approx(
            sum(c.cpu_seconds for c in commits["extract"])
        )
        assert values["last_commit_timestamp_seconds", *labels] == max(
            c.finished for c in commits["extract"]
        )
        assert values["rows_per_second", *labels] > 0
    tokens = [e["tokens"] for e in read_catalog(str(series))]
    assert (values["published_generations_total",], values["published_tokens_total",]) == (
        2,
        sum(tokens),
    )
    assert values["published_timestamp_seconds",] == pytest.approx(
        (series / "catalog.jsonl").stat().st_mtime
    )


def test_supply_and_demand_are_those_of_the_moment_and_the_state_that_of_the_last_decision(series):
    values, _ = scraped(series)
    [first, second] = read_catalog(str(series))
    unread = first["tokens"] * (first["rows"] - 1) // first["rows"] + second["tokens"]
    # the last decision was made before the second generation was there
    assert values["supply_tokens",] == unread and values["supply_seconds",] == pytest.approx(
        unread / 50.0
    )
    assert values["demand_tokens_per_second",] == 50.0
    states = {key[1][1]: value for key, value in values.items() if key[0] == "decision_state"}
    assert sum(states.values()) == 1 and states["STARVED"] == 1 and len(states) == 5
    assert values["inputs_left",] == 10 - 4 - 3
    tiny = ("trainer", "tiny")
    assert {
        n: values[f"trainer_{n}", tiny]
        for n in ("consumed_tokens", "restarts_total", "mfu_ratio", "data_wait_ratio")
    } == {
        "consumed_tokens": 700,
        "restarts_total": 3,
        "mfu_ratio": 0.4,
        "data_wait_ratio": 0.25,
    }
    assert (
        values["trainer_processed_tokens_total", tiny] == 900
        and values["trainer_tokens_per_second", tiny] == 25.0
    )
    assert (
        values["trainer_state", ("state", "running"), tiny] == 1
        and values["trainer_state", ("state", "failed"), tiny] == 0
    )


def test_a_trainer_that_has_just_restarted_is_as_fast_as_at_the_last_decision(copy):
    write_feedback(copy, rows=1, speed=None)
    values, faults = scraped(copy)
    assert faults == [] and values["demand_tokens_per_second",] == 50.0


BROKEN = {
    "batches/0001/extract/*/commits/000000.json": "documents_total",
    "batches/0002/extract/*/units.json": "units",
    "batches/0001/run.json": "documents_total",
    "batches/0002/run.json": "documents_total",
    "batches/0002/batch.json": "units",
    "decisions.jsonl": "decision_state",
    "catalog.jsonl": "published_tokens_total",
    "feedback/tiny.json*": "trainer_state",
}


@pytest.mark.parametrize("garbage", [b"{", b"null", b'["a"]', b"\xff\x00"])
@pytest.mark.parametrize("pattern", BROKEN)
def test_a_broken_file_is_told_and_the_rest_is_served(series, copy, pattern, garbage):
    """Broken as a disk or a person may leave it; once it is whole again, all is served again."""
    whole, _ = scraped(series)
    files = list(copy.glob(pattern))
    before = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(garbage)
    faults = []
    collector = Metrics(str(copy), faults.append)
    values = parsed(generate_latest(collector).decode())
    assert files and values["up",] == 0
    # a fault names the file, or the folder of its phase
    assert any(str(file).startswith(line.split(": ")[0]) for file in files for line in faults), (
        faults
    )
    # nothing that other files say is missing
    others = {name for other, name in BROKEN.items() if other != pattern}
    assert [name for name in others if not any(key[0] == name for key in values)] == []
    # counters of an unreadable catalog are left out: a 0 would read as a reset
    assert (("published_generations_total",) in values) == (pattern != "catalog.jsonl")
    for file, data in zip(files, before, strict=True):
        file.write_bytes(data)
    assert parsed(generate_latest(collector).decode()).keys() == whole.keys()


def test_a_fault_is_told_once_for_as_long_as_it_stands(copy):
    faults = []
    collector = Metrics(str(copy), faults.append)
    (copy / "catalog.jsonl").write_text("{")
    for _ in range(3):
        collector.collect()
    assert (
        len(faults) == 1
        and "catalog.jsonl: GenerationError" in faults[0]
        and collector.faults == set(faults)
    )
    shutil.copy(copy / "inputs.jsonl", copy / "catalog.jsonl")
    collector.collect()
    assert len(faults) == 2 and "KeyError" in faults[1]


def test_what_is_no_run_is_down_and_exits_1(tmp_path):
    result = CliRunner().invoke(app, ["metrics", str(tmp_path)])
    assert result.exit_code == 1 and parsed(result.stdout)["up",] == 0
    assert "is not a run directory" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_series_that_waits_for_its_first_batch_is_up(tmp_path):
    settings = series_config(tmp_path, write_listing(tmp_path / "crawl"))
    assert run_one_batch(settings, inputs=0).batch is None
    values, faults = scraped(tmp_path / "series")
    assert faults == [] and values["up",] == 1 and values["inputs_left",] == 10
    run_one_batch(settings, inputs=2)
    run_one_batch(settings, inputs=0)  # the listing was as short already when this was decided
    assert scraped(tmp_path / "series")[0]["inputs_left",] == 8
    # begun, and cut off before its run began
    batch = tmp_path / "series" / "batches" / "0002"
    batch.mkdir(parents=True)
    (batch / "batch.json").write_text(
        json.dumps({"inputs": [{"ordinal": 0, "path": "0"}], "started": 1.0})
    )
    values, faults = scraped(tmp_path / "series")
    assert faults == [] and values["up",] == 1 and values["inputs_left",] == 7


def test_only_the_newest_batches_tell_of_their_units(series, monkeypatch):
    monkeypatch.setattr(metrics, "BATCHES", 1)
    values, _ = scraped(series)
    assert {dict(key[1:])["batch"] for key in values if key[0] == "units"} == {"0002"}
    assert values["published_generations_total",] == 2


def test_a_run_by_itself_has_no_batch_and_its_trainer_a_supply(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{n} mills grind", "url": f"https://a.example/{n}"}) + "\n"
            for n in range(9)
        )
    )
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b torn")
    config = make_config(
        tmp_path,
        [tmp_path / "in.jsonl", tmp_path / "torn.jsonl.gz"],
        *PLAIN,
        "pack.seq_len=8",
        "run.max_failed_share=0.5",
    )
    run_inline(config)
    root = config.run.directory
    write_feedback(root, rows=0, speed=2.0)
    values, faults = scraped(root)
    assert faults == [] and not any(key[0].startswith("decision") for key in values)
    extract = (("batch", ""), ("phase", "extract"))
    assert {
        s: values["units", *extract, ("state", s)]
        for s in ("done", "failed", "quarantined", "left")
    } == {
        "done": 1,
        "failed": 1,
        "quarantined": 0,
        "left": 0,
    }
    assert values["supply_seconds",] == values["published_tokens_total",] / 2.0 > 0


def empty_store():
    """In memory, which looks through all that it holds for each listing."""
    fsspec.filesystem("memory").store.clear()
    return "memory://metrics/run"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["extract", "kept", "bytes_in"]), inner, max_size=2)
    ),
    max_leaves=3,
)
COMMIT = Commit(
    "000000",
    "f",
    3,
    2,
    {"kept": 2, "c4.lorem": 1},
    result=ExtractResult(bytes_in=9),
    outputs=[Output("documents/000000.parquet", 4, "0")],
    seconds=1.0,
    cpu_seconds=0.5,
    finished=7.0,
)
FILES = {
    "run.json": {
        "keys": dict.fromkeys(("extract", "graph", "dedup", "refine", "ner", "pack"), "k"),
        "config": {},
        "history": [{"started": 1.0}],
    },
    "extract/k/units.json": {"000000": "f", "000001": "f"},
    "extract/k/commits/000000.json": dataclasses.asdict(COMMIT),
    "extract/k/failures/000001.json": {"unit": "000001", "error": "no", "quarantined": "f"},
    "catalog.jsonl": {"name": "gen-0001", "manifest_sha256": "0", "rows": 3, "tokens": 60},
}


@given(st.sampled_from([(file, key) for file, content in FILES.items() for key in content]), JSON)
def test_whatever_stands_in_a_file_something_is_served(place, value):
    """One value of a good file is any other; metrics of the other files stay the same."""
    root = empty_store()
    for file, content in FILES.items():
        changed = content | {place[1]: value} if file == place[0] else content
        fsspec.filesystem("memory").pipe_file(f"{root}/{file}", json.dumps(changed).encode())
    values, faults = scraped(root)
    assert values["up",] == (not faults)
    if place[0] == "catalog.jsonl":
        assert (
            values["documents_total", ("batch", ""), ("reason", "c4.lorem"), ("stage", "extract")]
            == 1
        )
    elif place[0] != "run.json":
        assert values["published_tokens_total",] == 60


def test_it_is_served_afresh_in_both_formats(copy):
    address, _ = serve(Metrics(str(copy), lambda fault: None), host="127.0.0.1", port=0)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(**headers):
        with opener.open(urllib.request.Request(address, headers=headers)) as answer:
            return answer.headers["Content-Type"], answer.read().decode()

    kind, text = get()
    assert kind.startswith("text/plain") and parsed(text) == scraped(copy)[0]
    write_feedback(copy, rows=2, speed=10.0, state="stopped")
    kind, text = get(Accept="application/openmetrics-text")
    values = parsed(text, parse_openmetrics)
    assert (
        kind.startswith("application/openmetrics-text")
        and values["trainer_state", ("state", "stopped"), ("trainer", "tiny")] == 1
    )
    assert "supply_seconds" not in {key[0] for key in values}  # nobody reads any more


def test_a_run_on_an_object_store_tells_the_same(series, s3_bucket):
    fs = fsspec.filesystem("s3")
    files = [path for path in series.rglob("*.json*") if "generations" not in path.parts]
    fs.pipe({f"{s3_bucket}/series/{path.relative_to(series)}": path.read_bytes() for path in files})
    there, faults = scraped(f"{s3_bucket}/series")
    here, _ = scraped(series)
    clocks = {("published_timestamp_seconds",), ("trainer_timestamp_seconds", ("trainer", "tiny"))}
    assert faults == [] and there.keys() == here.keys()
    assert {k: v for k, v in there.items() if k not in clocks} == {
        k: v for k, v in here.items() if k not in clocks
    }


# --- the dashboard --------------------------------------------------------------------------------


def test_the_dashboard_asks_for_metrics_that_there_are(series):
    """Ours are printed for a real series; Ray's are those of the dashboards that Ray brings."""
    board = json.loads((ROOT / "configs" / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [
        variable["definition"]
        for variable in board["templating"]["list"]
        if variable["type"] == "query"
    ]
    ray = (
        Path(__import__("ray").__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    )
    rays = set(
        re.findall(r"\bray_\w+", "".join(path.read_text() for path in ray.glob("*_panels.py")))
    )
    text = generate_latest(Metrics(str(series), lambda fault: None)).decode()
    ours = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    shown = set()
    for expr in asked:
        names = re.findall(r"\b(?:gristmill|ray)_\w+", expr)
        assert names and set(names) <= ours.keys() | rays, expr
        shown |= set(names)
        for name, matchers in re.findall(r"(gristmill_\w+)\{([^}]*)\}", expr):
            assert set(re.findall(r"(\w+)=~?\"", matchers)) <= ours[name], expr
        assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}")
    assert ours.keys() <= shown
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


# --- the log --------------------------------------------------------------------------------------


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr("pipeline.engine.dispatch.on_ray", lambda *_, **__: in_process)


def logged(*arguments):
    """What a command came to, and its lines: all of standard error but what it ends on for people."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result, [json.loads(line) for line in result.stderr.partition("error ")[0].splitlines()]


def test_a_log_has_a_line_for_each_unit(tmp_path, without_ray):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"text": "The old mill by the river grinds wheat."})
    )
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b torn")
    make_config(tmp_path, [tmp_path / "in.jsonl", tmp_path / "torn.jsonl.gz"])
    line = [
        "run",
        tmp_path / "config.toml",
        *PLAIN,
        "input.url_column=",
        "pack.seq_len=8",
        "--log",
        "json",
    ]
    result, lines = logged(*line, "run.max_failed_share=0.5")
    assert result.exit_code == 3 and {entry["run"] for entry in lines} == {f"{tmp_path}/run"}
    assert all(
        {"time", "level", "stage", "unit", "event", "seconds", "error"} <= entry.keys()
        for entry in lines
    )
    units = [entry for entry in lines if entry["unit"]]
    [failed] = [entry for entry in units if entry["level"] == "error"]
    assert (failed["stage"], failed["unit"], failed["event"]) == (
        "extract",
        "000001",
        "failed",
    ) and f"{tmp_path}/torn.jsonl.gz: " in failed["error"]
    done = {
        (entry["phase"], entry["unit"])
        for entry in units
        if entry["event"] == "done" and entry["seconds"] is not None
    }
    commits = results.all_commits(f"{tmp_path}/run", read_state(f"{tmp_path}/run"))
    assert done == {(phase, c.unit) for phase, listed in commits.items() for c in listed}
    assert [e["event"] for e in lines if e["phase"] == "refine"] == ["begin", "done", "end"]

    result, lines = logged(*line)
    assert (
        result.exit_code == 1
        and lines[-1]["event"] == "stopped"
        and "1 of 2 units of 'extract' failed" in lines[-1]["error"]
    )
    assert lines[0] | {"time": None} == {
        "time": None,
        "level": "info",
        "run": f"{tmp_path}/run",
        "stage": "extract",
        "phase": "extract",
        "event": "begin",
        "unit": None,
        "seconds": None,
        "error": None,
        "units": 2,
        "done": 1,
    }


def test_a_batch_logs_where_the_environment_says_so(tmp_path, without_ray, monkeypatch):
    write_listing(tmp_path / "crawl")
    monkeypatch.setenv("GRISTMILL_LOG", "json")
    plain = [
        *PLAIN,
        f"run.directory={tmp_path}/series",
        f"input.paths=['{tmp_path}/crawl/*.jsonl']",
        "pack.seq_len=64",
    ]
    (tmp_path / "empty.toml").write_text("")
    result, lines = logged("batch", tmp_path / "empty.toml", *plain, "--inputs", "2")
    assert result.exit_code == 0
    assert [e["unit"] for e in lines if e["phase"] == "extract" and e["unit"]] == [
        "000000",
        "000001",
    ]
    assert {entry["run"] for entry in lines} == {f"{tmp_path}/series/batches/0001"}
