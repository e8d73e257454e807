"""Data configurations of the batch loader, and loading on two ranks."""

import multiprocessing
import socket
from typing import Any

import pytest
import torch

from stages.storage.catalog import GenerationError
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


def _rank(rank: int, port: int, runs: list[str], answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for run in runs:
        try:
            with BatchLoader(data_config(run), rank=rank, world_size=2) as data:
                answers.put(
                    (rank, run, [[batch.row_ids for batch in data.next(step)] for step in range(3)])
                )
        except GenerationError as error:
            answers.put((rank, run, str(error)))
    torch.distributed.destroy_process_group()


def on_two_ranks(*runs: str) -> dict[tuple[int, str], Any]:
    """(rank, run) → what each rank was given or the fault it raised; one pair of processes, as each
    imports for seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, port, list(runs), answers), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=240) for _ in ranks for _ in runs]
    for process in ranks:
        process.join(60)
    return {(rank, run): answer for rank, run, answer in found}
