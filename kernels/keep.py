"""Enforce a mask in place: what its bits remove becomes +0.0, by selection, so that NaN and inf go too.

Bit j of word i of a chunk stands for its element 1024 j + i: lanes that read neighbours hold neighbouring words, and
one row of 1024 words, read once, serves the whole chunk. Per fp32 element 4 bytes are read, 4 written and 1/8 read of
the mask. Weights and the states of an optimizer are rows of one table, each with the address of its words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import LANES, ROW_ADDRESS, ROW_LENGTH, is_aligned, locate
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch

_CHUNK = tl.constexpr(CHUNK)

# Extra column of the table: the address of the words.
_COL_WORDS = tl.constexpr(4)
_WIDTH = tl.constexpr(5)


@triton.jit
def _keep_chunk(ptr, words_ptr, count, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    ROWS: tl.constexpr = BLOCK // LANES
    lanes = tl.arange(0, LANES)
    row = tl.arange(0, ROWS)[:, None]
    words = tl.load(words_ptr + lanes, mask=lanes < count, other=0) if MASKED else tl.load(words_ptr + lanes)
    words = words[None, :] >> row
    steps = tl.cdiv(count, BLOCK).to(tl.int32) if MASKED else _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + row * LANES + lanes[None, :]
        mask = offs < count if MASKED else None
        x = tl.load(ptr + offs, mask=mask, other=0.0 if MASKED else None)
        tl.store(ptr + offs, tl.where(((words >> (i * ROWS)) & 1) != 0, x, 0.0), mask=mask)


@triton.jit
def _keep_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    GENERAL: tl.constexpr,
):
    """One program per chunk writes +0.0 to the elements of its tensor whose bit is 0."""
    _, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    address = tl.load(row_ptr + ROW_ADDRESS)
    words_address = tl.load(row_ptr + _COL_WORDS)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    ptr = address.to(tl.pointer_type(DTYPE))
    words_ptr = words_address.to(tl.pointer_type(tl.int32))
    if (count == _CHUNK) & is_aligned(address | words_address):
        full_ptr = tl.multiple_of(ptr, 16) + start
        _keep_chunk(full_ptr, tl.multiple_of(words_ptr, 16) + chunk * LANES, count, BLOCK, MASKED=False)
    else:
        _keep_chunk(ptr + start, words_ptr + chunk * LANES, count, GENERAL, MASKED=True)


def _constants(dtype: torch.dtype) -> dict:
    settings = config("mask", dtype)
    return {"DTYPE": TRITON_DTYPES[dtype], "BLOCK": settings.block, "GENERAL": settings.general}


def launch_keep(rows: Tensor, block_to_tensor: Tensor, *, dtype: torch.dtype) -> None:
    """Enforce the words of each row (int64 [T, 5], the last column their address) on its tensor, in memory order."""
    options = config("mask", dtype).options()
    launch(_keep_kernel, block_to_tensor.numel(), (rows, block_to_tensor), _constants(dtype), options)


def variants() -> list[Variant]:
    """Return the forms of this module's kernel that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
    return [
        Variant(
            _keep_kernel,
            str(dtype).removeprefix("torch."),
            tables,
            _constants(dtype),
            config("mask", dtype).warps,
            bytes_per_element=2 * dtype.itemsize + 1 / 8,
        )
        for dtype in TRITON_DTYPES
    ]
