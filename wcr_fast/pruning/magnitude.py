"""Thresholds and masks by magnitude: exact counts, ties by order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wcr_fast.ops import select
from wcr_fast.ops.sharded import is_sharded, reshard
from wcr_fast.weights import Weight, Weights, as_weights


def magnitude_threshold(weights: Weights, sparsity: float | Iterable[float], *, scope: str = "global") -> Tensor:
    """Return the smallest magnitude that stays at a sparsity.

    Of N weights the N - round(sparsity * N) largest stay. With ties ``abs(w) >= threshold`` keeps too many: use
    :func:`magnitude_masks` for masks.

    Args:
        weights: a tensor, a module (its weights with two or more dimensions, without normalisation), or
            tensors; float16, bfloat16, float32 or float64, mixed as you like, any layout. DTensors, too: then all
            processes that hold them make the same call and get the same result, and plain tensors beside them
            are taken for replicas.
        sparsity: the fraction removed, in [0, 1]; for Q of them (a list, any other iterable, a 1-d array or
            tensor) the result has a leading dimension Q, from one scan of the weights.
        scope: ``"global"`` for one pool, ``"layer"`` for each tensor by itself.

    Returns:
        Threshold, 0-d or [L] ([Q] or [Q, L]), float32 (float64 when any weight is), on the first weight's
        device; inf where nothing is kept. NaN on CUDA when a weight is NaN: on the triton backend nothing waits
        for the device. Of sharded weights it is a plain tensor, and NaN raises on any device.

    Raises:
        TypeError: for anything but real floating-point weights, and for a sparsity that isn't a number.
            ValueError: for a sparsity outside [0, 1], an unknown scope, and on the CPU for NaN, naming its position.

    Example:
        >>> import torch, wcr_fast
        >>> wcr_fast.magnitude_threshold([torch.tensor([1.0, -3.0]), torch.tensor([2.0, 0.5])], 0.5)
        tensor(2.)
    """
    op = "magnitude_threshold"
    if scope not in ("global", "layer"):
        raise ValueError(f'{op}: scope must be "global" or "layer", got {scope!r}; magnitude_masks knows more')
    sparsities, many = select.check_sparsities(sparsity, op)
    tensors = [w.param.detach() for w in _listed(weights, op)]
    # As an op of torch, for meta and fake tensors; without any tensor there is nothing to dispatch on.
    as_op = bool(tensors) and not any(is_sharded(t) for t in tensors)
    find = torch.ops.wcr_fast.magnitude_threshold if as_op else select.threshold
    found = find(tensors, sparsities, scope)
    return found if many else found.squeeze(0)


def magnitude_masks(weights: Weights, sparsity: float | None, *, scope: str = "global") -> list[Tensor]:
    """Return masks of the weights that stay (True = kept).

    Of N weights the N - round(sparsity * N) largest stay, exactly. Of equal magnitudes those first in list
    order, then in logical row-major order stay, as in a stable descending sort, whatever the memory format.

    Args:
        weights: as for :func:`magnitude_threshold`.
        sparsity: the fraction removed, in [0, 1]; None for the n:m scopes.
        scope: ``"global"``, ``"layer"``, ``"row"`` (each output by itself), or ``"n:m"`` such as ``"2:4"``: n
            kept of each m consecutive weights along the input dimension; a shorter rest stays dense.

    Returns:
        One contiguous bool tensor per weight, with its shape and on its device; no sync with CUDA on the triton
        backend. Of a DTensor a DTensor, cut alike.

    Raises:
        TypeError, ValueError: as :func:`magnitude_threshold`. On CUDA the masks of weights with NaN mean nothing.

    Example:
        >>> import torch, wcr_fast
        >>> wcr_fast.magnitude_masks(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), None, scope="2:4")
        [tensor([[False,  True,  True, False]])]
    """
    op = "magnitude_masks"
    nm = select.check_scope(scope, sparsity, op)
    value = 0.0 if nm else select.check_sparsity(sparsity, op)
    chosen = _listed(weights, op)
    if not chosen:
        return []
    tensors = [w.param.detach() for w in chosen]
    if any(is_sharded(t) for t in tensors):
        return select.masks(chosen, value, scope)
    return list(torch.ops.wcr_fast.magnitude_masks(tensors, value, scope, select.transposed(chosen)))


def _listed(weights: Weights, op: str) -> list[Weight]:
    if isinstance(weights, nn.Module):
        reshard(weights)
    return as_weights(weights, op=op, sharded=True)
