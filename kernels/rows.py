"""Selection row by row: each row of a matrix (output of a layer) is cut by itself.

A row is small enough for one program to do all: find the cut in digits of 8 bits from the top, as in ``window``,
count the ties in logical order, and write. It reads its row once per digit and once more to write, from the cache
after the first time; so too the numbers beside it, where rows are ranked by a score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    LAYER,
    LAYOUT_WIDTH,
    ROW_ADDRESS,
    ROW_POSITION,
    is_aligned,
    is_contiguous,
    locate,
    magnitude_key,
    score_key,
    strided_offsets,
    write_kept,
)
from .launch import INF_KEYS, TRITON_DTYPES, Variant, config, launch
from .scores import MAGNITUDE, KeyFormula, line_forms

_BINS = tl.constexpr(256)
_LAYER = tl.constexpr(LAYER)

# Extra columns of a row table: elements per row, how many stay, distance of two rows and layout of one, in the
# tensor and in the mask; and the address of a score's numbers with the same two.
_COL_LENGTH = tl.constexpr(4)
_COL_KEEP = tl.constexpr(5)
_COL_STRIDE = tl.constexpr(6)
_COL_LAYOUT = tl.constexpr(7)
_COL_OUT_STRIDE = tl.constexpr(7 + LAYOUT_WIDTH)
_COL_OUT_LAYOUT = tl.constexpr(8 + LAYOUT_WIDTH)
_COL_NUMBERS = tl.constexpr(8 + 2 * LAYOUT_WIDTH)
_COL_NUMBERS_STRIDE = tl.constexpr(9 + 2 * LAYOUT_WIDTH)
_COL_NUMBERS_LAYOUT = tl.constexpr(10 + 2 * LAYOUT_WIDTH)
_ROWS_WIDTH = tl.constexpr(10 + 3 * LAYOUT_WIDTH)


@triton.jit
def _row_keys(
    ptr,
    layout_ptr,
    numbers_ptr,
    numbers_layout_ptr,
    offs,
    n,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Return the elements and keys of one block of a row; behind its end the keys are -1."""
    mask = offs < n
    if FLAT:
        x = tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        x = tl.load(ptr + strided_offsets(layout_ptr, offs.to(tl.int64)), mask=mask, other=0.0)
    if SCORE is None:
        key = magnitude_key(x, KEY_BITS)
    else:
        if KIND == _LAYER:
            a = tl.load(numbers_ptr)
        elif FLAT:
            a = tl.load(numbers_ptr + offs, mask=mask, other=0.0)
        else:
            a = tl.load(numbers_ptr + strided_offsets(numbers_layout_ptr, offs.to(tl.int64)), mask=mask, other=0.0)
        key = score_key(x, a, KEY_BITS, SCORE)
    return x, tl.where(mask, key, -1)


