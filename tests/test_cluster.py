"""The quickstart on a cluster of three nodes, submitted to its head, one node killed in its midst:
the bytes of one machine.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pipeline.config.load import load
from pipeline.engine.units import in_process
from pipeline.run.execute import execute
from tests.support.inline import Silent
from tests.support.paths import ROOT
from tests.support.processes import free_ports
from tests.support.quickstart import bytes_of

pytestmark = [pytest.mark.ray, pytest.mark.kill]
pytest.importorskip("ray")
import psutil

QUICKSTART = ROOT / "configs" / "quickstart.toml"
# A head that works on nothing, two workers of one processor each; ends with its input. The usual
# ports may be those of another Ray; folders of their own, as each machine has one, are where nodes
# unpack what a job was sent with.
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
ports = dict(zip(("dashboard_port", "dashboard_agent_listen_port"), map(int, sys.argv[1:3])))
head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", **ports}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1, temp_dir=folder) for folder in sys.argv[3:]]
cluster.wait_for_nodes()
print(json.dumps([node.all_processes["raylet"][0].process.pid for node in nodes]), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def end(process: subprocess.Popen) -> None:
    """Close its input, and wait; not for ever."""
    try:
        process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture
def cluster(tmp_path):
    """A cluster with a job server: the process ids of its two workers' raylets, and the environment
    that leads to it.
    """
    pytest.importorskip("aiohttp_cors", reason="the job server comes with the cluster extra")
    ports = free_ports(2)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where gristmill and ray are
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "no_proxy": "127.0.0.1",
    }
    env = (
        os.environ
        | quiet
        | {
            "PATH": path,
            "RAY_AUTH_MODE": "disabled",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[0]}",
        }
    )
    with ExitStack() as held:
        # paths of sockets have 107 characters
        folders = [held.enter_context(TemporaryDirectory(dir="/tmp")) for _ in range(2)]
        command = [sys.executable, "-c", CLUSTER, *map(str, ports), *folders]
        log = held.enter_context((tmp_path / "cluster.log").open("w"))
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        held.callback(end, process)
        line = process.stdout.readline()
        assert line, (tmp_path / "cluster.log").read_text()
        yield [psutil.Process(pid) for pid in json.loads(line)], env


def working(raylet, what: str) -> bool:
    """Whether a worker of the node is at work on a unit of a phase: Ray names processes after their
    task.
    """
    with suppress(psutil.NoSuchProcess):
        return any(
            re.match(f"ray::.*{what}", " ".join(p.cmdline()))
            for p in raylet.children(recursive=True)
        )
    return False


def kill_node(raylet) -> None:
    """All processes of a node at once, as when its machine vanishes."""
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_submitted_quickstart_outlives_a_node_and_has_the_bytes_of_one_machine(cluster, tmp_path):
    raylets, env = cluster

    run = ["gristmill", "run", "configs/quickstart.toml", f"run.directory={tmp_path}/cluster"]
    submission = ["--submission-id", "quickstart-1", "--working-dir", ".", "--no-wait", "--", *run]

    def job(*words):
        told = subprocess.run(
            ["ray", "job", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        return told.returncode, told.stdout + told.stderr

    code, said = job("submit", *submission)
    until = time.monotonic() + 120
    # the head is up before what starts jobs on it
    while code and "already exists" not in said and time.monotonic() < until:
        code, said = job("submit", *submission)
    assert code == 0 or "already exists" in said, said
    log = tmp_path / "job.log"
    with log.open("w") as stream:
        following = subprocess.Popen(
            ["ray", "job", "logs", "quickstart-1", "--follow"],
            env=env,
            stdout=stream,
            stderr=stream,
        )
    code, said = job("submit", *submission)
    assert code == 1 and "already exists" in said

    while not (committed(tmp_path) and working(raylets[1], "extract")):
        assert following.poll() is None, log.read_text()
        time.sleep(0.05)
    kill_node(raylets[1])
    assert 0 < committed(tmp_path) < 8
    # there is a processor free now
    execute(load(QUICKSTART, [f"run.directory={tmp_path}/local"]), Silent(), in_process)
    following.wait(1200)
    assert "succeeded" in job("status", "quickstart-1")[1], log.read_text()
    here, there = (
        bytes_of(tmp_path / name / "generations" / "gen-0001") for name in ("local", "cluster")
    )
    assert here.keys() == there.keys()
    assert {**here, "manifest.json": b""} == {**there, "manifest.json": b""}


def committed(folder: Path) -> int:
    """How many of the eight files are extracted."""
    return len(list(folder.glob("cluster/extract/*/commits/*")))
