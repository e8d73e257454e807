"""Optimizers against plain references, sharded against whole; groups of weight decay; skipped steps."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import at_most
from tests.support.ranks import run_ranks

torch = pytest.importorskip("torch")

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import AdamW

from trainer.config import ModelConfig, OptimizerConfig, ParallelConfig
from trainer.model.llama import Transformer
from trainer.model.optim import (
    Adafactor,
    AdamWInBF16,
    MuonAndAdamW,
    make_optimizer,
    set_learning_rate,
    update_unless,
)
from trainer.model.parallel import (
    clip_grad_norm,
    make_mesh,
    parallelize,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("one_thread")]

# 61 words, 10 hidden: uneven shards; 1 row of the key projection's 2 x 6 on some ranks
SMALL = ModelConfig(
    vocab_size=61,
    dim=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=10,
    tie_embeddings=False,
)
FP32 = ParallelConfig(precision="fp32")
CONFIGS = {
    "adafactor": OptimizerConfig(name="adafactor", lr=1e-2),
    "adamw": OptimizerConfig(name="adamw", lr=1e-3),
    "adamw in bf16": OptimizerConfig(name="adamw", lr=1e-3, state_dtype="bf16"),
    "muon": OptimizerConfig(name="muon", lr=1e-3),
    "sgd": OptimizerConfig(name="sgd", lr=1e-2, momentum=0.9),
}

# sums in another order are rounded to bfloat16 otherwise: a share of a step of 1e-3
ROUNDING = {"adamw in bf16": 5e-5}


def parameters(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer, params, gradients):
    """Steps of a fresh optimiser over these gradients, scaled as wildly as early training does; the
    weights afterwards.
    """
    for number, per_parameter in enumerate(gradients):
        for parameter, gradient in zip(params, per_parameter, strict=True):
            parameter.grad = gradient * 10.0 ** (number % 3 - 1)
        optimizer.step()
    return [p.detach().clone() for p in params]


def adamw_in_bf16(weight, gradients, *, lr, betas, eps, weight_decay):
    """AdamW as the paper has it, with moments that are rounded to bfloat16 after each step."""
    mean = square = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        mean = betas[0] * mean.bfloat16().float() + (1 - betas[0]) * gradient
        square = betas[1] * square.bfloat16().float() + (1 - betas[1]) * gradient**2
        corrected = mean / (1 - betas[0] ** t), square / (1 - betas[1] ** t)
        weight = weight - lr * weight_decay * weight
        weight = weight - lr * corrected[0] / (corrected[1].sqrt() + eps)
    return weight


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_in_bf16_is_adamw_with_rounded_moments(weight_decay):
    (weight,), gradients = parameters([(5, 7)], 1), [parameters([(5, 7)], n) for n in range(2, 8)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    start, scaled = weight.detach().clone(), [10.0 ** (n % 3 - 1) for n in range(6)]
    (found,) = steps(AdamWInBF16([weight], **settings), [weight], gradients)
    rounded = [g[0].detach() * scale for g, scale in zip(gradients, scaled, strict=True)]
    torch.testing.assert_close(found, adamw_in_bf16(start, rounded, **settings), rtol=0, atol=2e-5)


def test_adamw_in_bf16_keeps_half_the_bytes_of_adamw():
    (weight,) = parameters([(5, 7)], 1)
    optimizer = AdamWInBF16([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    steps(optimizer, [weight], [parameters([(5, 7)], 2)])
    assert {t.dtype for t in optimizer.state[weight].values() if t.ndim} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"betas": (0.9, 0.999)}, "stands still"),
        ({"name": "sgd"}, "is for adamw, not sgd"),
    ],
)
def test_moments_in_bf16_that_would_not_move_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        OptimizerConfig(**{"name": "adamw", "state_dtype": "bf16"} | change)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_takes_the_nearest_orthogonal_step_at_the_rms_of_adamw(shape):
    """Against the definition: U V^T of the momentum's SVD, which five iterations approximate with
    singular values between 0.5 and 1.5 (Jordan 2024).
    """
    (weight,), ((gradient,),) = parameters([shape], 1), [parameters([shape], 2)]
    start, lr = weight.detach().clone(), 0.01
    optimizer = MuonAndAdamW(
        [{"params": [weight], "weight_decay": 0.0}],
        [{"params": parameters([(3,)], 3)}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    weight.grad = gradient.detach()
    optimizer.step()
    update = (start - weight.detach()) / (lr * 0.2 * max(shape) ** 0.5)
    u, _, v = torch.linalg.svd(gradient.detach(), full_matrices=False)
    in_their_bases = u.T @ update @ v.T
    values = in_their_bases.diagonal()
    assert ((values > 0.45) & (values < 1.55)).all()
    torch.testing.assert_close(in_their_bases, torch.diag(values), rtol=0, atol=0.05)


def test_muon_is_for_matrices_of_blocks_and_adamw_for_the_rest():
    model = Transformer(SMALL)
    model.init_weights(0)
    optimizer = make_optimizer(model, CONFIGS["muon"])
    by_muon = {
        p for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]
    }
    names = {name for name, p in model.named_parameters() if p in by_muon}
    assert names == {
        *(f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value", "out")),
        *(f"blocks.0.mlp.{name}.weight" for name in ("gate", "up", "down")),
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [AdamW, AdamWInBF16])
def test_a_skipped_step_changes_nothing_at_all(kind, fused):
    """Fused AdamW decides by `found_inf`, as it does on a GPU; torch has it for CPUs, too."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    runs = []
    for skips in ((False, False), (False, True, False), (True, False, False)):
        (weight,) = parameters([(5, 7)], 1)
        optimizer = kind([weight], **settings, **({"fused": fused} if kind is AdamW else {}))
        good = iter(parameters([(5, 7), (5, 7)], 2))
        for skip in skips:
            weight.grad = torch.full((5, 7), math.nan) if skip else next(good).detach()
            update_unless(torch.tensor(skip), optimizer)
        runs.append(weight.detach())
    assert runs[1].equal(runs[0])
    assert runs[2].equal(runs[0])


