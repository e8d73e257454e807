"""What tests of the trainer share; torch is imported where it is asked for, as not all of them need
it.
"""

import pytest

from tests.support.shards import publish
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
)


@pytest.fixture
def one_thread():
    """torch computes on one thread, so that results do not depend on the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def transformers():
    """The package."""
    return pytest.importorskip("transformers")


@pytest.fixture
def group_of_one():
    """A process group of this process alone."""
    import torch.distributed as dist

    from trainer.model.parallel import join_ranks

    join_ranks("cpu")
    yield
    dist.destroy_process_group()


@pytest.fixture
def config(tmp_path):
    """A training of 12 steps of 8 rows on a generation of 40, repeated; a model of some thousand
    weights.
    """
    publish(tmp_path / "run", 40)
    return TrainConfig(
        directory=str(tmp_path / "train"),
        max_steps=12,
        model=ModelConfig(
            vocab_size=64, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=32
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(
            sources=(SourceConfig(str(tmp_path / "run")),),
            global_batch_rows=8,
            micro_batch_rows=4,
            at_end="repeat",
            max_epochs=20,
        ),
        # not by a process of its own, which takes seconds to start
        checkpoint=CheckpointConfig(every_steps=4, asynchronous=False),
        telemetry=TelemetryConfig(sinks=("jsonl",)),
    )
