"""Step 4 of a row's way to the loss: the gradients of a global batch, and the update.

A step is queued (`queue_gradients`, `queue_update`) while the device may still work on the one
before, and its figures are read later (`StepFigures.read`). Nothing here waits for the device,
except for optimizers other than fused AdamW (`optim.update_unless`). It needs only torch, so that a
benchmark can run it alone. The batches come from `data.loader`; the loss is computed by
`llama.Transformer.loss`; `loop` decides when to read.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from trainer.config import TrainConfig
from trainer.model.llama import Transformer
from trainer.model.loss import loss_and_gradient
from trainer.model.optim import make_optimizer, update_unless
from trainer.model.packing import num_targets, packed_documents, row_targets, visible_positions
from trainer.model.parallel import clip_grad_norm, make_mesh, parallelize, sum_over_ranks

if TYPE_CHECKING:
    from trainer.data.rows import Batch


_Event: Any = torch.cuda.Event  # its methods have no types


class RunSums(NamedTuple):
    """Sums of a step over what it took of one run, over all ranks.

    Tokens without fill, targets, pairs of a token and a position that it sees, nats.
    """

    tokens: int
    targets: int
    pairs: int
    nats: float


class Read(NamedTuple):
    """The figures of a step as Python numbers, the same on all ranks.

    `runs` has one RunSums per run, loss is in nats per target, `stop` is how many ranks were asked
    to stop.
    """

    runs: list[RunSums]
    loss: float
    grad_norm: float
    stop: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepFigures(NamedTuple):
    """The figures of a queued step, on their way to the host.

    `loss` and `grad_norm` are on the device, float64, 0-dim; `row_nats` are this rank's by
    micro-batch, (micro_batch_rows,) each, on the device too.
    """

    loss: Tensor
    grad_norm: Tensor
    row_nats: list[Tensor]
    host: Tensor
    copied: Any

    def read(self) -> Read:
        """Wait until the device has computed the gradients of the step."""
        if self.copied is not None:
            self.copied.synchronize()
        *flat, stop, loss, grad_norm = self.host.tolist()
        counts = zip(*(map(int, flat[n::4]) for n in range(3)), flat[3::4], strict=True)
        return Read([RunSums(*sums) for sums in counts], loss, grad_norm, int(stop))


def build(config: TrainConfig, device: str) -> tuple[Transformer, Optimizer]:
    """The model, sharded and initialized from the seed, and its optimizer.

    Where `model.init` names a checkpoint, `load_pretrained` sets the weights afterwards.
    """
    if device == "cpu" and config.model.attention == "flex":
        raise ValueError('model.attention = "flex" trains on GPUs only; set "auto" or "sdpa"')
    with torch.device("meta"):
        model = Transformer(config.model)
    if config.optimizer.z_loss:
        model.loss_and_gradient = partial(loss_and_gradient, z_loss=config.optimizer.z_loss)
    parallelize(model, config.parallel, make_mesh(config.parallel, device=device))
    model.to_empty(device=device)
    if not config.model.init:
        model.init_weights(config.seed)
    return model, make_optimizer(model, config.optimizer)


def queue_gradients(
    model: Transformer,
    batches: "Sequence[Batch]",
    runs: Sequence[str],
    *,
    device: str,
    clip_norm: float,
    stop: bool = False,
) -> StepFigures:
    """Compute the clipped gradients of the global batch's mean loss from this rank's part of it.

    `runs` are all sources that the batches may come from; `stop` tells all ranks that this one was
    asked to stop. Collective.
    """
    by_run, row_nats = _accumulate(model, batches, runs, device=device)
    flag = torch.full((1,), float(stop), dtype=torch.float64, device=device)
    sums = torch.cat([by_run.flatten(), flag])
    dist.all_reduce(sums)
    by_run = sums[:-1].view_as(by_run)
    loss = by_run[:, 3].sum() / by_run[:, 1].sum().clamp(min=1)
    norm = clip_grad_norm(model.parameters(), clip_norm).double()
    # the destination is pinned memory, as torch makes it for a copy that does not wait
    host = torch.cat([sums, torch.stack([loss, norm])]).to("cpu", non_blocking=True)
    copied = None
    if device == "cuda":
        copied = _Event()
        copied.record()
    return StepFigures(loss, norm, row_nats, host, copied)


def queue_update(
    optimizer: Optimizer, figures: StepFigures, *, highest_loss: float = math.inf
) -> None:
    """Update the weights, unless loss or gradients are not finite or the loss is above the bound.

    The gradients are gone afterwards.
    """
    is_good = figures.loss.isfinite() & figures.grad_norm.isfinite()
    update_unless(~is_good | (figures.loss > highest_loss), optimizer)
    optimizer.zero_grad()


def _accumulate(
    model: Transformer, batches: "Sequence[Batch]", runs: Sequence[str], *, device: str
) -> tuple[Tensor, list[Tensor]]:
    """Gradients; this rank's RunSums, float64 (runs, 4); nats of the rows of each micro-batch.

    FSDP averages gradients over ranks, so each rank's sum is scaled by their number.
    """
    targets = sum_over_ranks(sum(num_targets(batch.documents) for batch in batches), device=device)
    scale = (dist.get_world_size() / targets.clamp(min=1)).float().squeeze()
    by_run, row_nats = torch.zeros(len(runs), 4, dtype=torch.float64, device=device), []
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        model.set_requires_gradient_sync(is_last or model.reduces_each_micro_batch)  # type: ignore[operator]
        model.set_requires_all_reduce(is_last)  # type: ignore[operator]  # among copies of HSDP
        documents = packed_documents(batch.documents)
        loss = model.loss(
            to_device(batch.tokens, device),
            None if documents is None else to_device(documents, device),
        )
        (loss.sum * scale).backward()  # type: ignore[no-untyped-call]
        nats = loss.nats.sum(1)
        sums = torch.cat([to_device(_row_counts(batch.documents), device), nats[:, None]], dim=1)
        indices = torch.tensor([runs.index(run) for run in batch.sources])
        by_run.index_add_(0, to_device(indices, device), sums)
        row_nats.append(nats)
    return by_run, row_nats


def _row_counts(documents: Tensor) -> Tensor:
    """Tokens, targets and visible pairs of each row, float64 (B, 3)."""
    counts = (documents >= 0).sum(1), row_targets(documents), visible_positions(documents).sum(1)
    return torch.stack(counts, dim=1).double()


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Copy to the device without waiting for it.

    The memory is pinned: otherwise the copy waits until the device has done all its work.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


class DeviceClock:
    """Tells how long the device has had nothing to do. On a CPU nothing is queued: always inf."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._end: Any = None

    def mark(self) -> None:
        """What is queued until now is the work to be done."""
        if self._is_cuda:
            self._end = _Event(enable_timing=True)
            self._end.record()

    def idle_seconds(self) -> float:
        """Seconds since the device ended what was queued at the mark, 0 if it has not."""
        if self._end is None:
            return math.inf
        if not self._end.query():
            return 0.0
        now = _Event(enable_timing=True)
        now.record()
        now.synchronize()  # at once: nothing is before it
        return float(self._end.elapsed_time(now)) / 1000
