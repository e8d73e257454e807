"""A phase's units as one Ray Data plan."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.engine.cluster import actors_that_fit, largest_node_memory, start
from pipeline.engine.stragglers import giving_way, second_copies
from pipeline.engine.units import Done, Resources, RunUnits, Task, run_one, size_of
from stages.storage.ledger import Commit, Unit

# so many blocks keep any cluster busy, and the driver's bookkeeping small; a block holds several
# units beyond that
MAX_BLOCKS = 10_000


def on_ray(address: str | None = None) -> RunUnits:
    """Run units on a cluster, or on this machine, each stage as one Ray Data operator; Ray starts
    with the first unit.
    """

    def run_units(
        name: str, task: Task, units: Sequence[Unit], resources: Resources
    ) -> Iterator[Done]:
        start(address)
        return ray_plan(name, task, units, resources)

    return run_units


def ray_plan(name: str, task: Task, units: Sequence[Unit], resources: Resources) -> Iterator[Done]:
    import ray.data

    blocks = min(len(units), MAX_BLOCKS)
    ordered = dealt(units, blocks)
    rows = [{"unit": json.dumps(unit)} for unit in ordered]
    compute: Any
    if resources.actors:
        work, compute = (
            _pooled(name, task),
            ray.data.ActorPoolStrategy(min_size=1, max_size=actors_that_fit(resources, len(units))),
        )
    else:
        # tasks, not actors: Ray keeps a job's worker processes, and with them the models they have
        # loaded
        work, compute = (
            _function(name, task),
            ray.data.TaskPoolStrategy(size=resources.parallelism or None),
        )
    plan = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        work,
        batch_size=1,
        num_cpus=resources.num_cpus,
        memory=min(resources.memory, largest_node_memory()),
        compute=compute,
    )
    batch: Any
    with second_copies(name, task, ordered, resources) as copies:
        # iter_rows would hold back each block until the next one comes, which may be an hour
        for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                commit = Commit(**json.loads(row["commit"])) if row["commit"] else None
                yield copies.settle(Done(row["unit"], commit, row["error"] or None), task)


def dealt(units: Sequence[Unit], blocks: int) -> list[Unit]:
    """The rows of a plan of so many blocks, such that the largest units begin first, whether a
    block holds one or many.

    Ray Data cuts rows into even runs, longer by one row at the front, and starts them in order.
    Equal units keep theirs.
    """
    ordered = sorted(units, key=lambda unit: -size_of(unit))
    return [unit for block in range(blocks) for unit in ordered[block::blocks]]


def _function(name: str, task: Task) -> Any:
    def run(batch: dict[str, Any]) -> dict[str, Any]:
        with giving_way(Unit(*json.loads(batch["unit"][0])), task):
            return _run_row(batch, task)

    run.__name__ = run.__qualname__ = (
        name  # what progress output and the dashboard call the operator
    )
    return run


def _pooled(name: str, task: Task) -> Any:
    class Worker:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return _run_row(batch, task)

    Worker.__name__ = Worker.__qualname__ = name.replace(" ", "_")
    return Worker


def _run_row(batch: dict[str, Any], task: Task) -> dict[str, Any]:
    done = run_one(Unit(*json.loads(batch["unit"][0])), task)
    commit = json.dumps(done.commit.__dict__) if done.commit else ""
    return {"unit": [done.unit], "commit": [commit], "error": [done.error or ""]}
