"""Sharded training against one plain process: the same loss, gradients and norm, whatever the
ranks, precision or checkpoints.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ranks import run_ranks
from trainer.config import ModelConfig, ParallelConfig
from trainer.model import (
    llama,
    parallel,
)
from trainer.model.llama import Transformer
from trainer.model.packing import num_targets
from trainer.model.parallel import (
    clip_grad_norm,
    join_ranks,
    make_mesh,
    parallelize,
    sum_over_ranks,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]

# 61 words and 10 hidden divide by neither 2 nor 4 ranks: shards are uneven
SMALL = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=10)
FP32 = ParallelConfig(precision="fp32")
BF16 = ParallelConfig(precision="bf16")
PLANS = {
    "fp32": FP32,
    "bf16": BF16,
    "selective": replace(FP32, activation_checkpointing="selective"),
    "full": replace(FP32, activation_checkpointing="full"),
    "sync at the end": FP32,
    "untied": FP32,
}


class Step(NamedTuple):
    """What a step saw: summed loss over targets, norm, gradients whole and after clipping to CLIP."""

    loss: float
    norm: float
    gradients: dict
    clipped: dict


CLIP = 0.5


def batch():
    """8 rows whose valid targets are very unequal: 27, 20, 14 … and none at all."""
    tokens = torch.randint(0, SMALL.vocab_size, (8, 28), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros_like(tokens)
    for row in range(1, 8):
        documents[row, 28 - 3 * row :] = 1
        documents[row, 28 - row :] = -1
    documents[5] = -1
    return tokens, documents


def model_config(name):
    return replace(SMALL, tie_embeddings=name != "untied")


def build(name, config):
    with torch.device("meta"):
        model = Transformer(model_config(name))
    parallelize(model, config, make_mesh(config, device="cpu"))
    model.to_empty(device="cpu").init_weights(3)
    return model


def step(model, *, micro_batches=2, sync_at_end=False):
    """Forward and backward as the loop does it: each rank's rows in micro-batches, divided by the
    targets of all ranks.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens, documents = (part[rank::ranks].chunk(micro_batches) for part in batch())
    targets = sum_over_ranks(sum(map(num_targets, documents)))
    total = torch.zeros(())
    for number, micro_batch in enumerate(zip(tokens, documents, strict=True)):
        model.set_requires_gradient_sync(not sync_at_end or number == micro_batches - 1)
        loss = model.loss(*micro_batch)
        (loss.sum * ranks / targets[0].float()).backward()
        total += loss.sum.detach()
    gradients = whole_gradients(model)
    norm = clip_grad_norm(model.parameters(), CLIP)
    return Step(
        (sum_over_ranks(total) / targets).item(), norm.item(), gradients, whole_gradients(model)
    )


def whole_gradients(model):
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def plain_step(name):
    """The slow and obvious way: one process, no FSDP, all rows at once, float32."""
    model = Transformer(model_config(name))
    model.init_weights(3)
    tokens, documents = batch()
    loss = model.loss(tokens, documents)
    mean = loss.sum / loss.targets
    mean.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    return Step(
        mean.item(),
        norm,
        gradients,
        {name: g * min(1, CLIP / norm) for name, g in gradients.items()},
    )


