"""Step 4 of a row's way to the loss: the gradients of a global batch.

It needs only torch, so that a benchmark can run it alone. The batches come from `data.loader`; the
loss is computed by `llama.Transformer.loss`; `loop` makes the update.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from trainer.config import TrainConfig
from trainer.model.llama import Transformer
from trainer.model.optim import make_optimizer
from trainer.model.packing import num_targets, packed_documents, row_targets
from trainer.model.parallel import make_mesh, parallelize, sum_over_ranks

if TYPE_CHECKING:
    from trainer.data.rows import Batch


class StepSums(NamedTuple):
    """Sums of a step.

    `by_run` has tokens without fill, targets and nats of each run over all ranks, float64 (runs,
    3); `row_nats` are this rank's by micro-batch, (micro_batch_rows,) each.
    """

    by_run: Tensor
    row_nats: list[Tensor]


def build(config: TrainConfig, device: str) -> tuple[Transformer, Optimizer]:
    """The model, sharded and initialized from the seed, and its optimizer.

    Where `model.init` names a checkpoint, `load_pretrained` sets the weights afterwards.
    """
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config.parallel, make_mesh(config.parallel, device=device))
    model.to_empty(device=device)
    if not config.model.init:
        model.init_weights(config.seed)
    return model, make_optimizer(model, config.optimizer)


def accumulate(
    model: Transformer, batches: "Sequence[Batch]", runs: Sequence[str], *, device: str
) -> StepSums:
    """Compute the gradients of the global batch's mean loss from this rank's part of it.

    `runs` are all sources that the batches may come from. Collective; does not wait for the device.
    FSDP averages gradients over ranks, so each rank's sum is scaled by their number.
    """
    targets = sum_over_ranks(sum(num_targets(batch.documents) for batch in batches), device=device)
    scale = (dist.get_world_size() / targets.clamp(min=1)).float().squeeze()
    by_run, row_nats = torch.zeros(len(runs), 3, dtype=torch.float64, device=device), []
    for number, batch in enumerate(batches):
        model.set_requires_gradient_sync(number == len(batches) - 1)  # type: ignore[operator]
        documents = packed_documents(batch.documents)
        loss = model.loss(
            to_device(batch.tokens, device),
            None if documents is None else to_device(documents, device),
        )
        (loss.sum * scale).backward()  # type: ignore[no-untyped-call]
        counts = torch.stack([(batch.documents >= 0).sum(1), row_targets(batch.documents)], dim=1)
        sums = torch.cat([to_device(counts, device).double(), loss.rows[:, None]], dim=1)
        indices = torch.tensor([runs.index(run) for run in batch.sources])
        by_run.index_add_(0, to_device(indices, device), sums)
        row_nats.append(loss.rows)
    dist.all_reduce(by_run)
    return StepSums(by_run, row_nats)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """Copy to the device without waiting for it.

    The memory is pinned: otherwise the copy waits until the device has done all its work.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor
