"""Which of equal magnitudes come first in a tensor whose chunks interleave: sharded along a later dimension.

Inside a chunk row-major order is the tensor's own, so it is enough to know how many ties of each chunk stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from wcr_fast.pruning.stored import Chunk

# Counters per part and sweep.
BINS = 1 << 14


def logical_indices(chunk: Chunk, shape: Sequence[int], places: np.ndarray) -> np.ndarray:
    """Return the flat row-major indices in a tensor of this shape of places in a chunk of it.

    Example:
        >>> logical_indices(Chunk(0, 0, 8, (2, 1), (0, 3)), (2, 4), np.array([0, 1])).tolist()
        [3, 7]
    """
    inside = np.unravel_index(places, chunk.shape)
    return np.ravel_multi_index([i + first for i, first in zip(inside, chunk.offset, strict=True)], shape)


def first_ties(
    stay: int,
    numel: int,
    parts: int,
    sweep: Callable[[], Iterable[tuple[int, np.ndarray]]],
    add: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return how many of each part's ties are among the first ``stay`` of a tensor.

    Args:
        stay: at least 1, fewer than there are.
        numel: elements of the tensor.
        parts: number of parts.
        sweep: reads the tensor; yields pairs of a part and the flat indices of ties in it.
        add: returns the sum of counts over all processes that read parts.

    Returns:
        int64 [parts], ``stay`` in all.
    """
    kept, lo, hi = np.zeros(parts, np.int64), 0, numel
    while True:
        step = -(-(hi - lo) // BINS)
        counts = np.zeros((parts, BINS), np.int64)
        for part, indices in sweep():
            inside = indices[(indices >= lo) & (indices < hi)]
            counts[part] += np.bincount((inside - lo) // step, minlength=BINS)
        counts = add(counts)
        # The bin with the last tie that stays; all before it stay.
        b = int(np.searchsorted(np.cumsum(counts.sum(axis=0)), stay - kept.sum()))
        kept += counts[:, :b].sum(axis=1)
        left, last = stay - int(kept.sum()), counts[:, b]
        if left == last.sum() or np.count_nonzero(last) == 1:
            return kept + np.minimum(last, left)
        lo, hi = lo + b * step, min(lo + (b + 1) * step, hi)
