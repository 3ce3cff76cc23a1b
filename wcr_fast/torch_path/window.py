"""Exact selection by a sampled window: one pass over blocks of keys, from memory or from files.

A sample says between which two keys the cut lies. One pass counts the keys above that window and collects those
inside, which a partition then resolves. Where the window misses, or holds too many keys to collect, passes with a
histogram narrow it down: slower, never wrong. Nothing here depends on how the keys are cut into blocks, or on how
many threads read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from wcr_fast.torch_path import scan as scanning
from wcr_fast.torch_path.cuts import INF_KEYS
from wcr_fast.torch_path.scan import KeyBlock, Scanner

SAMPLE_MIN, SAMPLE_MAX = 1 << 16, 1 << 19
# At most this many keys are collected, whatever the model and the threads: what doesn't fit is counted in bins instead.
COLLECT_MAX = 1 << 23
# The window reaches this many standard deviations of the sample's count to both sides of the wanted rank.
MARGIN = 4.0
# Histograms count per tensor; this many counters in all (0.5 MB) and at most so many bins.
COUNTERS, BINS = 1 << 16, 1 << 12
# A window of no more different keys than this is never collected.
NARROW = 256
# Below this many keys, starting threads costs more than they bring.
THREADED = 1 << 20


class KeySource(Protocol):
    """What the engine asks of the place where keys come from; it may sweep over it several times."""

    dtype: torch.dtype  # the comparison dtype whose patterns the keys are
    numels: Sequence[int]  # keys per tensor

    def sample(self, size: int) -> np.ndarray:
        """Return about ``size`` keys as [lines, keys per line], spread over all; exactly all where size covers all.

        Lines are neighbours in memory; how much they resemble each other decides the width of the window.
        """
        ...

    def streams(self, count: int, windows: int = 1) -> Sequence[Iterable[KeyBlock]]:
        """Return at most ``count`` iterables, read in parallel, which together give every key once.

        ``windows``: with how many each key will be compared.
        """
        ...


@runtime_checkable
class KeyCounter(Protocol):
    """A source that counts its keys by itself, where they lie, and gives none away: windows are never collected."""

    dtype: torch.dtype
    numels: Sequence[int]

    def sample(self, size: int) -> np.ndarray:
        """See KeySource."""
        ...

    def count(self, windows: Sequence[Window], *, first: bool) -> Tally:
        """Sweep over all keys once; see ``count_windows``. Windows have whole bins, or end above infinity."""
        ...


class Found(NamedTuple):
    """The cuts of one selection at Q ranks over L tensors.

    Attributes:
        key: the smallest key kept, per rank; one above infinity's key where nothing is kept.
        ties: how many keys equal to it are kept in all.
        above: int64 [L, Q], keys above the cut in each tensor.
        tied: int64 [L, Q], keys equal to the cut in each tensor.
        zeros: int64 [L], zeros in each tensor.
        bad: bool [L], the tensor holds NaN.
    """

    key: list[int]
    ties: list[int]
    above: np.ndarray
    tied: np.ndarray
    zeros: np.ndarray
    bad: np.ndarray


def shares(ties: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Return how many ties each tensor keeps, [L, Q]: the first ones in list order, ``ties`` [Q] in all."""
    before = np.cumsum(tied, axis=0) - tied
    return np.clip(ties - before, 0, tied)


def window_search(source: KeySource | KeyCounter, num_keep: Sequence[int]) -> Found:
    """Find the cuts that keep the ``num_keep[q]`` largest keys of the source.

    Args:
        source: where the keys come from.
        num_keep: ranks, each in [0, number of keys].

    Returns:
        The cuts, with their counts per tensor. Where a tensor holds NaN, only ``bad`` means something.
    """
    search = _Search(source, num_keep)
    while not search.done():
        search.sweep()
    return search.found()


@dataclass(frozen=True)
class Window:
    """Keys lo <= key < hi; collected where they are few, else counted in bins of 2^shift keys."""

    lo: int
    hi: int
    ranks: tuple[int, ...]
    limit: int = 0  # collect up to this many keys; 0: histogram
    shift: int = 0

    @property
    def bins(self) -> int:
        return ((self.hi - self.lo - 1) >> self.shift) + 1


