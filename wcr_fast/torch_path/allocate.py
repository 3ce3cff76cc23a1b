"""How many weights of each layer stay: with floors and caps, or where LAMP ranks them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.torch_path.cuts import INF_KEYS, keys_of
from wcr_fast.torch_path.window import COUNTERS, KeyBlock, KeyCounter, KeySource, count_windows, histogram, shares


def bounded(source: KeySource | KeyCounter, keep: int, low: Sequence[int], high: Sequence[int]) -> np.ndarray:
    """Return how many keys of each tensor stay, int64 [L]: the largest of all, but from ``low`` to ``high`` of each.

    For a key t, clamp(keys of a tensor from t on, low, high) grows as t falls: the number that stays is that of the
    t where their sum reaches ``keep``; of the keys equal to t the first ones stay, in list order. So a larger ``keep``
    takes none away. Reads the keys three to four times (float32).
    """
    low, high = np.array(low, np.int64), np.array(high, np.int64)
    top = INF_KEYS[source.dtype] + 1

    def clamped(counts: np.ndarray) -> np.ndarray:
        return np.clip(counts, *(b.reshape(-1, *[1] * (counts.ndim - 1)) for b in (low, high)))

    bins = max(2, COUNTERS // max(len(low), 1))
    lo, hi = 0, top
    while True:
        window = histogram(lo, hi, (0,), bins)  # whole bins, but for the one that ends with infinity
        tally = count_windows(source, [window], first=False)
        counts = tally.bins[0] if window.bins > 1 else tally.inside[0][:, None]
        above = tally.above[0]
        reached = above[:, None] + np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # [L, bins]: keys in a bin or above it
        places = np.flatnonzero(clamped(reached).sum(axis=0) >= keep)
        found = int(places[-1]) if places.size else 0
        if window.shift == 0:
            stay = clamped(reached[:, found] - counts[:, found])
            spare = clamped(reached[:, found]) - stay  # of the ties, as many as the bounds let a tensor keep
            return stay + shares(np.array([keep - stay.sum()]), spare[:, None])[:, 0]
        lo = lo + (found << window.shift)
        hi = min(lo + (1 << window.shift), hi)


class LampSource:
    """The keys of LAMP scores, tensor after tensor; see window.KeySource.

    w^2 over the sum of the squares that are at least as large, in float64, from the largest on: inside of a tensor
    ordered as the magnitudes are, of equal ones the first ahead (Lee et al. 2021, arXiv 2010.07611). Sorts one tensor
    at a time, on its device; keys come in falling order, as only their counts matter.

    Squares are added in two numbers of fixed point, of 62 bits less those of the count each: of 2^26 weights 2^-70 of
    the largest square is the least that counts. Such sums have no order: every device gives the same bits.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t.detach() for t in tensors]
        self.dtype = torch.float64
        self.numels = [t.numel() for t in tensors]

    def keys(self, i: int) -> Tensor:
        """Return the keys of tensor i, falling, on its device."""
        falling = self.tensors[i].abs().reshape(-1).sort(descending=True).values.double()
        largest = falling[0].item()  # NaN comes first
        if not math.isfinite(largest):
            return keys_of(torch.full_like(falling, math.nan), self.dtype)
        exponent, bits = math.frexp(largest)[1], 62 - falling.numel().bit_length()
        half = exponent // 2  # in two steps, as one factor may be out of range
        squares = falling.mul_(2.0**-half).mul_(2.0 ** (half - exponent)).square_().mul_(2.0**bits)
        high = squares.floor()
        low = (squares - high).mul_(2.0**bits).round_()
        sums = low.long().cumsum_(0).double().mul_(2.0**-bits).add_(high.long().cumsum_(0).double())
        return keys_of((squares / sums).masked_fill_(squares == 0, 0.0), self.dtype)

    def sample(self, size: int) -> np.ndarray:
        """Return all keys of small lists, else evenly spread ones: a sorted tensor is its own summary."""
        step = max(1, -(-sum(self.numels) // size))
        parts = [self.keys(i)[::step].cpu() for i, numel in enumerate(self.numels) if numel]
        return torch.cat(parts).numpy().reshape(-1, 1)

    def streams(self, count: int, windows: int = 1) -> list[Iterator[KeyBlock]]:
        """Return one iterator; see window.KeySource."""
        return [self._blocks()]

    def _blocks(self) -> Iterator[KeyBlock]:
        for i, numel in enumerate(self.numels):
            if numel:
                yield KeyBlock([i], [0], self.keys(i).cpu().numpy())
