"""Scheduled batches of the bundled pages and a training on them, while processes of every kind are
killed at random: the bytes, weights and losses of runs that nobody disturbed.

    make test-soak                              200 kills
    SOAK_KILLS=20 SOAK_SEED=7 make test-soak    fewer, and a given seed

All of it runs on a local cluster of two nodes, in turn on a disk and on an object store, and is
started again until `SOAK_KILLS` kills have hit a process at work: `victims` says how that is known.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.kill, pytest.mark.ray, pytest.mark.train]
pytest.importorskip("ray")
pytest.importorskip("torch")

import psutil

from pipeline.batches.batch import batches, decisions, run_batch
from pipeline.config.load import load
from pipeline.engine import lease
from pipeline.engine.units import in_process
from pipeline.run.phases import SPECS
from pipeline.run.state import read_state
from stages.storage.catalog import read_catalog
from stages.storage.files import exists, names_in
from tests.support.cluster import QUIET, kill_node, local_cluster, title
from tests.support.inline import Silent
from tests.support.live_training import metric_records
from tests.support.paths import ROOT
from tests.support.processes import call_command, free_ports
from tests.support.quickstart import bytes_of
from tests.support.s3 import gateway, s3_process
from tests.support.series import assert_undisturbed

KILLS = int(os.environ.get("SOAK_KILLS", "200"))
SEED = os.environ.get("SOAK_SEED") or str(random.SystemRandom().randrange(10**6))
# kinds of kills in 20, by where the series is
SHARES = {
    "disk": {"driver": 3, "worker": 7, "child": 7, "node": 1, "trainer": 1, "rank": 1},
    "store": {"driver": 3, "worker": 5, "child": 5, "node": 1, "trainer": 1, "rank": 1, "gateway": 4},
}  # fmt: skip
QUICKSTART = str(ROOT / "configs" / "quickstart.toml")
BATCH = [
    # not the largest, which would be most of the training
    "input.paths=['samples/[b-z]*.warc.gz', 'samples/apache2*.warc.gz']",
    "pack.seq_len=256",
    "pack.held_out=0.8",  # most of the training would take longer than the batches
    "schedule.min_inputs=1",
    "schedule.max_inputs=1",
    # the ranks take the rest
    *(f"{stage}.num_cpus=0.9" for stage in ("extract", "dedup", "refine", "pack")),
    "run.attempts=1000",  # a unit may be hit again and again
]
TRAINING = """
directory = "{folder}"
model = {{dim = 8, num_layers = 1, num_heads = 2, num_kv_heads = 1, ffn_dim = 8}}
parallel.precision = "fp32"
data = {{global_batch_rows = 2, micro_batch_rows = 1, at_end = "{at_end}", sources = [{{run = "{series}"}}]}}
checkpoint = {{every_steps = 10, folder = "{checkpoints}"}}
telemetry = {{sinks = [], every_seconds = 2.0}}
optimizer = {{lr = 1e-2}}
ray = {{workers = 2, cpus_per_worker = 0.05, max_failures = -1}}
"""
PATIENCE = 5.0  # seconds until another kind is killed, if no process of a kind is at work
STUCK = 600.0  # seconds without a kill or a step of the training after which the test fails


class Hit(NamedTuple):
    """A kill of a process at work, and the phase of its work."""

    kind: str
    phase: str


def scheduler(*arguments: str) -> None:
    """`gristmill schedule`, which takes a dead scheduler's lease on the store at once."""
    from pipeline.__main__ import app

    lease.STALE_SECONDS = 0  # as if a minute had passed since the one before was killed
    app(["schedule", *arguments])


class Service:
    """A command that is started again whenever it has ended."""

    def __init__(self, log: Path, env: dict[str, str], command: list[str]) -> None:
        self.log, self.env, self.command = log, env, command
        self.codes: Counter[int] = Counter()
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def keep_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            self.codes[code] += 1
            self.start()

    def end(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)


