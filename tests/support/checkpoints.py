"""Small models, plain or sharded, and the comparison of their states after a checkpoint."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from trainer.model.llama import Transformer
from trainer.model.optim import make_optimizer
from trainer.model.parallel import (
    make_mesh,
    parallelize,
)

# 61 words and 10 hidden do not divide by 2 ranks: shards are uneven
SMALL = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=10)
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2),
    "adafactor": OptimizerConfig(name="adafactor", lr=1e-2),
    "momentum": OptimizerConfig(name="sgd", lr=1e-2, momentum=0.9),
    "sgd": OptimizerConfig(name="sgd", lr=1e-2),
}
NOW = CheckpointConfig(asynchronous=False)
LATER = CheckpointConfig(asynchronous=True)
EXTRA = {"data": {"step": 2, "sources": [{"run": "a", "at": 3}]}, "schedule": None}
PATIENCE = 600  # seconds until a test that would hang fails


def build(optimizer="adamw", *, config=SMALL, seed=0, shard_size=0):
    """Sharded where there is a process group, else plain."""
    with torch.device("meta"):
        model = Transformer(config)
    if dist.is_initialized():
        fp32 = ParallelConfig(precision="fp32", shard_size=shard_size)
        parallelize(model, fp32, make_mesh(fp32, device="cpu"))
    model.to_empty(device="cpu").init_weights(seed)
    return model, make_optimizer(model, OPTIMIZERS[optimizer])


def train(model, optimizer, *steps):
    for step in steps:
        tokens = torch.randint(
            0, SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(step)
        )
        model.loss(tokens, None).sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def whole(model, optimizer):
    """Every number of the weights and of the optimiser's state, copied; a collective where there
    are ranks.
    """
    numbers = {}
    for name, parameter in model.named_parameters():
        for key, value in {"": parameter, **optimizer.state.get(parameter, {})}.items():
            value = value.detach()
            numbers[name, key] = (
                value.full_tensor() if isinstance(value, DTensor) else value
            ).clone()
    return numbers


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def trained(optimizer="adamw", **options):
    state = build(optimizer, **options)
    train(*state, 0, 1)
    return state


def restored(folder, optimizer="adamw"):
    """The latest checkpoint in a model that began elsewhere."""
    model, other = build(optimizer, seed=99)
    checkpoints = Checkpoints(folder, NOW)
    saved = checkpoints.latest()
    checkpoints.load(saved, model, other)
    return saved, (model, other)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trainer.checkpoint"]


def is_saving(checkpoints: Checkpoints) -> bool:
    """Whether a save is still being written, as this rank sees it."""
    return checkpoints._pending is not None and not checkpoints._pending.done()
