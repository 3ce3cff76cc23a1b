"""Exact selection, the passes over the weights: every open window's keys are counted; see ``window``.

Keys of 16 bits are counted in 256 bins per chunk (``_codes_kernel``): their counts also say how many keys of each
chunk equal the cut, which breaks ties without another pass. Wider keys are counted in one large histogram in global
memory (``_fine_kernel``), which stays in the second-level cache: 2^19 bins hold a sampled window of float32. Searches
that the host leads count keys of any width so, per tensor.

Bytes per weight: the keys once, and per weight inside the window one count; per chunk of 16-bit keys 256 counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    ELEMENTS,
    ROW_ADDRESS,
    ROW_FIRST_CHUNK,
    ROW_LENGTH,
    ROW_POSITION,
    is_aligned,
    is_last,
    keys_at,
    locate,
)
from .launch import CHUNK, INF_KEYS, OPTIONS, TRITON_DTYPES, LaunchConfig, Variant, config, launch
from .scores import MAGNITUDE, SCORED, KeyFormula, score_forms
from .window import (
    ROW_AUX,
    ROW_ORDER,
    SELECT_WIDTH,
    STATE_ABOVE,
    STATE_BINS,
    STATE_COLUMNS,
    STATE_KEY,
    STATE_LO,
    STATE_TIES,
    Counting,
    bins_of,
    count_in,
    counting,
    inside,
    narrow_window,
    top_of,
    window_of,
)

# Bins of one chunk's histogram of 16-bit keys.
CODES = 256
_CODES = tl.constexpr(CODES)
_ELEMENTS = tl.constexpr(ELEMENTS)
_CHUNK = tl.constexpr(CHUNK)
# Chunks whose histograms one program adds up.
CHUNKS_PER_SUM = 32
_CHUNKS_PER_SUM = tl.constexpr(CHUNKS_PER_SUM)
_SELECT_WIDTH = tl.constexpr(SELECT_WIDTH)
_LO, _BINS, _ABOVE = tl.constexpr(STATE_LO), tl.constexpr(STATE_BINS), tl.constexpr(STATE_ABOVE)
_KEY, _TIES, _COLUMNS = tl.constexpr(STATE_KEY), tl.constexpr(STATE_TIES), tl.constexpr(STATE_COLUMNS)


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
def _count_chunk(
    ptr,
    aux_ptr,
    start,
    count,
    state_ptr,
    bins_ptr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    INLINE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Count one chunk's keys above a window and in its bins; return its largest key.

    The counts are added to the bins, or (HISTOGRAM) written there: CODES counts of this chunk alone.
    """
    lo, num_bins, shift = window_of(state_ptr, KEY_BITS)
    counts = tl.zeros((_CODES,), tl.int32)
    not_above = tl.zeros((BLOCK,), tl.int32)  # with the sign that a shift gives: two instructions instead of three
    largest = tl.zeros((BLOCK,), tl.int64 if KEY_BITS == 64 else tl.int32)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        key, mask = _chunk_keys(ptr, aux_ptr, start, i, count, KEY_BITS, SCORE, KIND, AUX_DTYPE, BLOCK, MASKED)
        bins = bins_of(key, lo, shift, num_bins, KEY_BITS)
        if MASKED:
            bins = tl.where(mask, bins, -1)
        not_above += (bins - num_bins) >> 31
        largest = tl.maximum(largest, key)
        if HISTOGRAM:
            counts += tl.histogram(bins, _CODES, mask=inside(bins, num_bins))
        else:
            count_in(bins_ptr, bins, num_bins, INLINE, WIDE)
    if HISTOGRAM:
        tl.store(bins_ptr + tl.arange(0, _CODES), counts.to(bins_ptr.dtype.element_ty))
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
    aux_ptr = row_ptr + ROW_AUX
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
                largest = _count_chunk(
                    full_ptr, aux_ptr, start, count, this_ptr, bins_ptr,
                    KEY_BITS, SCORE, KIND, AUX_DTYPE, BLOCK, False, False, INLINE, WIDE,
                )  # fmt: skip
            else:
                largest = _count_chunk(
                    ptr + start, aux_ptr, start, count, this_ptr, bins_ptr,
                    KEY_BITS, SCORE, KIND, AUX_DTYPE, BLOCK, True, False, INLINE, WIDE,
                )  # fmt: skip
            if FIRST:
                tl.store(bad_ptr + position, 1, mask=largest > INF)


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
    place = tl.load(row_ptr + ROW_ORDER) + chunk
    for q in range(num_queries):
        this_ptr = state_ptr + (cut + q) * _COLUMNS
        if ((q == 0) & FIRST) | (tl.load(this_ptr + _BINS) > 0):
            mine_ptr = codes_ptr + (place + q * num_chunks.to(tl.int64)) * _CODES
            if not HISTOGRAM:
                tl.store(mine_ptr + tl.arange(0, _CODES), tl.zeros((_CODES,), mine_ptr.dtype.element_ty))
                tl.debug_barrier()  # all zeros come before the first count
            if full:
                full_ptr = tl.multiple_of(ptr, 16) + start
                largest = _count_chunk(
                    full_ptr, ptr, 0, count, this_ptr, mine_ptr,
                    16, None, 0, None, BLOCK, False, HISTOGRAM, INLINE, False,
                )  # fmt: skip
            else:
                largest = _count_chunk(
                    ptr + start, ptr, 0, count, this_ptr, mine_ptr,
                    16, None, 0, None, BLOCK, True, HISTOGRAM, INLINE, False,
                )  # fmt: skip
            if FIRST:
                tl.store(bad_ptr + position, 1, mask=largest > INF)


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
        order = tl.load(row_ptr + ROW_ORDER)
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
                    narrow_window(this_ptr, bins_ptr, whole, warm_ptr + 2 * (cut + q), _CODES, TOP, 1, _CODES)
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
    place = tl.load(row_ptr + ROW_ORDER, mask=mask, other=0) + chunk
    cut = tl.load(row_ptr + ROW_POSITION, mask=mask, other=0) * num_queries if PER_LAYER else tl.zeros_like(index)
    for q in range(num_queries):
        this_ptr = state_ptr + (cut + q) * _COLUMNS
        code = tl.load(this_ptr + _KEY, mask=mask, other=0) - tl.load(this_ptr + _LO, mask=mask, other=0)
        kept = mask & (tl.load(this_ptr + _TIES, mask=mask, other=0) > 0)  # where nothing is, nothing was counted
        ties = tl.load(codes_ptr + (place + q * num_chunks.to(tl.int64)) * _CODES + code, mask=kept, other=0)
        tl.store(ties_ptr + place + q * num_chunks.to(tl.int64), ties.to(tl.int32), mask=mask)


