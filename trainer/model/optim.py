"""Optimizers over sharded parameters, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, AdamW, Optimizer

from trainer.config import OptimizerConfig, ScheduleConfig


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


def learning_rate(step: int, total_steps: int, config: ScheduleConfig, base_lr: float) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly in `warmup_steps`, then falls to `min_ratio` at the last step and stays there.
    "cosine" and "linear" fall right after the warm-up, "wsd" (Hägele et al. 2024, arXiv:2405.18392)
    linearly in the last `decay_share` of the steps. With `total_steps` 0 (no known end) the rate is
    constant after the warm-up.
    """
    done = step + 1  # so that the first step does not have a rate of 0
    if done <= config.warmup_steps:
        return base_lr * done / config.warmup_steps
    if total_steps == 0:
        return base_lr
    start = config.warmup_steps
    if config.name == "wsd":
        start = max(start, round(total_steps * (1 - config.decay_share)))
    progress = min(max(0.0, (done - start) / max(1, total_steps - start)), 1.0)
    factor = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return base_lr * (config.min_ratio + (1 - config.min_ratio) * factor)


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
        pieces = [
            _Piece(p, self.state[p], group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not pieces:
            return
        ranks = _common_group(pieces)
        # two messages for all parameters, instead of several for each
        totals = _sum_over_ranks([piece.sums() for piece in pieces], ranks)
        for piece, total in zip(pieces, totals, strict=True):
            piece.grad_to_update(total)
        totals = _sum_over_ranks([piece.update_square() for piece in pieces], ranks)
        for piece, total in zip(pieces, totals, strict=True):
            piece.apply(total)


class _Piece:
    """This rank's rows of one parameter; a step calls its methods in the order given here.

    A vector has a second moment for each entry instead of means over rows and columns.
    """

    def __init__(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.parameter, self.state, self.options = parameter, state, group
        self.values, self.grad = _local(parameter), _local(parameter.grad)
        self.factored = parameter.ndim == 2
        if not state:
            state.update(_zero_state(parameter))
        state["step"] += 1
        # 1 - beta2, which is 1 at the first step
        self.weight_of_new = float(state["step"]) ** -DECAY_POWER

    def sums(self) -> Tensor:
        """[sum of squares]; for a matrix also [sum of row means, squared gradients by column …]."""
        squares = self.grad.square()
        value_square = self.values.square().sum().reshape(1)
        if not self.factored:
            _local(self.state["square"]).lerp_(squares.add_(EPS), self.weight_of_new)
            return value_square
        rows = _local(self.state["row_square"])
        rows.lerp_(squares.mean(1) + EPS, self.weight_of_new)
        return torch.cat([value_square, rows.sum().reshape(1), squares.sum(0)])

    def grad_to_update(self, total: Tensor) -> None:
        """Divide the gradient, in place, by the root of its second moment."""
        self.value_rms = (total[0] / self.parameter.numel()).sqrt()
        if not self.factored:
            self.grad.mul_(_local(self.state["square"]).rsqrt())
            return
        height = self.parameter.shape[0]
        columns = self.state["column_square"]
        columns.lerp_(total[2:] / height + EPS, self.weight_of_new)
        rows = _local(self.state["row_square"]) / (total[1] / height)
        self.grad.mul_(rows.rsqrt()[:, None]).mul_(columns.rsqrt())

    def update_square(self) -> Tensor:
        return self.grad.square().sum().reshape(1)

    def apply(self, total: Tensor) -> None:
        lr = self.options["lr"]
        update_rms = (total[0] / self.parameter.numel()).sqrt()
        scale = lr * self.value_rms.clamp(min=LEAST_SCALE) / (update_rms / CLIP).clamp(min=1.0)
        self.values.mul_(1 - lr * self.options["weight_decay"])
        self.values.sub_(self.grad.mul_(scale))


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


def _common_group(pieces: list[_Piece]) -> dist.ProcessGroup | None:
    """The ranks that share one copy of the parameters; None if each parameter is whole here."""
    groups = {_shard_group(piece.parameter) for piece in pieces}
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
