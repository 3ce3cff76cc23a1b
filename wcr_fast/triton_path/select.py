"""Selection on Triton: cuts, masks, rows and n:m of a list of tensors on one device, without host syncs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.kernels._tile import LAYOUT_WIDTH, MAX_DIMS
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.mask import COUNT, KNOWN, TRIM, launch_mask, launch_ties
from wcr_fast.kernels.nm import groups_per_chunk, launch_nm
from wcr_fast.kernels.rows import launch_rows
from wcr_fast.kernels.scores import MAGNITUDE
from wcr_fast.kernels.survey import launch_survey
from wcr_fast.score import Scored
from wcr_fast.table import TensorTable, build_table, group, on_device
from wcr_fast.torch_path.cuts import Counts, Cuts
from wcr_fast.torch_path.layout import is_dense
from wcr_fast.triton_path.cuts import chunk_order, find_cuts, in_any_order
from wcr_fast.triton_path.numbers import Numbers, columns_of, in_one_dtype, numbers_in_lines, numbers_of

__all__ = ["apply", "apply_nm", "apply_rows", "find_cuts", "in_one_dtype", "numbers_in_lines", "survey"]

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


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    tensors = [in_any_order(t) for t in tensors]
    zeros = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    bad = torch.zeros(len(tensors), dtype=torch.bool, device=tensors[0].device)
    for positions in group(tensors):
        table = build_table([tensors[i] for i in positions], positions, CHUNK)
        with on_device(table.device):
            launch_survey(table.rows, table.block_to_tensor, zeros, bad.view(torch.uint8), dtype=table.dtype)
    return zeros, bad


def _mask_tables(
    tensors: Sequence[Tensor], order: Sequence[int], in_place: bool, numbers: Numbers | None
) -> tuple[list[TensorTable], list[TensorTable]]:
    """Return tables for a mask pass, and those of tensors whose chunks follow each other in another than logical order.

    In place, a dense tensor is written in memory order; ``permuted`` names the same tensors in logical order.
    """
    loose = [in_place and is_dense(t) and not t.is_contiguous() for t in tensors]
    tables, permuted = [], []
    for positions in group(tensors):
        listed = [tensors[i] for i in positions]
        logical = [_layout(t.shape, t.stride()) for t in listed]
        flat = [
            _layout((t.numel(),), (1,)) if loose[i] else row
            for i, t, row in zip(positions, listed, logical, strict=True)
        ]
        extra = [
            (order[i], int(loose[i]), *row, *columns_of(numbers, i, tensors[i], in_memory=loose[i]))
            for i, row in zip(positions, flat, strict=True)
        ]
        tables.append(build_table(listed, positions, CHUNK, extra=extra))
        some = [k for k, i in enumerate(positions) if loose[i]]
        if some:
            extra = [
                (order[i], 0, *logical[k], *columns_of(numbers, i, tensors[i], in_memory=False))
                for k, i in ((k, positions[k]) for k in some)
            ]
            permuted.append(build_table([listed[k] for k in some], [positions[k] for k in some], CHUNK, extra=extra))
    return tables, permuted


def apply(
    tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None = None, scored: Scored | None = None
) -> Counts | None:
    """Apply cuts (Q = 1): write +0.0 to what is removed, or keep masks (bool, contiguous) into ``out``.

    Nothing is written in place when a tensor holds NaN. With scores, those that the cuts were found by. Returns, in
    place, how many keys of each tensor were above the cut, equal to it, and zero.
    """
    tensors = [t.detach() for t in tensors]
    device = tensors[0].device
    order = chunk_order(tensors)
    numbers = None if scored is None else numbers_of(scored, tensors)
    with on_device(device):
        tables, permuted = _mask_tables(tensors, order, out is None, numbers)
        key, quota = cuts.key.contiguous(), cuts.ties.contiguous()
        ties_before = torch.zeros(order[-1] + 1, dtype=torch.int64, device=device)
        known = cuts.chunk_ties is not None
        ties = cuts.chunk_ties[0] if known else torch.empty(order[-1], dtype=torch.int32, device=device)
        counts = torch.zeros((len(tensors) if out is None else 0, 3), dtype=torch.int64, device=device)
        any_bad = cuts.bad.any().view(torch.uint8)
        formula = MAGNITUDE if numbers is None else numbers.formula
        shared = {"key_dtype": cuts.dtype, "per_layer": key.shape[0] > 1, "score": formula}

        def mask(chosen: Sequence[TensorTable], what: int) -> None:
            for table in chosen:
                outs = None if out is None else table.addresses([out[i] for i in table.positions])
                at = table.rows, table.block_to_tensor, outs, key, quota, ties_before, ties, counts, any_bad
                launch_mask(*at, dtype=table.dtype, what=what, **shared)

        def add_up() -> None:
            torch.cumsum(ties, 0, out=ties_before[1:])

        if known:
            add_up()
            mask(tables, KNOWN)
        else:
            mask(tables, COUNT)
            add_up()
            mask(tables, TRIM)
        for table in permuted:
            at = table.rows, table.block_to_tensor, key, quota, ties_before, ties
            launch_ties(*at, dtype=table.dtype, **shared)
        if permuted:
            add_up()
            mask(permuted, TRIM)
    return Counts(counts[:, :1], counts[:, 1:2], counts[:, 2]) if out is None else None


def _rows(view: Tensor) -> tuple[int, ...]:
    """Return the columns of a view's rows: their distance and the layout of one."""
    return (view.stride(0), *_layout(view.shape[1:], view.stride()[1:]))


