"""How far is an estimate from the run? `gristmill estimate` of the 500 WCXB pages by several seeds,
against the run itself.

    python -m benchmarks.estimate [DATA] [--sample 20%] [--seeds 5]

Prints core-seconds, tokens and bytes of the run, on Ray as a user runs it, and each estimate's
ratio to them. The seed decides which pages are sampled; models and extraction are those of
commoncrawl.toml. Each estimate is a command of its own: workers that have models loaded by an
earlier one would load none.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline import ROOT
from pipeline.run.results import all_commits
from pipeline.run.state import read_state


def gristmill(command: str, data: Path, directory: str, *options: str) -> None:
    """FineWeb's recipe over the pages."""
    pages = data / "warc" / "web" / "wcxb-500.warc.gz"
    settings = [
        str(ROOT / "configs" / "commoncrawl.toml"),
        f"input.paths=['{pages}']",
        f"run.directory={directory}",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", command, *settings, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(result.stderr)


def main() -> None:
    """Print a line per seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--sample", default="20%")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        gristmill("run", data, f"{scratch}/run")
        commits = [
            c
            for of_phase in all_commits(f"{scratch}/run", read_state(f"{scratch}/run")).values()
            for c in of_phase
        ]
        seconds = sum(c.cpu_seconds for c in commits)
        tokens = sum(c.result.tokens + c.result.held_out_tokens for c in commits)
        size = sum(o.bytes for c in commits for o in c.outputs)
        print(f"run: {seconds:.1f} core-seconds, {tokens:,.0f} tokens, {size:,} bytes", flush=True)
        for seed in range(arguments.seeds):
            gristmill(
                "estimate",
                data,
                f"{scratch}/{seed}",
                f"run.seed={seed}",
                "--sample",
                arguments.sample,
            )
            file = Path(f"{scratch}/{seed}/estimate.json")
            estimate: dict[str, Any] = json.loads(file.read_text())
            cpu, stored = estimate["total"]["core_seconds"], estimate["total"]["bytes"]["value"]
            interval = f"{cpu['value']:.1f} ({cpu['low']:.1f} to {cpu['high']:.1f})"
            print(
                f"seed {seed}: core-seconds {interval} × {cpu['value'] / seconds:.2f},",
                f"tokens × {estimate['tokens']['value'] / tokens:.2f}, bytes × {stored / size:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
