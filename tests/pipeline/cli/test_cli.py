"""The command line: exit codes, messages, JSON. Without Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.inspect import export
from tests.support.inline import make_config, run_inline

RUN = CliRunner()
PROSE = "The old mill by the river has been grinding wheat for the village since the year it was built. "
NO_FILTERS = (
    "input.format=jsonl",
    "input.url_column=url",
    "extract.filters=[]",
    "refine.filters=[]",
    "pack.seq_len=64",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over a few documents, two of them copies."""
    folder = tmp_path_factory.mktemp("cli")
    texts = [
        PROSE * 3 + f"Chapter {n} tells of " + word
        for n, word in enumerate(["bread", "stone", "water"])
    ]
    rows = [
        {"text": t, "url": f"https://a.example/{n}"}
        for n, t in enumerate([*texts, texts[0], "Das ist ein deutscher Satz."])
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(folder, [folder / "in.jsonl"], *NO_FILTERS)
    run_inline(config)
    return folder, config.run.directory


def call(*arguments):
    return RUN.invoke(app, [str(a) for a in arguments])


def test_a_wrong_key_exits_2_and_names_the_right_one(finished):
    result = call("run", finished[0] / "config.toml", "dedup.num_band=3")
    assert result.exit_code == 2 and "did you mean 'dedup.num_bands'" in result.stderr


def test_only_and_from_exclude_each_other(finished):
    result = call("run", finished[0] / "config.toml", "--only", "pack", "--from", "dedup")
    assert result.exit_code == 2 and "exclude each other" in result.stderr


def test_a_run_in_use_exits_4(finished):
    from pipeline.engine.lease import lease

    with lease(finished[1]):
        result = call("run", finished[0] / "config.toml", *NO_FILTERS)
    assert result.exit_code == 4 and "is in use by process" in result.stderr


def test_dry_run_as_json(finished):
    result = call("run", finished[0] / "config.toml", *NO_FILTERS, "--dry-run", "--json")
    phases = {row["phase"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0 and phases["pack"]["pending"] == 0


def test_a_folder_that_is_no_run_exits_1(tmp_path):
    for command in (["status"], ["report"], ["why"], ["verify"]):
        arguments = (
            [*command, tmp_path, "https://a.example/"]
            if command == ["why"]
            else [*command, tmp_path]
        )
        result = call(*arguments)
        assert result.exit_code == 1 and str(tmp_path) in result.stderr.replace("\n", "")


def test_verify_exits_1_when_a_byte_is_flipped_and_names_the_shard(finished):
    assert call("verify", finished[1]).exit_code == 0
    shard = next(Path(finished[1]).glob("generations/gen-0001/part-*/shard.*"))
    before = shard.read_bytes()
    shard.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    try:
        result = call("verify", finished[1], "--json")
        [found] = json.loads(result.stdout)
        assert result.exit_code == 1
        assert {f["shard"] for f in found["faults"]} == {f"{shard.parent.name}/{shard.name}"}
        assert "sha256 by manifest" in {f["what"] for f in found["faults"]}
    finally:
        shard.write_bytes(before)


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://a.example/0", "duplicate|published"),
        ("a.example/2", "published in gen-0001"),
        ("https://a.example/4", "rejected in extract by language.allowed"),
    ],
)
def test_why_says_what_became_of_a_page(finished, url, words):
    result = call("why", finished[1], url)
    assert result.exit_code == 0 and any(w in result.stdout for w in words.split("|"))


def test_why_of_an_unknown_url_exits_1(finished):
    result = call("why", finished[1], "https://b.example/")
    assert result.exit_code == 1 and "no document of that URL" in result.stderr


def test_show_config_says_where_values_come_from(finished):
    result = call("show-config", finished[0] / "config.toml", "dedup.num_bands=26", "--json")
    assert json.loads(result.stdout)["dedup.num_bands"] == {"value": "26", "origin": "command line"}


@pytest.mark.parametrize("documents", [[], ["zu kurz"]])
def test_a_run_that_keeps_nothing_ends_well_and_publishes_nothing(tmp_path, documents):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    outcome = run_inline(make_config(tmp_path, [tmp_path / "in.jsonl"], "input.format=jsonl"))
    assert outcome.published is None and not outcome.failed
    assert call("status", tmp_path / "run").exit_code == 0
    assert call("report", tmp_path / "run").exit_code == 0


def test_ablate_says_what_other_bounds_would_change(finished):
    line = ["ablate", finished[0] / "config.toml", *NO_FILTERS]
    result = call(*line, "--set", "language.score=[0.9999, 1.0]", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["before"]["documents"] == 1 == found["only_before"]
    assert found["after"]["documents"] == 0 and found["after"]["losses"]["language.score"] >= 3
    table = call(*line, "--set", "language.score=[0.9999, 1.0]").stdout
    assert "lost to language.score" in table and "a.example: 1 → 0" in table
    assert call(*line, "--drop", "languag").stderr == (
        "error --drop languag: this config has no such filter or rule; did you mean 'language'?\n"
    )
    assert call(*line, "run.directory=nowhere").exit_code == 1


def test_why_shows_percentiles(finished):
    [url] = [u for table in export.tables(finished[1], "corpus") for u in table["url"].to_pylist()]
    shown = call("why", finished[1], url).stdout
    assert " p50" in next(line for line in shown.splitlines() if "pii.email_address" in line)


def test_sql_prints_a_table_cut_to_some_rows(finished):
    result = call("sql", finished[1], "SELECT url, text FROM documents", "--rows", 2)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0].split() == ["url", "text"] and len(lines) == 3
    assert lines[1].startswith("https://a.example/0  The old mill") and "…" in lines[1]
    assert "the first 2 rows; --rows N prints more" in result.stderr
    assert not call("sql", finished[1], "SELECT 1 AS one").stderr


def test_sql_prints_all_rows_as_json_and_csv(finished):
    query = "SELECT phase, counts, NULL AS nothing FROM commits WHERE phase = 'extract'"
    [row] = json.loads(call("sql", finished[1], query, "--json").stdout)
    assert row["phase"] == "extract" and row["counts"]["kept"] == 4 and row["nothing"] is None
    header, line = call("sql", finished[1], query, "--csv").stdout.splitlines()
    assert header == "phase,counts,nothing" and line.startswith('extract,"{""kept"": 4')
    assert json.loads(call("sql", finished[1], "SELECT 1 WHERE false", "--json").stdout) == []


def test_sql_refuses_to_write_and_names_the_columns_that_there_are(finished):
    result = call("sql", finished[1], f"COPY keep TO '{finished[0]}/x.csv'")
    assert result.exit_code == 1 and "Expected a single SELECT statement" in result.stderr
    result = call("sql", finished[1], "SELECT rul FROM keep")
    assert result.exit_code == 1 and 'Candidate bindings: "rule"' in result.stderr


def test_the_command_line_loads_no_heavy_library():
    code = "import sys, pipeline.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"ray", "torch", "duckdb", "pyarrow", "numpy", "scipy", "pydantic", "trafilatura"}
    heavy |= {"fsspec", "tiktoken", "streaming", "resiliparse", "datasketch", "prometheus_client"}
    assert not heavy & {*loaded.stdout.split()}
