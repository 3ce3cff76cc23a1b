"""Sums of squares over the rows or columns of tensors, and tensors scaled row by row and column by column.

An element at place e of a dense tensor's memory belongs to group j = (e // B) % J of a dimension of J indices with
distance B. With A = n / (J B), the group's own elements are numbered k = a B + b and lie at (a J + j) B + b.

Sums read each element once per kind of group; scaling reads weight and gradient and writes the gradient. Each program
adds up a piece of some neighbouring groups; the last one at the same groups merges their pieces in order, in float64:
no float atomics, and repeatable bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import ROW_ADDRESS, ROW_EXTRA, ROW_FIRST_CHUNK, ROW_LENGTH, is_aligned, is_last, narrow, wide
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch

#: groups at a time, and elements of each that one program adds up: neighbours in memory where B is long, and else
LONG_GROUPS, LONG_PIECE = 8, 4096
SHORT_GROUPS, SHORT_PIECE = 32, 1024
#: the shortest B that counts as long: a 128-byte line of float32
LONG = 32
#: a table row of sums: ..., J, B, elements of a group, pieces of a group, place of the first sum, place of the counter
SUMS_WIDTH = 10
#: a table row of scales: ..., then for both kinds of groups: place of the first factor, J, B, and what divides by them
SIDE_WIDTH = 7
SCALES_WIDTH = 4 + 2 * SIDE_WIDTH
#: what J and B have to stay under
LIMIT = (1 << 31) - CHUNK

_CHUNK = tl.constexpr(CHUNK)
_SUMS_WIDTH, _SCALES_WIDTH = tl.constexpr(SUMS_WIDTH), tl.constexpr(SCALES_WIDTH)
_SIDE_WIDTH = tl.constexpr(SIDE_WIDTH)
_LONG = tl.constexpr(LONG)
_LONG_GROUPS, _LONG_PIECE = tl.constexpr(LONG_GROUPS), tl.constexpr(LONG_PIECE)
_SHORT_GROUPS, _SHORT_PIECE = tl.constexpr(SHORT_GROUPS), tl.constexpr(SHORT_PIECE)
_LANES = tl.constexpr(1024)


@triton.jit
def _piece(
    ptr, block, piece, num_groups, inner, per_group, GROUPS: tl.constexpr, PIECE: tl.constexpr, ALONG: tl.constexpr
):
    """Return the sums of squares of one piece of each of so many neighbouring groups; lanes run along groups or not."""
    STEP: tl.constexpr = _LANES // GROUPS
    group = block * GROUPS + tl.arange(0, GROUPS)
    lanes = tl.arange(0, STEP)
    COMPUTE: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32
    if ALONG:
        sums = tl.zeros((GROUPS, STEP), COMPUTE)
    else:
        sums = tl.zeros((STEP, GROUPS), COMPUTE)
    first = piece * PIECE
    for i in range(tl.cdiv(tl.minimum(per_group - first, PIECE), STEP).to(tl.int32)):
        k = first + i * STEP
        # 32-bit division per element: 64-bit numbers are divided once for all
        t = (k % inner).to(tl.uint32) + lanes.to(tl.uint32)
        outer = k // inner + (t // inner.to(tl.uint32)).to(tl.int64)
        within = (t % inner.to(tl.uint32)).to(tl.int64)
        start = outer * num_groups * inner + within
        if ALONG:
            offs = start[None, :] + (group * inner)[:, None]
            mask = (k + lanes < per_group)[None, :] & (group < num_groups)[:, None]
        else:
            offs = start[:, None] + (group * inner)[None, :]
            mask = (k + lanes < per_group)[:, None] & (group < num_groups)[None, :]
        w = wide(tl.load(ptr + offs, mask=mask, other=0.0))
        sums = tl.fma(w, w, sums)
    return tl.sum(sums, 1 if ALONG else 0).to(tl.float64)


@triton.jit
def _merge(partials_ptr, squares_ptr, counter_ptr, pid, block, piece, pieces, num_groups, sums, GROUPS: tl.constexpr):
    """Write a piece's sums, ``_SHORT_GROUPS`` apart; the last program at these groups adds up all of theirs."""
    lanes = tl.arange(0, GROUPS)
    tl.store(partials_ptr + pid * _SHORT_GROUPS + lanes, sums)
    if is_last(counter_ptr + block, pieces):
        total = tl.zeros((GROUPS,), tl.float64)
        first = pid - piece
        for i in range(pieces):
            # Other programs wrote these: read them from the cache that all of them share.
            total += tl.load(partials_ptr + (first + i) * _SHORT_GROUPS + lanes, cache_modifier=".cg")
        group = block * GROUPS + lanes
        tl.store(squares_ptr + group, total, mask=group < num_groups)


