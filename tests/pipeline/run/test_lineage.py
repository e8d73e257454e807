"""A rerun supersedes what it covers, batches and other inputs add, and trainers read no document
twice.
"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.engine.units import in_process
from pipeline.inspect.verify import verify_path
from pipeline.run import publish as publishing
from pipeline.run.execute import execute, plan
from pipeline.run.inputs import Input, require_columns
from pipeline.run.lineage import Origin, succession
from stages.formats.errors import ConfigError
from stages.read.records import InputConfig
from stages.storage.catalog import current_entries, entries_to_read, read_catalog
from stages.storage.files import replace_if, write_atomically
from tests.support.inline import Silent, make_config
from tests.support.quickstart import bytes_of
from tests.support.series import document_text

FIXED = (
    "input.format=jsonl",
    "extract.filters=[]",
    "refine.filters=[]",
    "pack.seq_len=64",
    "dedup.enabled=false",
    "language.allowed=[]",
)
SHORT = "pack.seq_len=32"


def write_inputs(folder, *names):
    for name in names:
        numbers = range(10 * ord(name), 10 * ord(name) + 4)
        rows = [json.dumps({"text": document_text(n)}) + "\n" for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def go(folder, names, *overrides, **options):
    config = make_config(folder, [folder / f"{n}.jsonl" for n in names], *FIXED, *overrides)
    return execute(config, Silent(), in_process, **options).published


def catalog(folder):
    return {e["name"]: e for e in read_catalog(str(folder / "run"))}


def current(folder):
    return [e["name"] for e in current_entries(read_catalog(str(folder / "run")))]


# --- the rule -------------------------------------------------------------------------------------


def entry(run, name, origin, found):
    """Publish nothing but what the rule reads."""
    folder = run / "generations" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"sources": dict.fromkeys(origin.inputs, 1)}))
    return {
        "name": name,
        "run": origin.run,
        "listing": origin.listing,
        "lineage": found.lineage or name,
        "supersedes": list(found.supersedes),
    }


INPUTS = st.frozensets(st.sampled_from("abcde"), min_size=1)
ORIGINS = st.builds(
    Origin,
    run=st.sampled_from([".", "elsewhere"]),
    inputs=INPUTS,
    listing=st.sampled_from(["", "x", "y"]),
)


@given(st.lists(ORIGINS, max_size=8), st.integers(0, 7))
def test_nobody_reads_an_input_twice(tmp_path_factory, origins, begin):
    """Neither a training that begins at the end, nor one that began in between and goes on.

    The latter may, of an input that a listing lost and that another run then published.
    """
    run, entries, begun = tmp_path_factory.mktemp("run"), [], []
    inputs, shortened = {}, False
    for number, origin in enumerate(origins):
        try:
            found = succession(str(run), entries, origin)
        except ConfigError as error:
            # it would have come twice, or the directory is another run's
            assert any(inputs[e["name"]] & origin.inputs for e in current_entries(entries)) or any(
                e["run"] == origin.run for e in entries
            )
            assert "--new-lineage" in str(error)
            continue
        name = f"gen-{len(entries) + 1:04d}"
        entries.append(entry(run, name, origin, found))
        inputs[name], shortened = origin.inputs, shortened or bool(found.warnings)
        assert entries[-1] in current_entries(entries)
        if number == begin:
            begun = [e["name"] for e in entries_to_read(entries)]
        for to_read in [entries_to_read(entries)] + [entries_to_read(entries, begun)] * (
            not shortened
        ):
            read = [i for e in to_read for i in inputs[e["name"]]]
            assert len(read) == len(set(read))
    assert [e["name"] for e in entries_to_read(entries, begun)][: len(begun)] == begun
    shutil.rmtree(run)


def test_entries_of_earlier_versions_supersede_nothing():
    entries = [{"name": "gen-0001"}, {"name": "gen-0002"}]
    assert entries_to_read(entries) == current_entries(entries) == entries


# --- runs -----------------------------------------------------------------------------------------


def test_a_rerun_with_another_policy_supersedes_and_the_same_again_changes_nothing(tmp_path):
    write_inputs(tmp_path, "a", "b")
    assert go(tmp_path, "ab").name == "gen-0001"
    assert not go(tmp_path, "ab").new and not go(tmp_path, "ab").new
    assert go(tmp_path, "ab", SHORT).name == "gen-0002" and current(tmp_path) == ["gen-0002"]
    # back to what was superseded: published again, or trainers would read the other
    assert go(tmp_path, "ab").name == "gen-0003" and current(tmp_path) == ["gen-0003"]
    lineages = {e["lineage"] for e in catalog(tmp_path).values()}
    assert lineages == {"gen-0001"}
    assert [r.faults for r in verify_path(str(tmp_path / "run"))] == [[], [], []]


def test_more_inputs_supersede_and_fewer_only_if_the_listing_has_lost_them(tmp_path, caplog):
    write_inputs(tmp_path, "a", "b")
    go(tmp_path, "a")
    assert go(tmp_path, "ab").manifest["supersedes"] == ["gen-0001"]
    with pytest.raises(ConfigError, match="1 inputs of this config are in gen-0002 as well"):
        go(tmp_path, "a")
    listed = [f"input.paths=['{tmp_path}/*.jsonl']"]
    assert go(tmp_path, "ab", *listed).name == "gen-0002"  # the same content
    go(tmp_path, "ab", *listed, SHORT)
    (tmp_path / "b.jsonl").unlink()
    caplog.clear()
    assert go(tmp_path, "a", *listed, SHORT).manifest["supersedes"] == ["gen-0003"]
    assert f"1 inputs of gen-0003 are no longer listed, first: {tmp_path}/b.jsonl" in caplog.text


def test_other_inputs_are_refused_before_anything_is_written_unless_for_a_new_lineage(tmp_path):
    write_inputs(tmp_path, "a", "b")
    go(tmp_path, "a")
    before = {
        p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*") if p.name[:5] != "lease"
    }
    config = make_config(tmp_path, [tmp_path / "b.jsonl"], *FIXED)
    for refused in (
        lambda: execute(config, Silent(), in_process),
        lambda: plan(config, only=None, first=None),
    ):
        with pytest.raises(ConfigError, match=r"gen-0001 has other inputs .*--new-lineage"):
            refused()
    assert {p: p.read_bytes() for p in before} == before
    assert go(tmp_path, "b", new_lineage=True).name == "gen-0002"
    assert current(tmp_path) == ["gen-0001", "gen-0002"]
    # each is rerun by itself from here on
    assert go(tmp_path, "b", SHORT).manifest["lineage"] == "gen-0002"
    assert go(tmp_path, "a", SHORT).manifest["lineage"] == "gen-0001"
    assert current(tmp_path) == ["gen-0003", "gen-0004"]
    # and one config of both replaces both
    assert go(tmp_path, "ab").manifest["supersedes"] == ["gen-0003", "gen-0004"]


def test_a_new_lineage_of_the_same_inputs_warns(tmp_path, caplog):
    write_inputs(tmp_path, "a")
    go(tmp_path, "a")
    go(tmp_path, "a", SHORT, new_lineage=True)
    assert "1 inputs of this config are in gen-0001 as well" in caplog.text
    assert current(tmp_path) == ["gen-0001", "gen-0002"]


def test_a_rerun_supersedes_all_that_earlier_versions_published_of_its_inputs(tmp_path):
    write_inputs(tmp_path, "a")
    go(tmp_path, "a")
    go(tmp_path, "a", SHORT)
    file = tmp_path / "run" / "catalog.jsonl"
    keys = ("lineage", "supersedes", "run", "listing")
    old = [{k: v for k, v in e.items() if k not in keys} for e in catalog(tmp_path).values()]
    file.write_text("".join(json.dumps(e) + "\n" for e in old))
    assert current(tmp_path) == ["gen-0001", "gen-0002"]
    assert go(tmp_path, "a", "pack.seq_len=48").manifest["supersedes"] == ["gen-0001", "gen-0002"]
    assert [json.loads(line) for line in file.read_text().splitlines()][:2] == old


@pytest.mark.parametrize("moment", ["_move_folder", "replace_if"])
def test_a_rerun_that_dies_while_it_supersedes_is_completed(tmp_path, monkeypatch, moment):
    write_inputs(tmp_path, "a")
    go(tmp_path, "a")
    undisturbed = bytes_of(go(tmp_path, "a", SHORT).uri)
    for name in ("generations/gen-0002", "catalog.jsonl"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.write_text(
            path.read_text().splitlines()[0] + "\n"
        )

    def dies(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, moment, dies)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "a", SHORT)
    assert current(tmp_path) == ["gen-0001"]  # until the catalog says otherwise
    monkeypatch.undo()
    assert replace_if is publishing.replace_if
    assert bytes_of(go(tmp_path, "a", SHORT).uri) == undisturbed
    assert current(tmp_path) == ["gen-0002"]


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("supersedes", [], "supersedes"),
        ("supersedes", ["gen-0007"], "an earlier generation"),
        ("lineage", "gen-0009", "lineage"),
    ],
)
def test_verify_compares_lineages_with_manifest_and_catalog(tmp_path, key, value, fault):
    write_inputs(tmp_path, "a")
    go(tmp_path, "a")
    go(tmp_path, "a", SHORT)
    entries = list(catalog(tmp_path).values())
    entries[1][key] = value
    file = tmp_path / "run" / "catalog.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in entries))
    first, second = verify_path(str(tmp_path / "run"))
    assert not first.faults and any(fault in mismatch for mismatch in second.faults)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.engine.dispatch.on_ray", lambda *_, **__: in_process)

    def call(names, *arguments, format="jsonl", command="run"):
        make_config(tmp_path, [tmp_path / f"{n}.{format}" for n in names])
        fixed = [*FIXED[1:], f"input.format={format}"]
        return CliRunner().invoke(app, [command, f"{tmp_path}/config.toml", *fixed, *arguments])

    return call


def test_the_report_of_each_generation_is_kept(tmp_path, call):
    write_inputs(tmp_path, "a")
    assert call("a").exit_code == 0
    again = call("a", SHORT)
    assert again.exit_code == 0 and "supersedes gen-0001: trainers read gen-0002" in again.stdout
    pages = [Path(tmp_path, "run", "reports", f"gen-000{n}.html").read_text() for n in (1, 2)]
    assert "gen-0001" in pages[0] and "gen-0002" not in pages[0] and "gen-0002" in pages[1]


@pytest.mark.parametrize("documents", [[], ["zu kurz"]])
def test_a_run_that_publishes_nothing_says_so_and_exits_1(tmp_path, call, documents):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    ended = call("a", "language.allowed=['en']", "language.score=[0.99, 1.0]")
    assert ended.exit_code == 1 and "nothing was published" in ended.stderr
    assert call("a", "--only", "extract").exit_code == 0  # it was not asked to


def test_other_inputs_exit_2_without_the_option(tmp_path, call):
    write_inputs(tmp_path, "a", "b")
    assert call("a").exit_code == 0
    for arguments in ([], ["--dry-run"]):
        refused = call("b", *arguments)
        assert refused.exit_code == 2 and "--new-lineage" in refused.stderr
    assert call("b", "--new-lineage").exit_code == 0
    assert call("b", "--new-lineage", command="retry").exit_code == 0


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_missing_column_is_found_while_planning(tmp_path, call, format):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": n, "body": document_text(n)} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in ([], ["--dry-run"]):
        ended = call("a", *arguments, format=format)
        assert ended.exit_code == 2, ended.output
        assert f"a.{format}: no column 'text'; it has id, body; set text_column" in ended.stderr
    assert not (tmp_path / "run" / "run.json").exists()
    assert call("a", "input.text_column=body", format=format).exit_code == 0


def test_a_column_that_only_later_rows_have_is_not_missing(tmp_path, call):
    rows = [{"note": "no text"}, {"text": document_text(1)}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("a").exit_code == 0


def test_single_inputs_without_the_column_fail_alone(tmp_path, call):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, column in (("a", "text"), ("b", "body")):
        rows = [{column: document_text(n)} for n in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert call("ab", "run.max_failed_share=0.5", format="parquet").exit_code == 3


def test_a_batch_that_publishes_nothing_exits_1_and_one_with_nothing_to_do_with_0(tmp_path, call):
    (tmp_path / "a.jsonl").write_text('{"text": "zu kurz"}\n')
    wanted = ("language.allowed=['en']", "language.score=[0.99, 1.0]")
    ended = call("a", *wanted, command="batch")
    assert ended.exit_code == 1 and "nothing was published" in ended.stderr
    assert call("a", *wanted, command="batch").exit_code == 0


def test_why_says_which_generation_is_superseded(tmp_path, call):
    url = "https://mill.example/1"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": document_text(1), "url": url}) + "\n")
    for override in ("pack.seq_len=64", SHORT):
        assert call("a", "input.url_column=url", override).exit_code == 0
    told = CliRunner().invoke(app, ["why", f"{tmp_path}/run", url])
    assert ", superseded by gen-0002" in told.stdout and "published in gen-0002" in told.stdout


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_columns_on_an_object_store_are_looked_at_without_reading_all(s3_bucket, format):
    """Of JSON the first MB, which may end within a gzip stream; of Parquet the schema."""
    import gzip
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = random.Random(0)
    rows = [{"body": noise.randbytes(1000).hex()} for _ in range(3000)]
    uri, buffer = f"{s3_bucket}/a.{format}", pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    data = gzip.compress(lines, 1) if format == "jsonl" else buffer.getvalue().to_pybytes()
    assert len(data) > 2 << 20
    write_atomically(uri, data)
    inputs = [Input(0, uri, "")]
    with pytest.raises(ConfigError, match=f"{uri}: no column 'text'; it has body"):
        require_columns(inputs, InputConfig(format=format))
    require_columns(inputs, InputConfig(format=format, text_column="body"))
