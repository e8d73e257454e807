"""A phase's units as one Ray Data operator over a pool of actors that keep a large model.

A row of the plan is a unit. An actor that dies is replaced, and its unit done again.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.engine.cluster import most_slots
from pipeline.engine.units import PhaseWork, Resources, UnitOutcome, run_unit
from stages.storage.ledger import Unit

# Ray Data holds all blocks of a plan from its start, 5 kB and 0.8 ms each; beyond that, a block
# holds several units
MAX_BLOCKS = 100_000


def run_pool(
    name: str, work: PhaseWork, units: Sequence[Unit], resources: Resources
) -> Iterator[UnitOutcome]:
    """Each outcome as it comes. The first units start first."""
    import ray.data

    _configure()
    blocks = min(len(units), MAX_BLOCKS)
    rows = [{"unit": pickle.dumps(unit)} for unit in order_units(units, blocks)]
    # all at once: actors that wait for a place are what makes the autoscaler add nodes
    size = max(1, min(len(units), resources.parallelism or most_slots(resources)))
    plan = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        _actor_class(name, work),
        batch_size=1,
        num_cpus=resources.num_cpus,
        memory=resources.memory,
        compute=ray.data.ActorPoolStrategy(size=size),
    )
    batch: Any
    # iter_rows would hold back each block until the next one comes, which may be an hour
    for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            yield pickle.loads(row["outcome"])


def order_units(units: Sequence[Unit], blocks: int) -> list[Unit]:
    """The rows of a plan of `blocks` blocks, such that the first units start first.

    Ray Data cuts rows into even runs, the first ones longer by one row, and starts them in order.
    """
    return [unit for block in range(blocks) for unit in units[block::blocks]]


def _configure() -> None:
    """Leave the terminal to us, and time to the units."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        # the terminal; Ray's own log files keep everything
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # a unit may take half an hour, and so may the nodes of a cluster that starts with none
    context.execution_no_progress_timeout_s = -1


def _actor_class(name: str, work: PhaseWork) -> Any:
    class Worker:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            unit = pickle.loads(batch["unit"][0])
            return {"outcome": [pickle.dumps(run_unit(unit, work))]}

    # what progress output and the dashboard call the operator
    Worker.__name__ = Worker.__qualname__ = name.replace(" ", "_")
    return Worker
