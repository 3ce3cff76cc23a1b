"""Selection among DTensors: every process looks at its own shards, sums of counts travel; see ``ops.select``.

The functions are collectives: all processes that hold the weights call them with the same lists. Plain tensors in a
list are taken for replicas, equal in all processes. Cuts and counts are those of the whole weights, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.paths import plain_path, takes_triton
from wcr_fast.ops.ranks import all_or_none
from wcr_fast.ops.shards import Layout
from wcr_fast.torch_path import select as torch_select
from wcr_fast.torch_path.blocks import MemorySource
from wcr_fast.torch_path.cuts import Counts, Cuts, comparison_dtype
from wcr_fast.torch_path.shared import COUNTERS, shared_search, together
from wcr_fast.torch_path.ties import Ties
from wcr_fast.torch_path.window import Found, KeyCounter, KeySource, shares


def find_cuts(tensors: Sequence[Tensor], num_keep: Sequence[Sequence[int]]) -> Cuts:
    """Return the cuts that keep num_keep[s][q] weights: of the whole list (S = 1) or of every tensor (S = L)."""
    layout = Layout.of(tensors, num_keep)
    dtype = comparison_dtype(t.dtype for t in tensors)
    shards, numels = layout.owned_shards(), [t.numel() for t in tensors]
    pools = [(shards, sum(numels))] if len(num_keep) == 1 else [([s], n) for s, n in zip(shards, numels, strict=True)]
    counters = COUNTERS // len(pools)
    sources = _sources(layout, [pool for pool, _ in pools], tensors)
    searches = [
        shared_search(source, keep, total, counters=counters)
        for source, (_, total), keep in zip(sources, pools, num_keep, strict=True)
    ]
    found = together(searches, layout.ranks.sum)
    if len(pools) > 1:
        found = [torch_select.in_dtype(f, t.dtype, dtype) for f, t in zip(found, tensors, strict=True)]
    return Cuts(
        torch.tensor([f.key for f in found], dtype=torch.int64),
        torch.tensor([f.ties for f in found], dtype=torch.int64),
        _stacked(found, "bad"),
        dtype,
        Counts(_stacked(found, "above"), _stacked(found, "tied"), _stacked(found, "zeros")),
    )


def _sources(
    layout: Layout, pools: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]
) -> list[KeySource | KeyCounter]:
    """Return a source for each pool of shards: Triton's where all processes can take it, as their searches go in step.

    Making Triton's takes memory: where one process lacks it, all of them raise.
    """
    host, error = True, None
    try:
        host = not takes_triton(layout.shards)
    except RuntimeError as found:
        error = found
    host, failed = layout.ranks.sum(np.array([host, error is not None], np.int32)).tolist()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("sharded weights: another process can't run the backend that was asked for; it says why")
    if host:
        return [MemorySource(pool) for pool in pools]
    from wcr_fast.triton_path.source import DeviceSource

    with all_or_none(tensors, "sharded weights"):
        return [DeviceSource(pool) for pool in pools]


def _stacked(found: Sequence[Found], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([getattr(f, name) for f in found]))


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    layout = Layout.of(tensors, "survey")
    (source,) = _sources(layout, [layout.owned_shards()], tensors)
    search = shared_search(source, [], sum(t.numel() for t in tensors))
    (found,) = together([search], layout.ranks.sum)
    return torch.from_numpy(found.zeros), torch.from_numpy(found.bad)


def apply(tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None = None) -> None:
    """Write +0.0 to what the cuts (Q = 1) remove from this process's shards, or keep masks of them into ``out``.

    ``out``: plain tensors, of the shards' shapes.
    """
    if cuts.bad.any():
        return
    layout = Layout.of(tensors, (cuts.key.tolist(), cuts.ties.tolist()))
    tied = cuts.counts.tied[:, :1].numpy()
    keep = cuts.ties.numpy() if len(cuts.ties) > 1 else shares(cuts.ties[0].numpy(), tied)
    mine, here = _own_ties(layout, tensors, cuts, keep[:, 0].tolist(), tied[:, 0].tolist())
    device = layout.shards[0].device
    column = torch.tensor([mine, here], dtype=torch.int64, device=device)[:, :, None]
    none = torch.zeros_like(column[0])
    # Every shard has its own number of ties that stay, so each is a pool of its own from here on.
    own = Cuts(
        cuts.key[:, :1].expand(len(tensors), 1).contiguous().to(device),
        column[0],
        cuts.bad.to(device),
        cuts.dtype,
        Counts(none, column[1], none[:, 0]),
    )
    plain_path(layout.shards).apply(layout.shards, own, out)


def _own_ties(
    layout: Layout, tensors: Sequence[Tensor], cuts: Cuts, keep: Sequence[int], tied: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return how many ties of each shard stay, and how many there are; where all stay no more is known."""
    cut = [i for i in range(len(tensors)) if 0 < keep[i] < tied[i]]
    here = [s.numel() for s in layout.shards]
    mine = [n if k else 0 for k, n in zip(keep, here, strict=True)]
    keys = cuts.key[:, 0].tolist()
    searches = []
    for i in cut:
        key = keys[i if len(keys) > 1 else 0]
        ties = Ties(layout.shards[i], tensors[i].shape, layout.held[i], key, cuts.dtype)
        here[i] = ties.count
        searches.append(ties.kept(keep[i], tied[i], layout.owned[i], COUNTERS // len(cut)))
    for i, kept in zip(cut, together(searches, layout.ranks.sum), strict=True):
        mine[i] = kept
    return mine, here
