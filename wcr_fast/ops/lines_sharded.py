"""Rows and n:m groups of DTensors: selected where they lie if whole there, else by counts per row or group.

A row is whole in one process unless the tensor is cut along its inputs. Of cut rows each process counts its own part:
per round 4 bytes a row travel, in 31 rounds and more for float32, fewer where rows are few. Of n:m groups only those
that a border cuts are treated like this.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.paths import group_views, plain_path, row_counts, row_views
from wcr_fast.ops.ranks import ranks_across
from wcr_fast.ops.sharded import is_sharded
from wcr_fast.ops.shards import Held, Layout, held
from wcr_fast.torch_path.cuts import INF_KEYS, keys_of, num_keep
from wcr_fast.torch_path.shared import COUNTERS, Sums, descend, together
from wcr_fast.weights import Weight

# Keys of lines looked at together, so that flags stay in cache.
BLOCK = 1 << 17
# Cut weights searched in step, up to so many elements: fewer messages, but each holds a copy of its shard's keys.
IN_STEP = 1 << 24


@dataclass(frozen=True)
class _Part:
    """One weight: whole, this process's shard, the indices that it holds, and where its mask goes."""

    weight: Weight
    tensor: Any
    shard: Tensor
    held: Held
    out: Tensor | None

    def cut(self, dim: int) -> bool:
        """Tell whether the weight is cut along a dimension."""
        if not is_sharded(self.tensor):
            return False
        sizes = zip(self.tensor.placements, self.tensor.device_mesh.shape, strict=True)
        return any(getattr(placement, "dim", None) == dim and size > 1 for placement, size in sizes)

    def everywhere(self, dim: int) -> list[np.ndarray]:
        """Return the indices along a dimension that each process of the mesh holds."""
        return [held(self.tensor, at)[dim] for at in itertools.product(*map(range, self.tensor.device_mesh.shape))]


def apply_lines(
    weights: Sequence[Weight],
    tensors: Sequence[Tensor],
    sparsity: float | None,
    nm: tuple[int, int] | None,
    out: Sequence[Tensor] | None,
) -> None:
    """Keep the largest of every row (``nm`` None), or n of every m; in place or as masks of the shards into ``out``."""
    layout = Layout.of(tensors, (sparsity, nm, [(w.out_dim, w.in_dim, w.groups) for w in weights]))
    waiting: dict[tuple[Any, ...], list[_Part]] = {}

    def search(key: tuple[Any, ...]) -> None:
        parts = waiting.pop(key)
        searches = [_rows(p, key[1], sparsity) if nm is None else _groups(p, key[1][0], *nm) for p in parts]
        together(searches, ranks_across(parts[0].tensor, key[1]).sum)

    for i, weight in enumerate(weights):
        part = _Part(weight, tensors[i], layout.shards[i], layout.held[i], None if out is None else out[i])
        dims = _cut_rows(part) if nm is None else _cut_inputs(part)
        if not dims:
            _whole_rows(part, sparsity) if nm is None else _whole_groups(part, *nm)
        elif part.tensor.device_mesh.get_coordinate() is not None:
            key = part.tensor.device_mesh, dims, part.tensor.placements
            waiting.setdefault(key, []).append(part)
            if sum(p.tensor.numel() for p in waiting[key]) >= IN_STEP:
                search(key)
    for key in list(waiting):
        search(key)


def _per_group(weight: Weight, tensor: Tensor) -> int:
    """Return the inputs of each group of a transposed convolution, 0 without groups."""
    return tensor.shape[0] // weight.groups if weight.groups > 1 else 0


