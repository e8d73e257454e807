"""benchmarks/trainer.py: small, on a CPU; what it measures on a GPU is for a GPU."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.train

# torch with what torch itself requires, NumPy and pydantic
BARE = """
import runpy, sys
known = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "benchmarks", "trainer", "stages"}
known |= {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"}
known |= {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}

class Known:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        mine = name.partition(".")[0] in known or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if mine else None

sys.meta_path[:] = [Known(finder) for finder in sys.meta_path]
runpy.run_module("benchmarks.trainer", run_name="__main__", alter_sys=True)
"""


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_with_torch_numpy_and_pydantic_and_says_what_it_left_out():
    found = run(sys.executable, "-c", BARE)
    assert "no GPU: sizes cut down, MFU unknown" in found
    assert "loader: skipped, it needs streaming, xxhash, zstandard" in found
    lines = re.findall(
        r"^(tiny 32.*): ([\d,]+) tokens/s/GPU  MFU unknown \(PaLM unknown\)  "
        r"\(4 rows x 2 micro-batches, none, ",
        found,
        re.M,
    )
    assert [label for label, _ in lines] == [
        "tiny 32 uncompiled",
        "tiny 32 uncompiled, whole rows",
        "tiny 32 uncompiled, whole rows, bare",
        "tiny 32 uncompiled, sdpa",
    ]
    assert all(int(rate.replace(",", "")) > 0 for _, rate in lines)


@pytest.fixture
def trainer(monkeypatch, group_of_one):
    import torch

    from benchmarks import trainer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return trainer


def test_from_disk_it_reads_a_generation_by_the_trainers_own_supply(trainer, capsys, tmp_path):
    out = tmp_path / "lines.txt"
    trainer.main(["--parts", "loader", "--lengths", "16", "--rows", "2", "--out", str(out)])
    found = capsys.readouterr().out
    assert out.read_text() == found
    assert re.search(
        r"^tiny 16 uncompiled, from disk: [\d,]+ tokens/s/GPU .*\(2 rows x 2 micro-batches, none, ",
        found,
        re.M,
    )
    share = re.search(
        r"^tiny 16 uncompiled: waits for data ([\d.]+)% of the time from disk, ([\d.]+)% from memory",
        found,
        re.M,
    )
    assert 0 < float(share[1]) < 100 and float(share[2]) < 100


def test_rows_are_halved_until_they_fit_and_a_step_keeps_its_tokens(trainer):
    import torch

    asked = []

    def step():
        def take(model, optimizer, batches, device):
            asked.append((len(batches), *batches[0].tokens.shape))
            if len(batches[0].tokens) > 3:
                raise torch.OutOfMemoryError

        return take

    case = trainer.Case(
        trainer.PRESETS["tiny"],
        trainer.ParallelConfig(),
        "cpu",
        steps=1,
        seq_len=8,
        rows=12,
        micro=1,
    )
    assert trainer.fitting(case, step).case.rows == 3
    assert asked == [(1, 12, 8), (2, 6, 8), *[(4, 3, 8)] * 3]
    assert trainer.fitting(case, step, least_rows=4) is None


def test_packed_rows_begin_with_document_0_and_number_the_others_upwards(trainer):
    model = trainer.PRESETS["tiny"]
    case = trainer.Case(
        model,
        trainer.ParallelConfig(),
        "cpu",
        steps=1,
        seq_len=500,
        rows=3,
        micro=2,
        document_tokens=10,
    )
    batches = trainer.in_memory(case)(0)
    assert len(batches) == 2
    for batch in batches:
        ids = batch.documents
        assert (ids[:, 0] == 0).all() and set((ids[:, 1:] - ids[:, :-1]).flatten().tolist()) == {
            0,
            1,
        }
        assert 25 < ids.max() < 100  # 50 are expected, 7 are a standard deviation
    whole = trainer.in_memory(trainer.replace(case, document_tokens=0))(1)
    assert not any(batch.documents.any() for batch in whole)


def test_a_comparison_that_fails_is_a_line_and_not_the_end(trainer, capsys):
    def step():
        raise NotImplementedError("no such kernel")

    case = trainer.Case(
        trainer.PRESETS["tiny"],
        trainer.ParallelConfig(),
        "cpu",
        steps=1,
        seq_len=8,
        rows=1,
        micro=1,
    )
    trainer.compare("tiny 8, flex", case, step, None)
    assert (
        capsys.readouterr().out == "tiny 8, flex: failed, NotImplementedError('no such kernel')\n"
    )


def test_what_would_end_too_late_is_left_out_and_named(trainer, capsys):
    trainer.main(["--minutes", "0"])
    assert "left out for want of time: tiny 32 uncompiled\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [("--steps", "0"), ("--lengths", "2048", "0"), ("--rows", "-1"), ("--micro", "0")]
)
def test_numbers_that_measure_nothing_are_refused(trainer, capsys, wrong):
    with pytest.raises(SystemExit):
        trainer.main(wrong)
    assert "lengths, micro and steps are 1 at least" in capsys.readouterr().err


def test_the_roofline_stays_below_what_its_products_alone_would_reach():
    from benchmarks import roofline

    for preset in ("125M", "1B"):
        found = roofline.roofline(preset, recompute=False)
        assert 0.2 < found.mfu < found.mfu_palm < roofline.MATMUL
        again = roofline.roofline(preset, recompute=True)
        assert again.tokens_per_second < found.tokens_per_second
