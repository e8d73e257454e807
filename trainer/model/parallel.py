"""Apply FSDP2, activation checkpointing and compilation to a plain model; sums over ranks."""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from trainer.config import ParallelConfig
from trainer.model.llama import Transformer
from trainer.model.loss import Loss


def join_ranks(device: str, *, timeout_seconds: float = 600.0) -> None:
    """Join the process group of torchrun's environment, or start a group of one rank.

    If Ray or a test has already joined one, only ties it to this rank's GPU. `device` is "cpu" or
    "cuda". One rank runs the same code as many: FSDP over a group of one costs almost nothing.
    """
    options: dict[str, Any] = {}
    if device == "cuda":
        gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if dist.is_initialized():
            gpu = torch.device("cuda", torch.cuda.current_device())
            assert dist.group.WORLD is not None
            dist.group.WORLD.bound_device_id = gpu
        torch.cuda.set_device(gpu)
        options["device_id"] = gpu
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(
        backend_of(device), timeout=timedelta(seconds=timeout_seconds), **options
    )


def backend_of(device: str) -> str:
    """The backend of torch.distributed; on GPUs also gloo, for what ranks agree on on CPUs."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def make_mesh(config: ParallelConfig, *, device: str) -> DeviceMesh:
    """A mesh of one dimension, "shard", or for HSDP of two, "replicate" and "shard".

    Neighboring ranks share a copy of the model. ValueError if `shard_size` does not divide the
    number of ranks.
    """
    ranks = dist.get_world_size()
    size = config.shard_size or ranks
    if ranks % size:
        raise ValueError(
            f"parallel.shard_size {size} does not divide {ranks} ranks; "
            "set it to 0 or to the GPUs of a node"
        )
    if size == ranks:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


def parallelize(model: Transformer, config: ParallelConfig, mesh: DeviceMesh) -> Transformer:
    """Checkpoint, compile and shard each block, then shard the rest, in place.

    `model` may be on the meta device. Weights, accumulated gradients and their reduction are
    float32; with "bf16" blocks compute in bfloat16, from a copy that each all-gather makes. Order
    matters: compilation sees the checkpoint, FSDP's hooks stay outside of both. Create the
    optimizer afterwards: it must hold the sharded parameters. Gradients are averaged over ranks, so
    scale the loss by their number.
    """
    compiled = compiles(config, mesh.device_type)
    for block in model.blocks:
        _wrap_forward(block, config.activation_checkpointing, compiled=compiled)
    if compiled:
        model.loss_and_gradient = _compiled(model.loss_and_gradient)
    model.reduces_each_micro_batch = _reduces_each_micro_batch(model, config, mesh.device_type)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    # inputs are not cast: the tables of the rotary embedding must stay float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")
    _shard_again_after_evaluation(model)
    return model


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to `max_norm` (0: never); the global norm before that, 0-dim.

    Collective; does not sync with the GPU. Gradients are not finite if the norm is not: check it
    before the optimizer's step.
    """
    parameters = list(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def sum_over_ranks(*values: Tensor | float, device: str | torch.device = "cpu") -> Tensor:
    """Sums of 0-dim tensors or numbers over all ranks, float64 (len(values),); does not sync."""
    total = torch.stack([_scalar(value, device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def _scalar(value: Tensor | float, device: str | torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    # by a kernel: a copy of a Python number would wait for the GPU
    return torch.full((), value, dtype=torch.float64, device=device)


# expensive to compute again; norms, rotations and the product of SwiGLU are not
_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def compiles(config: ParallelConfig, device: str) -> bool:
    """Whether blocks and loss are compiled: on GPUs unless the config says otherwise."""
    return device == "cuda" if config.compile == "auto" else config.compile


def _compiled(function: Callable[..., Any]) -> Any:
    """torch.compile of what has one shape and no graph breaks; another shape is another graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


# of a GPU's memory: unsharded gradients above it are reduced after each micro-batch. With 140 GiB
# these are those of 3.5 billion parameters
MOST_GRADIENTS = 0.1


def _reduces_each_micro_batch(model: nn.Module, config: ParallelConfig, device: str) -> bool:
    """Whether gradients are reduced after each micro-batch, and not after the last alone.

    Reduced once, they are exchanged once, but each rank keeps all of them in between, in float32:
    of 8 billion parameters on 8 ranks 29.1 GiB instead of 3.6.
    """
    if config.gradient_reduction != "auto":
        return config.gradient_reduction == "each_micro_batch"
    if device != "cuda":
        return False
    unsharded_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    memory = torch.cuda.get_device_properties().total_memory
    # GPUs may differ, and all ranks have to exchange alike
    return bool(sum_over_ranks(float(unsharded_bytes > MOST_GRADIENTS * memory)) > 0)


def _wrap_forward(block: nn.Module, checkpointing: str, *, compiled: bool) -> None:
    """Replace `block.forward`, not the block: names stay, and FSDP's hooks stay outside."""
    if checkpointing != "none":
        options: dict[str, Any] = {}
        if checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matmuls)
        # nothing in a block draws random numbers
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options
        )
    if compiled:
        block.forward = _compiled(block.forward)


def _shard_again_after_evaluation(model: Transformer) -> None:
    """Free the gathered weights outside of blocks if no backward pass will.

    FSDP keeps the root's from forward to backward. Without a backward pass `parameters()` would
    still name the gathered copies, and what the optimizer or a checkpoint writes would not reach
    them.
    """

    def shard(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            model.reshard()  # type: ignore[operator]

    def loss(tokens: Tensor, documents: Tensor | None) -> Loss:
        result = model_loss(tokens, documents)
        shard(model, (), result.sum)
        return result

    model_loss = model.loss
    model.loss = loss  # type: ignore[method-assign]
    model.register_forward_hook(shard)
