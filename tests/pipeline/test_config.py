"""Configuration: what is wrong is said with its place and the nearest right thing, before anything runs."""

import pytest

from pipeline.config import ConfigError, load, show
from pipeline.run import stage_keys

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
        ("[dedup]\nnum_band = 26\n", r"c\.toml:6: unknown config key 'dedup.num_band'; did you mean 'dedup.num_bands'"),
        ("[gopher_quality]\nword_cuont = [1, 2]\n", r"c\.toml:6: .*did you mean 'gopher_quality.word_count'"),
        ("[gofer_quality]\nword_count = [1, 2]\n", r"c\.toml:5: unknown section or stage 'gofer_quality'; did you mean"),
        (
            "[extract.gate]\nenabeld = true\n",
            r"c\.toml:6: unknown config key 'extract.gate.enabeld'; did you mean 'extract.gate.enabled'",
        ),
        ('[dedup]\nnum_bands = "many"\n', r"c\.toml:6: dedup.num_bands = 'many': Input should be a valid integer"),
        ("[gopher_quality]\nword_count = [9, 2]\n", r"c\.toml:6: gopher_quality.word_count.*low must not exceed high"),
        ("[gopher_quality]\nword_count = 3\n", r"c\.toml:6: gopher_quality.word_count = 3"),
        ('[extract]\nengine = "trafilatur"\n', r"c\.toml:6: extract.engine = 'trafilatur'"),
        ('[extract]\nfilters = ["c5"]\n', r"unknown filter \(in extract.filters\) 'c5'; did you mean 'c4'"),
        ('[extract]\nfilters = ["c4", "c4"]\n', "names a filter twice"),
        ("[pack]\nseq_len = 1\n", r"pack.seq_len = 1: Input should be greater than or equal to 2"),
        ('[dedup]\nkeep_rule = "shortest"\n', r"dedup.keep_rule = 'shortest'"),
        ('[language]\nmodel = "no.ftz"\n', r"c\.toml:6: language.model: no such file or folder: no.ftz"),
        ('[dedup]\nkeep_rule = "best:quality.score"\n', r"unknown score \(in dedup.keep_rule"),
        ('[pack]\nencoding = "cl100k"\n', r"c\.toml:6: pack.encoding: unknown encoding 'cl100k'; tiktoken has"),
        ('[pack]\nhashes = ["md5", "md5"]\n', r"c\.toml:6: pack.hashes = .*unique names"),
        ("dedup = 3\n", r"unknown config key 'input.dedup'"),
        ("[extract\n", "not valid TOML"),
    ],
)
def test_a_wrong_file_stops_with_its_line_and_advice(config, text, message):
    with pytest.raises(ConfigError, match=message):
        config(text)


@pytest.mark.parametrize(
    "override, message",
    [
        ("dedup.num_band=3", "command line: unknown config key 'dedup.num_band'; did you mean 'dedup.num_bands'"),
        ("dedup", "is not section.key=value"),
        ("num_bands=3", "is not section.key=value"),
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
    with pytest.raises(ConfigError, match=r"no such config file: .*goood\.toml; there are .*good\.toml"):
        load(tmp_path / "goood.toml")


def test_command_line_over_file_over_defaults_and_each_says_where_from(config):
    loaded = config("[dedup]\nnum_bands = 20\nrows_per_band = 4\n", "dedup.num_bands=26", "extract.engine=resiliparse")
    origins = {key: (value, origin) for key, value, origin in show(loaded)}
    assert origins["dedup.num_bands"] == ("26", "command line")
    assert origins["dedup.rows_per_band"][0] == "4" and origins["dedup.rows_per_band"][1].endswith("c.toml:7")
    assert origins["dedup.ngram"] == ("5", "default")
    assert origins["extract.engine"] == ('"resiliparse"', "command line")


def test_what_show_prints_is_a_config_that_loads_to_the_same(config, tmp_path):
    loaded = config("", 'gopher_quality.word_count="off"', "gopher_quality.stop_word_count=[1, inf]")
    again = load(tmp_path / "c.toml", [f"{key}={value}" for key, value, _ in show(loaded)])
    assert [row[:2] for row in show(again)] == [row[:2] for row in show(loaded)]


@pytest.mark.parametrize(
    "override, changed",
    [
        ("extract.num_cpus=2", []),
        ("pack.parallelism=2", []),
        ("run.attempts=9", []),
        ("pack.seq_len=512", ["pack"]),
        ("refine.scrub_pii=false", ["refine", "pack"]),
        ("dedup.keep_rule=newest", ["dedup", "refine", "pack"]),
        ("dedup.alarm_share=0.5", []),
        ("dedup.partition_bytes=1_000_000", []),
        ("dedup.num_bands=26", ["extract", "graph", "dedup", "refine", "pack"]),
        ("gopher_quality.word_count=[60, 1000]", ["extract", "graph", "dedup", "refine", "pack"]),
    ],
)
def test_a_change_touches_its_stage_and_those_below(config, override, changed):
    before, after = stage_keys(config(""), ()), stage_keys(config("", override), ())
    assert [stage for stage in before if before[stage] != after[stage]] == changed


@pytest.mark.parametrize(
    "override", ["gopher_quality.word_count=[60, 1000]", "dedup.num_bands=26", "extract.keep_rejected_text=1.0"]
)
def test_policy_keeps_the_content_half_of_the_extract_key(config, override):
    before, after = stage_keys(config(""), ())["extract"], stage_keys(config("", override), ())["extract"]
    assert before[:8] == after[:8] and before[8:] != after[8:]


def test_a_model_is_known_by_its_content_and_not_by_its_place(config, tmp_path):
    from filters.language import BUNDLED

    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        (folder / "lid.ftz").write_bytes(BUNDLED.read_bytes())
    here, there = (stage_keys(config("", f"language.model={f}/lid.ftz"), ()) for f in (tmp_path, tmp_path / "elsewhere"))
    assert here == there
    (tmp_path / "lid.ftz").write_bytes(b"another model")
    assert stage_keys(config("", f"language.model={tmp_path}/lid.ftz"), ())["extract"][:8] != here["extract"][:8]


def test_another_engine_is_other_content(config):
    assert stage_keys(config(""), ())["extract"][:8] != stage_keys(config("", "extract.engine=resiliparse"), ())["extract"][:8]
