"""Exact selection in torch and numpy: cuts, masks and pruning in place, in blocks that stay in cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wcr_fast.torch_path.blocks import SERIAL, MemorySource, pieces
from wcr_fast.torch_path.cuts import (
    INF_KEYS,
    Counts,
    Cuts,
    comparison_dtype,
    key_below,
    keys_of,
    value_of,
)
from wcr_fast.torch_path.layout import flat_view, is_dense
from wcr_fast.torch_path.window import Found, shares, window_search

# n:m groups up to this size compare all pairs, column against column; larger ones are partitioned.
PAIRWISE = 16


def find_cuts(tensors: Sequence[Tensor], num_keep: Sequence[Sequence[int]]) -> Cuts:
    """Return the cuts that keep num_keep[s][q] weights: of the whole list (S = 1) or of every tensor (S = L)."""
    pools = [tensors] if len(num_keep) == 1 else [[t] for t in tensors]
    sources = [MemorySource(pool) for pool in pools]
    found = [window_search(source, keep) for source, keep in zip(sources, num_keep, strict=True)]
    return cuts_of(found, [source.dtype for source in sources], tensors[0].device)


def cuts_of(found: Sequence[Found], dtypes: Sequence[torch.dtype], device: torch.device) -> Cuts:
    """Return what searches over a list or over each of its tensors found, their keys of these dtypes, as cuts."""
    dtype = comparison_dtype(dtypes)
    found = [f if own == dtype else in_dtype(f, own, dtype) for f, own in zip(found, dtypes, strict=True)]

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(f, name) for f in found])).to(device)

    return Cuts(
        torch.tensor([f.key for f in found], dtype=torch.int64, device=device),
        torch.tensor([f.ties for f in found], dtype=torch.int64, device=device),
        stacked("bad"),
        dtype,
        Counts(stacked("above"), stacked("tied"), stacked("zeros")),
    )


def in_dtype(found: Found, own: torch.dtype, dtype: torch.dtype) -> Found:
    """Return cuts found in a tensor's own dtype as keys of the list's comparison dtype."""
    nothing = INF_KEYS[own] + 1
    values = (None if key == nothing else value_of(key, own) for key in found.key)
    keys = [INF_KEYS[dtype] + 1 if v is None else key_below(v, dtype, equal=True) for v in values]
    return found._replace(key=keys)


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    device = tensors[0].device
    if all(t.device.type == "cpu" for t in tensors):
        found = window_search(MemorySource(tensors), [])
        return torch.from_numpy(found.zeros), torch.from_numpy(found.bad)
    zeros = torch.stack([(t.numel() - t.detach().count_nonzero()).to(device) for t in tensors])
    return zeros, torch.stack([t.detach().isnan().any().to(device) for t in tensors])


class _Edge(NamedTuple):
    """One tensor's cut in its own dtype: what lies at or below ``under`` goes, and all but ``left`` ties."""

    under: int  # key of the largest number below the cut, -1 for none
    tie: int  # key of the cut itself, -1 where this dtype has no such number
    left: int  # ties that stay


@functools.lru_cache(maxsize=256)
def _edge(key: int, dtype: torch.dtype, own: torch.dtype) -> tuple[int, int]:
    """Return (under, tie) of a tensor of dtype ``own`` for a cut's key in the comparison dtype."""
    if key > INF_KEYS[dtype]:
        return INF_KEYS[own], -1
    value = value_of(key, dtype)
    under, at = key_below(value, own), key_below(value, own, equal=True)
    return under, at if at > under else -1


def _edges(tensors: Sequence[Tensor], cuts: Cuts) -> list[_Edge]:
    """Return every tensor's edge; ties that all stay are no ties to look at."""
    counts = cuts.counts or _count_ties(tensors, cuts)
    tied = counts.tied.cpu().numpy()
    keys, ties = cuts.key[:, 0].tolist(), cuts.ties.cpu().numpy()
    keep = shares(ties[0], tied)[:, 0] if len(keys) == 1 else ties[:, 0]
    edges = []
    for i, tensor in enumerate(tensors):
        under, tie = _edge(keys[i if len(keys) > 1 else 0], cuts.dtype, tensor.dtype)
        left = int(keep[i])
        if left == 0:
            under = max(under, tie)
        edges.append(_Edge(under, tie if 0 < left < tied[i, 0] else -1, left))
    return edges


