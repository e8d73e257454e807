"""Agreement between the ranks of a training: one result, or one error raised on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, by rank. Collective. With NCCL, set this rank's device first."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Ranks:
    """The ranks of a training, which exchange a few bytes when they agree on something.

    `rank` is by default that of torch.distributed; `gather` maps this rank's value to those of all
    ranks. `leads` is true on rank 0, and on a rank
    that has no others to talk to. An error on any rank is raised on every rank, so that none hangs:
    one of the `own` kinds as it is, any other as an error of kind `other`. That is OSError because
    such an error, as of a store that does not answer, may not come the next time.
    """

    def __init__(
        self,
        rank: int | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        *,
        own: tuple[type[Exception], ...] = (ValueError, ImportError),
        other: type[Exception] = OSError,
    ) -> None:
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        self.rank, self._gather = rank, gather or gather_objects
        self._own, self._other = own, other
        self.count = len(self._gather(None))  # on every rank, as it is a collective
        self.leads = rank == 0 or self.count == 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return any(self._gather(flag))

    def on_all(self, action: Callable[[], _T]) -> list[_T]:
        """Run `action` on every rank; the results of all, by rank. Collective."""
        result, failure = None, None
        try:
            result = action()
        except self._own as error:
            failure = error
        except Exception as error:  # of any kind, since the other ranks wait for this one
            failure = self._other(f"rank {self.rank}: {error!r}")
        outcomes: list[tuple[Any, Exception | None]] = self._gather((result, failure))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [value for value, _ in outcomes]

    def agree(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank; rank 0's result on all. Collective."""
        return self.on_all(action)[0]

    def on_first(self, action: Callable[[], _T]) -> _T:
        """Run `action` on rank 0 only; its result on all ranks. Collective."""
        results: list[Any] = self.on_all(lambda: action() if self.leads else None)
        first: _T = results[0]
        return first
