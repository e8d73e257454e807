"""Estimates: the arithmetic against slow oracles, the sample, and an estimate against its run."""

import gzip
import itertools
import json
import math
import random
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.config.load import load
from pipeline.engine.units import in_process
from pipeline.report.report import write_report
from pipeline.report.run_data import gather
from pipeline.run.execute import Run
from pipeline.study.estimate import estimate, expected
from pipeline.study.input_sample import UNITS, draw, is_drawn, parse_share
from stages.formats.errors import ConfigError
from tests.support.inline import Silent, run_inline
from tests.support.paths import ROOT

AMOUNTS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e-3)), min_size=1, max_size=30)


def resampled(amounts, shares):
    """The 5th and the 95th percentile of many resamples, by the standard library."""
    draw, pairs = random.Random(1), list(zip(amounts, shares, strict=True))
    ratios = []
    for _ in range(4000):
        drawn = draw.choices(pairs, k=len(pairs))
        ratios.append(sum(a for a, _ in drawn) / sum(s for _, s in drawn))
    cuts = statistics.quantiles(ratios, n=20, method="inclusive")
    return cuts[0], cuts[-1]


@given(AMOUNTS, st.floats(0, 1e6))
def test_the_expected_amount_is_the_ratio_of_sums_within_its_interval(units, fixed):
    amounts, shares = zip(*units, strict=True)
    figure = expected(np.array([fixed, *amounts]), shares)
    assert figure.value == pytest.approx(fixed + math.fsum(amounts) / math.fsum(shares))
    if len(units) < 3:
        assert figure.low is None and figure.high is None
    else:
        assert min(a / s for a, s in units) + fixed <= figure.low * (1 + 1e-9) + 1e-9
        assert figure.high <= (max(a / s for a, s in units) + fixed) * (1 + 1e-9) + 1e-9


def test_the_interval_holds_the_middle_nine_tenths_of_resamples():
    draw = random.Random(0)
    shares = [draw.uniform(1e-4, 1e-3) for _ in range(20)]
    amounts = [share * draw.gauss(100, 20) for share in shares]
    figure = expected(np.array([0.0, *amounts]), shares)
    low, high = resampled(amounts, shares)
    assert figure.low == pytest.approx(low, rel=0.02)
    assert figure.high == pytest.approx(high, rel=0.02)


@given(st.lists(st.floats(0.1, 100), min_size=3, max_size=20), st.floats(0.1, 1e3))
def test_amounts_in_proportion_to_size_and_a_full_sample_leave_no_interval(sizes, rate):
    shares = [size / sum(sizes) / 2 for size in sizes]
    figure = expected(np.array([0.0, *(rate * share for share in shares)]), shares)
    assert figure.low == pytest.approx(rate) == pytest.approx(figure.high)
    everything = expected(np.array([0.0, *sizes]), [2 * share for share in shares])
    assert everything.low == pytest.approx(sum(sizes), rel=1e-5)
    assert everything.high == pytest.approx(sum(sizes), rel=1e-5)


@given(st.integers(0, 500), st.floats(0.001, 1), st.floats(0, 1, exclude_max=True))
def test_a_sample_takes_its_share_evenly(count, share, start):
    drawn = [i for i in range(count) if is_drawn(i, share=share, start=start)]
    assert len(drawn) == pytest.approx(count * share, abs=1)
    steps = [b - a for a, b in itertools.pairwise(drawn)]
    assert all(abs(step - 1 / share) <= 1 + 1e-9 for step in steps)


@pytest.mark.parametrize("text, share", [("0.1%", 0.001), ("100%", 1.0), (" 5 % ", 0.05)])
def test_a_sample_is_a_percentage(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0%", "150%", "a bit", "0.1", "-1%", "nan%", "", "1e-3%", "٥%"])
def test_what_is_no_percentage_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"above 0% and at most 100%, as 0\.1%"):
        parse_share(text)


# --- the sample -----------------------------------------------------------------------------------


