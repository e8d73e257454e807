"""Measure the trainer's speed: tokens/s of a GPU, MFU and memory, compared with plain torch.

    python -m benchmarks.trainer [--quick] [--only 1B 3B] [--parts bare attention loader] …
    torchrun --nproc-per-node 8 -m benchmarks.trainer --rows 8 --checkpointing none …

A step is the loop's: `accumulate`, clipping, reading the loss, the update (BF16, AdamW). It needs
torch, NumPy and pydantic; the part `loader` needs the full installation. MFU is PaLM's
(`flops_per_token`), which counts attention in full even if rows are packed.

speed      always: our step on whole rows, with the least activation checkpointing that fits, and as
           many rows as fit
bare       the same layers without FSDP, with weights, gradients and AdamW in BF16 and cross-entropy
           of all logits at once: an upper bound
attention  rows of several documents, by SDPA with a mask and by FlexAttention; whole rows by other
           kernels than those torch prefers
loader     the share of time that waits for data: a generation on the local disk against rows in
           memory
"""

import argparse
import gc
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.compiler.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from trainer.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
)
from trainer.model.llama import INIT_STD, Transformer, flops_per_token
from trainer.model.optim import make_optimizer
from trainer.model.packing import IGNORE, next_tokens
from trainer.model.parallel import (
    clip_grad_norm,
    join_ranks,
    make_mesh,
    parallelize,
    sum_over_ranks,
)
from trainer.model.step import accumulate
from trainer.telemetry.devices import peak_flops
from trainer.telemetry.meter import Meter, mfu

PEERS = """published, other hardware: llm-foundry on 8 to 16 H100 80 GB, BF16, 2048 tokens a row
(scripts/train/benchmarking)
  1.3B 45,455 tokens/s/GPU  MFU 41.8 %
  2.7B 24,142 tokens/s/GPU  MFU 43.7 %
  6.7B 10,643 tokens/s/GPU  MFU 46.4 %"""
PARTS = ("bare", "attention", "loader")
# of a micro-batch at the start, about what fits in 140 GB; others 32,768
MICRO_TOKENS = {"3B": 16_384, "8B": 4096}
# of a micro-batch: below it, recomputing activations is the better way to save memory
LEAST_TOKENS = 4096
# of a document on average, about a web page's main text; lengths are geometrically distributed
DOCUMENT_TOKENS = 700
WARM_UP = 2  # steps, which compile and allocate
KERNELS = {
    "cuDNN": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH],
}


class Rows(NamedTuple):
    """A micro-batch like trainer.data.rows.Batch, whose module needs the full installation."""

    tokens: Tensor
    documents: Tensor
    sources: list[str]


@dataclass(frozen=True)
class Case:
    """What to measure: `micro` micro-batches of `rows` rows per step on each GPU.

    Rows have documents of `document_tokens` tokens on average; 0 is one document without fill.
    """

    model: ModelConfig
    parallel: ParallelConfig
    device: str
    steps: int
    seq_len: int
    rows: int
    micro: int
    document_tokens: int = 0


class Speed(NamedTuple):
    """Result of a case: tokens/s of a GPU, share of time waiting for data, peak memory."""

    case: Case
    tokens_per_second: float
    wait_share: float
    peak_bytes: int


Draw = Callable[[int], Sequence[Any]]  # a step's micro-batches, by its number
Step = Callable[[Transformer, Optimizer, Sequence[Any], str], None]


def measure(case: Case, step: Step, draw: Draw) -> Speed:
    """Time the steps of a new model."""
    clear()
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model, optimizer = make(case, wrapped=step is our_step)
    for number in range(WARM_UP):
        step(model, optimizer, draw(number), case.device)
    wait_for(case.device)
    meter = Meter(window=case.steps)
    for number in range(WARM_UP, WARM_UP + case.steps):
        with meter.part("data_wait"):
            batches = draw(number)
        step(model, optimizer, batches, case.device)
        meter.step(tokens=sum(batch.tokens.numel() for batch in batches))
    wait_for(case.device)  # for the last update: rates are of all time until they are asked for
    rates = meter.rates()
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Speed(case, rates.tokens_per_second or 0.0, rates.data_wait_share or 0.0, peak_bytes)


