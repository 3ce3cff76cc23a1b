"""Perturbing weights along a gradient and taking that back, on Triton: one launch per device and kind of dtypes."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.perturb import launch_ascend, launch_restore, launch_squares
from wcr_fast.slots import Site
from wcr_fast.table import TensorTable, build_table, on_device
from wcr_fast.torch_path.layout import same_layout


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _tables(sites: Sequence[Site], grads: Sequence[Tensor | None]) -> Iterator[tuple[TensorTable, torch.dtype]]:
    """Yield the tables of the sites, each with its gradients' dtype."""
    kinds: dict[tuple, list[int]] = {}
    for i, (site, grad) in enumerate(zip(sites, grads, strict=True)):
        if site.weight.numel():
            dtype = site.weight.dtype
            kinds.setdefault((site.weight.device, dtype, dtype if grad is None else grad.dtype), []).append(i)
    for (_, _, grad_dtype), places in kinds.items():
        extra = [(sites[i].saved.data_ptr(), _bits(sites[i].rho), _bits(sites[i].eta)) for i in places]
        table = build_table([sites[i].weight for i in places], places, CHUNK, extra=extra)
        yield table, grad_dtype


def _aligned(sites: Sequence[Site], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients in step with their weights; copies where that takes one."""
    pairs = [(s.weight, g.detach()) for s, g in zip(sites, grads, strict=True)]
    return [g if same_layout(g, w) else torch.empty_like(w, dtype=g.dtype).copy_(g) for w, g in pairs]


def squares(sites: Sequence[Site], grads: Sequence[Tensor], keep_zeros: bool) -> Tensor:
    """Return sums of (T g)^2 that add up to that of all, float64 [K], on the first weight's device."""
    grads = _aligned(sites, grads)
    home, tables = sites[0].weight.device, list(_tables(sites, grads))
    out = torch.empty(len(tables), dtype=torch.float64, device=home)  # a launch writes one of them
    for i, (table, grad_dtype) in enumerate(tables):
        mine = out[i : i + 1] if table.device == home else torch.empty(1, dtype=torch.float64, device=table.device)
        with on_device(table.device):
            launch_squares(
                table.rows,
                table.block_to_tensor,
                table.addresses([grads[i] for i in table.positions]),
                table.scratch("squares", table.num_chunks, torch.float64),
                table.scratch("squares counter", 1, torch.int32),
                mine,
                dtype=table.dtype,
                grad_dtype=grad_dtype,
                adaptive=any(sites[i].eta >= 0 for i in table.positions),
                keep_zeros=keep_zeros,
            )
        if table.device != home:
            out[i : i + 1] = mine.to(home)
    return out


def ascend_(
    sites: Sequence[Site], grads: Sequence[Tensor], squares: Tensor | None, keep_zeros: bool, saved: list[Site]
) -> None:
    """Save the weights, then add rho T^2 g to them, divided by the root of the squares' sum where they are given.

    Squares that are not finite add nothing. ``saved`` gets the sites of each launch.
    """
    grads = _aligned(sites, grads)
    for table, grad_dtype in _tables(sites, grads):
        with on_device(table.device):
            launch_ascend(
                table.rows,
                table.block_to_tensor,
                table.addresses([grads[i] for i in table.positions]),
                None if squares is None else squares.to(table.device),
                dtype=table.dtype,
                grad_dtype=grad_dtype,
                adaptive=any(sites[i].eta >= 0 for i in table.positions),
                keep_zeros=keep_zeros,
            )
        saved.extend(sites[i] for i in table.positions)


def restore_(sites: Sequence[Site], masked: Sequence[Tensor | None] | None = None) -> None:
    """Put the saved weights back; before that, set gradients in ``masked`` to zero where their weight is."""
    grads: Sequence[Tensor | None] = [None] * len(sites)
    if masked is not None:
        pairs = zip(sites, masked, strict=True)
        grads = [None if g is None else _aligned([s], [g])[0] for s, g in pairs]
    for table, grad_dtype in _tables(sites, grads):
        here = [grads[i] for i in table.positions]
        addresses = None
        if any(g is not None for g in here):
            addresses = table.sent(np.array([0 if g is None else g.data_ptr() for g in here], dtype=np.int64))
        with on_device(table.device):
            launch_restore(table.rows, table.block_to_tensor, addresses, dtype=table.dtype, grad_dtype=grad_dtype)
    for grad, inner in zip(masked or (), grads, strict=False):
        if grad is not None and inner.data_ptr() != grad.data_ptr():
            grad.copy_(inner)
