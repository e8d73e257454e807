"""Optimizers over sharded parameters."""

from collections.abc import Generator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, AdamW, Optimizer

from trainer.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of a model that is already sharded.

    Weight decay applies to the matrices of blocks and of an untied head, not to norms and the
    embedding, even if it is the head: decay makes embeddings small and so their gradients large
    (OLMo 2, arXiv:2501.00656, 3.3). In AdamW and Adafactor it is decoupled, lr x weight_decay; in
    SGD it is torch's L2 penalty. Adafactor's `lr` is relative to the RMS of each parameter (1e-2 is
    common), and betas and momentum do not apply to it.
    """
    groups = _parameter_groups(model, config.weight_decay)
    if config.name == "adamw":
        # fused: one kernel per group instead of a dozen; on CPUs the plain loop, which every
        # version of torch has
        fused = next(model.parameters()).device.type == "cuda"
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# Adafactor: the second moment forgets as step^-DECAY_POWER; the others are as in the paper
DECAY_POWER, EPS, LEAST_SCALE, CLIP = 0.8, 1e-30, 1e-3, 1.0


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5) for FSDP2 parameters.

    The second moment of a matrix is kept as means over the rows and columns of the *global* matrix.
    No momentum. Updates are clipped at an RMS of CLIP and scaled by lr x max(RMS of the parameter,
    LEAST_SCALE); weight decay is decoupled, lr x weight_decay. torch's own fails on DTensors (2.13:
    in-place on a partial norm).

    A step takes two all-reduces of a few numbers per column, over the ranks that share a copy, and
    overwrites gradients. ValueError for parameters that are not sharded by rows, or are sharded
    over different groups of ranks.
    """

    def __init__(self, params: Any, *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over the parameters that have gradients. Does not sync with the GPU."""
        parameters = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if not parameters:
            return
        ranks = _common_group([p for p, _ in parameters])
        updates = [_update(p, self.state[p], group) for p, group in parameters]
        # two messages for all parameters, instead of several for each
        totals = _sum_over_ranks([next(update) for update in updates], ranks)
        squares = [update.send(total) for update, total in zip(updates, totals, strict=True)]
        totals = _sum_over_ranks(squares, ranks)
        for update, total in zip(updates, totals, strict=True):
            with suppress(StopIteration):
                update.send(total)


def _update(
    parameter: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Generator[Tensor, Tensor, None]:
    """Update this rank's rows of a parameter; twice yields what it needs summed over ranks.

    A vector has a second moment for each entry instead of means over rows and columns.
    """
    assert parameter.grad is not None
    values, grad = _local(parameter), _local(parameter.grad)
    if not state:
        state.update(_zero_state(parameter))
    state["step"] += 1
    weight_of_new = float(state["step"]) ** -DECAY_POWER  # 1 - beta2, which is 1 at the first step
    squares, value_square = grad.square(), values.square().sum().reshape(1)
    # the gradient becomes the update, in place: divided by the root of its second moment
    if parameter.ndim == 2:
        height = parameter.shape[0]
        rows, columns = _local(state["row_square"]), state["column_square"]
        rows.lerp_(squares.mean(1) + EPS, weight_of_new)
        sums = torch.cat([value_square, rows.sum().reshape(1), squares.sum(0)])
        del squares
        total = yield sums
        columns.lerp_(total[2:] / height + EPS, weight_of_new)
        grad.mul_((rows / (total[1] / height)).rsqrt()[:, None]).mul_(columns.rsqrt())
    else:
        second_moment = _local(state["square"])
        second_moment.lerp_(squares.add_(EPS), weight_of_new)
        del squares
        total = yield value_square
        grad.mul_(second_moment.rsqrt())
    update_total = yield grad.square().sum().reshape(1)
    value_rms = (total[0] / parameter.numel()).sqrt()
    update_rms = (update_total[0] / parameter.numel()).sqrt()
    scale = group["lr"] * value_rms.clamp(min=LEAST_SCALE) / (update_rms / CLIP).clamp(min=1.0)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.sub_(grad.mul_(scale))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embedding" not in name else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _zero_state(parameter: Tensor) -> dict[str, Any]:
    """Zeros; those by row are sharded like the parameter, for checkpoints on other rank counts."""
    state: dict[str, Any] = {"step": torch.tensor(0.0)}
    if parameter.ndim != 2:
        return state | {"square": torch.zeros_like(parameter)}
    columns = _local(parameter).new_zeros(parameter.shape[1])
    return state | {"row_square": torch.zeros_like(parameter.mean(1)), "column_square": columns}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _common_group(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that share one copy of the parameters; None if each parameter is whole here."""
    groups = {_shard_group(parameter) for parameter in parameters}
    if len(groups) > 1:
        raise ValueError(
            "Adafactor: parameters are sharded over different groups of ranks; "
            "shard all of them over one mesh"
        )
    return groups.pop()


def _shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    if not isinstance(parameter, DTensor):
        return None
    sharded = [
        n for n, placement in enumerate(parameter.placements) if not placement.is_replicate()
    ]
    if not sharded:
        return None
    if len(sharded) > 1 or parameter.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"Adafactor: a parameter is placed as {parameter.placements}; "
            "shard its dimension 0, once"
        )
    return parameter.device_mesh.get_group(sharded[0])


def _sum_over_ranks(parts: list[Tensor], ranks: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each part, summed over ranks in one all-reduce."""
    if ranks is None:
        return tuple(parts)
    whole = torch.cat(parts)
    dist.all_reduce(whole, group=ranks)
    return torch.split(whole, [len(part) for part in parts])
