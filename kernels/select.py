"""Exact selection: where a list of tensors is cut so that a given number of weights stays.

A weight's key is its bit pattern with the sign cleared, an integer ordered like its magnitude. The cut is found
from the top in digits of 8 bits: count the next digit among the keys that share the digits found so far, pick
the digit that holds the wanted rank, go on. Every pass reads each element once, however many cuts are asked for;
counts are integers, so no order of execution shows in the result, and nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    ROW_ADDRESS,
    ROW_EXTRA,
    ROW_LENGTH,
    ROW_POSITION,
    is_aligned,
    locate,
    magnitude_key,
)
from .launch import CHUNK, OPTIONS, TRITON_DTYPES, Variant, config, launch

DIGIT_BITS = 8
_BINS = tl.constexpr(1 << DIGIT_BITS)
_CHUNK = tl.constexpr(CHUNK)
# Cuts refined by one program.
_REFINE_ROWS = 8

# The key of infinity; what lies above is NaN. The torch path has its own copy in wcr_fast.torch_path.cuts: kernels
# import nothing from the package, and that path imports nothing that needs Triton.
INF_KEYS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
INF_KEYS[torch.float64] = 0x7FF0000000000000


@triton.jit
def _count_chunk(
    ptr,
    count,
    prefix,
    hist_ptr,
    shift,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the digits of one chunk's keys that begin with ``prefix`` to a histogram; return the largest key."""
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, _BINS)
    counts = tl.zeros((_BINS,), tl.int32)
    largest = tl.zeros((), tl.int64)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        if MASKED:
            key = magnitude_key(tl.load(ptr + offs, mask=offs < count, other=0.0), KEY_BITS)
        else:
            key = magnitude_key(tl.load(ptr + offs), KEY_BITS)
        digits = key >> shift
        shares = (digits >> 8) == prefix.to(key.dtype)
        if MASKED:
            shares = shares & (offs < count)
        counts += tl.histogram((digits & 0xFF).to(tl.int32), _BINS, mask=shares)
        largest = tl.maximum(largest, tl.max(key).to(tl.int64))
    # One flush per chunk: all programs add to the same few bins.
    tl.atomic_add(hist_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    return largest


@triton.jit(do_not_specialize=["num_queries", "shift"])
def _histogram_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    prefix_ptr,
    hist_ptr,
    bad_ptr,
    num_queries,
    shift,
    DTYPE: tl.constexpr,
    INF: tl.constexpr,
    KEY_BITS: tl.constexpr,
    PER_LAYER: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk adds its counts of one digit to ``hist``; the first pass marks NaN in ``bad``."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, ROW_EXTRA)
    address = tl.load(row_ptr + ROW_ADDRESS)
    position = tl.load(row_ptr + ROW_POSITION)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    if PER_LAYER:
        prefix_ptr += position * num_queries
        hist_ptr += position * num_queries * _BINS
    # No digit is known in the first pass, so one histogram serves all cuts. Later ones read the chunk once per
    # cut, but from memory only once: it stays in cache.
    num_hists = 1 if FIRST else num_queries

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    largest = tl.zeros((), tl.int64)
    if (count == _CHUNK) & is_aligned(address):
        full_ptr = tl.multiple_of(weight_ptr, 16) + start
        for q in range(num_hists):
            prefix = tl.load(prefix_ptr + q)
            largest = _count_chunk(full_ptr, count, prefix, hist_ptr + q * _BINS, shift, KEY_BITS, BLOCK, False)
    else:
        for q in range(num_hists):
            prefix = tl.load(prefix_ptr + q)
            part_ptr = weight_ptr + start
            largest = _count_chunk(part_ptr, count, prefix, hist_ptr + q * _BINS, shift, KEY_BITS, BLOCK, True)
    if FIRST:
        tl.store(bad_ptr + position, 1, mask=largest > INF)


@triton.jit
def _pick_digit(counts, remaining):
    """Return the digit of the element with rank ``remaining`` from the top, for each row of counts [rows, bins]."""
    bins = tl.arange(0, _BINS)[None, :]
    from_top = tl.sum(counts, axis=1)[:, None] - tl.cumsum(counts, axis=1) + counts
    return tl.max(tl.where(from_top >= remaining[:, None], bins, 0), axis=1)


@triton.jit(do_not_specialize=["num_cuts", "num_queries"])
def _refine_kernel(hist_ptr, prefix_ptr, remaining_ptr, num_cuts, num_queries, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """One program per few cuts appends the next digit to ``prefix`` and updates the rank in ``remaining``."""
    cut = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = cut < num_cuts
    bins = tl.arange(0, _BINS)[None, :]
    # No digit is known in the first pass, so the cuts of a segment share its first histogram.
    source = cut // num_queries * num_queries if FIRST else cut
    counts = tl.load(hist_ptr + source[:, None] * _BINS + bins, mask=mask[:, None], other=0)
    remaining = tl.load(remaining_ptr + cut, mask=mask, other=0)
    digit = _pick_digit(counts, remaining)
    above = tl.sum(tl.where(bins > digit[:, None], counts, 0), axis=1)
    prefix = tl.load(prefix_ptr + cut, mask=mask, other=0)
    tl.store(prefix_ptr + cut, (prefix << 8) | digit.to(tl.int64), mask=mask)
    tl.store(remaining_ptr + cut, remaining - above, mask=mask)


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


def _histogram_constants(dtype: torch.dtype, key_dtype: torch.dtype, per_layer: bool, first: bool) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "INF": INF_KEYS[key_dtype],
        "KEY_BITS": 8 * key_dtype.itemsize,
        "PER_LAYER": per_layer,
        "FIRST": first,
        "BLOCK": config("histogram", dtype).block,
    }


def _survey_constants(dtype: torch.dtype) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "INF": INF_KEYS[dtype],
        "KEY_BITS": 8 * dtype.itemsize,
        "BLOCK": config("survey", dtype).block,
    }


