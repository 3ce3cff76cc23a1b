"""Moments of smooth magnitudes and their gradient in torch, in blocks that stay in cache.

With a = sqrt(w^2 + r), one sweep gives sum(a) and sum(a^2), hence mean m and V = mean(a^2) - m^2. Where V is
small against m^2 that difference cancels, so a second sweep sums (a - p) and (a - p)^2 about a pivot p near the
mean. The pivot says which form of the gradient is accurate, too: p = 0 marks the well-conditioned layers.

Sums are float32 only within short rows: the rounding of one large sum would cost V, and with it the pull of a
penalty, up to ten units in the last place. Rows are summed by one thread each, so the result depends on no number of
threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcr_fast.torch_path.layout import flat_view, same_layout

# 256 Ki float32 values: weights, gradient and scratch of a block fit the L2 of two cores, and the cost of
# dispatching an op is small against its work.
BLOCK = 1 << 18
# Summed in float32; longer rows take as long.
ROW = 512
# Layers up to this size are summed in float64: a call costs more than their elements.
SMALL = 16384
# Below this V / m^2 the one-sweep variance would lose more than one decimal digit of float32.
WELL_CONDITIONED = 0.1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for weights of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums are merged on a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class Scratch:
    """Block buffers and r of one call: nothing here is as large as a layer, except off the CPU."""

    def __init__(self, r: float) -> None:
        self._r = r
        self.smooth = r != 0
        self._buffers: dict[tuple, Tensor] = {}

    def r(self, like: Tensor) -> Tensor:
        """Return r as a 0-d tensor: addcmul takes no plain number."""
        key = ("r", like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.tensor(self._r, dtype=like.dtype, device=like.device)
        return self._buffers[key]

    def magnitude(self, x: Tensor, out: Tensor) -> Tensor:
        """Write sqrt(x^2 + r) (|x| where r is 0) into out."""
        if not self.smooth:
            return torch.abs(x, out=out)
        return torch.addcmul(self.r(x), x, x, out=out).sqrt_()

    def take(self, slot: str, like: Tensor, dtype: torch.dtype, used: int = 0) -> Tensor:
        """Return a 1-d buffer as large as ``like``, behind the first ``used`` elements that are still in use."""
        key = (slot, dtype, like.device)
        end = used + like.numel()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < end:
            # Who still uses the old one keeps it.
            size = max(end, min(BLOCK, 4 * end))
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[used:end]

    def widened(self, slot: str, block: Tensor) -> Tensor:
        dtype = compute_dtype(block.dtype)
        return block if block.dtype == dtype else self.take(slot, block, dtype).copy_(block)


def blocks_of(flat: Tensor) -> Iterator[Tensor]:
    if flat.device.type != "cpu" or flat.numel() <= BLOCK:
        return iter((flat,))
    return iter(flat.split(BLOCK))


def _row_sums(values: Tensor) -> Tensor:
    """Return the sums of rows of a 1-d tensor, the last of them perhaps shorter."""
    whole = values.numel() // ROW * ROW
    if whole == values.numel():
        return values.view(-1, ROW).sum(1)
    return torch.cat([values[:whole].view(-1, ROW).sum(1), values[whole:].sum(0, keepdim=True)])


def _total(rows: list[Tensor]) -> float:
    sums = (rows[0] if len(rows) == 1 else torch.cat(rows)).cpu()
    if sums.numel() > SMALL:  # torch would share it out among its threads
        sums = _row_sums(sums.double())
    return sums.sum(dtype=torch.float64).item()


def one_sweep(flat: Tensor, scratch: Scratch) -> tuple[float, float]:
    n = flat.numel()
    if n <= SMALL and flat.device.type == "cpu":
        x = flat.double()
        a = torch.addcmul(scratch.r(x), x, x) if scratch.smooth else x * x
        square, mean = a.sum().item() / n, a.sqrt_().sum().item() / n
        return mean, square - mean * mean
    return from_sums([block_sums(block, scratch) for block in blocks_of(flat)], n)


def block_sums(block: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return the row sums of a^2 and of a of one block."""
    x = scratch.widened("x", block)
    a = scratch.take("a", x, x.dtype)
    if scratch.smooth:  # a^2 lies there on the way to a
        squares = _row_sums(torch.addcmul(scratch.r(x), x, x, out=a))
        return squares, _row_sums(a.sqrt_())
    squares = _row_sums(torch.mul(x, x, out=a))
    return squares, _row_sums(torch.abs(x, out=a))


def from_sums(sums: Sequence[tuple[Tensor, Tensor]], n: int) -> tuple[float, float]:
    """Return mean and one-sweep variance of n elements from the sums of their blocks."""
    squares, magnitudes = (list(of) for of in zip(*sums, strict=True))
    mean = _total(magnitudes) / n
    return mean, _total(squares) / n - mean * mean


def _about_pivot(flat: Tensor, pivot: Tensor, scratch: Scratch) -> tuple[float, float]:
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    for block in blocks_of(flat):
        x = scratch.widened("x", block)
        d = scratch.magnitude(x, scratch.take("a", x, x.dtype)).sub_(pivot)
        sums.append(_row_sums(d))
        squares.append(_row_sums(d.square_()))
    n = flat.numel()
    shift, square = _total(sums) / n, _total(squares) / n
    return shift, max(square - shift * shift, 0.0) if square == square else square