class Soak:
    """A cluster, a store behind a gateway, and what is killed."""

    def __init__(self, folder: Path, resources: ExitStack) -> None:
        self.folder, self.draw = folder, random.Random(f"{SEED}:soak")
        self.hits: list[Hit] = []
        (folder / "tmp" / "ray").mkdir(parents=True)  # Ray expects it
        _, self.store = resources.enter_context(s3_process(folder))
        [port] = free_ports(1)
        self.env = os.environ | QUIET | {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        command = call_command(gateway, self.store, port)
        self.gateway = Service(folder / "gateway.log", self.env, command)
        resources.callback(self.gateway.end)
        self.cluster = resources.enter_context(
            local_cluster(folder / "cluster.log", self.env, include_dashboard=False)
        )
        self.env["RAY_ADDRESS"] = self.cluster.address
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def workers(self) -> list[psutil.Process]:
        """All processes of the cluster's nodes: the process that holds it has started them all."""
        return psutil.Process(self.cluster.process.pid).children(recursive=True)

    def kill_a_node(self, raylet: psutil.Process) -> None:
        kill_node(raylet)
        self.nodes.remove(raylet)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


class Round:
    """A series of batches and a training on it, from nothing to its end."""

    def __init__(self, soak: Soak, place: str, number: int, steps: int) -> None:
        self.soak, self.place, self.steps = soak, place, steps
        self.folder = soak.folder / f"round-{number}"
        self.folder.mkdir()
        self.series, checkpoints = f"{self.folder}/series", ""
        if place == "store":
            import s3fs

            s3fs.S3FileSystem(endpoint_url=soak.store).mkdir(f"round-{number}")
            self.series = f"s3://round-{number}/series"
            checkpoints = f"s3://round-{number}/checkpoints"
        self.training = write_training(self.folder, self.series, "wait", checkpoints)
        overrides = [f"run.directory={self.series}", *BATCH]
        command = call_command(scheduler, QUICKSTART, *overrides, "--every", "1s", "--log", "json")
        self.driver = Service(self.folder / "schedule.log", soak.env, command)
        self.trainer = Service(self.folder / "train.log", soak.env, train_command(self.training))

    # --- state ------------------------------------------------------------------------------------

    def stage(self) -> str | None:
        """The phase that the driver is in, None if no batch is at work."""
        with suppress(OSError, ValueError):
            batch = batches(self.series)[-1:]
            if batch and not batch[0].done:
                state = read_state(batch[0].directory)
                ours = state.process and state.process.pid == self.driver.process.pid
                return state.stage if ours else None
        return None

    def is_done(self, expected: int) -> bool:
        """Whether all batches are published and all their rows are trained on."""
        return self.last_step() >= self.steps and (
            sum(bool(b.done) for b in batches(self.series)) == expected
        )

    def last_step(self) -> int:
        records = metric_records(self.folder / "training")
        return records[-1]["step"] if records else 0

    def training_phase(self) -> str | None:
        """What the training is at, None if it has not taken a step in the last two seconds."""
        with suppress(OSError):
            written = (self.folder / "training" / "metrics.jsonl").stat().st_mtime
            if time.time() - written < 2.0 and self.last_step() < self.steps:
                return "saving" if self.is_saving() else "steps"
        return None

    def summary(self) -> str:
        """How often scheduler and training ended, by exit code (-9 is a kill), and in which states
        the scheduler saw the training.
        """
        states = Counter(json.loads(line)["decision"]["state"] for line in decisions(self.series))
        codes = f"scheduler {dict(self.driver.codes)}, training {dict(self.trainer.codes)}"
        return f"{codes}, decisions {dict(states)}"

    def is_saving(self) -> bool:
        checkpoints = (
            self.series.replace("series", "checkpoints")
            if self.place == "store"
            else f"{self.folder}/training/checkpoints"
        )
        newest = max(names_in(checkpoints), default=None)
        return newest is not None and not exists(f"{checkpoints}/{newest}/meta.json")

    # --- victims ----------------------------------------------------------------------------------

    def victims(self, kind: str) -> Iterator[tuple[psutil.Process, Callable[[], str | None]]]:
        """Processes of a kind, and what says of one that is suspended what it was at work on.

        driver   run.json names its process in a phase of a batch that is not done
        worker   Ray has named the process after its task
        child    it was on a processor, and its parent is a worker in a task
        node     one of its workers is in a task
        trainer  a step was recorded within the last two seconds; so for a rank
        gateway  it has a connection to the server behind it: a request is under way
        """
        soak = self.soak
        if kind == "driver":
            yield psutil.Process(self.driver.process.pid), self.stage
        elif kind == "trainer":
            yield psutil.Process(self.trainer.process.pid), self.training_phase
        elif kind == "gateway":
            port = int(soak.store.rpartition(":")[2])
            yield (
                (gate := psutil.Process(soak.gateway.process.pid)),
                lambda: (
                    self.stage()
                    if any(c.raddr and c.raddr.port == port for c in gate.net_connections())
                    else None
                ),
            )
        elif kind == "node":
            for raylet in soak.nodes:
                yield (
                    raylet,
                    lambda raylet=raylet: next(
                        filter(None, map(task_of, raylet.children(recursive=True))), None
                    ),
                )
        else:
            for process in soak.workers():
                if kind == "worker" and task_of(process):
                    yield process, lambda process=process: task_of(process)
                elif kind == "rank" and "RayTrainWorker" in title(process):
                    yield process, self.training_phase
                elif (
                    kind == "child"
                    and "stages.isolation.child" in title(process)
                    and process.status() == psutil.STATUS_RUNNING
                ):
                    yield process, lambda process=process: task_of(process.parent())

    def strike(self, kind: str) -> str | None:
        """Kill a process of a kind that is at work; its phase, or None if there was none."""
        with suppress(psutil.Error):
            candidates = list(self.victims(kind))
            self.soak.draw.shuffle(candidates)
            for process, phase_of in candidates:
                if phase := suspended_phase(process, phase_of):
                    self.kill(kind, process)
                    return phase
        return None

    def kill(self, kind: str, process: psutil.Process) -> None:
        if kind == "node":
            self.soak.kill_a_node(process)
            return
        process.kill()
        if kind == "gateway":
            time.sleep(self.soak.draw.uniform(0.2, 4.0))  # the store is gone so long
            self.soak.gateway.keep_alive()

    # --- run --------------------------------------------------------------------------------------

    def run(self, expected: int) -> None:
        """Kill until there are enough kills, and go on to the end."""
        soak, draw = self.soak, self.soak.draw
        due = moved = time.monotonic()
        bag, kind, progress, turns = [], "", None, itertools.count()
        while next(turns) % 20 or not self.is_done(expected):
            for service in (self.driver, self.trainer, soak.gateway):
                service.keep_alive()
            if len(soak.hits) < KILLS and time.monotonic() > due:
                shares = SHARES[self.place]
                bag = bag or draw.sample(list(shares), counts=shares.values(), k=20)
                kind = kind or draw.choice(bag)
                if phase := self.strike(kind):
                    soak.hits.append(Hit(kind, phase))
                    bag.remove(kind)
                    print(f"{len(soak.hits):4} {self.place:5} {kind:8} {phase}", flush=True)
                    kind, due = "", time.monotonic() + draw.uniform(0.0, 2.0)
                elif time.monotonic() > due + PATIENCE:
                    kind, due = "", time.monotonic()
            if progress != (progress := (len(soak.hits), self.last_step())):
                moved = time.monotonic()
            assert time.monotonic() < moved + STUCK, f"nothing moves: see {self.folder}"
            time.sleep(0.05)
        assert self.driver.end(signal.SIGINT) in (0, 130)
        while self.trainer.process.poll() != 0:
            (self.folder / "training" / "stop").touch()
            self.trainer.keep_alive()
            time.sleep(0.2)


def suspended_phase(process: psutil.Process, phase_of: Callable[[], str | None]) -> str | None:
    """What a process is at work on. If that is anything it stays suspended, so that it is at work on
    the same when it is killed.
    """
    process.suspend()
    phase = None
    try:
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        phase = phase_of()
        return phase
    finally:
        if phase is None:
            process.resume()


def task_of(process: psutil.Process | None) -> str | None:
    """The phase of the unit that a Ray worker is at work on, None for any other process."""
    name = title(process).removeprefix("ray::") if process else ""
    return name if name in SPECS else None


def write_training(folder: Path, series: str, at_end: str, checkpoints: str = "") -> Path:
    text = TRAINING.format(
        folder=folder / "training", series=series, at_end=at_end, checkpoints=checkpoints
    )
    (folder / "train.toml").write_text(text)
    return folder / "train.toml"


def train_command(file: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "train", str(file)]


def losses(folder: Path) -> dict[int, tuple[object, ...]]:
    """What each step came to: of those that came again the last, and all must agree."""
    found: dict[int, tuple[object, ...]] = {}
    for record in metric_records(folder / "training"):
        data = list(record["data"].values())
        figures = (*(record[key] for key in ("loss", "grad_norm", "lr", "tokens")), data)
        assert found.setdefault(record["step"], figures) == figures
    return found


def leftovers(folder: Path) -> dict[str, list[str]]:
    """Temporary files that killed processes left, and processes that outlive everything."""
    mark, until = str(folder / "tmp"), time.monotonic() + 60
    processes = [""]
    while processes and time.monotonic() < until:  # of a killed node, some notice it later
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TMPDIR") == mark:
                    processes.append(title(process))
        time.sleep(1)
    # what is kept on purpose: an unpacked vocabulary, and what Ray and torch keep
    kept = ("gristmill-tiktoken", "ray", "torchinductor")
    files = [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp-*")]
    files += [p.name for p in (folder / "tmp").iterdir() if not p.name.startswith((".", *kept))]
    return {"processes": processes, "files": files}


def weights(folder: Path) -> dict[str, bytes]:
    from trainer.launch import export

    export(f"{folder}/training", f"{folder}/exported", step=None)
    return bytes_of(folder / "exported")


def test_bytes_weights_and_losses_do_not_depend_on_who_was_killed(tmp_path, monkeypatch):
    print(f"\nseed {SEED}, {KILLS} kills", flush=True)
    began, shared_memory = time.monotonic(), set(os.listdir("/dev/shm"))
    calm = tmp_path / "undisturbed"
    calm.mkdir()
    monkeypatch.chdir(ROOT)
    settings = load(QUICKSTART, [f"run.directory={calm}/series", *BATCH])
    while run_batch(settings, Silent(), in_process).batch:
        pass
    expected = len(batches(f"{calm}/series"))
    steps = sum(entry["rows"] for entry in read_catalog(f"{calm}/series")) // 2
    with ExitStack() as resources:
        soak = Soak(tmp_path, resources)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, soak.env[name])
        monkeypatch.setenv("AWS_ENDPOINT_URL", soak.store)  # past the gateway
        command = train_command(write_training(calm, f"{calm}/series", "stop"))
        subprocess.run(command, cwd=ROOT, env=soak.env, check=True)
        assert len(losses(calm)) == steps
        print(f"undisturbed: {expected} batches, {steps} steps, {time.monotonic() - began:.0f} s")
        places = itertools.cycle(soak.draw.sample(list(SHARES), 2))
        for number in itertools.count(1):
            current = Round(soak, next(places), number, steps)
            try:
                current.run(expected)
            finally:
                current.driver.end()
                current.trainer.end()
            assert_undisturbed(current.series, f"{calm}/series")
            assert losses(current.folder) == losses(calm)
            assert weights(current.folder) == weights(calm)
            print(f"round {number} is the undisturbed one; {current.summary()}", flush=True)
            if len(soak.hits) >= KILLS:
                break
    for kind, count in sorted(Counter(hit.kind for hit in soak.hits).items()):
        phases = Counter(hit.phase for hit in soak.hits if hit.kind == kind)
        print(f"{kind:8} {count:4}  {', '.join(f'{n} {name}' for name, n in phases.most_common())}")
    print(f"{len(soak.hits)} kills in {time.monotonic() - began:.0f} s, seed {SEED}")
    left = leftovers(tmp_path)
    print(f"left: {left}, in /dev/shm {sorted(set(os.listdir('/dev/shm')) - shared_memory)}")
    assert not left["processes"]