@triton.jit
def _group_squares_kernel(rows_ptr, block_to_tensor_ptr, partials_ptr, counters_ptr, squares_ptr, DTYPE: tl.constexpr):
    """One program per piece of some groups writes ``partials``; the last at these groups writes their ``squares``."""
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(block_to_tensor_ptr + pid).to(tl.int64) * _SUMS_WIDTH
    number = pid - tl.load(row_ptr + ROW_FIRST_CHUNK)
    ptr = tl.load(row_ptr + ROW_ADDRESS).to(tl.pointer_type(DTYPE))
    num_groups, inner = tl.load(row_ptr + ROW_EXTRA), tl.load(row_ptr + ROW_EXTRA + 1)
    per_group, pieces = tl.load(row_ptr + ROW_EXTRA + 2), tl.load(row_ptr + ROW_EXTRA + 3)
    squares_ptr += tl.load(row_ptr + ROW_EXTRA + 4)
    counter_ptr = counters_ptr + tl.load(row_ptr + ROW_EXTRA + 5)
    block, piece = number // pieces, number % pieces
    if inner >= _LONG:
        _merge(
            partials_ptr,
            squares_ptr,
            counter_ptr,
            pid,
            block,
            piece,
            pieces,
            num_groups,
            _piece(ptr, block, piece, num_groups, inner, per_group, _LONG_GROUPS, _LONG_PIECE, True),
            _LONG_GROUPS,
        )
    else:
        _merge(
            partials_ptr,
            squares_ptr,
            counter_ptr,
            pid,
            block,
            piece,
            pieces,
            num_groups,
            _piece(ptr, block, piece, num_groups, inner, per_group, _SHORT_GROUPS, _SHORT_PIECE, False),
            _SHORT_GROUPS,
        )


@triton.jit
def _quotient(t, magic, shift):
    """Divide numbers below 2^31 by the one that the host's magic number belongs to: a multiplication."""
    return tl.umulhi(t << 1, magic) >> shift