def _cut_rows(part: _Part) -> tuple[int, ...]:
    """Return the dimensions along which rows are cut."""
    dims = tuple(d for d in range(part.tensor.dim()) if d != part.weight.out_dim and part.cut(d))
    size = _per_group(part.weight, part.tensor)
    if dims == (0,) and size:  # a transposed convolution's groups may be whole
        whole = all(np.isin(np.bincount(at // size), (0, size)).all() for at in part.everywhere(0))
        return () if whole else dims
    return dims


def _whole_rows(part: _Part, sparsity: float) -> None:
    size, shard = _per_group(part.weight, part.tensor), part.shard
    if shard.numel():
        here = [dataclasses.replace(part.weight, groups=shard.shape[0] // size if size else 1)]
        views = row_views(here, [shard])
        outs = None if part.out is None else row_views(here, [part.out])
        plain_path([shard]).apply_rows(views, row_counts(views, sparsity), outs)


def _rows(part: _Part, dims: Sequence[int], sparsity: float) -> Sums[None]:
    """Select in rows that are cut along some dimensions."""
    tensor, out_dim, size = part.tensor, part.weight.out_dim, _per_group(part.weight, part.tensor)
    length = tensor.numel() // max(tensor.shape[out_dim] * part.weight.groups, 1)
    starts = [0, part.shard.shape[0]]
    if size:  # each group of a transposed convolution by itself
        starts = np.searchsorted(part.held[0], size * np.arange(part.weight.groups + 1)).tolist()
    for start, stop in itertools.pairwise(starts):
        places = _places(tensor.shape, [part.held[0][start:stop], *part.held[1:]], out_dim)
        view, view_out = (None if t is None else t[start:stop].movedim(out_dim, 0) for t in (part.shard, part.out))
        keys = _keys(view).reshape(view.shape[0], len(places))
        top = INF_KEYS[view.dtype] + 1
        keep = yield from _largest_of_lines(keys, places, num_keep(sparsity, length), length, top, tensor.numel())
        _write(view, keep.reshape(view.shape), view_out)


def _places(shape: Sequence[int], indices: Held, out_dim: int) -> np.ndarray:
    """Return the logical places in its row of each element that a row has here; only their order matters."""
    places = np.zeros(1, np.int64)
    for d, index in enumerate(indices):
        if d != out_dim:
            places = (places[:, None] * shape[d] + index).reshape(-1)
    return places


def _cut_inputs(part: _Part) -> tuple[int, ...]:
    """Return the input dimension where it is cut."""
    dim = part.weight.in_dim % max(part.tensor.dim(), 1)
    return (dim,) if part.cut(dim) else ()


def _whole_groups(part: _Part, n: int, m: int) -> None:
    if part.shard.numel():
        outs = None if part.out is None else group_views([part.weight], [part.out])
        plain_path([part.shard]).apply_nm(group_views([part.weight], [part.shard]), n, m, outs)


def _groups(part: _Part, dim: int, n: int, m: int) -> Sums[None]:
    """Select in n:m groups along a cut dimension: whole ones here, those that a border cuts by counts."""
    # Number the groups along the inputs; a rest shorter than m, at the end of each of a convolution's groups, has none.
    inputs = part.tensor.shape[dim] // part.weight.groups
    index = np.arange(part.tensor.shape[dim])
    per = inputs // m
    number = np.where(index % inputs // m < per, index // inputs * per + index % inputs // m, -1)
    sizes = [number[at][number[at] >= 0] for at in part.everywhere(dim)]
    counts = np.array([np.bincount(at, minlength=per * part.weight.groups) for at in sizes])
    border = np.flatnonzero(((counts > 0) & (counts < m)).any(axis=0))
    view, view_out = (None if t is None else t.movedim(dim, -1) for t in (part.shard, part.out))
    if not border.size and (part.weight.groups == 1 or inputs % m == 0):  # whole groups only, one after the other
        if view.numel():
            plain_path([view]).apply_nm([view], n, m, None if part.out is None else [view_out])
        return
    mine = number[part.held[dim]]
    keep = torch.ones(view.shape, dtype=torch.bool, device=view.device)
    inner = torch.from_numpy(np.flatnonzero((mine >= 0) & ~np.isin(mine, border))).to(view.device)
    if inner.numel() and view.numel():
        mask = torch.empty((*view.shape[:-1], len(inner)), dtype=torch.bool, device=view.device)
        plain_path([view]).apply_nm([view[..., inner]], n, m, [mask])
        keep[..., inner] = mask
    outer = np.flatnonzero(np.isin(mine, border))
    lines, slots = np.searchsorted(border, mine[outer]), part.held[dim][outer] % inputs % m
    # What other processes hold of a group counts nothing here.
    keys = np.full((*view.shape[:-1], len(border), m), -1, np.int64)
    outer = torch.from_numpy(outer).to(view.device)
    keys[..., lines, slots] = _keys(view[..., outer])
    top = INF_KEYS[view.dtype] + 1
    stay = yield from _largest_of_lines(keys.reshape(-1, m), np.arange(m), n, m, top, m)
    keep[..., outer] = torch.from_numpy(stay.reshape(keys.shape)[..., lines, slots]).to(view.device)
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
    keys: np.ndarray, places: np.ndarray, count: int, length: int, top: int, span: int
) -> Sums[np.ndarray]:
    """Find which of a process's parts of some lines are among each line's ``count`` largest, of equal ones the first.

    Args:
        keys: [lines, size], the same lines in all processes; -1 counts nothing.
        places: [size], increasing with the elements' order in their line.
        count: of every line.
        length: of a whole line.
        top: above all keys.
        span: above all places, in all processes.
    """
    if count in (0, length):
        return np.full(keys.shape, count > 0)
    lines = len(keys)
    step = max(1, BLOCK // max(keys.shape[1], 1))

    def total(flags: Callable[..., np.ndarray], rows: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        """Count flags(rows, *columns) in each row, a block of rows at a time."""
        starts = range(0, len(rows), step)
        parts = [flags(*(a[i : i + step] for a in (rows, *columns))).sum(axis=1) for i in starts]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def reached(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
        x = x.astype(keys.dtype)
        return np.stack([total(lambda rows, x: keys[rows] >= x, rows, x[:, [j]]) for j in range(x.shape[1])], axis=1)

    zeros, everyone = np.zeros(lines, np.int64), np.arange(lines)
    cut, _ = yield from descend(reached, zeros, zeros + top, zeros + count, COUNTERS, length)
    cut = cut.astype(keys.dtype)[:, None]
    above = total(lambda rows, cut: keys[rows] > cut, everyone, cut)
    tied = total(lambda rows, cut: keys[rows] == cut, everyone, cut)
    above, tied = np.split((yield np.concatenate([above, tied])), 2)
    left = count - above
    crowded = np.flatnonzero(tied > left)

    def later(which: np.ndarray, x: np.ndarray) -> np.ndarray:
        def flags(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
            return (keys[rows] == cut[rows]) & (places >= x)

        return np.stack([total(flags, crowded[which], x[:, [j]]) for j in range(x.shape[1])], axis=1)

    last = zeros + span
    last[crowded], _ = yield from descend(
        later, zeros[crowded], last[crowded], (tied - left + 1)[crowded], COUNTERS, length
    )
    return (keys > cut) | ((keys == cut) & (places <= last[:, None]))
