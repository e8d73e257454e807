"""`gristmill dedup`: the table it writes, batches one against another, and that no kill changes a
byte of it.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import in_process
from pipeline.inspect import export, why
from pipeline.run import phases, results
from pipeline.run.dedup_command import configure, dedup_files
from pipeline.run.execute import RunFailed
from stages.formats.errors import ConfigError
from tests.support.inline import Silent, run_inline
from tests.support.inline import make_config as load_config
from tests.support.paths import ROOT
from tests.support.processes import call_command, descendants

# many small units, so that every phase has some to lose
SMALL = [
    "dedup.documents_per_unit=150",
    "dedup.partition_bytes=100_000",
    "dedup.verify_share=1.0",
    "dedup.write_index=kept",
]
IN_ROUNDS = ["dedup.cluster_memory=1"]
COUNT = 1200


def make_texts(count, *, seed=0):
    """Documents of 30 to 200 made-up words; a third are copies of an earlier one, most with some
    words changed.
    """
    draw = random.Random(f"texts {seed}")
    words = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
    texts = []
    for _ in range(count):
        text = draw.choices(words, k=draw.randint(30, 200))
        if texts and draw.random() < 0.35:
            text = draw.choice(texts).split()
            for _ in range(draw.randint(0, len(text) // 40)):
                text[draw.randrange(len(text))] = draw.choice(words)
        texts.append(" ".join(text))
    return texts


def write_jsonl(folder, texts, *, files=6):
    """Texts with ids 'd0', 'd1', ... in several files; some broken rows between them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"d{n}", "text": text}) for n, text in enumerate(texts)]
    lines[5:5] = [
        "{broken",
        json.dumps({"id": "none", "text": None}),
        json.dumps({"id": "empty", "text": ""}),
    ]
    size = -(-len(lines) // files)
    for n in range(files):
        (folder / f"{n}.jsonl").write_text(
            "".join(line + "\n" for line in lines[n * size : (n + 1) * size])
        )
    return folder


def make_config(inputs, output, *overrides, **options):
    defaults = {"text_column": "text", "id_column": "id", "against": []}
    config = configure([str(inputs)], str(output), **defaults | options, overrides=overrides)
    # the command writes no texts and does not offer lines; here they are units to be killed like
    # the others
    return (
        replace(config, dedup=replace(config.dedup, line_level="line"))
        if config.extract.keep_text
        else config
    )


def bytes_of(output):
    """The table, and the lines to cut."""
    files = [
        Path(output) / "keep.parquet",
        *sorted(Path(output).glob("dedup/*/cuts/cuts/*.parquet")),
    ]
    return {file.name: file.read_bytes() for file in files}


def dedup(inputs, output, *overrides, run_units=in_process, **options):
    return dedup_files(make_config(inputs, output, *overrides, **options), Silent(), run_units)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("inputs"), make_texts(COUNT))


