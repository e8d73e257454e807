"""A training beside a series of batches, and the records it writes."""

import json
from contextlib import ExitStack, suppress
from pathlib import Path


def metric_records(folder: Path) -> list[dict]:
    """All records of a training, those of replayed steps as well; not the line that is written at
    this moment.
    """
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


LIVE_TRAINING = """
directory = "{folder}/training"
model = {{dim = 8, num_layers = 1, num_heads = 2, num_kv_heads = 1, ffn_dim = 8}}
parallel.precision = "fp32"
data = {{global_batch_rows = 1, micro_batch_rows = 1, at_end = "wait", sources = [{{run = "{folder}/series"}}]}}
telemetry = {{sinks = ["jsonl"], every_seconds = 0.2}}
"""


def step_records(folder):
    """What a training has told of its steps, but for a line that is written at this moment."""
    return metric_records(folder / "training")


def run_training(config, device="cpu"):
    """Train in this process, from the newest checkpoint in the folder to the end."""
    from trainer.loop import Training  # needs torch

    with ExitStack() as resources:
        return Training(config, resources, device=device).run()
