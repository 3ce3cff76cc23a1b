"""DTensor parameters: local shards, and the moments of a layer over all of its shards.

Per layer (n, mean, M2) travel, three float64 numbers; every rank merges them in rank order, so all have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def shard_groups(tensor: Any) -> tuple[Any, ...]:
    """Return the process groups over which a DTensor is cut, one per mesh dimension with shards.

    Raises TypeError for a partial placement: its values are sums still to be made.
    """
    if not is_sharded(tensor):
        return ()
    groups = []
    for dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise TypeError(f"a DTensor with placement {placement} holds partial sums: redistribute it first")
        if placement.is_shard() and tensor.device_mesh.size(dim) > 1:
            groups.append(tensor.device_mesh.get_group(dim))
    return tuple(groups)


def merged_stats(stats: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return the stats [4, L] of whole layers from those of the local shards; as they are where none is sharded.

    Mean and variance are of the whole layer, the pivot stays the local one, and mean - pivot goes with it. A
    collective: every rank of the meshes must call it with the same layers.
    """
    cut: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(params):
        groups = shard_groups(p)
        if groups:
            cut.setdefault(groups, []).append(i)
    if not cut:
        return stats
    stats = stats.clone()
    for groups, columns in cut.items():
        numels = [float(local(params[i]).numel()) for i in columns]
        mean, var, pivot, _ = stats[:, columns]
        n = torch.tensor(numels, dtype=torch.float64).to(stats.device)
        spread = n * var
        for group in groups:
            n, mean, spread, center = _merge(n, mean, spread, group)
        stats[0, columns] = mean
        stats[1, columns] = spread / n.clamp(min=1.0)
        # In this order equal magnitudes give exactly zero: the center is one of them.
        stats[3, columns] = (center - pivot) + (mean - center)
    return stats


def _merge(n: Tensor, mean: Tensor, spread: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return n, mean, M2 over a process group, and a rank's mean that the sums were taken about."""
    mine = torch.stack([n, mean, spread]).contiguous()
    ranks = torch.distributed.get_world_size(group)
    everyone = mine.new_empty((ranks * mine.shape[0], mine.shape[1]))
    torch.distributed.all_gather_into_tensor(everyone, mine, group=group)
    counts, means, spreads = everyone.view(ranks, 3, -1).unbind(1)
    center = torch.where(counts > 0, means, -torch.inf).max(0).values
    center = torch.where(torch.isinf(center), torch.zeros_like(center), center)
    total = counts.sum(0)
    shift = (counts * (means - center)).sum(0) / total.clamp(min=1.0)
    off = means - center - shift
    return total, center + shift, (spreads + counts * off * off).sum(0), center