def histogram(lo: int, hi: int, ranks: tuple[int, ...], bins: int, end: int = 0) -> Window:
    """Return a window to count in at most so many bins; up to ``end`` it may grow to make the last one whole."""
    shift = ((hi - lo - 1) // bins).bit_length()
    whole = lo + ((((hi - lo - 1) >> shift) + 1) << shift)
    return Window(lo, max(hi, min(whole, end)), ranks, shift=shift)


class Tally:
    """What one thread counted in one sweep."""

    def __init__(self, windows: Sequence[Window], tensors: int, top: int) -> None:
        self.windows, self.top = windows, top
        self.above = np.zeros((len(windows), tensors), np.int64)
        self.inside = np.zeros((len(windows), tensors), np.int64)
        self.zeros = np.zeros(tensors, np.int64)
        self.bad = np.zeros(tensors, bool)
        self.keys: list[list[np.ndarray]] = [[] for _ in windows]
        self.owners: list[list[tuple[Sequence[int], np.ndarray]]] = [[] for _ in windows]
        self.bins = [None if w.limit else np.zeros((tensors, w.bins), np.int64) for w in windows]

    def read(self, blocks: Iterable[KeyBlock], first: bool, seen: np.ndarray) -> Tally:
        """Count blocks; ``seen``: the keys in each window so far, of all threads, which share the windows' limits."""
        # Single keys need no more than a count.
        wanted = [window.limit > 0 or window.bins > 1 for window in self.windows]
        bounds = [w.lo for w in self.windows], [w.hi for w in self.windows]
        scanner = Scanner(*bounds, wanted, self.top, ends=first)
        for block in blocks:
            scan, tensors = scanner.scan(block), block.tensors
            self.zeros[tensors] += scan.zeros
            self.bad[tensors] |= scan.bad
            self.above[:, tensors] += scan.above
            self.inside[:, tensors] += scan.inside
            seen += scan.inside.sum(axis=1)
            for i, window in enumerate(self.windows):
                if window.limit:
                    if scan.found[i].size and seen[i] <= window.limit:
                        self.keys[i].append(scan.found[i].copy())
                        self.owners[i].append((tensors, scan.inside[i]))
                elif wanted[i]:
                    self._bin(i, tensors, scan.inside[i], scan.found[i])
        return self

    def _bin(self, i: int, tensors: Sequence[int], counts: np.ndarray, keys: np.ndarray) -> None:
        offsets = (keys - self.windows[i].lo) >> self.windows[i].shift
        bins, stop = self.bins[i], 0
        if self.windows[i].hi >= self.top:  # of NaN, which lies beyond the last bin, nothing is asked
            np.minimum(offsets, bins.shape[1] - 1, out=offsets)
        for tensor, count in zip(tensors, counts, strict=True):
            start, stop = stop, stop + count
            if count:
                bins[tensor] += np.bincount(offsets[start:stop], minlength=bins.shape[1])

    def merge(self, other: Tally) -> None:
        for name in ("above", "inside", "zeros", "bad"):
            getattr(self, name)[...] += getattr(other, name)
        for i, bins in enumerate(self.bins):
            self.keys[i] += other.keys[i]
            self.owners[i] += other.owners[i]
            if bins is not None:
                bins += other.bins[i]


def count_windows(source: KeySource | KeyCounter, windows: Sequence[Window], *, first: bool) -> Tally:
    """Sweep over the source once, with its threads; ``first``: look for zeros and NaN, too."""
    if isinstance(source, KeyCounter):
        return source.count(windows, first=first)
    top, tensors = INF_KEYS[source.dtype] + 1, len(source.numels)
    large = sum(source.numels) >= THREADED
    if large:
        scanning.request()
    workers = torch.get_num_threads() if large else 1
    streams = source.streams(workers, len(windows))
    tallies, seen = [Tally(windows, tensors, top) for _ in streams], np.zeros(len(windows), np.int64)
    if len(streams) > 1:
        with ThreadPoolExecutor(len(streams)) as pool:
            list(pool.map(Tally.read, tallies, streams, [first] * len(streams), [seen] * len(streams)))
    else:
        for tally, stream in zip(tallies, streams, strict=True):
            tally.read(stream, first, seen)
    tally = tallies[0]
    for other in tallies[1:]:
        tally.merge(other)
    return tally


class _Search:
    """The windows still open, and the cuts found."""

    def __init__(self, source: KeySource | KeyCounter, num_keep: Sequence[int]) -> None:
        self.source, self.num_keep = source, list(num_keep)
        self.counts = isinstance(source, KeyCounter)
        self.total = sum(source.numels)
        self.top = INF_KEYS[source.dtype] + 1  # one above infinity: NaN begins here
        self.tensors = len(source.numels)
        # Collected keys and the joined copy of them stay near 3 % of 32-bit weights, and bounded for any model.
        self.capacity = SAMPLE_MIN + min(self.total // 64, COLLECT_MAX)
        shape = (self.tensors, len(self.num_keep))
        self.key, self.ties = [self.top] * shape[1], [0] * shape[1]
        self.above, self.tied = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.zeros: np.ndarray | None = None
        self.bad = np.zeros(self.tensors, bool)
        # Per rank, how wide the last window was that counts had proved to hold it, and whether it was collected.
        self.proved: list[tuple[float, bool]] = [(np.inf, True)] * shape[1]
        self.windows = self._guess()

    def done(self) -> bool:
        return self.zeros is not None and not self.windows

    def found(self) -> Found:
        return Found(self.key, self.ties, self.above, self.tied, self.zeros, self.bad)

    def _guess(self) -> list[Window]:
        ranks = [q for q, keep in enumerate(self.num_keep) if keep > 0]
        if not ranks:
            return []
        # Ranking a larger sample would take longer than a narrower window saves.
        lines = self.source.sample(min(max(SAMPLE_MIN, self.total // 256), SAMPLE_MAX))
        spans = sample_spans(lines, [self.num_keep[q] / self.total for q in ranks], lines.size >= self.total)
        # NaN in the sample must not open a window above infinity.
        spans = [
            (min(lo, self.top - 1), min(hi, self.top), share, (q,))
            for (lo, hi, share), q in zip(spans, ranks, strict=True)
        ]
        # Overlapping windows become one, so that no key is collected twice.
        merged: list[tuple[int, int, float, tuple[int, ...]]] = []
        for lo, hi, share, mine in sorted(spans):
            if merged and lo < merged[-1][1]:
                lo0, hi0, share0, others = merged[-1]
                merged[-1] = (lo0, max(hi0, hi), share0 + share, others + mine)
            else:
                merged.append((lo, hi, share, mine))
        return [self._window(lo, hi, ranks, share * self.total) for lo, hi, share, ranks in merged]

    def _window(self, lo: int, hi: int, ranks: tuple[int, ...], expected: float) -> Window:
        limit = self.capacity * len(ranks)
        bins = max(2, min(BINS, COUNTERS // self.tensors))
        # Few different keys, as of 16-bit weights, are counted one by one: there may be many of each.
        if not self.counts and expected <= limit and hi - lo > min(bins, NARROW):
            return Window(lo, hi, ranks, limit=limit)
        return histogram(lo, hi, ranks, bins, self.top if self.counts else 0)

    def sweep(self) -> None:
        first = self.zeros is None
        tally = count_windows(self.source, self.windows, first=first)
        if first:
            self.zeros, self.bad = tally.zeros, tally.bad
        windows, self.windows = self.windows, []
        if not self.bad.any():
            for i, window in enumerate(windows):
                self._resolve(window, i, tally)
            self._check_narrower()

    def _check_narrower(self) -> None:
        """Raise RuntimeError where the search would not come to an end: counts of two sweeps that don't agree."""
        for window in self.windows:
            size = (window.hi - window.lo, window.limit > 0)
            if window.hi <= window.lo or any(size >= self.proved[q] for q in window.ranks):
                raise RuntimeError("the counts of two sweeps contradict each other: did the weights change meanwhile?")
            for q in window.ranks:
                self.proved[q] = size

    def _resolve(self, window: Window, i: int, tally: Tally) -> None:
        above, inside = int(tally.above[i].sum()), int(tally.inside[i].sum())
        missed_up = tuple(q for q in window.ranks if self.num_keep[q] <= above)
        missed_down = tuple(q for q in window.ranks if self.num_keep[q] > above + inside)
        if missed_up:
            self.windows.append(self._window(window.hi, self.top, missed_up, above))
        if missed_down:
            self.windows.append(self._window(0, window.lo, missed_down, self.total - above - inside))
        ranks = [q for q in window.ranks if above < self.num_keep[q] <= above + inside]
        if not ranks:
            return
        if not window.limit:
            self._from_bins(window, ranks, tally.above[i], tally.inside[i], tally.bins[i])
        elif sum(map(len, tally.keys[i])) == inside:
            self._from_keys(ranks, tally, i)
        else:  # overflowed: histogram
            self.windows.append(self._window(window.lo, window.hi, tuple(ranks), np.inf))

    def _from_keys(self, ranks: list[int], tally: Tally, i: int) -> None:
        keys = np.concatenate(tally.keys[i])
        tally.keys[i].clear()
        owners = np.concatenate([tensors for tensors, _ in tally.owners[i]])
        counts = np.concatenate([counts for _, counts in tally.owners[i]])
        starts = np.cumsum(counts) - counts
        # reduceat gives a wrong value for empty segments
        owners, starts = owners[counts > 0], starts[counts > 0]
        above = tally.above[i]
        places = [keys.size - (self.num_keep[q] - int(above.sum())) for q in ranks]
        cuts = at_places(keys, places)
        for q, cut in zip(ranks, cuts, strict=True):
            greater, equal = above.copy(), np.zeros_like(above)
            np.add.at(greater, owners, np.add.reduceat(keys > cut, starts, dtype=np.int64))
            np.add.at(equal, owners, np.add.reduceat(keys == cut, starts, dtype=np.int64))
            self._settle(q, int(cut), greater, equal)

    def _from_bins(
        self, window: Window, ranks: list[int], above: np.ndarray, inside: np.ndarray, bins: np.ndarray
    ) -> None:
        if window.bins == 1:
            bins[:, 0] = inside
        totals = bins.sum(axis=0)
        at_least = above.sum() + np.cumsum(totals[::-1])[::-1]  # keys in bin b or above
        narrower: dict[int, list[int]] = {}
        for q in ranks:
            b = int(np.flatnonzero(at_least >= self.num_keep[q])[-1])
            if window.shift:
                narrower.setdefault(b, []).append(q)
            else:
                self._settle(q, window.lo + b, above + bins[:, b + 1 :].sum(axis=1), bins[:, b])
        for b, mine in narrower.items():
            lo = window.lo + (b << window.shift)
            hi = min(lo + (1 << window.shift), window.hi)
            self.windows.append(self._window(lo, hi, tuple(mine), int(totals[b])))

    def _settle(self, q: int, key: int, above: np.ndarray, tied: np.ndarray) -> None:
        self.key[q] = key
        self.ties[q] = self.num_keep[q] - int(above.sum())
        self.above[:, q], self.tied[:, q] = above, tied


def sample_variance(lines: np.ndarray, key: int) -> float:
    """Return the variance of the number of sampled keys that reach a key, from the lines themselves."""
    per_line = np.count_nonzero(lines >= key, axis=1)
    # Neighbours differ by chance only, also where whole layers differ in scale.
    return len(lines) * float(np.square(np.diff(per_line)).sum()) / (2 * max(len(lines) - 1, 1))


def sample_spans(lines: np.ndarray, shares: Sequence[float], whole: bool) -> list[tuple[int, int, float]]:
    """Return, for each share of keys kept, the window [lo, hi) around its cut and the share of keys inside.

    The spread of the sampled count is taken from the lines themselves, as keys of one line may be alike.
    """
    size = lines.size
    places = [size - min(max(round(share * size), 1), size) for share in shares]
    margins = [0] * len(places)
    if not whole:
        spreads = [np.sqrt(sample_variance(lines, key)) for key in at_places(lines, places)]
        margins = [int(MARGIN * spread + 3 * MARGIN) for spread in spreads]
    ends = [(place - margin, place + margin) for place, margin in zip(places, margins, strict=True)]
    within = sorted({place for pair in ends for place in pair if 0 <= place < size})
    keys = dict(zip(within, at_places(lines, within).tolist(), strict=True))
    bounds = []
    for low, high in ends:
        lo = keys.get(low, 0)
        # Beyond the sample's largest key everything is open; the engine cuts this off above infinity.
        last = keys.get(high, np.iinfo(lines.dtype).max)
        inside = np.count_nonzero(lines >= lo) - np.count_nonzero(lines > last)
        bounds.append((lo, last + (high < size), inside / size))
    return bounds


def at_places(keys: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Return ``np.sort(keys, axis=None)[places]``: one histogram, then only the bins at these places are ranked."""
    keys = keys.reshape(-1)
    offsets = keys - keys.min()
    offsets >>= max(0, int(offsets.max()).bit_length() - 12)
    ends = np.cumsum(np.bincount(offsets))
    bins = np.searchsorted(ends, places, side="right").tolist()
    ranked = {b: np.sort(keys[offsets == b]) for b in set(bins)}
    return np.array([ranked[b][place - ends[b]] for b, place in zip(bins, places, strict=True)], keys.dtype)
