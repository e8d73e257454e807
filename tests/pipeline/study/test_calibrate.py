"""Calibrate and ablate on a run of two languages, in this process: cut-offs against NumPy's,
ablations against real runs.
"""

import gzip
import json
import random
import shutil
from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import load
from pipeline.engine.units import in_process
from pipeline.inspect import export, why
from pipeline.report.sample import Sample
from pipeline.run import results
from pipeline.run.state import read_state
from pipeline.study.ablate import ablate, switched_off
from pipeline.study.calibrate import calibrate, changed_since, write_plot
from stages.formats.errors import ConfigError
from tests.support.inline import Silent, run_inline
from tests.support.paths import ROOT

SENTENCES = {
    "en": [
        "The miller opened the sluice before the sun had risen over the hill.",
        "Nobody in the village remembered when the wheel had last been mended.",
        "Every autumn the farmers brought their wheat down the narrow road.",
        "She wrote the weight of each sack into a book with a leather cover.",
        "When the river froze they had to wait until the thaw came in March.",
    ],
    "de": [
        "Der Müller öffnete das Wehr, bevor die Sonne über dem Hügel stand.",
        "Niemand im Dorf wusste noch, wann das Rad zuletzt repariert worden war.",
        "Jeden Herbst brachten die Bauern ihren Weizen die schmale Straße hinunter.",
        "Sie schrieb das Gewicht jedes Sackes in ein Buch mit einem Einband aus Leder.",
        "Wenn der Fluss zufror, mussten sie warten, bis im März das Tauwetter kam.",
    ],
}
FILTERS = ["extract.filters=['c4']", "refine.filters=['gopher_quality']"]
OPEN = [
    "gopher_quality.mean_word_length='off'",
    "gopher_quality.stop_word_count='off'",
    "gopher_quality.word_count=[1, inf]",
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The command line of a run over 200 English and 200 German texts; English ones are longer."""
    folder = tmp_path_factory.mktemp("calibrate")
    draw = random.Random(0)
    rows = []
    for i in range(400):
        language = ("en", "de")[i % 2]
        text = " ".join(
            draw.choices(SENTENCES[language], k=draw.randint(4, 40 if language == "en" else 16))
        )
        rows.append(
            {"id": i, "text": f"{text} {i}.", "url": f"https://{language}{i % 3}.example/{i}"}
        )
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [
        f"input.paths=['{folder}/in.jsonl']",
        "input.format=jsonl",
        "input.url_column=url",
        f"run.directory={folder}/run",
    ]
    languages = [
        "language.allowed=['en', 'de']",
        "language.score='off'",
        "dedup.enabled=false",
        "pack.seq_len=64",
    ]
    return [*inputs, *languages, *FILTERS, *OPEN]


CUT = 'gopher_quality.word_count=["p20", "p90"]'


@pytest.fixture(scope="module")
def calibrated(options):
    return calibrate(
        load(None, [*options, CUT], calibrated=False), Silent(), in_process, sample=10_000
    )


def test_buckets_are_thirds_of_each_language(options, tmp_path):
    mine = [*options, options[3] + "-buckets", "refine.filters=['perplexity']"]
    mine += [
        f"perplexity.model={ROOT}/models/wiki-en.5gram.bin",
        'perplexity.buckets=["p33.3", "p66.7"]',
    ]
    calibrate(load(None, mine, calibrated=False), Silent(), in_process, sample=10_000)
    config = load(None, mine)
    run_inline(config)
    rows = [
        row for table in export.tables(config.run.directory, "corpus") for row in table.to_pylist()
    ]
    for language in ("en", "de"):
        own = [row for row in rows if row["language"] == language]
        low, high = np.percentile([row["perplexity.perplexity"] for row in own], [33.3, 66.7])
        assert config.named("perplexity").of(language).buckets == pytest.approx(
            (low, high), rel=1e-3
        )
        assert Counter(row["perplexity.bucket"] for row in own) == {
            "head": 67,
            "middle": 66,
            "tail": 67,
        }
    # they are no scores
    assert ablate(config, load(None, [*mine, "perplexity.buckets='off'"])).both == 400
    with pytest.raises(
        ValueError, match=r"measured with perplexity.model = .*wiki-en.5gram.bin\", not .*copy.bin"
    ):
        ablate(
            config,
            load(
                None,
                [
                    *mine,
                    f"perplexity.model={_copied(config.filters['perplexity'].model, tmp_path)}",
                ],
            ),
        )
    # calibrating anew, for other bounds, hides nothing of the run that is there
    keys = read_state(config.run.directory).keys
    calibrate(load(None, [*mine, CUT], calibrated=False), Silent(), in_process, sample=200)
    assert read_state(config.run.directory).keys == keys


def _copied(model, folder):
    for suffix in ("", ".json"):
        shutil.copyfile(model + suffix, folder / f"copy.bin{suffix}")
    return folder / "copy.bin"


def test_cut_offs_are_percentiles_of_each_language(options, calibrated):
    config = load(None, [*options, CUT])
    run_inline(config)
    rows = [r for t in export.tables(config.run.directory, "documents") for r in t.to_pylist()]
    refined = [
        r
        for kind in ("corpus", "rejected")
        for t in export.tables(config.run.directory, kind)
        for r in t.to_pylist()
    ]
    for language in ("en", "de"):
        counts = [
            r["gopher_quality.word_count"]
            for r in refined
            if r["language"] == language and "gopher_quality.word_count" in r
        ]
        low, high = config.named("gopher_quality").of(language).word_count
        assert (low, high) == pytest.approx((np.percentile(counts, 20), np.percentile(counts, 90)))
        kept = sum(low <= n <= high for n in counts) / len(counts)
        assert kept == pytest.approx(0.7, abs=0.03)
        bound = {
            (r["rejected_low"], r["rejected_high"])
            for r in refined
            if r["language"] == language and r["rejected_by"]
        }
        assert bound == {(low, high)}
    assert {r["language"] for r in rows} == {"en", "de"}


def test_the_plot_and_the_table_hold_every_score(options, calibrated):
    config = load(None, [*options, CUT])
    with open(write_plot(config, calibrated.distributions)) as page:
        text = page.read()
    low, high = config.named("gopher_quality").of("de").word_count
    assert f"{low:,.4g}" in text and f"{high:,.4g}" in text
    scores = {d.score for d in calibrated.distributions}
    assert {"language.score", "c4.sentence_count", "gopher_quality.word_count"} <= scores
    assert all(f"<title>{score}</title>" in text for score in scores)
    assert {d.language for d in calibrated.distributions} == {"", "en", "de"}


def test_a_sample_is_smaller_and_the_same_every_time(options, tmp_path):
    config = load(None, [*options, f"run.directory={tmp_path}/run", CUT], calibrated=False)
    tables = [calibrate(config, Silent(), in_process, sample=100) for _ in range(2)]
    counts = {
        d.documents
        for d in tables[0].distributions
        if d.score == "gopher_quality.word_count" and not d.language
    }
    assert 60 < counts.pop() < 140
    assert str(tables[0]) == str(tables[1])


def test_what_chose_the_documents_and_is_another_now_is_named(options, calibrated, tmp_path):
    now = [*options, CUT]
    assert changed_since(load(None, now)) == []
    assert changed_since(load(None, [*now, "c4.sentence_count=[2, 1000]", "pack.seq_len=32"])) == [
        "c4.sentence_count"
    ]
    assert changed_since(load(None, [*now, "per_language.de.language.score=[0.2, 1.0]"])) == [
        "per_language.de.language.score"
    ]
    # another run's table is named by who knows why; without percentiles no table is used
    assert (
        changed_since(
            load(None, [*now, "c4.sentence_count=[2, 1000]", f"run.calibration={calibrated.table}"])
        )
        == []
    )
    assert changed_since(load(None, [*options, "c4.sentence_count=[2, 1000]"])) == []


def test_languages_with_few_documents_are_named_and_have_no_percentiles_of_their_own(
    options, tmp_path
):
    mine = [*options, f"run.directory={tmp_path}/run", f"per_language.de.{CUT}"]
    found = calibrate(load(None, mine, calibrated=False), Silent(), in_process, sample=100)
    assert set(found.few) == {"en", "de"} and all(20 < n < 100 for n in found.few.values())
    with pytest.raises(
        ConfigError, match=f"has {found.few['de']} documents of language 'de', too few"
    ):
        load(None, mine)


def test_nothing_kept_is_nothing_to_calibrate_with(options, tmp_path):
    config = load(
        None,
        [*options, f"run.directory={tmp_path}/run", "c4.sentence_count=[1000, 2000]"],
        calibrated=False,
    )
    with pytest.raises(ValueError, match="extract and dedup kept no document"):
        calibrate(config, Silent(), in_process, sample=100)


# --- ablate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A finished run with bounds in both stages, and its command line."""
    folder = tmp_path_factory.mktemp("ablate")
    bounds = ["c4.sentence_count=[6, 1000]", "gopher_quality.word_count=[60, 300]"]
    line = [
        *options,
        f"run.directory={folder}/run",
        *bounds,
        "per_language.en.gopher_quality.word_count=[40, 300]",
    ]
    run_inline(load(None, line))
    return line


def kept_ids(root):
    return {i for t in export.tables(root, "corpus") for i in t["doc_id"].to_pylist()}


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["gopher_quality.word_count=[100, 200]"],
        ["gopher_quality.word_count='off'", "per_language.en.gopher_quality.word_count=[1, 90]"],
        ["c4.sentence_count=[8, 1000]", "language.allowed=['en']"],
        ["language.score=[0.99, 1.0]", "gopher_quality.mean_word_length=[4, 4.6]"],
    ],
)
def test_an_ablation_says_what_a_run_then_does(run, tmp_path, changes):
    before, after = load(None, run), load(None, [*run, *changes])
    found = ablate(before, after)
    real = load(None, [*run, *changes, f"run.directory={tmp_path}/run"])
    run_inline(real)
    old, new = kept_ids(before.run.directory), kept_ids(real.run.directory)
    assert (found.before.documents, found.after.documents) == (len(old), len(new))
    assert (found.both, found.only_before, found.only_after) == (
        len(old & new),
        len(old - new),
        len(new - old),
    )
    assert found.after.unmeasured == 0
    rows = {row.rule: row.count for row in results.run_funnel(real.run.directory) if row.rule}
    assert {rule: n for rule, n in found.after.losses.items() if n} == {
        rule: n for rule, n in rows.items() if n
    }
    chars = sum(
        pc.sum(t["num_chars"]).as_py() or 0 for t in export.tables(real.run.directory, "corpus")
    )
    assert found.after.chars == chars


