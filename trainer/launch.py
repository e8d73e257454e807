"""Start a training: on this machine, or as one rank of torchrun."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.config import ConfigError as ConfigError  # for those who launch
from trainer.config import load


class Ended(NamedTuple):
    """How a training ended: the steps in its state, the loss of the last in nats a token, why it ended, and its plot."""

    steps: int
    loss: float
    why: str
    plot: Path


class TrainingError(RuntimeError):
    """The training could not go on; what its checkpoints hold stays."""


def launch(file: Path, overrides: Sequence[str]) -> Ended:
    """Train as the file says, on the GPU if there is one, and draw the run.

    ConfigError for a config that is wrong in itself, TrainingError for data or a model that is at fault.
    """
    config = load(file, overrides)
    try:
        import torch
    except ImportError:
        raise ConfigError("training needs PyTorch: pip install 'gristmill[train]'") from None
    from trainer.checkpoint import CheckpointError
    from trainer.generations import GenerationFault
    from trainer.loop import Diverged, train
    from trainer.plot import plot

    try:
        result = train(config, device="cuda" if torch.cuda.is_available() else "cpu")
    except (CheckpointError, GenerationFault, Diverged) as error:
        raise TrainingError(str(error)) from error
    drawn = Path(config.directory, "training.html")
    if os.environ.get("RANK", "0") == "0":
        plot(config.directory, drawn)
    return Ended(*result, drawn)