@triton.jit
def _cut_row(
    ptr,
    out_ptr,
    numbers_ptr,
    layout_ptr,
    out_layout_ptr,
    numbers_layout_ptr,
    n,
    keep,
    INF: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    TO_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find one row's cut and apply it, unless the row holds NaN; return the row's largest key."""
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, _BINS)
    KEY: tl.constexpr = tl.int64 if KEY_BITS == 64 else tl.int32
    prefix = tl.zeros((), KEY)
    # Numbers of elements are 64-bit: nothing but memory limits the length of a row.
    remaining = keep.to(tl.int64)
    largest = tl.zeros((), KEY)
    for digits_left in range(KEY_BITS // 8, 0, -1):
        shift = 8 * (digits_left - 1)
        counts = tl.zeros((_BINS,), tl.int64)
        for start in range(0, n, BLOCK):
            offs = start + lanes
            _, key = _row_keys(ptr, layout_ptr, numbers_ptr, numbers_layout_ptr, offs, n, KEY_BITS, SCORE, KIND, FLAT)
            shares = (key >= 0) & (((key >> shift) >> 8) == prefix)
            counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), _BINS, mask=shares).to(tl.int64)
            if digits_left == KEY_BITS // 8:
                largest = tl.maximum(largest, tl.max(key))
        from_top = tl.sum(counts) - tl.cumsum(counts, axis=0) + counts
        digit = tl.max(tl.where(from_top >= remaining, bins, 0))
        remaining -= tl.sum(tl.where(bins > digit, counts, 0))
        prefix = (prefix << 8) | digit.to(KEY)
    cut = tl.where(keep == 0, INF + 1, prefix).to(KEY)
    if TO_MASK or largest <= INF:
        before = tl.zeros((), tl.int64)
        for start in range(0, n, BLOCK):
            offs = start + lanes
            x, key = _row_keys(ptr, layout_ptr, numbers_ptr, numbers_layout_ptr, offs, n, KEY_BITS, SCORE, KIND, FLAT)
            ties = (key == cut).to(tl.int32)
            here = tl.sum(ties)
            if (before < remaining) & (before + here > remaining):
                stays = (key > cut) | ((key == cut) & (before + tl.cumsum(ties, axis=0) <= remaining))
            else:
                stays = key >= cut + (before + here > remaining).to(KEY)
            before += here
            if FLAT:
                where = offs.to(tl.int64)
            else:
                where = strided_offsets(out_layout_ptr, offs.to(tl.int64))
            write_kept(out_ptr, where, x, stays, offs < n, TO_MASK)
    return largest


@triton.jit
def _rows_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    out_addrs_ptr,
    bad_ptr,
    DTYPE: tl.constexpr,
    INF: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    TO_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """One program per row zeroes in place what its row loses, or writes the row's mask to ``out_addrs``."""
    tensor, row_ptr, row = locate(rows_ptr, block_to_tensor_ptr, _ROWS_WIDTH)
    n = tl.load(row_ptr + _COL_LENGTH)
    keep = tl.load(row_ptr + _COL_KEEP)
    layout_ptr = row_ptr + _COL_LAYOUT
    address = tl.load(row_ptr + ROW_ADDRESS)
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    address += row * tl.load(row_ptr + _COL_STRIDE) * ITEM
    flat = is_contiguous(layout_ptr, 1) & is_aligned(address) & (n % 16 == 0)
    ptr = address.to(tl.pointer_type(DTYPE))
    if TO_MASK:
        out_layout_ptr = row_ptr + _COL_OUT_LAYOUT
        out_address = tl.load(out_addrs_ptr + tensor) + row * tl.load(row_ptr + _COL_OUT_STRIDE)
        out_ptr = out_address.to(tl.pointer_type(tl.uint8))
        flat = flat & is_contiguous(out_layout_ptr, 1) & is_aligned(out_address)
    else:
        out_layout_ptr = layout_ptr
        out_ptr = ptr
    numbers_layout_ptr = row_ptr + _COL_NUMBERS_LAYOUT
    if SCORE is None:
        numbers_ptr = ptr  # not read
    else:
        NUMBER: tl.constexpr = AUX_DTYPE.primitive_bitwidth // 8
        numbers_address = tl.load(row_ptr + _COL_NUMBERS) + row * tl.load(row_ptr + _COL_NUMBERS_STRIDE) * NUMBER
        numbers_ptr = numbers_address.to(tl.pointer_type(AUX_DTYPE))
        if KIND != _LAYER:
            flat = flat & is_contiguous(numbers_layout_ptr, 1) & is_aligned(numbers_address)
    if flat:
        largest = _cut_row(
            tl.multiple_of(ptr, 16),
            tl.multiple_of(out_ptr, 16),
            numbers_ptr if KIND == _LAYER else tl.multiple_of(numbers_ptr, 16),
            layout_ptr,
            out_layout_ptr,
            numbers_layout_ptr,
            tl.multiple_of(n, 16),
            keep,
            INF,
            KEY_BITS,
            SCORE,
            KIND,
            TO_MASK,
            True,
            BLOCK,
        )
    else:
        largest = _cut_row(
            ptr,
            out_ptr,
            numbers_ptr,
            layout_ptr,
            out_layout_ptr,
            numbers_layout_ptr,
            n,
            keep,
            INF,
            KEY_BITS,
            SCORE,
            KIND,
            TO_MASK,
            False,
            GENERAL,
        )
    tl.store(bad_ptr + tl.load(row_ptr + ROW_POSITION), 1, mask=largest > INF)


def _rows_constants(dtype: torch.dtype, to_mask: bool, score: KeyFormula = MAGNITUDE) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "INF": INF_KEYS[score.key_dtype(dtype)],
        "KEY_BITS": 8 * score.key_dtype(dtype).itemsize,
        **score.constants(),
        "TO_MASK": to_mask,
        "BLOCK": score.settings("rows", dtype).block,
        "GENERAL": score.settings("rows", dtype).general,
    }


def launch_rows(
    rows: Tensor,
    block_to_tensor: Tensor,
    out_addrs: Tensor | None,
    bad: Tensor,
    *,
    dtype: torch.dtype,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Cut every row of a row table by itself: in place, or into the bool masks at out_addrs."""
    args = rows, block_to_tensor, rows if out_addrs is None else out_addrs, bad
    constants = _rows_constants(dtype, out_addrs is not None, score)
    launch(_rows_kernel, block_to_tensor.numel(), args, constants, score.settings("rows", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    listed = []
    signature = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "out_addrs_ptr": "*i64", "bad_ptr": "*u8"}
    for dtype in TRITON_DTYPES:
        for to_mask in (False, True):
            label = f"{dtype} {'mask' if to_mask else 'in place'}".replace("torch.", "")
            warps = config("rows", dtype).warps
            constants = _rows_constants(dtype, to_mask)
            moved = dtype.itemsize + (1 if to_mask else dtype.itemsize)
            listed.append(Variant(_rows_kernel, label, signature, constants, warps, bytes_per_element=moved))
    for label, dtype, formula, streams, moved in line_forms():
        label = f"{dtype} {label}".replace("torch.", "")
        constants, chosen = _rows_constants(dtype, False, formula), formula.settings("rows", dtype)
        essential, options = dtype == torch.float32, chosen.options()
        listed.append(
            Variant(_rows_kernel, label, signature, constants, chosen.warps, streams, essential, moved, options)
        )
    return listed
