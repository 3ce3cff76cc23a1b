"""The threshold of weights that a step writes: their keys are counted before they leave the registers. See ``window``.

The windows lie around the last cuts. Nothing is read for it; a weight inside a window costs one count in the
second-level cache. Where a cut has left its window, passes over the weights find it as they always do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import magnitude_key
from .launch import INF_KEYS, OPTIONS, Variant, launch
from .window import (
    PART,
    STATE_ABOVE,
    STATE_COLUMNS,
    STATE_KEEP,
    bins_of,
    count_in,
    open_last,
    top_of,
    window_of,
)

_ABOVE, _KEEP, _COLUMNS = tl.constexpr(STATE_ABOVE), tl.constexpr(STATE_KEEP), tl.constexpr(STATE_COLUMNS)

# A lane sees 32 weights of a chunk: its counts for so many cuts share one integer, with a bit for NaN above them.
MAX_CUTS = 5
_BITS, _FIELD, _NAN = tl.constexpr(6), tl.constexpr((1 << 6) - 1), tl.constexpr(1 << 30)


@triton.jit
def open_tracked(LANES: tl.constexpr):
    """Return what a chunk's lanes have seen before its first block: nothing above the windows, no NaN."""
    return tl.zeros((LANES,), tl.int32)


@triton.jit
def add_tracked(
    x,
    offs,
    count,
    seen,
    tracked,
    KEY_BITS: tl.constexpr,
    INF: tl.constexpr,
    INLINE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Count one block of stored weights inside the windows; return what the lanes have seen."""
    state_ptr, hist_ptr, max_bins, num_cuts = tracked
    WIDE: tl.constexpr = hist_ptr.dtype.element_ty == tl.int64
    key = magnitude_key(x, KEY_BITS)
    if MASKED:
        key = tl.where(offs < count, key, 0)
    seen |= tl.where(key > INF, _NAN, 0)
    for q in range(num_cuts):
        lo, num_bins, shift = window_of(state_ptr + q * _COLUMNS, KEY_BITS)
        bins = bins_of(key, lo, shift, num_bins, KEY_BITS)
        if MASKED:
            bins = tl.where(offs < count, bins, -1)
        seen += (bins >= num_bins).to(tl.int32) << (_BITS * q)
        count_in(hist_ptr + q * max_bins, bins, num_bins, INLINE, WIDE)
    return seen


@triton.jit
def close_tracked(seen, tracked, bad_ptr):
    """Add a chunk's counts above the windows, and mark NaN in ``bad``."""
    state_ptr, _, _, num_cuts = tracked
    for q in range(num_cuts):
        above = tl.sum((seen >> (_BITS * q)) & _FIELD)
        tl.atomic_add(state_ptr + q * _COLUMNS + _ABOVE, above.to(tl.int64), sem="relaxed")
    tl.store(bad_ptr, 1, mask=(num_cuts > 0) & (tl.max(seen) >= _NAN))


@triton.jit(do_not_specialize=["max_bins"])
def _rearm_kernel(
    state_ptr,
    hist_ptr,
    bad_ptr,
    warm_ptr,
    max_bins,
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """One program per PART bins empties them; the first of each cut opens its window around the last cut."""
    pid = tl.program_id(0)
    cut = (pid // PARTS).to(tl.int64)
    part = pid % PARTS
    tl.store(hist_ptr + cut * max_bins + part * PART + tl.arange(0, PART), tl.zeros((PART,), hist_ptr.dtype.element_ty))
    if part == 0:
        state_ptr += cut * _COLUMNS
        warm_ptr += 2 * cut
        tl.store(bad_ptr, 0)
        tl.store(state_ptr + _ABOVE, 0)
        if tl.load(state_ptr + _KEEP) > 0:
            open_last(state_ptr, warm_ptr, max_bins, TOP)


def launch_rearm(state: Tensor, hist: Tensor, bad: Tensor, warm: Tensor, *, key_dtype: torch.dtype) -> None:
    """Make ready to count the next step's weights: hist (int32 or int64 [Q, bins]) and bad (uint8 [1]) are zero."""
    part = min(PART, hist.shape[1])
    parts = hist.shape[1] // part
    constants = {"TOP": top_of(key_dtype), "PARTS": parts, "PART": part}
    args = state, hist, bad, warm, hist.shape[1]
    launch(_rearm_kernel, hist.shape[0] * parts, args, constants, {"num_warps": 4, **OPTIONS})


def first_width(key_dtype: torch.dtype) -> int:
    """Return the width of a window around a cut that nothing is known of yet: a sixteenth of a binade.

    A step moves a threshold by less; and few enough weights lie inside.
    """
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}[key_dtype]
    return 1 << (bits - 4)


def variants() -> list[Variant]:
    """Return the forms of this module's kernel that the code generation check compiles."""
    signature = {"state_ptr": "*i64", "bad_ptr": "*u8", "warm_ptr": "*i64", "max_bins": "i32"}
    listed = []
    for key_dtype, counts, bins in (
        (torch.bfloat16, "*i32", 256),
        (torch.float32, "*i32", 1 << 18),
        (torch.float64, "*i64", 1 << 19),
    ):
        part = min(PART, bins)
        constants = {"TOP": INF_KEYS[key_dtype] + 1, "PARTS": bins // part, "PART": part}
        label = f"{key_dtype} {bins} bins".removeprefix("torch.")
        signature["hist_ptr"] = counts
        essential = bins == 256
        listed.append(Variant(_rearm_kernel, label, dict(signature), constants, 4, streams=0, essential=essential))
    return listed
