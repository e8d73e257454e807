"""Configuration: what is wrong is said with its place and the nearest right thing, before anything
runs.
"""

import json
import math
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import percentiles
from pipeline.config.digests import file_digests, measured_with, texts_made_with
from pipeline.config.load import load
from pipeline.config.show import show
from pipeline.models.benchmark_index import build_index
from pipeline.models.options import IndexOptions
from pipeline.run.execute import Run
from pipeline.run.keys import stage_keys
from pipeline.run.state import RunState, Setting
from pipeline.study.ablate import require_measured
from stages.formats.errors import ConfigError
from tests.support.paths import ROOT

GOOD = '[run]\ndirectory = "r"\n[input]\npaths = ["x.warc.gz"]\n'


@pytest.fixture
def config(tmp_path):
    def write(text, *overrides):
        (tmp_path / "c.toml").write_text(GOOD + text)
        return load(tmp_path / "c.toml", overrides)

    return write


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "[dedup]\nnum_band = 26\n",
            r"c\.toml:6: unknown config key 'dedup.num_band'; did you mean 'dedup.num_bands'",
        ),
        ("[names]\nenabled = true\n", r"c\.toml:5: 'names' was renamed: write 'ner'"),
        (
            "[dedup]\nlines = 'line'\n",
            r"c\.toml:6: 'dedup.lines' was renamed: write 'dedup.line_level'",
        ),
        (
            "[gopher_quality]\nword_cuont = [1, 2]\n",
            r"c\.toml:6: .*did you mean 'gopher_quality.word_count'",
        ),
        (
            "[gofer_quality]\nword_count = [1, 2]\n",
            r"c\.toml:5: unknown section or stage 'gofer_quality'; did you mean",
        ),
        (
            "[extract.gate]\nenabeld = true\n",
            r"c\.toml:6: unknown config key 'extract.gate.enabeld'; did you mean 'extract.gate.enabled'",
        ),
        (
            '[dedup]\nnum_bands = "many"\n',
            r"c\.toml:6: dedup.num_bands = 'many': Input should be a valid integer",
        ),
        (
            "[gopher_quality]\nword_count = [9, 2]\n",
            r"c\.toml:6: gopher_quality.word_count.*low must not exceed high",
        ),
        ("[gopher_quality]\nword_count = 3\n", r"c\.toml:6: gopher_quality.word_count = 3"),
        ('[extract]\nengine = "trafilatur"\n', r"c\.toml:6: extract.engine = 'trafilatur'"),
        (
            '[extract]\nfilters = ["c5"]\n',
            r"unknown filter \(in extract.filters\) 'c5'; did you mean 'c4'",
        ),
        ('[extract]\nfilters = ["c4", "c4"]\n', "names a filter twice"),
        ("[pack]\nseq_len = 1\n", r"pack.seq_len = 1: Input should be greater than or equal to 2"),
        ('[dedup]\nkeep_rule = "shortest"\n', r"dedup.keep_rule = 'shortest'"),
        (
            '[language]\nmodel = "no.ftz"\n',
            r"c\.toml:6: language.model: no such file or folder: no.ftz",
        ),
        ('[dedup]\nkeep_rule = "best:quality.score"\n', r"unknown score \(in dedup.keep_rule"),
        (
            '[pack]\nencoding = "cl100k"\n',
            r"c\.toml:6: pack.tokenizer: unknown encoding 'cl100k'; tiktoken has",
        ),
        (
            '[pack]\ntokenizer = "./tokenizer.json"\n',
            r"c\.toml:6: pack.tokenizer: no such file or folder: \./tokenizer.json",
        ),
        (
            '[pack]\ntokenizer = "cl100k_base"\nencoding = "cl100k_base"\n',
            r"c\.toml:7: pack.encoding is an old name of pack.tokenizer, which is set as well",
        ),
        ('[pack]\nhashes = ["md5", "md5"]\n', r"c\.toml:6: pack.hashes = .*unique names"),
        (
            '[extract]\nengine = "trafilatura"\nformat = "markdown"\n',
            r"extract.*: format = 'markdown' needs engine = 'blocks'; trafilatura writes plain text",
        ),
        ("[extract]\nconfidence = [0.9, 0.2]\n", r"extract.confidence.*low must not exceed"),
        ("dedup = 3\n", r"unknown config key 'input.dedup'"),
        (
            '[language]\nallowed = ["xq"]\n',
            r"c\.toml:5: language: the model lid.176.ftz has no language 'xq'; ",
        ),
        ('[language]\nallowed = ["eng", "de"]\n', r"no language 'eng'; did you mean 'en'"),
        (
            "[language]\nline_share = [0.5, 1.0]\n",
            "bounded but not measured: set language.measure_lines = true",
        ),
        (
            "[per_language]\nen = 3\n",
            r"per_language.en is a section: write \[per_language.de.perplexity\]",
        ),
        (
            "[per_language.de.c4]\n",
            r"c\.toml:5: unknown language \(of language.allowed\) 'per_language.de'; did you mean|known: per",
        ),
        (
            "[per_language.en.c5]\n",
            r"c\.toml:5: unknown filter 'per_language.en.c5'; did you mean 'per_language.en.c4'",
        ),
        ("[per_language.en.dedup]\nngram = 4\n", "unknown filter 'per_language.en.dedup'"),
        (
            "[per_language.en.c4]\nsentence_cuont = [1, 2]\n",
            r"c\.toml:6: unknown config key 'per_language.en.c4.sentence_cuont'; did you mean 'per_language.en.c4.sentence_count'",
        ),
        (
            "[per_language.en.c4]\nsentence_count = [3, 2]\n",
            r"c\.toml:6: per_language.en.c4.sentence_count.*low must not exceed",
        ),
        (
            '[per_language.en.language]\nallowed = ["de"]\n',
            "unknown bound of a language 'per_language.en.language.allowed'",
        ),
        (
            '[c4]\nsentence_count = ["p5", "p100"]\n',
            r"c\.toml:6: c4.sentence_count = .*run `gristmill calibrate`.*r/calibration.json",
        ),
        ('[c4]\nsentence_count = ["p5"]\n', r"c\.toml:6: c4.sentence_count = .*give \[low, high\]"),
        ('[c4]\nsentence_count = ["p101", "p100"]\n', r"c\.toml:6: c4.sentence_count"),
        ('[run]\ncalibration = "no.json"\n', "Cannot declare"),
        ("[extract\n", "not valid TOML"),
    ],
)
def test_a_wrong_file_stops_with_its_line_and_advice(config, text, message):
    with pytest.raises(ConfigError, match=message):
        config(text)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "dedup.num_band=3",
            "command line: unknown config key 'dedup.num_band'; did you mean 'dedup.num_bands'",
        ),
        ("dedup", "is not section.key=value"),
        ("num_bands=3", "command line: unknown section or stage 'num_bands'; known: run"),
        ("deduq.num_bands=3", "unknown section or stage 'deduq'; did you mean 'dedup'"),
        ("run.directory.x=3", "'directory' is a value, not a section"),
        ("input.paths=[]", "input.paths is empty"),
        ("run.directory=", "run.directory is not set"),
    ],
)
def test_a_wrong_override_stops(config, override, message):
    with pytest.raises(ConfigError, match=message):
        config("", override)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "good.toml").write_text(GOOD)
    with pytest.raises(
        ConfigError, match=r"no such config file: .*goood\.toml; there are .*good\.toml"
    ):
        load(tmp_path / "goood.toml")