def dropping(run, name):
    return load(None, [*run, *switched_off(load(None, run), [name])])


def test_dropping_a_filter_of_refine_is_exact_and_of_extract_counted_apart(run):
    config = load(None, run)
    found = ablate(config, dropping(run, "gopher_quality"))
    total = found.before.documents + sum(
        n for rule, n in found.before.losses.items() if rule.startswith("gopher_quality")
    )
    assert found.after.documents == total and found.only_before == 0
    found = ablate(config, dropping(run, "c4.sentence_count"))
    assert found.after.documents == found.before.documents
    assert found.after.unmeasured == found.before.losses["c4.sentence_count"] > 0


def test_tokens_are_those_of_the_run_per_character(run):
    config = load(None, run)
    found = ablate(config, config)
    entry = json.loads(open(f"{config.run.directory}/catalog.jsonl").read().splitlines()[-1])
    assert found.before.tokens == found.after.tokens == entry["tokens"]
    assert (found.jaccard, found.hosts) == (1.0, [])


@pytest.mark.parametrize(
    "dropped, message",
    [
        ("c5", "did you mean 'c4'"),
        ("c4.sentence_cuont", "did you mean 'c4.sentence_count'"),
        ("zzz", "known: language, pii"),
    ],
)
def test_dropping_what_is_not_there_is_refused(run, dropped, message):
    with pytest.raises(ConfigError, match=message):
        dropping(run, dropped)


