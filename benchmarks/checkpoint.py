"""Measure how long a checkpoint stops a training: by our process, by a thread, and synchronously.

    python -m benchmarks.checkpoint [--preset 125M] [--saves 4] [--folder DISK]

The stall of a save is the time of the call, in which the state is copied, and by how much the steps
took longer until the checkpoint was complete. In one process, with AdamW; on the GPU if there is
one. The first save also allocates the memory and starts the process.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.optim import Optimizer

from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import writer_of
from trainer.checkpoint_process import ProcessWriter
from trainer.config import PRESETS, CheckpointConfig, ModelConfig, OptimizerConfig
from trainer.model.llama import Transformer
from trainer.model.optim import make_optimizer
from trainer.model.parallel import join_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("process", "thread", "synchronous")


class ThreadWriter(ProcessWriter):
    """What the trainer did before: copies to new memory, and writes in a thread."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged: dict[str, Any] = BlockingAsyncStager().stage(state_dict)
        return staged

    def writer(self, folder: str) -> Any:
        return writer_of(folder)


def make(config: ModelConfig) -> tuple[Transformer, Optimizer]:
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=DEVICE).init_weights(0)
    return model, make_optimizer(model, OptimizerConfig())


def step_seconds(model: Transformer, optimizer: Optimizer, tokens: torch.Tensor) -> float:
    begun = time.perf_counter()
    model.loss(tokens, None).sum.backward()
    optimizer.step()
    optimizer.zero_grad()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(
    kind: str, state: tuple[Transformer, Optimizer], tokens: Any, options: argparse.Namespace
) -> list[Any]:
    """(seconds of the call, seconds by which steps took longer, seconds until complete) by save."""
    config = CheckpointConfig(asynchronous=kind != "synchronous", keep_last=1, keep_best=0)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = Checkpoints(folder, config)
        if kind == "thread":
            checkpoints._writer = ThreadWriter()
        for number in range(options.saves):
            plain = statistics.median(step_seconds(*state, tokens) for _ in range(5))
            begun = time.perf_counter()
            checkpoints.save(number, *state, {})
            call, steps = time.perf_counter() - begun, list[float]()
            while checkpoints._pending is not None and not checkpoints._pending.done():
                steps.append(step_seconds(*state, tokens))
            checkpoints.finish()
            complete = time.perf_counter() - begun
            results.append((call, sum(steps) - plain * len(steps), complete))
        checkpoints.close()
    return results


def main(options: argparse.Namespace) -> None:
    join_ranks(DEVICE)
    state = make(replace(PRESETS[options.preset], vocab_size=32_768))
    tokens = torch.randint(0, 32_768, (options.rows, options.length), device=DEVICE)
    weights = sum(p.numel() for p in state[0].parameters())
    print(f"{options.preset}: {12 * weights / 1e9:.2f} GB of state on {DEVICE}")
    for kind in KINDS:
        for number, (call, slower, complete) in enumerate(measure(kind, state, tokens, options), 1):
            print(
                f"{kind:12} save {number}: call {call * 1e3:7.0f} ms, steps {slower * 1e3:+7.0f} ms, "
                f"complete after {complete:5.1f} s",
                flush=True,
            )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", choices=PRESETS, default="125M")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