def _fine_constants(
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    first: bool,
    wide: bool,
    how: Counting,
    score: KeyFormula = MAGNITUDE,
) -> dict:
    constants = {"DTYPE": TRITON_DTYPES[dtype], "INF": INF_KEYS[key_dtype]}
    constants |= {"KEY_BITS": 8 * key_dtype.itemsize, **score.constants(), "PER_LAYER": per_layer, "FIRST": first}
    return constants | {"INLINE": how.inline, "WIDE": wide, "BLOCK": _fine_config(dtype, key_dtype, score).block}


def _codes_constants(dtype: torch.dtype, per_layer: bool, first: bool, how: Counting) -> dict:
    constants = {"DTYPE": TRITON_DTYPES[dtype], "INF": INF_KEYS[dtype], "PER_LAYER": per_layer, "FIRST": first}
    return constants | {"HISTOGRAM": how.histogram, "INLINE": how.inline, "BLOCK": config("codes", dtype).block}


def _fine_config(dtype: torch.dtype, key_dtype: torch.dtype, score: KeyFormula) -> LaunchConfig:
    if score.formula is None and dtype.itemsize == 2 and key_dtype.itemsize == 8:
        return config("fine among float64", dtype)
    return score.settings("fine", dtype)


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
    constants = _fine_constants(dtype, key_dtype, per_layer, first, wide, counting(), score)
    launch(_fine_kernel, block_to_tensor.numel(), args, constants, _fine_config(dtype, key_dtype, score).options())


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
    constants = _codes_constants(dtype, per_layer, first, counting())
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


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    return [*_fine_variants(), *_score_variants(), *_codes_variants()]


