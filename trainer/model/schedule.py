"""The learning rate as a pure function of the step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step.

    It rises linearly in `warmup_steps`, then falls to `min_ratio` at the last of `total_steps` and
    stays there. "cosine" and "linear" fall right after the warm-up, "wsd" (Hägele et al. 2024,
    arXiv:2405.18392) linearly in the last `decay_share` of the steps. With `total_steps` 0 (no
    known end) the rate is constant after the warm-up.

    `anchor` is the number of steps after which another schedule was replaced by this one, and
    `anchor_ratio` the share that the other had reached: this one falls from there.
    """

    config: ScheduleConfig
    total_steps: int
    anchor: int = 0
    anchor_ratio: float = 1.0

    def rate(self, step: int, base_lr: float) -> float:
        """The learning rate of a step, counted from 0."""
        done, config = step + 1, self.config  # so that the first step does not have a rate of 0
        if done <= config.warmup_steps and not self.anchor:
            return base_lr * done / config.warmup_steps
        if self.total_steps == 0:
            return base_lr * self.anchor_ratio
        start = self.anchor or config.warmup_steps
        if config.name == "wsd":
            start = max(start, round(self.total_steps * (1 - config.decay_share)))
        progress = min(max(0.0, (done - start) / max(1, self.total_steps - start)), 1.0)
        share = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
        # a schedule with a lower minimum may have gone below this one's
        low = min(config.min_ratio, self.anchor_ratio)
        return base_lr * (low + (self.anchor_ratio - low) * share)

    def state(self) -> dict[str, Any]:
        """The schedule for a checkpoint."""
        return asdict(self)


def resumed(saved: Mapping[str, Any] | None, new: Schedule, *, step: int) -> Schedule:
    """The schedule of a training that goes on after `step` steps under the one that was `saved`.

    If its settings have changed since, it goes on from the rate that was reached: another
    `max_steps` would change the rates of steps that are already taken, and the next step would jump
    to a rate that the training never came from. A checkpoint of an earlier version saved none.
    """
    if saved is None:
        return new
    before = Schedule(**{**saved, "config": ScheduleConfig(**saved["config"])})
    if (before.config, before.total_steps) == (new.config, new.total_steps):
        return before
    if step <= min(before.config.warmup_steps, new.config.warmup_steps) and not before.anchor:
        return new  # nothing has fallen yet
    return replace(new, anchor=step, anchor_ratio=before.rate(step - 1, 1.0))


def change_of(schedule: Schedule, new: Schedule, *, base_lr: float) -> str | None:
    """A sentence on how a resumed schedule differs from the `new` one alone, None if it does not.

    Before its anchor the rates are history, so only those after it are compared.
    """
    step, last = schedule.anchor, max(schedule.anchor, schedule.total_steps - 1)
    ahead = {step, (step + last) // 2, last}
    if all(schedule.rate(n, base_lr) == new.rate(n, base_lr) for n in ahead):
        return None
    end = f" to {schedule.rate(last, base_lr):.3g} at step {last + 1}" if new.total_steps else ""
    return (
        f"max_steps or schedule was changed at step {step}: the learning rate goes on from there, "
        f"{base_lr * schedule.anchor_ratio:.3g}{end}; the new schedule alone would have been at "
        f"{new.rate(max(0, step - 1), base_lr):.3g}"
    )
