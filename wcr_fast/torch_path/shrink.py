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
    wide = torch.float64 if block.dtype == torch.float64 else torch.float32
    flat = block.reshape(-1)  # a copy where it has gaps
    x = scratch.take("x", flat, wide).copy_(flat)
    t = torch.tensor(amount, dtype=wide, device=x.device)
    step = torch.sign(x, out=scratch.take("a", flat, wide)).mul_(t)
    if proximal:  # NaN is no such magnitude: it stays
        small = x.abs() <= t
        x.sub_(step).masked_fill_(small, 0.0)
    else:
        x.sub_(step)
    block.copy_(x.view(block.shape))
