"""Rows and columns of weights as groups: their sums of squares, and weights scaled group by group.

All groups of a list lie in one vector: layer by layer, first its output groups, then its input groups, whichever of
them are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.ops.sharded import is_sharded, local, shard_groups
from wcr_fast.ops.shards import held
from wcr_fast.table import upload
from wcr_fast.weights import Weight


class Side(NamedTuple):
    """The groups of a part along one of its dimensions."""

    dim: int
    base: int  # of its first group in the vector


class Part(NamedTuple):
    """A tensor, or one of the independent parts of a transposed convolution's: all of each of its groups."""

    tensor: Tensor
    layer: int
    rows: slice  # of the tensor, along its first dimension
    sides: tuple[Side, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of another tensor of the same shape."""
        return (tensor if tensor.dim() else tensor.view(1))[self.rows]


@dataclass(frozen=True)
class Groups:
    """How the groups of a list of weights lie in their vector; ``lengths`` and ``sizes`` by layer and kind."""

    kinds: tuple[str, ...]
    sides: tuple[tuple[tuple[slice, tuple[Side, ...]], ...], ...]  # of each layer's parts
    lengths: tuple[int, ...]  # groups of each kind of each layer
    sizes: tuple[int, ...]  # elements of one group of it
    _shards: dict[tuple, Shards] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total(self) -> int:
        """How many groups there are."""
        return sum(self.lengths)

    def parts(self, tensors: Sequence[Tensor]) -> list[Part]:
        """Return the parts of these tensors, one for each layer."""
        return [
            Part((t if t.dim() else t.view(1))[rows], layer, rows, sides)
            for layer, (t, parts) in enumerate(zip(tensors, self.sides, strict=True))
            for rows, sides in parts
        ]


@dataclass(frozen=True)
class Shards:
    """The groups of this rank's shards: part of each group that it has elements of."""

    groups: Groups
    places: Tensor  # int64: of these groups among those of the whole weights
    summed: list[tuple[tuple[Any, ...], Tensor]]  # process groups, and the places over which they have parts


def _shards(groups: Groups, tensors: Sequence[Tensor]) -> Shards:
    """Return what this rank has of the groups of a list with DTensors."""
    locals_ = [local(t) for t in tensors]
    kinds = [(t.device_mesh, t.placements) if is_sharded(t) else None for t in tensors]
    key = (tuple(kinds), tuple(t.shape for t in locals_), locals_[0].device)
    if key not in groups._shards:
        layers, lengths, places, cuts = [], [], [], {}
        base = number = 0
        for tensor, shard, parts in zip(tensors, locals_, groups.sides, strict=True):
            ((rows, sides),) = parts
            mine, indices = [], held(tensor)
            for side in sides:
                mine.append(Side(side.dim, base))
                base += shard.shape[side.dim] if shard.dim() else 1
                lengths.append(base - mine[-1].base)
                places.append(side.base + (indices[side.dim] if indices else np.zeros(1, np.int64)))
                whole = np.arange(side.base, side.base + groups.lengths[number])
                cuts.setdefault(shard_groups(tensor), []).append(whole)
                number += 1
            layers.append(((rows, tuple(mine)),))
        device = locals_[0].device
        summed = [(over, upload(np.concatenate(all_), device)) for over, all_ in cuts.items() if over]
        here = Groups(groups.kinds, tuple(layers), tuple(lengths), ())
        groups._shards[key] = Shards(here, upload(np.concatenate(places), device), summed)
    return groups._shards[key]


def groups_of(weights: Sequence[Weight], shapes: Sequence[torch.Size], kinds: tuple[str, ...]) -> Groups:
    """Return the groups of weights of these shapes: kinds are "filters", "inputs" or both."""
    layers, lengths, sizes = [], [], []
    base = 0
    for weight, shape in zip(weights, shapes, strict=True):
        shape = shape or (1,)
        count = weight.groups
        rows = shape[0] // count
        slices = [slice(None)] if count == 1 else [slice(i * rows, (i + 1) * rows) for i in range(count)]
        sides: list[list[Side]] = [[] for _ in slices]
        for kind in kinds:
            dim = (weight.out_dim if kind == "filters" else weight.in_dim) % len(shape)
            number = rows if dim == 0 else shape[dim]
            for part in sides:
                part.append(Side(dim, base))
                base += number
            lengths.append(number * count)
            sizes.append(torch.Size(shape).numel() // count // number)
        layers.append(tuple(zip(slices, map(tuple, sides), strict=True)))
    return Groups(kinds, tuple(layers), tuple(lengths), tuple(sizes))


def path_for(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module that sums and scales groups of these tensors: Triton's or torch's."""
    if use_triton(tensors):
        from wcr_fast.triton_path import groups
    else:
        from wcr_fast.torch_path import groups
    return groups


@torch.no_grad()
def group_squares(groups: Groups, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of every group, float64, on the first tensor's device; no synchronisation.

    Of DTensors the sums are the whole weights', the same on every rank: a collective.
    """
    if not any(map(is_sharded, tensors)):
        return path_for(tensors).group_squares(groups.parts(tensors), groups.total)
    shards, locals_ = _shards(groups, tensors), _locals(tensors)
    mine = path_for(locals_).group_squares(shards.groups.parts(locals_), shards.groups.total)
    squares = mine.new_zeros(groups.total).index_copy_(0, shards.places, mine)
    for over, places in shards.summed:
        parts = squares[places]
        for group in over:
            torch.distributed.all_reduce(parts, group=group)
        squares[places] = parts
    return squares


@torch.no_grad()
def add_scaled_(outs: Sequence[Tensor], groups: Groups, tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Add every weight, times the sum of its groups' factors, to ``outs``; one rounding to their dtype."""
    groups, tensors, factors = _here(groups, tensors, factors)
    inner = _locals(outs)
    _refuse_apart(inner, tensors)
    path_for(tensors).add_scaled_(inner, groups.parts(tensors), factors)
    _written(outs)


@torch.no_grad()
def scale_(groups: Groups, tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply every weight by its group's factor in place, to +0.0 where that is 0; of one kind of groups."""
    here, inner, factors = _here(groups, tensors, factors)
    path_for(inner).scale_(here.parts(inner), factors)
    _written(tensors)


def _locals(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local(t).detach() if is_sharded(t) else t for t in tensors]


def _here(groups: Groups, tensors: Sequence[Tensor], factors: Tensor) -> tuple[Groups, list[Tensor], Tensor]:
    """Return the groups on this rank, its parts of the tensors, and its groups' factors."""
    if not any(map(is_sharded, tensors)):
        return groups, list(tensors), factors
    shards = _shards(groups, tensors)
    return shards.groups, _locals(tensors), factors[shards.places]


def _written(tensors: Sequence[Tensor]) -> None:
    """Let autograd know: a kernel's write leaves no trace of its own. An operation on a DTensor counts there."""
    torch.autograd.graph.increment_version([*tensors, *(local(t) for t in tensors if is_sharded(t))])


def _refuse_apart(outs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for i, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        if out.device != tensor.device:
            raise ValueError(f"grads[{i}] is on {out.device}, its weight on {tensor.device}; move it there first")