def _stats_of(flat: Tensor, scratch: Scratch) -> tuple[float, float, float, float]:
    if flat.numel() == 0:
        return 0.0, 0.0, 0.0, 0.0
    return finish(flat, scratch, *one_sweep(flat, scratch))


def finish(flat: Tensor, scratch: Scratch, mean: float, var: float) -> tuple[float, float, float, float]:
    """Return the stats of a tensor from its one-sweep moments, after a second sweep where they are not accurate."""
    if flat.numel() == 0:
        return 0.0, 0.0, 0.0, 0.0
    if var >= WELL_CONDITIONED * mean * mean and var > 0:
        return mean, var, 0.0, mean
    first = flat[:1].to(compute_dtype(flat.dtype))
    pivot = scratch.magnitude(first, torch.empty_like(first))[0]
    # A layer of equal magnitudes needs its own value as pivot to come out as exactly zero; an outlier in
    # the first place would bring the cancellation back, there the mean is the better pivot.
    if abs(pivot.item() - mean) > 0.1 * mean:
        pivot = torch.full_like(pivot, mean)
    shift, var = _about_pivot(flat, pivot, scratch)
    return pivot.item() + shift, var, pivot.item(), shift


def layer_moments(
    tensors: Sequence[Tensor], r: float, rule: tuple[str, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the stats of every tensor, and None: coefficients are left to the caller on this path.

    Stats are float64 [4, L] on the first tensor's device: mean, variance, pivot, mean - pivot.
    """
    scratch = Scratch(r)
    rows = [_stats_of(flat_view(t), scratch) for t in tensors]
    device = tensors[0].device
    return torch.tensor(rows, dtype=stats_dtype(device)).reshape(-1, 4).t().contiguous().to(device), None


def put(target: Tensor, x: Tensor, layer: tuple[float, ...], scratch: Scratch, *, base: Tensor | None) -> None:
    """Write base + (b + c (a - m)) s of one block into target, which may be the base; None stands for zero.

    x has the dtype of the arithmetic.
    """
    if target.dtype != x.dtype:  # torch adds in the wider of the two: one rounding, at the end
        wide = scratch.take("g", x, x.dtype)
        put(wide, x, layer, scratch, base=None)
        target.copy_(wide) if base is None else torch.add(base, wide, out=target)
        return
    mean, pivot, shift, b, c = layer
    t = scratch.take("a", x, x.dtype)
    if pivot == 0.0:  # = c w + (b - c m) s, fewer passes
        level = b - c * mean
        if c:
            base = torch.mul(x, c, out=target) if base is None else torch.add(base, x, alpha=c, out=target)
        elif base is None:
            base = target.zero_()
        if scratch.smooth:
            torch.addcdiv(base, x, scratch.magnitude(x, t), value=level, out=target)
        else:
            torch.add(base, torch.sign(x, out=t), alpha=level, out=target)
        return
    a = scratch.magnitude(x, scratch.take("m", x, x.dtype))
    torch.sub(a, pivot, out=t).sub_(shift).mul_(c).add_(b)
    t = t.mul_(x).div_(a) if scratch.smooth else t.mul_(torch.sign(x, out=a))
    target.copy_(t) if base is None else torch.add(base, t, out=target)


def pulls(stats: Tensor, coef: Tensor, sizes: Sequence[int], lams: Sequence[float]) -> list[tuple[float, ...]]:
    """Return mean, pivot, mean - pivot, b and c of every layer of so many elements, at its strength: see ``put``."""
    mean, _, pivot, shift = stats.tolist()
    _, slope_mean, slope_var = coef.tolist()
    return [
        (mean[i], pivot[i], shift[i], lam * slope_mean[i] / n, 2.0 * lam * slope_var[i] / n)
        for i, (size, lam) in enumerate(zip(sizes, lams, strict=True))
        for n in (max(size, 1),)
    ]


def layers_of(stats: Tensor, coef: Tensor, tensors: Sequence[Tensor], lam: float) -> list[tuple[float, ...]]:
    return pulls(stats, coef, [t.numel() for t in tensors], [lam] * len(tensors))


def add_grad_(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    r: float,
) -> None:
    """Add lam * s * (b + c (a - m)) to every gradient, b = coef[1] / n and c = 2 coef[2] / n."""
    scratch = Scratch(r)
    for grad, tensor, layer in zip(grads, tensors, layers_of(stats, coef, tensors, float(lam)), strict=True):
        if not same_layout(grad, tensor):
            grad.add_(_written(tensor, layer, scratch))
            continue
        for g, block in zip(blocks_of(flat_view(grad)), blocks_of(flat_view(tensor)), strict=True):
            put(g, scratch.widened("x", block), layer, scratch, base=g)


def _written(tensor: Tensor, layer: tuple[float, ...], scratch: Scratch) -> Tensor:
    out = torch.empty_like(tensor)
    if not same_layout(out, tensor):  # gaps or overlaps: the result has none
        tensor = torch.empty_like(out).copy_(tensor)
    for o, block in zip(blocks_of(flat_view(out)), blocks_of(flat_view(tensor)), strict=True):
        put(o, scratch.widened("x", block), layer, scratch, base=None)
    return out


def grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, r: float) -> list[Tensor]:
    """Return s * (b + c (a - m)) of every tensor, each with its tensor's dtype."""
    scratch = Scratch(r)
    layers = layers_of(stats, coef, tensors, 1.0)
    return [_written(t, layer, scratch) for t, layer in zip(tensors, layers, strict=True)]
