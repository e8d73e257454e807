"""The configuration of a training: errors name the place, and the nearest known name."""

import os
from pathlib import Path

import pytest

from pipeline.config.train import load_training
from stages.formats.errors import ConfigError
from trainer.config import PRESETS, HeldOutConfig, SourceConfig

ROOT = Path(__file__).parents[3]
GOOD = 'directory = "r"\n[[data.sources]]\nrun = "runs/x"\n'


def loaded(tmp_path, text, *overrides):
    (tmp_path / "t.toml").write_text(text)
    return load_training(tmp_path / "t.toml", overrides)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("train_*.toml")), ids=lambda path: path.name
)
def test_bundled_configs_are_right(file):
    assert load_training(file).data.sources


def test_a_preset_is_a_base_for_other_keys(tmp_path):
    config = loaded(
        tmp_path,
        GOOD,
        "model.preset=125M",
        "model.num_layers=2",
        "optimizer.lr=1",
        "optimizer.name=sgd",
    )
    assert (config.model.dim, config.model.num_layers) == (PRESETS["125M"].dim, 2)
    assert (config.optimizer.lr, config.optimizer.name) == (1.0, "sgd") and isinstance(
        config.optimizer.lr, float
    )
    assert config.data.sources == (SourceConfig(os.path.abspath("runs/x")),)


def test_named_sets_of_rows_to_evaluate_on(tmp_path):
    text = (
        GOOD
        + """
[evaluation.held_out.wiki]
run = "runs/x"
hosts = ["wikipedia.org"]
[evaluation.held_out.curated]
run = "s3://bucket/curated"
split = "training"
"""
    )
    sets = loaded(tmp_path, text, "evaluation.held_out.wiki.rows=9").evaluation.held_out
    assert sets == {
        "wiki": HeldOutConfig(os.path.abspath("runs/x"), rows=9, hosts=("wikipedia.org",)),
        "curated": HeldOutConfig("s3://bucket/curated", split="training"),
    }


@pytest.mark.parametrize(
    "text, override, message",
    [
        (GOOD, "modle.dim=3", r"command line: unknown config key 'modle'; did you mean 'model'"),
        (GOOD, "model.dims=3", r"unknown config key 'model.dims'; did you mean 'model.dim'"),
        (GOOD, "model.preset=124M", r"model.preset = '124M': .*; did you mean '125M'"),
        (GOOD, "model.preset=3", r"model.preset = 3: there is no such preset; did you mean '3B'"),
        (GOOD, "optimizer.name=adam", r"optimizer.name = 'adam': .*; did you mean 'adamw'"),
        (GOOD, "optimizer.lr=fast", r"optimizer.lr = 'fast': Input should be a valid number"),
        (GOOD, "model.num_layers=true", r"model.num_layers = True: .* a valid integer"),
        (GOOD, "model.hidden_dim=3", r"'model.hidden_dim' was renamed: write 'model.ffn_dim'"),
        (GOOD, "data.when_empty=wait", r"'data.when_empty' was renamed: write 'data.at_end'"),
        (GOOD, "model=3", r"command line: model is a section: write \[model\] with keys under it"),
        (GOOD, "data.sources=[{}]", r"command line: data.sources\[0\].run is missing"),
        (GOOD + "weigth = 2\n", "seed=1", r"t.toml:4: unknown config key .*weigth'; did you mean"),
        (GOOD + "weight = -1\n", "seed=1", r"t.toml:4: data.sources\[0\].weight = -1"),
        (GOOD, "seed", r"'seed' is not section.key=value"),
        (GOOD, "seed.x=1", r"seed: Input should be a valid integer"),
        (GOOD, "directory.x=1", r"'directory' is a value, not a section"),
        (
            GOOD,
            "directory=s3://bucket/t",
            r"directory = 's3://bucket/t': give a local folder; checkpoint.folder may be a URL",
        ),
        (GOOD, "directory=''", r"directory = '': give a local folder"),
        (GOOD, "telemetry.sinks=['jsnl']", r"sinks\[0\] = 'jsnl': .*did you mean 'jsonl'"),
        (GOOD, "checkpoint.every_steps=0", r"checkpoint.every_steps = 0: .* greater than .* 1"),
        (GOOD, "checkpoint.keep_last=0", r"checkpoint.keep_last = 0: .* greater than .* 1"),
        (GOOD, "data.workers=-1", r"data.workers = -1: Input should be greater than .* 0"),
        (GOOD, "data.wait_seconds=inf", r"data.wait_seconds = inf: .* a finite number"),
        (GOOD, "optimizer.lr=nan", r"optimizer.lr = nan: Input should be a finite number"),
        (GOOD, "optimizer.betas=[0.9]", r"optimizer.betas\[1\] is missing"),
        (GOOD, "ray.min_workers=2", r"ray: min_workers = 2 exceeds workers = 1"),
        (
            GOOD,
            "data.sources=[{run='x'}, {run='./x'}]",
            r"data.sources names .*/x twice; set its weight instead",
        ),
        (
            "evaluation = {every_steps = 1, held_out_rows = 0}\n" + GOOD,
            "seed=1",
            r"t.toml:1: evaluation: .*neither held_out_rows, held_out nor cloze",
        ),
        (
            GOOD,
            "evaluation.held_out.wiki={run='y', row=3}",
            r"unknown config key 'evaluation.held_out.wiki.row'; did you mean .*wiki.rows'",
        ),
        (GOOD, "evaluation.held_out.wiki={rows=3}", r"evaluation.held_out.wiki.run is missing"),
        (GOOD, "evaluation.held_out={'a/b'={run='y'}}", r"evaluation.held_out.a/b.*should match"),
        (
            GOOD,
            "evaluation.held_out.x={run='./runs/x', split='training'}",
            r"command line: evaluation.held_out.x.split = \"training\": this run is trained on",
        ),
        ("[model]\n", "seed=1", r"directory is missing"),
        ("directory = \n", "seed=1", r"t.toml: not valid TOML"),
    ],
)
def test_an_error_names_the_key_and_its_place(tmp_path, text, override, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text, override)


@pytest.mark.parametrize("override", ["directory=runs/x", "checkpoint.folder=kept"])
def test_a_directory_that_ray_would_remove_with_the_job_is_refused(tmp_path, monkeypatch, override):
    (tmp_path / "_ray_pkg_1").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_1")
    with pytest.raises(
        ConfigError, match=rf"{override.split('=')[0]} = '.*' lies in the job's working directory"
    ):
        loaded(tmp_path, GOOD, "directory=/runs/x", override)
    assert (
        loaded(tmp_path, GOOD, "directory=/runs/x", "checkpoint.folder=s3://b/c").directory
        == "/runs/x"
    )


def test_a_missing_file_names_its_neighbors(tmp_path):
    (tmp_path / "good.toml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"no such config file: .*goood.toml; there are .*good"):
        load_training(tmp_path / "goood.toml")
