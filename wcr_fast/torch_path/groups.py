"""Groups of weights in torch: sums of squares and scaling, in blocks of rows that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wcr_fast.torch_path.moments import BLOCK, compute_dtype

if TYPE_CHECKING:
    from wcr_fast.ops.groups import Part


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Yield the rows of a block each, along the first dimension."""
    rows = max(1, BLOCK // max(1, tensor[0].numel())) if len(tensor) else 1
    return (slice(start, start + rows) for start in range(0, len(tensor), rows))


def group_squares(parts: Sequence[Part], total: int) -> Tensor:
    """Return the sum of squares of every group, float64, on the first part's device."""
    home = parts[0].tensor.device
    squares = torch.zeros(total, dtype=torch.float64, device=home)
    for part in parts:
        for rows in _blocks(part.tensor):
            square = part.tensor[rows].detach().double().square()
            for dim, base in part.sides:
                others = [d for d in range(square.dim()) if d != dim]
                sums = (square.sum(others) if others else square).to(home)
                first = base + (rows.start if dim == 0 else 0)
                squares[first : first + len(sums)] += sums
    return squares


def _factors(part: Part, rows: slice, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of the factors of these rows' elements, broadcast to their shape."""
    found: Tensor | float = 0.0
    block = part.tensor[rows]
    for dim, base in part.sides:
        first = base + (rows.start if dim == 0 else 0)
        shape = [-1 if d == dim else 1 for d in range(block.dim())]
        found = found + factors[first : first + block.shape[dim]].to(block.device).view(shape)
    return found.to(dtype)


def add_scaled_(outs: list[Tensor], parts: Sequence[Part], factors: Tensor) -> None:
    """Add every weight, times the sum of its groups' factors, to ``outs``."""
    for part in parts:
        dtype, out = compute_dtype(part.tensor.dtype), part.of(outs[part.layer])
        for rows in _blocks(part.tensor):
            pull = part.tensor[rows].to(dtype) * _factors(part, rows, factors, dtype)
            out[rows].add_(pull)


def scale_(parts: Sequence[Part], factors: Tensor) -> None:
    """Multiply every weight by its group's factor in place, to +0.0 where that is 0."""
    for part in parts:
        dtype = compute_dtype(part.tensor.dtype)
        for rows in _blocks(part.tensor):
            block, factor = part.tensor[rows], _factors(part, rows, factors, dtype)
            block.copy_((block.to(dtype) * factor).masked_fill_(factor == 0, 0.0))
