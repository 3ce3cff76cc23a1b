"""What one block of keys holds: counts per tensor, and the keys inside of windows. In numpy, or compiled.

``scan.c`` does the same in one pass: several times faster, most of all for several windows. It is compiled in a second,
in the background, when a large list is searched first; without a compiler, numpy does everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wcr_fast import native

SOURCE = Path(__file__).with_name("scan.c")

_asked = False
_library: ctypes.CDLL | None = None
_failure: str | None = None


class KeyBlock(NamedTuple):
    """Keys of one or more whole or partial tensors, one after the other.

    Attributes:
        tensors: index of the tensor of each segment; no index twice, as counts are added by index.
        starts: where each segment begins in ``keys`` (the first at 0); segments are never empty.
        keys: 1-d integer array (int16, int32 or int64). The engine only reads it, and only until the next block.
        signed: the keys are bit patterns, their sign still to be cleared.
    """

    tensors: Sequence[int]
    starts: Sequence[int]
    keys: np.ndarray
    signed: bool = False


class Scan(NamedTuple):
    """What W windows found in a block of S segments.

    Attributes:
        above: int64 [W, S], keys above each window.
        inside: int64 [W, S], keys inside.
        zeros: int64 [S].
        bad: bool [S], the segment holds NaN.
        found: per window the keys inside, segment by segment; empty where they weren't wanted.
    """

    above: np.ndarray
    inside: np.ndarray
    zeros: np.ndarray
    bad: np.ndarray
    found: list[np.ndarray]


class Scanner:
    """Scans blocks for windows, given by the first key of each and the first above it.

    Args:
        lo, hi: the windows' bounds.
        wanted: whether each window's keys are to be returned.
        top: the first key of NaN.
        ends: look for zeros and NaN, too.
    """

    def __init__(
        self, lo: Sequence[int], hi: Sequence[int], wanted: Sequence[bool], top: int, *, ends: bool = True
    ) -> None:
        self.lo, self.hi, self.wanted, self.top, self.ends = lo, hi, wanted, top, ends
        self._rising = all(before <= after for before, after in zip(hi, lo[1:], strict=False))
        self._keys, self._flags = np.empty(0, np.int8), np.empty((2, 0), bool)
        self._out = np.empty((len(lo) + 1, 0), np.int8)

    def scan(self, block: KeyBlock) -> Scan:
        """Return what is in a block; ``found`` is valid until the next call."""
        if _library is not None and self._rising and block.keys.flags.c_contiguous and block.keys.flags.aligned:
            return self._compiled(block, _library)
        return self._numpy(block)

    def _numpy(self, block: KeyBlock) -> Scan:
        starts, keys = block.starts, block.keys
        if keys.size > self._flags.shape[1]:
            self._flags = np.empty((2, keys.size), bool)
        if block.signed:
            if keys.size > self._keys.size:
                self._keys = np.empty(keys.size, keys.dtype)
            keys = np.bitwise_and(keys, np.iinfo(keys.dtype).max, out=self._keys[: keys.size])
        shape, found = (len(self.lo), len(starts)), []
        counts = Scan(np.zeros(shape, np.int64), np.zeros(shape, np.int64), *self._ends(keys, starts), found)
        inside, above = self._flags[:, : keys.size]
        for w, (lo, hi) in enumerate(zip(self.lo, self.hi, strict=True)):
            np.greater_equal(keys, lo, out=inside)
            if hi < self.top:
                np.greater_equal(keys, hi, out=above)
                counts.above[w] = _per_segment(above, starts)
                np.greater(inside, above, out=inside)  # "and not"; on flags faster than the logical functions
            if self.wanted[w]:
                places = np.flatnonzero(inside)  # with take(), half the time of keys[inside]
                found.append(keys.take(places))
                counts.inside[w] = np.diff(np.searchsorted(places, starts), append=places.size)
            else:
                found.append(keys[:0])
                counts.inside[w] = _per_segment(inside, starts)
        return counts

    def _ends(self, keys: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return zeros and NaN per segment."""
        if not self.ends:
            return np.zeros(len(starts), np.int64), np.zeros(len(starts), bool)
        if len(starts) > 1:
            zeros = np.add.reduceat(np.equal(keys, 0, out=self._flags[0, : keys.size]), starts, dtype=np.int64)
            return zeros, np.maximum.reduceat(keys, starts) >= self.top
        # A minimum is quicker to find than to compare with.
        zeros = np.count_nonzero(np.equal(keys, 0, out=self._flags[0, : keys.size])) if keys.min() == 0 else 0
        return np.array([zeros]), np.array([keys.max() >= self.top])

    def _compiled(self, block: KeyBlock, library: ctypes.CDLL) -> Scan:
        starts, keys, count = block.starts, block.keys, len(self.lo)
        if keys.size > self._out.shape[1] or keys.dtype != self._out.dtype:
            # Memory that is never written to is never taken: a key lies in one window at most.
            self._out = np.empty((count + 1, keys.size), keys.dtype)
            self._bounds = np.stack([self.lo, self.hi], axis=1).astype(keys.dtype)
            self._wanted = np.append(self.wanted, False).astype(np.uint8)
        ends = np.append(starts[1:], keys.size).astype(np.int64)
        counts = np.zeros((len(starts), 2 * count + 2), np.int64)
        out = self._out.ctypes.data + np.arange(count + 1, dtype=np.int64) * self._out.strides[0]
        begin = out.copy()
        function = getattr(library, f"scan{8 * keys.itemsize}")
        limits = np.array([np.iinfo(keys.dtype).max if block.signed else -1, self.top], keys.dtype)
        arrays = (keys, ends, self._bounds, self._wanted, limits, counts, out)
        keys_at, ends_at, *rest = (array.ctypes.data for array in arrays)
        function(keys_at, len(starts), ends_at, count, *rest)
        sizes = (out - begin) // keys.itemsize
        above = counts[:, 1 : 2 * count : 2].T
        return Scan(
            above,
            counts[:, 0 : 2 * count : 2].T - above,
            counts[:, -2],
            counts[:, -1] > 0,
            [self._out[w, :size] for w, size in enumerate(sizes[:-1])],
        )


