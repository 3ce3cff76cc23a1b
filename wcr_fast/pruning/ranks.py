"""Processes that share the work on one checkpoint: they add up counts, meet between steps, and fail together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from wcr_fast.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Stopped(UsageError):
    """Another process failed, or is gone; the text says why."""


class Ranks:
    """The processes of a group with a CPU backend such as gloo, or this one alone.

    Args:
        group: None for this process alone, without any communication.

    Attributes:
        index: this process's number in the group, from 0.
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.index, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all processes, the same in each."""
        if self.size == 1:
            return counts
        self.meet()
        total = torch.from_numpy(counts.copy())
        self._call(lambda dist: dist.all_reduce(total, group=self.group))
        return total.numpy()

    def share(self, value: T) -> T:
        """Return what the first process passed."""
        if self.size == 1:
            return value
        self.meet()
        box = [value]
        self._call(
            lambda dist: dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        )
        return box[0]

    def meet(self) -> None:
        """Wait for all processes; raise Stopped in each when one of them has failed."""
        if self.size > 1:
            self._exchange(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make an error of one process an error of all, at the others' next call."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if self.size > 1:
                self._exchange(error)
            raise

    def _exchange(self, error: Exception | None) -> None:
        failed = torch.tensor([error is not None], dtype=torch.int64)
        self._call(lambda dist: dist.all_reduce(failed, group=self.group))
        if failed.item():
            plain = isinstance(error, UsageError)
            mine = (not plain, str(error) if plain else f"{type(error).__name__}: {error}") if error else None
            failures: list[tuple[bool, str] | None] = [None] * self.size
            self._call(lambda dist: dist.all_gather_object(failures, mine, group=self.group))
            # What the user can mend tells more than what followed from it elsewhere.
            raise Stopped(min(failure for failure in failures if failure is not None)[1]) from error

    @staticmethod
    def _call(collective: Callable[[Any], object]) -> None:
        import torch.distributed as dist

        try:
            collective(dist)
        except RuntimeError as error:
            raise Stopped(f"another process of the group is gone: nothing was written ({error})") from None
