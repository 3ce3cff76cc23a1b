"""Selection in groups: of every m consecutive weights the n largest stay, each group ranked by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    COLUMNS,
    LAYER,
    LAYOUT_WIDTH,
    ROW_ADDRESS,
    ROW_LENGTH,
    is_aligned,
    is_contiguous,
    is_periodic,
    locate,
    magnitude_key,
    score_key,
    strided_offsets,
    write_kept,
)
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch
from .scores import MAGNITUDE, KeyFormula, line_forms

_COLUMNS, _LAYER = tl.constexpr(COLUMNS), tl.constexpr(LAYER)

# Extra columns of an n:m table, whose unit is a group: distance of two elements of a group, and layout of the
# groups' first elements; in the tensor, then in the mask; and the address of a score's numbers with the same two.
_COL_STEP = tl.constexpr(4)
_COL_GROUPS = tl.constexpr(5)
_COL_OUT_STEP = tl.constexpr(5 + LAYOUT_WIDTH)
_COL_OUT_GROUPS = tl.constexpr(6 + LAYOUT_WIDTH)
_COL_NUMBERS = tl.constexpr(6 + 2 * LAYOUT_WIDTH)
_COL_NUMBERS_STEP = tl.constexpr(7 + 2 * LAYOUT_WIDTH)
_COL_NUMBERS_GROUPS = tl.constexpr(8 + 2 * LAYOUT_WIDTH)
_NM_WIDTH = tl.constexpr(8 + 3 * LAYOUT_WIDTH)


@triton.jit
def _ordered(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _four_sorted(a, b, c, d):
    a, b = _ordered(a, b)
    c, d = _ordered(c, d)
    a, c = _ordered(a, c)
    b, d = _ordered(b, d)
    b, c = _ordered(b, c)
    return a, b, c, d


@triton.jit
def _halves(x):
    """Return the even and the odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _eight_sorted(x):
    """Return the values of each row of [groups, 8], the largest first, as eight columns (Batcher's odd-even merge)."""
    even, odd = _halves(x)
    a, c = _halves(even)
    b, d = _halves(odd)
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    c0, c1 = _halves(c)
    d0, d1 = _halves(d)
    x0, x1, x2, x3 = _four_sorted(a0, a1, b0, b1)
    x4, x5, x6, x7 = _four_sorted(c0, c1, d0, d1)
    x0, x4 = _ordered(x0, x4)
    x1, x5 = _ordered(x1, x5)
    x2, x6 = _ordered(x2, x6)
    x3, x7 = _ordered(x3, x7)
    x2, x4 = _ordered(x2, x4)
    x3, x5 = _ordered(x3, x5)
    x1, x2 = _ordered(x1, x2)
    x3, x4 = _ordered(x3, x4)
    x5, x6 = _ordered(x5, x6)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _nth_of_sixteen(key, N: tl.constexpr):
    """Return the N-th largest key of each group [groups, 16], at least 0."""
    even, odd = _halves(key)
    a, b = _eight_sorted(even), _eight_sorted(odd)
    nth = tl.zeros_like(a[0])
    for i in tl.static_range(9):  # the first i of one half and the first N - i of the other are the N largest
        if i == N:
            nth = tl.maximum(nth, a[i - 1])
        elif i == 0 and N <= 8:
            nth = tl.maximum(nth, b[N - 1])
        elif i > 0 and i < N and N - i <= 8:
            nth = tl.maximum(nth, tl.minimum(a[i - 1], b[N - i - 1]))
    return nth


@triton.jit
def _among_largest(key, cols, N: tl.constexpr, WIDTH: tl.constexpr, KEY_BITS: tl.constexpr):
    """Tell which keys of each group [groups, WIDTH] are among its N largest; of equal ones the earlier."""
    if WIDTH == 16 and KEY_BITS == 16:
        key = (key << 4) | (15 - cols)  # no two are equal
        stays = key >= _nth_of_sixteen(key, N)
    elif WIDTH == 16:
        cut = _nth_of_sixteen(key, N)
        above, tied = key > cut, (key == cut).to(tl.int32)
        left = N - tl.sum(above.to(tl.int32), axis=1)[:, None]
        stays = above | ((tied != 0) & (tl.cumsum(tied, axis=1) <= left))
    else:
        rank = tl.zeros_like(cols)
        for j in tl.static_range(WIDTH):
            rival = tl.sum(tl.where(cols == j, key, 0), axis=1)[:, None]
            # An earlier rival wins when it is as large, a later one only when it is larger.
            rank += (rival >= key + (cols <= j).to(key.dtype)).to(tl.int32)
        stays = rank < N
    return stays


