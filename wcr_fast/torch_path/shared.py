"""The window search over keys that lie with several processes: counts travel and are summed, keys stay where they are.

Every process runs the same search over its own keys and asks for sums; as all decisions follow from sums, all processes
take the same ones and end with the same cuts. Whoever runs a search decides how to sum: see ``together``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import numpy as np

from wcr_fast.torch_path.cuts import INF_KEYS
from wcr_fast.torch_path.window import (
    BINS,
    COLLECT_MAX,
    MARGIN,
    SAMPLE_MAX,
    SAMPLE_MIN,
    Found,
    KeyCounter,
    KeySource,
    Tally,
    Window,
    count_windows,
    histogram,
    sample_variance,
)
from wcr_fast.torch_path.window import COUNTERS as BIN_COUNTERS

T = TypeVar("T")
#: Yields this process's counts (1-d, int32 where no sum can exceed it, else int64), is sent their sums over all
#: processes, returns a T.
Sums = Generator[np.ndarray, np.ndarray, T]

# Counters of one round of all searches together: 4 kB. Fewer make more rounds of fewer bytes in all.
COUNTERS = 512
# A window of at most this many keys is counted key by key.
NARROW = 32
# The sample's quantiles need not be known to the last bit: 1/256 of a binade, or all where that leaves too many keys to
# collect; 1/64 where keys are counted only.
FINE, COUNTED_FINE = 8, 6
MANTISSA = {0x7C00: 10, 0x7F80: 7, 0x7F80_0000: 23, 0x7FF0_0000_0000_0000: 52}  # by infinity's key
# Variances of the sample travel in this unit: as small as counts.
SPREAD = 64
# Each sweep at least halves a window of 64-bit keys; one that was missed or overflowed costs two more.
SWEEPS = 72


def together(searches: Sequence[Sums[T]], add: Callable[[np.ndarray], np.ndarray]) -> list[T]:
    """Run searches in step: what they ask in one round is summed in one message.

    Args:
        searches: the same ones in the same order in every process.
        add: takes int32 or int64 counts, 1-d, and returns their sums over all processes, equal in all of them: a
            collective.

    Returns:
        What the searches return, in their order.
    """
    results: list[T | None] = [None] * len(searches)
    sums: dict[int, np.ndarray | None] = dict.fromkeys(range(len(searches)))
    while sums:
        asked: dict[int, np.ndarray] = {}
        for i, values in sums.items():
            try:
                asked[i] = searches[i].send(values)
            except StopIteration as end:
                results[i] = end.value
        parts = []
        if asked:
            ends = np.cumsum([len(values) for values in asked.values()])
            parts = np.split(add(np.concatenate(list(asked.values()))), ends[:-1])
        sums = dict(zip(asked, parts, strict=True))
    return results


def descend(
    count: Callable[[np.ndarray, np.ndarray], np.ndarray],
    lo: np.ndarray,
    hi: np.ndarray,
    target: np.ndarray,
    counters: int,
    most: int,
    until: int = 1,
) -> Sums[tuple[np.ndarray, np.ndarray]]:
    """Find where counts that fall with x pass their targets, in steps that cut all intervals into equal parts.

    Args:
        count: given indices of targets [t] and places x [t, k], returns this process's counts there, [t, k].
        lo: int64 [T], where the summed count reaches the target, or 0.
        hi: int64 [T], above lo; not to be reached.
        target: [T].
        counters: about how many counts a round may send.
        most: no summed count is larger.
        until: width of an interval that needs no more cutting.

    Returns:
        The last intervals [lo, hi): the largest x whose summed count is at least the target lies in them.
    """
    lo, hi = lo.copy(), hi.copy()
    while (which := np.flatnonzero(hi - lo > until)).size:
        ways = max(2, counters // which.size + 1)
        step = -((lo[which] - hi[which]) // ways)  # rounded up
        places = lo[which, None] + step[:, None] * np.arange(1, ways)
        valid = places < hi[which, None]
        mine = count(which, np.minimum(places, hi[which, None] - 1))
        sums = (yield mine.reshape(-1).astype(_integer(most), copy=False)).reshape(mine.shape)
        lo[which] += step * ((sums >= target[which, None]) & valid).sum(axis=1)
        hi[which] = np.minimum(hi[which], lo[which] + step)
    return lo, hi


def shared_search(
    source: KeySource | KeyCounter, num_keep: Sequence[int], total: int, *, counters: int = COUNTERS
) -> Sums[Found]:
    """Find the cuts that keep the ``num_keep[q]`` largest keys of all processes; see ``window_search``.

    Args:
        source: this process's keys; each process has the same number of tensors, some of them empty or parts. Those of
            all processes are KeySources, or all are KeyCounters: this decides which windows follow.
        num_keep: ranks among the keys of all processes, each in [0, total].
        total: number of keys of all processes.
        counters: about how many counts a round may send.

    Returns:
        The cuts, with counts over all processes.

    Raises:
        RuntimeError: when the source of another process raised an error; that process raises its own.

    Example:
        >>> import torch
        >>> from wcr_fast.torch_path.blocks import MemorySource
        >>> search = shared_search(MemorySource([torch.tensor([1.0, -3.0])]), [1], 2)
        >>> together([search], lambda counts: counts)[0].ties  # the only process: its counts are the sums
        [1]
    """
    return (yield from _Shared(source, num_keep, total, counters).run())


class _Collected:
    """The keys of one window: this process's, by tensor. Places count from the window's first key."""

    def __init__(self, tally: Tally, i: int, dtype: np.dtype) -> None:
        self.lo = tally.windows[i].lo
        self.places = tally.windows[i].hi - self.lo
        self.keys = np.concatenate([np.empty(0, dtype), *tally.keys[i]])
        nothing = np.empty(0, np.int64)
        owners = np.concatenate([nothing, *(tensors for tensors, _ in tally.owners[i])]).astype(np.int64)
        counts = np.concatenate([nothing, *(np.atleast_1d(counts) for _, counts in tally.owners[i])])
        starts = np.cumsum(counts) - counts
        # reduceat gives a wrong value for empty segments
        self.owners, self.starts = owners[counts > 0], starts[counts > 0]
        self.ranked, self.tensors = np.sort(self.keys), len(tally.zeros)

    def at_least(self, places: np.ndarray) -> np.ndarray:
        """Return how many keys are at each place or above it."""
        return _at_least(self.ranked, self.lo + places)

    def per_tensor(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many keys lie above a place and how many at it, in each tensor."""
        return self._sums(self.keys > self.lo + place), self._sums(self.keys == self.lo + place)

    def _sums(self, flags: np.ndarray) -> np.ndarray:
        found = np.zeros(self.tensors, np.int64)
        if flags.size:
            np.add.at(found, self.owners, np.add.reduceat(flags, self.starts, dtype=np.int64))
        return found


