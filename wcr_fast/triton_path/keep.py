"""Masks enforced by a kernel: one launch per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wcr_fast.kernels.keep import launch_keep
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.table import build_table, group, on_device
from wcr_fast.torch_path.layout import is_dense


def keep_(tensors: Sequence[Tensor], words: Sequence[Tensor]) -> None:
    """Write +0.0 where the interleaved words, in the tensor's memory order, have a 0."""
    tensors = [t.detach() for t in tensors]
    dense = [t if is_dense(t) else t.clone() for t in tensors]
    for positions in group(dense):
        extra = [(words[i].data_ptr(),) for i in positions]
        table = build_table([dense[i] for i in positions], positions, CHUNK, extra=extra)
        with on_device(table.device):
            launch_keep(table.rows, table.block_to_tensor, dtype=table.dtype)
    for tensor, copy in zip(tensors, dense, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
