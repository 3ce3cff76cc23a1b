"""Where a selection cuts: keys that order like magnitudes, and the numbers that say who stays.

The key of a weight is its bit pattern with the sign cleared, read as an integer: it orders like the
magnitude, -0 equals 0, and infinity is the largest number. Patterns above infinity's are NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

KEY_DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
INF_KEYS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}


class Counts(NamedTuple):
    """Counts per tensor beside the cuts: above the cut and equal to it (int64 [L, Q]), and of zeros ([L])."""

    above: Tensor
    tied: Tensor
    zeros: Tensor


class Cuts(NamedTuple):
    """The cuts of S selections (1 for a whole list, L for one per tensor) at Q sparsities each.

    Attributes:
        key: int64 [S, Q], the smallest key kept; one above infinity's key where nothing is kept.
        ties: int64 [S, Q], how many of the weights equal to ``key`` stay: the first ones in list order, then
            in logical row-major order.
        bad: bool [L], the tensor holds NaN.
        dtype: the floating dtype whose bit patterns the keys are.
        counts: what the search counted on its way, where it did.
        chunk_ties: int32 [Q, chunks], weights equal to the cut in every chunk of 32768 of the list, in memory order,
            where the search counted them.
    """

    key: Tensor
    ties: Tensor
    bad: Tensor
    dtype: torch.dtype
    counts: Counts | None = None
    chunk_ties: Tensor | None = None

    def at(self, q: int) -> Cuts:
        """Return the cuts of one sparsity (Q = 1)."""
        one = slice(q, q + 1)
        counts, ties = self.counts, self.chunk_ties
        return self._replace(
            key=self.key[:, one],
            ties=self.ties[:, one],
            counts=counts and Counts(counts.above[:, one], counts.tied[:, one], counts.zeros),
            chunk_ties=None if ties is None else ties[one],
        )


def comparison_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype in which weights of these dtypes are compared: one that holds them all exactly."""
    seen = set(dtypes)
    if torch.float64 in seen:
        return torch.float64
    if len(seen) == 1:
        return seen.pop()
    return torch.float32


def threshold_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype of thresholds: float64 when any weight is, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


def keys_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys of a tensor in a comparison dtype (int16, int32 or int64; same shape, a new tensor)."""
    integer = KEY_DTYPES[dtype]
    return tensor.detach().to(dtype).view(integer).bitwise_and(torch.iinfo(integer).max)


def values_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitudes (float32, float64 for float64) of keys; "nothing kept" gives inf."""
    pattern = key.clamp(max=INF_KEYS[dtype]).to(KEY_DTYPES[dtype])
    return pattern.view(dtype).to(threshold_dtype((dtype,)))


def value_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude of one key."""
    return values_of(torch.tensor([key]), dtype).item()


def key_below(value: float, dtype: torch.dtype, *, equal: bool = False) -> int:
    """Return the key of the largest number of a dtype below a value (or equal to it); -1 where there is none."""
    key = int(keys_of(torch.tensor([value], dtype=torch.float64).to(dtype), dtype).item())
    found = value_of(key, dtype)
    return key if found < value or (equal and found == value) else key - 1


def num_keep(sparsity: float, numel: int) -> int:
    """Return how many of ``numel`` weights stay at this sparsity: numel - round(sparsity * numel)."""
    return numel - round(float(sparsity) * numel)