def launch_histogram(
    rows: Tensor,
    block_to_tensor: Tensor,
    prefix: Tensor,
    hist: Tensor,
    bad: Tensor,
    *,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    shift: int,
    per_layer: bool,
    first: bool,
) -> None:
    """Add the counts of one digit to hist (int64 [S, Q, 256]; the first pass fills [:, 0]) and mark NaN in bad."""
    args = rows, block_to_tensor, prefix, hist, bad, hist.shape[1], shift
    constants = _histogram_constants(dtype, key_dtype, per_layer, first)
    launch(_histogram_kernel, block_to_tensor.numel(), args, constants, config("histogram", dtype).options())


def launch_refine(hist: Tensor, prefix: Tensor, remaining: Tensor, *, first: bool) -> None:
    """Append the next digit to prefix (int64 [S, Q]) and leave in remaining the rank among the keys that share it."""
    args = hist, prefix, remaining, prefix.numel(), prefix.shape[1]
    constants = {"FIRST": first, "ROWS": _REFINE_ROWS}
    launch(_refine_kernel, triton.cdiv(prefix.numel(), _REFINE_ROWS), args, constants, {"num_warps": 4, **OPTIONS})


def launch_survey(rows: Tensor, block_to_tensor: Tensor, zeros: Tensor, bad: Tensor, *, dtype: torch.dtype) -> None:
    """Add every tensor's zeros to zeros (int64 [L]) and mark NaN in bad (uint8 [L])."""
    args = rows, block_to_tensor, zeros, bad
    launch(_survey_kernel, block_to_tensor.numel(), args, _survey_constants(dtype), config("survey", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
    histogram = {**tables, "prefix_ptr": "*i64", "hist_ptr": "*i64", "bad_ptr": "*u8"}
    histogram |= {"num_queries": "i32", "shift": "i32"}
    pairs = [(dtype, dtype) for dtype in TRITON_DTYPES]
    pairs += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
    listed = []
    for dtype, key_dtype in pairs:
        for first in (True, False):
            label = f"{dtype} as {key_dtype}, {'first' if first else 'later'} digit".replace("torch.", "")
            constants = _histogram_constants(dtype, key_dtype, False, first)
            warps = config("histogram", dtype).warps
            essential = dtype == key_dtype or not first
            moved = dtype.itemsize
            listed.append(
                Variant(
                    _histogram_kernel,
                    label,
                    histogram,
                    constants,
                    warps,
                    essential=essential,
                    bytes_per_element=moved,
                )
            )
    refine = {"hist_ptr": "*i64", "prefix_ptr": "*i64", "remaining_ptr": "*i64"}
    refine |= {"num_cuts": "i32", "num_queries": "i32"}
    for first in (True, False):
        constants = {"FIRST": first, "ROWS": _REFINE_ROWS}
        label = "first digit" if first else "later digit"
        listed.append(Variant(_refine_kernel, label, refine, constants, 4, streams=0))
    signature = {**tables, "zeros_ptr": "*i64", "bad_ptr": "*u8"}
    for dtype in TRITON_DTYPES:
        label = str(dtype).removeprefix("torch.")
        warps = config("survey", dtype).warps
        constants = _survey_constants(dtype)
        listed.append(Variant(_survey_kernel, label, signature, constants, warps, bytes_per_element=dtype.itemsize))
    return listed
