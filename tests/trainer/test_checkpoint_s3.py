"""Checkpoints on object storage keep the laws of those on disks; a store that does not answer costs
none. A real S3 server.
"""

import os
import re
import threading
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
s3fs = pytest.importorskip("s3fs")

import fsspec
import torch.distributed as dist

from tests.support.checkpoints import (
    EXTRA,
    LATER,
    NOW,
    PATIENCE,
    SMALL,
    assert_same,
    build,
    is_saving,
    restored,
    train,
    trained,
    warnings_of,
    whole,
)
from tests.support.ranks import run_ranks
from tests.support.s3 import s3_process
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import CheckpointError, writer_of
from trainer.model.hugging_face import export_hugging_face
from trainer.model.pretrained import load_pretrained
from trainer.ranks import Ranks

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]


def files():
    """What another process sees."""
    return fsspec.filesystem("s3", skip_instance_cache=True)


def names(url):
    return sorted(path.rpartition("/")[2] for path in files().ls(url))


@pytest.fixture
def run(s3_bucket):
    return f"{s3_bucket}/runs/a"


@pytest.mark.parametrize("config", [NOW, LATER], ids=["now", "later"])
def test_one_process_goes_on_bit_for_bit(config, run):
    state = trained()
    checkpoints = Checkpoints(run, config)
    checkpoints.save(2, *state, EXTRA, metric=1.5)
    checkpoints.finish()
    expected, random = whole(*state), torch.rand(3)
    assert names(f"{run}/step-00000002") == [".metadata", "__0_0.distcp", "meta.json"]
    saved, again = restored(run)
    assert saved == (2, f"{run}/step-00000002", saved.model, EXTRA, 1.5)
    assert_same(whole(*again), expected)
    assert torch.equal(torch.rand(3), random)
    train(*state, 2, 3)
    train(*again, 2, 3)
    assert_same(whole(*again), whole(*state))


def test_the_writer_s_client_has_our_retry_settings_whatever_was_opened_before(run, monkeypatch):
    for name in ("AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name, raising=False)
    fsspec.filesystem("s3").connect()
    client = writer_of(run).fs.fs
    client.connect()
    assert client.s3.meta.config.retries == {"mode": "adaptive", "total_max_attempts": 6}


def test_copies_made_for_reading_are_removed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.get_filesystem_class("simplecache").clear_instance_cache()
    Checkpoints(run, NOW).save(2, *trained(), {})
    restored(run)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_cannot_be_read_is_an_error_each_time(run):
    state, checkpoints = trained(), Checkpoints(run, NOW)
    checkpoints.save(2, *state, {})
    saved = checkpoints.latest()
    checkpoints.load(saved, *state)
    files().rm_file(f"{run}/step-00000002/.metadata")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step-00000002: rank 0: .*\.metadata"):
            checkpoints.load(saved, *state)


# --- ranks ----------------------------------------------------------------------------------------


def ranks_worker(rank, ranks, folder, bucket):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks
    )
    state, seen = trained(), {}
    checkpoints = Checkpoints(f"{bucket}/two", LATER)
    checkpoints.save(2, *state, EXTRA)
    seen["saved"] = whole(*state)
    train(*state, 2)  # while the save is in flight
    checkpoints.finish()
    seen["uninterrupted"] = whole(*state)
    _, again = restored(f"{bucket}/two")
    train(*again, 2)
    seen["resumed"] = whole(*again)
    seen["one to two"] = whole(*restored(f"{bucket}/one")[1])
    seen["no bucket"] = told(Checkpoints(f"{bucket}-mistyped/run", LATER).save, 1, *state, {})
    if rank == 1:  # out of reach of one machine alone
        os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
        s3fs.S3FileSystem.clear_instance_cache()
    checkpoints.save(3, *state, EXTRA)
    seen["out of reach"] = told(checkpoints.finish)
    train(*state, 3)
    seen["after"] = whole(*state)
    torch.save(seen, folder / f"seen-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def told(action, *args):
    try:
        action(*args)
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_ranks_share_what_is_saved_and_what_fails(tmp_path, s3_bucket):
    alone = trained()
    Checkpoints(f"{s3_bucket}/one", NOW).save(2, *alone, EXTRA)
    run_ranks(ranks_worker, 2, tmp_path, s3_bucket, ranks=2)
    seen = [torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False) for rank in range(2)]
    for rank in seen:
        assert_same(rank["resumed"], rank["uninterrupted"])
        assert_same(rank["one to two"], whole(*alone))
        assert "make it, or name another" in rank["no bucket"]
        assert "Could not connect to the endpoint" in rank["out of reach"]
    assert_same(seen[0]["after"], seen[1]["after"])  # no rank was left behind
    assert f"{s3_bucket.removeprefix('s3://')}-mistyped" not in files().ls("")  # none was made
    saved, state = restored(f"{s3_bucket}/two")
    assert saved.step == 2
    assert_same(whole(*state), seen[0]["saved"])