@pytest.fixture(scope="module")
def table(inputs, tmp_path_factory):
    """keep.parquet of an undisturbed run, and the bytes of what it wrote."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return pq.read_table(dedup(inputs, output, *SMALL).table), bytes_of(output)


def test_every_row_of_the_inputs_has_a_row_in_their_order(inputs, table):
    rows = table[0].to_pylist()
    assert len(rows) == COUNT + 3
    assert [r["id"] for r in rows][4:10] == ["d4", None, "none", "empty", "d5", "d6"]
    assert [r["rule"] for r in rows][5:7] == ["input.bad_json", "input.no_text"]
    assert not rows[5]["keep"] and rows[5]["cluster_id"] is None
    assert Path(rows[0]["path"]).name == "0.jsonl" and [r["row"] for r in rows[:3]] == [0, 1, 2]


def test_clusters_keep_one_document_each_and_catch_most_copies(table):
    clusters = {}
    for row in table[0].to_pylist():
        if row["cluster_id"] is not None:
            clusters.setdefault(row["cluster_id"], []).append(row)
    for members in clusters.values():
        assert sum(m["keep"] for m in members) == 1
        assert {m["cluster_size"] for m in members} == {len(members)}
    dropped = sum(len(m) - 1 for m in clusters.values())
    assert 0.25 * COUNT < dropped < 0.40 * COUNT


@pytest.mark.parametrize(
    "overrides",
    [
        ("dedup.documents_per_unit=2_000_000", "dedup.partition_bytes=256_000_000"),
        ("dedup.documents_per_unit=1", "dedup.partition_bytes=100_000"),
        tuple(IN_ROUNDS),
    ],
)
def test_sizes_of_units_and_the_way_to_components_do_not_change_the_table(
    inputs, table, tmp_path, overrides
):
    dedup(inputs, tmp_path / "out", *SMALL, *overrides)
    assert bytes_of(tmp_path / "out") == table[1]


@pytest.mark.ray
def test_two_workers_write_what_one_process_writes(ray_session, inputs, table, tmp_path):
    result = dedup(inputs, tmp_path / "out", *SMALL, run_units=on_ray())
    assert bytes_of(tmp_path / "out") == table[1]
    assert result.rows == {
        **{
            "dedup.near": result.rows["dedup.near"],
            "dedup.exact": result.rows["dedup.exact"],
            "kept": result.rows["kept"],
        },
        **{"input.bad_json": 1, "input.no_text": 1},
    }


# --- batches --------------------------------------------------------------------------------------


def test_a_second_batch_is_held_against_the_first(tmp_path):
    texts = make_texts(300, seed=1)
    first = dedup(
        write_jsonl(tmp_path / "a", texts[:150]),
        tmp_path / "1",
        "dedup.write_index=all",
        "dedup.keep_rule=first",
    )
    assert first.rows["kept"] > 80
    second = write_jsonl(tmp_path / "b", texts[150:])
    result = dedup(second, tmp_path / "2", "dedup.keep_rule=first", against=[str(tmp_path / "1")])
    kept = {
        r["id"] for r in pq.read_table(result.table).to_pylist() if r["keep"] and r["id"] != "empty"
    }
    write_jsonl(tmp_path / "c", texts)
    whole = pq.read_table(
        dedup(tmp_path / "c", tmp_path / "both", "dedup.keep_rule=first").table
    ).to_pylist()
    ids = [f"d{n}" for n in range(150)]  # the second batch's ids begin at d0 again
    assert kept == {
        new
        for n, new in enumerate(ids)
        if next(r for r in whole if r["id"] == f"d{150 + n}")["keep"]
    }
    assert result.rows["dedup.earlier"] > 10


def test_why_names_the_copy_of_the_earlier_batch(tmp_path):
    for name, link in (("a", "https://old.example/"), ("b", "https://new.example/")):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"id": name, "text": "one two three four five six", "link": link}) + "\n"
        )
    columns = ("input.url_column=link", "dedup.write_index=kept")
    dedup(tmp_path / "a.jsonl", tmp_path / "1", *columns)
    dedup(tmp_path / "b.jsonl", tmp_path / "2", *columns, against=[str(tmp_path / "1")])
    [fate] = why.why(str(tmp_path / "2"), "https://new.example/")
    assert (fate["fate"], fate["rule"], fate["kept_copy"]["url"]) == (
        "duplicate",
        "dedup.earlier",
        "https://old.example/",
    )


def test_why_knows_a_document_by_its_id(inputs, table, tmp_path):
    dedup(inputs, tmp_path / "out", *SMALL)
    dropped = next(r for r in table[0].to_pylist() if r["rule"] == "dedup.near")
    [fate] = why.why(str(tmp_path / "out"), dropped["id"])
    kept = next(
        r for r in table[0].to_pylist() if r["cluster_id"] == dropped["cluster_id"] and r["keep"]
    )
    assert (fate["rule"], fate["kept_copy"]["source_id"]) == ("dedup.near", kept["id"])
    assert 0 < fate["similarity"] <= 1


def test_against_what_has_no_index_is_refused(inputs, tmp_path):
    dedup(inputs, tmp_path / "1")
    with pytest.raises(
        ConfigError, match=r"/1 has no published index; run it with dedup.write_index=kept"
    ):
        dedup(inputs, tmp_path / "2", against=[str(tmp_path / "1")])


def test_against_an_index_of_other_keys_is_refused(tmp_path):
    inputs = write_jsonl(tmp_path / "a", make_texts(20))
    dedup(inputs, tmp_path / "1", "dedup.write_index=kept")
    with pytest.raises(
        ConfigError,
        match=r"1/index.json: its keys are 'nfkd-words-1, 5-grams.*14 bands of 8', expected '.*26 bands of 11'",
    ):
        dedup(
            inputs,
            tmp_path / "2",
            "dedup.num_bands=26",
            "dedup.rows_per_band=11",
            against=[str(tmp_path / "1")],
        )


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100])
def test_a_run_cuts_lines_that_an_earlier_document_has(tmp_path, size):
    menu = "Home About Contact Imprint and more"
    texts = [
        f"{menu}\nThis is text number {word} of the site.\n{menu}"
        for word in ("one", "two", "three")
    ]
    rows = [
        {"id": n, "text": text, "link": f"https://a.example/{n}"}
        for n, text in enumerate([*texts, menu + "!\n" + menu])
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        "input.format=jsonl",
        "input.url_column=link",
        "language.identify=false",
        "language.allowed=[]",
        "language.score=off",
    )
    more = (
        "extract.filters=[]",
        "refine.scrub_pii=false",
        "dedup.line_level=line",
        f"dedup.documents_per_unit={size}",
    )
    run_inline(load_config(tmp_path, [tmp_path / "in.jsonl"], *settings, *more))
    corpus = [
        row["text"]
        for table in export.tables(str(tmp_path / "run"), "corpus")
        for row in table.to_pylist()
    ]
    assert corpus == [
        texts[0].removesuffix(f"\n{menu}"),
        "This is text number two of the site.",
        "This is text number three of the site.",
    ]
    [lost] = why.why(str(tmp_path / "run"), "https://a.example/3")
    assert (lost["rule"], lost["lines_cut"]) == ("dedup.lines", [0, 1])
    [kept] = why.why(str(tmp_path / "run"), "https://a.example/1")
    assert (kept["fate"], kept["lines_cut"], kept["chars_cut"]) == (
        "published",
        [0, 2],
        2 * len(menu) + 2,
    )


def test_an_alarm_is_raised_when_an_input_loses_nearly_everything(tmp_path):
    write_texts(tmp_path / "a.jsonl", "a", make_texts(30, seed=3))
    write_texts(tmp_path / "b.jsonl", "b", make_texts(30, seed=3))
    dedup(str(tmp_path / "*.jsonl"), tmp_path / "out")
    assert results.alarm(str(tmp_path / "out")) == (
        "dedup dropped over 90% of the documents of 1 input; see Duplicates in the report"
    )
    dedup(str(tmp_path / "*.jsonl"), tmp_path / "out", "dedup.alarm_documents=31")
    assert results.alarm(str(tmp_path / "out")) is None


# --- a folder that is used again ------------------------------------------------------------------


def kept_of(result):
    return {r["id"] for r in pq.read_table(result.table).to_pylist() if r["keep"]}


def write_texts(path, prefix, texts):
    path.write_text(
        "".join(
            json.dumps({"id": f"{prefix}{n}", "text": text}) + "\n" for n, text in enumerate(texts)
        )
    )


@pytest.mark.parametrize("way", [[], IN_ROUNDS])
def test_inputs_that_come_later_and_sort_first(tmp_path, way):
    folder, texts = tmp_path / "in", make_texts(40, seed=2)
    folder.mkdir()
    write_texts(folder / "b.jsonl", "b", texts)
    size = ["dedup.documents_per_unit=7", *way]
    dedup(folder, tmp_path / "out", *size)
    write_texts(folder / "a.jsonl", "a", texts)
    result = dedup(folder, tmp_path / "out", *size)
    write_texts(tmp_path / "c.jsonl", "c", texts)
    alone = {
        name.replace("c", "b") for name in kept_of(dedup(tmp_path / "c.jsonl", tmp_path / "alone"))
    }
    assert kept_of(result) == alone
    assert sum(result.rows.values()) == 80


def test_fewer_inputs_and_then_all_again(tmp_path):
    folder, away = tmp_path / "in", tmp_path / "away"
    folder.mkdir()
    write_texts(folder / "a.jsonl", "a", ["one two three four five six"])
    write_texts(folder / "b.jsonl", "b", ["one two three four five six"])
    one = ["dedup.documents_per_unit=1"]
    assert kept_of(dedup(folder, tmp_path / "out", *one)) == {"a0"}
    (folder / "a.jsonl").rename(away)
    assert kept_of(dedup(folder, tmp_path / "out", *one)) == {"b0"}
    away.rename(folder / "a.jsonl")
    assert kept_of(dedup(folder, tmp_path / "out", *one)) == {"a0"}


def test_an_index_lasts_until_its_batch_changes(tmp_path):
    write_texts(tmp_path / "a.jsonl", "a", ["one two three four five six"])
    write_texts(tmp_path / "b.jsonl", "b", ["one two three four five six"])
    against = {"against": [str(tmp_path / "1")]}
    dedup(tmp_path / "a.jsonl", tmp_path / "1", "dedup.write_index=kept")
    dedup(tmp_path / "a.jsonl", tmp_path / "1")  # again without: what was published stays
    assert dedup(tmp_path / "b.jsonl", tmp_path / "2", **against).rows == {"dedup.earlier": 1}
    write_texts(tmp_path / "a.jsonl", "a", ["another text of some more words"])
    dedup(tmp_path / "a.jsonl", tmp_path / "1", "dedup.write_index=kept")
    assert dedup(tmp_path / "b.jsonl", tmp_path / "2", **against).rows == {"kept": 1}
    [file] = tmp_path.glob("1/dedup/*/index/commits/*.json")
    commit = json.loads(file.read_text())
    # as when its batch was begun again and did not come to its end
    commit["outputs"][0]["sha256"] = "0" * 64
    for spoil in (lambda: file.write_text(json.dumps(commit)), file.unlink):
        spoil()
        with pytest.raises(
            ConfigError,
            match=r"the index of .*/1 is not the one that was published; run its batch again",
        ):
            dedup(tmp_path / "b.jsonl", tmp_path / "2", **against)


def test_what_the_command_wrote_is_no_input_of_it(tmp_path):
    write_texts(tmp_path / "a.jsonl", "a", ["one two three four five six"])
    for _ in range(2):
        assert dedup(tmp_path, tmp_path / "out").rows == {"kept": 1}


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        (
            ["dedup.keep_rule=newest"],
            {},
            "dedup.keep_rule = 'newest': jsonl inputs have no crawl date; use longest or first",
        ),
        (["dedup.line_level=line"], {}, "gristmill dedup writes none; use gristmill run"),
        (
            ["dedup.verify_share=1.0", "extract.keep_text=false"],
            {},
            "dedup.verify_share needs the texts: set extract.keep_text",
        ),
        (
            ["dedup.enabled=false", "dedup.write_index=all"],
            {},
            "enabled = false leaves nothing to do for write_index",
        ),
        (
            [],
            {"text_column": "body"},
            "a.jsonl: no column 'body'; it has id, text; set --text-column",
        ),
        (
            [],
            {"id_column": "key"},
            "a.jsonl: no column 'key'; it has id, text; set --id-column, or '' if there is none",
        ),
        ([], {"against": ["OUT"]}, "dedup.against names run.directory"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, overrides, options, message):
    write_texts(tmp_path / "a.jsonl", "a", ["a text"])
    options = {k: [str(tmp_path / "out")] if v == ["OUT"] else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path / "a.jsonl", tmp_path / "out", *overrides, **options)


def test_a_run_without_any_document_ends_well(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 0, "text": null}\n')
    assert dedup(tmp_path / "a.jsonl", tmp_path / "out").rows == {"input.no_text": 1}


def test_an_input_without_any_good_row_is_a_failed_unit(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    with pytest.raises(RunFailed, match=r"a\.jsonl: none of 1 rows can be read; line 1: Expecting"):
        dedup(tmp_path / "a.jsonl", tmp_path / "out")


def test_a_text_of_five_million_characters_is_a_document(tmp_path):
    write_texts(tmp_path / "a.jsonl", "a", ["word " * 1_000_000, "word " * 1_000_000])
    assert dedup(tmp_path / "a.jsonl", tmp_path / "out").rows == {"dedup.exact": 1, "kept": 1}


# --- ids and formats ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([7, -8]),
        pa.array([2**63 - 1, 5], pa.int64()),
        pa.array([2**64 - 1, 0], pa.uint64()),
        pa.array(["1", "2"]),
    ],
)
def test_ids_keep_the_type_of_the_input(tmp_path, ids):
    pq.write_table(
        pa.table({"id": ids, "text": ["one two three four five six"] * 2}), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.table({"id": ids[:0], "text": pa.array([], pa.string())}), tmp_path / "b.parquet"
    )
    result = pq.read_table(dedup(str(tmp_path / "*.parquet"), tmp_path / "out").table)
    assert result["id"].combine_chunks() == ids


def test_binary_text_is_text(tmp_path):
    pq.write_table(
        pa.table({"id": [1], "text": pa.array(["é".encode()], pa.binary())}), tmp_path / "a.parquet"
    )
    assert dedup(tmp_path / "a.parquet", tmp_path / "out").rows == {"kept": 1}


def test_ids_that_only_look_like_integers_stay_strings(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"id": "007", "text": "a"}\n{"id": "12", "text": "b"}\n')
    )
    assert pq.read_table(dedup(tmp_path / "a.jsonl.gz", tmp_path / "out").table)[
        "id"
    ].to_pylist() == ["007", "12"]


def test_without_ids_rows_have_their_path_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a"}\n')
    rows = pq.read_table(
        dedup(tmp_path / "a.jsonl", tmp_path / "out", id_column="").table
    ).to_pylist()
    assert [(r["id"], Path(r["path"]).name, r["row"], r["rule"]) for r in rows] == [
        (None, "a.jsonl", 0, None),
        (None, "a.jsonl", 1, "dedup.exact"),
    ]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.txt"], r"a.txt: not .jsonl \(which may be"),
        (["a.jsonl", "b.parquet"], "inputs of two formats: .*a.jsonl and .*b.parquet"),
    ],
)
def test_other_formats_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=message):
        configure(
            [str(tmp_path / n) for n in names],
            str(tmp_path / "out"),
            text_column="text",
            id_column="id",
            against=[],
            overrides=[],
        )


# --- kills ----------------------------------------------------------------------------------------

PHASES = [spec.name for spec in phases.PHASES if spec.stage in ("extract", "dedup")]


class KillsDriver(Silent):
    """Kills this process some seconds into a phase."""

    def __init__(self, phase, seconds):
        self.phase, self.seconds = phase, seconds

    def begin(self, phase, *, run, units, done):
        if phase == self.phase:
            kill = (os.getpid(), signal.SIGKILL)
            threading.Timer(self.seconds, os.kill, kill).start()


def dedup_until_killed(inputs, output, phase, seconds, *overrides):
    config = make_config(inputs, output, *overrides)
    dedup_files(config, KillsDriver(phase, float(seconds)), in_process)


@pytest.mark.kill
@pytest.mark.parametrize(
    "phases, way", [(PHASES, []), (["dedup star", "dedup star", "dedup cluster"], IN_ROUNDS)]
)
def test_killed_in_every_phase_the_table_is_the_same_bytes(inputs, table, tmp_path, phases, way):
    """SIGKILL at a random moment of each phase; the same command goes on; nothing differs at the
    end.
    """
    draw = random.Random("driver kills")
    killed = 0
    for phase in phases:
        arguments = (phase, draw.uniform(0.0, 0.04), *SMALL, *way)
        command = call_command(dedup_until_killed, inputs, tmp_path / "out", *arguments)
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        killed += process.returncode != 0
    assert killed >= len(phases) // 2
    dedup(inputs, tmp_path / "out", *SMALL, *way)
    assert bytes_of(tmp_path / "out") == table[1]


class KillsWorkers(Silent):
    """Kills a Ray worker that is at work, once a phase, as soon as there is one."""

    def __init__(self):
        self.killed = []

    def begin(self, phase, *, run, units, done):
        threading.Thread(target=self._kill, args=(phase,), daemon=True).start()

    def _kill(self, phase):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            for pid in descendants(f"ray::{phase}"):
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(phase)
                    return


@pytest.mark.kill
@pytest.mark.ray
def test_with_a_worker_killed_in_every_phase_the_table_is_the_same_bytes(
    ray_session, inputs, table, tmp_path
):
    kills = KillsWorkers()
    result = dedup_files(
        make_config(inputs, tmp_path / "out", *SMALL, "run.attempts=5"), kills, on_ray()
    )
    assert result.failed == []
    assert bytes_of(tmp_path / "out") == table[1]
    assert len(set(kills.killed)) >= 4, kills.killed
