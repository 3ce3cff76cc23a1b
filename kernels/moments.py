"""Moments of smooth magnitudes with the coefficients of a penalty, and the penalty's gradient.

With a = sqrt(w^2 + r), s = w / a and p = a of the tensor's first element, per tensor of n elements:

    shift = mean(a - p)    m = p + shift    V = mean((a - p - shift)^2)
    gradient = lam s (b + c ((a - p) - shift)),    b = (df/dm) / n,    c = 2 (df/dV) / n

Moments read each element once, the gradient reads weight and gradient and writes the gradient. Each program
reduces one chunk about the magnitude of its own first element; the last one to finish a tensor merges its chunks in
fixed order in float64, so the result depends on no order of execution and a tensor of equal magnitudes has V = 0 and
a gradient of zero, exactly. The fused step reduces the weights it writes by the same helpers, to the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    LANES,
    ROW_ADDRESS,
    ROW_EXTRA,
    ROW_LENGTH,
    ROW_POSITION,
    from_pair,
    is_aligned,
    is_last,
    locate,
    magnitude,
    narrow,
    tree_sum,
    wide,
)
from .launch import CHUNK, TRITON_DTYPES, Variant, config, float_pair, launch

FAMILIES = ("wcr", "l1", "l2", "hoyer_square", "relative", "log")

_CHUNK = tl.constexpr(CHUNK)
# Partials merged at a time: the same for every dtype, so that the order of the sums is.
_MERGE = tl.constexpr(1024)
_UNROLL = tl.constexpr(4)


@triton.jit
def open_moments(a, lanes, count, MASKED: tl.constexpr):
    """Start the moments of a chunk with its first block of magnitudes: pivot, center, and two sums per lane.

    Deviations are taken from pivot + center. The pivot, the chunk's first magnitude, makes equal ones cancel exactly;
    the center, the block's mean, keeps the sums accurate where that first one is far from the rest.
    """
    pivot = tl.sum(tl.where(lanes == 0, a, 0.0))
    if MASKED:
        d = tl.where(lanes < count, a - pivot, 0.0)
        # by way of float64: 1 / 1024 has to come out as exactly as where it is a constant
        center = tree_sum(d) * (1.0 / tl.minimum(count, LANES).to(tl.float64)).to(a.dtype)
        total = tl.where(lanes < count, d - center, 0.0)
    else:
        d = a - pivot
        center = tree_sum(d) * (1.0 / LANES)
        total = d - center
    return pivot, center, total, total * total


@triton.jit
def add_moments(a, offs, count, state, MASKED: tl.constexpr):
    """Add a further block of the chunk to the state that :func:`open_moments` began."""
    pivot, center, total, squares = state
    d = (a - pivot) - center
    if MASKED:
        d = tl.where(offs < count, d, 0.0)
    return pivot, center, total + d, tl.fma(d, d, squares)


@triton.jit
def close_moments(count, state):
    """Return mean and sum of squared deviations of the chunk's magnitudes, in float64."""
    pivot, center, total, squares = state
    n = count.to(tl.float64)
    excess = tree_sum(total).to(tl.float64)
    mean = pivot.to(tl.float64) + (center.to(tl.float64) + excess / n)
    return mean, tree_sum(squares).to(tl.float64) - excess * excess / n