def apply_rows(
    views: Sequence[Tensor],
    num_keep: Sequence[int],
    out_views: Sequence[Tensor] | None = None,
    numbers: Numbers | None = None,
) -> Tensor:
    """Keep the ``num_keep[i]`` largest of every row ``views[i][j]``: in place, or as masks in ``out_views``.

    With numbers, which are in views like the weights', the largest scores. Of equal ones the earlier in logical order
    stay. Returns bool [L], the tensor holds NaN; a row with NaN is not written in place.
    """
    views = [v.detach() for v in views]
    device = views[0].device
    formula = MAGNITUDE if numbers is None else numbers.formula
    bad = torch.zeros(len(views), dtype=torch.bool, device=device)
    for positions in group(views):
        extra = []
        for i in positions:
            view = views[i]
            out = (0, *_NO_LAYOUT) if out_views is None else _rows(out_views[i])
            a = None if numbers is None else numbers.tensors[i]
            beside = (0, 0, *_NO_LAYOUT) if a is None else (a.data_ptr(), *_rows(a))
            extra.append((view.numel() // view.shape[0], num_keep[i], *_rows(view), *out, *beside))
        listed = [views[i] for i in positions]
        table = build_table(listed, positions, 1, lengths=[v.shape[0] for v in listed], extra=extra)
        outs = None if out_views is None else table.addresses([out_views[i] for i in positions])
        with on_device(device):
            at = table.rows, table.block_to_tensor, outs, bad.view(torch.uint8)
            launch_rows(*at, dtype=table.dtype, score=formula)
    return bad


def _groups(view: Tensor, m: int, order: Sequence[int]) -> tuple[int, ...]:
    """Return the columns of a view's n:m groups: distance inside a group, layout of their first elements."""
    shape = (*view.shape[:-1], view.shape[-1] // m)
    strides = (*view.stride()[:-1], m * view.stride(-1))
    return (view.stride(-1), *_layout([shape[d] for d in order], [strides[d] for d in order]))


def _memory_order(view: Tensor, m: int) -> list[int]:
    """Return the dimensions of a view's groups, farthest first: so a program's groups lie side by side."""
    strides = (*view.stride()[:-1], m * view.stride(-1))
    return sorted(range(view.dim()), key=lambda d: -strides[d])


def apply_nm(
    views: Sequence[Tensor],
    n: int,
    m: int,
    out_views: Sequence[Tensor] | None = None,
    numbers: Numbers | None = None,
) -> None:
    """Keep the n largest of each m consecutive weights along the last dimension of every view.

    In place, or as masks in ``out_views``. With numbers, which are in views like the weights', the largest scores. Of
    equal ones the earlier stay, and a remainder shorter than m stays dense. Raises ValueError for m > 16.
    """
    if m > MAX_GROUP:
        raise ValueError(f"n:m on the triton backend takes m up to {MAX_GROUP}, got {m}; use backend 'torch'")
    views = [v.detach() for v in views]
    if out_views is not None:
        for out in out_views:
            if out.shape[-1] % m:
                out.fill_(True)
    device = views[0].device
    formula = MAGNITUDE if numbers is None else numbers.formula
    grouped = [v if v.shape[-1] >= m else v[..., :0] for v in views]
    for positions in group(grouped):
        listed = [views[i] for i in positions]
        extra = []
        for i in positions:
            order = _memory_order(views[i], m)
            out = (0, *_NO_LAYOUT) if out_views is None else _groups(out_views[i], m, order)
            a = None if numbers is None else numbers.tensors[i]
            beside = (0, 0, *_NO_LAYOUT) if a is None else (a.data_ptr(), *_groups(a, m, order))
            extra.append((*_groups(views[i], m, order), *out, *beside))
        lengths = [v.numel() // v.shape[-1] * (v.shape[-1] // m) for v in listed]
        table = build_table(listed, positions, groups_per_chunk(m), lengths=lengths, extra=extra)
        outs = None if out_views is None else table.addresses([out_views[i] for i in positions])
        with on_device(device):
            launch_nm(table.rows, table.block_to_tensor, outs, dtype=table.dtype, n=n, m=m, score=formula)
