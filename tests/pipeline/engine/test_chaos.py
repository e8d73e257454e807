"""Some twenty SIGKILLs over sequences of batches, of driver, worker, trainer and a store that
fails: nothing is lost or comes twice.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from glob import glob
from pathlib import Path

import pytest

from pipeline.batches.batch import run_batch
from pipeline.config.load import load
from pipeline.engine import lease
from pipeline.engine.units import in_process
from pipeline.run.phases import PHASES
from stages.storage.catalog import read_catalog
from tests.support.inline import Silent
from tests.support.live_training import LIVE_TRAINING, step_records
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.s3 import FAULT_KINDS, FaultyProxy
from tests.support.series import assert_undisturbed, published_urls, write_listing
from trainer.telemetry.feedback import consumed, read_lines

pytestmark = pytest.mark.kill

SETTINGS = """
input = {{paths = ["{folder}/crawl/[0-5].jsonl"], format = "jsonl", url_column = "url"}}
language.allowed = []
extract.filters = []
refine.filters = []
pack.seq_len = 64
run.attempts = 9  # a unit may be met again and again
dedup.num_bands = 1  # each is a unit
"""


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """A folder with a listing of six files, the configuration, and in `undisturbed` what three
    batches of it come to.
    """
    folder = tmp_path_factory.mktemp("chaos")
    write_listing(folder / "crawl")
    (folder / "batch.toml").write_text(SETTINGS.format(folder=folder))
    settings = load(folder / "batch.toml", [f"run.directory={folder}/undisturbed"])
    while run_batch(settings, Silent(), in_process, inputs=2).batch:
        pass
    documents = [
        int(url.rsplit("/", 1)[1])
        for found in published_urls(folder, "undisturbed")
        for url in found
    ]
    assert sorted(documents) == list(range(24))  # each once
    return folder


def run_batches(file, series):
    """All batches of the listing, two inputs each, by a driver that takes a dead one's lease at
    once.
    """
    lease.STALE_SECONDS = 0  # as if a minute had passed since the driver before was killed
    settings = load(Path(file), [f"run.directory={series}"])
    while run_batch(settings, Silent(), in_process, inputs=2).batch:
        pass


class Fate:
    """A fault now and then; and the driver's death at each of `moments`: its n-th request, or when
    an object so named is written.
    """

    def __init__(self, draw, moments):
        self.draw, self.moments, self.kinds = (
            draw,
            moments,
            itertools.cycle([*FAULT_KINDS, "timeout"]),
        )
        self.driver, self.requests, self.killed, self.faults = None, 0, 0, Counter()

    def __call__(self, number, method, path):
        self.requests += 1
        moment = self.moments[0] if self.driver and self.moments else "never"
        if (
            self.requests >= moment
            if isinstance(moment, int)
            else method == "PUT" and path.endswith(moment)
        ):
            self.driver.kill()
            self.driver, self.killed = None, self.killed + bool(self.moments.pop(0))
            return self.draw.choice([None, "no answer", "half request"])
        kind = next(self.kinds) if self.draw.random() < 0.01 else None
        self.faults[kind] += 1
        return kind


def test_a_sequence_on_s3_whose_driver_is_killed_at_any_request_and_whose_store_fails(
    s3_server, s3_bucket, crawl
):
    draw = random.Random("a sequence on s3")
    moments = [draw.randrange(1, 250) for _ in range(8)]
    moments[4:4] = ["/batch.json", "/manifest.json", "/catalog.jsonl", "/done.json"]
    fate, series = Fate(draw, moments), f"{s3_bucket}/series"
    proxy = FaultyProxy(s3_server, fate)
    environment = os.environ | {"FSSPEC_S3": '{"config_kwargs": {"read_timeout": 3}}'}
    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    command = call_command(run_batches, crawl / "batch.toml", series)
    ends = []
    while 0 not in ends:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        fate.requests, fate.driver = 0, driver
        said = driver.communicate(timeout=600)[1]
        ends.append(driver.returncode)
        assert ends[-1] in (0, -signal.SIGKILL), said.decode()
    proxy.shutdown()
    proxy.server_close()
    # a driver that has little left to do may end before its moment comes
    assert ends == [-signal.SIGKILL] * fate.killed + [0] and fate.killed >= 10
    assert all(fate.faults[kind] for kind in [*FAULT_KINDS, "timeout"])
    assert_undisturbed(series, f"{crawl}/undisturbed")


def begin(folder, *command):
    """A command in a session of its own, by which its Ray processes are known; what it says goes to
    a file.
    """
    with open(folder / f"{command[0]}.log", "a") as log:
        whole = [sys.executable, "-m", "pipeline", *map(str, command)]
        return subprocess.Popen(whole, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def session_of(driver):
    """Processes that a driver has started and that live: their ids and what they call themselves."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            # a zombie has none
            if os.getsid(pid := int(path.parent.name)) == driver.pid and (
                name := path.read_bytes()
            ):
                found[pid] = name
    return found


