"""Magnitudes made smaller in place, by an amount t per parameter group: L1 on the weights themselves.

    proximal:   w <- 0 where |w| <= t, else w - t sign(w)      decoupled:  w <- w - t sign(w)

Each weight is read and written once. Nothing is summed, so the result depends on no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import ROW_ADDRESS, ROW_EXTRA, ROW_LENGTH, is_aligned, locate, narrow, wide
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch

_CHUNK = tl.constexpr(CHUNK)
_WIDTH = tl.constexpr(5)


@triton.jit
def _shrink_chunk(ptr, count, t, PROXIMAL: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if MASKED:
        steps = tl.cdiv(count, BLOCK).to(tl.int32)
    else:
        steps = _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        mask = (offs < count) if MASKED else None
        w = wide(tl.load(ptr + offs, mask=mask, other=0.0 if MASKED else None))
        moved = w - t * ((w > 0).to(w.dtype) - (w < 0).to(w.dtype))
        if PROXIMAL:  # NaN is no such magnitude: it stays
            moved = tl.where(tl.abs(w) <= t, 0.0, moved)
        tl.store(ptr + offs, narrow(moved, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shrink_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    amounts_ptr,
    found_inf_ptr,
    DTYPE: tl.constexpr,
    PROXIMAL: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk shrinks its weights by the amount that the row's last number names, or leaves them."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    amount = tl.load(amounts_ptr + tl.load(row_ptr + ROW_EXTRA))
    if HAS_FOUND_INF:
        amount = tl.where(tl.load(found_inf_ptr) != 0.0, 0.0, amount)
    if amount != 0.0:
        address = tl.load(row_ptr + ROW_ADDRESS)
        start = chunk * _CHUNK
        count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
        t = amount.to(tl.float64 if tl.float64 == DTYPE else tl.float32)
        ptr = address.to(tl.pointer_type(DTYPE))
        if (count == _CHUNK) & is_aligned(address):
            _shrink_chunk(tl.multiple_of(ptr, 16) + start, count, t, PROXIMAL, BLOCK, MASKED=False)
        else:
            _shrink_chunk(ptr + start, count, t, PROXIMAL, BLOCK, MASKED=True)


def _constants(dtype: torch.dtype, proximal: bool, has_found_inf: bool) -> dict:
    block = config("gradient", dtype).block
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "PROXIMAL": proximal,
        "HAS_FOUND_INF": has_found_inf,
        "BLOCK": block,
    }


def launch_shrink(
    rows: Tensor,
    block_to_tensor: Tensor,
    amounts: Tensor,
    found_inf: Tensor | None,
    *,
    dtype: torch.dtype,
    proximal: bool,
) -> None:
    """Shrink the tensors of a table whose rows end with a place in amounts, float64.

    found_inf: a float32 that is not 0 where nothing is to change.
    """
    args = (rows, block_to_tensor, amounts, amounts if found_inf is None else found_inf)
    constants = _constants(dtype, proximal, found_inf is not None)
    launch(_shrink_kernel, block_to_tensor.numel(), args, constants, config("gradient", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernel that the code generation check compiles."""
    signature = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "amounts_ptr": "*fp64", "found_inf_ptr": "*fp32"}
    return [
        Variant(
            _shrink_kernel,
            f"{str(dtype).removeprefix('torch.')} {'proximal' if proximal else 'decoupled'}",
            signature,
            _constants(dtype, proximal, not proximal),
            config("gradient", dtype).warps,
            bytes_per_element=2 * dtype.itemsize,
        )
        for dtype in TRITON_DTYPES
        for proximal in ((True, False) if dtype == torch.float32 else (True,))
    ]
