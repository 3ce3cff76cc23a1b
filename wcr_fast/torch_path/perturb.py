"""Perturbing weights along a gradient and taking that back, in torch.

e = scale T^2 g with T = |w| + eta, or 1. Arithmetic is in float32 (float64 for float64 weights); squares are summed
in rows by one thread each, then in float64, so the norm depends on no number of threads. Where T is 1, float32 and
float64 lists go to torch's own multi-tensor calls; the rest goes through scratch, in blocks that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcr_fast.slots import Site
from wcr_fast.torch_path.layout import flat_view, is_dense, same_layout
from wcr_fast.torch_path.moments import BLOCK, SMALL, Scratch, compute_dtype, stats_dtype

_ROW = 4096


def _is_plain(site: Site, grad: Tensor, keep_zeros: bool) -> bool:
    # With 16-bit tensors torch rounds the product before it adds.
    alike = grad.dtype == site.weight.dtype and grad.element_size() > 2
    return alike and site.eta < 0 and not keep_zeros


def _row_norms(x: Tensor) -> Iterator[Tensor]:
    """Yield the norms of rows of a flat tensor, the last of them perhaps shorter."""
    dtype, whole = compute_dtype(x.dtype), x.numel() // _ROW * _ROW
    if x.numel() <= SMALL or x.device.type != "cpu":
        yield torch.linalg.vector_norm(x, dtype=dtype).view(1)
        return
    yield torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=1, dtype=dtype)
    if whole < x.numel():
        yield torch.linalg.vector_norm(x[whole:], dtype=dtype).view(1)


def _flat(site: Site, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return weight and gradient in step, 1-d, and what has to be copied back to the weight: its elements have gaps."""
    weight = site.weight
    dense = weight if is_dense(weight) else weight.contiguous()
    if not same_layout(grad, dense):
        grad = torch.empty_like(dense, dtype=grad.dtype).copy_(grad)
    return flat_view(dense), flat_view(grad), None if dense is weight else dense


def _directions(
    site: Site, w: Tensor, g: Tensor, keep_zeros: bool, scratch: Scratch
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield a block of the weights, T g and T (None: 1) in the dtype of the arithmetic; T g may be the gradient."""
    dtype = compute_dtype(w.dtype)
    for block, grad in zip(w.split(BLOCK), g.split(BLOCK), strict=True):
        wide = grad if grad.dtype == dtype else scratch.take("g", grad, dtype).copy_(grad)
        if site.eta < 0 and not keep_zeros:
            yield block, wide, None
            continue
        t = scratch.take("t", block, dtype).copy_(block).abs_()
        if site.eta < 0:
            t.sign_()
        elif keep_zeros:
            t.add_(torch.sign(t), alpha=site.eta)
        else:
            t.add_(site.eta)
        yield block, torch.mul(t, wide, out=scratch.take("tg", block, dtype)), t


def squares(sites: Sequence[Site], grads: Sequence[Tensor], keep_zeros: bool) -> Tensor:
    """Return the sum of all (T g)^2, [1] in float64 where the device has it, on the first weight's device."""
    scratch, norms, small = Scratch(0.0), [], []
    for site, grad in zip(sites, grads, strict=True):
        if site.eta >= 0 or keep_zeros:
            w, g, _ = _flat(site, grad)
            for _, direction, _ in _directions(site, w, g, keep_zeros, scratch):
                norms.extend(_row_norms(direction))
        elif grad.numel() <= SMALL:
            small.append(grad)
        else:
            norms.extend(_row_norms(flat_view(grad)))
    for narrow in (True, False):
        alike = [g for g in small if (g.element_size() == 2) == narrow]
        if alike:
            norms += [n.view(1) for n in torch._foreach_norm(alike, dtype=torch.float32 if narrow else None)]
    device = sites[0].weight.device
    return torch.cat([n.to(device, stats_dtype(device)) for n in norms]).square_().sum(0, keepdim=True)


def ascend_(
    sites: Sequence[Site], grads: Sequence[Tensor], squares: Tensor | None, keep_zeros: bool, saved: list[Site]
) -> None:
    """Save the weights, then add rho T^2 g to them, divided by the root of the squares where they are given.

    Squares that are not finite add nothing. ``saved`` gets the sites.
    """
    length = 1.0 if squares is None else squares.sum().sqrt().item() + 1e-12
    torch._foreach_copy_([s.saved for s in sites], [s.weight for s in sites])
    saved.extend(sites)
    if not math.isfinite(length):
        return
    scratch = Scratch(0.0)
    plain: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for site, grad in zip(sites, grads, strict=True):
        scale = site.rho / length
        if _is_plain(site, grad, keep_zeros):
            plain.setdefault(scale, []).append((site.weight, grad))
            continue
        w, g, copy = _flat(site, grad)
        for block, direction, t in _directions(site, w, g, keep_zeros, scratch):
            if t is not None:
                direction = direction.mul_(t)
            if block.dtype == direction.dtype:
                block.add_(direction, alpha=scale)
            else:  # rounded once
                block.copy_(scratch.take("w", block, direction.dtype).copy_(block).add_(direction, alpha=scale))
        if copy is not None:
            site.weight.copy_(copy)
    for scale, pairs in plain.items():
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=scale)


def restore_(sites: Sequence[Site], masked: Sequence[Tensor | None] | None = None) -> None:
    """Put the saved weights back; before that, set gradients in ``masked`` to zero where their weight is."""
    for site, grad in zip(sites, masked or (), strict=False):
        if grad is not None:
            grad.masked_fill_(site.weight == 0, 0.0)
    torch._foreach_copy_([s.weight for s in sites], [s.saved for s in sites])