def _per_segment(flags: np.ndarray, starts: Sequence[int]) -> np.ndarray | int:
    if len(starts) == 1:
        return np.count_nonzero(flags)
    return np.add.reduceat(flags, starts, dtype=np.int64)


def compiled() -> bool:
    """Tell whether the compiled twin is at work."""
    return _library is not None


def request() -> None:
    """Have ``scan.c`` loaded, and compiled where it is not, without waiting for that; once."""
    global _asked
    if not _asked and native.wanted():
        _asked = True
        threading.Thread(target=_try_to_build, name="wcr_fast.scan", daemon=True).start()


def state() -> str:
    """Return in a few words whether it is there, and why not."""
    if not native.wanted():
        return native.state()
    if _library is not None:
        return f"loaded, {_library._name}"
    if _failure is not None:
        return f"failed: {_failure}"
    return "being built" if _asked else "not loaded yet: the first search of a million weights on the CPU asks for it"


def build() -> None:
    """Have ``scan.c`` compiled and loaded; RuntimeError or OSError where that fails."""
    global _library, _failure
    try:
        path = native.cache_path(SOURCE, ".so")
        _library = native.load_or_build(path, _load, os.environ.get("CC", "cc"), ["-O3", str(SOURCE)])
    except (OSError, RuntimeError) as error:
        _failure = str(error)
        raise


def _try_to_build() -> None:
    with contextlib.suppress(OSError, RuntimeError):
        build()


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for bits in (16, 32, 64):
        function: Callable[..., None] = getattr(library, f"scan{bits}")
        function.restype = None
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        function.argtypes = [pointer, size, pointer, size, pointer, pointer, pointer, pointer, pointer]
    return library
