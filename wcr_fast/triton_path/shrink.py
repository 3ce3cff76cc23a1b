"""Magnitudes made smaller in place on Triton: one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.shrink import launch_shrink
from wcr_fast.table import build_table, group, numbers_on, on_device
from wcr_fast.triton_path.moments import dense


def shrink_(
    tensors: Sequence[Tensor],
    which: Sequence[int],
    amounts: Sequence[float | Tensor],
    *,
    proximal: bool,
    found_inf: Tensor | None,
) -> None:
    """Take amounts[which] of every tensor off its magnitudes; amounts and found_inf are read on the device.

    A tensor with gaps goes by way of a dense copy.
    """
    filled = [dense(t) for t in tensors]
    for positions in group(filled):
        device = filled[positions[0]].device
        with on_device(device):
            table = build_table(
                [filled[i] for i in positions], positions, CHUNK, extra=[(which[i],) for i in positions]
            )
            launch_shrink(
                table.rows,
                table.block_to_tensor,
                numbers_on(amounts, device),
                None if found_inf is None else found_inf.to(device, torch.float32),
                dtype=table.dtype,
                proximal=proximal,
            )
    for tensor, copy in zip(tensors, filled, strict=True):
        if copy.data_ptr() != tensor.data_ptr():
            tensor.copy_(copy)
