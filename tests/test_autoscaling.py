"""A cluster without workers grows to what a phase can use, and writes the bytes of one machine."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.engine.dispatch import on_ray
from pipeline.engine.units import PhaseWork, Resources, in_process
from pipeline.run.execute import execute
from stages.storage.ledger import Commit, Store, Unit
from tests.support.inline import Silent
from tests.support.paths import ROOT
from tests.support.processes import call_command
from tests.support.quickstart import bytes_of

pytestmark = [pytest.mark.ray, pytest.mark.kill]
pytest.importorskip("ray")
from tests.support.autoscaling import growing_cluster

WORKERS = 3
QUICKSTART = ROOT / "configs" / "quickstart.toml"


def wait_for_others(unit, plan, store):
    """Work until all nodes that there may be are at work, as on units of many minutes."""
    import ray

    folder = Path(store.root)
    (folder / ray.get_runtime_context().get_node_id()).touch()
    end = time.monotonic() + 120
    while len(list(folder.iterdir())) < WORKERS and time.monotonic() < end:
        time.sleep(0.1)
    return Commit(unit.name, unit.fingerprint, rows_in=len(list(folder.iterdir())))


def alive() -> int:
    """Number of the cluster's nodes with processors."""
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def run_phases(address: str, folder: str) -> None:
    """Each kind of phase on a cluster that has no worker yet; then the quickstart."""
    run, seen = on_ray(address), {}
    for kind in ("any worker", "own workers"):
        store = Path(folder) / kind
        store.mkdir()
        work = PhaseWork(wait_for_others, None, _Elsewhere(str(store)), 3, "i", patience=1e9)
        # more memory than the head has
        worker = Resources(1.0, 3 << 30, own_workers=kind == "own workers")
        units = [Unit(f"{n:06d}", "f", None) for n in range(2 * WORKERS)]
        seen[kind] = sorted(end.commit.rows_in for end in run(kind, work, units, worker))
        until = time.monotonic() + 120
        while (left := alive()) and time.monotonic() < until:
            time.sleep(0.5)
        seen[f"left after {kind}"] = left
    execute(load(QUICKSTART, [f"run.directory={folder}/cluster"]), Silent(), run)
    Path(folder, "seen.json").write_text(json.dumps(seen))


class _Elsewhere(Store):
    """A store whose records are not among the files that nodes leave."""

    def uri(self, *parts: str) -> str:
        return "/".join([f"{self.root}-store", *parts])


def test_a_cluster_without_workers_grows_to_what_a_phase_can_use_and_shrinks_again(tmp_path):
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with growing_cluster(workers=WORKERS) as address:
        ended = subprocess.run(
            call_command(run_phases, address, tmp_path),
            cwd=ROOT,
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert (tmp_path / "seen.json").exists(), ended.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    for kind in ("any worker", "own workers"):
        # every unit saw all nodes at work
        assert seen[kind] == [WORKERS] * (2 * WORKERS), seen
        assert seen[f"left after {kind}"] == 0, seen
    execute(load(QUICKSTART, [f"run.directory={tmp_path}/local"]), Silent(), in_process)
    here, there = (
        bytes_of(tmp_path / name / "generations" / "gen-0001") for name in ("local", "cluster")
    )
    assert {**here, "manifest.json": b""} == {**there, "manifest.json": b""}
