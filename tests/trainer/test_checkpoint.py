"""What is saved comes back bit for bit on any number of ranks; a save that is cut off, torn or
superseded is never used.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import is_saving
from tests.support.examples import at_most
from tests.support.ranks import fork_context, run_ranks

torch = pytest.importorskip("torch")

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.support.checkpoints import (
    EXTRA,
    LATER,
    NOW,
    OPTIMIZERS,
    PATIENCE,
    SMALL,
    assert_same,
    build,
    restored,
    train,
    trained,
    warnings_of,
    whole,
)
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import CheckpointError, new_folder
from trainer.checkpoint_process import ProcessWriter
from trainer.config import (
    RENAMED_KEYS,
)
from trainer.model.hugging_face import export_hugging_face
from trainer.model.parallel import (
    join_ranks,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(name.split("-")[1]) for name in names(folder)]


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [NOW, LATER], ids=["now", "later"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_goes_on_bit_for_bit(optimizer, config, tmp_path):
    state = trained(optimizer)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(2, *state, EXTRA, metric=1.5)
    checkpoints.finish()
    expected, random = whole(*state), torch.rand(3)
    saved, again = restored(tmp_path, optimizer)
    assert (saved.step, saved.folder, saved.extra, saved.metric) == (
        2,
        str(tmp_path / "step-00000002"),
        EXTRA,
        1.5,
    )
    assert_same(whole(*again), expected)
    assert torch.equal(torch.rand(3), random)  # the draws after the save come again
    train(*state, 2, 3)
    train(*again, 2, 3)
    assert_same(whole(*again), whole(*state))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "momentum"])
def test_a_save_before_the_first_step_gives_the_optimiser_no_state(optimizer, tmp_path):
    """torch.distributed.checkpoint.state_dict would make it by a step of its own, which counts."""
    state = build(optimizer)
    Checkpoints(tmp_path, NOW).save(0, *state, {})
    assert not state[1].state
    again = trained(optimizer, seed=99)
    checkpoints = Checkpoints(tmp_path, NOW)
    checkpoints.load(checkpoints.latest(), *again)
    assert not again[1].state
    train(*state, 0)
    train(*again, 0)
    assert_same(whole(*again), whole(*state))


def test_hyperparameters_are_those_of_the_config_and_not_of_the_checkpoint(tmp_path):
    state = trained()
    Checkpoints(tmp_path, NOW).save(2, *state, {})
    model, optimizer = build()
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.1, 0.2))
    model.loss(
        torch.zeros(1, 4, dtype=torch.int64), None
    ).sum.backward()  # gradients that are lying about do not matter
    checkpoints = Checkpoints(tmp_path, NOW)
    checkpoints.load(checkpoints.latest(), model, optimizer)
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {
        (0.5, (0.1, 0.2))
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert_same(whole(model, optimizer), whole(*state))


def ranks_worker(rank, ranks, folder):
    """Save as two, load what two and what one have saved, take a step with each; rank 0 leaves what
    it saw.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks
    )
    seen = {}
    for optimizer in OPTIMIZERS:
        state = trained(optimizer)
        checkpoints = Checkpoints(folder / "two" / optimizer, LATER)
        checkpoints.save(2, *state, EXTRA | {"rank": rank})
        seen["saved", optimizer] = whole(*state)
        train(*state, 2)  # while the save is in flight
        checkpoints.finish()
        seen["uninterrupted", optimizer] = whole(*state)
        saved, again = restored(folder / "two" / optimizer, optimizer)
        assert saved.extra == EXTRA | {"rank": 0}
        seen["two to two", optimizer] = whole(*again)
        train(*again, 2)
        seen["resumed", optimizer] = whole(*again)
        _, again = restored(folder / "one" / optimizer, optimizer)
        seen["one to two", optimizer] = whole(*again)
    state = trained(shard_size=1)  # HSDP: each rank holds a copy
    Checkpoints(folder / "copies", NOW).save(2, *state, {})
    seen["copies"] = whole(*state)
    seen["latest of damaged"] = latest_of_damaged(rank, folder / "damaged")
    seen["failure"] = failure_of_one(rank, folder / "failing")
    seen["process killed"] = process_killed_on_one(rank, folder / "process-killed")
    seen["overlap"] = overlap(folder / "overlap")
    torch.save(seen, folder / f"seen-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def latest_of_damaged(rank, folder):
    """A flipped byte in what rank 1 wrote last."""
    checkpoints, state = Checkpoints(folder, NOW), build()
    checkpoints.save(1, *state, {})
    checkpoints.save(2, *state, {})
    if rank == 0:
        flip(folder / "step-00000002" / "__1_0.distcp")
    dist.barrier()
    return checkpoints.latest().step


def failure_of_one(rank, folder):
    """Rank 1 cannot hash, as on a bad disk: every rank is told, the checkpoint before stays."""
    checkpoints, state = Checkpoints(folder, LATER), build()
    checkpoints.save(1, *state, {})
    checkpoints.finish()
    hashes = checkpoint.hash_files

    def fail(*args):
        raise OSError("bad disk")

    if rank == 1:
        checkpoint.hash_files = fail
    checkpoints.save(2, *state, {})
    try:
        checkpoints.finish()
        told = "nothing"
    except CheckpointError as error:
        told = str(error)
    checkpoint.hash_files = hashes
    return told, checkpoints.latest().step


def process_killed_on_one(rank, folder):
    checkpoints, state = Checkpoints(folder, LATER), build()
    done, write = threading.Event(), ProcessWriter._write

    def patient(*args):
        assert done.wait(PATIENCE)
        return write(*args)

    ProcessWriter._write = patient
    checkpoints.save(1, *state, {})
    if rank == 1:
        writing_process(checkpoints).kill()
    done.set()
    try:
        checkpoints.finish()
        told = "nothing"
    except CheckpointError as error:
        told = str(error)
    ProcessWriter._write = write
    checkpoints.save(2, *state, {})
    checkpoints.finish()
    return told, checkpoints.latest().step


def overlap(folder):
    """Steps, with their collectives, that a save leaves room for: it waits for three of them."""
    checkpoints, state = Checkpoints(folder, LATER), build()
    done, write = threading.Event(), ProcessWriter._write

    def patient(*args):
        assert done.wait(PATIENCE)
        return write(*args)

    ProcessWriter._write = patient
    checkpoints.save(0, *state, {})
    in_flight = 0
    for step in range(3):
        train(*state, step)
        in_flight += is_saving(checkpoints)
    ProcessWriter._write = write
    done.set()
    checkpoints.finish()
    return in_flight, is_saving(checkpoints), checkpoints.latest().step


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    alone = {}
    for optimizer in OPTIMIZERS:
        state = trained(optimizer)
        Checkpoints(folder / "one" / optimizer, NOW).save(2, *state, EXTRA)
        alone[optimizer] = whole(*state)
    run_ranks(ranks_worker, 2, folder, ranks=2)
    return (
        folder,
        alone,
        [torch.load(folder / f"seen-{rank}.pt", weights_only=False) for rank in range(2)],
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_number_of_ranks_loads_what_any_number_saved(optimizer, two_ranks):
    folder, alone, seen = two_ranks
    for rank in seen:
        assert_same(rank["two to two", optimizer], rank["saved", optimizer])
        assert_same(rank["resumed", optimizer], rank["uninterrupted", optimizer])
        assert_same(rank["one to two", optimizer], alone[optimizer])
    saved, state = restored(folder / "two" / optimizer, optimizer)
    assert (saved.step, saved.extra) == (2, EXTRA | {"rank": 0})
    assert_same(whole(*state), seen[0]["saved", optimizer])


def test_copies_of_hsdp_are_saved_once(two_ranks):
    folder, _, seen = two_ranks
    assert_same(whole(*restored(folder / "copies")[1]), seen[0]["copies"])
    once, copies = (
        sum(path.stat().st_size for path in (folder / kind).rglob("*.distcp"))
        for kind in ("one/adamw", "copies")
    )
    assert copies < 1.5 * once


def test_ranks_share_the_verdict_on_a_file_of_one(two_ranks):
    assert [rank["latest of damaged"] for rank in two_ranks[2]] == [1, 1]


def test_ranks_share_the_failure_of_one(two_ranks):
    for told, latest in (rank["failure"] for rank in two_ranks[2]):
        assert told == "rank 1: OSError('bad disk')"
        assert latest == 1


def test_ranks_share_the_death_of_a_writing_process(two_ranks):
    for told, latest in (rank["process killed"] for rank in two_ranks[2]):
        assert re.search("rank 1: ChildProcessError.*died with exit code -9", told), told
        assert latest == 2  # no rank hung, and the next save made it


def test_training_steps_on_all_ranks_while_a_save_is_in_flight(two_ranks):
    assert [rank["overlap"] for rank in two_ranks[2]] == [(3, False, 0)] * 2


def test_a_group_of_one_is_like_none(tmp_path):
    """As the trainer runs alone: under FSDP, in a group that has no network."""
    state = trained()
    Checkpoints(tmp_path / "none", NOW).save(2, *state, {})
    join_ranks("cpu")
    try:
        saved, (model, optimizer) = restored(tmp_path / "none")
        assert isinstance(next(model.parameters()), DTensor)
        assert_same(whole(model, optimizer), whole(*state))
        checkpoints = Checkpoints(tmp_path / "group", LATER)
        checkpoints.save(2, model, optimizer, {})
        checkpoints.finish()
    finally:
        dist.destroy_process_group()
    assert_same(whole(*restored(tmp_path / "group")[1]), whole(*state))


# --- asynchronous ---------------------------------------------------------------------------------


@pytest.fixture
def held_back(monkeypatch):
    """Writes wait until the event is set; its `begun` is set when one waits."""
    event, write = threading.Event(), ProcessWriter._write
    event.begun = threading.Event()

    def patient(*args):
        event.begun.set()
        assert event.wait(PATIENCE)
        return write(*args)

    monkeypatch.setattr(ProcessWriter, "_write", patient)
    yield event
    event.set()


def test_what_is_saved_is_the_state_at_save_and_not_at_the_time_of_writing(held_back, tmp_path):
    state, extra = trained(), {"rows": [1]}
    checkpoints = Checkpoints(tmp_path, LATER)
    checkpoints.save(2, *state, extra)
    expected = whole(*state)
    extra["rows"].append(2)
    train(*state, 2, 3)
    assert is_saving(checkpoints)  # nothing was written before these steps
    held_back.set()
    checkpoints.finish()
    saved, again = restored(tmp_path)
    assert saved.extra == {"rows": [1]}
    assert_same(whole(*again), expected)


def test_a_save_waits_for_the_one_before(held_back, tmp_path):
    checkpoints, state = Checkpoints(tmp_path, LATER), trained()
    checkpoints.save(1, *state, {})
    second = threading.Thread(target=checkpoints.save, args=(2, *state, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert names(tmp_path) == ["step-00000001"]  # the second has not begun
    held_back.set()
    second.join(PATIENCE)
    checkpoints.finish()
    assert steps(tmp_path) == [1, 2]


def test_a_failed_write_is_an_error_of_the_next_call_that_waits(held_back, tmp_path):
    checkpoints, state = Checkpoints(tmp_path, LATER), trained()
    checkpoints.save(1, *state, {})
    assert held_back.begun.wait(PATIENCE)  # before that the folder would be made again
    shutil.rmtree(tmp_path / "step-00000001")
    held_back.set()
    with pytest.raises(CheckpointError, match=r"step-00000001: rank 0: FileNotFoundError"):
        checkpoints.save(2, *state, {})
    assert checkpoints.latest() is None
    checkpoints.save(2, *state, {})
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000002"]  # what was cut off is gone


# --- the process that writes ----------------------------------------------------------------------


def writing_process(checkpoints):
    return checkpoints._writer._child._process


def test_saves_share_a_process_and_its_memory_until_the_state_grows(tmp_path):
    state, checkpoints = build(), Checkpoints(tmp_path, LATER)
    used = []
    for step in range(4):
        checkpoints.save(step, *state, {})
        used.append((writing_process(checkpoints).pid, checkpoints._writer._memory))
        expected = whole(*state)
        train(*state, step)  # the first one makes the moments
    checkpoints.finish()
    assert used[0] != used[1] == used[2] == used[3]
    assert_same(whole(*restored(tmp_path)[1]), expected)


def test_a_killed_process_is_an_error_and_the_next_save_starts_another(held_back, tmp_path):
    state, checkpoints = trained(), Checkpoints(tmp_path, LATER)
    checkpoints.save(1, *state, {})
    writing_process(checkpoints).kill()
    held_back.set()
    with pytest.raises(CheckpointError, match=r"the process that writes checkpoints died .* -9"):
        checkpoints.finish()
    checkpoints.save(2, *state, {})
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000002"]
    assert_same(whole(*restored(tmp_path)[1]), whole(*state))


def test_the_process_ends_with_its_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, LATER)
    checkpoints.save(1, *trained(), {})
    checkpoints.finish()
    process = writing_process(checkpoints)
    assert process.poll() is None
    checkpoints.close()
    assert process.poll() is not None


def test_signals_to_the_job_leave_the_process_to_its_trainer(held_back, tmp_path):
    """Slurm and torchrun send SIGTERM to all processes, and the trainer saves then."""
    state, checkpoints = trained(), Checkpoints(tmp_path, LATER)
    checkpoints.save(1, *state, {})
    for number in (signal.SIGTERM, signal.SIGINT):
        writing_process(checkpoints).send_signal(number)  # it is still starting
    held_back.set()
    checkpoints.save(2, *state, {})
    checkpoints.finish()
    assert steps(tmp_path) == [1, 2]


def stopped_writer(folder, pid):
    """Die while the process is in the midst of a write: it is stopped, and could go on later."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder, LATER)
    state = trained()
    checkpoints.save(1, *state, {})
    checkpoints.finish()
    process = writing_process(checkpoints)
    pid.write_text(str(process.pid))
    process.send_signal(signal.SIGSTOP)
    checkpoints.save(2, *state, {})
    die()


@pytest.mark.kill
def test_the_process_dies_with_its_trainer(tmp_path):
    folder, pid = tmp_path / "run", tmp_path / "pid"
    worker = fork_context().Process(target=stopped_writer, args=(folder, pid))
    worker.start()
    worker.join(PATIENCE)
    assert worker.exitcode == -signal.SIGKILL
    status = Path("/proc", pid.read_text(), "stat")
    deadline = time.monotonic() + PATIENCE
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline, status.read_text()
        time.sleep(0.05)
    saved, state = restored(folder)
    assert saved.step == 1
    Checkpoints(folder, NOW).save(2, *state, {})
    assert steps(folder) == [1, 2]


# --- cut off, torn, damaged -----------------------------------------------------------------------


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


KILLED_AT = {
    "before the data": (ProcessWriter, "_write"),
    "before the hashes": (checkpoint, "hash_files"),
    "before meta.json": (os, "replace"),
    "while pruning": (shutil, "rmtree"),
}


def killed_worker(folder, where):
    torch.set_num_threads(1)
    state, checkpoints = trained(), Checkpoints(folder, replace(LATER, keep_last=1, keep_best=0))
    checkpoints.save(2, *state, EXTRA)
    checkpoints.finish()
    torch.save(whole(*state), folder.with_suffix(".pt"))
    setattr(*KILLED_AT[where], die)
    train(*state, 2)
    checkpoints.save(3, *state, EXTRA)
    checkpoints.finish()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Where each worker died → its folder."""
    root, processes = tmp_path_factory.mktemp("killed"), fork_context()
    folders = {where: root / where.replace(" ", "-") for where in KILLED_AT}
    workers = [
        processes.Process(target=killed_worker, args=(folder, where))
        for where, folder in folders.items()
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * len(workers)
    return folders


@pytest.mark.kill
@pytest.mark.parametrize("where", ["before the data", "before the hashes", "before meta.json"])
def test_killed_while_saving_leaves_the_checkpoint_before(where, killed, caplog):
    folder = killed[where]
    assert steps(folder) == [2, 3]
    saved, state = restored(folder)
    assert saved.step == 2
    assert_same(whole(*state), torch.load(folder.with_suffix(".pt"), weights_only=False))
    assert warnings_of(caplog) == []  # it is no checkpoint, so no fault
    Checkpoints(folder, NOW).save(4, *state, {})
    assert steps(folder) == [2, 4]


@pytest.mark.kill
def test_killed_while_pruning_leaves_the_new_checkpoint(killed, caplog):
    folder = killed["while pruning"]
    assert steps(folder) == [2, 3]
    assert not (
        folder / "step-00000002" / "meta.json"
    ).exists()  # gone first: what is half removed is no checkpoint
    saved, state = restored(folder)
    assert saved.step == 3
    assert warnings_of(caplog) == []
    Checkpoints(folder, NOW).save(4, *state, {})
    assert steps(folder) == [3, 4]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (
        lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
        r"__0_0.distcp: expected .*, found {'bytes': 1000}",
    ),
    "flipped": (
        lambda folder: flip(folder / "__0_0.distcp"),
        "__0_0.distcp: expected .*sha256.*, found .*sha256",
    ),
    "flipped metadata": (
        lambda folder: flip(folder / ".metadata"),
        ".metadata: expected .*sha256.*, found .*sha256",
    ),
    "missing": (
        lambda folder: (folder / "__0_0.distcp").unlink(),
        "__0_0.distcp cannot be read: .*No such file",
    ),
    "empty meta.json": (lambda folder: os.truncate(folder / "meta.json", 0), "Expecting value"),
    "torn meta.json": (
        lambda folder: os.truncate(folder / "meta.json", 100),
        "Unterminated string|Expecting",
    ),
    "another version": (
        lambda folder: (folder / "meta.json").write_text('{"version": 2}'),
        "meta.json of version 2, this code reads 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_fault_and_later_removed(
    damage, tmp_path, caplog
):
    state, checkpoints = trained(), Checkpoints(tmp_path, NOW)
    for step in (2, 3):
        checkpoints.save(step, *state, {})
    act, fault = DAMAGE[damage]
    act(tmp_path / "step-00000003")
    checkpoints = Checkpoints(tmp_path, NOW)
    assert checkpoints.latest().step == 2
    (message,) = warnings_of(caplog)
    assert re.search(f"step-00000003: {fault}", message), message
    checkpoints.save(3, *state, {})
    assert names(tmp_path) == ["step-00000002", "step-00000003-1"]
    assert Checkpoints(tmp_path, NOW).latest().folder.endswith("/step-00000003-1")


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_among_the_last(tmp_path):
    state, checkpoints = trained(), Checkpoints(tmp_path, NOW)
    for step in (2, 5):
        checkpoints.save(step, *state, {})
    flip(tmp_path / "step-00000005" / "__0_0.distcp")
    checkpoints = Checkpoints(tmp_path, replace(NOW, keep_last=1, keep_best=0))
    assert checkpoints.latest().step == 2
    checkpoints.save(3, *state, {})
    assert steps(tmp_path) == [3]


def test_when_all_are_damaged_a_person_decides(tmp_path):
    """To begin anew without a word would prune the last that could be repaired."""
    checkpoints = Checkpoints(tmp_path, NOW)
    checkpoints.save(2, *trained(), {})
    flip(tmp_path / "step-00000002" / "__0_0.distcp")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be used; .*step-00000002: __0_0.distcp: expected"
    ):
        checkpoints.latest()


def test_there_is_none_in_an_empty_or_absent_folder(tmp_path):
    assert Checkpoints(tmp_path, NOW).latest() is None
    assert Checkpoints(tmp_path / "absent", NOW).latest() is None


# --- what is kept ---------------------------------------------------------------------------------


def kept_slowly(metrics, keep_last, keep_best):
    """The steps that remain when steps 1, 2, 3 … have these metrics; looks at all that still is
    there after each.
    """
    there = {}
    for step, metric in enumerate(metrics, 1):
        there[step] = metric
        ranked = sorted((m, -s) for s, m in there.items() if m is not None and m == m)
        wanted = {-minus for _, minus in ranked[:keep_best]}
        there = {s: m for s, m in there.items() if s in wanted or s > step - keep_last}
    return sorted(there)


@at_most(60)
@given(
    metrics=st.lists(st.sampled_from([None, 1.0, 2.0, 3.0, float("nan")]), min_size=1, max_size=8),
    keep_last=st.integers(1, 3),
    keep_best=st.integers(0, 3),
)
def test_the_last_and_the_best_are_kept(metrics, keep_last, keep_best, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    checkpoints = Checkpoints(folder, replace(NOW, keep_last=keep_last, keep_best=keep_best))
    for step, metric in enumerate(metrics, 1):
        there = f"{folder}/{new_folder(str(folder), step)}"
        finite = metric if metric is not None and metric == metric else None
        checkpoints._publish(there, {"version": 1, "step": step, "metric": finite, "files": {}})
    assert steps(folder) == kept_slowly(metrics, keep_last, keep_best)


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, replace(NOW, keep_last=1, keep_best=1)), trained()
    for step, metric in enumerate([float("nan"), 2.0, float("-inf"), None], 1):
        checkpoints.save(step, *state, {}, metric=metric)
    assert steps(tmp_path) == [2, 4]


def test_a_step_saved_again_replaces_the_first_only_when_it_is_whole(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, NOW), trained()
    checkpoints.save(2, *state, {"time": 1})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_meta", lambda *args: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            checkpoints.save(2, *state, {"time": 2})
    assert checkpoints.latest().extra == {"time": 1}
    checkpoints.save(2, *state, {"time": 3})
    assert names(tmp_path) == ["step-00000002-1"]
    assert checkpoints.latest().extra == {"time": 3}


def test_other_folders_are_left_alone(tmp_path):
    for name in ("step-final", "notes", "step-1.old"):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path, NOW).save(2, *trained(), {})
    assert names(tmp_path) == ["notes", "step-00000002", "step-1.old", "step-final"]


# --- what is refused ------------------------------------------------------------------------------


def test_a_url_that_was_made_a_path_is_refused():
    with pytest.raises(ValueError, match=r"'s3:/bucket/run' is a URL that was made a Path"):
        Checkpoints(Path("s3://bucket/run"), NOW)


@pytest.mark.parametrize(
    "url, why", [("nosuch://bucket/run", "nosuch"), ("memory://runs/*", "by pattern")]
)
def test_a_url_that_cannot_be_served_is_refused(url, why):
    with pytest.raises(ValueError, match=why):
        Checkpoints(url, NOW)


def test_a_config_that_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)keep_last.*greater than or equal to 1"):
        Checkpoints(tmp_path, replace(NOW, keep_last=0))


@pytest.mark.parametrize("extra", [{"loss": float("nan")}, {"rows": {1, 2}}])
def test_an_extra_that_is_no_json_is_refused_before_anything_is_written(extra, tmp_path):
    with pytest.raises((ValueError, TypeError), match="JSON"):
        Checkpoints(tmp_path, NOW).save(2, *trained(), extra)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "change", [{"num_layers": 3}, {"rope_theta": 1e4}, {"tie_embeddings": False}]
)
def test_another_model_is_refused_and_left_as_it_is(change, tmp_path):
    checkpoints = Checkpoints(tmp_path, NOW)
    checkpoints.save(2, *trained(), {})
    state = trained(config=replace(SMALL, **change), seed=5)
    before = whole(*state)
    (key,) = change
    with pytest.raises(
        ValueError, match=f"another model: {key}=.* where the config has {change[key]}"
    ):
        checkpoints.load(checkpoints.latest(), *state)
    assert_same(whole(*state), before)