def worker(rank, ranks, folder, plans):
    """In a process of its own: run the plans, leave what rank 0 saw."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks
    )
    seen = {}
    for name, config in plans.items():
        model = build(name, config)
        weights = {name: p.full_tensor() for name, p in model.named_parameters()}
        seen[name] = (
            weights,
            step(model, sync_at_end=name == "sync at the end"),
            list(model.norm.weight.placements),
        )
    seen["sums"] = sum_over_ranks(float(rank), torch.tensor(2**40 + rank)).tolist()
    if rank == 0:
        torch.save(seen, f"{folder}/seen.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(ranks, folder, plans):
    run_ranks(worker, ranks, folder, plans, ranks=ranks)
    return torch.load(folder / "seen.pt", weights_only=False)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return spawn(2, tmp_path_factory.mktemp("two"), PLANS)


def assert_same(found, expected, rtol):
    """Losses, norms and gradients, each gradient within `rtol` of its largest entry."""
    assert found.loss == pytest.approx(expected.loss, rel=rtol)
    assert found.norm == pytest.approx(expected.norm, rel=rtol)
    for kind in ("gradients", "clipped"):
        for name, gradient in getattr(expected, kind).items():
            difference = (getattr(found, kind)[name] - gradient).abs().max()
            assert difference <= rtol * gradient.abs().max(), (kind, name)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "bf16"])
def test_two_ranks_with_unequal_targets_take_the_step_of_one_plain_process(two_ranks, name):
    _, found, _ = two_ranks[name]
    expected = plain_step(name)
    assert expected.norm > CLIP  # so that clipping clips
    assert_same(found, expected, 1e-5)


def test_two_ranks_in_bfloat16_take_the_step_of_one_rank_and_nearly_that_in_float32(
    two_ranks, group_of_one
):
    _, found, _ = two_ranks["bf16"]
    one = step(build("bf16", BF16), micro_batches=4)
    assert_same(found, one, 2e-2)
    assert found.loss == pytest.approx(plain_step("bf16").loss, rel=2e-3)
    assert found.norm == pytest.approx(plain_step("bf16").norm, rel=2e-2)
    assert found.loss != plain_step("bf16").loss  # it was bfloat16
    assert all(g.dtype == torch.float32 for g in found.gradients.values())


def test_rotary_tables_stay_float32_in_bfloat16(group_of_one, monkeypatch):
    seen = []
    monkeypatch.setattr(
        llama, "_rotate", lambda x, cos, sin: seen.append((x.dtype, cos.dtype, sin.dtype)) or x
    )
    build("bf16", BF16).loss(*batch())
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_weights_are_the_same_sharded_or_not(two_ranks):
    plain = Transformer(SMALL)
    plain.init_weights(3)
    weights, _, _ = two_ranks["bf16"]
    assert weights.keys() == dict(plain.named_parameters()).keys()  # no wrapper in the names
    assert all(weights[name].equal(p) for name, p in plain.named_parameters())
    assert {p.dtype for p in weights.values()} == {torch.float32}


def test_sums_over_ranks_are_exact_beyond_float32(two_ranks):
    assert two_ranks["sums"] == [1, 2**41 + 1]


def test_two_groups_of_two_ranks_take_the_step_of_one_plain_process(tmp_path):
    seen = spawn(4, tmp_path, {"hsdp": replace(FP32, shard_size=2)})
    weights, found, placements = seen["hsdp"]
    assert [p.is_replicate() for p in placements] == [True, False]
    assert_same(found, plain_step("hsdp"), 1e-5)


def test_groups_that_do_not_divide_the_ranks_are_refused(group_of_one):
    with pytest.raises(ValueError, match="shard_size 2 does not divide 1 ranks"):
        make_mesh(replace(FP32, shard_size=2), device="cpu")


def test_joining_twice_keeps_the_group(group_of_one):
    before = dist.group.WORLD
    join_ranks("cpu")
    assert dist.group.WORLD is before
    assert sum_over_ranks(2.5, torch.tensor(3)).tolist() == [2.5, 3]


@pytest.mark.parametrize("evaluate", ["loss", "__call__"])
def test_an_evaluation_leaves_the_weights_sharded_and_sees_new_ones(evaluate, group_of_one):
    model = build("fp32", FP32)
    tokens, documents = batch()
    with torch.no_grad():
        getattr(model, evaluate)(tokens, documents)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        before = model.loss(tokens, documents).sum
        model.init_weights(4)
        after = model.loss(tokens, documents).sum
    plain = Transformer(SMALL)
    plain.init_weights(4)
    torch.testing.assert_close(after, plain.loss(tokens, documents).sum.detach())
    assert abs(after - before) > 1e-3


class Ops(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ran[op] += 1
        return op(*args, **(kwargs or {}))


def ops_of_a_step(config):
    model = Transformer(SMALL)
    model.init_weights(0)
    for block in model.blocks:
        parallel._wrap_forward(block, config.activation_checkpointing, compiled=False)
    tokens, documents = batch()
    with Ops() as ops:
        model.loss(tokens, documents).sum.backward()
    return ops.ran[torch.ops.aten.mm.default], ops.ran[torch.ops.aten.silu.default]


def test_full_checkpointing_runs_blocks_twice_and_selective_only_what_is_cheap():
    matmuls, silus = ops_of_a_step(FP32)
    assert silus == SMALL.num_layers
    assert ops_of_a_step(replace(FP32, activation_checkpointing="selective")) == (
        matmuls,
        2 * silus,
    )
    again, twice = ops_of_a_step(replace(FP32, activation_checkpointing="full"))
    assert twice == 2 * silus
    # torch stops recomputing once it has what backward needs: the last matmul of a block is not run
    # again
    assert again == matmuls + SMALL.num_layers * 6


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_take_the_same_step_and_share_one_graph(
    checkpointing, group_of_one, monkeypatch
):
    """Captured and differentiated as always, but run by torch's own kernels: a C++ compiler would
    take 40 seconds.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(FP32, compile=True, activation_checkpointing=checkpointing)
    assert_same(step(build("compiled", config), micro_batches=1), plain_step("compiled"), 1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the block and the loss
    assert not counters["graph_break"]
