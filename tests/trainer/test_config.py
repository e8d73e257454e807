"""The trainer's configuration: what is wrong is said with its place and the nearest right thing."""

import os

import pytest

from tests.support.paths import ROOT
from trainer.config import PRESETS, ConfigError, SourceConfig, load

GOOD = 'directory = "r"\n[[data.sources]]\nrun = "runs/x"\n'


def loaded(tmp_path, text, *overrides):
    (tmp_path / "t.toml").write_text(text)
    return load(tmp_path / "t.toml", overrides)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("train_*.toml")), ids=lambda path: path.name
)
def test_bundled_configs_are_right(file):
    assert load(file).data.sources


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


@pytest.mark.parametrize(
    "text, override, message",
    [
        (GOOD, "modle.dim=3", r"unknown 'modle' \(modle\); did you mean 'model'"),
        (GOOD, "model.dims=3", r"unknown 'dims' \(model.dims\); did you mean 'dim'"),
        (GOOD, "model.preset=124M", r"unknown '124M' \(model.preset\); did you mean '125M'"),
        (GOOD, "optimizer.name=adam", r"unknown 'adam' \(optimizer.name\); did you mean 'adamw'"),
        (GOOD, "optimizer.lr=fast", r"optimizer.lr = 'fast': float is wanted, found str"),
        (GOOD, "model.num_layers=true", r"model.num_layers = True: int is wanted, found bool"),
        (GOOD, "model.hidden_dim=3", r"'model.hidden_dim' was renamed: write 'model.ffn_dim'"),
        (GOOD, "data.when_empty=wait", r"'data.when_empty' was renamed: write 'data.at_end'"),
        (GOOD, "model=3", r"model is a section, found 3"),
        (GOOD, "data.sources=[{}]", r"data.sources\[0\].run is missing"),
        (
            GOOD,
            "data.sources=[{run='x', wieght=2}]",
            r"unknown 'wieght' \(data.sources\[0\].wieght\); did you mean 'weight'",
        ),
        (GOOD, "seed", r"'seed': write section.key=value"),
        (GOOD, "seed.x=1", r"seed = {'x': 1}: int is wanted, found dict"),
        (GOOD, "directory.x=1", r"directory is no section"),
        (
            GOOD,
            "directory=s3://bucket/t",
            r"directory = 's3://bucket/t': a local folder is wanted; checkpoint.folder may be a URL",
        ),
        (GOOD, "directory=''", r"directory = '': a local folder is wanted"),
        (
            GOOD,
            "telemetry.sinks=['jsnl']",
            r"unknown 'jsnl' \(telemetry.sinks\[0\]\); did you mean 'jsonl'",
        ),
        (
            GOOD,
            "checkpoint.every_steps=0",
            r"checkpoint.every_steps = 0: a number from 1 on is wanted",
        ),
        (GOOD, "data.workers=-1", r"data.workers = -1: a number from 0 on is wanted"),
        (GOOD, "data.wait_seconds=inf", r"data.wait_seconds = inf: a number from 0 on is wanted"),
        (GOOD, "optimizer.lr=nan", r"optimizer.lr = nan: a number from 0 on is wanted"),
        (GOOD, "optimizer.betas=[0.9]", r"optimizer.betas = \[0.9\]: a list of 2 is wanted"),
        (GOOD, "ray.min_workers=2", r"ray.min_workers = 2 exceeds ray.workers = 1"),
        (
            GOOD,
            "data.sources=[{run='x'}, {run='./x'}]",
            r"data.sources names .*/x twice; set its weight instead",
        ),
        (
            "evaluation = {every_steps = 1, held_out_rows = 0}\n" + GOOD,
            "seed=1",
            r"neither held_out_rows nor cloze",
        ),
        ("[model]\n", "seed=1", r"directory is missing"),
        ("directory = \n", "seed=1", r"t.toml: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, override, message):
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
