"""Apply a selection: zero what is removed in place, or write boolean masks.

A weight stays when its key lies above the cut, or equals it and is among the first ``quota`` such weights in list
order, then logical row-major order. Where the number of equal keys of every chunk is known, their running sum tells
each chunk how many of its own stay: all chunks but one need a plain comparison, and one pass is all. Where it isn't,
the pass keeps all equal keys and counts them per chunk, and a second one visits only the chunks that kept too many.

In place, the first pass also counts what a record tells of it: each tensor's keys above the cut, equal to it, and zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    AUX_WIDTH,
    ELEMENTS,
    LAYOUT_WIDTH,
    ROW_ADDRESS,
    ROW_LENGTH,
    ROW_POSITION,
    is_aligned,
    is_contiguous,
    keys_at,
    locate,
    strided_offsets,
    write_kept,
)
from .launch import CHUNK, TRITON_DTYPES, LaunchConfig, Variant, config, launch
from .scores import MAGNITUDE, SCORED, KeyFormula, score_forms

_CHUNK = tl.constexpr(CHUNK)
_ELEMENTS = tl.constexpr(ELEMENTS)

# Extra columns of a mask table: the number of chunks of all earlier tensors in the list, whether the chunks follow
# each other in another than the logical order, the layout, and what a score needs.
_COL_ORDER = tl.constexpr(4)
_COL_PERMUTED = tl.constexpr(5)
_COL_LAYOUT = tl.constexpr(6)
_COL_AUX = tl.constexpr(6 + LAYOUT_WIDTH)
_MASK_WIDTH = tl.constexpr(6 + LAYOUT_WIDTH + AUX_WIDTH)

# What a mask pass does: apply cuts whose ties are known, keep and count all ties, or remove those that are too many.
KNOWN, COUNT, TRIM = range(3)
_COUNT, _TRIM = tl.constexpr(COUNT), tl.constexpr(TRIM)

# Bits of one count of a lane, which sees 32 weights of a chunk at most.
_FIELD, _ONES = tl.constexpr(10), tl.constexpr((1 << 10) - 1)


@triton.jit
def _count_ties(
    ptr,
    aux_ptr,
    layout_ptr,
    start,
    count,
    cut,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    ties = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.cdiv(count, BLOCK).to(tl.int32)):
        offs = i * BLOCK + lanes
        mask = offs < count
        where = strided_offsets(layout_ptr, start + offs)
        x = tl.load(ptr + where, mask=mask, other=0.0)
        key = keys_at(x, aux_ptr, start, offs, where, mask, KEY_BITS, SCORE, KIND, AUX_DTYPE, False)
        ties += (mask & (key == cut.to(key.dtype))).to(tl.int32)
    return tl.sum(ties)


@triton.jit
def _quota(row_ptr, ties_before_ptr, quota_ptr, segment, chunk, PER_LAYER: tl.constexpr):
    """Return how many ties of a chunk stay, how many there are, and whether the tensor's ties are cut in the middle."""
    first_ptr = ties_before_ptr + tl.load(row_ptr + _COL_ORDER)
    first = tl.load(first_ptr)
    before = tl.load(first_ptr + chunk)
    here = tl.load(first_ptr + chunk + 1) - before
    whole = tl.load(first_ptr + tl.cdiv(tl.load(row_ptr + ROW_LENGTH), _CHUNK)) - first
    left = tl.load(quota_ptr + segment)
    if not PER_LAYER:
        left -= first
    return left - (before - first), here, (left > 0) & (left < whole)


