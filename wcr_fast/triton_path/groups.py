"""Groups of weights on Triton: one launch per device and dtype for their sums of squares, one to scale by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wcr_fast.kernels.groups import (
    LIMIT,
    SHORT_GROUPS,
    group_pieces,
    launch_group_scale,
    launch_group_squares,
    side_numbers,
)
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.table import build_table, group, on_device
from wcr_fast.torch_path.layout import same_layout
from wcr_fast.torch_path.moments import compute_dtype
from wcr_fast.triton_path.moments import dense

if TYPE_CHECKING:
    from wcr_fast.ops.groups import Part, Side


def _shape(tensor: Tensor, dim: int) -> tuple[int, int, int]:
    """Return J, B and a group's size of a dense tensor's groups along a dimension: see ``kernels/groups.py``."""
    number = tensor.shape[dim]
    # The stride of a dimension of one index says nothing.
    inner = tensor.stride(dim) if number > 1 else tensor.numel()
    if max(number, inner) >= LIMIT:
        raise ValueError(f"groups of {inner} elements in a row, {number} of them: at most {LIMIT} are supported")
    return number, inner, tensor.numel() // number


def group_squares(parts: Sequence[Part], total: int) -> Tensor:
    """Return the sum of squares of every group, float64, on the first part's device; bitwise repeatable."""
    home = parts[0].tensor.device
    tensors = [dense(part.tensor) for part in parts]
    found: dict[torch.device, Tensor] = {}
    for positions in group(tensors):
        listed, lengths, extra = [], [], []
        counters = 0
        for i in positions:
            for dim, base in parts[i].sides:
                number, inner, size = _shape(tensors[i], dim)
                blocks, pieces = group_pieces(number, inner, size)
                listed.append(tensors[i])
                lengths.append(blocks * pieces)
                extra.append((number, inner, size, pieces, base, counters))
                counters += blocks
        with on_device(listed[0].device):
            table = build_table(listed, range(len(listed)), 1, lengths=lengths, extra=extra)
            if table.device not in found:
                found[table.device] = torch.zeros(total, dtype=torch.float64, device=table.device)
            launch_group_squares(
                table.rows,
                table.block_to_tensor,
                table.scratch("group partials", SHORT_GROUPS * table.num_chunks, torch.float64),
                table.scratch("group counters", counters, torch.int32),
                found[table.device],
                dtype=table.dtype,
            )
    sums = [squares.to(home) for squares in found.values()]
    return sum(sums[1:], sums[0]) if sums else torch.zeros(total, dtype=torch.float64, device=home)


def _scale(
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    sides: Sequence[tuple[Side, ...]],
    factors: Tensor,
    *,
    accumulate: bool,
    in_place: bool,
) -> None:
    # Where there is one kind of groups only, the other's factor is the 0 at the end.
    nothing = side_numbers(len(factors), 1, 1)
    factors = torch.cat([factors, factors.new_zeros(1)])
    for positions in group(tensors):
        extra = []
        for i in positions:
            numbers = [side_numbers(base, *_shape(tensors[i], dim)[:2]) for dim, base in sides[i]]
            extra.append(sum([*numbers, nothing][:2], ()))
        device, dtype = tensors[positions[0]].device, tensors[positions[0]].dtype
        with on_device(device):
            table = build_table([tensors[i] for i in positions], positions, CHUNK, extra=extra)
            launch_group_scale(
                table.rows,
                table.block_to_tensor,
                table.addresses([outs[i] for i in positions]),
                factors.to(device, compute_dtype(dtype)),
                dtype=dtype,
                accumulate=accumulate,
                in_place=in_place,
            )


def add_scaled_(outs: list[Tensor], parts: Sequence[Part], factors: Tensor) -> None:
    """Add every weight, times the sum of its groups' factors, to ``outs``.

    One that is laid out otherwise than its weight, or of another dtype, is computed beside it.
    """
    tensors, targets = [], []
    for part in parts:
        target, tensor = part.of(outs[part.layer]).detach(), dense(part.tensor)
        plain = target.dtype == tensor.dtype and same_layout(target, tensor)
        tensor = tensor if plain else tensor.to(compute_dtype(tensor.dtype))
        tensors.append(tensor)
        targets.append(target if plain else torch.zeros_like(tensor))
    _scale(tensors, targets, [part.sides for part in parts], factors, accumulate=True, in_place=False)
    for part, target in zip(parts, targets, strict=True):
        out = part.of(outs[part.layer]).detach()
        if out.data_ptr() != target.data_ptr():
            out.add_(target)


def scale_(parts: Sequence[Part], factors: Tensor) -> None:
    """Multiply every weight by its group's factor in place, to +0.0 where that is 0."""
    tensors = [dense(part.tensor) for part in parts]
    _scale(tensors, tensors, [part.sides for part in parts], factors, accumulate=False, in_place=True)
    for part, tensor in zip(parts, tensors, strict=True):
        if part.tensor.data_ptr() != tensor.data_ptr():
            part.tensor.detach().copy_(tensor)
