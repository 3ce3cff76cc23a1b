"""Moments and gradients for one or two smoothings in torch: a block of weights serves both while it is in cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_fast.torch_path.layout import flat_view, same_layout
from wcr_fast.torch_path.moments import (
    SMALL,
    Scratch,
    block_sums,
    blocks_of,
    finish,
    from_sums,
    layers_of,
    one_sweep,
    put,
    stats_dtype,
)


def _sweep(flat: Tensor, scratches: Sequence[Scratch]) -> list[tuple[float, float]]:
    """Return mean and one-sweep variance for each smoothing, to the bits of a sweep of its own."""
    if flat.numel() <= SMALL and flat.device.type == "cpu":
        return [one_sweep(flat, scratch) for scratch in scratches]
    sums: list[list[tuple[Tensor, Tensor]]] = [[] for _ in scratches]
    for block in blocks_of(flat):
        for of, scratch in zip(sums, scratches, strict=True):
            of.append(block_sums(block, scratch))
    return [from_sums(of, flat.numel()) for of in sums]


def joint_moments(tensors: Sequence[Tensor], rs: tuple[float, ...], rules: Any = None) -> tuple[Tensor, None]:
    """Return the stats [J, 4, L] of every tensor, and None: coefficients are left to the caller on this path."""
    scratches = [Scratch(r) for r in rs]
    rows: list[list[tuple[float, float, float, float]]] = [[] for _ in rs]
    for tensor in tensors:
        flat = flat_view(tensor)
        swept = _sweep(flat, scratches) if flat.numel() else [(0.0, 0.0)] * len(rs)
        for row, scratch, found in zip(rows, scratches, swept, strict=True):
            row.append(finish(flat, scratch, *found))
    device = tensors[0].device
    stats = torch.tensor(rows, dtype=stats_dtype(device)).reshape(len(rs), -1, 4)
    return stats.transpose(1, 2).contiguous().to(device), None


def _put(target: Tensor, x: Tensor, layers: Sequence[tuple], scratches: Sequence[Scratch], base: Tensor | None) -> None:
    """Write base + the pull of every smoothing on one block into target, which may be the base."""
    if target.dtype != x.dtype:  # one rounding, at the end
        wide = scratches[0].take("sum", x, x.dtype)
        _put(wide, x, layers, scratches, None)
        target.copy_(wide) if base is None else torch.add(base, wide, out=target)
        return
    for layer, scratch in zip(layers, scratches, strict=True):
        put(target, x, layer, scratch, base=base)
        base = target


def _written(tensor: Tensor, layers: Sequence[tuple], scratches: Sequence[Scratch]) -> Tensor:
    out = torch.empty_like(tensor)
    if not same_layout(out, tensor):  # gaps or overlaps: the result has none
        tensor = torch.empty_like(out).copy_(tensor)
    for o, block in zip(blocks_of(flat_view(out)), blocks_of(flat_view(tensor)), strict=True):
        _put(o, scratches[0].widened("x", block), layers, scratches, None)
    return out


def _by_tensor(
    stats: Tensor, coef: Tensor, tensors: Sequence[Tensor], lam: float
) -> list[tuple[tuple[float, ...], ...]]:
    both = [layers_of(*numbers, tensors, lam) for numbers in zip(stats, coef, strict=True)]
    return list(zip(*both, strict=True))


def add_joint_grad_(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: tuple[float, ...],
) -> None:
    """Add lam times the gradient of all smoothings to every gradient, in the same blocks."""
    scratches = [Scratch(r) for r in rs]
    for grad, tensor, layers in zip(grads, tensors, _by_tensor(stats, coef, tensors, float(lam)), strict=True):
        if not same_layout(grad, tensor):
            grad.add_(_written(tensor, layers, scratches))
            continue
        for g, block in zip(blocks_of(flat_view(grad)), blocks_of(flat_view(tensor)), strict=True):
            _put(g, scratches[0].widened("x", block), layers, scratches, g)


def joint_grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, rs: tuple[float, ...]) -> list[Tensor]:
    """Return the gradient of all smoothings of every tensor, each with its tensor's dtype."""
    scratches = [Scratch(r) for r in rs]
    layers = _by_tensor(stats, coef, tensors, 1.0)
    return [_written(t, layer, scratches) for t, layer in zip(tensors, layers, strict=True)]
