"""What the trainer would do on an H200, traced by the CUDA build of torch on a fake one.

It proves which operators, graphs, collectives and waits there are, and the peak of memory; nothing
about numerics, NCCL, kernels or speed. `make test-cuda` installs the CUDA build (5 GB).
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.cuda


@cache
def cuda_python():
    """The interpreter that has the CUDA build; None if there is none."""
    candidates = (
        os.environ.get("GRISTMILL_CUDA_PYTHON"),
        ROOT / ".venv-cuda" / "bin" / "python",
        sys.executable,
    )
    question = "import torch; raise SystemExit(torch.version.cuda is None)"
    for path in filter(None, candidates):
        if (
            shutil.which(path)
            and subprocess.run([path, "-c", question], capture_output=True).returncode == 0
        ):
            return str(path)
    return None


def on_fake_gpu(*arguments):
    if shutil.which("gcc") is None:
        pytest.skip("the stubs of CUDA are C, and there is no gcc")
    if cuda_python() is None:
        pytest.skip("no CUDA build of torch here: make test-cuda installs it")
    done = subprocess.run(
        [ROOT / "tools/fake_gpu/run.sh", cuda_python(), "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def census(part, *arguments):
    """The line of `benchmarks.cuda` for one part."""
    return json.loads(on_fake_gpu("-m", "benchmarks.cuda", "--parts", part, *arguments))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_packed_rows_take_flex_attention_in_four_graphs_without_a_bias(checkpointing):
    """Forward, backward, loss and evaluation, however documents vary; no dense mask, no repeated
    heads.
    """
    preset = ("--presets", "1B", "--layers", "2")  # with grouped heads
    found = census("graphs", *preset, "--checkpointing", checkpointing)
    # full checkpointing computes the forward pass again within the backward graph
    forward = 3 if checkpointing == "full" else 2
    assert found["attention"] == {"flex_attention": forward, "flex_attention_backward": 1}
    assert (found["graphs"], found["compiled"], found["breaks"]) == (4, 3, 0)


def test_inductor_makes_kernels_of_the_blocks_for_sm_90():
    found = census("kernels", "--presets", "1B", "--layers", "1")
    block, loss, backward, evaluation = found["kernels"]
    assert block["flex"] >= 1 and backward["flex"] >= 1 and evaluation["flex"] >= 1
    assert all(graph["triton"] >= 1 for graph in (block, loss, backward, evaluation))


def test_a_step_never_waits_and_exchanges_once():
    """All-gathers: of each block and the rest, in the forward and backward pass of each of two
    micro-batches, but for what a forward pass leaves in place for its backward pass (the root).
    """
    layers = 3
    found = census("step", "--ranks", "8", "--layers", str(layers))
    assert found["waits"] == {}
    assert found["collectives"] == {
        "allreduce": 2,  # the number of targets, and the figures
        "all_reduce": 1,  # of the gradient norm
        "_allgather_base": 2 * (2 * layers + 1),
        "_reduce_scatter_base": layers + 1,
    }


def test_large_gradients_are_reduced_after_each_micro_batch():
    found = census("step", "--presets", "8B", "--ranks", "8", "--checkpointing", "full")
    assert found["reduces_each_micro_batch"] and found["waits"] == {}
    assert found["collectives"]["_reduce_scatter_base"] == 2 * (32 + 1)


def test_waits_are_found():
    """The check of the check: what it has to find."""
    code = """
import torch
from benchmarks.cuda import Operators, fake_gpu
with fake_gpu(1), Operators() as seen:
    a = torch.zeros(3, device="cuda")
    a.cpu()
    a.to("cpu", non_blocking=True)
    torch.zeros(3).to("cuda")
    a[0].copy_(torch.zeros(()))
    try:
        a.sum().item()
    except Exception:
        pass
print(sum(seen.waits.values()))
"""
    assert on_fake_gpu("-c", code).strip() == "4"


# GiB of a step's peak on an H200 of 140.4; a tenth below is left for fragments
BUDGET = [
    ("125M", 1, 16, "none", 18),
    ("350M", 1, 16, "none", 41),
    ("1B", 1, 16, "none", 71),
    ("3B", 1, 8, "none", 102),
    ("8B", 1, 2, "full", 126),
    ("8B", 8, 2, "full", 24),
    ("8B", 8, 4, "selective", 50),
]


@pytest.mark.parametrize(("preset", "ranks", "rows", "checkpointing", "gib"), BUDGET)
def test_the_peak_of_memory_stays_within_the_budget(preset, ranks, rows, checkpointing, gib):
    arguments = ("--presets", preset, "--ranks", str(ranks), "--rows", str(rows))
    found = census("memory", *arguments, "--checkpointing", checkpointing)
    assert 0.9 * gib < found["total"] < gib


def test_gradients_that_are_reduced_once_are_kept_unsharded():
    arguments = ("--presets", "8B", "--layers", "4", "--ranks", "8", "--rows", "2")
    once, each = (
        census("memory", *arguments, "--reduction", kind)
        for kind in ("last_micro_batch", "each_micro_batch")
    )
    assert once["total"] - each["total"] > 6 * each["sharded_grad"]