def test_command_line_over_file_over_defaults_and_each_says_where_from(config):
    loaded = config(
        "[dedup]\nnum_bands = 20\nrows_per_band = 4\n",
        "dedup.num_bands=26",
        "extract.engine=resiliparse",
    )
    origins = {key: (value, origin) for key, value, origin in show(loaded)}
    assert origins["dedup.num_bands"] == ("26", "command line")
    assert origins["dedup.rows_per_band"][0] == "4" and origins["dedup.rows_per_band"][1].endswith(
        "c.toml:7"
    )
    assert origins["dedup.ngram"] == ("5", "default")
    assert origins["extract.engine"] == ('"resiliparse"', "command line")


def test_what_show_prints_is_a_config_that_loads_to_the_same(config, tmp_path):
    loaded = config(
        "", 'gopher_quality.word_count="off"', "gopher_quality.stop_word_count=[1, inf]"
    )
    again = load(tmp_path / "c.toml", [f"{key}={value}" for key, value, _ in show(loaded)])
    assert [row[:2] for row in show(again)] == [row[:2] for row in show(loaded)]


@pytest.mark.parametrize(
    "override, changed",
    [
        ("extract.num_cpus=2", []),
        ("pack.parallelism=2", []),
        ("run.attempts=9", []),
        ("pack.seq_len=512", ["pack"]),
        ("ner.enabled=true", ["ner", "pack"]),
        ("refine.scrub_pii=false", ["refine", "ner", "pack"]),
        ("dedup.keep_rule=newest", ["dedup", "refine", "ner", "pack"]),
        ("dedup.alarm_share=0.5", []),
        ("dedup.partition_bytes=1_000_000", []),
        ("dedup.num_bands=26", ["extract", "graph", "dedup", "refine", "ner", "pack"]),
        (
            "gopher_quality.word_count=[60, 1000]",
            ["extract", "graph", "dedup", "refine", "ner", "pack"],
        ),
    ],
)
def test_a_change_touches_its_stage_and_those_below(config, override, changed):
    before, after = stage_keys(config(""), ()), stage_keys(config("", override), ())
    assert [stage for stage in before if before[stage] != after[stage]] == changed


