"""Which elements of a DTensor lie where, and who counts an element that several processes hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.ranks import Ranks, ranks_of
from wcr_fast.ops.sharded import is_sharded, local

#: The global indices held along each dimension, increasing; a shard is their product.
Held = list[np.ndarray]


def held(tensor: Any, coordinate: Sequence[int] | None = None) -> Held:
    """Return what a process holds of a tensor: this one, or the one at a coordinate of the DTensor's mesh.

    Raises:
        ValueError: when this process's shard has another shape than torch's rule for its placements gives.
    """
    indices = [np.arange(size) for size in tensor.shape]
    if not is_sharded(tensor):
        return indices
    mine = coordinate is None
    coordinate = tensor.device_mesh.get_coordinate() if mine else coordinate
    if coordinate is None:  # not in the mesh
        return [index[:0] for index in indices]
    for i, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        # Cut into so many parts first, of each of which every process has a piece: FSDP2 over tensor parallelism.
        parts = _chunks(indices[placement.dim], getattr(placement, "split_factor", 1))
        pieces = [_chunks(part, tensor.device_mesh.size(i))[coordinate[i]] for part in parts]
        indices[placement.dim] = np.concatenate(pieces)
    shape = tuple(map(len, indices))
    if mine and shape != tuple(local(tensor).shape):
        raise ValueError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} has a shard of shape "
            f"{tuple(local(tensor).shape)} where torch's rule gives {shape}: shards of any other sizes can't be placed"
        )
    return indices


def _chunks(index: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut as torch.chunk does, into ``count`` parts with empty ones at the end."""
    size = -(-len(index) // count)
    return [index[i * size : (i + 1) * size] for i in range(count)]


@dataclass(frozen=True)
class Layout:
    """A list of weights as this process sees it.

    Attributes:
        ranks: the processes that hold the list.
        shards: this process's part of each tensor, a plain tensor.
        held: which elements these are.
        owned: whether this process counts its part; each element is counted by one process.
    """

    ranks: Ranks
    shards: list[Tensor]
    held: list[Held]
    owned: list[bool]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], facts: object) -> Layout:
        """Look at the weights of one selection; ``facts``: what else must be the same for all. A collective."""
        ranks = ranks_of(tensors)
        kinds = [(t.device_mesh, t.placements) if is_sharded(t) else None for t in tensors]
        listed = list(dict.fromkeys(kinds))
        seen = [(tuple(t.shape), t.dtype, k and (k[0].shape, k[1])) for t, k in zip(tensors, kinds, strict=True)]
        ranks.check_same((seen, facts))
        lie, error = [], None
        try:
            lie = [held(t) for t in tensors]
        except ValueError as found:
            error = found
        failed, *parts = ranks.gather([error is not None, *map(_part, listed)]).T
        if error is not None:
            raise error
        if failed.any():
            raise RuntimeError("sharded weights: another process can't place its shards; it says why")
        places = dict(zip(listed, range(len(listed)), strict=True))
        owned = []
        for i, kind in enumerate(kinds):
            column = parts[places[kind]]
            holders = np.flatnonzero(column == column[ranks.index])
            # In turn: replicas share the work.
            owned.append(column[ranks.index] >= 0 and holders[i % len(holders)] == ranks.index)
        return cls(ranks, [local(t).detach() for t in tensors], lie, owned)

    def owned_shards(self) -> list[Tensor]:
        """Return the shards that this process counts, empty tensors for the others."""
        return [s if own else s.new_empty(0) for s, own in zip(self.shards, self.owned, strict=True)]


def _part(kind: tuple[Any, Sequence[Any]] | None) -> int:
    """Return a number for the part of such tensors that this process holds: equal for replicas; -1 for none."""
    if kind is None:
        return 0
    mesh, placements = kind
    coordinate, part = mesh.get_coordinate(), 0
    if coordinate is None:
        return -1
    for i, placement in enumerate(placements):
        if not placement.is_replicate():
            part = part * mesh.size(i) + coordinate[i]
    return part


def like_shard(shard: Tensor, tensor: Tensor) -> Tensor:
    """Return a new contiguous shard as a DTensor cut like another one; as it is where that is a plain tensor."""
    if not is_sharded(tensor):
        return shard
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tensor.shape, device="meta").stride()
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=tensor.shape, stride=stride)
