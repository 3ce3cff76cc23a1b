"""The ties of a cut in parts of one tensor: which of them come first in the whole tensor's logical order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.torch_path.blocks import SERIAL, pieces
from wcr_fast.torch_path.cuts import keys_of
from wcr_fast.torch_path.shared import Sums, descend


class Ties:
    """The elements of a shard whose key is a given one, by their places in the whole tensor.

    Only a count per block is kept; blocks that a question falls into are looked at again.

    Args:
        shard: a part of a tensor: the product of the indices ``held`` along each dimension.
        shape: of the whole tensor.
        held: increasing, so that the shard's logical order is that of the whole tensor.
        key: of the cut.
        dtype: the comparison dtype whose keys these are.
    """

    def __init__(
        self, shard: Tensor, shape: Sequence[int], held: Sequence[np.ndarray], key: int, dtype: torch.dtype
    ) -> None:
        self.shape, self.held, self.key, self.dtype = shape, held, key, dtype
        self.blocks = list(pieces(shard, SERIAL if shard.device.type == "cpu" else SERIAL << 5))
        self.starts = np.cumsum([0, *(block.numel() for block in self.blocks)])
        counts = [self._flags(block).count_nonzero() for block in self.blocks]
        self.before = np.cumsum([0, *torch.stack(counts).tolist()] if counts else [0])
        self.count = int(self.before[-1])

    def _flags(self, block: Tensor) -> Tensor:
        return keys_of(block, self.dtype).reshape(-1) == self.key

    def from_place(self, places: np.ndarray) -> np.ndarray:
        """Return how many ties lie at each place of the whole tensor (row-major) or after it."""
        inside = self._elements_before(places)
        at = np.searchsorted(self.starts[1:], inside, side="right")
        found = self.count - self.before[at]
        for i in np.unique(at[at < len(self.blocks)]).tolist():
            ties = self._flags(self.blocks[i]).nonzero().squeeze(1).cpu().numpy()
            found[at == i] -= np.searchsorted(ties, inside[at == i] - self.starts[i])
        return found

    def _elements_before(self, places: np.ndarray) -> np.ndarray:
        """Return how many of the shard's elements come before each place: digit by digit."""
        count, same = np.zeros_like(places), np.ones(places.shape, bool)
        for d, index in enumerate(self.held):
            digit, places = np.divmod(places, max(math.prod(self.shape[d + 1 :]), 1))
            before = np.searchsorted(index, digit)
            count += same * before * math.prod(map(len, self.held[d + 1 :]))
            same &= before < np.searchsorted(index, digit, side="right")
        return count

    def kept(self, left: int, tied: int, owned: bool, counters: int) -> Sums[int]:
        """Find how many ties of this shard are among the first ``left`` of the ``tied`` in the whole tensor.

        Args:
            left: more than 0.
            tied: at least left.
            owned: whether this process's ties count; a replica only needs to know.
            counters: about how many counts a round may send.
        """

        def count(which: np.ndarray, places: np.ndarray) -> np.ndarray:
            return self.from_place(places.reshape(-1)).reshape(places.shape) * owned

        ends = np.array([0]), np.array([max(math.prod(self.shape), 1)])
        last, _ = yield from descend(count, *ends, np.array([tied - left + 1]), counters, tied)
        return self.count - int(self.from_place(last + 1)[0])
