"""Moments of smooth magnitudes and their gradient in torch, in blocks that stay in cache.

With a = sqrt(w^2 + r), one sweep gives sum(a) and sum(w^2), hence mean m and V = mean(w^2) + r - m^2. Where V is
small against m^2 that difference cancels, so a second sweep sums (a - p) and (a - p)^2 about a pivot p near the
mean. The pivot says which form of the gradient is accurate, too: p = 0 marks the well-conditioned layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcr_fast.torch_path.layout import flat_view, same_layout

# 256 Ki float32 values: weights, gradient and scratch of a block fit the L2 of two cores, and the cost of
# dispatching an op is small against its work.
BLOCK = 1 << 18
# Below this V / m^2 the one-sweep variance would lose more than one decimal digit of float32.
WELL_CONDITIONED = 0.1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for weights of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stats_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class _Scratch:
    """Block buffers of one call: nothing here is as large as a layer, except off the CPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (slot, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            size = max(like.numel(), min(BLOCK, 4 * like.numel()))
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[: like.numel()]

    def widened(self, slot: str, block: Tensor) -> Tensor:
        dtype = compute_dtype(block.dtype)
        return block if block.dtype == dtype else self.take(slot, block, dtype).copy_(block)


def _blocks(flat: Tensor) -> Iterator[Tensor]:
    if flat.device.type != "cpu" or flat.numel() <= BLOCK:
        return iter((flat,))
    return iter(flat.split(BLOCK))


def _magnitude(x: Tensor, r: Tensor, out: Tensor) -> Tensor:
    """Write sqrt(x^2 + r) (|x| where r is 0) into out."""
    if r == 0:
        return torch.abs(x, out=out)
    return torch.addcmul(r, x, x, out=out).sqrt_()


def _one_sweep(flat: Tensor, r: Tensor, scratch: _Scratch) -> tuple[float, float]:
    total, squares = 0.0, 0.0
    for block in _blocks(flat):
        x = scratch.widened("x", block)
        a = _magnitude(x, r, scratch.take("a", x, x.dtype))
        total += a.sum().item()
        squares += torch.dot(x, x).item()
    n = flat.numel()
    mean = total / n
    return mean, squares / n + r.item() - mean * mean


def _about_pivot(flat: Tensor, r: Tensor, pivot: Tensor, scratch: _Scratch) -> tuple[float, float]:
    total, squares = 0.0, 0.0
    for block in _blocks(flat):
        x = scratch.widened("x", block)
        d = _magnitude(x, r, scratch.take("a", x, x.dtype)).sub_(pivot)
        total += d.sum().item()
        squares += torch.dot(d, d).item()
    n = flat.numel()
    shift = total / n
    return shift, max(squares / n - shift * shift, 0.0) if squares == squares else squares


def _stats_of(flat: Tensor, r: float, scratch: _Scratch) -> tuple[float, float, float, float]:
    if flat.numel() == 0:
        return 0.0, 0.0, 0.0, 0.0
    dtype = compute_dtype(flat.dtype)
    r_tensor = torch.tensor(r, dtype=dtype, device=flat.device)
    mean, var = _one_sweep(flat, r_tensor, scratch)
    if var >= WELL_CONDITIONED * mean * mean and var > 0:
        return mean, var, 0.0, mean
    first = flat[:1].to(dtype)
    pivot = _magnitude(first, r_tensor, torch.empty_like(first))[0]
    # A layer of equal magnitudes needs its own value as pivot to come out as exactly zero; an outlier in
    # the first place would bring the cancellation back, there the mean is the better pivot.
    if abs(pivot.item() - mean) > 0.1 * mean:
        pivot = torch.tensor(mean, dtype=dtype, device=flat.device)
    shift, var = _about_pivot(flat, r_tensor, pivot, scratch)
    return pivot.item() + shift, var, pivot.item(), shift


def layer_moments(
    tensors: Sequence[Tensor], r: float, rule: tuple[str, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the stats of every tensor, and None: coefficients are left to the caller on this path.

    Stats are float64 [4, L] on the first tensor's device: mean, variance, pivot, mean - pivot.
    """
    scratch = _Scratch()
    rows = [_stats_of(flat_view(t), r, scratch) for t in tensors]
    device = tensors[0].device
    return torch.tensor(rows, dtype=_stats_dtype(device)).reshape(-1, 4).t().contiguous().to(device), None


def _slope(x: Tensor, layer: tuple[float, ...], r: Tensor, scratch: _Scratch) -> Tensor:
    """Return (b + c (a - m)) s of one block, in scratch."""
    mean, pivot, shift, b, c = layer
    t = scratch.take("a", x, x.dtype)
    if pivot == 0.0:  # = (b - c m) s + c w, fewer passes
        level = b - c * mean
        if r == 0:
            torch.sign(x, out=t).mul_(level)
        else:
            torch.div(x, _magnitude(x, r, t), out=t).mul_(level)
        return t.add_(x, alpha=c) if c else t
    a = _magnitude(x, r, scratch.take("m", x, x.dtype))
    torch.sub(a, pivot, out=t).sub_(shift).mul_(c).add_(b)
    return t.mul_(torch.sign(x, out=a)) if r == 0 else t.mul_(x).div_(a)


def _layers(stats: Tensor, coef: Tensor, tensors: Sequence[Tensor], lam: float) -> list[tuple[float, ...]]:
    mean, _, pivot, shift = stats.tolist()
    _, slope_mean, slope_var = coef.tolist()
    return [
        (mean[i], pivot[i], shift[i], lam * slope_mean[i] / n, 2.0 * lam * slope_var[i] / n)
        for i, t in enumerate(tensors)
        for n in (max(t.numel(), 1),)
    ]


def add_grad_(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    r: float,
) -> None:
    """Add lam * s * (b + c (a - m)) to every gradient, b = coef[1] / n and c = 2 coef[2] / n."""
    scratch = _Scratch()
    for grad, tensor, layer in zip(grads, tensors, _layers(stats, coef, tensors, float(lam)), strict=True):
        if not same_layout(grad, tensor):
            grad.add_(_written(tensor, layer, r, scratch))
            continue
        r_tensor = torch.tensor(r, dtype=compute_dtype(tensor.dtype), device=tensor.device)
        for g, block in zip(_blocks(flat_view(grad)), _blocks(flat_view(tensor)), strict=True):
            _add_block_(g, scratch.widened("x", block), layer, r_tensor, scratch)


def _add_block_(g: Tensor, x: Tensor, layer: tuple[float, ...], r: Tensor, scratch: _Scratch) -> None:
    if g.dtype != x.dtype:  # half precision: one rounding, at the end
        g.copy_(_slope(x, layer, r, scratch).add_(g))
        return
    mean, pivot, _, b, c = layer
    if pivot == 0.0 and r != 0:  # the scaling rides on the addition
        g.addcdiv_(x, _magnitude(x, r, scratch.take("a", x, x.dtype)), value=b - c * mean)
        if c:
            g.add_(x, alpha=c)
        return
    g.add_(_slope(x, layer, r, scratch))


def _written(tensor: Tensor, layer: tuple[float, ...], r: float, scratch: _Scratch) -> Tensor:
    out = torch.empty_like(tensor)
    r_tensor = torch.tensor(r, dtype=compute_dtype(tensor.dtype), device=tensor.device)
    if not same_layout(out, tensor):
        tensor = tensor.contiguous()
        out = torch.empty_like(tensor)
    for o, block in zip(_blocks(flat_view(out)), _blocks(flat_view(tensor)), strict=True):
        o.copy_(_slope(scratch.widened("x", block), layer, r_tensor, scratch))
    return out


def grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, r: float) -> list[Tensor]:
    """Return s * (b + c (a - m)) of every tensor, each with its tensor's dtype."""
    scratch = _Scratch()
    layers = _layers(stats, coef, tensors, 1.0)
    return [_written(t, layer, r, scratch) for t, layer in zip(tensors, layers, strict=True)]
