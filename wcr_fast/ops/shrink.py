"""L1 on the weights themselves: magnitudes made smaller in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.ops.sharded import local


def refuse_overlap(tensor: Tensor, name: str) -> None:
    """Raise ValueError for a tensor some of whose elements share memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{name} is expanded: its elements share memory and can't be written; give a copy of it")


@torch.no_grad()
def shrink_(
    weights: Sequence[Tensor],
    which: Sequence[int],
    amounts: Sequence[float | Tensor],
    *,
    proximal: bool,
    found_inf: Tensor | None = None,
) -> None:
    """Take amounts[which[i]] off the magnitudes of weight i, in place: down to +0.0, or past it if not ``proximal``.

    Args:
        weights: floating-point tensors without elements that share memory; DTensors: each rank's own part.
        which: the place of each one's amount.
        amounts: numbers or 0-d tensors (read on the device, without a sync), rounded to the dtype of the arithmetic.
        found_inf: a tensor; where it isn't 0, nothing changes.
    """
    if not weights or all(not isinstance(t, Tensor) and t == 0.0 for t in amounts):
        return
    tensors = [local(w).detach() for w in weights]
    if use_triton(tensors):
        from wcr_fast.triton_path import shrink as path
    else:
        from wcr_fast.torch_path import shrink as path
    path.shrink_(tensors, which, amounts, proximal=proximal, found_inf=found_inf)
    torch.autograd.graph.increment_version(weights)  # a kernel's write leaves no trace of its own