class _Binned:
    """The counts of one window's bins: this process's, by tensor. Places are bins."""

    def __init__(self, tally: Tally, i: int) -> None:
        self.places = tally.windows[i].bins
        self.bins = tally.bins[i] if self.places > 1 else tally.inside[i][:, None]
        self._reach = np.cumsum(self.bins.sum(axis=0)[::-1])[::-1]

    def at_least(self, places: np.ndarray) -> np.ndarray:
        """Return how many keys are at each place or above it."""
        return self._reach[places]

    def per_tensor(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many keys lie above a place and how many at it, in each tensor."""
        return self.bins[:, place + 1 :].sum(axis=1), self.bins[:, place]


class _Shared:
    """The state of one search in one process; all but counts per tensor is equal in all of them."""

    def __init__(self, source: KeySource | KeyCounter, num_keep: Sequence[int], total: int, counters: int) -> None:
        self.counts = isinstance(source, KeyCounter)
        self.source, self.num_keep, self.total = source, list(num_keep), total
        self.counters, self.integer = max(1, counters), _integer(total)
        self.top = INF_KEYS[source.dtype] + 1
        self.tensors = len(source.numels)
        self.capacity = SAMPLE_MIN + min(total // 64, COLLECT_MAX)
        self.bins = max(2, min(BINS, BIN_COUNTERS // max(self.tensors, 1)))
        shape = (self.tensors, len(self.num_keep))
        self.key = [self.top] * shape[1]
        self.above, self.tied = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.error: Exception | None = None

    def run(self) -> Sums[Found]:
        windows = yield from self._guess()
        zeros, bad = np.zeros(self.tensors, np.int64), np.zeros(self.tensors, bool)
        for sweep in range(SWEEPS):
            tally = self._sweep(windows, first=not sweep)
            if not sweep:
                zeros, bad = tally.zeros, tally.bad
            counts = [tally.above.sum(axis=1), tally.inside.sum(axis=1), [bad.sum()]]
            above, inside, nan = np.split((yield from self._checked(*counts)), [len(windows), 2 * len(windows)])
            windows = [] if nan else (yield from self._resolve(windows, tally, above, inside))
            if not windows:
                break
        else:
            raise RuntimeError("the counts of two sweeps contradict each other: did the weights change meanwhile?")
        mine = np.concatenate([self.above.reshape(-1), self.tied.reshape(-1), zeros, bad])
        sums = (yield mine.astype(self.integer)).astype(np.int64)
        above, tied, zeros, bad = np.split(sums, np.cumsum([self.above.size, self.tied.size, self.tensors]))
        above, tied = above.reshape(self.above.shape), tied.reshape(self.tied.shape)
        ties = [keep - int(n) if keep else 0 for keep, n in zip(self.num_keep, above.sum(axis=0), strict=True)]
        return Found(self.key, ties, above, tied, zeros, bad > 0)

    def _sweep(self, windows: Sequence[Window], *, first: bool) -> Tally:
        tally = self._attempt(lambda: count_windows(self.source, windows, first=first))
        return Tally(windows, self.tensors, self.top) if tally is None else tally

    def _attempt(self, read: Callable[[], T]) -> T | None:
        """Return what a source gives; an error waits until all processes know of it, so that none is left alone."""
        try:
            return read()
        except Exception as error:
            self.error = error
            return None

    def _checked(self, *counts: Sequence[int]) -> Sums[np.ndarray]:
        """Return sums; raise in all processes where one has failed."""
        sums = yield np.concatenate([*counts, [self.error is not None]]).astype(self.integer)
        if self.error is not None:
            raise self.error
        if sums[-1]:
            raise RuntimeError("another process could not read its weights: it says why")
        return sums[:-1]

    def _guess(self) -> Sums[list[Window]]:
        """Return windows that hold the cuts, most likely: quantiles of a sample of all keys."""
        ranks = [q for q, keep in enumerate(self.num_keep) if keep > 0]
        if not ranks:
            return []
        if self.total <= SAMPLE_MIN:
            return [self._window(0, self.top, tuple(ranks), self.total)]
        lines = self._attempt(self._sample)
        lines = np.empty((0, 1), np.int64) if lines is None else lines
        ranked = np.sort(lines, axis=None)
        shares = np.array([self.num_keep[q] for q in ranks]) / self.total
        spread = np.zeros(len(ranks))
        if ranked.size:
            places = np.clip(ranked.size - np.rint(shares * ranked.size), 0, ranked.size - 1).astype(np.int64)
            spread = np.array([sample_variance(lines, key) for key in ranked[places]])
        size, *spread = yield from self._checked([ranked.size], np.ceil(spread / SPREAD))
        margin = np.ceil(MARGIN * np.sqrt(SPREAD * np.array(spread)) + 3 * MARGIN)
        rank = np.clip(np.rint(shares * size), 1, size)
        lo, hi, share = yield from self._spans(ranked, np.concatenate([rank + margin, rank - margin]), int(size))
        # Overlapping windows become one, so that no key is collected twice.
        merged: list[tuple[int, int, float, tuple[int, ...]]] = []
        for low, high, part, q in sorted(zip(lo.tolist(), hi.tolist(), share.tolist(), ranks, strict=True)):
            if merged and low < merged[-1][1]:
                lo0, hi0, part0, others = merged[-1]
                merged[-1] = (lo0, max(hi0, high), part0 + part, (*others, q))
            else:
                merged.append((low, high, part, (q,)))
        return [self._window(lo, hi, ranks, share * self.total) for lo, hi, share, ranks in merged]

    def _sample(self) -> np.ndarray:
        """Return this process's share of the sample."""
        mine = sum(self.source.numels)
        size = min(max(SAMPLE_MIN, self.total // 64), SAMPLE_MAX)
        # a line or two at least, where there is anything
        return self.source.sample(max(256, size * mine // self.total)) if mine else np.empty((0, 1), np.int64)

    def _spans(self, ranked: np.ndarray, target: np.ndarray, size: int) -> Sums[tuple[np.ndarray, ...]]:
        """Return windows [lo, hi) between targets of the sample [2 W], and their shares of it where these matter."""
        half = len(target) // 2

        def count(which: np.ndarray, places: np.ndarray) -> np.ndarray:
            return _at_least(ranked, places)

        lo, hi = np.zeros(2 * half, np.int64), np.full(2 * half, self.top, np.int64)
        fine = COUNTED_FINE if self.counts else FINE
        for until in (1 << max(MANTISSA[self.top - 1] - fine, 0), 1):
            lo, hi = yield from descend(count, lo, hi, target, self.counters, self.total, until)
            if self.counts:
                return lo[:half], hi[half:], np.zeros(half)
            inside = _at_least(ranked, lo[:half]) - _at_least(ranked, hi[half:])
            share = (yield inside.astype(self.integer)) / max(size, 1)
            if share.sum() * self.total <= self.capacity:
                break
        return lo[:half], hi[half:], share

    def _window(self, lo: int, hi: int, ranks: tuple[int, ...], expected: float) -> Window:
        limit = self.capacity * len(ranks)
        if hi - lo <= max(NARROW, self.bins):
            return Window(lo, hi, ranks)
        if not self.counts and expected <= limit:
            return Window(lo, hi, ranks, limit=limit)
        return histogram(lo, hi, ranks, self.bins, self.top if self.counts else 0)

    def _resolve(
        self, windows: Sequence[Window], tally: Tally, above: np.ndarray, inside: np.ndarray
    ) -> Sums[list[Window]]:
        """Settle the ranks whose keys are at hand; return windows for the others."""
        following: list[Window] = []
        wanted: list[tuple[int, int]] = []
        for i, window in enumerate(windows):
            first, last = int(above[i]), int(above[i] + inside[i])
            missed_up = tuple(q for q in window.ranks if self.num_keep[q] <= first)
            missed_down = tuple(q for q in window.ranks if self.num_keep[q] > last)
            ranks = [q for q in window.ranks if first < self.num_keep[q] <= last]
            if missed_up:
                following.append(self._window(window.hi, self.top, missed_up, first))
            if missed_down:
                following.append(self._window(0, window.lo, missed_down, self.total - last))
            if ranks and inside[i] > window.limit > 0:  # overflowed: histogram
                following.append(self._window(window.lo, window.hi, tuple(ranks), np.inf))
            else:
                wanted += [(i, q) for q in ranks]
        if wanted:
            following += yield from self._find(windows, tally, above, wanted)
        return following

    def _find(
        self, windows: Sequence[Window], tally: Tally, above: np.ndarray, wanted: Sequence[tuple[int, int]]
    ) -> Sums[list[Window]]:
        """Settle ranks, given as pairs of a window and a rank, or return the bins that hold them as windows."""
        integer = next((keys.dtype for i, _ in wanted for keys in tally.keys[i]), np.dtype(np.int64))
        held = {
            i: _Collected(tally, i, integer) if windows[i].limit else _Binned(tally, i)
            for i in dict.fromkeys(i for i, _ in wanted)
        }

        def count(which: np.ndarray, places: np.ndarray) -> np.ndarray:
            return np.stack([held[wanted[t][0]].at_least(row) for t, row in zip(which, places, strict=True)])

        ends = np.array([held[i].places for i, _ in wanted])
        target = np.array([self.num_keep[q] - above[i] for i, q in wanted])
        found, _ = yield from descend(count, np.zeros_like(ends), ends, target, self.counters, self.total)
        bins: dict[tuple[int, int], list[int]] = {}
        for (i, q), place in zip(wanted, found.tolist(), strict=True):
            if windows[i].shift:
                bins.setdefault((i, place), []).append(q)
                continue
            higher, self.tied[:, q] = held[i].per_tensor(place)
            self.key[q], self.above[:, q] = windows[i].lo + place, tally.above[i] + higher
        if not bins:
            return []
        sizes = np.zeros(len(bins), self.integer)
        if not self.counts:  # else how many they are decides nothing
            sizes = yield np.array([held[i].per_tensor(b)[1].sum() for i, b in bins]).astype(self.integer)
        narrower = []
        for ((i, b), ranks), size in zip(bins.items(), sizes.tolist(), strict=True):
            lo, width = windows[i].lo + (b << windows[i].shift), 1 << windows[i].shift
            narrower.append(self._window(lo, min(lo + width, windows[i].hi), tuple(ranks), size))
        return narrower


def _integer(most: int) -> type[np.signedinteger]:
    """Return the smallest dtype for counts up to this one."""
    return np.int32 if most < 1 << 31 else np.int64


def _at_least(ranked: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return how many of the sorted keys are at each place or above it; places fit the keys' dtype."""
    return ranked.size - np.searchsorted(ranked, places.astype(ranked.dtype))