@pytest.mark.parametrize(
    "override",
    [
        "gopher_quality.word_count=[60, 1000]",
        "dedup.num_bands=26",
        "extract.keep_rejected_text=1.0",
        "extract.confidence=[0.5, 1.0]",
        'license.allowed=["cc-by-4.0"]',
    ],
)
def test_policy_keeps_the_content_half_of_the_extract_key(config, override):
    before, after = (
        stage_keys(config(""), ())["extract"],
        stage_keys(config("", override), ())["extract"],
    )
    assert before[:8] == after[:8] and before[8:] != after[8:]


def test_a_model_is_known_by_its_content_and_not_by_its_place(config, tmp_path):
    from filters.language import BUNDLED

    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        (folder / "lid.ftz").write_bytes(BUNDLED.read_bytes())
    here, there = (
        stage_keys(config("", f"language.model={f}/lid.ftz"), ())
        for f in (tmp_path, tmp_path / "elsewhere")
    )
    assert here == there
    (tmp_path / "lid.ftz").write_bytes((ROOT / "models" / "quality-en.ftz").read_bytes())
    all_languages = "language.allowed=[]"
    here, there = (
        stage_keys(config("", all_languages, f"language.model={f}/lid.ftz"), ())
        for f in (tmp_path, tmp_path / "elsewhere")
    )
    assert here["extract"][:8] != there["extract"][:8]


def test_a_language_model_that_is_none_is_refused(config, tmp_path):
    (tmp_path / "none.ftz").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"language: .*none\.ftz has wrong file format"):
        config("", f"language.model={tmp_path}/none.ftz")


def test_another_engine_is_other_content(config):
    assert (
        stage_keys(config(""), ())["extract"][:8]
        != stage_keys(config("", "extract.engine=resiliparse"), ())["extract"][:8]
    )


# --- languages and percentiles --------------------------------------------------------------------

PER_LANGUAGE = """
[language]
allowed = ["en", "de", "fr"]
[c4]
sentence_count = [5, 1000]
curly_bracket_count = [0, 3]
[per_language.de.c4]
sentence_count = [2, 1000]
[per_language.fr.language]
score = [0.5, 1.0]
"""


def test_a_language_has_what_is_said_for_it_over_what_is_said_for_all(config):
    named = config(PER_LANGUAGE).named("c4")
    assert (named.of("de").sentence_count, named.of("en").sentence_count) == ((2, 1000), (5, 1000))
    assert named.of("de").curly_bracket_count == named.of(None).curly_bracket_count == (0, 3)
    language = config(PER_LANGUAGE).named("language")
    assert (language.of("fr").score, language.of("de").score) == ((0.5, 1.0), (0.65, 1.0))


def test_languages_can_be_set_on_the_command_line_and_are_shown(config):
    loaded = config(PER_LANGUAGE, "per_language.de.c4.sentence_count=[1, 9]")
    shown = {key: (value, origin) for key, value, origin in show(loaded)}
    assert shown["per_language.de.c4.sentence_count"] == ("[1.0, 9.0]", "command line")
    assert "per_language.de.c4.curly_bracket_count" not in shown
    assert shown["per_language.fr.language.score"][1].endswith("c.toml:14")


