"""What the trainer does on GPUs, without one: operators, graphs, collectives, waits and memory.

    tools/fake_gpu/run.sh PYTHON -m benchmarks.cuda [--presets 125M 1B] [--ranks N] …

PYTHON has the CUDA build of torch, NumPy and pydantic. The steps are the trainer's own (`build`,
`queue_gradients`, `queue_update`), traced with tensors that have no values (FakeTensorMode) in a
process group that sends nothing, as rank 0 of N. That shows what would be launched and allocated on
an H200, and says nothing about numerics, NCCL, kernels or speed.

graphs    of torch.compile, as rows with other documents come: which attention, breaks, recompiles
kernels   that Inductor makes of them for sm_90
step      collectives of a step by kind, and each place where Python would wait for the GPU
memory    peak of a step in GiB, by torch's tracker for FSDP, with whole rows by SDPA: FlexAttention
          keeps the same tensors, and runs only where it is compiled
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.trainer import DOCUMENT_TOKENS, Rows, draw_documents
from trainer.config import PRESETS, OptimizerConfig, ParallelConfig, TrainConfig
from trainer.model import parallel, step
from trainer.model.llama import Transformer

SEQ_LEN = 2048
PARTS = ("graphs", "kernels", "step", "memory")


@dataclass(frozen=True)
class Case:
    """A model of one preset on rank 0 of `ranks`, in `micro` micro-batches of `rows` rows a step."""

    preset: str
    ranks: int = 1
    rows: int = 4
    micro: int = 2
    layers: int = 0  # fewer than the preset's, if not 0
    attention: str = "auto"
    checkpointing: str = "none"
    optimizer: str = "adamw"
    reduction: str = "auto"

    def config(self, *, compile: bool) -> TrainConfig:
        """The settings of the training."""
        model = PRESETS[self.preset]
        return TrainConfig(
            directory="none",
            model=replace(
                model, num_layers=self.layers or model.num_layers, attention=self.attention
            ),
            parallel=ParallelConfig(
                compile=compile,
                activation_checkpointing=self.checkpointing,
                gradient_reduction=self.reduction,
            ),
            optimizer=OptimizerConfig(name=self.optimizer),
        )

    def batches(self, number: int) -> list[Rows]:
        """The micro-batches of a step: other documents in each, and whole rows in every other."""
        with unset_fake_temporarily():
            return self._batches(number)

    def _batches(self, number: int) -> list[Rows]:
        rng, shape = np.random.default_rng(number), (self.rows, SEQ_LEN)
        means = [0, DOCUMENT_TOKENS // (1 + number)]
        documents = [draw_documents(rng, shape, means[micro % 2]) for micro in range(self.micro)]
        tokens, sources = torch.zeros(shape, dtype=torch.int64), ["run"] * self.rows
        return [Rows(tokens, torch.from_numpy(ids), sources) for ids in documents]


def build(config: TrainConfig) -> tuple[Transformer, Any]:
    """As `step.build`, without drawing weights: they have no values here."""
    with patch.object(Transformer, "init_weights", lambda *_: None):
        return step.build(config, "cuda")


def take_step(model: Transformer, optimizer: Any, batches: Sequence[Rows]) -> None:
    """A step of the loop, except that nobody reads its figures."""
    figures = step.queue_gradients(model, batches, ["run"], device="cuda", clip_norm=1.0)
    step.queue_update(optimizer, figures)


@contextmanager
def fake_gpu(ranks: int) -> Iterator[None]:
    """A process group that sends nothing, and tensors without values on the device. What the loader
    hands out is real: the trainer looks at it on the CPU.
    """

    def on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **options)

        return call

    def to_device(tensor: Tensor, device: str) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    names = ("make_mesh", "parallelize", "num_targets", "packed_documents", "_row_counts")
    patches = [patch.object(step, name, on_real_tensors(getattr(step, name))) for name in names]
    patches.append(patch.object(step, "to_device", to_device))
    torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    for each in patches:
        each.start()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for each in patches:
            each.stop()
        dist.destroy_process_group()


# --- graphs ---------------------------------------------------------------------------------------


def graphs(case: Case) -> dict[str, Any]:
    """What torch.compile captures over three steps of different documents and an evaluation."""
    captured: list[Counter[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        captured.append(Counter(name for name in names if re.search("attention|repeat", name)))
        return graph.forward

    counted = _compiled_steps(case, keep, keep, steps=3)
    return counted | {"graphs": len(captured), "attention": dict(sum(captured, Counter()))}


def kernels(case: Case) -> dict[str, Any]:
    """How many Triton kernels Inductor makes of each graph, compiled for the H200's sm_90."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    made: list[dict[str, int]] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, *, is_backward: bool) -> Any:
        code = getattr(compile_fx_inner(graph, inputs, is_backward=is_backward), "source_code", "")
        names = {"triton": r"async_compile\.triton\(", "flex": r"def \w*flex_attention\w*\("}
        made.append({name: len(re.findall(pattern, code)) for name, pattern in names.items()})
        return graph.forward

    ends = (partial(compile_graph, is_backward=backward) for backward in (False, True))
    # in this process: others would not have the fake device
    with config.patch(compile_threads=1, fx_graph_cache=False):
        return _compiled_steps(case, *ends, steps=1) | {"kernels": made}


