"""Where to cut, on Triton: sampled windows over a list of tensors on one device, without host syncs.

Everything from the sample to the last fallback pass is launched at once; what turns out not to be needed returns at
once. A call with the same tensors and counts as the last one starts from its cuts instead of a sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels.count import (
    CHUNKS_PER_SUM,
    CODES,
    codes_dtype,
    launch_code_ties,
    launch_codes,
    launch_codes_resolve,
    launch_fine,
)
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.scores import MAGNITUDE, KeyFormula
from wcr_fast.kernels.window import (
    PART,
    STATE_BINS,
    STATE_COLUMNS,
    STATE_KEEP,
    STATE_KEY,
    STATE_SHIFT,
    STATE_TIES,
    launch_resolve,
    launch_sample,
    launch_window,
    line_of,
    sample_bins,
    top_of,
)
from wcr_fast.score import Scored
from wcr_fast.table import TensorTable, build_table, current_stream, group, keep_for_graph, on_device, upload
from wcr_fast.torch_path.cuts import Cuts, comparison_dtype, threshold_dtype
from wcr_fast.torch_path.layout import is_dense
from wcr_fast.triton_path.numbers import Numbers, columns_of, numbers_of

# Below this many weights, passes over all of them take no longer than a sample and its window.
SAMPLE_FROM = 1 << 20
# Keys in a sample: of 32-bit keys as many as pin the window down to the bins of one histogram; of 16-bit keys, which
# are so few that each holds a thousandth of all weights, as many as leave a window of less than 256.
SAMPLES = {2: 1 << 17, 4: 1 << 19, 8: 1 << 19}
# Bins of one fine histogram, as powers of two: a quarter of the bins of weights, within these bounds.
FINE_BITS = (8, 19)


def in_any_order(tensor: Tensor) -> Tensor:
    """Return the tensor where its elements fill one block of memory, else a copy: for ops that ignore order."""
    return tensor.detach() if is_dense(tensor) else tensor.detach().contiguous()


@dataclass(frozen=True)
class Search:
    """One search: its tables, and what its passes share."""

    tensors: Sequence[Tensor]  # the tables hold their addresses only
    numbers: Numbers | None
    tables: list[TensorTable]
    numels: list[int]  # of the tables
    order: list[int]  # chunks of all earlier tensors
    dtype: torch.dtype  # of the keys
    state: Tensor
    shape: tuple[int, int]  # segments, and cuts of each
    max_bins: int
    sampled: bool
    warm: Tensor
    bad: Tensor

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        num_keep: Sequence[Sequence[int]],
        scored: Scored | None = None,
        *,
        sampled: bool,
        warm: Tensor | None = None,
    ) -> Search:
        """Return a search among dense tensors on one device.

        Where it is sampled, it begins at the cuts that ``warm`` holds (int64 [2 Q], zero before the first search), by
        default those of the last search like it, and leaves its own there.
        """
        device = tensors[0].device
        numbers = None if scored is None else numbers_of(scored, tensors)
        dtype = (comparison_dtype if scored is None else threshold_dtype)(t.dtype for t in tensors)
        wanted = tuple(map(tuple, num_keep))
        shape = len(wanted), len(wanted[0])
        cuts, total = shape[0] * shape[1], sum(t.numel() for t in tensors)
        max_bins = _max_bins(dtype, cuts, total)
        order = chunk_order(tensors)
        tables, numels = select_tables(tensors, order, numbers)
        start = _start(device, current_stream(device), dtype, wanted, max_bins, not sampled)
        keep_for_graph(device, start)
        if warm is None and sampled:
            warm = tables[0].scratch(f"last cuts {wanted}", 2 * cuts, torch.int64)
        elif warm is None:
            warm = torch.empty(2 * cuts, dtype=torch.int64, device=device)
        bad = torch.zeros(len(tensors), dtype=torch.uint8, device=device)
        state = start.clone()
        return cls(tensors, numbers, tables, numels, order, dtype, state, shape, max_bins, sampled, warm, bad)

    @property
    def formula(self) -> KeyFormula:
        return MAGNITUDE if self.numbers is None else self.numbers.formula

    @property
    def num_queries(self) -> int:
        return self.shape[1]

    @property
    def per_layer(self) -> bool:
        return self.shape[0] > 1

    @property
    def passes(self) -> int:
        """How many passes settle every cut: those that halve all keys, and one for a window that misses."""
        bits = self.max_bins.bit_length() - 1
        return -(-(8 * self.dtype.itemsize - 1) // bits) + self.sampled

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.state.device)

    def histograms(self) -> Tensor:
        """Return empty bins for every cut."""
        # More equal keys than an int32 counts can lie in one bin only where there are more keys.
        counts = torch.int64 if sum(self.numels) >= 1 << 31 else torch.int32
        return self.zeros(len(self.state), self.max_bins, dtype=counts)

    def run(self) -> Tensor | None:
        """Settle every cut; return the ties of every chunk, int32 [Q, chunks], where keys have 16 bits."""
        if self.sampled:
            self.guess()
        if not self.tables:
            return None
        return self.codes() if self.dtype.itemsize == 2 else self.fine(self.histograms())

    def settle(self, hist: Tensor) -> None:
        """Settle every cut from what was counted of all weights in hist, by further passes where it left its window."""
        if self.dtype.itemsize == 2:
            launch_resolve(self.state, hist, *self._resolving(hist), self.warm, key_dtype=self.dtype)
            self.codes(first=1)
        else:
            self.fine(hist, counted=True)

    def found(self, ties: Tensor | None = None) -> Cuts:
        """Return the cuts."""
        key, stay = (self.state[:, column].reshape(self.shape) for column in (STATE_KEY, STATE_TIES))
        return Cuts(key, stay, self.bad.view(torch.bool), self.dtype, chunk_ties=ties)

    def guess(self) -> None:
        """Open the first windows: around the last call's cuts, or where a sample says."""
        sample = self.zeros(sample_bins(self.dtype), dtype=torch.int32)
        total = sum(self.numels)
        size = min(SAMPLES[self.dtype.itemsize], total)
        for table, numel in zip(self.tables, self.numels, strict=True):
            lines = max(1, size * numel // total // line_of(table.dtype))
            launch_sample(
                table.rows,
                sample,
                self.warm,
                numel=numel,
                num_lines=lines,
                dtype=table.dtype,
                key_dtype=self.dtype,
                score=self.formula,
            )
        cuts = len(self.state)
        launch_window(
            self.state,
            sample,
            torch.empty(cuts * max(1, sample.numel() // PART), dtype=torch.int64, device=sample.device),
            self.zeros(cuts, dtype=torch.int32),
            self.warm,
            numel=total,
            max_bins=self.max_bins,
            line=max(line_of(table.dtype) for table in self.tables),
            key_dtype=self.dtype,
        )

    def _resolving(self, hist: Tensor) -> tuple[Tensor, Tensor]:
        """Return scratch in which a histogram's parts are added up."""
        cuts = len(self.state)
        sums = torch.empty(cuts * max(1, hist.shape[1] // PART), dtype=torch.int64, device=hist.device)
        return sums, self.zeros(cuts, dtype=torch.int32)

    def fine(self, hist: Tensor, *, counted: bool = False) -> None:
        """Count wide keys in one histogram a cut until every cut is settled; ``counted``: hist holds the first pass."""
        scratch = self._resolving(hist)
        for number in range(self.passes):
            for table in self.tables:
                if number == 0 and counted:
                    break
                launch_fine(
                    table.rows,
                    table.block_to_tensor,
                    self.state,
                    hist,
                    self.bad,
                    num_queries=self.num_queries,
                    dtype=table.dtype,
                    key_dtype=self.dtype,
                    per_layer=self.per_layer,
                    first=number == 0,
                    score=self.formula,
                )
            launch_resolve(self.state, hist, *scratch, self.warm, key_dtype=self.dtype)

    def codes(self, *, first: int = 0) -> Tensor | None:
        """Count 16-bit keys per chunk until every cut is settled, from this pass on.

        Returns the ties of every chunk, int32 [Q, chunks], where every pass was taken.
        """
        (table,) = self.tables
        device, order = self.state.device, self.order
        codes = torch.empty((self.num_queries, order[-1], CODES), dtype=codes_dtype(), device=device)
        hist = self.zeros(len(self.state), CODES, dtype=torch.int64)
        counters = self.zeros(len(self.state), dtype=torch.int32)
        sums = sum(-(-(stop - start) // CHUNKS_PER_SUM) for start, stop in itertools.pairwise(order))
        shared = {"dtype": self.dtype, "per_layer": self.per_layer}
        at = table.rows, table.block_to_tensor, self.state, codes
        for number in range(first, self.passes):
            launch_codes(*at, self.bad, first=number == 0, **shared)
            launch_codes_resolve(*at, hist, counters, self.warm, num_sums=sums, **shared)
        if first:
            return None
        ties = torch.empty((self.num_queries, order[-1]), dtype=torch.int32, device=device)
        launch_code_ties(*at, ties, per_layer=self.per_layer)
        return ties


def chunk_order(tensors: Sequence[Tensor]) -> list[int]:
    """Return the number of chunks of all earlier tensors, for each tensor and for the end of the list."""
    return np.cumsum([0, *(-(-t.numel() // CHUNK) for t in tensors)]).tolist()


def select_tables(
    tensors: Sequence[Tensor], order: Sequence[int], numbers: Numbers | None
) -> tuple[list[TensorTable], list[int]]:
    """Return the tables of a search over tensors that each fill a block of memory, and how many weights each has."""
    tables, numels = [], []
    for positions in group(tensors):
        listed = [tensors[i] for i in positions]
        before = np.cumsum([0, *(t.numel() for t in listed)]).tolist()
        extra = [
            (b, order[i], *columns_of(numbers, i, tensors[i], in_memory=True))
            for b, i in zip(before, positions, strict=False)
        ]
        tables.append(build_table(listed, positions, CHUNK, extra=extra))
        numels.append(before[-1])
    return tables, numels


@functools.lru_cache(maxsize=64)
def _start(
    device: torch.device,
    stream: int,  # part of the key: uploads are ordered by one stream
    dtype: torch.dtype,
    num_keep: tuple[tuple[int, ...], ...],
    max_bins: int,
    opened: bool,
) -> Tensor:
    """Return the state before the first pass: every window the whole range of keys, or (not opened) none."""
    keep = np.array(num_keep, dtype=np.int64).reshape(-1)
    state = np.zeros((keep.size, STATE_COLUMNS), np.int64)
    top = top_of(dtype)
    state[:, STATE_KEEP] = keep
    state[:, STATE_KEY] = top
    if opened:
        shift = next(s for s in range(64) if (top - 1) >> s < max_bins)
        state[:, STATE_SHIFT] = shift
        state[:, STATE_BINS] = np.where(keep > 0, ((top - 1) >> shift) + 1, 0)
    return upload(state, device)


def _max_bins(dtype: torch.dtype, cuts: int, total: int) -> int:
    """Return the number of bins of one histogram: a megabyte in all, and 2 % of the weights where they are many."""
    if dtype.itemsize == 2:
        return CODES
    low, high = FINE_BITS
    return 1 << min(max((max(total // 64, 1 << 18) // cuts).bit_length() - 1, low), high)


def find_cuts(tensors: Sequence[Tensor], num_keep: Sequence[Sequence[int]], scored: Scored | None = None) -> Cuts:
    """Return the cuts that keep ``num_keep[s][q]`` weights of segment s: the list (S = 1), or each tensor (S = L).

    Order doesn't matter here, so dense tensors are read in memory order; tensors with gaps are copied first. By
    magnitude, or by a score that has a kernel.
    """
    tensors = [in_any_order(t) for t in tensors]
    sampled = len(num_keep) == 1 and sum(t.numel() for t in tensors) >= SAMPLE_FROM
    with on_device(tensors[0].device):
        search = Search.of(tensors, num_keep, scored, sampled=sampled)
        return search.found(search.run())