def _count_ties(tensors: Sequence[Tensor], cuts: Cuts) -> Counts:
    """Count what a search that gave no counts left out; only the ties are needed here."""
    keys = cuts.key[:, 0].tolist()
    tied = torch.zeros(len(tensors), 1, dtype=torch.int64)
    for i, tensor in enumerate(tensors):
        key = keys[i if len(keys) > 1 else 0]
        parts = pieces(flat_view(tensor) if is_dense(tensor) else tensor.detach())
        tied[i] = sum(int((keys_of(part, cuts.dtype) == key).sum()) for part in parts)
    return Counts(torch.zeros_like(tied), tied, torch.zeros(len(tensors), dtype=torch.int64))


def apply(tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None = None) -> None:
    """Write +0.0 to what the cuts (Q = 1) remove, or with ``out`` their keep masks into it."""
    if cuts.bad.any():
        return
    edges = _edges(tensors, cuts)
    # Backwards: what the search read last may still be in the cache.
    for i, (tensor, edge) in reversed(list(enumerate(zip(tensors, edges, strict=True)))):
        if out is not None:
            _write_mask(tensor, edge, out[i])
        elif edge.under >= 0 or edge.tie >= 0:
            _prune_(tensor.detach(), edge)


def _prune_(tensor: Tensor, edge: _Edge) -> None:
    under = value_of(edge.under, tensor.dtype) if edge.under >= 0 else None
    left = edge.left
    # Ties are counted in logical order; without them any order will do.
    ordered = tensor if edge.tie >= 0 or not is_dense(tensor) else flat_view(tensor)
    for part in pieces(ordered, _piece(tensor)):
        if edge.tie >= 0:
            drop, kept = _beyond(keys_of(part, part.dtype) == edge.tie, left)
            left -= kept
            if drop is not None:
                part.masked_fill_(drop, 0.0)
        if under is not None:
            torch.hardshrink(part, under, out=part)


def _piece(tensor: Tensor) -> int:
    return SERIAL if tensor.device.type == "cpu" else max(tensor.numel(), 1)


def _beyond(tied: Tensor, left: int) -> tuple[Tensor | None, int]:
    """Return where the ties beyond the first ``left`` are (None: nowhere), and how many stay."""
    places = tied.reshape(-1).nonzero().squeeze(1)  # logical order for any strides
    if places.numel() <= left:
        return None, places.numel()
    drop = torch.zeros(tied.numel(), dtype=torch.bool, device=tied.device)
    drop[places[left:]] = True
    return drop.view(tied.shape), left


def _write_mask(tensor: Tensor, edge: _Edge, out: Tensor) -> None:
    tensor, left = tensor.detach(), edge.left
    start, flat_out = 0, out.view(-1)
    for part in pieces(tensor, _piece(tensor)):
        keys = keys_of(part, part.dtype).reshape(-1)
        mask = flat_out[start : start + keys.numel()]
        start += keys.numel()
        if keys.device.type == "cpu":  # numpy compares integers faster
            np.greater(keys.numpy(), edge.under, out=mask.numpy())
        else:
            torch.gt(keys, edge.under, out=mask)
        if edge.tie >= 0:
            drop, kept = _beyond(keys == edge.tie, left)
            left -= kept
            if drop is not None:
                mask.masked_fill_(drop, False)


def apply_rows(views: Sequence[Tensor], num_keep: Sequence[int], out_views: Sequence[Tensor] | None = None) -> None:
    """Keep the num_keep[i] largest weights of every row views[i][j]; in place, or masks into ``out_views``."""
    for i, view in enumerate(views):
        for part, out in _row_blocks(view.detach(), None if out_views is None else out_views[i]):
            _rows(part, num_keep[i], out)


