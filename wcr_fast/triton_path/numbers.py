"""The numbers beside weights, as a score's kernels find them: addresses and distances in a table's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_fast.kernels._tile import AUX_WIDTH, COLUMNS, ELEMENTS, LAYER
from wcr_fast.kernels.launch import CHUNK, TRITON_DTYPES
from wcr_fast.kernels.scores import KeyFormula
from wcr_fast.score import Scored, kernel_of

NOTHING = (0,) * AUX_WIDTH
_KINDS = {"element": ELEMENTS, "column": COLUMNS, "layer": LAYER}


class Numbers(NamedTuple):
    """A score's formula for kernels, and its numbers on the weights' device, in one dtype."""

    formula: KeyFormula
    tensors: list[Tensor]


def in_one_dtype(scored: Scored, tensors: Sequence[Tensor]) -> Scored:
    """Return a score with its numbers for these tensors in one dtype that kernels take."""
    dtypes = {a.dtype for a in scored.numbers}
    if len(dtypes) == 1 and dtypes <= TRITON_DTYPES.keys():
        return scored
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return replace(scored, numbers=tuple(a.to(wide) for a in scored.numbers))


def numbers_in_lines(scored: Scored, views: Sequence[Tensor]) -> Numbers:
    """Return a score's numbers, all of one dtype, as kernels take them in views like those of the weights."""
    return Numbers(KeyFormula(kernel_of(scored.score), _KINDS[scored.score.per], views[0].dtype), list(views))


def numbers_of(scored: Scored, tensors: Sequence[Tensor]) -> Numbers:
    """Return a score's numbers as kernels take them for these tensors.

    Numbers per element get their weight's strides, by a copy where they have others; numbers per column become a
    vector, or, where they depend on more than one dimension, numbers per element.
    """
    listed = list(in_one_dtype(scored, tensors).numbers)
    kind = _KINDS[scored.score.per]
    if kind == COLUMNS and any(_column(a) is None for a in listed):
        kind = ELEMENTS
    if kind == ELEMENTS:
        listed = [_like(a.expand(t.shape), t) for a, t in zip(listed, tensors, strict=True)]
    else:
        listed = [a.contiguous() for a in listed]
    return Numbers(KeyFormula(kernel_of(scored.score), kind, listed[0].dtype), listed)


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    if numbers.stride() == tensor.stride():
        return numbers
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=numbers.dtype, device=tensor.device)
    return made.copy_(numbers)


def _column(numbers: Tensor) -> int | None:
    """Return the one dimension along which numbers differ (0 where none does), None where there are several."""
    dims = [d for d, size in enumerate(numbers.shape) if size != 1]
    return None if len(dims) > 1 else dims[0] if dims else 0


def columns_of(numbers: Numbers | None, i: int, tensor: Tensor, *, in_memory: bool) -> tuple[int, ...]:
    """Return the columns of a table row of tensor i, whose elements count in memory order or in logical order."""
    if numbers is None:
        return NOTHING
    a = numbers.tensors[i]
    if numbers.formula.kind != COLUMNS or not tensor.dim():
        return a.data_ptr(), 1, 1
    dim = _column(a)
    inner = tensor.stride(dim) if in_memory else math.prod(tensor.shape[dim + 1 :])
    inner = inner if a.numel() > 1 else 1
    if inner * a.numel() >= (1 << 32) - CHUNK:
        raise ValueError(f"a weight of shape {tuple(tensor.shape)} has too long rows for numbers per column")
    return a.data_ptr(), inner, a.numel()
