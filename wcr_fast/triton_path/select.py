"""Selection on Triton: cuts, masks, rows and n:m of a list of tensors on one device, without host syncs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels._tile import LAYOUT_WIDTH, MAX_DIMS
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.mask import groups_per_chunk, launch_mask, launch_nm, launch_ties
from wcr_fast.kernels.rows import launch_rows
from wcr_fast.kernels.select import DIGIT_BITS, launch_histogram, launch_refine, launch_survey
from wcr_fast.table import build_table, group, on_device, upload
from wcr_fast.torch_path.cuts import INF_KEYS, Cuts, comparison_dtype
from wcr_fast.torch_path.layout import is_dense

MAX_GROUP = 16
_NO_LAYOUT = (0,) * LAYOUT_WIDTH


def _layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return a layout's table columns: number of dimensions, sizes and strides, innermost first, merged."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    dims = dims or [(1, 1)]
    if len(dims) > MAX_DIMS:
        raise ValueError(
            f"a tensor of shape {tuple(shape)} and strides {tuple(strides)} has {len(dims)} dimensions that "
            f"don't merge, more than {MAX_DIMS}; make it contiguous first"
        )
    padding = [0] * (MAX_DIMS - len(dims))
    return (len(dims), *(d[0] for d in dims), *padding, *(d[1] for d in dims), *padding)


def _in_any_order(tensor: Tensor) -> Tensor:
    """Return the tensor where its elements fill one block of memory, else a copy: for ops that ignore order."""
    return tensor.detach() if is_dense(tensor) else tensor.detach().contiguous()


def find_cuts(tensors: Sequence[Tensor], num_keep: Sequence[Sequence[int]]) -> Cuts:
    """Return the cuts that keep ``num_keep[s][q]`` weights of segment s: the list (S = 1), or each tensor (S = L).

    Order doesn't matter here, so dense tensors are read in memory order; tensors with gaps are copied first.
    """
    tensors = [_in_any_order(t) for t in tensors]
    device = tensors[0].device
    dtype = comparison_dtype(t.dtype for t in tensors)
    keep = upload(np.array(num_keep, dtype=np.int64).reshape(len(num_keep), -1), device)
    bad = torch.zeros(len(tensors), dtype=torch.bool, device=device)
    with on_device(device):
        prefix, remaining = _radix(tensors, keep, bad, dtype)
        nothing = keep == 0
        key = torch.where(nothing, INF_KEYS[dtype] + 1, prefix)
        return Cuts(key, torch.where(nothing, 0, remaining), bad, dtype)


def _radix(tensors: Sequence[Tensor], keep: Tensor, bad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the key of the last weight kept, and its rank among the weights with that key, both [S, Q]."""
    prefix = torch.zeros_like(keep)
    remaining = keep.clone()
    hist = torch.zeros((*keep.shape, 1 << DIGIT_BITS), dtype=torch.int64, device=keep.device)
    tables = [build_table([tensors[i] for i in positions], positions, CHUNK) for positions in group(tensors)]
    first = True
    for shift in range(8 * dtype.itemsize - DIGIT_BITS, -1, -DIGIT_BITS):
        for table in tables:
            launch_histogram(
                table.rows,
                table.block_to_tensor,
                prefix,
                hist,
                bad.view(torch.uint8),
                dtype=table.dtype,
                key_dtype=dtype,
                shift=shift,
                per_layer=keep.shape[0] > 1,
                first=first,
            )
        launch_refine(hist, prefix, remaining, first=first)
        first = False
        if shift:
            hist.zero_()
    return prefix, remaining


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    tensors = [_in_any_order(t) for t in tensors]
    zeros = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    bad = torch.zeros(len(tensors), dtype=torch.bool, device=tensors[0].device)
    for positions in group(tensors):
        table = build_table([tensors[i] for i in positions], positions, CHUNK)
        with on_device(table.device):
            launch_survey(table.rows, table.block_to_tensor, zeros, bad.view(torch.uint8), dtype=table.dtype)
    return zeros, bad


