"""Windows: ranges of keys that hold a cut; how they are opened, counted in and narrowed. See ``count``.

A weight's key is its bit pattern with the sign cleared, an integer ordered like its magnitude. One pass over the
weights counts the keys above the window exactly, and those inside in bins. Where a bin is one key wide, the cut is
found; else the bin that holds the wanted rank becomes the next window, and where the rank lies outside, what lies
there does. A sample (or the last call) says where the first window should be, so that usually one pass settles
everything; the passes behind it then return at once. Nothing waits for the host, and counts are integers: no order of
execution shows in the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import AUX_WIDTH, INTERPRETED, ROW_ADDRESS, ROW_LENGTH, is_last, keys_at
from .launch import INF_KEYS, OPTIONS, TRITON_DTYPES, Variant, launch
from .scores import MAGNITUDE, KeyFormula

# Bins that one program adds up.
PART = 4096

# What is known of one cut, int64 each: the window's first key, its number of bins (0: settled), the binary logarithm
# of a bin's width, the number of keys to keep, the keys counted above the window, the smallest key kept, how many
# of the keys equal to it stay, and the width of the first window.
STATE_LO, STATE_BINS, STATE_SHIFT, STATE_KEEP, STATE_ABOVE, STATE_KEY, STATE_TIES, STATE_WIDTH = range(8)
STATE_COLUMNS = 8
_LO, _BINS, _SHIFT, _KEEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_ABOVE, _KEY, _TIES, _WIDTH = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_COLUMNS = tl.constexpr(STATE_COLUMNS)

# Extra columns of a select table: the number of elements of all earlier tensors of the table, the number of chunks of
# all earlier tensors of the list, and what a score needs.
ROW_BEFORE = tl.constexpr(4)
ROW_ORDER = tl.constexpr(5)
ROW_AUX = tl.constexpr(6)
SELECT_WIDTH = 6 + AUX_WIDTH
_SELECT_WIDTH = tl.constexpr(SELECT_WIDTH)

# Lines of this many bytes are sampled whole: a smaller read costs as much.
LINE_BYTES = 128
SAMPLE_LINES = 32  # per program
_SAMPLE_LINES = tl.constexpr(SAMPLE_LINES)
# The window reaches this many standard deviations of the sample's count to both sides. Neighbouring weights are
# alike to a degree; the square of this allows for a count that varies twice as much as of independent ones.
_MARGIN = tl.constexpr(5.7)


class Counting(NamedTuple):
    """How a target counts keys inside a window.

    Attributes:
        inline: by predicated reductions in global memory, as inline assembly of NVIDIA GPUs: half the instructions
            of ``tl.atomic_add``, which takes the values through shared memory to another layout.
        histogram: 16-bit keys by ``tl.histogram``. Before Triton 3.8 that is a loop of ballots.
    """

    inline: bool
    histogram: bool


_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def counting(backend: str | None = None) -> Counting:
    """Return how keys are counted on a backend: "cuda", "hip" or "interpreter"; default the one that launches use."""
    if backend is None:
        backend = "interpreter" if INTERPRETED.value else "hip" if torch.version.hip else "cuda"
    return Counting(inline=backend == "cuda", histogram=backend != "cuda" or _VERSION >= (3, 8))


@triton.jit
def inside(bins, num_bins):
    """Tell where 0 <= bins < num_bins, by one comparison."""
    return bins.to(tl.uint32, bitcast=True) < num_bins.to(tl.uint32, bitcast=True)


@triton.jit
def count_in(hist_ptr, bins, num_bins, INLINE: tl.constexpr, WIDE: tl.constexpr):
    """Add 1 to ``hist[bins]`` where ``0 <= bins < num_bins``."""
    if not INLINE:
        tl.atomic_add(hist_ptr + bins, 1, mask=inside(bins, num_bins), sem="relaxed")
    elif WIDE:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred p;
                .reg .b64 a;
                setp.lt.u32 p, $1, $2;
                mad.wide.u32 a, $1, 8, $3;
                @p red.relaxed.gpu.global.add.u64 [a], $4;
                mov.u32 $0, 0;
            }
            """,
            "=r,r,r,l,l",
            [bins, num_bins, hist_ptr.to(tl.int64), tl.full((), 1, tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred p;
                .reg .b64 a;
                setp.lt.u32 p, $1, $2;
                mad.wide.u32 a, $1, 4, $3;
                @p red.relaxed.gpu.global.add.u32 [a], 1;
                mov.u32 $0, 0;
            }
            """,
            "=r,r,r,l",
            [bins, num_bins, hist_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def bins_of(key, lo, shift, num_bins, KEY_BITS: tl.constexpr):
    """Return each key's bin in a window, int32: negative below it, at least ``num_bins`` above."""
    bins = (key - lo) >> shift
    if KEY_BITS == 64:  # far from the window the number of a bin doesn't fit
        bins = tl.where(bins < 0, -1, tl.minimum(bins, num_bins)).to(tl.int32)
    return bins


@triton.jit
def window_of(state_ptr, KEY_BITS: tl.constexpr):
    """Return a window's first key, its number of bins, and the binary logarithm of their width."""
    lo = tl.load(state_ptr + _LO)
    if KEY_BITS != 64:
        lo = lo.to(tl.int32)
    return lo, tl.load(state_ptr + _BINS).to(tl.int32), tl.load(state_ptr + _SHIFT).to(tl.int32)


@triton.jit
def _open(state_ptr, lo, width, max_bins):
    """Make the keys from ``lo`` the window, ``width`` of them or up to the end of the last bin."""
    width = tl.maximum(width, 1)  # of NaN, for which a range is empty, nothing is asked
    shift = tl.zeros((), tl.int64)
    for bits in range(63):
        shift += ((width - 1) >> bits >= max_bins).to(tl.int64)
    tl.store(state_ptr + _LO, lo)
    tl.store(state_ptr + _BINS, ((width - 1) >> shift) + 1)
    tl.store(state_ptr + _SHIFT, shift)


@triton.jit
def open_last(state_ptr, warm_ptr, max_bins, TOP: tl.constexpr):
    """Make a window around the cut that was found last, as wide as the window that held it."""
    width = tl.minimum(tl.load(warm_ptr + 1), max_bins)
    lo = tl.maximum(tl.load(warm_ptr) - 1 - width // 2, 0)
    _open(state_ptr, lo, tl.minimum(width, TOP - lo), max_bins)
    tl.store(state_ptr + _WIDTH, width)


@triton.jit
def _from_top(counts):
    """Return how many keys lie in each bin or above it."""
    return tl.sum(counts) - tl.cumsum(counts, axis=0) + counts


@triton.jit
def _find(hist_ptr, sums, rank, PARTS: tl.constexpr, PART: tl.constexpr):
    """Return the bin of the key of this rank from the top, and how many keys lie in bins above it."""
    parts = tl.arange(0, PARTS)
    part = tl.max(tl.where(_from_top(sums) >= rank, parts, 0))
    above = tl.sum(tl.where(parts > part, sums, 0))
    bins = tl.arange(0, PART)
    counts = tl.load(hist_ptr + part * PART + bins, cache_modifier=".cg").to(tl.int64)
    found = tl.max(tl.where(above + _from_top(counts) >= rank, bins, 0))
    return part * PART + found, above + tl.sum(tl.where(bins > found, counts, 0))


@triton.jit
def narrow_window(
    state_ptr, hist_ptr, sums, warm_ptr, max_bins, TOP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Settle a cut from what was counted in its window, or open the next one; tell whether it is settled."""
    lo = tl.load(state_ptr + _LO)
    num_bins = tl.load(state_ptr + _BINS)
    shift = tl.load(state_ptr + _SHIFT)
    keep = tl.load(state_ptr + _KEEP)
    above = tl.load(state_ptr + _ABOVE, cache_modifier=".cg")
    width = tl.load(state_ptr + _WIDTH)
    tl.debug_barrier()  # all threads have read before one of them writes
    inside = tl.sum(sums)
    settled = tl.zeros((), tl.int32)
    if keep <= above:
        start = lo + (num_bins << shift)
        _open(state_ptr, start, TOP - start, max_bins)
        tl.store(state_ptr + _WIDTH, 2 * width)
    elif keep > above + inside:
        _open(state_ptr, tl.zeros((), tl.int64), lo, max_bins)
        tl.store(state_ptr + _WIDTH, 2 * width)
    else:
        found, higher = _find(hist_ptr, sums, keep - above, PARTS, PART)
        key = lo + (found.to(tl.int64) << shift)
        if shift > 0:
            _open(state_ptr, key, tl.full((), 1, tl.int64) << shift, max_bins)
        else:
            settled = tl.full((), 1, tl.int32)
            tl.store(state_ptr + _BINS, 0)
            tl.store(state_ptr + _KEY, key)
            tl.store(state_ptr + _TIES, keep - above - higher)
            # The next call's first window: 0 stands for "no last call".
            tl.store(warm_ptr, key + 1)
            tl.store(warm_ptr + 1, width)
    tl.store(state_ptr + _ABOVE, 0)
    return settled


@triton.jit(do_not_specialize=["max_bins"])
def _resolve_kernel(
    state_ptr,
    hist_ptr,
    sums_ptr,
    counters_ptr,
    warm_ptr,
    max_bins,
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """One program per PART bins adds them up; the last one of each open window settles or narrows it."""
    pid = tl.program_id(0)
    cut = (pid // PARTS).to(tl.int64)
    state_ptr += cut * _COLUMNS
    hist_ptr += cut * max_bins
    sums_ptr += cut * PARTS
    if tl.load(state_ptr + _BINS) > 0:
        bins = tl.arange(0, PART)
        counts = tl.load(hist_ptr + (pid % PARTS) * PART + bins)
        tl.store(sums_ptr + pid % PARTS, tl.sum(counts.to(tl.int64)))
        if is_last(counters_ptr + cut, PARTS):
            sums = tl.load(sums_ptr + tl.arange(0, PARTS), cache_modifier=".cg")
            settled = narrow_window(state_ptr, hist_ptr, sums, warm_ptr + 2 * cut, max_bins, TOP, PARTS, PART)
            if settled == 0:
                for part in range(PARTS):
                    tl.store(hist_ptr + part * PART + bins, tl.zeros_like(counts))


@triton.jit(do_not_specialize=["num_rows", "numel", "num_lines"])
def _sample_kernel(
    rows_ptr,
    sample_ptr,
    warm_ptr,
    num_rows,
    numel,
    num_lines,
    DTYPE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    LINE: tl.constexpr,
):
    """One program per few lines counts their keys in ``sample``; none where the last call's cut is known."""
    if tl.load(warm_ptr) == 0:
        line = tl.program_id(0).to(tl.int64) * _SAMPLE_LINES + tl.arange(0, _SAMPLE_LINES)
        mask = line < num_lines
        # One line out of each of so many equal stretches of the table, at a place that jumps about in it, so that
        # no period of the layout falls in step.
        stretch = tl.maximum(numel.to(tl.int64) // num_lines, 1)
        place = line * numel // num_lines + ((line * 2654435769) & 0xFFFFFFFF) % stretch
        place = tl.where(mask, place, 0)
        first, end = tl.zeros_like(line), tl.zeros_like(line) + num_rows
        while tl.max(end - first) > 1:
            middle = (first + end) // 2
            later = tl.load(rows_ptr + middle * _SELECT_WIDTH + ROW_BEFORE) <= place
            first = tl.where(later, middle, first)
            end = tl.where(later, end, middle)
        row_ptr = rows_ptr + first * _SELECT_WIDTH
        length = tl.load(row_ptr + ROW_LENGTH)
        start = (place - tl.load(row_ptr + ROW_BEFORE)) // LINE * LINE
        start = tl.minimum(start, tl.maximum(length - LINE, 0))
        # A tensor shorter than a line repeats itself: so it counts for as much as it is.
        within = tl.arange(0, LINE)[None, :] % tl.minimum(length, LINE).to(tl.int32)[:, None]
        ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
        offs = start[:, None] + within
        address = tl.load(row_ptr + ROW_ADDRESS)[:, None] + offs * ITEM
        everywhere = tl.broadcast_to(mask[:, None], (_SAMPLE_LINES, LINE))
        x = tl.load(address.to(tl.pointer_type(DTYPE)), mask=everywhere, other=0.0)
        aux_ptr = (row_ptr + ROW_AUX)[:, None]
        key = keys_at(x, aux_ptr, 0, offs, offs, everywhere, KEY_BITS, SCORE, KIND, AUX_DTYPE, False)
        tl.atomic_add(sample_ptr + (key >> SHIFT), 1, mask=everywhere, sem="relaxed")


@triton.jit(do_not_specialize=["numel", "max_bins"])
def _window_kernel(
    state_ptr,
    sample_ptr,
    sums_ptr,
    counters_ptr,
    warm_ptr,
    numel,
    max_bins,
    TOP: tl.constexpr,
    SHIFT: tl.constexpr,
    LINE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """One program per PART of a cut's ``sample`` adds it up; the last one opens the cut's first window."""
    pid = tl.program_id(0)
    cut = (pid // PARTS).to(tl.int64)
    state_ptr += cut * _COLUMNS
    warm_ptr += 2 * cut
    sums_ptr += cut * PARTS
    keep = tl.load(state_ptr + _KEEP)
    last = tl.load(warm_ptr)
    if keep > 0:
        if last > 0:
            if pid % PARTS == 0:
                open_last(state_ptr, warm_ptr, max_bins, TOP)
        else:
            counts = tl.load(sample_ptr + (pid % PARTS) * PART + tl.arange(0, PART))
            tl.store(sums_ptr + pid % PARTS, tl.sum(counts.to(tl.int64)))
            if is_last(counters_ptr + cut, PARTS):
                sums = tl.load(sums_ptr + tl.arange(0, PARTS), cache_modifier=".cg")
                sampled = tl.sum(sums).to(tl.float64)
                share = keep.to(tl.float64) / numel.to(tl.float64)
                margin = _MARGIN * tl.sqrt(sampled * share * (1.0 - share)) + LINE
                upper = (share * sampled - margin).to(tl.int64)
                lower = (share * sampled + margin).to(tl.int64) + 1
                high, _ = _find(sample_ptr, sums, tl.maximum(upper, 1), PARTS, PART)
                low, _ = _find(sample_ptr, sums, lower, PARTS, PART)
                one = tl.full((), 1, tl.int64)
                lo = tl.where(lower.to(tl.float64) > sampled, 0, low * (one << SHIFT))
                hi = tl.where(upper < 1, TOP, tl.minimum((high + one) * (one << SHIFT), TOP))
                lo = tl.minimum(lo, TOP - 1)
                _open(state_ptr, lo, hi - lo, max_bins)
                tl.store(state_ptr + _WIDTH, tl.minimum(hi - lo, max_bins))


def top_of(key_dtype: torch.dtype) -> int:
    """Return the end of the range of keys: one above infinity's."""
    return INF_KEYS[key_dtype] + 1


def sample_shift(key_dtype: torch.dtype) -> int:
    """Return the binary logarithm of the width of a sample's bins: 2^15 or 2^17 of them hold all keys."""
    return {2: 0, 4: 14, 8: 46}[key_dtype.itemsize]


def sample_bins(key_dtype: torch.dtype) -> int:
    """Return the number of bins of a sample."""
    return 1 << (8 * key_dtype.itemsize - 1 - sample_shift(key_dtype))


def line_of(dtype: torch.dtype) -> int:
    """Return how many elements a line holds."""
    return LINE_BYTES // dtype.itemsize


def launch_sample(
    rows: Tensor,
    sample: Tensor,
    warm: Tensor,
    *,
    numel: int,
    num_lines: int,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Add the keys of so many lines of a select table to sample (int32); nothing where warm[0] (int64) is set."""
    args = rows, sample, warm, rows.shape[0], numel, num_lines
    constants = {
        "DTYPE": TRITON_DTYPES[dtype],
        "KEY_BITS": 8 * key_dtype.itemsize,
        **score.constants(),
        "SHIFT": sample_shift(key_dtype),
        "LINE": line_of(dtype),
    }
    launch(_sample_kernel, triton.cdiv(num_lines, SAMPLE_LINES), args, constants, {"num_warps": 4, **OPTIONS})


def launch_window(
    state: Tensor,
    sample: Tensor,
    sums: Tensor,
    counters: Tensor,
    warm: Tensor,
    *,
    numel: int,
    max_bins: int,
    line: int,
    key_dtype: torch.dtype,
) -> None:
    """Open the first windows, state (int64 [Q, STATE_COLUMNS]): around warm's cuts where set, else from the sample."""
    part = min(PART, sample.numel())
    args = state, sample, sums, counters, warm, numel, max_bins
    constants = {
        "TOP": top_of(key_dtype),
        "SHIFT": sample_shift(key_dtype),
        "LINE": line,
        "PARTS": sample.numel() // part,
        "PART": part,
    }
    programs = state.shape[0] * constants["PARTS"]
    launch(_window_kernel, programs, args, constants, {"num_warps": 4, **OPTIONS})


def launch_resolve(
    state: Tensor, hist: Tensor, sums: Tensor, counters: Tensor, warm: Tensor, *, key_dtype: torch.dtype
) -> None:
    """Settle cuts or open their next windows; hist is zero again where a window is open."""
    part = min(PART, hist.shape[1])
    args = state, hist, sums, counters, warm, hist.shape[1]
    constants = {"TOP": top_of(key_dtype), "PARTS": hist.shape[1] // part, "PART": part}
    programs = hist.shape[0] * constants["PARTS"]
    launch(_resolve_kernel, programs, args, constants, {"num_warps": 4, **OPTIONS})


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    scratch = {"counters_ptr": "*i32", "warm_ptr": "*i64"}
    resolve = {"state_ptr": "*i64", "sums_ptr": "*i64", **scratch, "max_bins": "i32"}
    window = {**resolve, "sample_ptr": "*i32", "numel": "i64"}
    sample = {"rows_ptr": "*i64", "sample_ptr": "*i32", "warm_ptr": "*i64"}
    sample |= {"num_rows": "i32", "numel": "i64", "num_lines": "i32"}
    listed = []
    for counts, bits in (("*i32", 8), ("*i32", 18), ("*i32", 19), ("*i64", 19)):
        part = min(PART, 1 << bits)
        constants = {"TOP": top_of(torch.float32), "PARTS": (1 << bits) // part, "PART": part}
        label = f"2^{bits} bins of {'64' if counts == '*i64' else '32'} bits"
        signature = {**resolve, "hist_ptr": counts}
        listed.append(Variant(_resolve_kernel, label, signature, constants, 4, streams=0, essential=bits == 19))
    for dtype in TRITON_DTYPES:
        label = str(dtype).removeprefix("torch.")
        bins = sample_bins(dtype)
        constants = {"TOP": top_of(dtype), "SHIFT": sample_shift(dtype), "LINE": line_of(dtype)}
        constants |= {"PARTS": bins // PART, "PART": PART}
        listed.append(Variant(_window_kernel, label, window, constants, 4, streams=0))
        constants = {"DTYPE": TRITON_DTYPES[dtype], "KEY_BITS": 8 * dtype.itemsize, **MAGNITUDE.constants()}
        constants |= {"SHIFT": sample_shift(dtype), "LINE": line_of(dtype)}
        listed.append(Variant(_sample_kernel, label, sample, constants, 4, streams=0))
    return listed