SHAPES = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 7)) | st.tuples(st.integers(1, 9)),
    min_size=1,
    max_size=4,
)


@at_most(40)
@given(shapes=SHAPES, count=st.integers(1, 5), seed=st.integers(0, 9))
def test_adafactor_is_transformers(shapes, count, seed):
    theirs = pytest.importorskip("transformers.optimization").Adafactor
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(count)]
    found, expected = parameters(shapes, seed), parameters(shapes, seed)
    mine = Adafactor(found, lr=1e-2)
    slow = theirs(expected, lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False)
    for ours, oracle in zip(
        steps(mine, found, gradients), steps(slow, expected, gradients), strict=True
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)


def test_adafactor_with_weight_decay_is_torchs():
    shapes, gradients = [(5, 7), (6,)], [[torch.randn(5, 7), torch.randn(6)] for _ in range(4)]
    found, expected = parameters(shapes, 0), parameters(shapes, 0)
    mine = Adafactor(found, lr=1e-2, weight_decay=0.3)
    slow = torch.optim.Adafactor(expected, lr=1e-2, weight_decay=0.3, eps=(1e-30, 1e-3))
    for ours, oracle in zip(
        steps(mine, found, gradients), steps(slow, expected, gradients), strict=True
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)


def test_adafactor_stands_still_without_gradients_and_at_rate_0():
    """As torch.distributed.checkpoint steps it, to make its state before loading one."""
    (parameter,) = parameters([(3, 4)], 0)
    before = parameter.detach().clone()
    optimizer = Adafactor([parameter], lr=1e-2, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state[parameter]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameter.equal(before * (1 - 1e-2 * 0.5))
    parameter.grad = torch.randn_like(parameter)
    before = parameter.detach().clone()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert parameter.equal(before)


def test_adafactor_keeps_rows_and_columns_not_the_matrix():
    (parameter,) = parameters([(30, 40)], 0)
    parameter.grad = torch.randn(30, 40)
    optimizer = Adafactor([parameter], lr=1e-2)
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[parameter].values()) == 30 + 40 + 1


def test_adafactor_refuses_columns_apart(group_of_one):
    mesh = make_mesh(FP32, device="cpu")
    parameter = torch.nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="shard its dimension 0"):
        Adafactor([parameter], lr=1e-2).step()


def test_adafactor_takes_replicated_parameters(group_of_one):
    (plain,) = parameters([(4, 6)], 0)
    copy = torch.nn.Parameter(
        distribute_tensor(plain.detach(), make_mesh(FP32, device="cpu"), [Replicate()])
    )
    for parameter in (plain, copy):
        parameter.grad = torch.ones_like(parameter)
        Adafactor([parameter], lr=1e-2).step()
    assert copy.full_tensor().equal(plain)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, SMALL.vocab_size, (4, 12), generator=generator)


