"""Measure the trainer's speed: tokens/s of a GPU, MFU and memory, compared with plain torch.

    python -m benchmarks.trainer --out FILE [--only 1B 3B] [--parts bare attention loader] …
    torchrun --nproc-per-node 8 -m benchmarks.trainer --rows 8 --checkpointing none …

A step is the loop's (BF16, AdamW): `queue_gradients`, reading the figures of the step before,
`queue_update`. It needs torch, NumPy and pydantic; the part `loader` needs the full installation.
Rows are packed with documents of a web page's length unless a line says "whole rows". MFU counts
attention within documents (`flops_per_token`), and in brackets as PaLM does. The most telling lines
come first; what does not fit in `--minutes` is left out and named.

speed      always: our step on packed rows, with the least activation checkpointing that fits, and
           as many rows as fit
whole      rows of one document each
bare       whole rows through the same layers by SDPA without FSDP, with weights, gradients and
           AdamW in BF16 and cross-entropy of all logits at once: an upper bound
attention  packed rows by SDPA with a dense mask; whole rows by the kernels of SDPA
loader     the share of time that waits for data: a generation on the local disk against rows in
           memory
"""

import argparse
import gc
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from trainer.model.packing import IGNORE, next_tokens, visible_positions
from trainer.model.parallel import compiles, join_ranks, make_mesh, parallelize, sum_over_ranks
from trainer.model.step import (
    DeviceClock,
    StepFigures,
    queue_gradients,
    queue_update,
)
from trainer.telemetry.devices import peak_flops
from trainer.telemetry.meter import Meter, mfu

PEERS = """published, other hardware: llm-foundry on 8 to 16 H100 80 GB, BF16, 2048 tokens a row
(scripts/train/benchmarking)
  1.3B 45,455 tokens/s/GPU  MFU 41.8 %
  2.7B 24,142 tokens/s/GPU  MFU 43.7 %
  6.7B 10,643 tokens/s/GPU  MFU 46.4 %"""
