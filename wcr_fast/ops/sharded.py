"""DTensor parameters: local shards, and the moments of a layer over all of its shards.

Per layer (n, mean, M2) travel, three float64 numbers; every rank merges them in rank order, so all have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.table import constants_on


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, any other tensor as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take its shards for the parameters again where a forward pass has left whole weights in their place.

    A write into those would be lost.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def like(shard: Tensor, tensor: Tensor) -> Tensor:
    """Return a shard as a DTensor cut like another one; as it is where that is a plain tensor."""
    if not is_sharded(tensor):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def shard_groups(tensor: Any) -> tuple[Any, ...]:
    """Return the process groups over which a DTensor is cut, one per mesh dimension with shards; () for others.

    Replicas hold the same elements and count once.
    """
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh
    cut = (dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tuple(mesh.get_group(dim) for dim in cut if mesh.size(dim) > 1)


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient cut as its parameter is; partial sums are summed (a collective, where anything is to do)."""
    if is_sharded(grad) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def local_coef(coef: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return coefficients of whole layers for whoever divides them by the number of a shard's elements."""
    shares = tuple(local(p).numel() / max(p.numel(), 1) for p in params)
    return torch.cat([coef[:1], coef[1:] * constants_on(shares, coef.dtype, coef.device)])


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
        n = constants_on(tuple(local(params[i]).numel() for i in columns), stats.dtype, stats.device)
        mean, var, pivot, _ = stats[:, columns]
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
    everyone = mine.new_empty((ranks, *mine.shape))
    torch.distributed.all_gather(list(everyone), mine, group=group)
    counts, means, spreads = everyone.unbind(1)
    center = torch.where(counts > 0, means, -torch.inf).max(0).values
    center = torch.where(torch.isinf(center), torch.zeros_like(center), center)
    total = counts.sum(0)
    shift = (counts * (means - center)).sum(0) / total.clamp(min=1.0)
    off = means - center - shift
    return total, center + shift, (spreads + counts * off * off).sum(0), center