def _compiled_steps(
    case: Case, forward: Callable[..., Any], backward: Callable[..., Any], *, steps: int
) -> dict[str, Any]:
    """Steps whose graphs are given to these compilers; how many there were, and graph breaks."""
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    counters.clear()
    compile = torch.compile
    with (
        patch.object(torch, "compile", lambda f, **options: compile(f, backend=backend, **options)),
        fake_gpu(case.ranks),
    ):
        model, optimizer = build(case.config(compile=True))
        for number in range(steps):
            take_step(model, optimizer, case.batches(number))
        with torch.no_grad():  # an evaluation
            tokens, documents, _ = case.batches(steps)[-1]
            model.loss(*(step.to_device(part, "cuda") for part in (tokens, documents)))
    return {
        "compiled": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


# --- operators ------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts collectives, and operators for which Python waits until the GPU has done its work."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.waits = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # first DTensor's own handling, whose operators come here
        kwargs, name = kwargs or {}, str(op)
        if "c10d" in name and "wait" not in name:
            self.collectives[name.split(".")[1].rstrip("_")] += 1
        tensors = [value for value in args if isinstance(value, Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if on_gpu and re.search(r"_local_scalar_dense|nonzero|masked_select|is_nonzero", name):
            self.waits[name] += 1
        if re.search(r"aten\.(_to_copy|copy_|_copy_from)", name) and self._crosses(tensors, kwargs):
            is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            self.waits[name] += not is_asynchronous
        return op(*args, **kwargs)

    def _crosses(self, tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
        kinds = {tensor.device.type for tensor in tensors}
        if "device" in kwargs:
            kinds.add(torch.device(kwargs["device"]).type)
        return len(kinds) > 1


def operators(case: Case) -> dict[str, Any]:
    """Collectives and waits of the second step: the first one also creates the optimizer's state."""
    with (
        # a compiled kernel is not traced under a dispatch mode
        patch("trainer.model.attention.compiled", lambda function: function),
        fake_gpu(case.ranks),
    ):
        model, optimizer = build(case.config(compile=False))
        take_step(model, optimizer, case.batches(0))
        with Operators() as seen:
            take_step(model, optimizer, case.batches(1))
        reduces_each = model.reduces_each_micro_batch
    return {
        "collectives": dict(seen.collectives),
        "waits": {name: count for name, count in seen.waits.items() if count},
        "reduces_each_micro_batch": reduces_each,
    }


# --- memory ---------------------------------------------------------------------------------------


def memory(case: Case) -> dict[str, Any]:
    """Peak memory of two steps in GiB, and what of it is of which kind."""
    whole = [
        batch._replace(documents=torch.zeros_like(batch.documents)) for batch in case.batches(0)
    ]
    # the tracker watches `forward`, and must see the root's inputs: the loss is ours
    with (
        patch.object(Transformer, "forward", Transformer.loss),
        patch.object(parallel, "_shard_again_after_evaluation", lambda model: None),
        patch.object(step, "visible_positions", lambda documents: documents),
        fake_gpu(case.ranks),
    ):
        model, optimizer = build(replace(case, attention="sdpa").config(compile=False))
        tracker = FSDPMemTracker(model, optimizer)

        def loss(*inputs: Any) -> Any:
            tracker.reset_mod_stats()  # else it refuses a second micro-batch
            return model(*inputs)

        model.loss = loss  # type: ignore[method-assign]
        with tracker:
            for _ in range(2):
                take_step(model, optimizer, whole)
        peak = next(
            kinds
            for device, kinds in tracker.get_tracker_snapshot("peak").items()
            if device.type == "cuda"
        )
    gib = {str(kind).rpartition(".")[2].lower(): value / 2**30 for kind, value in peak.items()}
    return {name: round(value, 1) for name, value in gib.items() if value > 0.05}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line of JSON per preset and part."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["125M"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--layers", type=int, default=0, help="of the preset's; 0 for all")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex"), default="auto")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--reduction", default="auto", help="parallel.gradient_reduction")
    options = vars(parser.parse_args(arguments))
    parts, presets = options.pop("parts"), options.pop("presets")
    measures = {"graphs": graphs, "kernels": kernels, "step": operators, "memory": memory}
    for preset in presets:
        for part in parts:
            found = measures[part](Case(preset, **options))
            print(json.dumps({"part": part, "preset": preset, **options, **found}), flush=True)


if __name__ == "__main__":
    main()
