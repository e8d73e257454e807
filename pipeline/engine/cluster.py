"""Connecting to Ray, and what the cluster has room for."""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from typing import Any, NamedTuple

from pipeline.engine.units import Resources
from stages.formats.errors import ConfigError


def start(address: str | None, *, show_dashboard: Callable[[str], None] | None = None) -> None:
    """Connect to a cluster (`address`, else $RAY_ADDRESS), or start Ray on this machine.

    Called with the URL of the cluster's dashboard ("" if it has none), `show_dashboard` also asks
    for one on this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local = not (address or os.environ.get("RAY_ADDRESS"))
    import ray

    if not ray.is_initialized():
        settings = local_settings(dashboard=show_dashboard is not None) if local else {}
        session = ray.init(
            address="local" if local else address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **settings,
        )
        if show_dashboard:
            show_dashboard(f"http://{session.dashboard_url}" if session.dashboard_url else "")


def local_settings(*, dashboard: bool) -> dict[str, Any]:
    """How Ray starts on this machine."""
    if dashboard and find_spec("aiohttp_cors") is None:
        raise ConfigError(
            "--dashboard needs packages that are missing here: "
            "pip install -c constraints.txt -e '.[cluster]'"
        )
    # a unit's inputs and outputs go to disk, not to the object store: it can be small
    return {"include_dashboard": dashboard, "object_store_memory": 200_000_000}


class Nodes(NamedTuple):
    """Nodes of one kind: how many there are or may be, and what each has."""

    number: int
    resources: dict[str, float]

    def slots(self, worker: Resources) -> int:
        """How many workers fit."""
        fit = self.resources.get("CPU", 0.0) / worker.num_cpus
        # what a node that the autoscaler has not started will have may be unknown
        return self.number * int(min(fit, self.resources.get("memory", inf) / worker.memory))


def fitted(worker: Resources) -> Resources:
    """A worker that asks for no more memory than the largest node has, alive or not yet.

    Ray waits forever for a worker that fits on no node.
    """
    kinds = [k for k in (*_alive(), *_possible()) if k.resources.get("CPU", 0) >= worker.num_cpus]
    largest = max((k.resources.get("memory", inf) for k in kinds), default=inf)
    return worker._replace(memory=int(min(worker.memory, largest)))


def slots(worker: Resources) -> int:
    """How many workers fit on the nodes that are alive."""
    return sum(nodes.slots(worker) for nodes in _alive())


def free_slots(worker: Resources, *, running: int) -> int:
    """How many more workers the cluster could run now, beside `running` ones."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    # nothing is listed of what a node has none left of
    fit = sum(Nodes(1, {"memory": 0.0, **node}).slots(worker) for node in free.values())
    return min(fit, worker.parallelism - running) if worker.parallelism else fit


def _alive() -> list[Nodes]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [Nodes(1, node["Resources"]) for node in nodes if node["Alive"]]


def _possible() -> list[Nodes]:
    """The kinds of nodes that the autoscaler may start, and how many of each (-1: any number).

    None without an autoscaler, and with its first version, which tells nobody.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    kinds = config.node_group_configs if config else ()
    return [Nodes(kind.max_count, dict(kind.resources)) for kind in kinds if kind.max_count]