PARTS = ("whole", "bare", "attention", "loader")
# of a micro-batch at the start, about what fits in 140 GB; others 32,768
MICRO_TOKENS = {"3B": 16_384, "8B": 4096}
# tried in this order; weights, gradients and moments of 8B take 120 GB alone
CHECKPOINTING = {"8B": ["full"]}
# of a micro-batch: below it, recomputing activations is the better way to save memory
LEAST_TOKENS = 4096
# of a document on average, about a web page's main text; lengths are geometrically distributed
DOCUMENT_TOKENS = 700
WARM_UP = 2  # steps, which compile and allocate
KERNELS = {  # of SDPA, for whole rows
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
    """Result of a case: tokens/s of a GPU, positions that a token sees, share of time waiting for
    data, peak memory.
    """

    case: Case
    tokens_per_second: float
    context: float
    wait_share: float
    peak_bytes: int


Draw = Callable[[int], Sequence[Any]]  # a step's micro-batches, by its number
Step = Callable[[Transformer, Optimizer, Sequence[Any], str], None]


def measure(case: Case, make_step: Callable[[], Step], draw: Draw) -> Speed:
    """Time the steps of a new model."""
    clear()
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step, clock = make_step(), DeviceClock(case.device)
    model, optimizer = make(case, wrapped=make_step is OurStep)
    for number in range(WARM_UP):
        step(model, optimizer, draw(number), case.device)
    wait_for(case.device)
    meter = Meter(window=case.steps)
    for number in range(WARM_UP, WARM_UP + case.steps):
        begin = time.perf_counter()
        with meter.part("data_wait"):
            batches = draw(number)
        meter.move(time.perf_counter() - begin - clock.idle_seconds(), "data_wait", "compute")
        step(model, optimizer, batches, case.device)
        clock.mark()
        tokens = sum(batch.tokens.numel() for batch in batches)
        pairs = sum(int(visible_positions(batch.documents).sum()) for batch in batches)
        meter.step(tokens=tokens, pairs=pairs)
    wait_for(case.device)  # for the last update: rates are of all time until they are asked for
    rates = meter.rates()
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Speed(
        case,
        rates.tokens_per_second or 0.0,
        rates.mean_context or 0.0,
        rates.data_wait_share or 0.0,
        peak_bytes,
    )


class OurStep:
    """As in trainer.loop: it reads the figures of the step before while the device works."""

    def __init__(self) -> None:
        self._queued: StepFigures | None = None

    def __call__(
        self, model: Transformer, optimizer: Optimizer, batches: Sequence[Any], device: str
    ) -> None:
        runs = batches[0].sources[:1]
        figures = queue_gradients(model, batches, runs, device=device, clip_norm=1.0)
        if self._queued:
            self._queued.read()
        queue_update(optimizer, figures)
        self._queued = figures


def bare() -> Step:
    """Whole rows only."""
    return _bare_step


def _bare_step(
    model: Transformer, optimizer: Optimizer, batches: Sequence[Any], device: str
) -> None:
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
        for block in model.blocks if compiles(case.parallel, case.device) else ():
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
    tokens = torch.from_numpy(rng.integers(0, case.model.vocab_size, shape))
    documents = torch.from_numpy(draw_documents(rng, shape, case.document_tokens))
    batches = [Rows(*both, ["memory"] * case.rows) for both in zip(tokens, documents, strict=True)]
    return lambda number: batches


def draw_documents(rng: np.random.Generator, shape: tuple[int, ...], mean: int) -> Any:
    """Numbers of documents along rows, of `mean` tokens on average; 0 is one document a row."""
    begins = rng.random(shape) < (1 / mean if mean else 0)
    begins[..., 0] = False  # the first document of a row is number 0
    return begins.cumsum(-1)


def fitting(case: Case, step: Callable[[], Step], *, least_rows: int = 1) -> Speed | None:
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


def bench(label: str, case: Case, *, checkpointing: Sequence[Any], least_rows: int) -> Speed | None:
    """The headline of one model and length; None if it does not fit."""
    for kind in checkpointing:
        case = replace(case, parallel=replace(case.parallel, activation_checkpointing=kind))
        if speed := fitting(case, OurStep, least_rows=least_rows):
            say(line(label, speed))
            return speed
    say(f"{label}: does not fit")
    return None


def whole_of(case: Case) -> Case:
    return replace(case, document_tokens=0)


def whole(label: str, speed: Speed) -> None:
    compare(f"{label}, whole rows", whole_of(speed.case), OurStep, speed)


def bare_bound(label: str, speed: Speed) -> None:
    case = replace(
        whole_of(speed.case),
        parallel=replace(speed.case.parallel, activation_checkpointing="none"),
        model=replace(speed.case.model, attention="sdpa"),
    )
    compare(f"{label}, whole rows, bare", case, bare, speed)


def attention(label: str, speed: Speed) -> None:
    case = speed.case
    by_sdpa = replace(case, model=replace(case.model, attention="sdpa"))
    compare(f"{label}, sdpa", by_sdpa, OurStep, speed)
    for name, kernels in KERNELS.items() if case.device == "cuda" else ():
        # torch's caches on disk do not tell kernels apart (pytorch issue 185449)
        with (
            sdpa_kernel(kernels, set_priority=True),
            torch.compiler.config.patch(force_disable_caches=True),
        ):
            compare(f"{label}, whole rows, sdpa, {name} first", whole_of(by_sdpa), OurStep, speed)


def compare(label: str, case: Case, step: Callable[[], Step], ours: Speed | None) -> None:
    try:
        found = fitting(case, step)
    except RuntimeError as error:
        if dist.get_world_size() > 1:
            raise
        # a kernel that this torch or GPU lacks is not the end of the run
        return say(f"{label}: failed, {error!r:.300}")
    say(f"{label}: does not fit" if found is None else line(label, found, ours))


def line(label: str, speed: Speed, ours: Speed | None = None) -> str:
    """What a case gave, and its ratio to `ours`."""
    case, name = speed.case, torch.cuda.get_device_name() if speed.case.device == "cuda" else ""
    with torch.device("meta"):
        model = Transformer(case.model)
    shown = [
        "unknown" if used is None else f"{used:.1%}"
        for context in (speed.context, case.seq_len)
        for used in [
            mfu(
                speed.tokens_per_second,
                flops_per_token=flops_per_token(model, context),
                peak=peak_flops(name),
            )
        ]
    ]
    seconds = case.rows * case.micro * case.seq_len / speed.tokens_per_second
    memory = f"{speed.peak_bytes / 2**30:.1f} GiB" if speed.peak_bytes else "memory unknown"
    ratio = f"  {speed.tokens_per_second / ours.tokens_per_second:.3f} of ours" if ours else ""
    shape = f"{case.rows} rows x {case.micro} micro-batches"
    how = f"{shape}, {case.parallel.activation_checkpointing}, {seconds:.3f} s a step, {memory}"
    rate = f"{speed.tokens_per_second:,.0f} tokens/s/GPU"
    return f"{label}: {rate}  MFU {shown[0]} (PaLM {shown[1]})  ({how}){ratio}"


def loader(label: str, speed: Speed) -> None:
    """Rows from the trainer's loader: a generation just written, so from the page cache."""
    from trainer.data.loader import BatchLoader

    case, batch = speed.case, speed.case.rows * speed.case.micro
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder), case, rows=batch * (WARM_UP + case.steps))
        config = DataConfig(
            (SourceConfig(folder),), global_batch_rows=batch, micro_batch_rows=case.rows
        )
        with BatchLoader(config, rank=0, world_size=1) as batches:
            read = measure(case, OurStep, batches.next)
    say(line(f"{label}, from disk", read, speed))
    say(
        f"{label}: waits for data {read.wait_share:.3%} of the time from disk, "
        f"{speed.wait_share:.3%} from memory"
    )