def apply(tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None = None) -> None:
    """Apply cuts (Q = 1): write +0.0 to what is removed, or keep masks (bool, contiguous) into ``out``.

    Nothing is written in place when a tensor holds NaN.
    """
    tensors = [t.detach() for t in tensors]
    device = tensors[0].device
    chunks = [-(-t.numel() // CHUNK) for t in tensors]
    order = np.cumsum([0, *chunks])
    tables = []
    for positions in group(tensors):
        extra = [(int(order[i]), *_layout(tensors[i].shape, tensors[i].stride())) for i in positions]
        tables.append(build_table([tensors[i] for i in positions], positions, CHUNK, extra=extra))
    key, quota = cuts.key.contiguous(), cuts.ties.contiguous()
    per_layer = key.shape[0] > 1
    ties = torch.empty(int(order[-1]), dtype=torch.int32, device=device)
    ties_before = torch.zeros(int(order[-1]) + 1, dtype=torch.int64, device=device)
    with on_device(device):
        for table in tables:
            launch_ties(
                table.rows,
                table.block_to_tensor,
                key,
                ties,
                dtype=table.dtype,
                key_dtype=cuts.dtype,
                per_layer=per_layer,
            )
        torch.cumsum(ties, 0, out=ties_before[1:])
        any_bad = cuts.bad.any().view(torch.uint8)
        for table in tables:
            launch_mask(
                table.rows,
                table.block_to_tensor,
                None if out is None else table.addresses([out[i] for i in table.positions]),
                key,
                quota,
                ties_before,
                any_bad,
                dtype=table.dtype,
                key_dtype=cuts.dtype,
                per_layer=per_layer,
            )


def apply_rows(views: Sequence[Tensor], num_keep: Sequence[int], out_views: Sequence[Tensor] | None = None) -> Tensor:
    """Keep the ``num_keep[i]`` largest of every row ``views[i][j]``: in place, or as masks in ``out_views``.

    Of equal magnitudes the earlier in logical order stay. Returns bool [L], the tensor holds NaN; a row with NaN
    is not written in place.
    """
    views = [v.detach() for v in views]
    device = views[0].device
    bad = torch.zeros(len(views), dtype=torch.bool, device=device)
    for positions in group(views):
        extra = []
        for i in positions:
            view = views[i]
            out = (0, *_NO_LAYOUT)
            if out_views is not None:
                out = (out_views[i].stride(0), *_layout(out_views[i].shape[1:], out_views[i].stride()[1:]))
            row = _layout(view.shape[1:], view.stride()[1:])
            extra.append((view.numel() // view.shape[0], num_keep[i], view.stride(0), *row, *out))
        listed = [views[i] for i in positions]
        table = build_table(listed, positions, 1, lengths=[v.shape[0] for v in listed], extra=extra)
        outs = None if out_views is None else table.addresses([out_views[i] for i in positions])
        with on_device(device):
            launch_rows(table.rows, table.block_to_tensor, outs, bad.view(torch.uint8), dtype=table.dtype)
    return bad


def _groups(view: Tensor, m: int) -> tuple[int, ...]:
    """Return the columns of a view's n:m groups: distance inside a group, layout of their first elements."""
    step = view.stride(-1)
    shape = (*view.shape[:-1], view.shape[-1] // m)
    return (step, *_layout(shape, (*view.stride()[:-1], m * step)))


def apply_nm(views: Sequence[Tensor], n: int, m: int, out_views: Sequence[Tensor] | None = None) -> None:
    """Keep the n largest of each m consecutive weights along the last dimension of every view.

    In place, or as masks in ``out_views``; of equal magnitudes the earlier stay, and a remainder shorter than m
    stays dense. Raises ValueError for m > 16.
    """
    if m > MAX_GROUP:
        raise ValueError(f"n:m on the triton backend takes m up to {MAX_GROUP}, got {m}; use backend 'torch'")
    views = [v.detach() for v in views]
    if out_views is not None:
        for out in out_views:
            if out.shape[-1] % m:
                out.fill_(True)
    device = views[0].device
    grouped = [v if v.shape[-1] >= m else v[..., :0] for v in views]
    for positions in group(grouped):
        listed = [views[i] for i in positions]
        extra = []
        for i in positions:
            out = (0, *_NO_LAYOUT) if out_views is None else _groups(out_views[i], m)
            extra.append((*_groups(views[i], m), *out))
        lengths = [v.numel() // v.shape[-1] * (v.shape[-1] // m) for v in listed]
        table = build_table(listed, positions, groups_per_chunk(m), lengths=lengths, extra=extra)
        outs = None if out_views is None else table.addresses([out_views[i] for i in positions])
        with on_device(device):
            launch_nm(table.rows, table.block_to_tensor, outs, dtype=table.dtype, n=n, m=m)
