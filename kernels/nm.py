"""Selection in groups: of every m consecutive weights the n largest stay, each group ranked by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    LAYOUT_WIDTH,
    ROW_ADDRESS,
    ROW_LENGTH,
    is_aligned,
    is_contiguous,
    locate,
    magnitude_key,
    strided_offsets,
    write_kept,
)
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch

# Extra columns of an n:m table, whose unit is a group: distance of two elements of a group, and layout of the
# groups' first elements; in the tensor, then in the mask.
_COL_STEP = tl.constexpr(4)
_COL_GROUPS = tl.constexpr(5)
_COL_OUT_STEP = tl.constexpr(5 + LAYOUT_WIDTH)
_COL_OUT_GROUPS = tl.constexpr(6 + LAYOUT_WIDTH)
_NM_WIDTH = tl.constexpr(6 + 2 * LAYOUT_WIDTH)


@triton.jit
def _among_largest(key, cols, N: tl.constexpr, WIDTH: tl.constexpr):
    """Tell which keys of each group [groups, WIDTH] are among its N largest; of equal ones the earlier."""
    rank = tl.zeros_like(cols)
    for j in tl.static_range(WIDTH):
        rival = tl.sum(tl.where(cols == j, key, 0), axis=1)[:, None]
        # An earlier rival wins when it is as large, a later one only when it is larger.
        rank += (rival >= key + (cols <= j).to(key.dtype)).to(tl.int32)
    return rank < N


@triton.jit
def _nm_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    out_addrs_ptr,
    DTYPE: tl.constexpr,
    KEY_BITS: tl.constexpr,
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
    TILE: tl.constexpr = BLOCK // WIDTH
    cols = tl.broadcast_to(tl.arange(0, WIDTH)[None, :], (TILE, WIDTH))
    if full & (M == WIDTH):
        lanes = tl.arange(0, BLOCK)
        full_ptr = tl.multiple_of(ptr, 16) + start * WIDTH
        full_out_ptr = tl.multiple_of(out_ptr, 16) + start * WIDTH
        for i in range(GROUPS // TILE):
            x = tl.load(full_ptr + i * BLOCK + lanes)
            key = tl.reshape(magnitude_key(x, KEY_BITS), (TILE, WIDTH))
            stays = tl.reshape(_among_largest(key, cols, N, WIDTH), (BLOCK,))
            write_kept(full_out_ptr, i * BLOCK + lanes, x, stays, None, TO_MASK)
    else:
        for i in range(tl.cdiv(count, TILE).to(tl.int32)):
            index = i * TILE + tl.arange(0, TILE)
            mask = (index < count)[:, None] & (cols < M)
            where = strided_offsets(row_ptr + _COL_GROUPS, start + index)[:, None] + cols * step
            x = tl.load(ptr + where, mask=mask, other=0.0)
            key = tl.where(mask, magnitude_key(x, KEY_BITS), -1)
            stays = _among_largest(key, cols, N, WIDTH)
            if TO_MASK:
                where = strided_offsets(out_groups_ptr, start + index)[:, None] + cols * out_step
            write_kept(out_ptr, where, x, stays, mask, TO_MASK)


def groups_per_chunk(m: int) -> int:
    """Return the number of n:m groups that one program handles."""
    return CHUNK // triton.next_power_of_2(m)


def _nm_constants(dtype: torch.dtype, n: int, m: int, to_mask: bool) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "KEY_BITS": 8 * dtype.itemsize,
        "TO_MASK": to_mask,
        "N": n,
        "M": m,
        "WIDTH": triton.next_power_of_2(m),
        "BLOCK": config("nm", dtype).block,
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
) -> None:
    """Keep the n largest of each group of m (m <= 16): in place, or as bool masks at out_addrs."""
    args = rows, block_to_tensor, rows if out_addrs is None else out_addrs
    constants = _nm_constants(dtype, n, m, out_addrs is not None)
    launch(_nm_kernel, block_to_tensor.numel(), args, constants, config("nm", dtype).options())


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
    return listed