def test_a_filter_that_was_not_measured_is_refused(run):
    config = load(None, run)
    with pytest.raises(
        ValueError, match="did not measure 'fineweb'; it has scores of c4, gopher_quality"
    ):
        ablate(config, load(None, [*run, "extract.filters=['c4', 'fineweb']"]))
    with pytest.raises(
        ValueError, match=r"measured with c4.min_line_words = 3, not 5: only bounds can be changed"
    ):
        ablate(config, load(None, [*run, "c4.min_line_words=5"]))
    with pytest.raises(
        ValueError, match=r"measured with per_language.de.c4.min_line_words = 3, not 5"
    ):
        ablate(config, load(None, [*run, "per_language.de.c4.min_line_words=5"]))
    with pytest.raises(ValueError, match=r"measured with pii.entities = .*, not \[\"SECRET\"\]"):
        ablate(config, load(None, [*run, "pii.entities=['SECRET']"]))
    with pytest.raises(ValueError, match=r"measured with dedup.num_bands = 14, not 26"):
        ablate(config, load(None, [*run, "dedup.num_bands=26"]))
    assert (
        ablate(config, load(None, [*run, "pack.seq_len=32", "dedup.alarm_share=0.5"])).jaccard == 1
    )


def test_a_model_that_was_trained_again_under_its_name_is_refused(options, tmp_path):
    model = _copied(str(ROOT / "models" / "quality-en.ftz"), tmp_path)
    line = [
        *options,
        f"run.directory={tmp_path}/run",
        "refine.filters=['quality']",
        f"quality.model={model}",
    ]
    run_inline(load(None, line))
    assert (
        ablate(load(None, line), load(None, [*line, "quality.score=[0.5, 1.0]"])).before.documents
        > 0
    )
    card = tmp_path / "copy.bin.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"licence": "another"}))
    with pytest.raises(
        ValueError,
        match=r'measured with another file than ".*copy.bin" now is \(quality.model\); run it again',
    ):
        ablate(load(None, line), load(None, line))


