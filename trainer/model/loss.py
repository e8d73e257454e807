"""Cross-entropy of the next token in chunks, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a position that predicts nothing


# float32 logits that exist at once: 4,096 positions of 100,352 words; on a CPU what its allocator
# gives again, as it maps anew, page by page, what is above 32 MiB: a third of the time of a small
# model's step
LOGITS_BYTES = {"cuda": 4096 * 100_352 * 4, "cpu": 24 << 20}


class Loss(NamedTuple):
    """Cross-entropy in nats, float32, summed over all targets (0-dim) and over those of each row
    (B,), which has no gradient.

    `targets`: how many there are in all, int64, 0-dim.
    """

    sum: Tensor
    rows: Tensor
    targets: Tensor


def loss_and_gradient(logits_TV: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,), float32, 0 without a target, and its gradient by the logits: softmax -
    one-hot, in their precision.

    The gradient takes the place of float32 logits.
    """
    x_TV = logits_TV.float()
    valid = targets != IGNORE
    target = targets.clamp(min=0)[:, None]
    log_total = x_TV.logsumexp(-1)
    nats = log_total - x_TV.gather(1, target).squeeze(1)
    # exp(x - inf) = 0: a position without a target gives no gradient
    p_TV = x_TV.sub_(log_total.masked_fill(~valid, float("inf"))[:, None]).exp_()
    p_TV.scatter_add_(1, target, -valid.to(p_TV.dtype)[:, None])
    return nats.masked_fill(~valid, 0.0), p_TV.to(logits_TV.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of hidden states (T, D) against a head (V, D), in chunks: its sum, and that of
    each position (T,).

    The gradient of the sum is computed in the forward pass, where the logits are: backward only
    scales it, and nothing is computed twice (checkpointing each chunk would multiply by the head
    four times in place of three). Between the passes it holds T D + V D numbers in the precision of
    the weights. The head's gradient is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets: Tensor,
        kernel: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        nats = []
        by_hidden = torch.empty_like(hidden_TD)
        by_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        chunks = _chunks(hidden_TD, targets, vocabulary=len(weight_VD))
        for (hidden, target), out in zip(chunks, _split(by_hidden, len(weight_VD)), strict=True):
            found, by_logits = kernel(hidden @ weight_VD.T, target)
            nats.append(found)
            out.copy_(by_logits @ weight_VD)
            if by_logits.dtype == by_weight.dtype:
                by_weight.addmm_(
                    by_logits.T, hidden
                )  # without a second V D, which on a CPU costs a tenth of the step
            else:
                by_weight += by_logits.T @ hidden
        ctx.save_for_backward(by_hidden, by_weight.to(weight_VD.dtype))
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * scale, by_weight * scale, None, None


def _split(states: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Cut along positions, so that the logits of a part fit in LOGITS_BYTES."""
    room = LOGITS_BYTES.get(states.device.type, LOGITS_BYTES["cuda"])
    return torch.split(states, max(1, room // (4 * vocabulary)))


def _chunks(states: Tensor, targets: Tensor, *, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    parts = _split(states, vocabulary)
    return zip(parts, torch.split(targets, len(parts[0])), strict=True)


def _nats(logits_TV: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), targets, ignore_index=IGNORE, reduction="none")
