"""Profile a few steps of a training: where a rank's time and memory go."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP_STEPS = 5  # which compile, allocate and fill the loader's queues
MAX_EVENTS = 100_000  # of the allocator
_LOG = logging.getLogger(__name__)


class Profiler:
    """Profiles `steps` steps of this rank (0: none) after the first WARM_UP_STEPS of an attempt.

    Writes trace-STEP.json.gz, for ui.perfetto.dev, and on a GPU memory-STEP.pickle, for
    pytorch.org/memory_viz, to `folder`. Steps are slower meanwhile.
    """

    def __init__(self, folder: Path, *, steps: int, device: str) -> None:
        self._folder, self._steps, self._device = folder, steps, device
        self._taken = 0
        self._profile: Any = None

    def step(self, number: int) -> None:
        """Call it after each step, with the number of the step."""
        self._taken += 1
        if self._steps and self._taken == WARM_UP_STEPS:
            self._start()
        elif self._profile and self._taken == WARM_UP_STEPS + self._steps:
            self._finish(number)

    def close(self) -> None:
        """Discard a profile that is not complete."""
        if self._profile:
            self._profile.stop()
            if self._device == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        if self._steps and self._taken < WARM_UP_STEPS + self._steps:
            needed = WARM_UP_STEPS + self._steps
            _LOG.warning("no profile: it needs %d steps, %d were taken", needed, self._taken)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _finish(self, number: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._device == "cuda":
            torch.cuda.synchronize()
            dump: Any = torch.cuda.memory._dump_snapshot
            dump(str(self._folder / f"memory-{number:08}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder / f"trace-{number:08}.json.gz"))
        self._profile = None
        _LOG.warning("profile of %d steps: %s", self._steps, self._folder)