@pytest.mark.parametrize(
    "override, same_content",
    [
        ("per_language.de.c4.sentence_count=[1, 9]", True),
        ("per_language.de.c4.min_line_words=1", False),
    ],
)
def test_a_bound_of_a_language_is_policy_and_a_setting_content(config, override, same_content):
    before, after = (stage_keys(config(PER_LANGUAGE, *o), ())["extract"] for o in ((), (override,)))
    assert before != after and (before[:8] == after[:8]) == same_content


@pytest.mark.parametrize(
    "override, same_content",
    [
        ("listed_ratio=[0, 0.5]", True),
        (f"lists='{ROOT}/tests/filters/lists'", True),
        ("lists=''", False),
    ],
)
def test_a_file_that_a_language_shares_is_no_file_of_its_own(config, override, same_content):
    toxicity = f"[toxicity]\nlists = '{ROOT}/tests/filters/lists'\nmodel = '{ROOT}/models/quality-en.ftz'\nlabel = 'hq'\n"
    text = "[extract]\nfilters = ['toxicity']\n[language]\nallowed = ['en']\n" + toxicity
    before, after = (
        stage_keys(config(text, *o), ())["extract"]
        for o in ((), (f"per_language.en.toxicity.{override}",))
    )
    assert (before[:8] == after[:8]) == same_content


def table(config, **scores):
    return percentiles.dump(
        percentiles.Table(
            {"": 400, "en": 200, "de": 200},
            {name.replace("__", "."): by_language for name, by_language in scores.items()},
            {name: measured_with(config, name) for name in ("c4", "fineweb", "language")},
        )
    )


UP, DOWN = [float(i) for i in range(1001)], [float(i) / 10 for i in range(1001)]


def test_numbers_of_a_language_need_no_percentiles_of_it(config, tmp_path):
    general = 'c4.sentence_count=["p10", "p100"]'
    file = tmp_path / "cal.json"
    file.write_bytes(table(config(PER_LANGUAGE), c4__sentence_count={"": UP, "en": UP}))
    loaded = config(PER_LANGUAGE, f"run.calibration={file}", general)
    assert loaded.named("c4").of("de").sentence_count == (2, 1000)
    shown = {key: origin for key, _, origin in show(loaded)}
    assert "percentiles" not in shown["per_language.de.c4.sentence_count"]


def test_percentiles_are_looked_up_per_language_and_say_so(config, tmp_path):
    plain = config(PER_LANGUAGE)
    (tmp_path / "cal.json").write_bytes(
        table(plain, c4__sentence_count={"": UP, "en": UP, "de": DOWN})
    )
    bounds = ['c4.sentence_count=["p5", "p100"]', f"run.calibration={tmp_path}/cal.json"]
    loaded = config(
        PER_LANGUAGE.replace("[per_language.de.c4]\nsentence_count = [2, 1000]\n", ""), *bounds
    )
    named = loaded.named("c4")
    assert named.of("en").sentence_count == named.of("fr").sentence_count == (50.0, math.inf)
    assert named.of("de").sentence_count == (5.0, math.inf)
    shown = {key: origin for key, _, origin in show(loaded)}
    assert (
        shown["c4.sentence_count"]
        == "command line, percentiles p5 to p100 of `gristmill calibrate`"
    )
    assert shown["per_language.de.c4.sentence_count"] == shown["c4.sentence_count"]
    # a number that is said for a language stands over a percentile that is said for all
    assert config(PER_LANGUAGE, *bounds).named("c4").of("de").sentence_count == (2, 1000)


def test_p0_and_p100_leave_a_side_open_that_is_theirs_and_need_no_sample(config, tmp_path):
    (tmp_path / "cal.json").write_bytes(
        table(config(PER_LANGUAGE), c4__sentence_count={"": UP, "en": UP, "de": DOWN})
    )
    path, key = f"run.calibration={tmp_path}/cal.json", "c4.sentence_count"
    assert config(PER_LANGUAGE, path, f'{key}=["p100", inf]').filters["c4"].sentence_count == (
        1000,
        math.inf,
    )
    french = config(PER_LANGUAGE, path, f'per_language.fr.{key}=["p0", "p100"]')
    assert french.named("c4").of("fr").sentence_count == (-math.inf, math.inf)
    with pytest.raises(
        ConfigError,
        match="0 documents of language 'fr', too few for percentiles of its own, or none",
    ):
        config(PER_LANGUAGE, path, f'per_language.fr.{key}=["p1", "p100"]')