@triton.jit
def _ties_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    key_ptr,
    quota_ptr,
    ties_before_ptr,
    ties_ptr,
    DTYPE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """One program per chunk counts its ties in logical order anew, where ``ties_before`` cuts its tensor's ties."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _MASK_WIDTH)
    segment = tl.load(row_ptr + ROW_POSITION) if PER_LAYER else 0
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    _, _, cut_here = _quota(row_ptr, ties_before_ptr, quota_ptr, segment, chunk, PER_LAYER)
    if cut_here:
        layout_ptr = row_ptr + _COL_LAYOUT
        cut = tl.load(key_ptr + segment)
        ptr = tl.load(row_ptr + ROW_ADDRESS).to(tl.pointer_type(DTYPE))
        aux_ptr = row_ptr + _COL_AUX
        ties = _count_ties(ptr, aux_ptr, layout_ptr, start, count, cut, KEY_BITS, SCORE, KIND, AUX_DTYPE, GENERAL)
        tl.store(ties_ptr + tl.load(row_ptr + _COL_ORDER) + chunk, ties)


@triton.jit
def _tally(key, cut, TIES_ONLY: tl.constexpr):
    """Return 1, in a field each, where a key equals the cut, is above it, and zero; or the first of these only."""
    tally = (key == cut).to(tl.int32)
    if not TIES_ONLY:
        tally += ((key > cut).to(tl.int32) << _FIELD) + ((key == 0).to(tl.int32) << (2 * _FIELD))
    return tally


@triton.jit
def _fields(tally):
    """Return the sums of a tally's fields."""
    return tl.sum(tally & _ONES), tl.sum((tally >> _FIELD) & _ONES), tl.sum(tally >> (2 * _FIELD))


@triton.jit
def _mask_full_chunk(
    ptr,
    out_ptr,
    aux_ptr,
    start,
    cut,
    lowest,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    TO_MASK: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep the keys of an aligned chunk from ``lowest`` on; where COUNTED, return what ``_tally`` counts."""
    lanes = tl.arange(0, BLOCK)
    tally = tl.zeros((BLOCK,), tl.int32)
    for i in range(_CHUNK // BLOCK):
        offs = i * BLOCK + lanes
        x = tl.load(ptr + offs)
        everywhere = tl.full((BLOCK,), True, tl.int1)
        key = keys_at(x, aux_ptr, start, offs, start + offs, everywhere, KEY_BITS, SCORE, KIND, AUX_DTYPE, True)
        if COUNTED:
            tally += _tally(key, cut.to(key.dtype), TO_MASK)
        write_kept(out_ptr, offs, x, key >= lowest.to(key.dtype), None, TO_MASK)
    return _fields(tally)


@triton.jit
def _mask_any_chunk(
    ptr,
    out_ptr,
    aux_ptr,
    layout_ptr,
    start,
    count,
    cut,
    quota,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    TO_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply a cut in the layout's order to any chunk: the first ``quota`` of its ties stay; return the same."""
    lanes = tl.arange(0, BLOCK)
    ties = tl.zeros((), tl.int64)
    tally = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.cdiv(count, BLOCK).to(tl.int32)):
        offs = i * BLOCK + lanes
        mask = offs < count
        where = strided_offsets(layout_ptr, start + offs)
        x = tl.load(ptr + where, mask=mask, other=0.0)
        key = keys_at(x, aux_ptr, start, offs, where, mask, KEY_BITS, SCORE, KIND, AUX_DTYPE, False)
        equal = mask & (key == cut.to(key.dtype))
        here = tl.sum(equal.to(tl.int32)).to(tl.int64)
        left = quota - ties
        if (left > 0) & (left < here):
            stays = (key > cut.to(key.dtype)) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
        else:
            stays = key >= (cut + (left < here).to(tl.int64)).to(key.dtype)
        ties += here
        tally += tl.where(mask, _tally(key, cut.to(key.dtype), TO_MASK), 0)
        write_kept(out_ptr, (start + offs) if TO_MASK else where, x, stays, mask, TO_MASK)
    return _fields(tally)


