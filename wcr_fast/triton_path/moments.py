"""Moments and gradients of a list of tensors on Triton: one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wcr_fast.backend import active_backend
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.moments import launch_gradient, launch_moments
from wcr_fast.table import (
    TensorTable,
    build_table,
    capturing,
    current_stream,
    group,
    keep_for_graph,
    on_device,
)
from wcr_fast.torch_path.layout import is_dense, same_layout
from wcr_fast.torch_path.moments import compute_dtype
from wcr_fast.watch import Watch, watch


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its elements fill one block of memory, else a copy laid out densely."""
    tensor = tensor.detach()
    return tensor if is_dense(tensor) else tensor.clone()


def table_of(tensors: Sequence[Tensor], positions: Sequence[int]) -> TensorTable:
    """Return the table of these of some tensors, in the chunks of the moments' kernels."""
    return build_table([tensors[i] for i in positions], positions, CHUNK)


def _launch_moments(
    table: TensorTable, stats: Tensor, coef: Tensor | None, r: float, rule: tuple[str, float] | None, total: int
) -> None:
    launch_moments(
        table.rows,
        table.block_to_tensor,
        table.scratch("partials", 2 * table.num_chunks, torch.float64),
        table.scratch("counters", len(table.positions), torch.int32),
        stats,
        coef,
        dtype=table.dtype,
        r=r,
        rule=rule,
        total=total,
    )


def layer_moments(
    tensors: Sequence[Tensor], r: float, rule: tuple[str, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return stats float64 [4, L] (mean, variance, pivot, mean - pivot) and coef float64 [3, L] or None.

    coef holds f, df/dmean and df/dvar of ``rule = (family, eps)``. Both lie on the first tensor's device; an
    empty tensor's columns are 0. No synchronisation with the host, bitwise repeatable.
    """
    tensors = [dense(t) for t in tensors]
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
        table = table_of(tensors, positions)
        out = outputs[table.device]
        with on_device(table.device):
            _launch_moments(table, out[:4], out[4:] if rule else None, r, rule, total)
    for device, out in outputs.items():
        if device != home:
            columns = [i for i, t in enumerate(tensors) if t.device == device]
            outputs[home][:, columns] = out[:, columns].to(home)
    return outputs[home][:4], outputs[home][4:] if rule else None


def launch_table_gradient(
    table: TensorTable,
    out_addrs: Tensor,
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    r: float,
    *,
    accumulate: bool,
) -> None:
    """Add the gradient to the tensors of a table, or write it, in one launch."""
    launch_gradient(
        table.rows,
        table.block_to_tensor,
        out_addrs,
        stats,
        coef,
        lam.to(table.device) if isinstance(lam, Tensor) else lam,
        dtype=table.dtype,
        r=r,
        accumulate=accumulate,
    )


def _gradient(
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
        table = table_of(tensors, positions)
        device = table.device
        with on_device(device):
            out_addrs = table.addresses([outs[i] for i in positions])
            launch_table_gradient(table, out_addrs, stats.to(device), coef.to(device), lam, r, accumulate=accumulate)


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
    weights, outs = gradient_targets(grads, tensors)
    _gradient(weights, outs, stats, coef, lam, r, accumulate=True)
    put_back(grads, tensors, outs)


def gradient_targets(grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights as kernels read them and where they add to their gradients; see :func:`add_grad_`."""
    for i, (grad, tensor) in enumerate(zip(grads, tensors, strict=True)):
        if grad.device != tensor.device:
            raise ValueError(f"grads[{i}] is on {grad.device}, its weight on {tensor.device}; move it there first")
    outs, weights = [], []
    for grad, tensor in zip(grads, tensors, strict=True):
        grad, tensor = grad.detach(), tensor.detach()
        if grad.dtype != tensor.dtype:
            # The same arithmetic on the same values as in the moments, so equal magnitudes still give exactly zero.
            tensor = dense(tensor).to(compute_dtype(tensor.dtype))
            grad = torch.zeros_like(tensor)
        elif not (is_dense(grad) and same_layout(grad, tensor)):
            grad = dense(grad)
            tensor = torch.empty_like(grad).copy_(tensor)
        outs.append(grad)
        weights.append(tensor)
    return weights, outs


def put_back(grads: Sequence[Tensor], tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Bring what kernels computed beside the gradients into them."""
    for grad, weight, out in zip(grads, tensors, outs, strict=True):
        if grad.dtype != weight.dtype:
            grad.detach().add_(out)
        elif out.data_ptr() != grad.data_ptr():
            grad.detach().copy_(out)


class GradPlan:
    """Moments and gradient of a list that stays as it is: what a call has to find out is kept for the next.

    Made by :func:`grad_plan`. Stats and coef belong to the plan: the next run overwrites them.
    """

    def __init__(self, weights: Sequence[Tensor], looking: Watch) -> None:
        self._device, self._watch = weights[0].device, looking
        self._around = active_backend(), current_stream(self._device)
        self._tables = [table_of(weights, positions) for positions in group(weights)]
        both = torch.empty((7, len(weights)), dtype=torch.float64, device=self._device)
        self._stats, self._coef = both[:4], both[4:]
        self._total = sum(w.numel() for w in weights)

    def addresses(self) -> np.ndarray | None:
        """Return where the gradients lie, about to be written; None where anything else is not as it was."""
        if self._around != (active_backend(), current_stream(self._device)):
            return None
        found = self._watch.look()
        return None if found is None else found[0]

    def run(
        self, addresses: np.ndarray, lam: float | Tensor, r: float, rule: tuple[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Add lam times the gradient of the rule's penalty, in two launches a dtype; return stats and coef."""
        stats, coef, device = self._stats, self._coef, self._device
        keep_for_graph(device, self)
        with on_device(device):
            for table in self._tables:
                _launch_moments(table, stats, coef, r, rule, self._total)
            for table in self._tables:
                here = addresses if len(self._tables) == 1 else addresses[list(table.positions)]
                launch_table_gradient(table, table.sent(here), stats, coef, lam, r, accumulate=True)
        return stats, coef


PlanT = TypeVar("PlanT", bound=GradPlan)


def grad_plan(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    owners: Sequence[tuple[dict, str, Tensor]],
    kind: type[PlanT] = GradPlan,
) -> PlanT | None:
    """Return the plan of non-empty weights and their gradients, or None where a call has more to do than launches.

    One device, dense, each gradient with its weight's dtype and layout, and no graph being captured: it could not
    keep what was allocated on the way. owners: where the weights have to be found still.
    """
    device = weights[0].device
    plain = all(
        w.device == g.device == device and w.dtype == g.dtype and w.numel() and is_dense(w) and same_layout(g, w)
        for w, g in zip(weights, grads, strict=True)
    )
    looking = watch(weights, entries=owners, grads_written=True) if plain and not capturing(device) else None
    return None if looking is None else kind(weights, looking)


def grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, r: float) -> list[Tensor]:
    """Return s * (b + c ((a - p) - (mean - p))) of every tensor, laid out like ``torch.empty_like`` of it."""
    tensors = [dense(t) for t in tensors]
    outs = [torch.empty_like(t) for t in tensors]
    _gradient(tensors, outs, stats, coef, 1.0, r, accumulate=False)
    return outs