def test_of_a_run_in_one_language_its_documents_are_all_documents(config, tmp_path):
    whole = percentiles.Table(
        {"": 400, "en": 400},
        {"c4.sentence_count": {"": UP}},
        {"c4": measured_with(config(""), "c4")},
    )
    (tmp_path / "cal.json").write_bytes(percentiles.dump(whole))
    bounds = [
        'per_language.en.c4.sentence_count=["p5", "p60"]',
        f"run.calibration={tmp_path}/cal.json",
    ]
    assert config("", *bounds).named("c4").of("en").sentence_count == (50, 600)
    # of an older version
    (tmp_path / "cal.json").write_bytes(percentiles.dump(whole._replace(documents={"": 400})))
    assert config("", *bounds).named("c4").of("en").sentence_count == (50, 600)
    # the percentiles of all are not those of one of two
    (tmp_path / "cal.json").write_bytes(
        percentiles.dump(whole._replace(documents={"": 400, "de": 370, "en": 30}))
    )
    with pytest.raises(
        ConfigError, match="30 documents of language 'en', too few for percentiles of its own"
    ):
        config("", *bounds)


def test_a_table_of_other_texts_is_refused(config, tmp_path):
    engine = '[extract]\nengine = "trafilatura"\n'
    with_texts = percentiles.parse(table(config(engine), c4__sentence_count={"": UP}))
    with_texts.made_with["texts"] = texts_made_with(config(engine))
    (tmp_path / "cal.json").write_bytes(percentiles.dump(with_texts))
    bounds = ['c4.sentence_count=["p5", "p60"]', f"run.calibration={tmp_path}/cal.json"]
    assert config(engine, *bounds, "extract.timeout_seconds=20").named("c4").of(
        "en"
    ).sentence_count == (50, 600)
    for override in (
        "extract.engine=resiliparse",
        "dedup.line_level=line",
        "extract.trafilatura.favor_precision=true",
    ):
        with pytest.raises(
            ConfigError, match=r"measured on texts of another extract.engine .* or dedup.line_level"
        ):
            config(engine, *bounds, override)


def test_a_language_s_section_of_a_filter_that_no_stage_names_is_not_shown(config):
    shown = [key for key, _, _ in show(config(PER_LANGUAGE, "extract.filters=[]"))]
    assert "language.score" in shown and not [key for key in shown if "c4" in key]


def test_the_name_of_a_word_list_is_part_of_its_content(config, tmp_path):
    (tmp_path / "lists").mkdir()
    keys = []
    for language in ("en", "de"):
        (tmp_path / "lists" / language).write_text("darn\n")
        loaded = config(
            f"[refine]\nfilters = ['toxicity']\n[language]\nallowed = ['{language}']\n[toxicity]\nlists = '{tmp_path}/lists'\n"
        )
        keys.append(file_digests(loaded))
        (tmp_path / "lists" / language).unlink()
    assert keys[0] != keys[1]


def test_the_bound_by_which_a_filter_cuts_decides_what_it_and_those_after_it_measure(
    config, tmp_path
):
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"question": " ".join(f"word{i}" for i in range(40))}) + "\n"
    )
    build_index(IndexOptions(files=[str(tmp_path / "set.jsonl")], output=tmp_path / "index"))
    text = f"[extract]\nfilters = ['decontamination', 'c4']\n[decontamination]\nindex = '{tmp_path}/index'\n"
    for action, same in (("drop", True), ("trim", False)):
        bounds = [f"decontamination.coverage=[0, {x}]" for x in (0.1, 0.9)]
        one, other = (config(text, f"decontamination.action={action}", bound) for bound in bounds)
        assert (stage_keys(one, ())["extract"][:8] == stage_keys(other, ())["extract"][:8]) == same
        assert (measured_with(one, "c4") == measured_with(other, "c4")) == same