def our_step(model: Transformer, optimizer: Optimizer, batches: Sequence[Any], device: str) -> None:
    """As in trainer.loop: it reads loss and norm before the update, which waits for the device."""
    sums = accumulate(model, batches, batches[0].sources[:1], device=device)
    norm = clip_grad_norm(model.parameters(), 1.0)
    torch.cat([sums.by_run.flatten(), norm.double().reshape(1)]).tolist()
    optimizer.step()
    optimizer.zero_grad()


def bare_step(
    model: Transformer, optimizer: Optimizer, batches: Sequence[Any], device: str
) -> None:
    """Whole rows only."""
    for batch in batches:
        tokens = batch.tokens.to(device)
        logits = model(tokens, None).flatten(0, 1).float()
        (
            F.cross_entropy(logits, next_tokens(tokens, None).flatten(), ignore_index=IGNORE)
            / len(batches)
        ).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()


def make(case: Case, *, wrapped: bool) -> tuple[Transformer, Optimizer]:
    """Like trainer.model.step.build, but weights are drawn on the device.

    Weights from the seed take 10 s per billion. They are random, because with zeros a GPU draws
    less power and runs faster than it does in training.
    """
    with torch.device("meta"):
        model = Transformer(case.model)
    if wrapped:
        parallelize(model, case.parallel, make_mesh(case.parallel, device=case.device))
    else:
        model.to(torch.bfloat16)
        for block in model.blocks if case.parallel.compile else ():
            block.compile()
    model.to_empty(device=case.device)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if wrapped else parameter
            _ = local.normal_(std=INIT_STD) if parameter.ndim > 1 else local.fill_(1.0)
    return model, make_optimizer(model, OptimizerConfig())


def in_memory(case: Case) -> Draw:
    """Random tokens, the same at each step."""
    rng, shape = np.random.default_rng(dist.get_rank()), (case.micro, case.rows, case.seq_len)
    begins = rng.random(shape) < (1 / case.document_tokens if case.document_tokens else 0)
    begins[..., 0] = False  # the first document of a row is number 0
    tokens = torch.from_numpy(rng.integers(0, case.model.vocab_size, shape))
    documents = torch.from_numpy(begins.cumsum(-1))
    batches = [Rows(*both, ["memory"] * case.rows) for both in zip(tokens, documents, strict=True)]
    return lambda number: batches


def fitting(case: Case, step: Step, *, least_rows: int = 1) -> Speed | None:
    """Measure with as many rows as fit: halved while memory runs out, None below `least_rows`.

    A step keeps its tokens. OutOfMemoryError with several ranks, since other ranks may have had
    enough memory and wait.
    """
    while case.rows >= least_rows:
        try:
            return measure(case, step, in_memory(case))
        except torch.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise
        case = replace(case, rows=case.rows // 2, micro=case.micro * 2)
    return None


def clear() -> None:
    """Free the last model, also after an error, and forget what was compiled.

    Sizes that change between calls would be compiled as dynamic, which is slower.
    """
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device: str) -> None:
    """Wait for all ranks and their devices."""
    sum_over_ranks(0.0, device=device)
    if device == "cuda":
        torch.cuda.synchronize()


# --- parts ----------------------------------------------------------------------------------------


def bench(
    label: str, case: Case, *, checkpointing: Sequence[Any], least_rows: int, parts: Sequence[str]
) -> None:
    """The lines of one model, length and way to run."""
    for kind in checkpointing:
        case = replace(case, parallel=replace(case.parallel, activation_checkpointing=kind))
        if speed := fitting(case, our_step, least_rows=least_rows):
            break
    else:
        return say(f"{label}: does not fit")
    say(line(label, speed))
    if "bare" in parts:
        plain = replace(
            speed.case, parallel=replace(case.parallel, activation_checkpointing="none")
        )
        compare(f"{label}, bare", plain, bare_step, speed)
    if "attention" in parts:
        attention(label, speed)
    if "loader" in parts:
        loader(label, speed)