def _record(html):
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html.encode()
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://a.example/\r\nContent-Length: {len(http)}\r\n\r\n"
    return gzip.compress(head.encode() + http + b"\r\n\r\n")


def test_other_languages_may_let_in_pages_that_the_gate_turned_away(tmp_path):
    pages = "".join(f"<p>{' '.join(SENTENCES['de'])}</p>" for _ in range(3))
    (tmp_path / "de.warc.gz").write_bytes(
        b"".join(_record(f"<html><body><article>{pages}{i}</article>") for i in range(4))
    )
    line = [
        f"input.paths=['{tmp_path}/de.warc.gz']",
        f"run.directory={tmp_path}/run",
        *FILTERS,
        *OPEN,
        "dedup.enabled=false",
    ]
    before = load(None, line)
    run_inline(before)
    for languages, unmeasured in (("['en']", 0), ("['en', 'de']", 4), ("[]", 4)):
        found = ablate(
            before, load(None, [*line, f"language.allowed={languages}", "language.score='off'"])
        )
        assert (found.before.unmeasured, found.after.unmeasured) == (0, unmeasured)


# --- why ------------------------------------------------------------------------------------------


def test_why_says_where_each_score_lies_in_the_run(run):
    root = load(None, run).run.directory
    rows = [
        r
        for kind in ("corpus", "rejected")
        for t in export.tables(root, kind)
        for r in t.to_pylist()
    ]
    counts = [
        r["gopher_quality.word_count"]
        for r in rows
        if r.get("gopher_quality.word_count") is not None
    ]
    row = next(r for r in rows if r.get("gopher_quality.word_count") is not None)
    [fate] = why.why(root, row["url"])
    value = row["gopher_quality.word_count"]
    expected = (
        100 * (sum(n < value for n in counts) + sum(n == value for n in counts) / 2) / len(counts)
    )
    assert fate["percentiles"]["gopher_quality.word_count"] == pytest.approx(expected)
    assert fate["percentiles"].keys() == fate["scores"].keys()
    assert read_state(root).stage


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 9))
def test_rank_is_the_mean_of_strict_and_weak(values, value):
    strict, weak = (sum(v < value for v in values), sum(v <= value for v in values))
    with duckdb.connect() as connection:
        connection.from_arrow(pa.table({"score": values})).create("pages")
        rank = why._rank(Sample(connection, 0, 0), "pages", "score", value)
    assert rank == pytest.approx(100 * (strict + weak) / 2 / len(values))