@triton.jit
def _mask_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    out_addrs_ptr,
    key_ptr,
    quota_ptr,
    ties_before_ptr,
    ties_ptr,
    counts_ptr,
    any_bad_ptr,
    DTYPE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    PER_LAYER: tl.constexpr,
    TO_MASK: tl.constexpr,
    PASS: tl.constexpr,
    BLOCK: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """One program per chunk zeroes in place what is removed (nothing if ``any_bad``), or writes to ``out_addrs``.

    A counting pass keeps all ties and writes their number to ``ties``. The first pass in place adds to ``counts``.
    """
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _MASK_WIDTH)
    address = tl.load(row_ptr + ROW_ADDRESS)
    layout_ptr = row_ptr + _COL_LAYOUT
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    segment = tl.load(row_ptr + ROW_POSITION) if PER_LAYER else 0
    cut = tl.load(key_ptr + segment)
    wanted = TO_MASK or tl.load(any_bad_ptr) == 0
    if PASS == _COUNT:
        quota, here = count, count  # more than there can be
    else:
        quota, here, cut_here = _quota(row_ptr, ties_before_ptr, quota_ptr, segment, chunk, PER_LAYER)
        if (tl.load(row_ptr + _COL_PERMUTED) != 0) & cut_here:
            quota = here  # which ones stay, a pass in logical order will tell
        if PASS == _TRIM:
            wanted = wanted & (quota < here)
    ptr = address.to(tl.pointer_type(DTYPE))
    aux_ptr = row_ptr + _COL_AUX
    flat = (count == _CHUNK) & is_aligned(address) & is_contiguous(layout_ptr, 1)
    if KIND == _ELEMENTS:
        flat = flat & is_aligned(tl.load(aux_ptr))
    if TO_MASK:
        out_address = tl.load(out_addrs_ptr + tensor)
        out_ptr = out_address.to(tl.pointer_type(tl.uint8))
        flat = flat & is_aligned(out_address)
    else:
        out_ptr = ptr
    if wanted:
        if flat & ((quota <= 0) | (quota >= here)):
            tied, above, zeros = _mask_full_chunk(
                tl.multiple_of(ptr, 16) + start,
                tl.multiple_of(out_ptr, 16) + start,
                aux_ptr,
                start,
                cut,
                cut + (quota < here).to(tl.int64),
                KEY_BITS,
                SCORE,
                KIND,
                AUX_DTYPE,
                TO_MASK,
                PASS == _COUNT or not (TO_MASK or PASS == _TRIM),
                BLOCK,
            )
        else:
            tied, above, zeros = _mask_any_chunk(
                ptr,
                out_ptr,
                aux_ptr,
                layout_ptr,
                start,
                count,
                cut,
                quota,
                KEY_BITS,
                SCORE,
                KIND,
                AUX_DTYPE,
                TO_MASK,
                GENERAL,
            )
        if PASS == _COUNT:
            tl.store(ties_ptr + tl.load(row_ptr + _COL_ORDER) + chunk, tied)
        if not (TO_MASK or PASS == _TRIM):
            counts_ptr += 3 * tl.load(row_ptr + ROW_POSITION)
            tl.atomic_add(counts_ptr, above.to(tl.int64), sem="relaxed")
            tl.atomic_add(counts_ptr + 1, tied.to(tl.int64), sem="relaxed")
            tl.atomic_add(counts_ptr + 2, zeros.to(tl.int64), sem="relaxed")
    elif PASS == _COUNT:
        tl.store(ties_ptr + tl.load(row_ptr + _COL_ORDER) + chunk, 0)


def _mask_config(key_dtype: torch.dtype, to_mask: bool, score: KeyFormula = MAGNITUDE) -> LaunchConfig:
    # Keys take the registers.
    return score.settings("mask", key_dtype) if to_mask else config("mask in place", key_dtype)


def _mask_constants(
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    settings: LaunchConfig,
    score: KeyFormula = MAGNITUDE,
) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "KEY_BITS": 8 * key_dtype.itemsize,
        **score.constants(),
        "PER_LAYER": per_layer,
        "BLOCK": settings.block,
        "GENERAL": settings.general,
    }


