"""A phase's units as one Ray Data plan.

A row of the plan is a unit. The task that gets it reads, works and writes by itself and returns its
commit, so no document ever passes through the object store or the driver. Workers keep their models
between units.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.engine.cluster import actors_that_fit, largest_node_memory, start
from pipeline.engine.stragglers import exit_when_committed, second_copies
from pipeline.engine.units import PhaseWork, Resources, RunUnits, UnitOutcome, run_unit
from stages.storage.ledger import Unit

# enough blocks to keep any cluster busy, and few enough for the driver's bookkeeping; beyond that,
# a block holds several units
MAX_BLOCKS = 10_000


def on_ray(
    address: str | None = None, *, show_dashboard: Callable[[str], None] | None = None
) -> RunUnits:
    """Run units on a cluster, or on this machine, each phase as one Ray Data operator.

    Ray starts with the first unit, and then gives `show_dashboard` the URL of its dashboard.
    """

    return partial(_run_plan, partial(start, address, show_dashboard=show_dashboard))


def _run_plan(
    connect: Callable[[], None],
    name: str,
    work: PhaseWork,
    units: Sequence[Unit],
    resources: Resources,
) -> Iterator[UnitOutcome]:
    connect()
    import ray.data

    blocks = min(len(units), MAX_BLOCKS)
    ordered = order_units(units, blocks)
    rows = [{"unit": pickle.dumps(unit)} for unit in ordered]
    # tasks where possible: Ray keeps a job's worker processes, and with them their loaded models
    function: Any = _task_function(name, work)
    compute: Any = ray.data.TaskPoolStrategy(size=resources.parallelism or None)
    if resources.actors:
        function = _actor_class(name, work)
        size = actors_that_fit(resources, len(units))
        compute = ray.data.ActorPoolStrategy(min_size=1, max_size=size)
    plan = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        function,
        batch_size=1,
        num_cpus=resources.num_cpus,
        memory=min(resources.memory, largest_node_memory()),
        compute=compute,
    )
    batch: Any
    with second_copies(name, work, ordered, resources) as copies:
        # iter_rows would hold back each block until the next one comes, which may be an hour
        for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield copies.settle(pickle.loads(row["outcome"]), work)


def order_units(units: Sequence[Unit], blocks: int) -> list[Unit]:
    """The rows of a plan of `blocks` blocks, such that the largest units start first.

    Ray Data cuts rows into even runs, the first ones longer by one row, and starts them in order.
    Units of equal size keep their order.
    """
    ordered = sorted(units, key=lambda unit: -unit.bytes)
    return [unit for block in range(blocks) for unit in ordered[block::blocks]]


def _task_function(name: str, work: PhaseWork) -> Any:
    def run(batch: dict[str, Any]) -> dict[str, Any]:
        with exit_when_committed(pickle.loads(batch["unit"][0]), work):
            return _run_row(batch, work)

    # what progress output and the dashboard call the operator
    run.__name__ = run.__qualname__ = name
    return run


def _actor_class(name: str, work: PhaseWork) -> Any:
    class Worker:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return _run_row(batch, work)

    Worker.__name__ = Worker.__qualname__ = name.replace(" ", "_")
    return Worker


def _run_row(batch: dict[str, Any], work: PhaseWork) -> dict[str, Any]:
    return {"outcome": [pickle.dumps(run_unit(pickle.loads(batch["unit"][0]), work))]}
