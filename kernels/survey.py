"""The look at all weights before a record is written: zeros and NaN of every tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import ROW_ADDRESS, ROW_EXTRA, ROW_LENGTH, ROW_POSITION, is_aligned, locate, magnitude_key
from .launch import CHUNK, INF_KEYS, TRITON_DTYPES, Variant, config, launch

_CHUNK = tl.constexpr(CHUNK)


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


def _survey_constants(dtype: torch.dtype) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "INF": INF_KEYS[dtype],
        "KEY_BITS": 8 * dtype.itemsize,
        "BLOCK": config("survey", dtype).block,
    }


def launch_survey(rows: Tensor, block_to_tensor: Tensor, zeros: Tensor, bad: Tensor, *, dtype: torch.dtype) -> None:
    """Add every tensor's zeros to zeros (int64 [L]) and mark NaN in bad (uint8 [L])."""
    args = rows, block_to_tensor, zeros, bad
    launch(_survey_kernel, block_to_tensor.numel(), args, _survey_constants(dtype), config("survey", dtype).options())


def variants() -> list[Variant]:
    signature = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "zeros_ptr": "*i64", "bad_ptr": "*u8"}
    listed = []
    for dtype in TRITON_DTYPES:
        label = str(dtype).removeprefix("torch.")
        warps = config("survey", dtype).warps
        constants = _survey_constants(dtype)
        listed.append(Variant(_survey_kernel, label, signature, constants, warps, bytes_per_element=dtype.itemsize))
    return listed