def test_percentiles_bound_nothing_before_they_are_calibrated(config, tmp_path):
    config("")
    loaded = load(tmp_path / "c.toml", ['c4.sentence_count=["p5", 7]'], calibrated=False)
    assert loaded.filters["c4"].sentence_count == (-math.inf, 7)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["c4.min_line_words=1"],
            "cal.json was measured with other settings or another model of 'c4'; run `gristmill calibrate`",
        ),
        (
            ['c4.curly_bracket_count=["p1", "p2"]'],
            "cal.json holds no sample of c4.curly_bracket_count; run `gristmill calibrate`",
        ),
        (
            ['c4.sentence_count=["p60", "p50"]'],
            "the first percentile must be below the second, got p60 and p50",
        ),
        (['c4.sentence_count=["p100", "p100"]'], "the first percentile must be below the second"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(config, tmp_path, overrides, message):
    (tmp_path / "cal.json").write_bytes(table(config(""), c4__sentence_count={"": UP}))
    with pytest.raises(ConfigError, match=message):
        config(
            "",
            'c4.sentence_count=["p5", "p100"]',
            f"run.calibration={tmp_path}/cal.json",
            *overrides,
        )


@pytest.mark.parametrize(
    "text, message", [(None, "no such file"), ("{}", "not a table"), ("[", "not a table")]
)
def test_a_calibration_that_is_none_is_refused(config, tmp_path, text, message):
    if text is not None:
        (tmp_path / "cal.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config("", f"run.calibration={tmp_path}/cal.json")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(0, 100))
def test_percentiles_are_numpys(values, percent):
    found = percentiles.Table(
        {}, {"s": {"": percentiles.quantiles(np.array([*values, math.nan]))}}, {}
    )
    assert found.value("s", percent, "") == pytest.approx(
        np.percentile(values, percent), rel=1e-9, abs=1e-6
    )


def test_what_a_job_was_sent_with_is_the_same_input_wherever_it_is_unpacked(tmp_path, monkeypatch):
    found = []
    (tmp_path / "b.jsonl").write_text("{}")
    for package in ("_ray_pkg_1", "_ray_pkg_2"):
        folder = tmp_path / package
        (folder / "pages").mkdir(parents=True)
        (folder / "pages" / "a.jsonl").write_text("{}")
        (folder / "list.txt").write_text("bad.example")
        monkeypatch.chdir(folder)
        overrides = [
            f"run.directory={tmp_path}/run",
            "url_policy.blocked_lists=['list.txt']",
            f"input.paths=['pages/*.jsonl', '{tmp_path}']",
        ]
        config = load(None, overrides)
        assert load(None, [*overrides, "input.paths=['.']"]).input.paths == (".",)
        assert config.input.paths == (
            "pages/*.jsonl",
            str(tmp_path),
        ) and config.url_policy.blocked_lists == ("list.txt",)
        found.append((Run(config).inputs(extend=False)[0], Run(config).keys))
    assert found[0] == found[1]


def test_an_entry_of_a_blocklist_that_can_never_match_is_named_with_its_line(tmp_path):
    (tmp_path / "list").write_text("good.example\nbad entry\n")
    message = rf"url_policy: {tmp_path}/list, line 2: 'bad entry' can never match: several words"
    with pytest.raises(ConfigError, match=message):
        load(
            None,
            [
                "run.directory=/r",
                "input.paths=['/x']",
                f"url_policy.blocked_lists=['{tmp_path}/list']",
            ],
        )


@pytest.mark.parametrize(
    "key, value", [("run.directory", "runs/x"), ("run.directory", "."), ("run.catalog", "runs/x")]
)
def test_a_run_directory_that_ray_would_remove_with_the_job_is_refused(
    tmp_path, monkeypatch, key, value
):
    (tmp_path / "_ray_pkg_1").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_1")
    with pytest.raises(
        ConfigError,
        match=rf"{key} = .* lies in the job's working directory.*write an absolute path",
    ):
        load(None, ["run.directory=/runs/x", "input.paths=['x']", f"{key}={value}"])


def test_what_a_job_was_sent_with_is_to_ablate_what_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = [
        f"run.directory={tmp_path}/run",
        f"input.paths=['{tmp_path}/pages']",
        "extract.filters=[]",
        "refine.filters=[]",
    ]
    now = load(None, here)
    values = {key: Setting(tomllib.loads(f"v = {value}")["v"], "") for key, value, _ in show(now)}

    def ledger(paths):
        config = values | {"input.paths": Setting(paths, "")}
        state = RunState(config=config)
        return SimpleNamespace(root="r", state=state, setting=lambda key, default: default)

    require_measured(now, ledger(["pages"]))
    with pytest.raises(ValueError, match=r'measured with input.paths = \["other"\]'):
        require_measured(now, ledger(["other"]))
