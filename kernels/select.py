"""Exact selection: where a list of tensors is cut so that a given number of weights stays.

A weight's key is its bit pattern with the sign cleared, an integer ordered like its magnitude. A *window* is a range of
keys that holds the cut: one pass over the weights counts the keys above it exactly, and those inside in bins. Where a
bin is one key wide, the cut is found; else the bin that holds the wanted rank becomes the next window, and where the
rank lies outside, what lies there does. A sample (or the last call) says where the first window should be, so that
usually one pass settles everything; the passes behind it then return at once. Nothing waits for the host, and counts
are integers: no order of execution shows in the result.

Keys of 16 bits are counted in 256 bins per chunk (``_codes_kernel``): their counts also say how many keys of each
chunk equal the cut, which breaks ties without another pass. Wider keys are counted in one large histogram in global
memory (``_fine_kernel``), which stays in the second-level cache: 2^19 bins hold a sampled window of float32.

Bytes per weight: the keys once, and per weight inside the window one count; per chunk of 16-bit keys 256 counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    AUX_WIDTH,
    COLUMNS,
    ELEMENTS,
    INTERPRETED,
    LAYER,
    NOTHING,
    ROW_ADDRESS,
    ROW_EXTRA,
    ROW_FIRST_CHUNK,
    ROW_LENGTH,
    ROW_POSITION,
    is_aligned,
    is_last,
    keys_at,
    locate,
    magnitude_key,
)
from .launch import CHUNK, OPTIONS, TRITON_DTYPES, LaunchConfig, Variant, config, launch
from .scores import product, scaled

# The key of infinity; what lies above is NaN. The torch path has its own copy in wcr_fast.torch_path.cuts: kernels
# import nothing from the package, and that path imports nothing that needs Triton.
INF_KEYS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
INF_KEYS[torch.float64] = 0x7FF0000000000000

# Bins of one chunk's histogram of 16-bit keys.
CODES = 256
_CODES = tl.constexpr(CODES)
_ELEMENTS = tl.constexpr(ELEMENTS)
_CHUNK = tl.constexpr(CHUNK)
# Chunks whose histograms one program adds up.
CHUNKS_PER_SUM = 32
_CHUNKS_PER_SUM = tl.constexpr(CHUNKS_PER_SUM)
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
_COL_BEFORE = tl.constexpr(4)
_COL_ORDER = tl.constexpr(5)
_COL_AUX = tl.constexpr(6)
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
def _inside(bins, num_bins):
    """Tell where 0 <= bins < num_bins, by one comparison."""
    return bins.to(tl.uint32, bitcast=True) < num_bins.to(tl.uint32, bitcast=True)


@triton.jit
def _count_in(hist_ptr, bins, num_bins, INLINE: tl.constexpr, WIDE: tl.constexpr):
    """Add 1 to ``hist[bins]`` where ``0 <= bins < num_bins``."""
    if not INLINE:
        tl.atomic_add(hist_ptr + bins, 1, mask=_inside(bins, num_bins), sem="relaxed")
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
def _bins_of(key, lo, shift, num_bins, KEY_BITS: tl.constexpr):
    """Return each key's bin in a window, int32: negative below it, at least ``num_bins`` above."""
    bins = (key - lo) >> shift
    if KEY_BITS == 64:  # far from the window the number of a bin doesn't fit
        bins = tl.where(bins < 0, -1, tl.minimum(bins, num_bins)).to(tl.int32)
    return bins


