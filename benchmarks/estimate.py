"""How far is an estimate from the run? `gristmill estimate` of the 500 WCXB pages, by several seeds, against the run itself.

    python -m benchmarks.estimate [DATA] [--sample 20%] [--seeds 5]

Prints core-seconds, tokens and bytes of the run, on Ray as a user has it, and each estimate's ratio to them. The seed decides
which pages are sampled; models and extraction are commoncrawl.toml's.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.pipeline import ROOT, Silent, commits_of
from pipeline.config import Config, load
from pipeline.engine import on_ray
from pipeline.estimate import estimate, share_of
from pipeline.run import execute


def settings(data: Path, folder: str, seed: int) -> Config:
    """FineWeb's recipe over the pages."""
    pages = data / "warc" / "web" / "wcxb-500.warc.gz"
    return load(
        ROOT / "configs" / "commoncrawl.toml",
        [f"input.paths=['{pages}']", f"run.directory={folder}", f"run.seed={seed}"],
    )


def main() -> None:
    """Print a line per seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--sample", default="20%")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = settings(arguments.data.resolve(), f"{scratch}/run", 0)
        execute(config, Silent(), on_ray())
        commits = [c for of_phase in commits_of(config).values() for c in of_phase]
        seconds = sum(c.cpu_seconds for c in commits)
        tokens = sum(c.totals.get("tokens", 0) + c.totals.get("held_out_tokens", 0) for c in commits)
        size = sum(o["bytes"] for c in commits for o in c.outputs)
        print(f"run: {seconds:.1f} core-seconds, {tokens:,} tokens, {size:,} bytes", flush=True)
        for seed in range(arguments.seeds):
            config = settings(arguments.data.resolve(), f"{scratch}/seed-{seed}", seed)
            found = estimate(config, Silent(), on_ray(), share=share_of(arguments.sample), price=0.0, cores=2)
            cpu = found.total.core_seconds
            figures = [
                f"core-seconds {cpu.value:.1f} ({cpu.low or 0:.1f} to {cpu.high or 0:.1f})",
                f"× {cpu.value / seconds:.2f}",
            ]
            figures += [f"tokens × {found.tokens.value / tokens:.2f}", f"bytes × {found.total.bytes.value / size:.2f}"]
            print(f"seed {seed}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
