"""Cross-entropy of the next token, in equal chunks: the logits of a batch never exist all at once,
and a compiled kernel meets one shape.

B rows, S positions, T = B x S, D dim, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.packing import IGNORE

# bytes of float32 logits that exist at once. CUDA: 4,096 positions of 100,352 tokens. CPU: what its
# allocator reuses; it maps memory above 32 MiB again, page by page, which takes a third of the time
# of a small model's step
LOGITS_BYTES = {"cuda": 4096 * 100_352 * 4, "cpu": 24 << 20}
LossKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Loss(NamedTuple):
    """Cross-entropy in nats, float32.

    `sum` over all targets (0-dim); `nats` of each position (B, S), 0 without a target, has no
    gradient; `targets` is the number of targets, int64, 0-dim.
    """

    sum: Tensor
    nats: Tensor
    targets: Tensor


def chunked_loss(
    hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, kernel: LossKernel
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hidden states against a head: its sum, and that of each position (T,).

    With gradients enabled, `kernel` (see `loss_and_gradient`) also computes the gradient.
    """
    if torch.is_grad_enabled() and hidden_TD.requires_grad:
        return _ChunkedLoss.apply(hidden_TD, weight_VD, targets, kernel)  # type: ignore[no-any-return, no-untyped-call]
    chunks = [
        F.cross_entropy(
            F.linear(hidden, weight_VD).float(), target, ignore_index=IGNORE, reduction="none"
        )
        for hidden, target, _ in _chunks(hidden_TD, targets, vocabulary=len(weight_VD))
    ]
    nats = torch.cat(chunks)[: len(targets)]
    return nats.sum(), nats


def loss_and_gradient(
    logits_TV: Tensor, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,) in float32, 0 without a target, and the gradient by the logits.

    The gradient, softmax - one-hot, has the precision of the logits and takes the place of their
    float32 copy. `z_loss` times log(Z)^2 is added to what is minimized (PaLM, arXiv:2204.02311, 5),
    thus to the gradient, but not to the cross-entropy that is returned.
    """
    x_TV = logits_TV.float()
    valid = targets != IGNORE
    target = targets.clamp(min=0)[:, None]
    log_total = x_TV.logsumexp(-1)
    nats = log_total - x_TV.gather(1, target).squeeze(1)
    # exp(x - inf) = 0: a position without a target has no gradient
    p_TV = x_TV.sub_(log_total.masked_fill(~valid, float("inf"))[:, None]).exp_()
    if z_loss:
        p_TV.mul_(1 + 2 * z_loss * log_total[:, None])
    p_TV.scatter_add_(1, target, -valid.to(p_TV.dtype)[:, None])
    return nats.masked_fill(~valid, 0.0), p_TV.to(logits_TV.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` with a gradient.

    The gradient of the sum is computed in the forward pass, while the logits exist: backward only
    scales it, and nothing is computed twice (checkpointing each chunk would multiply by the head
    four times instead of three). Between the passes it keeps T D + V D numbers in the precision of
    the weights. The head's gradient is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, kernel: LossKernel
    ) -> tuple[Tensor, Tensor]:
        nats = hidden_TD.new_empty(len(targets), dtype=torch.float32)
        by_hidden = torch.empty_like(hidden_TD)
        by_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for hidden, target, part in _chunks(hidden_TD, targets, vocabulary=len(weight_VD)):
            count = part.stop - part.start
            chunk_nats, by_logits = kernel(hidden @ weight_VD.T, target)
            nats[part] = chunk_nats[:count]
            by_hidden[part] = (by_logits @ weight_VD)[:count]
            if by_logits.dtype == by_weight.dtype:
                # without a second V D, which on a CPU costs a tenth of the step
                by_weight.addmm_(by_logits.T, hidden)
            else:
                by_weight += by_logits.T @ hidden
        ctx.save_for_backward(by_hidden, by_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nats)
        return nats.sum(), nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * scale, by_weight * scale, None, None


def _chunks(
    hidden_TD: Tensor, targets: Tensor, *, vocabulary: int
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Equal chunks along positions, whose logits fit in LOGITS_BYTES, and the positions of each.

    The last chunk is filled up with positions without a target.
    """
    limit = LOGITS_BYTES.get(hidden_TD.device.type, LOGITS_BYTES["cuda"])
    total, most = len(targets), max(1, limit // (4 * vocabulary))
    size = math.ceil(total / math.ceil(total / most))
    for start in range(0, total, size):
        part = slice(start, min(start + size, total))
        missing = start + size - part.stop
        yield (
            F.pad(hidden_TD[part], (0, 0, 0, missing)) if missing else hidden_TD[part],
            F.pad(targets[part], (0, missing), value=IGNORE) if missing else targets[part],
            part,
        )
