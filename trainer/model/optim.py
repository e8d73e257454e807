"""Optimizers over sharded parameters."""

import math
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, AdamW, Muon, Optimizer

from trainer.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of a model that is already sharded.

    Weight decay applies to the matrices of blocks and of an untied head, not to norms and the
    embedding, even if it is the head: decay makes embeddings small and so their gradients large
    (OLMo 2, arXiv:2501.00656, 3.3). In AdamW, Muon and Adafactor it is decoupled, lr x
    weight_decay; in SGD it is torch's L2 penalty. Adafactor's `lr` is relative to the RMS of each
    parameter (1e-2 is common), and betas and momentum do not apply to it.
    """
    groups = _parameter_groups(model, config.weight_decay)
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    # fused: one kernel per group instead of a dozen; on CPUs the plain loop, which every version of
    # torch has
    fused = next(model.parameters()).device.type == "cuda"
    if config.name == "adamw" and config.state_dtype == "bf16":
        return AdamWInBF16(groups, **adam)
    if config.name == "adamw":
        return AdamW(groups, **adam, fused=fused)
    if config.name == "muon":
        return MuonAndAdamW(*_split_for_muon(model, groups), **adam, fused=fused)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Take a step, unless `skip` (bool, 0-dim, on the device) is true: then nothing changes.

    Fused AdamW decides on the device. Any other optimizer waits for it here.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(skip):
        optimizer.step()


MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWInBF16(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) whose moments are kept in bfloat16.

    A step computes in float32 and rounds what it keeps: half the memory, 4 bytes a parameter less.
    A moment changes by 1 - beta of its distance to the gradient; far below 2^-8 of itself that is
    rounded away, hence the config's bound on betas.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over the parameters that have gradients. Does not sync with the GPU."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _adamw_update(parameter, self.state[parameter], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which converts moments to the precision of the parameters; here back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].bfloat16()


def _adamw_update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    if not state:
        state["step"] = torch.tensor(0.0)
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
    state["step"] += 1
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    values, grad = _local(parameter), _local(parameter.grad)
    mean = _local(state["exp_avg"]).float().lerp_(grad, 1 - beta1)
    square = _local(state["exp_avg_sq"]).float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    _local(state["exp_avg"]).copy_(mean)
    _local(state["exp_avg_sq"]).copy_(square)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    divisor = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    values.addcdiv_(mean, divisor, value=-group["lr"] / (1 - beta1**step))


class MuonAndAdamW(Optimizer):
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) for some groups, AdamW for the others.

    Muon's update is scaled to the RMS of AdamW's (Liu et al. 2025, arXiv:2502.16982), so one
    learning rate and one weight decay serve both. Its momentum is 0.95. torch (2.13) iterates
    over sharded matrices as they lie: about 11 all-gathers of a matrix a step on two ranks.
    """

    def __init__(
        self,
        muon_groups: Any,
        adamw_groups: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        self._muon = Muon(muon_groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over the parameters that have gradients."""
        # both work on this optimizer's groups and state, which a checkpoint replaces
        for inner, is_muon in ((self._muon, True), (self._adamw, False)):
            inner.param_groups = [g for g in self.param_groups if ("ns_steps" in g) == is_muon]
            inner.state = self.state
            inner.step()  # type: ignore[no-untyped-call]


def _split_for_muon(
    model: nn.Module, groups: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for Muon, the matrices of blocks, and for AdamW, the rest."""
    matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name}
    muon, adamw = [], []
    for group in groups:
        ours = [p for p in group["params"] if p in matrices]
        others = [p for p in group["params"] if p not in matrices]
        muon += [group | {"params": ours}] if ours else []
        adamw += [group | {"params": others}] if others else []
    return muon, adamw


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