# --- asynchronous ---------------------------------------------------------------------------------


def test_training_goes_on_while_an_upload_is_in_flight(run, monkeypatch):
    state, checkpoints = trained(), Checkpoints(run, LATER)
    done, begun, commit = threading.Event(), threading.Event(), s3fs.core.S3File.commit

    def patient(file):
        begun.set()
        assert done.wait(PATIENCE)
        return commit(file)

    monkeypatch.setattr(s3fs.core.S3File, "commit", patient)
    checkpoints.save(2, *state, {})
    expected = whole(*state)
    assert begun.wait(PATIENCE)
    train(*state, 2, 3)
    assert is_saving(checkpoints)
    # the process has written its file, and this one waits to write where the tensors are in it
    assert names(f"{run}/step-00000002") == ["__0_0.distcp"]
    assert Checkpoints(run, NOW).latest() is None
    done.set()
    checkpoints.finish()
    assert not is_saving(checkpoints)
    assert_same(whole(*restored(run)[1]), expected)


# --- what is kept and what is not -----------------------------------------------------------------


def test_what_is_superseded_is_removed_and_nothing_else(run):
    state, checkpoints = trained(), Checkpoints(run, replace(NOW, keep_last=1, keep_best=1))
    files().pipe_file(f"{run}/step-final/notes", b"mine")
    for step, metric in enumerate([2.0, 1.0, 3.0, 4.0], 1):
        checkpoints.save(step, *state, {}, metric=metric)
    assert names(run) == ["step-00000002", "step-00000004", "step-final"]


def test_a_step_saved_again_replaces_the_first(run):
    state, checkpoints = trained(), Checkpoints(run, NOW)
    for time in (1, 2):
        checkpoints.save(2, *state, {"time": time})
    assert names(run) == ["step-00000002-1"]
    assert checkpoints.latest().extra == {"time": 2}


def test_a_save_that_was_cut_off_is_passed_over_and_removed_by_the_next(run, caplog):
    state, checkpoints = trained(), Checkpoints(run, NOW)
    checkpoints.save(2, *state, {})
    whole_one = files()
    # the checkpoints' listings are older
    whole_one.copy(f"{run}/step-00000002", f"{run}/step-00000003", recursive=True)
    whole_one.rm_file(f"{run}/step-00000003/meta.json")
    assert checkpoints.latest().step == 2
    assert warnings_of(caplog) == []
    checkpoints.save(4, *state, {})
    assert names(run) == ["step-00000002", "step-00000004"]


def truncate(path):
    files().pipe_file(path, files().cat_file(path, end=1000))


