"""Moments and gradients of a list of tensors on Triton: one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.moments import launch_gradient, launch_moments
from wcr_fast.table import TensorTable, build_table, group, on_device
from wcr_fast.torch_path.layout import is_dense, same_layout
from wcr_fast.torch_path.moments import compute_dtype


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its elements fill one block of memory, else a copy laid out densely."""
    tensor = tensor.detach()
    return tensor if is_dense(tensor) else tensor.clone()


def _table(tensors: Sequence[Tensor], positions: Sequence[int]) -> TensorTable:
    return build_table([tensors[i] for i in positions], positions, CHUNK)


def layer_moments(
    tensors: Sequence[Tensor], r: float, rule: tuple[str, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return stats float64 [4, L] (mean, variance, pivot, mean - pivot) and coef float64 [3, L] or None.

    coef holds f, df/dmean and df/dvar of ``rule = (family, eps)``. Both lie on the first tensor's device; an
    empty tensor's columns are 0. No synchronisation with the host, bitwise repeatable.
    """
    tensors = [_dense(t) for t in tensors]
    home = tensors[0].device
    groups = group(tensors)
    # Kernels write the columns of their tensors; only an empty tensor's are left as they were.
    allocate = torch.empty if sum(map(len, groups)) == len(tensors) else torch.zeros
    total = sum(t.numel() for t in tensors)
    outputs: dict[torch.device, Tensor] = {}
    for device in (home, *(tensors[positions[0]].device for positions in groups)):
        if device not in outputs:
            outputs[device] = allocate((7, len(tensors)), dtype=torch.float64, device=device)
    for positions in groups:
        table = _table(tensors, positions)
        out = outputs[table.device]
        with on_device(table.device):
            launch_moments(
                table.rows,
                table.block_to_tensor,
                table.scratch("partials", 2 * table.num_chunks, torch.float64),
                table.scratch("counters", len(positions), torch.int32),
                out[:4],
                out[4:] if rule else None,
                dtype=table.dtype,
                r=r,
                rule=rule,
                total=total,
            )
    for device, out in outputs.items():
        if device != home:
            columns = [i for i, t in enumerate(tensors) if t.device == device]
            outputs[home][:, columns] = out[:, columns].to(home)
    return outputs[home][:4], outputs[home][4:] if rule else None


def _launch_gradient(
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    r: float,
    *,
    accumulate: bool,
) -> None:
    """Add the gradient to ``outs``, or write it there; each is dense and laid out like its tensor."""
    for positions in group(tensors):
        table = _table(tensors, positions)
        device = table.device
        with on_device(device):
            launch_gradient(
                table.rows,
                table.block_to_tensor,
                table.addresses([outs[i] for i in positions]),
                stats.to(device),
                coef.to(device),
                lam.to(device) if isinstance(lam, Tensor) else lam,
                dtype=table.dtype,
                r=r,
                accumulate=accumulate,
            )


def add_grad_(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    r: float,
) -> None:
    """Add lam * s * (b + c ((a - p) - (mean - p))) to every gradient, b = coef[1] / n and c = 2 coef[2] / n.

    ``lam`` is a number or a 0-d tensor, which is read on the device. A gradient laid out otherwise than its
    weight takes a copy of the weight in its own layout. A gradient of another dtype (``Tensor.grad_dtype``) is
    computed beside it in the dtype of the arithmetic, then added with one rounding.

    Raises ValueError, before anything is written, where a gradient and its weight lie on different devices.
    """
    for i, (grad, tensor) in enumerate(zip(grads, tensors, strict=True)):
        if grad.device != tensor.device:
            raise ValueError(f"grads[{i}] is on {grad.device}, its weight on {tensor.device}; move it there first")
    outs, weights = [], []
    for grad, tensor in zip(grads, tensors, strict=True):
        grad, tensor = grad.detach(), tensor.detach()
        if grad.dtype != tensor.dtype:
            # The same arithmetic on the same values as in the moments, so equal magnitudes still give exactly zero.
            tensor = _dense(tensor).to(compute_dtype(tensor.dtype))
            grad = torch.zeros_like(tensor)
        elif not (is_dense(grad) and same_layout(grad, tensor)):
            grad = _dense(grad)
            tensor = torch.empty_like(grad).copy_(tensor)
        outs.append(grad)
        weights.append(tensor)
    _launch_gradient(weights, outs, stats, coef, lam, r, accumulate=True)
    for grad, weight, out in zip(grads, tensors, outs, strict=True):
        if grad.dtype != weight.dtype:
            grad.detach().add_(out)
        elif out.data_ptr() != grad.data_ptr():
            grad.detach().copy_(out)


def grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, r: float) -> list[Tensor]:
    """Return s * (b + c ((a - p) - (mean - p))) of every tensor, laid out like ``torch.empty_like`` of it."""
    tensors = [_dense(t) for t in tensors]
    outs = [torch.empty_like(t) for t in tensors]
    _launch_gradient(tensors, outs, stats, coef, 1.0, r, accumulate=False)
    return outs