def _score_variants() -> list[Variant]:
    signature = {**_TABLES, **_STATE, "hist_ptr": "*i32", "bad_ptr": "*u8", "num_queries": "i32", "max_bins": "i32"}
    listed = []
    for dtype in SCORED:
        for label, formula, numbers in score_forms(dtype):
            key_dtype = formula.key_dtype(dtype)
            settings = _fine_config(dtype, key_dtype, formula)
            for first, per_layer in ((True, False), (False, True)):
                passes = "" if first else ", later pass, per layer"
                listed.append(
                    Variant(
                        _fine_kernel,
                        f"{dtype} {label}{passes}".replace("torch.", ""),
                        signature,
                        _fine_constants(dtype, key_dtype, per_layer, first, False, counting("cuda"), formula),
                        settings.warps,
                        streams=1 + numbers,
                        essential=first and dtype != torch.float64,
                        bytes_per_element=(1 + numbers) * dtype.itemsize,
                        options=settings.options(),
                        backend="cuda",
                    )
                )
    return listed


_TABLES = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}


_STATE = {"state_ptr": "*i64"}


def _fine_variants() -> list[Variant]:
    signature = {**_TABLES, **_STATE, "bad_ptr": "*u8", "num_queries": "i32", "max_bins": "i32"}
    mixed = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
    mixed += [(torch.bfloat16, torch.float64)]
    listed = []
    for backend in ("cuda", "hip"):
        for dtype, key_dtype in [*((d, d) for d in TRITON_DTYPES), *mixed]:
            per_layer = key_dtype.itemsize == 2  # only the host's searches count keys of 16 bits so, tensor by tensor
            for first, wide in ((True, False), (False, False), (True, True)):
                label = f"{dtype} as {key_dtype}, {'first' if first else 'later'} pass{', 64-bit counts' * wide}"
                settings = _fine_config(dtype, key_dtype, MAGNITUDE)
                listed.append(
                    Variant(
                        _fine_kernel,
                        label.replace("torch.", "") + ", per layer" * per_layer,
                        {**signature, "hist_ptr": "*i64" if wide else "*i32"},
                        _fine_constants(dtype, key_dtype, per_layer, first, wide, counting(backend)),
                        settings.warps,
                        essential=dtype == key_dtype and first and not wide,
                        bytes_per_element=dtype.itemsize,
                        options=settings.options(),
                        backend=backend,
                    )
                )
    return listed


def _codes_variants() -> list[Variant]:
    codes = {**_TABLES, **_STATE, "bad_ptr": "*u8", "num_queries": "i32", "num_chunks": "i32"}
    by_codes = {**_TABLES, **_STATE, "hist_ptr": "*i64", "counters_ptr": "*i32", "warm_ptr": "*i64"}
    by_codes |= dict.fromkeys(("num_queries", "num_chunks", "num_sums"), "i32")
    ties = {**_TABLES, **_STATE, "ties_ptr": "*i32"}
    ties |= dict.fromkeys(("num_queries", "num_chunks", "table_chunks"), "i32")
    listed = []
    for backend in ("cuda", "hip"):
        how = counting(backend)
        for dtype in (d for d in TRITON_DTYPES if d.itemsize == 2):
            for first in (True, False):
                listed.append(
                    Variant(
                        _codes_kernel,
                        f"{dtype} as {dtype}, {'first' if first else 'later'} pass".replace("torch.", ""),
                        {**codes, "codes_ptr": "*u16" if how.histogram else "*i32"},
                        _codes_constants(dtype, False, first, how),
                        config("codes", dtype).warps,
                        essential=first,
                        bytes_per_element=dtype.itemsize,
                        options=config("codes", dtype).options(),
                        backend=backend,
                    )
                )
    for counts in ("*u16", "*i32"):
        for per_layer in (False, True):
            label = f"{'16' if counts == '*u16' else '32'} bits{', per layer' * per_layer}"
            constants = {"TOP": top_of(torch.bfloat16), "PER_LAYER": per_layer}
            signature = {**by_codes, "codes_ptr": counts}
            listed.append(Variant(_codes_resolve_kernel, label, signature, constants, 8, streams=0))
            constants = {"PER_LAYER": per_layer, "BLOCK": 128}
            listed.append(Variant(_code_ties_kernel, label, {**ties, "codes_ptr": counts}, constants, 4, streams=0))
    return listed
