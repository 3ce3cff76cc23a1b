"""Rows and columns of weights as groups: their sums of squares, and weights scaled group by group.

All groups of a list lie in one vector: layer by layer, first its output groups, then its input groups, whichever of
them are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_fast.backend import use_triton
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
    """Return the sum of squares of every group, float64, on the first tensor's device; no synchronisation."""
    return path_for(tensors).group_squares(groups.parts(tensors), groups.total)


@torch.no_grad()
def add_scaled_(outs: Sequence[Tensor], groups: Groups, tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Add every weight, times the sum of its groups' factors, to ``outs``; one rounding to their dtype."""
    _refuse_apart(outs, tensors)
    path_for(tensors).add_scaled_(list(outs), groups.parts(tensors), factors)
    torch.autograd.graph.increment_version(outs)  # a kernel's write leaves no trace of its own


@torch.no_grad()
def scale_(groups: Groups, tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply every weight by its group's factor in place, to +0.0 where that is 0; of one kind of groups."""
    path_for(tensors).scale_(groups.parts(tensors), factors)
    torch.autograd.graph.increment_version(tensors)


def _refuse_apart(outs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for i, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        if out.device != tensor.device:
            raise ValueError(f"grads[{i}] is on {out.device}, its weight on {tensor.device}; move it there first")