def test_a_checkpoint_with_the_old_names_of_settings_loads(tmp_path):
    state, checkpoints = trained(), Checkpoints(tmp_path, NOW)
    checkpoints.save(2, *state, {})
    file = tmp_path / "step-00000002" / "meta.json"
    meta = json.loads(file.read_text())
    old_names = {new: old for old, new in RENAMED_KEYS.items()}
    meta["model"] = {
        old_names.get(f"model.{key}", key).removeprefix("model."): value
        for key, value in meta["model"].items()
    }
    assert {"hidden_dim", "layers", "heads", "kv_heads", "tied"} <= meta["model"].keys()
    file.write_text(json.dumps(meta))
    again = build(config=SMALL, seed=5)
    checkpoints.load(checkpoints.latest(), *again)
    assert_same(whole(*again), whole(*state))


def test_another_attention_kernel_is_the_same_model(tmp_path):
    state, checkpoints = trained(), Checkpoints(tmp_path, NOW)
    checkpoints.save(2, *state, {})
    again = build(config=replace(SMALL, attention="flex"), seed=5)
    checkpoints.load(checkpoints.latest(), *again)
    assert_same(whole(*again), whole(*state))


def test_another_optimiser_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, NOW)
    checkpoints.save(2, *trained(), {})
    with pytest.raises(ValueError, match="saved with AdamW, the config has Adafactor"):
        checkpoints.load(checkpoints.latest(), *build("adafactor"))


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_logits_of_the_model_in_transformers(tied, transformers, tmp_path):
    model, optimizer = trained(config=replace(SMALL, tie_embeddings=tied))
    checkpoints = Checkpoints(tmp_path / "checkpoints", NOW)
    checkpoints.save(2, model, optimizer, {"supply": {"seq_len": 64}})
    export_hugging_face(checkpoints.latest().folder, tmp_path / "out", dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    tokens = torch.randint(0, SMALL.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens, None), rtol=1e-4, atol=1e-5)
    assert theirs.config.max_position_embeddings == 64


def test_one_process_exports_what_two_ranks_saved(two_ranks, tmp_path):
    from safetensors.torch import load_file

    folder, _, seen = two_ranks
    export_hugging_face(folder / "two" / "adamw" / "step-00000002", tmp_path, dtype="float32")
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        found["model.embed_tokens.weight"], seen[0]["saved", "adamw"]["embedding.weight", ""]
    )
    assert (
        json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == SMALL.num_layers
    )


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", NOW)
    checkpoints.save(2, *trained(), {})
    folder = Path(checkpoints.latest().folder)
    flip(folder / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"__0_0.distcp: expected"):
        export_hugging_face(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
