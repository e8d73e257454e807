"""Run state on an object store: the same bytes as on a disk, through kills and faults, and one
publisher at a time.
"""

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.batches import batch
from pipeline.config.load import load
from pipeline.engine import lease
from pipeline.engine.units import in_process
from pipeline.inspect.verify import verify_path
from pipeline.run import publish as catalog
from pipeline.run import results as explain
from pipeline.run.execute import execute
from pipeline.run.state import read_state
from stages.storage.catalog import read_catalog
from stages.storage.files import (
    create_only,
    names_in,
    open_fs,
    read_bytes,
    read_version,
    replace_if,
    write_atomically,
)
from stages.storage.ledger import Store
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.quickstart import RecordedProgress, quickstart_config
from tests.support.quickstart import bytes_of as bytes_on_disk
from tests.support.s3 import FAULT_KINDS
from tests.support.series import document_text


def bytes_of(generation):
    """Every file of a generation by name."""
    if "://" not in generation:
        return bytes_on_disk(generation)
    fs, root = open_fs(generation)
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two files of six documents each."""
    folder = tmp_path_factory.mktemp("pages")
    for file in range(2):
        lines = [
            json.dumps({"text": document_text(n), "url": f"https://mill.example/{n}"})
            for n in range(6 * file, 6 * file + 6)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def small(directory, pages, *overrides):
    """A run that takes a second, without dedup, whose requests would be most of them."""
    fixed = [
        "input.format=jsonl",
        "input.url_column=url",
        "language.allowed=[]",
        "extract.filters=[]",
        "refine.filters=[]",
    ]
    fixed += [
        "pack.seq_len=64",
        "dedup.enabled=false",
        f"run.directory={directory}",
        f"input.paths=['{pages}/*.jsonl']",
    ]
    return load(None, [*fixed, *overrides])


@pytest.fixture(scope="module")
def local(tmp_path_factory, pages):
    """What `small` comes to on a disk: the run directory."""
    folder = tmp_path_factory.mktemp("run") / "r"
    execute(small(folder, pages), RecordedProgress(), in_process)
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(local):
    """The files of its generation."""
    return bytes_of(f"{local}/generations/gen-0001")


def publish(run, local, pages, sources=None):
    """Publish what was packed on the disk into another catalog, as a run does."""
    store = explain.store_of(local, read_state(local), "pack")
    sources = (
        sources or json.loads(read_bytes(f"{local}/generations/gen-0001/manifest.json"))["sources"]
    )
    with lease.lease(run):
        return catalog.publish(
            run, store, store.listed_commits(), small(local, pages).pack, sources=sources
        )


# --- conditional writes ---------------------------------------------------------------------------


@pytest.fixture(params=["s3", "memory", "local"])
def folder(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket")
    return f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path)


def test_an_object_is_created_once_and_replaced_only_from_the_version_that_was_read(folder):
    uri = f"{folder}/a/x.json"
    assert read_version(uri) == (b"", None)
    assert create_only(uri, b"1") and not create_only(uri, b"2")
    data, first = read_version(uri)
    assert data == b"1" and replace_if(uri, b"2", first) and not replace_if(uri, b"3", first)
    assert read_bytes(uri) == b"2"
    open_fs(uri)[0].rm(open_fs(uri)[1])
    assert not replace_if(uri, b"3", first)
    assert read_version(uri) == (b"", None)


def test_of_many_that_create_one_succeeds(s3_bucket):
    won = []
    threads = [
        threading.Thread(
            target=lambda n=n: won.append(n) if create_only(f"{s3_bucket}/x", b"%d" % n) else None
        )
        for n in range(8)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [b"%d" % n for n in won] == [read_bytes(f"{s3_bucket}/x")]


def test_a_bucket_that_is_not_there_is_an_error_and_no_refusal(s3_bucket):
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        create_only(f"{s3_bucket}-mistyped/x", b"1")


# --- a server that fails --------------------------------------------------------------------------


def test_a_run_through_faults_of_every_kind_writes_the_same_bytes(
    s3_bucket, pages, undisturbed, faults
):
    draw = random.Random("faults")
    kinds = iter(FAULT_KINDS * 100)
    proxy = faults(lambda number, method, path: next(kinds) if draw.random() < 0.08 else None)
    published = execute(small(f"{s3_bucket}/r", pages), RecordedProgress(), in_process).published
    assert bytes_of(published.uri) == undisturbed
    assert all(proxy.done[kind] for kind in FAULT_KINDS), proxy.done
    assert read_catalog(f"{s3_bucket}/r")[0]["name"] == "gen-0001"


def test_a_conditional_write_whose_answer_was_lost_is_known_as_our_own(s3_bucket, faults):
    uri = f"{s3_bucket}/x"
    puts = []

    def lose_each_first(number, method, path):
        puts.append(method) if method == "PUT" else None
        return "no answer" if method == "PUT" and len(puts) % 2 else None

    proxy = faults(lose_each_first)
    assert create_only(uri, b"1")
    assert replace_if(uri, b"2", read_version(uri)[1])
    assert read_bytes(uri) == b"2" and proxy.done["no answer"] == 2


def test_a_conflict_is_asked_again(s3_bucket, faults):
    kinds = iter([409, 409])
    proxy = faults(lambda number, method, path: next(kinds, None) if method == "PUT" else None)
    assert create_only(f"{s3_bucket}/x", b"1") and proxy.done[409] == 2
    assert not create_only(f"{s3_bucket}/x", b"2")


def test_a_store_that_stays_away_is_an_error_after_as_many_attempts_as_the_user_allows(
    s3_bucket, faults, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy = faults(lambda number, method, path: 500)
    with pytest.raises(OSError, match="injected"):
        create_only(f"{s3_bucket}/x", b"1")
    assert proxy.done[500] == 2


def test_an_upload_that_was_cut_leaves_nothing_to_be_seen(s3_bucket, tmp_path, faults, monkeypatch):
    """The last part of an object of several never arrives."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faults(lambda number, method, path: "half request" if "partNumber=2" in path else None)
    fs, _ = open_fs(s3_bucket)
    big = tmp_path / "big"
    big.write_bytes(random.Random(0).randbytes(12 << 20))
    with pytest.raises(Exception, match=r"disconnected|Connection|closed|endpoint"):
        fs.put_file(str(big), f"{s3_bucket}/r/x", chunksize=5 << 20)
    assert not fs.exists(f"{s3_bucket}/r/x") and names_in(f"{s3_bucket}/r") == []