def attention(label: str, speed: Speed) -> None:
    packed = replace(speed.case, document_tokens=min(DOCUMENT_TOKENS, speed.case.seq_len // 4))
    name = f"{label}, documents of {packed.document_tokens} tokens"
    compare(f"{name}, sdpa", packed, our_step, speed)
    if packed.device == "cuda":  # FlexAttention has no backward pass on CPUs
        compare(
            f"{name}, flex",
            replace(packed, model=replace(packed.model, attention="flex")),
            our_step,
            speed,
        )
    for name, kernels in KERNELS.items() if packed.device == "cuda" else ():
        # torch's caches on disk do not tell kernels apart (pytorch issue 185449)
        with (
            sdpa_kernel(kernels, set_priority=True),
            torch.compiler.config.patch(force_disable_caches=True),
        ):
            compare(f"{label}, {name} first", speed.case, our_step, speed)


def compare(label: str, case: Case, step: Step, ours: Speed) -> None:
    try:
        found = fitting(case, step)
    except RuntimeError as error:
        if dist.get_world_size() > 1:
            raise
        # a kernel that this torch or GPU lacks is not the end of an hour's run
        return say(f"{label}: failed, {error!r:.300}")
    say(f"{label}: does not fit" if found is None else line(label, found, ours))


def line(label: str, speed: Speed, ours: Speed | None = None) -> str:
    """What a case gave, and its ratio to `ours`."""
    case, name = speed.case, torch.cuda.get_device_name() if speed.case.device == "cuda" else ""
    with torch.device("meta"):
        model = Transformer(case.model)
    used = mfu(
        speed.tokens_per_second,
        flops_per_token=flops_per_token(model, case.seq_len),
        peak=peak_flops(name),
    )
    shown = "unknown" if used is None else f"{used:.1%}"
    seconds = case.rows * case.micro * case.seq_len / speed.tokens_per_second
    memory = f"{speed.peak_bytes / 2**30:.1f} GiB" if speed.peak_bytes else "memory unknown"
    ratio = (
        f"  {speed.tokens_per_second / ours.tokens_per_second:.3f} of ours on whole rows"
        if ours
        else ""
    )
    shape = f"{case.rows} rows x {case.micro} micro-batches"
    how = f"{shape}, {case.parallel.activation_checkpointing}, {seconds:.3f} s a step, {memory}"
    return f"{label}: {speed.tokens_per_second:,.0f} tokens/s/GPU  MFU {shown}  ({how}){ratio}"


def loader(label: str, speed: Speed) -> None:
    """Whole rows from the trainer's loader: a generation just written, so from the page cache."""
    from trainer.data.loader import BatchLoader

    case, batch = speed.case, speed.case.rows * speed.case.micro
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder), case, rows=batch * (WARM_UP + case.steps))
        config = DataConfig(
            (SourceConfig(folder),), global_batch_rows=batch, micro_batch_rows=case.rows
        )
        with BatchLoader(config, rank=0, world_size=1) as batches:
            read = measure(case, our_step, batches.next)
    say(line(f"{label}, from disk", read, speed))
    say(
        f"{label}: waits for data {read.wait_share:.3%} of the time from disk, "
        f"{speed.wait_share:.3%} from memory"
    )