def launch_ties(
    rows: Tensor,
    block_to_tensor: Tensor,
    key: Tensor,
    quota: Tensor,
    ties_before: Tensor,
    ties: Tensor,
    *,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Count ties of every chunk in logical order: ties (int32, chunks in list order), of tensors whose ties are cut."""
    args = rows, block_to_tensor, key, quota, ties_before, ties
    settings = _mask_config(key_dtype, True)
    constants = _mask_constants(dtype, key_dtype, per_layer, settings, score)
    launch(_ties_kernel, block_to_tensor.numel(), args, constants, settings.options())


def launch_mask(
    rows: Tensor,
    block_to_tensor: Tensor,
    out_addrs: Tensor | None,
    key: Tensor,
    quota: Tensor,
    ties_before: Tensor,
    ties: Tensor,
    counts: Tensor,
    any_bad: Tensor,
    *,
    dtype: torch.dtype,
    key_dtype: torch.dtype,
    per_layer: bool,
    what: int,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Apply cuts key, quota (int64 [S]): zero in place, or write bool masks to out_addrs (int64, per table row).

    ``what`` is KNOWN or TRIM, with the running sum of all chunks' ties in ties_before (int64), or COUNT, which writes
    ties (int32, chunks in list order). In place, KNOWN and COUNT add to counts (int64 [L, 3]) what each tensor has
    above the cut, equal to it, and zero.
    """
    outs = rows if out_addrs is None else out_addrs
    args = rows, block_to_tensor, outs, key, quota, ties_before, ties, counts, any_bad
    to_mask = out_addrs is not None
    settings = _mask_config(key_dtype, to_mask, score)
    constants = _mask_constants(dtype, key_dtype, per_layer, settings, score)
    constants |= {"TO_MASK": to_mask, "PASS": what}
    launch(_mask_kernel, block_to_tensor.numel(), args, constants, settings.options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
    ties = {**tables, "key_ptr": "*i64", "quota_ptr": "*i64", "ties_before_ptr": "*i64", "ties_ptr": "*i32"}
    mask = {**ties, "out_addrs_ptr": "*i64", "counts_ptr": "*i64", "any_bad_ptr": "*u8"}
    pairs = [(dtype, dtype) for dtype in TRITON_DTYPES]
    pairs += [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
    listed = []
    for dtype, key_dtype in pairs:
        label = f"{dtype} as {key_dtype}".replace("torch.", "")
        settings = _mask_config(key_dtype, True)
        constants = _mask_constants(dtype, key_dtype, False, settings)
        listed.append(Variant(_ties_kernel, label, ties, constants, settings.warps, streams=0))
        for to_mask in (False, True):
            settings = _mask_config(key_dtype, to_mask)
            constants = _mask_constants(dtype, key_dtype, False, settings)
            for name, what in (("ties known", KNOWN), ("ties counted", COUNT), ("ties trimmed", TRIM)):
                listed.append(
                    Variant(
                        _mask_kernel,
                        f"{label} {'mask' if to_mask else 'in place'}, {name}",
                        mask,
                        {**constants, "TO_MASK": to_mask, "PASS": what},
                        settings.warps,
                        essential=what == COUNT or (what == KNOWN and dtype == torch.bfloat16),
                        bytes_per_element=dtype.itemsize + (1 if to_mask else dtype.itemsize),
                        options=settings.options(),
                    )
                )
    for dtype in SCORED:
        for label, formula, numbers in score_forms(dtype):
            key_dtype = formula.key_dtype(dtype)
            for to_mask in (False, True):
                settings = _mask_config(key_dtype, to_mask, formula)
                constants = _mask_constants(dtype, key_dtype, False, settings, formula)
                listed.append(
                    Variant(
                        _mask_kernel,
                        f"{dtype} {label}{', mask' * to_mask}".replace("torch.", ""),
                        mask,
                        {**constants, "TO_MASK": to_mask, "PASS": COUNT},
                        settings.warps,
                        streams=1 + numbers,
                        essential=dtype == torch.float32 and not to_mask,
                        bytes_per_element=(1 + numbers) * dtype.itemsize + (1 if to_mask else dtype.itemsize),
                        options=settings.options(),
                    )
                )
    return listed
