"""Agreement between the ranks of a training: one result, or one error raised on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


class Ranks:
    """The ranks of a training, which exchange a few bytes when they agree on something.

    `gather` maps this rank's value to those of all ranks, by default over torch.distributed if that
    is initialized. `leads` is true on rank 0, and on a rank that has no others to talk to.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]] | None = None) -> None:
        self._rank, self._gather = rank, gather or _gather_objects
        is_alone = len(self._gather(None)) == 1  # on every rank, as it is a collective
        self.leads = rank == 0 or is_alone

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return any(self._gather(flag))

    def agree(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank and return rank 0's result on all. Collective.

        If it fails on any rank, the first failure is raised on every rank, so none of them hangs.
        """
        result: _T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except ValueError as error:  # a GenerationError is one
            failure = error
        except Exception as error:  # any other one too, since the other ranks wait for this rank
            # OSError: not a fault of the data, so it may work the next time, as with a store that
            # does not answer
            failure = OSError(f"rank {self._rank}: {error!r}")
        outcomes = self._gather((result, failure))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        first: _T = outcomes[0][0]
        return first


def _gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, by rank. With NCCL, set this rank's device first."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