@triton.jit
def _factor(factors_ptr, side_ptr, start, offs):
    """Return the factors of a chunk's elements at start + offs, for one kind of groups; any place has one."""
    num_groups, inner = tl.load(side_ptr + 1), tl.load(side_ptr + 2)
    by_groups, by_inner = tl.load(side_ptr + 3).to(tl.uint32), tl.load(side_ptr + 5).to(tl.uint32)
    t = (start % inner).to(tl.uint32) + offs.to(tl.uint32)
    t = (start // inner % num_groups).to(tl.uint32) + _quotient(t, by_inner, tl.load(side_ptr + 6).to(tl.uint32))
    group = t - _quotient(t, by_groups, tl.load(side_ptr + 4).to(tl.uint32)) * num_groups.to(tl.uint32)
    return tl.load(factors_ptr + tl.load(side_ptr) + group)


@triton.jit
def _scale_chunk(
    weight_ptr,
    out_ptr,
    row_ptr,
    factors_ptr,
    start,
    count,
    ACCUMULATE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        mask = (offs < count) if MASKED else None
        other = 0.0 if MASKED else None
        w = wide(tl.load(weight_ptr + offs, mask=mask, other=other))
        f = _factor(factors_ptr, row_ptr + ROW_EXTRA, start, offs)
        if IN_PLACE:  # removed groups become +0.0
            g = tl.where(f == 0.0, 0.0, w * f)
        else:
            f += _factor(factors_ptr, row_ptr + ROW_EXTRA + _SIDE_WIDTH, start, offs)
            g = w * f
        if ACCUMULATE:
            g += wide(tl.load(out_ptr + offs, mask=mask, other=other))
        tl.store(out_ptr + offs, narrow(g, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_scale_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    out_addrs_ptr,
    factors_ptr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk adds the weights, times the sum of their groups' factors, to ``out``, or writes it there.

    In place only the first kind of groups counts.
    """
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(block_to_tensor_ptr + pid).to(tl.int64)
    row_ptr = rows_ptr + tensor * _SCALES_WIDTH
    start = (pid - tl.load(row_ptr + ROW_FIRST_CHUNK)) * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    address = tl.load(row_ptr + ROW_ADDRESS)
    out_address = tl.load(out_addrs_ptr + tensor)
    weight_ptr = address.to(tl.pointer_type(DTYPE))
    out_ptr = out_address.to(tl.pointer_type(DTYPE))
    if (count == _CHUNK) & is_aligned(address) & is_aligned(out_address):
        _scale_chunk(
            tl.multiple_of(weight_ptr, 16) + start,
            tl.multiple_of(out_ptr, 16) + start,
            row_ptr,
            factors_ptr,
            start,
            count,
            ACCUMULATE,
            IN_PLACE,
            BLOCK,
            MASKED=False,
        )
    else:
        _scale_chunk(
            weight_ptr + start,
            out_ptr + start,
            row_ptr,
            factors_ptr,
            start,
            count,
            ACCUMULATE,
            IN_PLACE,
            BLOCK,
            MASKED=True,
        )


def group_pieces(num_groups: int, inner: int, per_group: int) -> tuple[int, int]:
    """Return into how many blocks of groups, and pieces of a group, the sums of a tensor fall."""
    groups, piece = (LONG_GROUPS, LONG_PIECE) if inner >= LONG else (SHORT_GROUPS, SHORT_PIECE)
    return -(-num_groups // groups), -(-per_group // piece)


def side_numbers(base: int, num_groups: int, inner: int) -> tuple[int, ...]:
    """Return what a row of scales says of one kind of groups."""
    numbers = [base, num_groups, inner]
    for divisor in (num_groups, inner):
        shift = (divisor - 1).bit_length()
        numbers += [(1 << (31 + shift)) // divisor + 1, shift]
    return tuple(numbers)


def _scale_constants(dtype: torch.dtype, accumulate: bool, in_place: bool) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ACCUMULATE": accumulate,
        "IN_PLACE": in_place,
        "BLOCK": config("gradient", dtype).block,
    }


def launch_group_squares(
    rows: Tensor, block_to_tensor: Tensor, partials: Tensor, counters: Tensor, squares: Tensor, *, dtype: torch.dtype
) -> None:
    """Fill the sums of squares, float64, of the groups in a table.

    partials: float64, SHORT_GROUPS per program. counters: int32, one per block of groups, zero before and after.
    """
    args = (rows, block_to_tensor, partials, counters, squares)
    options = config("gradient", dtype).options()
    launch(_group_squares_kernel, block_to_tensor.numel(), args, {"DTYPE": TRITON_DTYPES[dtype]}, options)


def launch_group_scale(
    rows: Tensor,
    block_to_tensor: Tensor,
    out_addrs: Tensor,
    factors: Tensor,
    *,
    dtype: torch.dtype,
    accumulate: bool,
    in_place: bool,
) -> None:
    """Add scaled tensors to those at out_addrs (int64, one per table row), or write them there.

    factors: in the dtype of the arithmetic.
    """
    args = (rows, block_to_tensor, out_addrs, factors)
    constants = _scale_constants(dtype, accumulate, in_place)
    launch(_group_scale_kernel, block_to_tensor.numel(), args, constants, config("gradient", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
    sums = tables | {"partials_ptr": "*fp64", "counters_ptr": "*i32", "squares_ptr": "*fp64"}
    listed = []
    for dtype in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        # Any distance between elements: no loads of 16 bytes.
        warps = config("gradient", dtype).warps
        listed.append(Variant(_group_squares_kernel, name, sums, {"DTYPE": TRITON_DTYPES[dtype]}, warps, streams=0))
        scales = tables | {"out_addrs_ptr": "*i64", "factors_ptr": "*fp64" if dtype.itemsize == 8 else "*fp32"}
        for accumulate, in_place in ((True, False), *([(False, True)] if dtype == torch.float32 else [])):
            streams = 2 if accumulate else 1
            listed.append(
                Variant(
                    _group_scale_kernel,
                    f"{name} {'add' if accumulate else 'in place'}",
                    scales,
                    _scale_constants(dtype, accumulate, in_place),
                    config("gradient", dtype).warps,
                    streams,
                    bytes_per_element=(streams + 1) * dtype.itemsize,
                )
            )
    return listed
