"""SQL over what a run wrote: on a disk and on object stores, of finished and unfinished runs."""

import json
import subprocess
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.run import query
from pipeline.run.results import open_results
from tests.support.inline import make_config, run_inline

MILL = "The old mill by the river has been grinding wheat for the village since it was built. " * 3
OVERRIDES = (
    "input.format=jsonl",
    "input.url_column=url",
    "extract.filters=[]",
    "refine.filters=[]",
    "pack.seq_len=64",
)
COUNT = "SELECT count(*)::INT AS n FROM"
VIEWS = ("documents", "keep", "corpus", "rejected", "commits")


def make_run(folder, *overrides, until=None):
    """A run over two files of three pages: one is copied, one is German. Returns its directory."""
    for file in range(2):
        rows = [
            {
                "text": MILL + f"Bread, chapter {file}: {page}.",
                "url": f"https://a.example/{file}{page}",
            }
            for page in ("one", "two")
        ]
        rows.append({"text": "Das ist ein deutscher Satz.", "url": "https://b.example/"})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(lines)
    config = make_config(folder, [folder / "*.jsonl"], *OVERRIDES, *overrides)
    run_inline(config, until=until)
    return config.run.directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"))


def counts(connection):
    return {v: query.table(connection, f"{COUNT} {v}")["n"][0].as_py() for v in VIEWS}


def rows(connection, sql):
    with query.select(connection, sql) as reader:
        return reader.read_all().to_pylist()


def test_each_view_has_the_rows_that_the_run_wrote(run):
    with open_results(run) as connection:
        totals = counts(connection)
        assert totals["documents"] == 6 and totals["rejected"] == 2 and totals["keep"] == 4
        kept = rows(connection, "SELECT doc_id FROM keep WHERE keep")
        assert totals["corpus"] == len(kept)
        assert rows(connection, "SELECT DISTINCT stage, rejected_by FROM rejected") == [
            {"stage": "extract", "rejected_by": "language.allowed"}
        ]
        [total] = rows(
            connection,
            "SELECT sum(rows_in)::INT AS rows, sum(counts['kept'])::INT AS kept "
            "FROM commits WHERE phase = 'extract'",
        )
        assert total == {"rows": 6, "kept": 4}


def test_rows_come_in_order_of_units_and_say_where_they_lie(run):
    with open_results(run) as connection:
        listed = rows(connection, "SELECT doc_id, part, file_row_number AS row FROM documents")
    assert [row["doc_id"] for row in listed] == sorted(row["doc_id"] for row in listed)
    for row in listed:
        assert pq.read_table(row["part"])["doc_id"][row["row"]].as_py() == row["doc_id"]


@pytest.mark.parametrize("until", ["extract", "dedup", "refine"])
def test_stages_that_have_not_run_are_empty_views_with_columns(tmp_path, until):
    with open_results(make_run(tmp_path, until=until)) as connection:
        totals = counts(connection)
        assert totals["documents"] == 6 and (totals["keep"] > 0) == (until != "extract")
        assert (totals["corpus"] > 0) == (until == "refine")
        for view in ("keep", "corpus"):
            assert rows(connection, f"SELECT doc_id, cluster_id FROM {view} WHERE false") == []


