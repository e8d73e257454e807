"""Detect spikes of the loss."""

import math
from collections import deque
from collections.abc import Iterable

from trainer.telemetry.meter import WINDOW


class SpikeDetector:
    """Finds losses `sigmas` standard deviations above the mean of the last `window` losses.

    A spike enters the window, so a level at which the loss stays is no spike for long. `losses` go
    into a checkpoint.
    """

    def __init__(
        self, losses: Iterable[float] = (), *, sigmas: float = 6.0, window: int = WINDOW
    ) -> None:
        self._sigmas = sigmas
        self._losses: deque[float] = deque(losses, maxlen=window)

    @property
    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)

    def observe(self, loss: float) -> bool:
        """Add a loss; whether it is a spike. Never before the window is full.

        A loss that is not finite always is one, and does not enter the window.
        """
        if not math.isfinite(loss):
            return True
        spike = len(self._losses) == self._losses.maxlen and loss > self._bound()
        self._losses.append(loss)
        return spike

    def _bound(self) -> float:
        count = len(self._losses)
        mean = sum(self._losses) / count
        variance = sum((loss - mean) * (loss - mean) for loss in self._losses) / max(1, count - 1)
        # the last term: a constant loss deviates by rounding only
        return mean + self._sigmas * math.sqrt(variance) + 1e-9 * abs(mean)