def _row_blocks(view: Tensor, out: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    if view.numel() == 0:
        return
    rows = max(1, SERIAL // max(view[0].numel(), 1))
    for start in range(0, view.shape[0], rows):
        yield view[start : start + rows], None if out is None else out[start : start + rows]


def _rows(part: Tensor, num_keep: int, out: Tensor | None) -> None:
    row = part[0].numel()
    if row > SERIAL:  # one long row: the same search as for a list of one tensor
        cuts = find_cuts([part], [[num_keep]])
        if out is None:
            apply([part], cuts)
        else:
            mask = torch.empty(part.shape, dtype=torch.bool, device=part.device)
            apply([part], cuts, [mask])
            out.copy_(mask)
        return
    keep = _largest(_numpy_keys(part).reshape(part.shape[0], row), num_keep)
    _write(part, keep, out)


def _numpy_keys(part: Tensor) -> np.ndarray:
    return keys_of(part, part.dtype).contiguous().cpu().numpy()


def _write(part: Tensor, keep: np.ndarray, out: Tensor | None) -> None:
    mask = torch.from_numpy(keep).view(part.shape).to(part.device)
    if out is None:
        part.masked_fill_(mask.logical_not_(), 0.0)
    else:
        out.copy_(mask)


def _largest(keys: np.ndarray, count: int) -> np.ndarray:
    """Return where the ``count`` largest of every row are; of equal ones the earlier."""
    if count in (0, keys.shape[1]):
        return np.full(keys.shape, count > 0)
    place = keys.shape[1] - count
    cut = np.partition(keys, place, axis=1)[:, place, None]
    keep = keys >= cut
    crowded = np.flatnonzero(keep.sum(axis=1) > count)
    if crowded.size:
        ties = keys[crowded] == cut[crowded]
        spare = count - (keep[crowded] & ~ties).sum(axis=1, keepdims=True)
        keep[crowded] &= ~ties | (ties.cumsum(axis=1) <= spare)
    return keep


def apply_nm(views: Sequence[Tensor], n: int, m: int, out_views: Sequence[Tensor] | None = None) -> None:
    """Keep the n largest of each m consecutive weights along the last dimension; a shorter rest stays dense."""
    for i, view in enumerate(views):
        out = None if out_views is None else out_views[i].fill_(True)
        main = view.shape[-1] // m * m
        if main == 0:
            continue
        target = None if out is None else out[..., :main]
        for part, target_part in _group_blocks(view.detach()[..., :main], target, m):
            _groups(part, n, m, target_part)


def _group_blocks(view: Tensor, out: Tensor | None, m: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut along the first dimension; slices longer than a block are cut further, at whole groups."""
    if view.numel() <= SERIAL:
        if view.numel():
            yield view, out
    elif view.dim() == 1:
        step = max(SERIAL // m, 1) * m
        for start in range(0, view.shape[0], step):
            yield view[start : start + step], None if out is None else out[start : start + step]
    elif view[0].numel() > SERIAL:
        for i in range(view.shape[0]):
            yield from _group_blocks(view[i], None if out is None else out[i], m)
    else:
        yield from _row_blocks(view, out)


def _groups(part: Tensor, n: int, m: int, out: Tensor | None) -> None:
    keys = _numpy_keys(part).reshape(-1, m)
    _write(part, _largest(keys, n) if m > PAIRWISE else _ranked(keys, n), out)


def _ranked(keys: np.ndarray, count: int) -> np.ndarray:
    """Like _largest for short rows: a key's rank is the number of keys in its row that beat it."""
    columns = np.ascontiguousarray(keys.T)
    beaten = np.zeros(columns.shape, np.uint8)
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            first = columns[i] >= columns[j]  # of equal keys the earlier wins
            beaten[j] += first
            beaten[i] += ~first
    return np.ascontiguousarray((beaten < count).T)
