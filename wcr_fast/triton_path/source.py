"""Keys that are counted where they lie, for the searches that the host leads: only counts come to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels.count import launch_fine
from wcr_fast.kernels.scores import MAGNITUDE
from wcr_fast.kernels.window import STATE_ABOVE, STATE_BINS, STATE_COLUMNS, STATE_LO, STATE_SHIFT
from wcr_fast.score import Scored, compute
from wcr_fast.table import on_device, upload
from wcr_fast.torch_path.blocks import LINE_BYTES, spread
from wcr_fast.torch_path.cuts import INF_KEYS, comparison_dtype, keys_of, threshold_dtype
from wcr_fast.torch_path.window import Tally, Window
from wcr_fast.triton_path.cuts import chunk_order, in_any_order, select_tables
from wcr_fast.triton_path.numbers import numbers_of

# From so many weights of one tensor on, a bin may hold more than an int32 counts.
WIDE = 1 << 31


class DeviceSource:
    """The keys of tensors on one device, by magnitude or by a score that has a kernel; see window.KeyCounter."""

    def __init__(self, tensors: Sequence[Tensor], scored: Scored | None = None) -> None:
        self.tensors = [in_any_order(t) for t in tensors]
        self.scored = scored
        self.dtype = (comparison_dtype if scored is None else threshold_dtype)(t.dtype for t in tensors)
        self.numels = [t.numel() for t in tensors]
        self.device = tensors[0].device
        # Tables hold addresses: what they point to, copies among it, lives as long.
        self._numbers = None if scored is None else numbers_of(scored, self.tensors)
        with on_device(self.device):
            self._tables, _ = select_tables(self.tensors, chunk_order(self.tensors), self._numbers)

    def sample(self, size: int) -> np.ndarray:
        """Return about ``size`` keys, in lines of neighbours at fixed places; see window.KeySource."""
        total, ends = sum(self.numels), np.cumsum(self.numels)
        line = 1 if total <= size else LINE_BYTES // self.dtype.itemsize
        places = np.arange(total) if total <= size else spread(total, max(size // line, 1))
        owners, lines = np.searchsorted(ends, places, side="right"), []
        for i in np.unique(owners):
            inside = places[owners == i] - (ends[i] - self.numels[i])
            index = (inside[:, None] // line * line + np.arange(line)) % self.numels[i]
            lines.append(self._keys_at(i, upload(index.reshape(-1), self.device)))
        return torch.cat(lines).cpu().numpy().reshape(-1, line)

    def _keys_at(self, i: int, index: Tensor) -> Tensor:
        tensor = self.tensors[i]
        at = torch.unravel_index(index, tensor.shape) if tensor.dim() else ()
        w = tensor[at].expand(index.numel())
        if self.scored is not None:
            w = compute(self.scored.score, w, self.scored.beside(i, tensor)[at].expand(index.numel()))
        return keys_of(w, self.dtype)

    def count(self, windows: Sequence[Window], *, first: bool) -> Tally:
        """Count in one pass over the weights, and wait for the counts; see window.KeyCounter."""
        tensors, tally = len(self.numels), Tally(windows, len(self.numels), INF_KEYS[self.dtype] + 1)
        # What a window of the smallest keys but zero leaves below it is zero.
        listed = [*windows, Window(1, 2, ())] if first else windows
        bins = max(w.bins for w in listed)
        opened = np.zeros((tensors, len(listed), STATE_COLUMNS), np.int64)
        for column, numbers in (
            (STATE_LO, [w.lo for w in listed]),
            (STATE_BINS, [w.bins for w in listed]),
            (STATE_SHIFT, [w.shift for w in listed]),
        ):
            opened[:, :, column] = numbers
        with on_device(self.device):
            state = upload(opened.reshape(-1, STATE_COLUMNS), self.device)
            kind = torch.int64 if max(self.numels) >= WIDE else torch.int32
            hist = torch.zeros((len(state), bins), dtype=kind, device=self.device)
            bad = torch.zeros(tensors, dtype=torch.uint8, device=self.device)
            for table in self._tables:
                launch_fine(
                    table.rows,
                    table.block_to_tensor,
                    state,
                    hist,
                    bad,
                    num_queries=len(listed),
                    dtype=table.dtype,
                    key_dtype=self.dtype,
                    per_layer=True,
                    first=first,
                    score=MAGNITUDE if self._numbers is None else self._numbers.formula,
                )
            counts = torch.cat([x.reshape(-1).long() for x in (state[:, STATE_ABOVE], hist, bad)]).cpu().numpy()
        above, hist, bad = np.split(counts, np.cumsum([opened.shape[0] * len(listed), tensors * len(listed) * bins]))
        above, hist = above.reshape(tensors, -1).T, hist.reshape(tensors, -1, bins)
        inside = hist.sum(axis=2).T
        tally.above[...], tally.inside[...] = above[: len(windows)], inside[: len(windows)]
        tally.bins = [hist[:, i, : window.bins] for i, window in enumerate(windows)]
        if first:
            tally.zeros[...], tally.bad[...] = self.numels - above[-1] - inside[-1], bad
        return tally
