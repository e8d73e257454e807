"""Connecting to Ray, and what the cluster has room for."""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

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
    import ray.data

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
    for handler in logging.getLogger("ray.data").handlers:
        # the terminal; Ray's own log files keep everything
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False


def local_settings(*, dashboard: bool) -> dict[str, Any]:
    """How Ray starts on this machine."""
    if dashboard and find_spec("aiohttp_cors") is None:
        raise ConfigError(
            "--dashboard needs packages that are missing here: "
            "pip install -c constraints.txt -e '.[cluster]'"
        )
    # a unit's inputs and outputs go to disk, not to the object store: it can be small
    return {"include_dashboard": dashboard, "object_store_memory": 200_000_000}


def largest_node_memory() -> int:
    """Bytes of memory of the largest node: Ray waits forever for a worker that fits on no node."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    memory = [node["Resources"].get("memory", 0) for node in nodes if node["Alive"]]
    return int(max(memory, default=0)) or 1


def actors_that_fit(resources: Resources, units: int) -> int:
    """Number of actors in a pool: as many as the cluster has processors for, at most one a unit."""
    import ray

    fit = int(ray.cluster_resources().get("CPU", 1) / resources.num_cpus)  # type: ignore[no-untyped-call]
    return max(1, min(units, resources.parallelism or fit))