@triton.jit
def _full_numbers(ptr, first, period, offs, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Return the numbers beside elements ``offs`` behind the start of group ``first``, which follow without gaps."""
    if KIND == _LAYER:
        a = tl.load(ptr)
    elif KIND == _COLUMNS:
        # A division per group, not per element, as those of a group are loaded together.
        group = (first + (offs // WIDTH).to(tl.uint32)) % period
        place = group.to(tl.int64) * WIDTH + offs % WIDTH
        a = tl.load(ptr + tl.max_contiguous(tl.multiple_of(place, WIDTH), WIDTH))
    else:
        a = tl.load(ptr + first * WIDTH + offs)
    return a


@triton.jit
def _nm_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    out_addrs_ptr,
    DTYPE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    TO_MASK: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program per GROUPS groups of M keeps the N largest of each, in place or as masks at ``out_addrs``."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _NM_WIDTH)
    address = tl.load(row_ptr + ROW_ADDRESS)
    step = tl.load(row_ptr + _COL_STEP)
    start = chunk * GROUPS
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, GROUPS)
    ptr = address.to(tl.pointer_type(DTYPE))
    full = (count == GROUPS) & is_aligned(address) & (step == 1) & is_contiguous(row_ptr + _COL_GROUPS, WIDTH)
    if TO_MASK:
        out_address = tl.load(out_addrs_ptr + tensor)
        out_ptr = out_address.to(tl.pointer_type(tl.uint8))
        out_step = tl.load(row_ptr + _COL_OUT_STEP)
        out_groups_ptr = row_ptr + _COL_OUT_GROUPS
        full = full & is_aligned(out_address) & (out_step == 1) & is_contiguous(out_groups_ptr, WIDTH)
    else:
        out_ptr = ptr
        out_step = step
        out_groups_ptr = row_ptr + _COL_GROUPS
    numbers_groups_ptr = row_ptr + _COL_NUMBERS_GROUPS
    if SCORE is None:
        numbers_ptr = ptr  # not read
    else:
        numbers_address = tl.load(row_ptr + _COL_NUMBERS)
        numbers_ptr = numbers_address.to(tl.pointer_type(AUX_DTYPE))
        numbers_step = tl.load(row_ptr + _COL_NUMBERS_STEP)
        if KIND == _COLUMNS:
            full = full & is_aligned(numbers_address) & (numbers_step == 1) & is_periodic(numbers_groups_ptr, WIDTH)
        elif KIND != _LAYER:
            full = full & is_aligned(numbers_address) & (numbers_step == 1) & is_contiguous(numbers_groups_ptr, WIDTH)
    TILE: tl.constexpr = BLOCK // WIDTH
    cols = tl.broadcast_to(tl.arange(0, WIDTH)[None, :], (TILE, WIDTH))
    if full & (M == WIDTH):
        lanes = tl.arange(0, BLOCK)
        first, period = start, 0
        full_numbers_ptr = numbers_ptr if KIND == _LAYER or SCORE is None else tl.multiple_of(numbers_ptr, 16)
        if KIND == _COLUMNS:
            groups_in_row = tl.load(numbers_groups_ptr + 1)
            first, period = (start % groups_in_row).to(tl.uint32), groups_in_row.to(tl.uint32)
        full_ptr = tl.multiple_of(ptr, 16) + start * WIDTH
        full_out_ptr = tl.multiple_of(out_ptr, 16) + start * WIDTH
        for i in range(GROUPS // TILE):
            x = tl.load(full_ptr + i * BLOCK + lanes)
            if SCORE is None:
                key = magnitude_key(x, KEY_BITS)
            else:
                a = _full_numbers(full_numbers_ptr, first, period, i * BLOCK + lanes, KIND, WIDTH)
                key = score_key(x, a, KEY_BITS, SCORE)
            key = tl.reshape(key, (TILE, WIDTH))
            stays = tl.reshape(_among_largest(key, cols, N, WIDTH, KEY_BITS), (BLOCK,))
            write_kept(full_out_ptr, i * BLOCK + lanes, x, stays, None, TO_MASK)
    else:
        for i in range(tl.cdiv(count, TILE).to(tl.int32)):
            index = i * TILE + tl.arange(0, TILE)
            mask = (index < count)[:, None] & (cols < M)
            where = strided_offsets(row_ptr + _COL_GROUPS, start + index)[:, None] + cols * step
            x = tl.load(ptr + where, mask=mask, other=0.0)
            if SCORE is None:
                key = magnitude_key(x, KEY_BITS)
            else:
                if KIND == _LAYER:
                    a = tl.load(numbers_ptr)
                else:
                    place = strided_offsets(numbers_groups_ptr, start + index)[:, None] + cols * numbers_step
                    a = tl.load(numbers_ptr + place, mask=mask, other=0.0)
                key = score_key(x, a, KEY_BITS, SCORE)
            key = tl.where(mask, key, -1)
            stays = _among_largest(key, cols, N, WIDTH, KEY_BITS)
            if TO_MASK:
                where = strided_offsets(out_groups_ptr, start + index)[:, None] + cols * out_step
            write_kept(out_ptr, where, x, stays, mask, TO_MASK)


def groups_per_chunk(m: int) -> int:
    """Return the number of n:m groups that one program handles."""
    return CHUNK // triton.next_power_of_2(m)


def _nm_constants(dtype: torch.dtype, n: int, m: int, to_mask: bool, score: KeyFormula = MAGNITUDE) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "KEY_BITS": 8 * score.key_dtype(dtype).itemsize,
        **score.constants(),
        "TO_MASK": to_mask,
        "N": n,
        "M": m,
        "WIDTH": triton.next_power_of_2(m),
        "BLOCK": score.settings("nm", dtype).block,
        "GROUPS": groups_per_chunk(m),
    }


def launch_nm(
    rows: Tensor,
    block_to_tensor: Tensor,
    out_addrs: Tensor | None,
    *,
    dtype: torch.dtype,
    n: int,
    m: int,
    score: KeyFormula = MAGNITUDE,
) -> None:
    """Keep the n largest of each group of m (m <= 16): in place, or as bool masks at out_addrs."""
    args = rows, block_to_tensor, rows if out_addrs is None else out_addrs
    constants = _nm_constants(dtype, n, m, out_addrs is not None, score)
    launch(_nm_kernel, block_to_tensor.numel(), args, constants, score.settings("nm", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    nm = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "out_addrs_ptr": "*i64"}
    listed = []
    for dtype in TRITON_DTYPES:
        chosen = config("nm", dtype)
        for n, m in ((2, 4), (1, 4), (2, 3), (4, 8), (8, 16)):
            label = f"{dtype} {n}:{m}".replace("torch.", "")
            constants = _nm_constants(dtype, n, m, False)
            streams = int(constants["WIDTH"] == m)
            moved = 2 * dtype.itemsize if streams else None
            essential = (n, m) in ((2, 4), (2, 3), (8, 16))
            listed.append(
                Variant(_nm_kernel, label, nm, constants, chosen.warps, streams, essential, moved, chosen.options())
            )
        constants = _nm_constants(dtype, 2, 4, True)
        label = f"{dtype} 2:4 mask".replace("torch.", "")
        moved = dtype.itemsize + 1
        listed.append(Variant(_nm_kernel, label, nm, constants, chosen.warps, 1, True, moved, chosen.options()))
    for label, dtype, formula, streams, moved in line_forms():
        chosen, essential = formula.settings("nm", dtype), dtype == torch.float32
        label = f"{dtype} 2:4 {label}".replace("torch.", "")
        constants = _nm_constants(dtype, 2, 4, False, formula)
        listed.append(
            Variant(_nm_kernel, label, nm, constants, chosen.warps, streams, essential, moved, chosen.options())
        )
    return listed
