"""Magnitudes made smaller in place in torch, in blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.torch_path.layout import flat_view, is_dense
from wcr_fast.torch_path.moments import Scratch, blocks_of


def shrink_(
    tensors: Sequence[Tensor],
    which: Sequence[int],
    amounts: Sequence[float | Tensor],
    *,
    proximal: bool,
    found_inf: Tensor | None,
) -> None:
    """Take amounts[which] of every tensor off its magnitudes; see ``kernels/shrink.py``."""
    if found_inf is not None and found_inf.item() != 0.0:
        return
    scratch = Scratch(0.0)
    numbers = [float(t) for t in amounts]
    for tensor, group in zip(tensors, which, strict=True):
        if tensor.numel() == 0 or numbers[group] == 0.0:
            continue
        for block in blocks_of(flat_view(tensor)) if is_dense(tensor) else (tensor,):
            _shrink_block(block, numbers[group], proximal, scratch)


def _shrink_block(block: Tensor, amount: float, proximal: bool, scratch: Scratch) -> None:
    x = scratch.widened("x", block.reshape(-1))  # a copy where it has gaps
    if proximal:
        # NaN stays; what is small and negative becomes -0.0, and with 0.0 added to it +0.0.
        torch.ops.aten.softshrink.out(x, amount, out=x).add_(0.0)
    else:
        x.add_(torch.sign(x, out=scratch.take("a", x, x.dtype)), alpha=-amount)
    if x.data_ptr() != block.data_ptr():
        block.copy_(x.view(block.shape))
