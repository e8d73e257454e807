"""Data configurations of the batch loader, and loading on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.storage.catalog import GenerationError
from tests.support.ranks import run_ranks
from trainer.config import DataConfig, SourceConfig
from trainer.data.loader import BatchLoader

BOTH = pytest.mark.parametrize("workers", [0, 2])


def data_config(*runs: Any, **options: Any) -> DataConfig:
    sources = tuple(
        run if isinstance(run, SourceConfig) else SourceConfig(str(run)) for run in runs
    )
    return DataConfig(
        sources, **{"global_batch_rows": 8, "micro_batch_rows": 2, "canonical_nodes": 3, **options}
    )


def next_when_published(data, step):
    """The batches of a step, new generations waited for, as the loop does it."""
    while not (batches := data.next(step)) and data.should_wait():
        data.poll()
    return batches


def load_rank(rank: int, folder: Path, runs: list[str]) -> None:
    """What this rank loads of each run, or the message of the fault it raises, to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2
    )
    results: dict[tuple[int, str], Any] = {}
    for run in runs:
        try:
            with BatchLoader(data_config(run), rank=rank, world_size=2) as data:
                steps = [[batch.row_ids for batch in data.next(step)] for step in range(3)]
                results[rank, run] = steps
        except GenerationError as error:
            results[rank, run] = str(error)
    torch.save(results, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def on_two_ranks(folder: Path, *runs: str) -> dict[tuple[int, str], Any]:
    """(rank, run) → the rows of three steps as each rank loads them, or the fault it raises."""
    run_ranks(load_rank, folder, list(runs), ranks=2)
    results = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    return results[0] | results[1]
