"""A Ray cluster of several nodes on this machine, in a process of its own, whose nodes can be killed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("ray")  # brings psutil
import psutil

# A head that works on nothing, and a node per line of its input, which holds the node's arguments;
# answers with its address, then with each node's raylet; ends with its input. A node that vanished
# counts as dead after 3 s instead of 15.
_CLUSTER = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3,
          "prestart_worker_first_driver": False}
head = {"num_cpus": 0, "_system_config": checks, **json.loads(sys.stdin.readline())}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    node = cluster.add_node(**(arguments := json.loads(line)))
    # as `ray start` does, and where a job that starts there looks
    Path(arguments["temp_dir"], "ray_current_cluster").write_text(cluster.address)
    print(json.dumps(node.all_processes["raylet"][0].process.pid), flush=True)
cluster.shutdown()
"""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "disabled",
    "no_proxy": "127.0.0.1",
}


class LocalCluster:
    """A head and nodes. Each node has a folder of its own, as each machine has one."""

    def __init__(self, process: subprocess.Popen, folders: ExitStack, log: Path) -> None:
        self.process, self._folders, self._log = process, folders, log
        self.address = ""

    def ask(self, arguments: dict[str, Any]) -> Any:
        """What the process answers to a line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self._log.read_text()
        return json.loads(answer)

    def add_node(self, **arguments: Any) -> psutil.Process:
        """Start a node; its raylet, of which all its workers are descendants."""
        # paths of sockets have 107 characters
        folder = self._folders.enter_context(
            TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)
        )
        return psutil.Process(self.ask({"temp_dir": folder, **arguments}))


@contextmanager
def local_cluster(log: Path, env: dict[str, str], **head: Any) -> Iterator[LocalCluster]:
    """A cluster whose head has these arguments, and no other node yet."""
    with ExitStack() as stack, log.open("w") as stream:
        folder = stack.enter_context(TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
        process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER],
            env=os.environ | QUIET | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
        folders = stack.enter_context(ExitStack())  # removed after the nodes have ended
        stack.callback(_end, process)
        cluster = LocalCluster(process, folders, log)
        cluster.address = cluster.ask({"temp_dir": folder, **head})
        yield cluster


def kill_node(raylet: psutil.Process) -> None:
    """Kill all processes of a node at once, as when its machine vanishes."""
    with suppress(psutil.NoSuchProcess):
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def title(process: psutil.Process) -> str:
    """The command line: Ray names a worker after the task that it is at work on. "" for a dead one."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()  # Ray pads its names
    return ""


def _end(process: subprocess.Popen) -> None:
    """Close its input, and wait; not forever."""
    try:
        process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
