"""Selection written from its definition: a stable descending sort in logical order. Imports torch only."""

from __future__ import annotations

import torch


def num_keep(sparsity, numel):
    return numel - round(sparsity * numel)


def keep_lines(magnitudes, count):
    """True for the `count` largest of every line of [lines, size]; of equal ones the earlier."""
    order = torch.sort(magnitudes, dim=1, descending=True, stable=True).indices
    keep = torch.zeros(magnitudes.shape, dtype=torch.bool)
    return keep.scatter_(1, order[:, :count], True)


def keep_flat(magnitudes, count):
    return keep_lines(magnitudes.view(1, -1), count).view(-1)


def flat64(tensor):
    """Magnitudes in logical row-major order, exact in float64."""
    return tensor.detach().cpu().double().abs().reshape(-1)


def masks(tensors, sparsity, scope="global"):
    if scope == "global":
        joined = torch.cat([flat64(t) for t in tensors])
        keep = keep_flat(joined, num_keep(sparsity, joined.numel()))
        parts = keep.split([t.numel() for t in tensors])
        return [k.view(t.shape) for k, t in zip(parts, tensors, strict=True)]
    if scope == "layer":
        return [keep_flat(flat64(t), num_keep(sparsity, t.numel())).view(t.shape) for t in tensors]
    if scope == "row":
        return [rows(t, sparsity) for t in tensors]
    kept, group = (int(part) for part in scope.split(":"))
    return [nm(t, kept, group) for t in tensors]


def rows(tensor, sparsity, out_dim=0):
    if tensor.numel() == 0:
        return torch.ones(tensor.shape, dtype=torch.bool)
    view = tensor.movedim(out_dim, 0) if tensor.dim() else tensor
    lines = flat64(view).view(view.shape[0] if view.dim() else 1, -1)
    keep = keep_lines(lines, num_keep(sparsity, lines.shape[1])).view(view.shape)
    return keep.movedim(0, out_dim) if tensor.dim() else keep


def nm(tensor, kept, group, in_dim=None):
    if tensor.dim() == 0 or tensor.numel() == 0:
        return torch.ones(tensor.shape, dtype=torch.bool)
    in_dim = (1 if tensor.dim() >= 2 else -1) if in_dim is None else in_dim
    view = tensor.movedim(in_dim, -1)
    main = view.shape[-1] // group * group
    keep = torch.ones(view.shape, dtype=torch.bool)
    if main:
        part = view[..., :main]
        keep[..., :main] = keep_lines(flat64(part).view(-1, group), kept).view(part.shape)
    return keep.movedim(-1, in_dim)


def threshold(tensors, sparsity, scope="global"):
    """The smallest magnitude kept, float64; inf where nothing is."""
    if scope == "global":
        return _smallest(torch.cat([flat64(t) for t in tensors]), sparsity)
    return torch.stack([_smallest(flat64(t), sparsity) for t in tensors])


def _smallest(magnitudes, sparsity):
    count = num_keep(sparsity, magnitudes.numel())
    if count == 0:
        return torch.tensor(torch.inf, dtype=torch.float64)
    return torch.sort(magnitudes, descending=True).values[count - 1]


def prune(tensors, keep):
    """What the weights are afterwards, by selection: +0.0 where removed."""
    return [torch.where(k.to(t.device), t.detach(), torch.zeros_like(t)) for t, k in zip(tensors, keep, strict=True)]