# --- one publisher --------------------------------------------------------------------------------


def test_leftovers_of_another_content_do_not_stay_in_a_generation(
    s3_bucket, local, pages, undisturbed
):
    for name in ("index.json", "part-00000/shard.00000.mds", "part-00009/shard.00000.mds"):
        write_atomically(f"{s3_bucket}/generations/gen-0001/{name}", b"of a run that died here")
    with pytest.raises(FileNotFoundError, match="neither a generation"):
        verify_path(s3_bucket)
    assert bytes_of(publish(s3_bucket, local, pages).uri) == undisturbed
    assert [result.faults for result in verify_path(s3_bucket)] == [[]]


@pytest.mark.parametrize("file", ["part-00000/shard.00000.mds", "manifest.json", "catalog.jsonl"])
def test_a_copy_that_dies_is_completed_by_the_next_run(
    s3_bucket, local, pages, undisturbed, monkeypatch, file
):
    def dies_at_file(uri, *rest):
        if uri.endswith(file):
            raise KeyboardInterrupt
        return (replace_if if rest[1:] else create_only)(uri, *rest)

    for name in ("create_only", "replace_if"):
        monkeypatch.setattr(catalog, name, dies_at_file)
    with pytest.raises(KeyboardInterrupt):
        publish(s3_bucket, local, pages)
    monkeypatch.undo()
    assert read_catalog(s3_bucket) == []
    there = names_in(f"{s3_bucket}/generations/gen-0001")
    assert ("provenance.parquet" in there, "manifest.json" in there) == (
        True,
        file == "catalog.jsonl",
    )
    assert bytes_of(publish(s3_bucket, local, pages).uri) == undisturbed
    assert not publish(s3_bucket, local, pages).new


def test_the_lease_has_a_token_that_only_rises(s3_bucket):
    tokens = []
    for _ in range(3):
        with lease.lease(s3_bucket):
            tokens.append(json.loads(read_bytes(f"{s3_bucket}/lease.json"))["token"])
            assert lease.is_held(s3_bucket)
            with (
                pytest.raises(lease.Held, match=f"is in use by process {os.getpid()} on "),
                lease.lease(s3_bucket),
            ):
                pass
        assert not lease.is_held(s3_bucket)
    assert tokens == [1, 2, 3]