def publish(run: Path, case: Case, *, rows: int) -> None:
    """A generation of one shard of random rows, and the catalog that lists it, as the pipeline
    would leave them.
    """
    from stages.formats import mds

    folder, rng = run / "generations" / "gen-0001", np.random.default_rng(0)
    columns = mds.columns_of_rows(case.seq_len)
    with mds.MDSWriter(folder, columns=columns, size_limit=(1 << 32) - 1) as writer:
        for tokens in rng.integers(0, case.model.vocab_size, (rows, case.seq_len), np.uint32):
            documents = draw_documents(rng, (case.seq_len,), case.document_tokens)
            writer.write({"tokens": tokens, "spans": np.bincount(documents).astype(np.uint32)})
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


lines: list[str] = []


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
        lines.append(text)


def parse(arguments: Sequence[str] | None, *, gpu: bool) -> argparse.Namespace:
    """The options; what is left open goes by whether there is a GPU."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.trainer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="file to write the lines to as well")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="begin nothing that would end later"
    )
    parser.add_argument("--only", nargs="+", choices=PRESETS, help="presets, in this order")
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
    defaults: dict[str, Any] = {"only": ["1B", "125M", "3B", "8B"], "lengths": [2048]}
    defaults |= {"compile": ["on"], "parts": list(PARTS), "checkpointing": None}
    defaults |= {"rows": 0, "micro": 4, "steps": 10}
    if not gpu:
        defaults |= {"only": ["tiny"], "compile": ["off"], "lengths": [32], "micro": 2, "steps": 2}
    given = {
        name: value
        for name, value in vars(parser.parse_args(arguments)).items()
        if value is not None
    }
    options = argparse.Namespace(**{"out": None} | defaults | given)
    counts = (options.micro, options.steps, *options.lengths)
    if min(options.rows, *(number - 1 for number in counts)) < 0:
        parser.error("lengths, micro and steps are 1 at least, rows 0 (to be tried) or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines of every model, compiled or not, and length."""
    begin, gpu = time.monotonic(), torch.cuda.is_available()
    options = parse(arguments, gpu=gpu)
    join_ranks("cuda" if gpu else "cpu")
    lines.clear()
    name = torch.cuda.get_device_name() if gpu else "no GPU: sizes cut down, MFU unknown"
    say(f"torch {torch.__version__}, {dist.get_world_size()} ranks, {name}\n{PEERS}")
    run_in_time(jobs(options, gpu=gpu), until=begin + 60 * options.minutes)
    if options.out and dist.get_rank() == 0:
        options.out.write_text("\n".join(lines) + "\n")


Job = tuple[str, Callable[[], Any]]


def jobs(options: argparse.Namespace, *, gpu: bool) -> Iterator[Job]:
    """The speed of each model and length, then the other parts of each."""
    kinds = list(itertools.product(options.only, options.compile, options.lengths))
    measured: dict[str, Speed | None] = {}
    for name, compiled, seq_len in kinds:
        model = PRESETS[name] if gpu else replace(PRESETS[name], vocab_size=512)
        rows = options.rows or max(1, (MICRO_TOKENS.get(name, 32_768) if gpu else 128) // seq_len)
        case = Case(
            model,
            ParallelConfig(compile=compiled == "on"),
            "cuda" if gpu else "cpu",
            options.steps,
            seq_len,
            rows,
            options.micro,
            document_tokens=min(DOCUMENT_TOKENS, max(1, seq_len // 4)),
        )
        least = rows if options.rows else min(rows, max(1, LEAST_TOKENS // seq_len))
        label = f"{name} {seq_len}{' uncompiled' if compiled == 'off' else ''}"
        to_try = options.checkpointing or CHECKPOINTING.get(name, ["none", "selective", "full"])
        headline = partial(bench, label, case, checkpointing=to_try, least_rows=least)
        yield label, lambda run=headline, label=label: measured.update({label: run()})  # type: ignore[misc]
    parts = {"whole": whole, "bare": bare_bound, "attention": attention, "loader": loader}
    absent = [name for name in ("streaming", "xxhash", "zstandard") if find_spec(name) is None]
    if "loader" in options.parts and (absent or dist.get_world_size() > 1):
        say(f"loader: skipped, it needs {', '.join(absent) or 'a single rank'}")
        del parts["loader"]
    for label, speed in measured.items():
        for name, part in parts.items():
            if name in options.parts and speed is not None:
                yield f"{label}, {name}", partial(part, label, speed)


def run_in_time(jobs: Iterator[Job], *, until: float) -> None:
    """Run jobs while another one like the longest so far would end before `until`."""
    longest, left_out = 0.0, []
    for label, job in jobs:
        begin = time.monotonic()
        if sum_over_ranks(float(begin + longest > until)) > 0:
            left_out.append(label)
            continue
        job()
        longest = max(longest, time.monotonic() - begin)
    if left_out:
        say(f"left out for want of time: {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