def texts(folder, files, rows=40, *overrides):
    """A configuration over JSONL files of so many rows each."""
    for n in range(files):
        lines = [
            json.dumps(
                {"text": f"{n} {i} " + "word " * (i % 7), "url": f"https://a.example/{n}/{i}"}
            )
            for i in range(rows)
        ]
        (folder / f"in-{n:03}.jsonl").write_text("\n".join(lines) + "\n")
    given = [
        f"input.paths=['{folder}/in-*.jsonl']",
        "input.format=jsonl",
        "input.url_column=url",
        f"run.directory={folder}/run",
    ]
    return load(
        None,
        [
            *given,
            "refine.filters=[]",
            "extract.filters=[]",
            "pack.seq_len=32",
            "dedup.enabled=false",
            *overrides,
        ],
    )


def drawn_from(config, folder, share):
    return draw(config, Run(config).inputs(extend=False), share=share, folder=str(folder))


def test_of_many_files_whole_ones_are_sampled_and_their_sizes_are_their_shares(tmp_path):
    drawn = drawn_from(texts(tmp_path, 40, 3), tmp_path / "sample", 0.5)
    sizes = {str(p): p.stat().st_size for p in tmp_path.glob("in-*")}
    assert len(drawn.paths) == len(set(drawn.paths)) == 20 and not (tmp_path / "sample").exists()
    assert drawn.shares == pytest.approx(
        [sizes[path] / sum(sizes.values()) for path in drawn.paths]
    )


@pytest.mark.parametrize("files, share", [(3, 0.25), (30, 0.05)])
def test_of_few_files_a_share_of_each_one_s_records_is_dealt_into_units(tmp_path, files, share):
    drawn = drawn_from(texts(tmp_path, files), tmp_path / "sample", share)
    rows = [json.loads(line) for path in drawn.paths for line in open(path)]
    assert len(drawn.paths) == UNITS and len({row["url"] for row in rows}) == len(rows)
    assert len(rows) == pytest.approx(files * 40 * share, abs=files)
    assert sum(drawn.shares) == pytest.approx(share, rel=0.2)
    assert len({row["url"].split("/")[3] for row in rows}) == min(files, UNITS)


def test_the_sample_of_a_warc_is_whole_records_and_follows_the_seed(tmp_path):
    warc = ROOT / "samples" / "debian-handbook.warc.gz"
    configs = [
        load(None, [f"input.paths=['{warc}']", f"run.directory={tmp_path}/run", f"run.seed={seed}"])
        for seed in (1, 1, 2, 3, 4)
    ]
    samples = []
    for n, config in enumerate(configs):
        drawn = drawn_from(config, tmp_path / str(n), 0.3)
        samples.append([open(path, "rb").read() for path in drawn.paths])
        assert sum(len(part) for part in samples[-1]) / warc.stat().st_size == pytest.approx(
            sum(drawn.shares)
        )
        assert all(gzip.decompress(part).startswith(b"WARC/1.") for part in samples[-1])
    # the draw depends on the file's path too, and two seeds may agree
    assert samples[0] == samples[1] and any(other != samples[0] for other in samples[2:])


def test_a_sample_of_nothing_is_an_error(tmp_path):
    texts(tmp_path, 1)
    for n in range(1, 21):
        (tmp_path / f"in-{n:03}.jsonl").touch()
    seen = set()
    for seed in range(20):  # whether the one file that holds anything is drawn is up to the seed
        options = [
            f"input.paths=['{tmp_path}/in-*.jsonl']",
            "input.format=jsonl",
            f"run.directory={tmp_path}/run",
            f"run.seed={seed}",
        ]
        try:
            assert sum(drawn_from(load(None, options), tmp_path / "sample", 0.5).shares) == 1
            seen.add("drawn")
        except ValueError as error:
            assert "of 21 inputs holds no record; raise --sample" in str(error)
            seen.add("not")
    assert seen == {"drawn", "not"}


def test_a_share_that_reaches_no_record_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no record; raise --sample"):
        drawn_from(texts(tmp_path, 1, 3), tmp_path / "sample", 1e-9)


# --- a whole estimate -----------------------------------------------------------------------------


