"""Rows and n:m groups of DTensors: selected where they lie if whole there, else by counts per row or group.

A row is whole in one process unless the tensor is cut along its inputs. Of cut rows each process counts its own part:
per round 8 bytes a row travel, in some 35 rounds for float32. Of groups that a border cuts the same goes for those.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.paths import group_views, plain_path, row_counts, row_views
from wcr_fast.ops.ranks import Ranks, ranks_across
from wcr_fast.ops.sharded import is_sharded
from wcr_fast.ops.shards import Layout, held
from wcr_fast.torch_path.cuts import INF_KEYS, keys_of, num_keep
from wcr_fast.torch_path.shared import Sums, descend, together
from wcr_fast.weights import Weight

# Keys of lines looked at together, so that flags stay in cache.
BLOCK = 1 << 17


def apply_lines(
    weights: Sequence[Weight],
    tensors: Sequence[Tensor],
    sparsity: float | None,
    nm: tuple[int, int] | None,
    out: Sequence[Tensor] | None,
) -> None:
    """Keep the largest of every row (``nm`` None), or n of every m; in place or as masks of the shards into ``out``."""
    layout = Layout.of(tensors, (sparsity, nm, [(w.out_dim, w.in_dim, w.groups) for w in weights]))
    for i, weight in enumerate(weights):
        shard, mask = layout.shards[i], None if out is None else out[i]
        if nm is None:
            _rows(weight, tensors[i], shard, layout.held[i], sparsity, mask)
        else:
            _groups(weight, tensors[i], shard, layout.held[i], nm, mask)


def _cut(tensor: Any, dim: int) -> bool:
    """Tell whether a tensor is cut along a dimension."""
    if not is_sharded(tensor):
        return False
    sizes = zip(tensor.placements, range(tensor.device_mesh.ndim), strict=True)
    return any(getattr(p, "dim", None) == dim and tensor.device_mesh.size(i) > 1 for p, i in sizes)


def _everywhere(tensor: Any, dim: int) -> list[np.ndarray]:
    """Return the indices along a dimension that each process of the mesh holds."""
    if not is_sharded(tensor):
        return [np.arange(tensor.shape[dim])]
    return [held(tensor, at)[dim] for at in itertools.product(*map(range, tensor.device_mesh.shape))]


def _whole(tensor: Tensor, dim: int, size: int) -> bool:
    """Tell whether every process holds whole blocks of ``size`` indices along a dimension."""
    return all(np.isin(np.bincount(at // size), (0, size)).all() for at in _everywhere(tensor, dim))


def _rows(
    weight: Weight, tensor: Tensor, shard: Tensor, lie: Sequence[np.ndarray], sparsity: float, out: Tensor | None
) -> None:
    inputs = [d for d in range(tensor.dim()) if d != weight.out_dim and _cut(tensor, d)]
    per_group = tensor.shape[0] // weight.groups if weight.groups > 1 else 0
    if inputs == [0] and per_group and _whole(tensor, 0, per_group):
        inputs = []  # whole groups of a transposed convolution
    if not inputs:
        here = [dataclasses.replace(weight, groups=max(shard.shape[0] // per_group, 1) if per_group else 1)]
        views = row_views(here, [shard])
        outs = None if out is None else row_views(here, [out])
        if shard.numel():
            plain_path([shard]).apply_rows(views, row_counts(views, sparsity), outs)
        return
    ranks = ranks_across(tensor, inputs)
    for part, part_out, at in _row_parts(weight, shard, lie, per_group, out):
        places = _places(tensor, at, weight.out_dim)
        length = tensor.numel() // max(tensor.shape[weight.out_dim] * weight.groups, 1)
        keys = _keys(part).reshape(part.shape[0], len(places))
        top = INF_KEYS[part.dtype] + 1
        keep = _largest_of_lines(keys, places, num_keep(sparsity, length), length, top, tensor.numel(), ranks)
        _write(part, keep.reshape(part.shape), part_out)


def _row_parts(
    weight: Weight, shard: Tensor, lie: Sequence[np.ndarray], per_group: int, out: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, list[np.ndarray]]]:
    """Yield views with rows first, for each group of a transposed convolution, and the indices they hold."""
    starts = [0, len(lie[0])]
    if per_group:
        starts = np.searchsorted(lie[0], per_group * np.arange(weight.groups + 1)).tolist()
    for start, stop in itertools.pairwise(starts):
        at = [lie[0][start:stop], *lie[1:]]
        views = [None if t is None else t[start:stop].movedim(weight.out_dim, 0) for t in (shard, out)]
        yield *views, at


def _places(tensor: Tensor, at: Sequence[np.ndarray], out_dim: int) -> np.ndarray:
    """Return the logical places in its row of each element that a row has here; only their order matters."""
    places = np.zeros(1, np.int64)
    for d, index in enumerate(at):
        if d != out_dim:
            places = (places[:, None] * tensor.shape[d] + index).reshape(-1)
    return places


def _groups(
    weight: Weight,
    tensor: Tensor,
    shard: Tensor,
    lie: Sequence[np.ndarray],
    nm: tuple[int, int],
    out: Tensor | None,
) -> None:
    n, m = nm
    dim = weight.in_dim % max(tensor.dim(), 1)
    if tensor.dim() == 0 or not _cut(tensor, dim):
        if shard.numel():
            outs = None if out is None else group_views([weight], [out])
            plain_path([shard]).apply_nm(group_views([weight], [shard]), n, m, outs)
        return
    # Number the groups along the inputs; a rest shorter than m, at the end of each of a convolution's groups, has none.
    inputs = tensor.shape[dim] // weight.groups
    index = np.arange(tensor.shape[dim])
    per = inputs // m
    number = np.where(index % inputs // m < per, index // inputs * per + index % inputs // m, -1)
    counts = [
        np.bincount(number[at][number[at] >= 0], minlength=per * weight.groups) for at in _everywhere(tensor, dim)
    ]
    border = np.flatnonzero(((np.array(counts) > 0) & (np.array(counts) < m)).any(axis=0))
    view, view_out = shard.movedim(dim, -1), None if out is None else out.movedim(dim, -1)
    if not border.size and (weight.groups == 1 or inputs % m == 0):  # nothing but whole groups, one after the other
        if view.numel():
            plain_path([view]).apply_nm([view], n, m, None if out is None else [view_out])
        return
    mine = number[lie[dim]]
    keep = torch.ones(view.shape, dtype=torch.bool, device=view.device)
    inner = torch.from_numpy(np.flatnonzero((mine >= 0) & ~np.isin(mine, border))).to(view.device)
    if inner.numel() and view.numel():
        mask = torch.empty((*view.shape[:-1], len(inner)), dtype=torch.bool, device=view.device)
        plain_path([view]).apply_nm([view[..., inner]], n, m, [mask])
        keep[..., inner] = mask
    if border.size:
        outer = np.flatnonzero(np.isin(mine, border))
        lines, slot = np.searchsorted(border, mine[outer]), lie[dim][outer] % inputs % m
        # What other processes hold of a group counts nothing here.
        keys = np.full((*view.shape[:-1], len(border), m), -1, np.int64)
        keys[..., lines, slot] = _keys(view[..., torch.from_numpy(outer).to(view.device)])
        flat = keys.reshape(-1, m)
        top, ranks = INF_KEYS[view.dtype] + 1, ranks_across(tensor, [dim])
        stay = _largest_of_lines(flat, np.arange(m), n, m, top, m, ranks)
        stay = stay.reshape(keys.shape)[..., lines, slot]
        keep[..., torch.from_numpy(outer).to(view.device)] = torch.from_numpy(stay).to(view.device)
    _write(view, keep, view_out)


def _keys(part: Tensor) -> np.ndarray:
    return keys_of(part, part.dtype).cpu().numpy()


def _write(part: Tensor, keep: np.ndarray | Tensor, out: Tensor | None) -> None:
    keep = torch.as_tensor(keep, device=part.device)
    if out is None:
        part.masked_fill_(~keep, 0.0)
    else:
        out.copy_(keep)


def _largest_of_lines(
    keys: np.ndarray, places: np.ndarray, count: int, length: int, top: int, span: int, ranks: Ranks
) -> np.ndarray:
    """Return which of a process's parts of some lines are among each line's ``count`` largest, of equal ones the first.

    Args:
        keys: [lines, size], the same lines in all processes; -1 counts nothing.
        places: [size], increasing with the elements' order in their line.
        count: of every line.
        length: of a whole line.
        top: above all keys.
        span: above all places, in all processes.
        ranks: those that have the rest of the lines.
    """
    if count in (0, length):
        return np.full(keys.shape, count > 0)
    (keep,) = together([_search_lines(keys, places, count, top, span)], ranks.sum)
    return keep


def _search_lines(keys: np.ndarray, places: np.ndarray, count: int, top: int, span: int) -> Sums[np.ndarray]:
    lines = len(keys)
    step = max(1, BLOCK // max(keys.shape[1], 1))

    def total(flags: Callable[..., np.ndarray], rows: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        """Count flags(rows, *columns) in each row, a block of rows at a time."""
        starts = range(0, len(rows), step)
        parts = [flags(*(a[i : i + step] for a in (rows, *columns))).sum(axis=1) for i in starts]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def reached(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
        return total(lambda rows, x: keys[rows] >= x, rows, x.astype(keys.dtype))[:, None]

    zeros, everyone = np.zeros(lines, np.int64), np.arange(lines)
    cut, _ = yield from descend(reached, zeros, zeros + top, zeros + count, counters=1)
    cut = cut.astype(keys.dtype)[:, None]
    above = total(lambda rows, cut: keys[rows] > cut, everyone, cut)
    tied = total(lambda rows, cut: keys[rows] == cut, everyone, cut)
    above, tied = np.split((yield np.concatenate([above, tied])), 2)
    left = count - above
    crowded = np.flatnonzero(tied > left)

    def later(which: np.ndarray, x: np.ndarray) -> np.ndarray:
        rows = crowded[which]
        return total(lambda rows, x, cut: (keys[rows] == cut) & (places >= x), rows, x, cut[rows])[:, None]

    last = zeros + span
    last[crowded], _ = yield from descend(later, zeros[crowded], last[crowded], (tied - left + 1)[crowded], counters=1)
    return (keys > cut) | ((keys == cut) & (places <= last[:, None]))