@triton.jit
def _magnitudes(ptr, offs, count, r, SMOOTH: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        w = wide(tl.load(ptr + offs, mask=offs < count, other=0.0))
    else:
        w = wide(tl.load(ptr + offs))
    a, _ = magnitude(w, r, SMOOTH)
    return a


@triton.jit
def _chunk_moments(ptr, count, r, SMOOTH: tl.constexpr, MASKED: tl.constexpr):
    lanes = tl.arange(0, LANES)
    state = open_moments(_magnitudes(ptr, lanes, count, r, SMOOTH, MASKED), lanes, count, MASKED)
    if MASKED:
        for i in range(1, tl.cdiv(count, LANES).to(tl.int32)):
            offs = i * LANES + lanes
            state = add_moments(_magnitudes(ptr, offs, count, r, SMOOTH, MASKED), offs, count, state, MASKED)
    else:  # unrolled, so that several loads are under way at a time
        # (but in float64, whose roots take longer than the loads, and all the registers)
        for i in tl.range(1, _CHUNK // LANES, loop_unroll_factor=1 if ptr.dtype.element_ty == tl.float64 else _UNROLL):
            offs = i * LANES + lanes
            state = add_moments(_magnitudes(ptr, offs, count, r, SMOOTH, MASKED), offs, count, state, MASKED)
    return close_moments(count, state)


@triton.jit
def merge_moments(partials_ptr, first_chunk, num_chunks, numel, pivot):
    """Return mean - pivot and V of one tensor from its chunks' partials, in fixed order, in float64."""
    n = numel.to(tl.float64)
    lanes = tl.arange(0, _MERGE)
    sums = tl.zeros((_MERGE,), tl.float64)
    for base in range(0, num_chunks, _MERGE):
        chunk = base + lanes
        counts = tl.minimum(numel - chunk * _CHUNK, _CHUNK).to(tl.float64)
        # Other programs wrote these: read them from the cache that all of them share.
        means = tl.load(
            partials_ptr + 2 * (first_chunk + chunk), mask=chunk < num_chunks, other=0.0, cache_modifier=".cg"
        )
        sums += tl.where(chunk < num_chunks, counts * (means - pivot), 0.0)
    shift = tree_sum(sums) / n
    sums = tl.zeros((_MERGE,), tl.float64)
    for base in range(0, num_chunks, _MERGE):
        chunk = base + lanes
        counts = tl.minimum(numel - chunk * _CHUNK, _CHUNK).to(tl.float64)
        entry_ptr = partials_ptr + 2 * (first_chunk + chunk)
        means = tl.load(entry_ptr, mask=chunk < num_chunks, other=0.0, cache_modifier=".cg")
        squares = tl.load(entry_ptr + 1, mask=chunk < num_chunks, other=0.0, cache_modifier=".cg")
        off = (means - pivot) - shift
        sums += tl.where(chunk < num_chunks, squares + counts * off * off, 0.0)
    # Rounding in a chunk's sum of squares may leave it a hair below zero; NaN must pass.
    var = tree_sum(sums) / n
    return shift, tl.where(var < 0.0, 0.0, var)


@triton.jit
def _ratio(numerator, denominator):
    """Divide, with 0 where the denominator is 0: no spread or no weight, no value and no pull."""
    none = denominator == 0.0
    return tl.where(none, 0.0, numerator) / tl.where(none, 1.0, denominator)


@triton.jit
def formula(m, v, n, total, eps, FAMILY: tl.constexpr):
    """Return f(m, V, n, N) of one family and its derivatives by m and V, in the torch path's order of divisions."""
    if FAMILY == "wcr":
        f = 1.0 / (v + eps)
        by_mean, by_var = m * 0.0, -f * f
    elif FAMILY == "l1":
        f, by_mean, by_var = n * m, n, m * 0.0
    elif FAMILY == "l2":
        f, by_mean, by_var = 0.5 * n * (v + m * m), n * m, 0.5 * n
    elif FAMILY == "hoyer_square":
        q = m * m + v
        f = _ratio(n * m * m, q)
        by_mean, by_var = _ratio(2.0 * n * _ratio(m, q) * v, q), -_ratio(f, q)
    else:
        q = v + eps * m * m
        f = _ratio(m * m, q)
        if FAMILY == "relative":
            by_mean, by_var = _ratio(2.0 * _ratio(m, q) * v, q), -_ratio(f, q)
        else:
            tl.static_assert(FAMILY == "log", "unknown family")
            share = n / total
            f = share * tl.log(tl.where(f == 0.0, 1.0, f))
            by_mean, by_var = 2.0 * share * _ratio(_ratio(v, q), m), -_ratio(share, q)
    return f, by_mean, by_var


@triton.jit
def layer_stats(row_ptr, partials_ptr, first_chunk, r, DTYPE: tl.constexpr, SMOOTH: tl.constexpr):
    """Return numel, pivot, mean - pivot and V of a tensor whose chunks all programs are done with."""
    numel = tl.load(row_ptr + ROW_LENGTH)
    weight_ptr = tl.load(row_ptr + ROW_ADDRESS).to(tl.pointer_type(DTYPE))
    head, _ = magnitude(wide(tl.load(weight_ptr, cache_modifier=".cg")), r, SMOOTH)
    p = head.to(tl.float64)
    shift, v = merge_moments(partials_ptr, first_chunk, tl.cdiv(numel, _CHUNK), numel, p)
    return numel, p, shift, v


@triton.jit
def put_stats(stats_ptr, column, num_layers, p, shift, v):
    """Write a tensor's column of ``stats``."""
    tl.store(stats_ptr + column, p + shift)
    tl.store(stats_ptr + num_layers + column, v)
    tl.store(stats_ptr + 2 * num_layers + column, p)
    tl.store(stats_ptr + 3 * num_layers + column, shift)


@triton.jit
def finish_layer(
    row_ptr,
    partials_ptr,
    first_chunk,
    stats_ptr,
    coef_ptr,
    r,
    eps,
    total,
    num_layers,
    DTYPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    FAMILY: tl.constexpr,
):
    """Merge the chunks of a tensor that all programs are done with; write its column of ``stats`` and ``coef``."""
    numel, p, shift, v = layer_stats(row_ptr, partials_ptr, first_chunk, r, DTYPE, SMOOTH)
    m = p + shift
    column = tl.load(row_ptr + ROW_POSITION)
    put_stats(stats_ptr, column, num_layers, p, shift, v)
    if FAMILY is not None:
        f, by_mean, by_var = formula(m, v, numel.to(tl.float64), total, eps, FAMILY)
        tl.store(coef_ptr + column, f)
        tl.store(coef_ptr + num_layers + column, by_mean)
        tl.store(coef_ptr + 2 * num_layers + column, by_var)


@triton.jit(do_not_specialize=["num_layers", "total"])
def _moments_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    partials_ptr,
    counters_ptr,
    stats_ptr,
    coef_ptr,
    r_high,
    r_low,
    eps_high,
    eps_low,
    num_layers,
    total,
    DTYPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    FAMILY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per chunk writes ``partials``; the last of a tensor writes its column of ``stats`` and ``coef``.

    A tensor at position -1 is passed over: a table of the fused step holds parameters without a penalty, too.
    """
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, WIDTH)
    if tl.load(row_ptr + ROW_POSITION) >= 0:
        address = tl.load(row_ptr + ROW_ADDRESS)
        numel = tl.load(row_ptr + ROW_LENGTH)
        start = chunk * _CHUNK
        count = tl.minimum(numel - start, _CHUNK)

        weight_ptr = address.to(tl.pointer_type(DTYPE))
        COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
        r = from_pair(r_high, r_low).to(COMPUTE)
        if (count == _CHUNK) & is_aligned(address):
            mean, squares = _chunk_moments(tl.multiple_of(weight_ptr, 16) + start, count, r, SMOOTH, MASKED=False)
        else:
            mean, squares = _chunk_moments(weight_ptr + start, count, r, SMOOTH, MASKED=True)
        pid = tl.program_id(0).to(tl.int64)
        tl.store(partials_ptr + 2 * pid, mean)
        tl.store(partials_ptr + 2 * pid + 1, squares)

        if is_last(counters_ptr + tensor, tl.cdiv(numel, _CHUNK)):
            eps = from_pair(eps_high, eps_low)
            everything = tl.full((), total, tl.float64)
            finish_layer(
                row_ptr,
                partials_ptr,
                pid - chunk,
                stats_ptr,
                coef_ptr,
                r,
                eps,
                everything,
                num_layers,
                DTYPE,
                SMOOTH,
                FAMILY,
            )


@triton.jit
def _gradient_chunk(
    weight_ptr,
    grad_ptr,
    count,
    pivot,
    shift,
    b,
    c,
    r,
    SMOOTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
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
        a, s = magnitude(wide(tl.load(weight_ptr + offs, mask=mask, other=other)), r, SMOOTH)
        g = s * tl.fma(a - pivot - shift, c, b)
        if ACCUMULATE:
            g += wide(tl.load(grad_ptr + offs, mask=mask, other=other))
        tl.store(grad_ptr + offs, narrow(g, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_layers"])
def _gradient_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    grad_addrs_ptr,
    stats_ptr,
    coef_ptr,
    lam_ptr,
    lam_high,
    lam_low,
    r_high,
    r_low,
    num_layers,
    DTYPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LAM_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk adds the penalty's gradient to the tensors at ``grad_addrs``, or writes it there."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, ROW_EXTRA)
    address = tl.load(row_ptr + ROW_ADDRESS)
    grad_address = tl.load(grad_addrs_ptr + tensor)
    numel = tl.load(row_ptr + ROW_LENGTH)
    column = tl.load(row_ptr + ROW_POSITION)
    start = chunk * _CHUNK
    count = tl.minimum(numel - start, _CHUNK)

    lam = tl.load(lam_ptr).to(tl.float64) if LAM_TENSOR else from_pair(lam_high, lam_low)
    per_element = lam / numel.to(tl.float64)
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    b = (tl.load(coef_ptr + num_layers + column) * per_element).to(COMPUTE)
    c = (2.0 * tl.load(coef_ptr + 2 * num_layers + column) * per_element).to(COMPUTE)
    pivot = tl.load(stats_ptr + 2 * num_layers + column).to(COMPUTE)
    shift = tl.load(stats_ptr + 3 * num_layers + column).to(COMPUTE)
    r = from_pair(r_high, r_low).to(COMPUTE)

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
    if (count == _CHUNK) & is_aligned(address) & is_aligned(grad_address):
        _gradient_chunk(
            tl.multiple_of(weight_ptr, 16) + start,
            tl.multiple_of(grad_ptr, 16) + start,
            count,
            pivot,
            shift,
            b,
            c,
            r,
            SMOOTH,
            ACCUMULATE,
            BLOCK,
            MASKED=False,
        )
    else:
        _gradient_chunk(
            weight_ptr + start,
            grad_ptr + start,
            count,
            pivot,
            shift,
            b,
            c,
            r,
            SMOOTH,
            ACCUMULATE,
            BLOCK,
            MASKED=True,
        )


def _moments_constants(dtype: torch.dtype, smooth: bool, family: str | None, width: int) -> dict:
    return {"DTYPE": TRITON_DTYPES[dtype], "SMOOTH": smooth, "FAMILY": family, "WIDTH": width}


def _gradient_constants(dtype: torch.dtype, smooth: bool, accumulate: bool, lam_tensor: bool) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "SMOOTH": smooth,
        "ACCUMULATE": accumulate,
        "LAM_TENSOR": lam_tensor,
        "BLOCK": config("gradient", dtype).block,
    }


def launch_moments(
    rows: Tensor,
    block_to_tensor: Tensor,
    partials: Tensor,
    counters: Tensor,
    stats: Tensor,
    coef: Tensor | None,
    *,
    dtype: torch.dtype,
    r: float,
    rule: tuple[str, float] | None,
    total: int,
) -> None:
    """Fill the columns of stats [4, L] (and coef [3, L] for a rule) of the tensors in a table.

    partials: float64, two per chunk. counters: int32, one per tensor, zero before and after.
    """
    family, eps = rule if rule else (None, 0.0)
    args = (
        rows,
        block_to_tensor,
        partials,
        counters,
        stats,
        stats if coef is None else coef,
        *float_pair(r),
        *float_pair(eps),
        stats.shape[1],
        total,
    )
    constants = _moments_constants(dtype, r != 0, family, rows.shape[1])
    launch(_moments_kernel, block_to_tensor.numel(), args, constants, config("moments", dtype).options())


def launch_gradient(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor,
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    *,
    dtype: torch.dtype,
    r: float,
    accumulate: bool,
) -> None:
    """Add lam times the penalty's gradient to the tensors at grad_addrs (int64, one per table row), or write it."""
    lam_tensor = isinstance(lam, Tensor)
    args = (
        rows,
        block_to_tensor,
        grad_addrs,
        stats,
        coef,
        lam if lam_tensor else stats,
        *float_pair(0.0 if lam_tensor else lam),
        *float_pair(r),
        stats.shape[1],
    )
    constants = _gradient_constants(dtype, r != 0, accumulate, lam_tensor)
    launch(_gradient_kernel, block_to_tensor.numel(), args, constants, config("gradient", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32"}
    pairs = ("r_high", "r_low")
    listed = []
    for dtype in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        signature = {**tables, "partials_ptr": "*fp64", "counters_ptr": "*i32", "stats_ptr": "*fp64"}
        signature |= {"coef_ptr": "*fp64", **dict.fromkeys((*pairs, "eps_high", "eps_low"), "fp32")}
        signature |= {"num_layers": "i32", "total": "i64"}
        families = FAMILIES if dtype == torch.float32 else ("wcr",)
        forms = [(True, family) for family in (*families, None)] + [(False, "l1")]
        for smooth, family in forms:
            label = f"{name} {family or 'stats'} {'smooth' if smooth else 'r=0'}"
            constants = _moments_constants(dtype, smooth, family, 4)
            # A family is a few instructions at the very end: the two longest formulas stand for all.
            essential = (smooth and family in ("wcr", "log")) or not smooth
            warps = config("moments", dtype).warps
            listed.append(
                Variant(
                    _moments_kernel,
                    label,
                    signature,
                    constants,
                    warps,
                    essential=essential,
                    bytes_per_element=dtype.itemsize,
                )
            )
        signature = {**tables, "grad_addrs_ptr": "*i64", "stats_ptr": "*fp64", "coef_ptr": "*fp64"}
        signature |= {"lam_ptr": "*fp32", "lam_high": "fp32", "lam_low": "fp32"}
        signature |= {**dict.fromkeys(pairs, "fp32"), "num_layers": "i32"}
        for smooth, accumulate, lam_tensor in (
            (True, True, False),
            (False, True, True),
            (True, False, False),
        ):
            label = f"{name} {'add' if accumulate else 'write'} {'smooth' if smooth else 'r=0, lam tensor'}"
            constants = _gradient_constants(dtype, smooth, accumulate, lam_tensor)
            warps, streams = config("gradient", dtype).warps, 2 if accumulate else 1
            moved = (streams + 1) * dtype.itemsize
            listed.append(
                Variant(_gradient_kernel, label, signature, constants, warps, streams, bytes_per_element=moved)
            )
    return listed