def quickstart(folder):
    names = [
        f'"{ROOT}/samples/{n}.warc.gz"' for n in ("debian-handbook", "debian-handbook-translations")
    ]
    fixed = [
        f"run.directory={folder}/run",
        f"input.paths=[{', '.join(names)}]",
        "extract.engine=resiliparse",
        "pack.seq_len=512",
    ]
    fixed += [
        f"perplexity.model={ROOT}/models/wiki-en.5gram.bin",
        f"quality.model={ROOT}/models/quality-en.ftz",
    ]
    return load(ROOT / "configs" / "quickstart.toml", fixed)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_quickstart_is_estimated_and_its_report_compares(tmp_path):
    # models are loaded once in this process, by whichever run is the first
    run_inline(quickstart(tmp_path / "warm"))
    config = quickstart(tmp_path)
    run_inline(config)
    before = files_of(tmp_path / "run")
    found = estimate(config, Silent(), in_process, share=0.4, price=36.0, cores=1)
    after = files_of(tmp_path / "run")
    assert {str(p) for p in after.keys() - before.keys()} == {"estimate.json"}
    assert before.items() <= after.items()
    assert found.units == UNITS and found.share == pytest.approx(0.4, abs=0.1)
    assert [s.units for s in found.stages] == [2, 1, 2, 1]
    assert (
        found.total.core_seconds.low
        <= found.total.core_seconds.value
        <= found.total.core_seconds.high
    )
    assert found.total.cost.value == pytest.approx(found.total.core_seconds.value / 100)
    assert found.total.core_seconds.value == pytest.approx(
        sum(s.core_seconds.value for s in found.stages)
    )

    compared = {c.name: c for c in gather(config.run.directory).estimate}
    assert set(compared) == {
        f"{s}: {u}"
        for s in ("extract", "dedup", "refine", "pack")
        for u in ("core-seconds", "bytes")
    } | {"tokens"}
    # how near the seconds are depends on what else the machine does: see benchmarks.estimate
    # few pages are drawn, by the path of the file: in five folders 54,000 to 93,000 of 56,453 tokens
    assert compared["tokens"].expected["value"] == pytest.approx(compared["tokens"].real, rel=0.8)
    # of ten small parts as they are: twice and three times as many
    sizes = {
        name: c.expected["value"] / c.real
        for name, c in compared.items()
        if name in ("extract: bytes", "refine: bytes")
    }
    assert all(0.6 < ratio < 1.5 for ratio in sizes.values()), sizes
    assert "Against the estimate" in open(write_report(config.run.directory)).read()

    (tmp_path / "run" / "estimate.json").write_text(json.dumps({"keys": {}}))
    assert gather(config.run.directory).estimate == []  # of another configuration


def test_parquet_is_sampled_as_lines(tmp_path):
    config = texts(tmp_path, 1)
    rows = [json.loads(line) for line in open(tmp_path / "in-000.jsonl")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    options = [
        f"input.paths=['{tmp_path}/in.parquet']",
        "input.format=parquet",
        "input.url_column=url",
    ]
    options += [
        "refine.filters=[]",
        "extract.filters=[]",
        "pack.seq_len=32",
        "language.allowed=[]",
        "language.score=off",
    ]
    config = load(None, [*options, f"run.directory={tmp_path}/run"])
    found = estimate(config, Silent(), in_process, share=1.0, price=0.0, cores=4)
    assert found.share == pytest.approx(1.0) and found.tokens.value > 0
    assert found.duplicates is not None and found.duplicates >= 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["estimate.json"]


def test_an_interrupted_estimate_leaves_nothing(tmp_path):
    def interrupted(name, task, units, resources):
        assert list((tmp_path / "run").glob("estimate-*/inputs/part-*"))
        raise KeyboardInterrupt

    config = texts(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        estimate(config, Silent(), interrupted, share=0.5, price=0.0, cores=1)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sample", "0%"], "--sample 0%"),
        (["--sample", "a bit"], "--sample a bit"),
        (["--price-per-core-hour", "nan"], "0.04"),
    ],
)
def test_bad_options_end_the_command_before_anything_runs(tmp_path, options, message):
    warc = ROOT / "samples" / "debian-handbook.warc.gz"
    overrides = [f"input.paths=['{warc}']", f"run.directory={tmp_path}/run"]
    result = CliRunner().invoke(
        app, ["estimate", str(ROOT / "configs" / "quickstart.toml"), *overrides, *options]
    )
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "run").exists()
