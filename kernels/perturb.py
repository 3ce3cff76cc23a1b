"""Perturbing weights along a gradient, and taking that back: three multi-tensor launches per dtype.

    squares = sum (T g)^2        w <- w + rho T^2 g / (sqrt(squares) + 1e-12)        w <- saved

with T = |w| + eta (ASAM), 1 (SAM), and 0 for weights that are zero where those are kept. The first reads the gradient
(and the weight where T depends on it), the second weight and gradient and writes weight and copy, the third reads the
copy and writes the weight: 4, 16 and 8 bytes per fp32 weight. Each program reduces one chunk; the last one to finish
adds all chunks in fixed order in float64, so the norm is the same bit for bit at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    LANES,
    ROW_ADDRESS,
    ROW_LENGTH,
    is_aligned,
    is_last,
    locate,
    narrow,
    tree_sum,
    wide,
)
from .launch import CHUNK, TRITON_DTYPES, Variant, config, launch

_CHUNK = tl.constexpr(CHUNK)

# A row of the table; rho and eta are the bits of float64 numbers.
ROW = ("address", "numel", "first_chunk", "position", "saved", "rho", "eta")
_WIDTH = tl.constexpr(len(ROW))
_SAVED = tl.constexpr(ROW.index("saved"))
_RHO = tl.constexpr(ROW.index("rho"))
_ETA = tl.constexpr(ROW.index("eta"))

# Partials added at a time.
_MERGE = tl.constexpr(1024)


@triton.jit
def _number(row_ptr, COLUMN: tl.constexpr):
    return tl.load(row_ptr + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def _scale(w, eta, ADAPTIVE: tl.constexpr, KEEP_ZEROS: tl.constexpr):
    """Return T of some weights; a negative eta stands for T = 1."""
    t = tl.where(eta < 0, 1.0, tl.abs(w) + eta) if ADAPTIVE else w * 0.0 + 1.0
    return tl.where(w == 0, 0.0, t) if KEEP_ZEROS else t


@triton.jit
def _load(ptr, offs, count, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(ptr + offs, mask=offs < count, other=0.0)
    else:
        x = tl.load(ptr + offs)
    return x


@triton.jit
def _direction(
    weight_ptr, grad_ptr, offs, count, eta, ADAPTIVE: tl.constexpr, KEEP_ZEROS: tl.constexpr, MASKED: tl.constexpr
):
    """Return T g of one block."""
    x = wide(_load(grad_ptr, offs, count, MASKED)).to(eta.dtype)
    if ADAPTIVE or KEEP_ZEROS:
        w = wide(_load(weight_ptr, offs, count, MASKED))
        x *= _scale(w, eta, ADAPTIVE, KEEP_ZEROS)
    return x


@triton.jit
def _chunk_squares(
    weight_ptr, grad_ptr, count, eta, ADAPTIVE: tl.constexpr, KEEP_ZEROS: tl.constexpr, MASKED: tl.constexpr
):
    lanes = tl.arange(0, LANES)
    x = _direction(weight_ptr, grad_ptr, lanes, count, eta, ADAPTIVE, KEEP_ZEROS, MASKED)
    total = x * x
    steps = tl.cdiv(count, LANES).to(tl.int32) if MASKED else _CHUNK // LANES
    for i in range(1, steps):
        offs = i * LANES + lanes
        x = _direction(weight_ptr, grad_ptr, offs, count, eta, ADAPTIVE, KEEP_ZEROS, MASKED)
        total = tl.fma(x, x, total)
    return tree_sum(total).to(tl.float64)


@triton.jit
def _squares_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    grad_addrs_ptr,
    partials_ptr,
    counter_ptr,
    squares_ptr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
):
    """One program per chunk writes ``partials``; the last of all writes their sum to ``squares``."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    address = tl.load(row_ptr + ROW_ADDRESS)
    grad_address = tl.load(grad_addrs_ptr + tensor)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    eta = _number(row_ptr, _ETA).to(COMPUTE)
    weight_ptr = address.to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(GRAD_DTYPE))
    if (count == _CHUNK) & is_aligned(address | grad_address):
        weight_ptr, grad_ptr = tl.multiple_of(weight_ptr, 16) + start, tl.multiple_of(grad_ptr, 16) + start
        part = _chunk_squares(weight_ptr, grad_ptr, count, eta, ADAPTIVE, KEEP_ZEROS, MASKED=False)
    else:
        part = _chunk_squares(weight_ptr + start, grad_ptr + start, count, eta, ADAPTIVE, KEEP_ZEROS, MASKED=True)
    tl.store(partials_ptr + tl.program_id(0), part)

    programs = tl.num_programs(0)
    if is_last(counter_ptr, programs):
        lanes = tl.arange(0, _MERGE)
        total = tl.zeros((_MERGE,), tl.float64)
        for base in range(0, programs, _MERGE):
            # Other programs wrote these: read them from the cache that all of them share.
            offs = base + lanes
            total += tl.load(partials_ptr + offs, mask=offs < programs, other=0.0, cache_modifier=".cg")
        tl.store(squares_ptr, tree_sum(total))


