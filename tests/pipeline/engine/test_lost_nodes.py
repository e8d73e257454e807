"""Nodes that are taken away, as spot machines are: their units go on elsewhere, and count no crash."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import PhaseWork, Resources
from stages.storage.ledger import Commit, Store, Unit
from tests.support.paths import ROOT
from tests.support.processes import call_command

pytestmark = [pytest.mark.ray, pytest.mark.kill]
pytest.importorskip("ray")
LOST = 3  # as many as there are attempts


def lose_node(unit, plan, store):
    """Take the node away, with all its processes, while there are others."""
    folder = Path(store.root)
    number = len(list(folder.glob("start-*"))) + 1
    (folder / f"start-{number}").touch()
    if number <= LOST:
        os.kill(os.getppid(), signal.SIGKILL)  # a worker's parent is its raylet
        os.kill(os.getpid(), signal.SIGKILL)
    return Commit(unit.name, unit.fingerprint)


def run_on_cluster(folder):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(LOST + 1):
        cluster.add_node(num_cpus=1)
    cluster.connect()
    work = PhaseWork(lose_node, None, Store(folder), LOST, "i")
    unit = Unit("000001", "f", None)
    [outcome] = on_ray(cluster.address)("lost", work, [unit], Resources(1.0, 10_000_000))
    # not to stdout, where Ray prints what it likes
    Path(folder, "error.json").write_text(json.dumps(outcome.error))


def test_lost_nodes_do_not_quarantine_a_unit(tmp_path):
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    ended = subprocess.run(
        call_command(run_on_cluster, tmp_path),
        cwd=ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=600,
    )
    # the exit code is not ours: Ray ends a driver with 1 if its raylet is gone before it
    assert (tmp_path / "error.json").exists(), ended.stderr
    assert json.loads((tmp_path / "error.json").read_text()) is None
    assert len(list(tmp_path.glob("start-*"))) == LOST + 1
    store = Store(str(tmp_path))
    assert store.commit_of("000001") is not None and not store.failures()
