"""Removing the unselected weights of one tensor from its bytes, part after part in row-major order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wcr_fast.torch_path.blocks import SERIAL
from wcr_fast.torch_path.cuts import INF_KEYS, key_below, keys_of, value_of
from wcr_fast.torch_path.select import apply_nm, apply_rows

# Takes the next part of a tensor as a 1-d view of its bytes, and erases in place.
Eraser = Callable[[Tensor], None]


class CutEraser:
    """Writes +0.0 to the weights below a cut and to the surplus of those equal to it.

    Args:
        key: the smallest key kept, in the comparison dtype.
        stay: how many of this tensor's weights equal to it stay: the first ones.
        tied: how many there are.
        dtype: the tensor's dtype.
        comparison: the dtype whose patterns the keys are.
    """

    def __init__(self, key: int, stay: int, tied: int, dtype: torch.dtype, comparison: torch.dtype) -> None:
        if key > INF_KEYS[comparison]:
            under = INF_KEYS[dtype]
        else:
            # Where all ties go the cut moves above them; where all stay there is no need to look for them.
            under = key_below(value_of(key, comparison), dtype, equal=tied > 0 and stay == 0)
        self.limit = value_of(under, dtype) if under >= 0 else None
        self.tie = under + 1  # used only where there are ties, so this dtype has the number
        self.left = stay if 0 < stay < tied else None

    def __call__(self, weights: Tensor) -> None:
        """Erase in the next part of the tensor (1-d, in place)."""
        for piece in weights.split(SERIAL):
            limit = self.limit
            if self.left is not None:
                self._trim(piece)
            if limit is not None:
                torch.hardshrink(piece, limit, out=piece)

    def _trim(self, piece: Tensor) -> None:
        """Erase the ties beyond those that may stay; once these are used up, all later ties lie below the limit."""
        tied = keys_of(piece, piece.dtype).eq(self.tie)
        count = int(tied.count_nonzero())
        if count < self.left:
            self.left -= count
            return
        piece[tied.nonzero().squeeze(1)[self.left :]] = 0
        self.limit, self.left = value_of(self.tie, piece.dtype), None


def row_eraser(row: int, keep: int) -> Eraser:
    """Return what keeps the ``keep`` largest of every ``row`` weights."""

    def erase(weights: Tensor) -> None:
        apply_rows([weights.view(-1, row)], [keep])

    return erase


def nm_eraser(shape: tuple[int, ...], n: int, m: int) -> Eraser:
    """Return what keeps the n largest of every m along dimension 1; a shorter rest stays.

    A part is a number of slices along dimension 0, or lies inside one and starts at a multiple of m.
    """
    inputs, rest = shape[1], math.prod(shape[2:])

    def erase(weights: Tensor) -> None:
        whole = weights.numel() % (inputs * rest) == 0
        view = weights.view(-1, inputs, rest) if whole else weights.view(1, -1, rest)
        apply_nm([view.movedim(1, -1)], n, m)

    return erase