def test_a_lease_that_went_to_another_is_neither_renewed_nor_freed_by_the_first(s3_bucket):
    uri = f"{s3_bucket}/lease.json"
    with lease.lease(s3_bucket):
        [held] = lease._leases
        theirs = json.dumps(
            {"token": 2, "nonce": "b", "host": "h", "pid": 7, "renewed": time.time()}
        ).encode()
        write_atomically(uri, theirs)
        assert not lease._renew(held, at=time.time())
        with pytest.raises(lease.Fenced, match=r"lost it to process 7 on h \(token 2, ours 1\)"):
            lease.fence()
    assert read_bytes(uri) == theirs
    lease.fence()  # holds nothing any more


def hold_for(directory, seconds, skew):
    """Hold the lease with a clock that is wrong by `skew` seconds."""
    clock = time.time
    time.time = lambda: clock() + float(skew)
    lease.RENEW_SECONDS = 0.2
    with lease.lease(directory):
        print("has it", flush=True)
        time.sleep(float(seconds))
        lease.fence()


@pytest.mark.kill
@pytest.mark.parametrize("skew", [-3600, 0, 3600])
def test_a_lease_lasts_while_it_is_renewed_whatever_the_clocks_say(s3_bucket, monkeypatch, skew):
    """A holder that renews keeps it; one that was killed loses it after STALE_SECONDS."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 5)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    holder = subprocess.Popen(
        call_command(hold_for, s3_bucket, 1000, skew), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "has it\n"
        for _ in range(2):
            with pytest.raises(lease.Held, match=f"process {holder.pid} on"):
                lease._take(s3_bucket)
        assert lease.is_held(s3_bucket)
    finally:
        holder.kill()
        holder.wait()
    began = time.monotonic()
    with lease.lease(s3_bucket):
        assert time.monotonic() - began >= 5
        assert json.loads(read_bytes(f"{s3_bucket}/lease.json"))["token"] == 2
    assert not lease.is_held(s3_bucket)


def test_a_lease_that_is_freed_while_one_waits_for_it_is_taken_at_once(s3_bucket, monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    uri = f"{s3_bucket}/lease.json"
    record = {"token": 7, "nonce": "b", "host": "h", "pid": 7, "renewed": 1.0}
    write_atomically(uri, json.dumps(record).encode())
    free = json.dumps(record | {"renewed": 0.0}).encode()
    threading.Timer(0.5, write_atomically, (uri, free)).start()
    began = time.monotonic()
    with lease.lease(s3_bucket):
        assert 0.5 <= time.monotonic() - began < lease.STALE_SECONDS
        assert json.loads(read_bytes(uri))["token"] == 8


def publish_and_stall(run, local, pages, moment):
    """A publication that is suspended at one moment, as by SIGSTOP or a sleeping machine."""
    lease.RENEW_SECONDS = 1000  # a renewal would notice too, but perhaps too late
    original, first = getattr(catalog, moment), threading.Lock()

    def stall(*args, **options):
        # several threads write at once: only the first stops the process, and only once
        if first.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **options)

    setattr(catalog, moment, stall)
    publish(run, local, Path(pages), sources={"of A": 1})


@pytest.mark.kill
@pytest.mark.parametrize("moment", ["read_version", "_move_folder", "create_only", "replace_if"])
def test_a_run_that_was_suspended_past_its_lease_publishes_nothing(
    s3_bucket, local, pages, undisturbed, monkeypatch, moment
):
    """A stalls, B takes over and publishes, A wakes up and is refused."""
    command = call_command(publish_and_stall, s3_bucket, local, pages, moment)
    a = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        stopped = os.waitid(os.P_PID, a.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert stopped.si_code == os.CLD_STOPPED, a.stderr.read()
        monkeypatch.setattr(lease, "STALE_SECONDS", 0)
        published = publish(s3_bucket, local, pages)
        lines = read_bytes(f"{s3_bucket}/catalog.jsonl")
        a.send_signal(signal.SIGCONT)
        _, said = a.communicate(timeout=600)
    finally:
        a.kill()
        a.wait()
    assert a.returncode == 1 and "lease.Fenced: " in said, said
    assert (
        published.new
        and len(lines.splitlines()) == 1
        and read_bytes(f"{s3_bucket}/catalog.jsonl") == lines
    )
    assert bytes_of(published.uri) == undisturbed and names_in(f"{s3_bucket}/generations") == [
        "gen-0001"
    ]
    # A neither renewed nor freed it
    assert json.loads(read_bytes(f"{s3_bucket}/lease.json"))["token"] == 2


# --- batches --------------------------------------------------------------------------------------


def series_of(series, pages):
    return small(series, pages, "dedup.enabled=true", "schedule.static_inputs=1")


def test_batches_on_s3_publish_what_they_publish_on_a_disk(s3_bucket, tmp_path, pages):
    for series in (str(tmp_path), f"{s3_bucket}/series"):
        done = [
            batch.run_batch(series_of(series, pages), RecordedProgress(), in_process)
            for _ in range(3)
        ]
        assert [d.batch and d.batch.done["generation"] for d in done] == [
            "gen-0001",
            "gen-0002",
            None,
        ]
    for name in ("gen-0001", "gen-0002"):
        assert bytes_of(f"{s3_bucket}/series/generations/{name}") == bytes_of(
            f"{tmp_path}/generations/{name}"
        )
    assert len(_gristmill("decisions", f"{s3_bucket}/series", "--json").splitlines()) == 3
    assert [result.faults for result in verify_path(f"{s3_bucket}/series")] == [[], []]


def test_a_batch_that_another_scheduler_began_is_not_begun_anew(s3_bucket, pages, monkeypatch):
    series = f"{s3_bucket}/series"
    theirs = b'{"inputs": [], "started": 1.0}'

    def late(uri, data):
        write_atomically(uri, theirs)
        return create_only(uri, data)

    monkeypatch.setattr(batch, "create_only", late)
    with pytest.raises(lease.Fenced, match="another scheduler began this batch"):
        batch.run_batch(series_of(series, pages), RecordedProgress(), in_process)
    assert read_bytes(f"{series}/batches/0001/batch.json") == theirs


# --- the whole job --------------------------------------------------------------------------------


def run_until_killed(folder, phase):
    """The quickstart, killed after the first unit of `phase`."""

    def dying(name, task, units, resources):
        for number, done in enumerate(in_process(name, task, units, resources)):
            yield done
            if name == phase and number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    execute(quickstart_config(folder), RecordedProgress(), dying)


@pytest.mark.kill
@pytest.mark.ray
def test_the_quickstart_on_s3_is_the_quickstart_on_disk(
    s3_bucket, tmp_path, ray_session, monkeypatch
):
    """Killed in extract and in dedup, gone on with by the command line on Ray, then asked about in
    each way.
    """
    local = execute(quickstart_config(tmp_path / "r"), RecordedProgress(), in_process).published
    run = f"{s3_bucket}/r"
    for phase in ("extract", "dedup keep"):
        killed = subprocess.run(
            call_command(run_until_killed, run, phase), cwd=ROOT, capture_output=True, text=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        _expire(run)
    done = list(Store(f"{run}/extract/{names_in(f'{run}/extract')[0]}").commits())
    given = [
        f"{key}={json.dumps(value)}" for key, value in _overrides(quickstart_config(run)).items()
    ]
    said = _gristmill("run", str(ROOT / "configs" / "quickstart.toml"), *given, "--json")
    assert bytes_of(json.loads(said)["generation"]["uri"]) == bytes_of(local.uri)
    # what was committed was not done again
    assert list(Store(f"{run}/extract/{names_in(f'{run}/extract')[0]}").commits()) == done
    monkeypatch.setattr(
        "pipeline.engine.cluster.start", lambda *_: pytest.fail("Ray is not needed to ask")
    )
    status = json.loads(_gristmill("status", run, "--json"))
    assert status["generation"] == "gen-0001" and status["phases"]["pack"]["left"] == 0
    [verified] = json.loads(_gristmill("verify", run, "--json"))
    assert verified["faults"] == [] and verified["rows"] == local.manifest["rows"]
    assert _gristmill("report", run).strip() == f"{run}/report.html" and b"<html" in read_bytes(
        f"{run}/report.html"
    )
    url = pq.read_table(f"{local.uri}/provenance.parquet")["url"][0].as_py()
    assert '"fate": "published"' in _gristmill("why", run, url, "--json")


def _overrides(config):
    return {
        "run.directory": config.run.directory,
        "input.paths": list(config.input.paths),
        "extract.engine": config.extract.engine,
        "pack.seq_len": config.pack.seq_len,
        "perplexity.model": f"{ROOT}/models/wiki-en.5gram.bin",
        "quality.model": f"{ROOT}/models/quality-en.ftz",
    }


def _expire(run):
    """As if a minute had passed since the holder died."""
    record = json.loads(read_bytes(f"{run}/lease.json"))
    write_atomically(f"{run}/lease.json", json.dumps(record | {"renewed": 0.0}).encode())


def _gristmill(*command):
    result = CliRunner().invoke(app, [*command])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout
