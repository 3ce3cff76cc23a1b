"""Several penalties at once: the moments of two smoothings of the same weights, and the gradient of a weighted sum.

For up to two r (j = 0, 1), with a_j = sqrt(w^2 + r_j), s_j = w / a_j, and the moments of each as in ``moments.py``:

    coef_j = sum over the terms k with that r of lam_k (f_k, df_k/dm_j, df_k/dV_j)
    gradient = sum over j of s_j (b_j + c_j ((a_j - p_j) - shift_j))

A term is a row of float64 numbers (formula, eps, which r, N, lam), and a layer feels the terms whose bit is set in its
number: data, so that every list of penalties takes the same compiled code. The weights are read once for both r, each
smoothing is summed by the helpers of ``moments.py`` in their order: to the same bits.
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
    wide,
)
from .launch import CHUNK, TRITON_DTYPES, LaunchConfig, Variant, config, float_pair, launch
from .moments import FAMILIES, add_moments, close_moments, formula, layer_stats, open_moments, put_stats

#: numbers of a term: formula (its place in FAMILIES), eps, which r, N, lam
TERM_WIDTH = 5

_CHUNK = tl.constexpr(CHUNK)
_UNROLL = tl.constexpr(4)
_TERM_WIDTH = tl.constexpr(TERM_WIDTH)
_FAMILIES = tl.constexpr(FAMILIES)
_NUM_FAMILIES = tl.constexpr(len(FAMILIES))


@triton.jit
def _load(ptr, offs, count, MASKED: tl.constexpr):
    return wide(tl.load(ptr + offs, mask=offs < count, other=0.0) if MASKED else tl.load(ptr + offs))


@triton.jit
def _size(w, r, SMOOTH: tl.constexpr):
    a, _ = magnitude(w, r, SMOOTH)
    return a


@triton.jit
def _chunk_moments(
    ptr, count, r, other_r, SMOOTH: tl.constexpr, OTHER_SMOOTH: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr
):
    """Return mean and squares of a chunk for either r; the first's twice where there is one r only."""
    lanes = tl.arange(0, LANES)
    w = _load(ptr, lanes, count, MASKED)
    first = open_moments(_size(w, r, SMOOTH), lanes, count, MASKED)
    second = first
    if BOTH:
        second = open_moments(_size(w, other_r, OTHER_SMOOTH), lanes, count, MASKED)
    if MASKED:
        for i in range(1, tl.cdiv(count, LANES).to(tl.int32)):
            offs = i * LANES + lanes
            w = _load(ptr, offs, count, MASKED)
            first = add_moments(_size(w, r, SMOOTH), offs, count, first, MASKED)
            if BOTH:
                second = add_moments(_size(w, other_r, OTHER_SMOOTH), offs, count, second, MASKED)
    else:  # as in moments.py
        for i in tl.range(1, _CHUNK // LANES, loop_unroll_factor=1 if ptr.dtype.element_ty == tl.float64 else _UNROLL):
            offs = i * LANES + lanes
            w = _load(ptr, offs, count, MASKED)
            first = add_moments(_size(w, r, SMOOTH), offs, count, first, MASKED)
            if BOTH:
                second = add_moments(_size(w, other_r, OTHER_SMOOTH), offs, count, second, MASKED)
    mean, squares = close_moments(count, first)
    other_mean, other_squares = mean, squares
    if BOTH:
        other_mean, other_squares = close_moments(count, second)
    return mean, squares, other_mean, other_squares


@triton.jit
def _finish(
    row_ptr,
    partials_ptr,
    first_chunk,
    members,
    stats_ptr,
    coef_ptr,
    terms_ptr,
    num_terms,
    num_layers,
    r,
    WHICH: tl.constexpr,
    DTYPE: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Merge a tensor's chunks for one r; write its column of ``stats`` and the sum of its terms' coefficients."""
    numel, p, shift, v = layer_stats(row_ptr, partials_ptr, first_chunk, r, DTYPE, SMOOTH)
    column = tl.load(row_ptr + ROW_POSITION)
    put_stats(stats_ptr + WHICH * 4 * num_layers, column, num_layers, p, shift, v)
    m = p + shift
    n = numel.to(tl.float64)
    f, by_mean, by_var = m * 0.0, m * 0.0, m * 0.0
    for k in range(num_terms):
        term_ptr = terms_ptr + k * _TERM_WIDTH
        if (((members >> k) & 1) != 0) & (tl.load(term_ptr + 2) == WHICH):
            family, eps, total = tl.load(term_ptr), tl.load(term_ptr + 1), tl.load(term_ptr + 3)
            lam = tl.load(term_ptr + 4)
            for number in tl.static_range(_NUM_FAMILIES):
                if family == number:
                    value, slope_mean, slope_var = formula(m, v, n, total, eps, tl.constexpr(_FAMILIES[number]))
                    f += lam * value
                    by_mean += lam * slope_mean
                    by_var += lam * slope_var
    coef_ptr += WHICH * 3 * num_layers + column
    tl.store(coef_ptr, f)
    tl.store(coef_ptr + num_layers, by_mean)
    tl.store(coef_ptr + 2 * num_layers, by_var)


@triton.jit(do_not_specialize=["num_layers", "num_terms"])
def _joint_moments_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    members_ptr,
    partials_ptr,
    counters_ptr,
    stats_ptr,
    coef_ptr,
    terms_ptr,
    r_high,
    r_low,
    other_r_high,
    other_r_low,
    num_terms,
    num_layers,
    DTYPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    OTHER_SMOOTH: tl.constexpr,
    BOTH: tl.constexpr,
):
    """One program per chunk writes ``partials``; the last of a tensor writes its columns of ``stats`` and ``coef``."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, ROW_EXTRA)
    address = tl.load(row_ptr + ROW_ADDRESS)
    numel = tl.load(row_ptr + ROW_LENGTH)
    start = chunk * _CHUNK
    count = tl.minimum(numel - start, _CHUNK)

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    r = from_pair(r_high, r_low).to(COMPUTE)
    other_r = from_pair(other_r_high, other_r_low).to(COMPUTE)
    if (count == _CHUNK) & is_aligned(address):
        mean, squares, other_mean, other_squares = _chunk_moments(
            tl.multiple_of(weight_ptr, 16) + start, count, r, other_r, SMOOTH, OTHER_SMOOTH, BOTH, MASKED=False
        )
    else:
        mean, squares, other_mean, other_squares = _chunk_moments(
            weight_ptr + start, count, r, other_r, SMOOTH, OTHER_SMOOTH, BOTH, MASKED=True
        )
    pid = tl.program_id(0).to(tl.int64)
    other_partials_ptr = partials_ptr + 2 * tl.num_programs(0).to(tl.int64)
    tl.store(partials_ptr + 2 * pid, mean)
    tl.store(partials_ptr + 2 * pid + 1, squares)
    if BOTH:
        tl.store(other_partials_ptr + 2 * pid, other_mean)
        tl.store(other_partials_ptr + 2 * pid + 1, other_squares)

    if is_last(counters_ptr + tensor, tl.cdiv(numel, _CHUNK)):
        members = tl.load(members_ptr + tensor)
        _finish(
            row_ptr,
            partials_ptr,
            pid - chunk,
            members,
            stats_ptr,
            coef_ptr,
            terms_ptr,
            num_terms,
            num_layers,
            r,
            0,
            DTYPE,
            SMOOTH,
        )
        if BOTH:
            _finish(
                row_ptr,
                other_partials_ptr,
                pid - chunk,
                members,
                stats_ptr,
                coef_ptr,
                terms_ptr,
                num_terms,
                num_layers,
                other_r,
                1,
                DTYPE,
                OTHER_SMOOTH,
            )


@triton.jit
def _pull(w, r, pivot, shift, b, c, SMOOTH: tl.constexpr):
    a, s = magnitude(w, r, SMOOTH)
    return s * tl.fma(a - pivot - shift, c, b)


@triton.jit
def _gradient_chunk(
    weight_ptr,
    grad_ptr,
    count,
    first,
    second,
    OTHER_SMOOTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    r, pivot, shift, b, c = first
    other_r, other_pivot, other_shift, other_b, other_c = second
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
        g = _pull(w, r, pivot, shift, b, c, True)
        g += _pull(w, other_r, other_pivot, other_shift, other_b, other_c, OTHER_SMOOTH)
        if ACCUMULATE:
            g += wide(tl.load(grad_ptr + offs, mask=mask, other=other))
        tl.store(grad_ptr + offs, narrow(g, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer(stats_ptr, coef_ptr, column, num_layers, per_element, r, COMPUTE: tl.constexpr):
    """Return r, pivot, shift, b and c of a layer for one r."""
    b = (tl.load(coef_ptr + num_layers + column) * per_element).to(COMPUTE)
    c = (2.0 * tl.load(coef_ptr + 2 * num_layers + column) * per_element).to(COMPUTE)
    pivot = tl.load(stats_ptr + 2 * num_layers + column).to(COMPUTE)
    shift = tl.load(stats_ptr + 3 * num_layers + column).to(COMPUTE)
    return r.to(COMPUTE), pivot, shift, b, c


@triton.jit(do_not_specialize=["num_layers"])
def _joint_gradient_kernel(
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
    other_r_high,
    other_r_low,
    num_layers,
    DTYPE: tl.constexpr,
    OTHER_SMOOTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LAM_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk adds the gradient of both r to the tensors at ``grad_addrs``, or writes it there."""
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
    r, other_r = from_pair(r_high, r_low), from_pair(other_r_high, other_r_low)
    first = _layer(stats_ptr, coef_ptr, column, num_layers, per_element, r, COMPUTE)
    stats_ptr += 4 * num_layers
    coef_ptr += 3 * num_layers
    second = _layer(stats_ptr, coef_ptr, column, num_layers, per_element, other_r, COMPUTE)

    weight_ptr = address.to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
    if (count == _CHUNK) & is_aligned(address) & is_aligned(grad_address):
        _gradient_chunk(
            tl.multiple_of(weight_ptr, 16) + start,
            tl.multiple_of(grad_ptr, 16) + start,
            count,
            first,
            second,
            OTHER_SMOOTH,
            ACCUMULATE,
            BLOCK,
            MASKED=False,
        )
    else:
        _gradient_chunk(
            weight_ptr + start,
            grad_ptr + start,
            count,
            first,
            second,
            OTHER_SMOOTH,
            ACCUMULATE,
            BLOCK,
            MASKED=True,
        )


def _moments_constants(dtype: torch.dtype, rs: tuple[float, ...]) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "SMOOTH": rs[0] != 0,
        "OTHER_SMOOTH": rs[-1] != 0,
        "BOTH": len(rs) > 1,
    }


def _moments_config(dtype: torch.dtype, rs: tuple[float, ...]) -> LaunchConfig:
    return config("joint moments" if len(rs) > 1 else "moments of terms", dtype)


def _gradient_constants(dtype: torch.dtype, rs: tuple[float, ...], accumulate: bool, lam_tensor: bool) -> dict:
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "OTHER_SMOOTH": rs[-1] != 0,
        "ACCUMULATE": accumulate,
        "LAM_TENSOR": lam_tensor,
        "BLOCK": config("gradient", dtype).block,
    }


def launch_joint_moments(
    rows: Tensor,
    block_to_tensor: Tensor,
    members: Tensor,
    partials: Tensor,
    counters: Tensor,
    stats: Tensor,
    coef: Tensor,
    terms: Tensor,
    *,
    dtype: torch.dtype,
    rs: tuple[float, ...],
) -> None:
    """Fill the columns of stats [J, 4, L] and coef [J, 3, L] of the tensors in a table, for J = len(rs), 1 or 2.

    rs: falling. members: int64, one per tensor, bit k for term k. terms: float64 [K, TERM_WIDTH]; a formula of -1 is
    left out. partials: float64, 2 J per chunk. counters: int32, one per tensor, zero before and after.
    """
    args = (
        rows,
        block_to_tensor,
        members,
        partials,
        counters,
        stats,
        coef,
        terms,
        *float_pair(rs[0]),
        *float_pair(rs[-1]),
        terms.shape[0],
        stats.shape[2],
    )
    options = _moments_config(dtype, rs).options()
    launch(_joint_moments_kernel, block_to_tensor.numel(), args, _moments_constants(dtype, rs), options)


def launch_joint_gradient(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor,
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    *,
    dtype: torch.dtype,
    rs: tuple[float, float],
    accumulate: bool,
) -> None:
    """Add lam times the gradient of both r (falling) to the tensors at grad_addrs, or write it there."""
    lam_tensor = isinstance(lam, Tensor)
    args = (
        rows,
        block_to_tensor,
        grad_addrs,
        stats,
        coef,
        lam if lam_tensor else stats,
        *float_pair(0.0 if lam_tensor else lam),
        *float_pair(rs[0]),
        *float_pair(rs[1]),
        stats.shape[2],
    )
    constants = _gradient_constants(dtype, rs, accumulate, lam_tensor)
    launch(_joint_gradient_kernel, block_to_tensor.numel(), args, constants, config("gradient", dtype).options())


def variants() -> list[Variant]:
    """Return the forms of this module's kernels that the code generation check compiles."""
    tables = {"rows_ptr": "*i64", "block_to_tensor_ptr": "*i32", "stats_ptr": "*fp64", "coef_ptr": "*fp64"}
    tables |= dict.fromkeys(("r_high", "r_low", "other_r_high", "other_r_low"), "fp32") | {"num_layers": "i32"}
    sums = tables | {"members_ptr": "*i64", "partials_ptr": "*fp64", "counters_ptr": "*i32", "terms_ptr": "*fp64"}
    sums |= {"num_terms": "i32"}
    pulls = tables | {"grad_addrs_ptr": "*i64", "lam_ptr": "*fp32", "lam_high": "fp32", "lam_low": "fp32"}
    listed = []
    for dtype in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        # One r and two smooth ones do less and little more.
        forms = [(1e-8, 0.0), (0.0,), *([(1e-3, 1e-8), (1e-8,)] if dtype == torch.float32 else [])]
        for rs in forms:
            label = f"{name} r={', '.join(map(str, rs))}"
            listed.append(
                Variant(
                    _joint_moments_kernel,
                    label,
                    sums,
                    _moments_constants(dtype, rs),
                    _moments_config(dtype, rs).warps,
                    essential=len(rs) > 1,
                    bytes_per_element=dtype.itemsize,
                    options=_moments_config(dtype, rs).options(),
                )
            )
        for rs, accumulate in (((1e-8, 0.0), True), *([((1e-3, 1e-8), False)] if dtype == torch.float32 else [])):
            listed.append(
                Variant(
                    _joint_gradient_kernel,
                    f"{name} {'add' if accumulate else 'write'} r={rs[0]}, {rs[1]}",
                    pulls,
                    _gradient_constants(dtype, rs, accumulate, False),
                    config("gradient", dtype).warps,
                    2 if accumulate else 1,
                    bytes_per_element=(3 if accumulate else 2) * dtype.itemsize,
                )
            )
    return listed
