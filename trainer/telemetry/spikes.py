"""Detect loss spikes."""

import math
from collections import deque
from collections.abc import Iterable

from trainer.telemetry.meter import WINDOW


class SpikeDetector:
    """Finds losses that lie `sigmas` standard deviations above the mean of the last `window`.

    A spike joins the window, so that a level the loss stays at ceases to be one. A checkpoint keeps
    `losses`.
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
        """Whether this loss is a spike: never before the window is full, always when it is not
        finite.

        A loss that is not finite does not join the window.
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
        # a constant loss deviates by rounding alone
        return mean + self._sigmas * math.sqrt(variance) + 1e-9 * abs(mean)