def kill_worker(driver):
    """Kill a Ray worker: one at work on a unit or, as units take milliseconds, if none is seen, one
    between two. False if none is.
    """
    at_work = tuple(f"ray::{spec.name}".encode() for spec in PHASES)
    for wanted in [at_work] * 50 + [b"ray::IDLE"]:
        for pid in (pid for pid, name in session_of(driver).items() if name.startswith(wanted)):
            os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(0.005)
    return False


def kill(process):
    """Kill a process that is alive. False if it had ended."""
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.ray
@pytest.mark.train
def test_a_sequence_on_a_disk_whose_driver_workers_and_live_trainer_are_killed(crawl, tmp_path):
    """Driver and workers die as commits appear, the trainer as steps do; each is begun again with
    the same command.
    """
    (tmp_path / "train.toml").write_text(LIVE_TRAINING.format(folder=tmp_path))
    batch = ("batch", crawl / "batch.toml", f"run.directory={tmp_path}/series", "--inputs", "2")
    train = ("train", tmp_path / "train.toml", "--no-ray", "checkpoint.every_steps=8")
    draw = random.Random("a sequence on a disk")
    by_commits = list(
        zip(
            sorted(draw.sample(range(1, 36), 6)),
            draw.sample([kill, kill_worker] * 3, 6),
            strict=True,
        )
    )
    by_steps = sorted(draw.sample(range(1, 50), 3))
    entries = read_catalog(f"{crawl}/undisturbed")
    rows, last = (
        sum(entry["rows"] for entry in entries),
        tmp_path / "series" / "batches" / "0003" / "done.json",
    )
    begun = time.monotonic()  # whoever waits for ever is told from whoever is slow
    killed, drivers, trainer = Counter(), [begin(tmp_path, *batch)], begin(tmp_path, *train)
    try:
        while not (last.exists() and (told := step_records(tmp_path)) and told[-1]["step"] == rows):
            commits = len(glob(f"{tmp_path}/series/batches/*/**/commits/*.json", recursive=True))
            if (
                by_commits
                and not last.exists()
                and commits >= by_commits[0][0]
                and by_commits[0][1](drivers[-1])
            ):
                killed[by_commits.pop(0)[1].__name__] += 1
            if by_steps and len(step_records(tmp_path)) >= by_steps[0] and kill(trainer):
                killed["trainer"] += bool(by_steps.pop(0))
            for process, log in ((drivers[-1], "batch"), (trainer, "train")):
                assert process.poll() in (None, 0, -signal.SIGKILL), (
                    tmp_path / f"{log}.log"
                ).read_text()
            assert time.monotonic() < begun + 1200, (tmp_path / f"{log}.log").read_text()
            if drivers[-1].poll() is not None and not last.exists():
                drivers.append(begin(tmp_path, *batch))
            trainer = begin(tmp_path, *train) if trainer.poll() is not None else trainer
            time.sleep(0.05)
        (tmp_path / "training" / "stop").touch()
        # killed after its last word
        assert trainer.wait(600) == 0 and drivers[-1].wait(600) in (
            0,
            -signal.SIGKILL,
        )
        # of Ray only two agents outlive a killed driver, which ask after their node for another
        # minute: no worker works on
        while left := [
            n for driver in drivers for n in session_of(driver).values() if b"Agent" not in n
        ]:
            assert time.monotonic() < begun + 1200, left
            time.sleep(0.5)
    finally:
        kill(trainer)
        for driver in drivers:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
    # units take milliseconds: the last worker that was to die may not have been met at work
    assert killed["trainer"] == 3 and killed["kill"] >= 2 and killed["kill_worker"] >= 2
    assert_undisturbed(f"{tmp_path}/series", f"{crawl}/undisturbed")
    steps_taken = {
        record["step"]: record["data"] for record in told
    }.values()  # the last word of those that came again
    drawn = [drawn for data in steps_taken for [drawn] in data.values()]
    taken = Counter(
        (name, epoch, place) for name, epoch, start, stop in drawn for place in range(start, stop)
    )
    assert taken == {
        (entry["name"], 0, place): 1 for entry in entries for place in range(entry["rows"])
    }
    lines = read_lines(f"{tmp_path}/series/feedback", "training").summaries
    assert (
        consumed(lines)[-1]
        == lines[-1].report.tokens_total
        == sum(entry["tokens"] for entry in entries)
    )
    assert len(told) > rows and 1 <= lines[-1].report.restarts <= 3