@triton.jit
def _ascend_chunk(
    weight_ptr,
    grad_ptr,
    saved_ptr,
    count,
    eta,
    scale,
    ADAPTIVE: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    steps = tl.cdiv(count, BLOCK).to(tl.int32) if MASKED else _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        mask = (offs < count) if MASKED else None
        raw = _load(weight_ptr, offs, count, MASKED)
        w = wide(raw)
        x = wide(_load(grad_ptr, offs, count, MASKED)).to(w.dtype)
        if ADAPTIVE or KEEP_ZEROS:
            t = _scale(w, eta, ADAPTIVE, KEEP_ZEROS)
            x = t * x * t
        x = tl.where(scale == 0.0, 0.0, x)
        tl.store(saved_ptr + offs, raw, mask=mask)
        tl.store(weight_ptr + offs, narrow(tl.fma(x, scale, w), raw.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_squares"])
def _ascend_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    grad_addrs_ptr,
    squares_ptr,
    num_squares,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    KEEP_ZEROS: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk saves its weights and perturbs them."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    address, saved_address = tl.load(row_ptr + ROW_ADDRESS), tl.load(row_ptr + _SAVED)
    grad_address = tl.load(grad_addrs_ptr + tensor)
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    scale = _number(row_ptr, _RHO)
    if NORMALISED:
        total = tl.load(squares_ptr)
        for i in range(1, num_squares):
            total += tl.load(squares_ptr + i)
        # What is not finite leads nowhere: then nothing moves.
        scale = tl.where(total < float("inf"), scale / (tl.sqrt(total) + 1e-12), 0.0)
    scale = scale.to(COMPUTE)
    eta = _number(row_ptr, _ETA).to(COMPUTE)
    weight_ptr = address.to(tl.pointer_type(DTYPE))
    saved_ptr = saved_address.to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(GRAD_DTYPE))
    if (count == _CHUNK) & is_aligned(address | grad_address | saved_address):
        _ascend_chunk(
            tl.multiple_of(weight_ptr, 16) + start,
            tl.multiple_of(grad_ptr, 16) + start,
            tl.multiple_of(saved_ptr, 16) + start,
            count,
            eta,
            scale,
            ADAPTIVE,
            KEEP_ZEROS,
            BLOCK,
            MASKED=False,
        )
    else:
        _ascend_chunk(
            weight_ptr + start,
            grad_ptr + start,
            saved_ptr + start,
            count,
            eta,
            scale,
            ADAPTIVE,
            KEEP_ZEROS,
            BLOCK,
            MASKED=True,
        )


@triton.jit
def _mask_block(weight_ptr, grad_ptr, offs, count, masked, MASKED: tl.constexpr):
    if masked:
        zero = _load(weight_ptr, offs, count, MASKED) == 0.0
        g = _load(grad_ptr, offs, count, MASKED)
        tl.store(grad_ptr + offs, tl.where(zero, 0.0, g), mask=(offs < count) if MASKED else None)


@triton.jit
def _restore_chunk(
    weight_ptr, saved_ptr, grad_ptr, count, masked, MASK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    lanes = tl.arange(0, BLOCK)
    steps = tl.cdiv(count, BLOCK).to(tl.int32) if MASKED else _CHUNK // BLOCK
    for i in range(steps):
        offs = i * BLOCK + lanes
        mask = (offs < count) if MASKED else None
        if MASK:
            _mask_block(weight_ptr, grad_ptr, offs, count, masked, MASKED)
        tl.store(weight_ptr + offs, _load(saved_ptr, offs, count, MASKED), mask=mask)


@triton.jit
def _restore_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    grad_addrs_ptr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk puts its saved weights back; with MASK, gradients of zero weights become 0 before that."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    address, saved_address = tl.load(row_ptr + ROW_ADDRESS), tl.load(row_ptr + _SAVED)
    grad_address = tl.load(grad_addrs_ptr + tensor) if MASK else saved_address
    start = chunk * _CHUNK
    count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
    weight_ptr = address.to(tl.pointer_type(DTYPE))
    saved_ptr = saved_address.to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(GRAD_DTYPE))
    masked = grad_address != 0
    if (count == _CHUNK) & is_aligned(address | saved_address | grad_address):
        _restore_chunk(
            tl.multiple_of(weight_ptr, 16) + start,
            tl.multiple_of(saved_ptr, 16) + start,
            tl.multiple_of(grad_ptr, 16) + start,
            count,
            masked,
            MASK,
            BLOCK,
            MASKED=False,
        )
    else:
        _restore_chunk(weight_ptr + start, saved_ptr + start, grad_ptr + start, count, masked, MASK, BLOCK, MASKED=True)


def _kinds(dtype: torch.dtype, grad_dtype: torch.dtype) -> dict:
    return {"DTYPE": TRITON_DTYPES[dtype], "GRAD_DTYPE": TRITON_DTYPES[grad_dtype]}


def _forms(adaptive: bool, keep_zeros: bool) -> dict:
    return {"ADAPTIVE": adaptive, "KEEP_ZEROS": keep_zeros}


def launch_squares(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor,
    partials: Tensor,
    counter: Tensor,
    squares: Tensor,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    adaptive: bool,
    keep_zeros: bool,
) -> None:
    """Write the sum of all (T g)^2 of a table to squares (float64, one element).

    partials: float64, one per chunk. counter: int32, one element, zero before and after.
    """
    args = (rows, block_to_tensor, grad_addrs, partials, counter, squares)
    constants = _kinds(dtype, grad_dtype) | _forms(adaptive, keep_zeros)
    launch(_squares_kernel, block_to_tensor.numel(), args, constants, config("squares", dtype).options())


def launch_ascend(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor,
    squares: Tensor | None,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    adaptive: bool,
    keep_zeros: bool,
) -> None:
    """Save the weights of a table and perturb them; squares: float64 [K], their sum counts, None for rho as it is."""
    settings = config("ascend", dtype)
    normalised = squares is not None
    args = (rows, block_to_tensor, grad_addrs, squares if normalised else rows, squares.numel() if normalised else 0)
    constants = _kinds(dtype, grad_dtype) | _forms(adaptive, keep_zeros)
    constants |= {"NORMALISED": normalised, "BLOCK": settings.block}
    launch(_ascend_kernel, block_to_tensor.numel(), args, constants, settings.options())


def launch_restore(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor | None,
    *,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """Put the saved weights of a table back; with grad_addrs the gradients there (0: none) become 0 at zero weights."""
    settings = config("ascend", dtype)
    constants = _kinds(dtype, grad_dtype) | {"MASK": grad_addrs is not None, "BLOCK": settings.block}
    args = (rows, block_to_tensor, rows if grad_addrs is None else grad_addrs)
    launch(_restore_kernel, block_to_tensor.numel(), args, constants, settings.options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "grad_addrs_ptr": "*i64"}
    listed = []
    for dtype in TRITON_DTYPES:
        name, size = str(dtype).removeprefix("torch."), dtype.itemsize
        kinds = _kinds(dtype, dtype)
        signature = {**tables, "partials_ptr": "*fp64", "counter_ptr": "*i32", "squares_ptr": "*fp64"}
        warps = config("squares", dtype).warps
        for label, forms, streams in (("plain", (False, False), 1), ("adaptive, zeros kept", (True, True), 2)):
            constants = kinds | _forms(*forms)
            listed.append(
                Variant(
                    *(_squares_kernel, f"{name} {label}", signature, constants, warps, streams),
                    essential=dtype == torch.float32,
                    bytes_per_element=streams * size,
                )
            )
        settings = config("ascend", dtype)
        signature = {**tables, "squares_ptr": "*fp64", "num_squares": "i32"}
        for label, forms in (("plain", (False, False)), ("adaptive, zeros kept", (True, True))):
            constants = {**kinds, **_forms(*forms), "NORMALISED": True, "BLOCK": settings.block}
            listed.append(
                Variant(
                    *(_ascend_kernel, f"{name} {label}", signature, constants, settings.warps, 2),
                    essential=dtype == torch.float32,
                    bytes_per_element=4 * size,
                )
            )
        for mask in (False, True):
            constants = {**kinds, "MASK": mask, "BLOCK": settings.block}
            listed.append(
                Variant(
                    *(_restore_kernel, f"{name}{' masking gradients' if mask else ''}", tables, constants),
                    *(settings.warps, 3 if mask else 1),
                    essential=dtype == torch.float32,
                    bytes_per_element=(5 if mask else 2) * size,
                )
            )
    return listed