@triton.jit
def _chunk_keys(
    ptr,
    aux_ptr,
    start,
    i,
    count,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the keys of the i-th block of a chunk and where they count; elsewhere they are not NaN's."""
    offs = i * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        mask = offs < count
        x = tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        mask = tl.full((BLOCK,), True, tl.int1)
        x = tl.load(ptr + offs)
    key = keys_at(x, aux_ptr, start, offs, start + offs, mask, KEY_BITS, SCORE, KIND, AUX_DTYPE, not MASKED)
    if MASKED and SCORE is not None:
        key = tl.where(mask, key, 0)
    return key, mask


@triton.jit
def _window(state_ptr, KEY_BITS: tl.constexpr):
    """Return a window's first key, its number of bins, and the binary logarithm of their width."""
    lo = tl.load(state_ptr + _LO)
    if KEY_BITS != 64:
        lo = lo.to(tl.int32)
    return lo, tl.load(state_ptr + _BINS).to(tl.int32), tl.load(state_ptr + _SHIFT).to(tl.int32)


@triton.jit
def _fine_chunk(
    ptr,
    aux_ptr,
    start,
    count,
    state_ptr,
    hist_ptr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    INLINE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Count one chunk's keys in a window's bins and above it; return its largest key."""
    lo, num_bins, shift = _window(state_ptr, KEY_BITS)
    not_above = tl.zeros((BLOCK,), tl.int32)  # with the sign that a shift gives: two instructions instead of three
    largest = tl.zeros((BLOCK,), tl.int64 if KEY_BITS == 64 else tl.int32)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        key, mask = _chunk_keys(ptr, aux_ptr, start, i, count, KEY_BITS, SCORE, KIND, AUX_DTYPE, BLOCK, MASKED)
        bins = _bins_of(key, lo, shift, num_bins, KEY_BITS)
        if MASKED:
            bins = tl.where(mask, bins, -1)
        not_above += (bins - num_bins) >> 31
        largest = tl.maximum(largest, key)
        _count_in(hist_ptr, bins, num_bins, INLINE, WIDE)
    above = steps * BLOCK + tl.sum(not_above)
    tl.atomic_add(state_ptr + _ABOVE, above.to(tl.int64), sem="relaxed")
    return tl.max(largest).to(tl.int64)


@triton.jit(do_not_specialize=["num_queries", "max_bins"])
def _fine_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    state_ptr,
    hist_ptr,
    bad_ptr,
    num_queries,
    max_bins,
    DTYPE: tl.constexpr,
    INF: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    FIRST: tl.constexpr,
    INLINE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk counts its keys in ``hist`` where windows are open; the first pass marks NaN in ``bad``."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _SELECT_WIDTH)
    position = tl.load(row_ptr + ROW_POSITION)
    cut = (position if PER_LAYER else 0) * num_queries
    address = tl.load(row_ptr + ROW_ADDRESS)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    ptr = address.to(tl.pointer_type(DTYPE))
    aux_ptr = row_ptr + _COL_AUX
    full = (count == _CHUNK) & is_aligned(address)
    if KIND == _ELEMENTS:
        full = full & is_aligned(tl.load(aux_ptr))
    for q in range(num_queries):
        this_ptr = state_ptr + (cut + q) * _COLUMNS
        # The chunk is read once per open window, but from memory only once: it stays in the cache.
        if ((q == 0) & FIRST) | (tl.load(this_ptr + _BINS) > 0):
            bins_ptr = hist_ptr + (cut + q).to(tl.int64) * max_bins
            if full:
                full_ptr = tl.multiple_of(ptr, 16) + start
                largest = _fine_chunk(
                    full_ptr,
                    aux_ptr,
                    start,
                    count,
                    this_ptr,
                    bins_ptr,
                    KEY_BITS,
                    SCORE,
                    KIND,
                    AUX_DTYPE,
                    BLOCK,
                    False,
                    INLINE,
                    WIDE,
                )
            else:
                largest = _fine_chunk(
                    ptr + start,
                    aux_ptr,
                    start,
                    count,
                    this_ptr,
                    bins_ptr,
                    KEY_BITS,
                    SCORE,
                    KIND,
                    AUX_DTYPE,
                    BLOCK,
                    True,
                    INLINE,
                    WIDE,
                )
            if FIRST:
                tl.store(bad_ptr + position, 1, mask=largest > INF)


@triton.jit
def _codes_chunk(
    ptr,
    count,
    state_ptr,
    codes_ptr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    INLINE: tl.constexpr,
):
    """Count one chunk's keys in its own histogram of a window, and above it; return its largest key."""
    lo, num_bins, shift = _window(state_ptr, 16)
    codes = tl.arange(0, _CODES)
    counts = tl.zeros((_CODES,), tl.int32)
    if not HISTOGRAM:
        tl.store(codes_ptr + codes, counts)
        tl.debug_barrier()  # all zeros come before the first count
    not_above = tl.zeros((BLOCK,), tl.int32)  # with the sign that a shift gives: two instructions instead of three
    largest = tl.zeros((BLOCK,), tl.int32)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        key, mask = _chunk_keys(ptr, ptr, 0, i, count, 16, None, 0, None, BLOCK, MASKED)
        bins = (key - lo) >> shift
        if MASKED:
            bins = tl.where(mask, bins, -1)
        not_above += (bins - num_bins) >> 31
        largest = tl.maximum(largest, key)
        if HISTOGRAM:
            counts += tl.histogram(bins, _CODES, mask=_inside(bins, num_bins))
        else:
            _count_in(codes_ptr, bins, num_bins, INLINE, False)
    if HISTOGRAM:
        tl.store(codes_ptr + codes, counts.to(codes_ptr.dtype.element_ty))
    above = steps * BLOCK + tl.sum(not_above)
    tl.atomic_add(state_ptr + _ABOVE, above.to(tl.int64), sem="relaxed")
    return tl.max(largest)


@triton.jit(do_not_specialize=["num_queries", "num_chunks"])
def _codes_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    state_ptr,
    codes_ptr,
    bad_ptr,
    num_queries,
    num_chunks,
    DTYPE: tl.constexpr,
    INF: tl.constexpr,
    PER_LAYER: tl.constexpr,
    FIRST: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk writes its histograms to ``codes`` where windows are open; the first pass marks NaN."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _SELECT_WIDTH)
    position = tl.load(row_ptr + ROW_POSITION)
    cut = (position if PER_LAYER else 0) * num_queries
    address = tl.load(row_ptr + ROW_ADDRESS)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    ptr = address.to(tl.pointer_type(DTYPE))
    full = (count == _CHUNK) & is_aligned(address)
    place = tl.load(row_ptr + _COL_ORDER) + chunk
    for q in range(num_queries):
        this_ptr = state_ptr + (cut + q) * _COLUMNS
        if ((q == 0) & FIRST) | (tl.load(this_ptr + _BINS) > 0):
            mine_ptr = codes_ptr + (place + q * num_chunks.to(tl.int64)) * _CODES
            if full:
                full_ptr = tl.multiple_of(ptr, 16) + start
                largest = _codes_chunk(full_ptr, count, this_ptr, mine_ptr, BLOCK, False, HISTOGRAM, INLINE)
            else:
                largest = _codes_chunk(ptr + start, count, this_ptr, mine_ptr, BLOCK, True, HISTOGRAM, INLINE)
            if FIRST:
                tl.store(bad_ptr + position, 1, mask=largest > INF)


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
def _narrow(state_ptr, hist_ptr, sums, warm_ptr, max_bins, TOP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
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
            settled = _narrow(state_ptr, hist_ptr, sums, warm_ptr + 2 * cut, max_bins, TOP, PARTS, PART)
            if settled == 0:
                for part in range(PARTS):
                    tl.store(hist_ptr + part * PART + bins, tl.zeros_like(counts))


@triton.jit(do_not_specialize=["num_queries", "num_chunks", "num_sums"])
def _codes_resolve_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    state_ptr,
    codes_ptr,
    hist_ptr,
    counters_ptr,
    warm_ptr,
    num_queries,
    num_chunks,
    num_sums,
    TOP: tl.constexpr,
    PER_LAYER: tl.constexpr,
):
    """Every 32nd program adds up its next chunks' histograms; the last one of a window settles or narrows it."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _SELECT_WIDTH)
    if chunk % _CHUNKS_PER_SUM == 0:
        cut = (tl.load(row_ptr + ROW_POSITION) if PER_LAYER else 0) * num_queries
        tensor_chunks = tl.cdiv(tl.load(row_ptr + ROW_LENGTH), _CHUNK)
        sums = tl.cdiv(tensor_chunks, _CHUNKS_PER_SUM) if PER_LAYER else num_sums
        order = tl.load(row_ptr + _COL_ORDER)
        places = chunk + tl.arange(0, _CHUNKS_PER_SUM)
        codes = tl.arange(0, _CODES)
        for q in range(num_queries):
            this_ptr = state_ptr + (cut + q) * _COLUMNS
            bins_ptr = hist_ptr + (cut + q) * _CODES
            if tl.load(this_ptr + _BINS) > 0:
                mine_ptr = codes_ptr + (order + places + q * num_chunks.to(tl.int64))[:, None] * _CODES
                counts = tl.load(mine_ptr + codes[None, :], mask=(places < tensor_chunks)[:, None], other=0)
                total = tl.sum(counts.to(tl.int32), axis=0).to(tl.int64)
                tl.atomic_add(bins_ptr + codes, total, mask=total > 0, sem="relaxed")
                if is_last(counters_ptr + cut + q, sums):
                    whole = tl.full((1,), tl.sum(tl.load(bins_ptr + codes, cache_modifier=".cg")), tl.int64)
                    _narrow(this_ptr, bins_ptr, whole, warm_ptr + 2 * (cut + q), _CODES, TOP, 1, _CODES)
                    tl.store(bins_ptr + codes, tl.zeros((_CODES,), tl.int64))


@triton.jit(do_not_specialize=["num_queries", "num_chunks", "table_chunks"])
def _code_ties_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    state_ptr,
    codes_ptr,
    ties_ptr,
    num_queries,
    num_chunks,
    table_chunks,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK chunks reads off their histograms how many keys equal the cut: ``ties`` [Q, chunks]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < table_chunks
    row_ptr = rows_ptr + tl.load(block_to_tensor_ptr + index, mask=mask, other=0).to(tl.int64) * _SELECT_WIDTH
    chunk = index - tl.load(row_ptr + ROW_FIRST_CHUNK, mask=mask, other=0)
    place = tl.load(row_ptr + _COL_ORDER, mask=mask, other=0) + chunk
    cut = tl.load(row_ptr + ROW_POSITION, mask=mask, other=0) * num_queries if PER_LAYER else tl.zeros_like(index)
    for q in range(num_queries):
        this_ptr = state_ptr + (cut + q) * _COLUMNS
        code = tl.load(this_ptr + _KEY, mask=mask, other=0) - tl.load(this_ptr + _LO, mask=mask, other=0)
        kept = mask & (tl.load(this_ptr + _TIES, mask=mask, other=0) > 0)  # where nothing is, nothing was counted
        ties = tl.load(codes_ptr + (place + q * num_chunks.to(tl.int64)) * _CODES + code, mask=kept, other=0)
        tl.store(ties_ptr + place + q * num_chunks.to(tl.int64), ties.to(tl.int32), mask=mask)


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
            later = tl.load(rows_ptr + middle * _SELECT_WIDTH + _COL_BEFORE) <= place
            first = tl.where(later, middle, first)
            end = tl.where(later, end, middle)
        row_ptr = rows_ptr + first * _SELECT_WIDTH
        length = tl.load(row_ptr + ROW_LENGTH)
        start = (place - tl.load(row_ptr + _COL_BEFORE)) // LINE * LINE
        start = tl.minimum(start, tl.maximum(length - LINE, 0))
        # A tensor shorter than a line repeats itself: so it counts for as much as it is.
        within = tl.arange(0, LINE)[None, :] % tl.minimum(length, LINE).to(tl.int32)[:, None]
        ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
        offs = start[:, None] + within
        address = tl.load(row_ptr + ROW_ADDRESS)[:, None] + offs * ITEM
        everywhere = tl.broadcast_to(mask[:, None], (_SAMPLE_LINES, LINE))
        x = tl.load(address.to(tl.pointer_type(DTYPE)), mask=everywhere, other=0.0)
        aux_ptr = (row_ptr + _COL_AUX)[:, None]
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
                width = tl.minimum(tl.load(warm_ptr + 1), max_bins)
                lo = tl.maximum(last - 1 - width // 2, 0)
                _open(state_ptr, lo, tl.minimum(width, TOP - lo), max_bins)
                tl.store(state_ptr + _WIDTH, width)
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


@triton.jit
def _count_zeros(ptr, count, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return how many elements of a chunk are zero, and its largest key."""
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.int32)
    largest = tl.zeros((), tl.int64)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        if MASKED:
            key = magnitude_key(tl.load(ptr + offs, mask=offs < count, other=1.0), KEY_BITS)
        else:
            key = magnitude_key(tl.load(ptr + offs), KEY_BITS)
        zeros += (key == 0).to(tl.int32)
        largest = tl.maximum(largest, tl.max(key).to(tl.int64))
    return tl.sum(zeros), largest


@triton.jit
def _survey_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    zeros_ptr,
    bad_ptr,
    DTYPE: tl.constexpr,
    INF: tl.constexpr,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk adds its number of zeros to ``zeros`` and marks NaN in ``bad``."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, ROW_EXTRA)
    address = tl.load(row_ptr + ROW_ADDRESS)
    position = tl.load(row_ptr + ROW_POSITION)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    ptr = address.to(tl.pointer_type(DTYPE))
    if (count == _CHUNK) & is_aligned(address):
        full_ptr = tl.multiple_of(ptr, 16) + start
        zeros, largest = _count_zeros(full_ptr, count, KEY_BITS, BLOCK, False)
    else:
        zeros, largest = _count_zeros(ptr + start, count, KEY_BITS, BLOCK, True)
    tl.atomic_add(zeros_ptr + position, zeros.to(tl.int64), sem="relaxed")
    tl.store(bad_ptr + position, 1, mask=largest > INF)


class KeyFormula(NamedTuple):
    """What the keys are the bit patterns of.

    Attributes:
        formula: jit function of (weight, number), both float32 (float64 for float64 weights); None: the magnitude.
        kind: which number it gets: NOTHING (then whatever the weight is), ELEMENTS, COLUMNS or LAYER.
        dtype: the numbers' dtype.
    """

    formula: Any = None
    kind: int = NOTHING
    dtype: torch.dtype = torch.float32

    def constants(self) -> dict[str, Any]:
        """Return the kernels' constants."""
        return {"SCORE": self.formula, "KIND": self.kind, "AUX_DTYPE": TRITON_DTYPES[self.dtype]}


MAGNITUDE = KeyFormula()


def _pass_constants(
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    first: bool,
    wide: bool,
    how: Counting,
    score: KeyFormula = MAGNITUDE,
) -> dict:
    constants = {"DTYPE": TRITON_DTYPES[dtype], "INF": INF_KEYS[key_dtype]}
    by_code = key_dtype.itemsize == 2
    if not by_code:
        constants |= {"KEY_BITS": 8 * key_dtype.itemsize, **score.constants()}
    constants |= {"PER_LAYER": per_layer, "FIRST": first}
    if by_code:
        return constants | {"HISTOGRAM": how.histogram, "INLINE": how.inline, "BLOCK": config("codes", dtype).block}
    return constants | {"INLINE": how.inline, "WIDE": wide, "BLOCK": _fine_config(dtype, score).block}


def _fine_config(dtype: torch.dtype, score: KeyFormula) -> LaunchConfig:
    return config("fine" if score.formula is None else "fine scores", dtype)


def _survey_constants(dtype: torch.dtype) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "INF": INF_KEYS[dtype],
        "KEY_BITS": 8 * dtype.itemsize,
        "BLOCK": config("survey", dtype).block,
    }


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


