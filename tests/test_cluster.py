"""The quickstart submitted to a cluster, its driver on a worker node: a lost node costs nothing, the
loss of the driver's ends the job, and the same submission goes on to the bytes of one machine.
"""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.engine.units import in_process
from pipeline.run.execute import execute
from tests.support.cluster import QUIET, kill_node, local_cluster, title
from tests.support.inline import Silent
from tests.support.paths import ROOT
from tests.support.processes import free_ports
from tests.support.quickstart import bytes_of

pytestmark = [pytest.mark.ray, pytest.mark.kill]
pytest.importorskip("ray")
import psutil

QUICKSTART = ROOT / "configs" / "quickstart.toml"
ON_A_PROCESSOR = ["--entrypoint-num-cpus", "1", "--entrypoint-memory", "1000000000"]
ON_A_DRIVER_NODE = ["--entrypoint-resources", '{"driver": 1}']


@pytest.fixture
def cluster(tmp_path):
    """A cluster with a job server: the processes of its three workers' raylets, and the environment
    that leads to it.
    """
    pytest.importorskip("aiohttp_cors", reason="the job server comes with the cluster extra")
    names = ("dashboard_port", "dashboard_agent_listen_port")
    ports = dict(zip(names, free_ports(2), strict=True))  # the usual may be those of another Ray
    env = {
        # where gristmill and ray are
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard_port']}",
    }
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", **ports}
    worker = {"num_cpus": 2, "resources": {"driver": 1}}  # fit for a driver
    with local_cluster(tmp_path / "cluster.log", env, **head) as started:
        yield [started.add_node(**worker) for _ in range(3)], os.environ | QUIET | env


def processes(raylet, pattern: str) -> list[str]:
    """Commands of a node's processes that begin like `pattern`."""
    with suppress(psutil.NoSuchProcess):
        commands = map(title, raylet.children(recursive=True))
        return [command for command in commands if re.match(pattern, command)]
    return []


def drives(raylet) -> bool:
    """Whether the job's command runs on the node."""
    return bool(processes(raylet, r"\S*sh -c gristmill run "))


def works(raylet) -> bool:
    """Whether a worker of the node extracts: Ray names processes after their task."""
    return bool(processes(raylet, "ray::.*extract"))


class Jobs:
    """The commands of `ray job`, for one run."""

    def __init__(self, env, folder: Path):
        self.env, self.folder = env, folder

    def call(self, *words: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        words = ("ray", "job", *words)
        done = subprocess.run(
            words, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, name: str, *driver: str) -> tuple[int, str]:
        """Start the run under a submission id; `driver`: options that say where its driver runs."""
        run = ["gristmill", "run", str(QUICKSTART.relative_to(ROOT))]
        run += [f"run.directory={self.folder}/cluster", "extract.parallelism=2"]
        options = ["--submission-id", name, "--working-dir", ".", *driver, "--no-wait"]
        return self.call("submit", *options, "--", *run)

    def follow(self, name: str, log: Path) -> subprocess.Popen:
        """Write the output of a job to `log`, until it ends."""
        with log.open("w") as stream:
            command = ["ray", "job", "logs", name, "--follow"]
            return subprocess.Popen(command, env=self.env, stdout=stream, stderr=stream)

    def wait(self, name: str) -> str:
        """What is said of a job that has ended."""
        until = time.monotonic() + 1200
        while time.monotonic() < until:
            _, status = self.call("status", name)
            if re.search("succeeded|failed|stopped", status):
                return status
            time.sleep(1)
        raise TimeoutError(status)


def test_a_submitted_quickstart_outlives_nodes_and_goes_on_after_that_of_its_driver(
    cluster, tmp_path
):
    raylets, env = cluster
    jobs = Jobs(env, tmp_path)
    code, message = jobs.submit("quickstart-1", *ON_A_PROCESSOR)
    until = time.monotonic() + 120
    # the head is up before what starts jobs on it
    while code and "already exists" not in message and time.monotonic() < until:
        code, message = jobs.submit("quickstart-1", *ON_A_PROCESSOR)
    assert code == 0 or "already exists" in message, message
    log = tmp_path / "job.log"
    following = jobs.follow("quickstart-1", log)
    code, message = jobs.submit("quickstart-1", *ON_A_PROCESSOR)
    assert code == 1 and "already exists" in message

    while not (committed(tmp_path) and any(map(drives, raylets)) and any(map(works, raylets))):
        assert following.poll() is None, log.read_text()
        time.sleep(0.05)
    [driver] = filter(drives, raylets)
    others = [raylet for raylet in raylets if raylet != driver]
    lost = next(filter(works, others), others[0])
    kill_node(lost)
    before = committed(tmp_path)
    while committed(tmp_path) == before < 8:
        assert following.poll() is None, log.read_text()
        time.sleep(0.05)

    assert drives(driver)
    kill_node(driver)
    status = jobs.wait("quickstart-1")
    assert "failed" in status and "its node has died" in status
    assert jobs.submit("quickstart-2", *ON_A_DRIVER_NODE)[0] == 0
    # there is a processor free now
    execute(load(QUICKSTART, [f"run.directory={tmp_path}/local"]), Silent(), in_process)
    assert "succeeded" in jobs.wait("quickstart-2")
    here, there = (
        bytes_of(tmp_path / name / "generations" / "gen-0001") for name in ("local", "cluster")
    )
    assert here.keys() == there.keys()
    assert {**here, "manifest.json": b""} == {**there, "manifest.json": b""}


def committed(folder: Path) -> int:
    """How many of the eight files are extracted."""
    return len(list(folder.glob("cluster/extract/*/commits/*")))