def publish(run: Path, case: Case, *, rows: int) -> None:
    """A generation of one shard of random whole rows, and the catalog that lists it, as the
    pipeline would leave them.
    """
    from stages.formats import mds

    folder, rng = run / "generations" / "gen-0001", np.random.default_rng(0)
    columns = mds.columns_of_rows(case.seq_len)
    with mds.MDSWriter(folder, columns=columns, size_limit=(1 << 32) - 1) as writer:
        for tokens in rng.integers(0, case.model.vocab_size, (rows, case.seq_len), np.uint32):
            writer.write({"tokens": tokens, "spans": np.array([case.seq_len], np.uint32)})
    name = mds.read_index(folder)["shards"][0]["raw_data"]["basename"]
    data = (folder / name).read_bytes()
    shard = {
        "basename": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": rows,
    }
    shape = {
        "rows": rows,
        "tokens": rows * case.seq_len,
        "seq_len": case.seq_len,
        "tokenizer": "none",
    }
    text = json.dumps({"name": folder.name, **shape, "shards": [shard]})
    (folder / "manifest.json").write_text(text)
    entry = {"name": folder.name, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (run / "catalog.jsonl").write_text(json.dumps(entry) + "\n")


# --- command line ---------------------------------------------------------------------------------


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse(arguments: Sequence[str] | None, *, gpu: bool) -> argparse.Namespace:
    """The options; what is left open goes by `quick`, and by whether there is a GPU."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.trainer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="1B and 3B, compiled, speed alone, few steps"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PRESETS, help="presets; 8B is measured only when named"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens a row")
    parser.add_argument("--compile", nargs="+", choices=("on", "off"))
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=("none", "selective", "full"),
        help="tried in this order",
    )
    parser.add_argument(
        "--rows", type=int, help="of a micro-batch; else tried, halving while memory runs out"
    )
    parser.add_argument("--micro", type=int, help="micro-batches a step")
    parser.add_argument("--steps", type=int, help="timed steps")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="what to measure beside speed")
    defaults = {
        "only": ["125M", "350M", "1B", "3B"],
        "lengths": [2048, 4096],
        "compile": ["on", "off"],
        "parts": list(PARTS),
    }
    defaults |= {"checkpointing": ["none", "selective", "full"], "rows": 0, "micro": 4, "steps": 10}
    options = parser.parse_args(arguments)
    if options.quick:
        defaults |= {"only": ["1B", "3B"], "compile": ["on"], "parts": [], "micro": 2, "steps": 5}
    if not gpu:
        defaults |= {"only": ["tiny"], "compile": ["off"], "lengths": [32], "micro": 2, "steps": 2}
    options = argparse.Namespace(
        **defaults | {name: value for name, value in vars(options).items() if value is not None}
    )
    if (
        min(
            options.rows,
            *(number - 1 for number in (options.micro, options.steps, *options.lengths)),
        )
        < 0
    ):
        parser.error("lengths, micro and steps are 1 at least, rows 0 (to be tried) or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines of every model, compiled or not, and length."""
    gpu = torch.cuda.is_available()
    options = parse(arguments, gpu=gpu)
    device = "cuda" if gpu else "cpu"
    join_ranks(device)
    name = torch.cuda.get_device_name() if gpu else "no GPU: sizes cut down, MFU unknown"
    say(f"torch {torch.__version__}, {dist.get_world_size()} ranks, {name}\n{PEERS}")
    missing = [name for name in ("streaming", "xxhash", "zstandard") if find_spec(name) is None]
    if "loader" in options.parts and (missing or dist.get_world_size() > 1):
        say(f"loader: skipped, it needs {', '.join(missing) or 'a single rank'}")
        options.parts = [part for part in options.parts if part != "loader"]
    for name, compiled, seq_len in itertools.product(
        options.only, options.compile, options.lengths
    ):
        model = PRESETS[name] if gpu else replace(PRESETS[name], vocab_size=512)
        rows = options.rows or max(1, (MICRO_TOKENS.get(name, 32_768) if gpu else 128) // seq_len)
        case = Case(
            model,
            ParallelConfig(compile=compiled == "on"),
            device,
            options.steps,
            seq_len,
            rows,
            options.micro,
        )
        least = rows if options.rows else min(rows, max(1, LEAST_TOKENS // seq_len))
        label = f"{name} {seq_len}{' compiled' if compiled == 'on' else ''}"
        bench(
            label, case, checkpointing=options.checkpointing, least_rows=least, parts=options.parts
        )


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
