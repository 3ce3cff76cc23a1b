"""The threshold of the weights that a fused optimizer writes, counted in its step."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.ops import select
from wcr_fast.ops.sharded import is_sharded
from wcr_fast.slots import Slot
from wcr_fast.table import capturing
from wcr_fast.torch_path.cuts import threshold_dtype, values_of
from wcr_fast.weights import Weight

if TYPE_CHECKING:
    from wcr_fast.optim.fused import FusedOptimizer

# A step counts for so many cuts: each has a few bits of one integer.
MAX_TRACKED = 5


class TrackedThreshold:
    """The smallest magnitude that stays at some sparsities, of weights that an optimizer steps.

    Made by :meth:`wcr_fast.optim.FusedOptimizer.track_threshold`.
    """

    def __init__(
        self, optimizer: FusedOptimizer, weights: Sequence[Weight], sparsities: Sequence[float], several: bool
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._params = [w.param for w in weights]
        self._sparsities, self._several = list(sparsities), several
        self._tracker: Any = None  # what steps on Triton count in
        self._kind: tuple = ()  # of the weights that it was made for
        self._counted: tuple | None = None  # the weights as the last counts were of

    def threshold(self) -> Tensor:
        """Return the threshold of the weights as they are: what :func:`wcr_fast.magnitude_threshold` would return.

        After a step on a GPU it costs no pass over the weights, unless they were written since then or the threshold
        has moved far since it was last asked for. Nothing waits for the device.

        Writes are known by the weights' version counters. A replayed graph, ``.data`` and numpy raise none: after
        those call ``optimizer.weights_changed()`` first. Call it where the steps are made: in their thread, and on
        their stream or one that has waited for it.

        Raises:
            ValueError: on the CPU for NaN; on CUDA the threshold then is NaN.
        """
        tensors = [p.detach() for p in self._params]
        if self._tracker is None or self._kind != self._kind_now() or not use_triton(tensors):
            found = select.threshold(tensors, self._sparsities, "global", "TrackedThreshold.threshold")
        else:
            cuts = self._tracker.cuts(tensors, counted=self._counted == self._now())
            found = values_of(cuts.key[0], cuts.dtype).to(threshold_dtype(t.dtype for t in tensors))
            found = found.masked_fill(cuts.bad.any(), torch.nan)
        return found if self._several else found.squeeze(0)

    def remove(self) -> None:
        """Let the optimizer's steps no longer count; :meth:`threshold` then reads the weights."""
        self._tracker = self._counted = None
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._untrack(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sparsity={self._sparsities if self._several else self._sparsities[0]})"

    # --- what the optimizer calls ------------------------------------------------------------------------------

    def tracker(self, slots: Sequence[Slot]) -> tuple[Any, frozenset[int]] | None:
        """Return what a step of these slots on Triton counts in, and the ids of the weights that it counts.

        None where it can't count each of them once: a shard, another device, a parameter that isn't stepped, the same
        one twice.
        """
        filled = [id(p) for p in self._params if p.numel()]
        counted = frozenset(filled)
        once = len(counted) == len(filled) > 0 and counted <= {id(s.param) for s in slots} and _are_apart(slots)
        plain = not any(is_sharded(p) or p.is_inference() for p in self._params)  # those count no versions
        if not once or not plain or len({p.device for p in self._params}) > 1:
            self._tracker = self._counted = None
            return None
        if self._tracker is None or self._kind != self._kind_now():
            from wcr_fast.triton_path.track import Tracker

            keep = select.keep_counts(self._params, self._sparsities, "global")
            self._tracker, self._kind = Tracker([p.detach() for p in self._params], keep[0]), self._kind_now()
        return self._tracker, counted

    def stepped(self, counted: bool) -> None:
        """Note that the weights were written, and whether the step counted them."""
        self._counted = self._now() if counted else None

    def _kind_now(self) -> tuple:
        return tuple((p.device, p.dtype, p.shape) for p in self._params)

    def _now(self) -> tuple:
        # What is captured has not run: it tells nothing outside of its graph.
        return capturing(self._params[0].device), [(p.data_ptr(), p._version) for p in self._params]


def _are_apart(slots: Sequence[Slot]) -> bool:
    """Tell whether no two weights share memory: one would be counted before the other is stepped."""
    spans = []
    for slot in slots:
        weight = slot.weight
        if weight.numel():
            reach = sum(stride * (size - 1) for stride, size in zip(weight.stride(), weight.shape, strict=True))
            start = weight.data_ptr()
            spans.append((str(weight.device), start, start + (reach + 1) * weight.element_size()))
    spans.sort()
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))
