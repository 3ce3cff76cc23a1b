"""Plain tensors on their way to a backend: which one, and the views in which it takes rows and n:m groups."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.torch_path.cuts import num_keep
from wcr_fast.weights import Weight


def takes_triton(tensors: Sequence[Tensor]) -> bool:
    """Tell whether these tensors go to Triton: one device has them all, and Triton runs there."""
    return use_triton(tensors) and len({t.device for t in tensors}) == 1


def plain_path(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module that selects among these tensors: Triton's, or torch's where they span devices."""
    if takes_triton(tensors):
        from wcr_fast.triton_path import select
    else:
        from wcr_fast.torch_path import select
    return select


def row_views(weights: Sequence[Weight], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with their output dimension first; the groups of a transposed convolution one by one."""
    views = []
    for weight, tensor in zip(weights, tensors, strict=True):
        parts = tensor.chunk(weight.groups) if weight.groups > 1 else (tensor if tensor.dim() else tensor.view(1),)
        views += [part.movedim(weight.out_dim, 0) for part in parts]
    return views


def group_views(weights: Sequence[Weight], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with their input dimension last: of a transposed convolution that of one group."""
    views = []
    for weight, tensor in zip(weights, tensors, strict=True):
        if weight.groups > 1:
            views.append(tensor.unflatten(0, (weight.groups, -1)).movedim(1, -1))
        else:
            views.append(tensor.movedim(weight.in_dim, -1) if tensor.dim() else tensor.view(1))
    return views


def row_counts(views: Sequence[Tensor], sparsity: float) -> list[int]:
    """Return how many weights of a row stay, for each view."""
    return [num_keep(sparsity, v[0].numel()) if v.shape[0] else 0 for v in views]