def test_a_run_without_a_document_has_all_views(tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    config = make_config(tmp_path, [tmp_path / "in.jsonl"], *OVERRIDES)
    run_inline(config)
    with open_results(config.run.directory) as connection:
        assert counts(connection) | {"commits": 0} == dict.fromkeys(VIEWS, 0)


@pytest.mark.parametrize(
    "statement",
    [
        "COPY documents TO '{folder}/x.csv'",
        "WITH x AS (COPY documents TO '{folder}/x.csv') SELECT 1",
        "COPY keep TO '{part}'",
        "WITH x AS (COPY keep TO '{part}' (FORMAT parquet)) SELECT 1",
        "SELECT 1; DROP VIEW documents",
        "INSERT INTO commits SELECT * FROM commits",
        "WITH x AS (INSERT INTO commits SELECT * FROM commits RETURNING *) SELECT * FROM x",
        "ATTACH '{folder}/x.db'",
        "CREATE TABLE x AS SELECT 1",
        "SET memory_limit = '1TB'",
        "INSTALL httpfs",
        "SELECT * FROM read_csv('{folder}/secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT 1') UNION ALL SELECT * FROM query('COPY documents TO ''{folder}/x.csv''",
    ],
)
def test_everything_but_one_select_over_the_run_is_refused(run, tmp_path, statement):
    (tmp_path / "secret.csv").write_text("password\nmill\n")
    with open_results(run) as connection:
        part = query.table(connection, "SELECT part FROM documents")["part"][0].as_py()
        before = open(part, "rb").read()
        with pytest.raises(ValueError, match="Error"):
            rows(connection, statement.format(folder=tmp_path, part=part))
        assert rows(connection, f"{COUNT} documents") == [{"n": 6}]
    assert open(part, "rb").read() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "statement, message",
    [
        (
            "SELECT nope FROM keep",
            r'Referenced column "nope" not found.*Candidate bindings: "keep"',
        ),
        ("SELECT * FROM documnts", 'Table with name documnts does not exist! Did you mean "docu'),
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT CAST(url AS INT) FROM documents", "Could not convert string 'https://a.example"),
        ("SELECT 'a' + url FROM documents", "No function matches .* type casts.$"),
    ],
)
def test_an_error_is_one_line_without_our_own_statement(run, statement, message):
    with open_results(run) as connection, pytest.raises(ValueError, match=message) as error:
        rows(connection, statement)
    assert "query(" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_a_run_on_an_object_store_gives_the_same_rows(request, run, tmp_path, store):
    bucket = (
        f"memory://{uuid.uuid4().hex}"
        if store == "memory"
        else request.getfixturevalue("s3_bucket")
    )
    there = make_run(tmp_path, f"run.directory={bucket}/run")
    for view in ("documents", "keep", "corpus", "rejected"):
        place = "(part, warc_file)" if view in ("documents", "corpus", "rejected") else "(part)"
        statement = f"SELECT * EXCLUDE {place} FROM {view}"
        with open_results(run) as here, open_results(there) as connection:
            assert rows(connection, statement) == rows(here, statement) != []
    with open_results(there) as connection:
        [row] = rows(connection, "SELECT DISTINCT part FROM keep LIMIT 1")
        assert row["part"].startswith(there)
        with pytest.raises(ValueError, match="Error"):
            rows(connection, f"SELECT * FROM read_text('{there}/run.json')")


def test_columns_of_parts_are_united_and_nan_is_no_number(tmp_path):
    pq.write_table(pa.table({"id": [1], "a": [1.0]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"id": [2, 3], "b": ["x", "y"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": [4], "a": [float("nan")]}), tmp_path / "2.parquet")
    parts = {"t": [str(tmp_path / f"{n}.parquet") for n in range(3)]}
    with query.connect(parts, {}) as connection:
        united = query.table(connection, "SELECT id, a, b FROM t")
        largest = query.table(connection, "SELECT max(a) FILTER (isfinite(a)) AS m FROM t")
    assert united.column_names == ["id", "a", "b"]
    assert united["b"].to_pylist() == [None, "x", "y", None] and largest["m"].to_pylist() == [1.0]


def test_a_query_beyond_its_memory_spills_to_disk_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for setting, value in (("memory_limit", "40MB"), ("threads", 1), ("async_threads", 1)):
        monkeypatch.setitem(query.SETTINGS, setting, value)
    with query.connect({}, {}) as connection:
        largest = "SELECT i FROM range(8_000_000) t(i) ORDER BY hash(i) LIMIT 1 OFFSET 7_999_999"
        assert len(rows(connection, largest)) == 1
    assert not list(tmp_path.iterdir())


def test_a_process_ends_that_leaves_a_result_half_read(run):
    code = (
        "import sys\n"
        "from pipeline.run import query, results\n"
        "with results.open_results(sys.argv[1]) as connection:\n"
        "    with query.select(connection, 'SELECT * FROM range(10000000)') as reader:\n"
        "        reader.read_next_batch()\n"
        "        sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, run], timeout=120).returncode == 3
