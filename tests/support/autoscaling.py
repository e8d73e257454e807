"""A Ray cluster that begins without workers and has an autoscaler, all on this machine.

Ray's own `AutoscalingCluster` stops every other Ray of the machine, and lacks a file in the wheel.
The autoscaler imports the provider of nodes from here.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

from tests.support.paths import ROOT
from tests.support.processes import free_ports

# seconds
_INTERVAL, _IDLE = 1, 6
_NONE = (
    "initialization",
    "setup",
    "head_setup",
    "worker_setup",
    "head_start_ray",
    "worker_start_ray",
)


class Provider(FakeMultiNodeProvider):
    """Nodes that are processes; each has the memory of the machine, whatever was asked for."""

    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        asked = {name: value for name, value in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, asked, labels)


def _configuration(address: str, workers: int, processors: int) -> dict:
    node = {"CPU": processors, "memory": 4 << 30, "object_store_memory": 100 << 20}
    head = {"CPU": 0, "object_store_memory": 100 << 20}
    return {
        "cluster_name": "fake",
        "max_workers": workers,
        "idle_timeout_minutes": _IDLE / 60,
        "upscaling_speed": 1.0,
        "head_node_type": "ray.head.default",
        "provider": {
            "type": "external",
            "module": f"{__name__}.{Provider.__name__}",
            "gcs_address": address,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": node,
                "node_config": {},
                "min_workers": 0,
                "max_workers": workers,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in _NONE},
    }


@contextmanager
def growing_cluster(*, workers: int, processors: int = 1) -> Iterator[str]:
    """The address of a cluster whose head works on nothing, and which may grow to `workers`."""
    import psutil  # which Ray brings, once it is imported

    port, dashboard = free_ports(2)
    address = f"{get_node_ip_address()}:{port}"
    # paths of sockets have 107 characters
    with TemporaryDirectory(dir="/tmp", prefix="ray", ignore_cleanup_errors=True) as folder:
        configuration = Path(folder) / "autoscaler.json"
        configuration.write_text(json.dumps(_configuration(address, workers, processors)))
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
        command += [f"--temp-dir={folder}", f"--autoscaling-config={configuration}"]
        command += ["--include-dashboard=false", f"--dashboard-port={dashboard}"]
        command += ["--dashboard-agent-listen-port=0", "--object-store-memory=100000000"]
        settings = {
            "AUTOSCALER_UPDATE_INTERVAL_S": str(_INTERVAL),
            "RAY_FAKE_CLUSTER": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        log = Path(folder) / "start.log"
        with log.open("w") as stream:
            head = subprocess.Popen(
                command, env=os.environ | settings, stdout=stream, stderr=stream
            )
        try:
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                time.sleep(0.2)
            yield address
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            for process in processes:  # all stand still first: the autoscaler may start another
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            for process in [*psutil.Process(head.pid).children(recursive=True), *processes, head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()
