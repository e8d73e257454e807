"""A training that branches from a checkpoint of another one goes on from it, and leaves it alone."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.train import load_training
from stages.formats.errors import ConfigError
from tests.support.live_training import run_training
from tests.support.ranks import fork_context

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")

from tests.support.checkpoints import PATIENCE
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import CheckpointError
from trainer.config import CheckpointConfig, ScheduleConfig
from trainer.telemetry.feedback import read_summaries
from trainer.telemetry.records import read_metrics

COMPARED = ("loss", "grad_norm", "lr", "tokens", "data")


def records(config):
    return {
        record["step"]: record for record in read_metrics(Path(config.directory, "metrics.jsonl"))
    }


def child_of(config, name, *, step, **changes):
    directory = Path(config.directory).with_name(name)
    branch = f"{config.directory}@{step}"
    return replace(config, directory=str(directory), branch=branch, **changes)


def saved_by(config):
    return Checkpoints(f"{config.directory}/checkpoints", config.checkpoint).latest()


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def config(config):
    """Without an end, so that the rate stays constant after the warm-up."""
    return replace(config, schedule=ScheduleConfig(name="wsd", warmup_steps=2), max_steps=0)


def run_until(config, steps):
    """A training without an end that is asked to stop so that it takes so many steps."""
    from trainer import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Training, "_is_asked_to_stop", lambda training: training.step >= steps - 1
        )
        return run_training(config)


def test_a_child_takes_the_steps_that_the_parent_would_have_taken(config):
    run_until(config, 8)
    before = contents(config.directory)
    child = child_of(config, "child", step=4)
    run_until(child, 8)
    assert contents(config.directory) == before  # nothing is written or removed there
    expected, found = records(config), records(child)
    assert sorted(found) == [5, 6, 7, 8]
    assert all(found[n][key] == expected[n][key] for n in found for key in COMPARED)


def test_the_rate_of_a_child_falls_from_where_it_branched(config):
    run_until(config, 8)
    linear = ScheduleConfig(name="linear", warmup_steps=2, min_ratio=0.0)
    child = child_of(config, "child", step=8, schedule=linear, max_steps=12)
    run_training(child)
    rates = {step: record["lr"] for step, record in records(child).items()}
    base = config.optimizer.lr
    assert rates == pytest.approx({9: base * 0.75, 10: base * 0.5, 11: base * 0.25, 12: 0})


def test_a_child_needs_its_parent_no_more_after_it_has_begun(config):
    run_until(config, 8)
    child = child_of(config, "child", step=4)
    run_until(child, 6)
    shutil.rmtree(config.directory)
    run_until(child, 8)
    run_until(replace(child, branch=""), 10)
    record = saved_by(child).extra["parent"]
    assert record["branch"] == child.branch and record["folder"].endswith("step-00000004")
    grandchild = child_of(child, "grandchild", step=10)
    run_until(grandchild, 12)
    assert saved_by(grandchild).extra["parent"]["parent"] == record
    with pytest.raises(ValueError, match=r"branched from '.*@4'; restore it"):
        run_until(replace(child, branch=f"{config.directory}@8"), 8)


def test_the_totals_of_a_child_are_its_position_and_its_own_work(config):
    run_until(config, 8)
    child = child_of(config, "child", step=4)
    run_until(child, 6)
    summaries = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    reports = {summary.trainer: summary.report for summary in summaries}
    tokens = {step: record["tokens"] for step, record in records(config).items()}
    parent, own = reports["train"], reports["child"]
    assert parent.tokens_processed == parent.tokens_total == sum(tokens.values())
    # the state of step 6, which has seen the tokens and rows of 6 steps; it has trained on two
    assert own.steps == 6 and own.tokens_total == sum(tokens[n] for n in range(1, 7))
    assert own.sources[config.data.sources[0].run].rows == {"gen-0001": 48}
    assert own.tokens_processed == tokens[5] + tokens[6] and own.restarts == 0
    run_until(child, 7)
    summaries = read_summaries(f"{config.data.sources[0].run}/feedback").summaries
    assert [s.report.restarts for s in summaries if s.trainer == "child"] == [1]


def test_a_child_never_prunes_its_parents_checkpoints(config):
    keep_two = CheckpointConfig(every_steps=4, keep_last=2, keep_best=0)
    config = replace(config, checkpoint=keep_two)
    run_until(config, 8)
    child = child_of(config, "child", step=4)
    run_until(child, 20)
    steps = [
        sorted(p.name for p in Path(c.directory, "checkpoints").iterdir()) for c in (config, child)
    ]
    assert steps == [["step-00000004", "step-00000008"], ["step-00000016", "step-00000020"]]
    own = f"{config.directory}/checkpoints"
    shared = replace(
        child, directory=f"{child.directory}-2", checkpoint=replace(keep_two, folder=own)
    )
    with pytest.raises(
        ValueError, match="the checkpoints here are of a training that did not branch"
    ):
        run_until(shared, 20)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: None, ValueError, r"checkpoints of the steps \[4, 8\], none of 5"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b""), CheckpointError, "expected"),
        (lambda folder: (folder / "meta.json").unlink(), ValueError, "none of 4"),
    ],
)
def test_a_parent_that_cannot_be_used_is_refused(damage, error, message, config):
    run_until(config, 8)
    damage(Path(config.directory, "checkpoints", "step-00000004"))
    with pytest.raises(error, match=message):
        run_until(child_of(config, "child", step=5 if "none of 5" in message else 4), 8)


@pytest.mark.parametrize("by_url", [True, False])
def test_parent_and_child_may_keep_their_checkpoints_on_s3(by_url, config, s3_bucket):
    def in_bucket(name):
        return replace(config.checkpoint, folder=f"{s3_bucket}/{name}")

    config = replace(config, checkpoint=in_bucket("parent"))
    run_until(config, 8)
    child = child_of(config, "child", step=4, checkpoint=in_bucket("child"))
    child = replace(child, branch=f"{s3_bucket}/parent@4") if by_url else child
    run_until(child, 6)
    run_until(child, 8)
    expected, found = records(config), records(child)
    assert sorted(found) == [5, 6, 7, 8]
    assert all(found[n][key] == expected[n][key] for n in found for key in COMPARED)


def test_a_training_of_its_own_does_not_become_a_child(config):
    run_until(config, 8)
    child = child_of(config, "child", step=4)
    run_until(replace(child, branch=""), 4)
    with pytest.raises(ValueError, match="of a training that did not branch"):
        run_until(child, 8)


def _die(*args):
    signal.raise_signal(signal.SIGKILL)


def _killed_child(config):
    checkpoint.write_meta = _die
    run_until(config, 6)


@pytest.mark.kill
def test_children_that_are_killed_before_their_first_save_branch_again(config):
    run_until(config, 8)
    children = [child_of(config, name, step=4) for name in ("a", "b")]
    processes = [fork_context().Process(target=_killed_child, args=(child,)) for child in children]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
    for child in children:
        assert run_until(child, 8).steps == 8
        expected, found = records(config), records(child)
        assert all(found[n][key] == expected[n][key] for n in (5, 8) for key in COMPARED)


def test_branch_is_a_directory_and_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.toml").write_text('directory = "t"\n')
    assert load_training("t.toml", ["branch=runs/a@12"]).branch == f"{tmp_path}/runs/a@12"
    assert load_training("t.toml", ["branch=s3://b/a@12"]).branch == "s3://b/a@12"
    with pytest.raises(ConfigError, match="write RUN@STEP"):
        load_training("t.toml", ["branch=runs/a"])