def launch_fine(
    rows: Tensor,
    block_to_tensor: Tensor,
    state: Tensor,
    hist: Tensor,
    bad: Tensor,
    *,
    num_queries: int,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    first: bool,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Count the keys of open windows in hist (int32 or int64 [S * Q, bins]); the first pass marks NaN in bad."""
    wide = hist.dtype == torch.int64
    args = rows, block_to_tensor, state, hist, bad, num_queries, hist.shape[1]
    constants = _pass_constants(dtype, key_dtype, per_layer, first, wide, counting(), score)
    launch(_fine_kernel, block_to_tensor.numel(), args, constants, _fine_config(dtype, score).options())


def launch_resolve(
    state: Tensor, hist: Tensor, sums: Tensor, counters: Tensor, warm: Tensor, *, key_dtype: torch.dtype
) -> None:
    """Settle cuts or open their next windows; hist is zero again where a window is open."""
    part = min(PART, hist.shape[1])
    args = state, hist, sums, counters, warm, hist.shape[1]
    constants = {"TOP": top_of(key_dtype), "PARTS": hist.shape[1] // part, "PART": part}
    programs = hist.shape[0] * constants["PARTS"]
    launch(_resolve_kernel, programs, args, constants, {"num_warps": 4, **OPTIONS})


def codes_dtype() -> torch.dtype:
    """Return the dtype of the histograms of single chunks: reductions in memory are of 32 bits."""
    return torch.uint16 if counting().histogram else torch.int32


def launch_codes(
    rows: Tensor,
    block_to_tensor: Tensor,
    state: Tensor,
    codes: Tensor,
    bad: Tensor,
    *,
    dtype: torch.dtype,
    per_layer: bool,
    first: bool,
) -> None:
    """Count the keys of open windows per chunk: codes [Q, chunks of the list, CODES]; the first pass marks NaN."""
    args = rows, block_to_tensor, state, codes, bad, codes.shape[0], codes.shape[1]
    constants = _pass_constants(dtype, dtype, per_layer, first, False, counting())
    launch(_codes_kernel, block_to_tensor.numel(), args, constants, config("codes", dtype).options())


def launch_codes_resolve(
    rows: Tensor,
    block_to_tensor: Tensor,
    state: Tensor,
    codes: Tensor,
    hist: Tensor,
    counters: Tensor,
    warm: Tensor,
    *,
    num_sums: int,
    dtype: torch.dtype,
    per_layer: bool,
) -> None:
    """Settle cuts or open their next windows from what was counted per chunk; hist (int64 [S * Q, CODES]) stays zero.

    ``num_sums`` is the number of stretches of CHUNKS_PER_SUM chunks of all tensors.
    """
    args = rows, block_to_tensor, state, codes, hist, counters, warm, codes.shape[0], codes.shape[1], num_sums
    constants = {"TOP": top_of(dtype), "PER_LAYER": per_layer}
    launch(_codes_resolve_kernel, block_to_tensor.numel(), args, constants, {"num_warps": 8, **OPTIONS})


def launch_code_ties(
    rows: Tensor, block_to_tensor: Tensor, state: Tensor, codes: Tensor, ties: Tensor, *, per_layer: bool
) -> None:
    """Write how many keys of every chunk equal each cut: ties (int32 [Q, chunks of the list])."""
    args = rows, block_to_tensor, state, codes, ties, codes.shape[0], codes.shape[1], block_to_tensor.numel()
    constants = {"PER_LAYER": per_layer, "BLOCK": 128}
    programs = triton.cdiv(block_to_tensor.numel(), 128)
    launch(_code_ties_kernel, programs, args, constants, {"num_warps": 4, **OPTIONS})


def launch_survey(rows: Tensor, block_to_tensor: Tensor, zeros: Tensor, bad: Tensor, *, dtype: torch.dtype) -> None:
    """Add every tensor's zeros to zeros (int64 [L]) and mark NaN in bad (uint8 [L])."""
    args = rows, block_to_tensor, zeros, bad
    launch(_survey_kernel, block_to_tensor.numel(), args, _survey_constants(dtype), config("survey", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    return [*_pass_variants(), *_score_variants(), *_resolve_variants(), *_survey_variants()]


def score_forms(dtype: torch.dtype) -> list[tuple[str, KeyFormula, int]]:
    """Return the scores whose kernels the code generation check compiles: label, formula, and numbers per weight."""
    return [
        ("gradient", KeyFormula(product, ELEMENTS, dtype), 1),
        ("wanda", KeyFormula(scaled, COLUMNS, torch.float32), 0),
        ("normalised", KeyFormula(scaled, LAYER, torch.float32), 0),
    ]


def _score_variants() -> list[Variant]:
    signature = {**_TABLES, **_STATE, "hist_ptr": "*i32", "bad_ptr": "*u8", "num_queries": "i32", "max_bins": "i32"}
    listed = []
    for dtype in (torch.float32, torch.bfloat16):
        for label, formula, numbers in score_forms(dtype):
            listed.append(
                Variant(
                    _fine_kernel,
                    f"{dtype} {label}".replace("torch.", ""),
                    signature,
                    _pass_constants(dtype, torch.float32, False, True, False, counting("cuda"), formula),
                    _fine_config(dtype, formula).warps,
                    streams=1 + numbers,
                    bytes_per_element=(1 + numbers) * dtype.itemsize,
                    options=_fine_config(dtype, formula).options(),
                    backend="cuda",
                )
            )
    return listed


_TABLES = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
_STATE = {"state_ptr": "*i64"}


def _pass_variants() -> list[Variant]:
    fine = {**_TABLES, **_STATE, "bad_ptr": "*u8", "num_queries": "i32", "max_bins": "i32"}
    codes = {**_TABLES, **_STATE, "bad_ptr": "*u8", "num_queries": "i32", "num_chunks": "i32"}
    mixed = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
    listed = []
    for backend in ("cuda", "hip"):
        how = counting(backend)
        for dtype, key_dtype in [*((d, d) for d in TRITON_DTYPES), *mixed]:
            by_code = key_dtype.itemsize == 2
            for first, wide in (
                ((True, False), (False, False)) if by_code else ((True, False), (False, False), (True, True))
            ):
                label = f"{dtype} as {key_dtype}, {'first' if first else 'later'} pass{', 64-bit counts' * wide}"
                kernel, signature = (_codes_kernel, codes) if by_code else (_fine_kernel, fine)
                counts = ("*u16" if how.histogram else "*i32") if by_code else "*i64" if wide else "*i32"
                settings = config("codes" if by_code else "fine", dtype)
                listed.append(
                    Variant(
                        kernel,
                        label.replace("torch.", ""),
                        {**signature, "codes_ptr" if by_code else "hist_ptr": counts},
                        _pass_constants(dtype, key_dtype, False, first, wide, how),
                        settings.warps,
                        essential=dtype == key_dtype and first and not wide,
                        bytes_per_element=dtype.itemsize,
                        options=settings.options(),
                        backend=backend,
                    )
                )
    return listed


def _resolve_variants() -> list[Variant]:
    scratch = {"counters_ptr": "*i32", "warm_ptr": "*i64"}
    resolve = {**_STATE, "sums_ptr": "*i64", **scratch, "max_bins": "i32"}
    window = {**resolve, "sample_ptr": "*i32", "numel": "i64"}
    by_codes = {**_TABLES, **_STATE, "hist_ptr": "*i64", **scratch}
    by_codes |= dict.fromkeys(("num_queries", "num_chunks", "num_sums"), "i32")
    ties = {**_TABLES, **_STATE, "ties_ptr": "*i32"}
    ties |= dict.fromkeys(("num_queries", "num_chunks", "table_chunks"), "i32")
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
    for counts in ("*u16", "*i32"):
        for per_layer in (False, True):
            label = f"{'16' if counts == '*u16' else '32'} bits{', per layer' * per_layer}"
            constants = {"TOP": top_of(torch.bfloat16), "PER_LAYER": per_layer}
            signature = {**by_codes, "codes_ptr": counts}
            listed.append(Variant(_codes_resolve_kernel, label, signature, constants, 8, streams=0))
            constants = {"PER_LAYER": per_layer, "BLOCK": 128}
            listed.append(Variant(_code_ties_kernel, label, {**ties, "codes_ptr": counts}, constants, 4, streams=0))
    return listed


def _survey_variants() -> list[Variant]:
    signature = {**_TABLES, "zeros_ptr": "*i64", "bad_ptr": "*u8"}
    listed = []
    for dtype in TRITON_DTYPES:
        label = str(dtype).removeprefix("torch.")
        warps = config("survey", dtype).warps
        constants = _survey_constants(dtype)
        listed.append(Variant(_survey_kernel, label, signature, constants, warps, bytes_per_element=dtype.itemsize))
    return listed
