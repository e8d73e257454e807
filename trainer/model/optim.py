"""Optimisers over sharded parameters, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, AdamW, Optimizer

from trainer.config import OptimizerConfig, ScheduleConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser of a model that is already sharded, in two groups: with weight decay and
    without.

    Decay is of the matrices of blocks and of an untied head. Norms and the embedding, also as a
    tied head, have none: decay makes embeddings small and so their gradients large (OLMo 2,
    arXiv:2501.00656, 3.3). AdamW and Adafactor decay apart from the gradient by lr x weight_decay;
    SGD's is the L2 penalty of torch. Adafactor's `lr` is relative to the RMS of each parameter:
    1e-2 is usual. It takes neither betas nor momentum.
    """
    groups = _groups(model, config.weight_decay)
    if config.name == "adamw":
        # fused: one kernel per group in place of a dozen; on CPUs the plain loop, which every
        # version of torch has
        fused = next(model.parameters()).device.type == "cuda"
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def learning_rate(step: int, total_steps: int, config: ScheduleConfig, base_lr: float) -> float:
    """The learning rate of a step, counted from 0: up linearly in `warmup_steps`, then down to
    `min_ratio` at the last step.

    "cosine" and "linear" fall from there on, "wsd" (Hägele et al. 2024, arXiv:2405.18392) stays and
    falls linearly in the last `decay_share` of the steps. Later steps stay at the minimum.
    `total_steps` 0, an end not known: after warm-up it stays.
    """
    done = step + 1  # so that the first step is not wasted on a rate of 0
    if done <= config.warmup_steps:
        return base_lr * done / config.warmup_steps
    if total_steps == 0:
        return base_lr
    falls_from = config.warmup_steps
    if config.name == "wsd":
        falls_from = max(falls_from, round(total_steps * (1 - config.decay_share)))
    fallen = min(max(0.0, (done - falls_from) / max(1, total_steps - falls_from)), 1.0)
    left = (1 + math.cos(math.pi * fallen)) / 2 if config.name == "cosine" else 1 - fallen
    return base_lr * (config.min_ratio + (1 - config.min_ratio) * left)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5) that works on FSDP2's
    parameters.

    The second moment of a matrix is kept as means over its rows and columns: of the *global*
    matrix, wherever its rows lie. No momentum. Updates are clipped at an RMS of `clip` and scaled
    by lr x max(RMS of the parameter, `least_scale`); decay is apart, by lr x weight_decay. torch's
    own fails on DTensors (2.13: in-place on a partial norm).

    A step takes two all-reduces, over the ranks that share a copy, of a few numbers per column. It
    overwrites gradients. ValueError for parameters that are sharded otherwise than by rows, or over
    different groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        decay_power: float = 0.8,
        eps: float = 1e-30,
        least_scale: float = 1e-3,
        clip: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "decay_power": decay_power}
        super().__init__(params, defaults | {"eps": eps, "least_scale": least_scale, "clip": clip})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step over the parameters that have gradients. Does not sync with the GPU."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = [
            _Piece(p, self.state[p], group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if pieces:
            ranks = _one_group(pieces)
            # what a rank needs of the others' rows goes in two messages for all parameters, not
            # several for each
            for piece, total in zip(
                pieces, _summed([piece.sums() for piece in pieces], ranks), strict=True
            ):
                piece.grad_to_update(total)
            for piece, total in zip(
                pieces, _summed([piece.update_square() for piece in pieces], ranks), strict=True
            ):
                piece.apply(total)
        return loss


class _Piece:
    """The rows of one parameter that this rank holds, and its part in a step: sums, grad_to_update,
    update_square, apply.

    A vector is treated alike, with a second moment for each entry in place of means over rows and
    columns.
    """

    def __init__(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.parameter, self.state, self.options = parameter, state, group
        self.values, self.grad = _local(parameter), _local(parameter.grad)
        self.factored = parameter.ndim == 2
        if not state:
            state.update(_first_state(parameter, self.values))
        state["step"] += 1
        self.weight_of_new = (
            float(state["step"]) ** -group["decay_power"]
        )  # 1 - beta2, which is 0 at first

    def sums(self) -> Tensor:
        """[sum of squared values] and, of a matrix, [sum of its row means, sum of squared gradients
        by column …].
        """
        squares = self.grad.square()
        value_square = self.values.square().sum().reshape(1)
        if not self.factored:
            _local(self.state["square"]).lerp_(
                squares.add_(self.options["eps"]), self.weight_of_new
            )
            return value_square
        rows = _local(self.state["row_square"])
        rows.lerp_(squares.mean(1) + self.options["eps"], self.weight_of_new)
        return torch.cat([value_square, rows.sum().reshape(1), squares.sum(0)])

    def grad_to_update(self, total: Tensor) -> None:
        """Divide the gradient, in place, by the root of its second moment."""
        self.value_rms = (total[0] / self.parameter.numel()).sqrt()
        if not self.factored:
            self.grad.mul_(_local(self.state["square"]).rsqrt())
            return
        height = self.parameter.shape[0]
        columns = self.state["column_square"]
        columns.lerp_(total[2:] / height + self.options["eps"], self.weight_of_new)
        rows = _local(self.state["row_square"]) / (total[1] / height)
        self.grad.mul_(rows.rsqrt()[:, None]).mul_(columns.rsqrt())

    def update_square(self) -> Tensor:
        return self.grad.square().sum().reshape(1)

    def apply(self, total: Tensor) -> None:
        lr = self.options["lr"]
        update_rms = (total[0] / self.parameter.numel()).sqrt()
        scale = (
            lr
            * self.value_rms.clamp(min=self.options["least_scale"])
            / (update_rms / self.options["clip"]).clamp(min=1.0)
        )
        self.values.mul_(1 - lr * self.options["weight_decay"])
        self.values.sub_(self.grad.mul_(scale))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embedding" not in name else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _first_state(parameter: Tensor, values: Tensor) -> dict[str, Any]:
    """Zeros; those by row lie as the parameter does, so that a checkpoint moves them to another
    number of ranks.
    """
    state: dict[str, Any] = {"step": torch.tensor(0.0)}
    if parameter.ndim != 2:
        return state | {"square": torch.zeros_like(parameter)}
    rows: Tensor = values.new_zeros(len(values))
    if isinstance(parameter, DTensor):
        whole = parameter.shape[:1]
        rows = DTensor.from_local(
            rows,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=whole,
            stride=(1,),
        )
    return state | {"row_square": rows, "column_square": values.new_zeros(parameter.shape[1])}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _one_group(pieces: list[_Piece]) -> dist.ProcessGroup | None:
    """The ranks that hold one copy of the parameters between them; None when each is whole here."""
    groups = {_shard_group(piece.parameter) for piece in pieces}
    if len(groups) > 1:
        raise ValueError(
            "Adafactor: parameters are sharded over different groups of ranks; shard all of them over one mesh"
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
            f"Adafactor: a parameter is placed as {parameter.placements}; shard its dimension 0, once"
        )
    return parameter.device_mesh.get_group(sharded[0])


def _summed(parts: list[Tensor], ranks: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each part, summed over ranks in one all-reduce."""
    if ranks is None:
        return tuple(parts)
    whole = torch.cat(parts)
    dist.all_reduce(whole, group=ranks)
    return torch.split(whole, [len(part) for part in parts])