def train(model, optimizer, numbers, *, rank=0, ranks=1):
    """Steps over the batches of these numbers, this rank's rows of each."""
    for number in numbers:
        optimizer.zero_grad()
        loss = model.loss(batch(number)[rank::ranks], None)
        (loss.sum * ranks / (4 * 11)).backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()


def sharded(config, parallel=FP32):
    with torch.device("meta"):
        model = Transformer(SMALL)
    parallelize(model, parallel, make_mesh(parallel, device="cpu"))
    model.to_empty(device="cpu").init_weights(3)
    return model, make_optimizer(model, config)


def save_or_load(act, model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    act({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def worker(rank, ranks, folder, parallel, configs):
    """In a process of its own: three steps, a checkpoint, two more; rank 0 leaves the weights."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks
    )
    weights = {}
    for name, config in configs.items():
        model, optimizer = sharded(config, parallel)
        train(model, optimizer, range(3), rank=rank, ranks=ranks)
        save_or_load(dcp.save, model, optimizer, f"{folder}/{name}")
        train(model, optimizer, range(3, 5), rank=rank, ranks=ranks)
        weights[name] = {key: p.full_tensor() for key, p in model.named_parameters()}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(worker, 2, folder, FP32, CONFIGS, ranks=2)
    return folder


def plain_weights(config):
    model = Transformer(SMALL)
    model.init_weights(3)
    train(model, make_optimizer(model, config), range(5))
    return dict(model.named_parameters())


def assert_same_training(name, found, expected):
    """The same weights; for Muon about the same way to them, as its iteration in bfloat16 amplifies
    what little there is in some directions of a gradient.
    """
    if name != "muon":
        return assert_same_weights(found, expected, atol=ROUNDING.get(name, 2e-6))
    start = Transformer(SMALL)
    start.init_weights(3)
    for key, weight in start.named_parameters():
        apart = (found[key] - expected[key]).norm() / (expected[key] - weight).norm()
        assert apart < 0.15, f"{key}: {apart:.3f} of the way apart"


def assert_same_weights(found, expected, *, atol=2e-6):
    for name, parameter in expected.items():
        torch.testing.assert_close(
            found[name],
            parameter.detach(),
            rtol=2e-4,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_end_at_the_weights_of_one_plain_process(two_ranks, name):
    found, expected = torch.load(two_ranks / "weights.pt")[name], plain_weights(CONFIGS[name])
    assert_same_training(name, found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_of_two_ranks_goes_on_with_one(two_ranks, name, group_of_one):
    model, optimizer = sharded(CONFIGS[name])
    save_or_load(dcp.load, model, optimizer, str(two_ranks / name))
    train(model, optimizer, range(3, 5))
    found = {key: p.full_tensor() for key, p in model.named_parameters()}
    assert_same_training(name, found, torch.load(two_ranks / "weights.pt")[name])


def test_adafactor_on_two_groups_of_two_ranks_ends_at_the_weights_of_one_plain_process(tmp_path):
    config = CONFIGS["adafactor"]
    plan = replace(FP32, shard_size=2)
    run_ranks(worker, 4, tmp_path, plan, {"adafactor": config}, ranks=4)
    assert_same_weights(torch.load(tmp_path / "weights.pt")["adafactor"], plain_weights(config))


def test_adafactors_row_statistics_lie_as_the_rows_do(group_of_one):
    model, optimizer = sharded(CONFIGS["adafactor"])
    train(model, optimizer, range(1))
    state = optimizer.state[model.head.weight]
    assert isinstance(state["row_square"], DTensor)
    assert state["row_square"].placements == model.head.weight.placements
    assert state["row_square"].shape == (SMALL.vocab_size,)
    assert not isinstance(state["column_square"], DTensor)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_alone_decay_and_embeddings_do_not(name, tied):
    model = Transformer(replace(SMALL, tie_embeddings=tied))
    model.init_weights(0)
    optimizer = make_optimizer(model, replace(CONFIGS[name], weight_decay=0.5))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name for name, p in model.named_parameters() if decays[p] == 0.5}
    expected = {
        name
        for name, _ in model.named_parameters()
        if "norm" not in name and "embedding" not in name
    }
    assert found == expected
    assert len(decays) == len(list(model.parameters()))
    assert {decays[p] for name, p in model.named_parameters() if name not in expected} == {0.0}