def flip(path):
    data = bytearray(files().cat_file(path))
    data[len(data) // 2] ^= 1
    files().pipe_file(path, bytes(data))


DAMAGE = {
    "truncated": (truncate, "__0_0.distcp", r"__0_0.distcp: expected .*, found {'bytes': 1000}"),
    "flipped": (flip, "__0_0.distcp", "__0_0.distcp: expected .*sha256.*, found .*sha256"),
    "missing": (lambda path: files().rm_file(path), ".metadata", ".metadata cannot be read: "),
    "torn meta.json": (truncate, "meta.json", "Unterminated string|Expecting"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_fault_and_later_removed(damage, run, caplog):
    state, checkpoints = trained(), Checkpoints(run, NOW)
    for step in (2, 3):
        checkpoints.save(step, *state, {})
    act, name, fault = DAMAGE[damage]
    act(f"{run}/step-00000003/{name}")
    assert checkpoints.latest().step == 2
    (message,) = warnings_of(caplog)
    assert message.startswith(f"checkpoint skipped: {run}/step-00000003: ")
    assert re.search(fault, message), message
    checkpoints.save(4, *state, {})
    assert names(run) == ["step-00000002", "step-00000004"]


# --- a store that refuses -------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_no_run_that_begins(s3_bucket):
    checkpoints = Checkpoints(f"{s3_bucket}-mistyped/run", NOW)
    with pytest.raises(
        CheckpointError,
        match=r"bucket 'test-\w+-mistyped' cannot be reached .*make it, or name another",
    ):
        checkpoints.latest()
    assert Checkpoints(f"{s3_bucket}/run", NOW).latest() is None


def test_a_store_that_refuses_for_a_while_costs_no_checkpoint(run, monkeypatch, caplog):
    state, checkpoints = trained(), Checkpoints(run, NOW)
    for step in (2, 3):
        checkpoints.save(step, *state, {})

    def refuse(*args, **kwargs):
        raise PermissionError("token expired")

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "open", refuse)
        with pytest.raises(CheckpointError, match="token expired"):
            checkpoints.latest()
    assert checkpoints.latest().step == 3
    checkpoints.save(4, *state, {})
    assert names(run) == ["step-00000003", "step-00000004"]


def test_a_server_that_stops_is_an_error_and_the_state_remains(tmp_path, s3_server, monkeypatch):
    state = trained()
    with s3_process(tmp_path) as (server, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("doomed")
        checkpoints = Checkpoints("s3://doomed/run", LATER)
        checkpoints.save(2, *state, {})
        checkpoints.finish()
        assert checkpoints.latest().step == 2
        server.kill()
        server.wait()
        expected = whole(*state)
        for call in (checkpoints.latest, lambda: checkpoints.save(3, *state, {})):
            with pytest.raises(
                CheckpointError, match=r"rank 0: EndpointConnectionError.*Could not connect"
            ):
                call()
    s3fs.S3FileSystem.clear_instance_cache()  # of instances that know the server that is gone
    assert not is_saving(checkpoints)
    assert_same(whole(*state), expected)
    train(*state, 2)
    Checkpoints(tmp_path / "elsewhere", NOW).save(3, *state, {})
    assert_same(whole(*restored(tmp_path / "elsewhere")[1]), whole(*state))


# --- export ---------------------------------------------------------------------------------------


def test_an_export_from_url_to_url_is_that_of_local_folders(run, tmp_path):
    state = trained()
    for folder in (run, str(tmp_path / "run")):
        Checkpoints(folder, NOW).save(2, *state, {})
        export_hugging_face(f"{folder}/step-00000002", f"{folder}-exported")
    local = tmp_path / "run-exported"
    assert (
        names(f"{run}-exported")
        == sorted(path.name for path in local.iterdir())
        == [".gristmill-export", "config.json", "generation_config.json", "model.safetensors"]
    )
    for path in local.iterdir():
        assert files().cat_file(f"{run}-exported/{path.name}") == path.read_bytes()


def test_a_training_starts_from_an_export_at_a_url_as_from_a_folder(run, tmp_path):
    Checkpoints(run, NOW).save(2, *trained(), {})
    digests = []
    for output in (f"{run}-exported", str(tmp_path / "exported")):
        export_hugging_face(f"{run}/step-00000002", output, dtype="float32")
        model, optimizer = build(config=replace(SMALL, init=output), seed=5)
        digests.append(load_pretrained(model, seed=5, ranks=Ranks())["sha256"])
        assert_same(
            whole(model, optimizer), {k: v for k, v in whole(*trained()).items() if not k[1]}
        )
    assert digests[0] == digests[1]
