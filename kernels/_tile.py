"""Jit helpers that every kernel shares: where a chunk lies, smooth magnitudes, ordered keys, rounding.

A table holds one row of int64 per tensor: address, length, first chunk, position in the caller's list, then
whatever else its kernel needs. One program works on one chunk and finds its tensor in ``block_to_tensor``.
"""

import triton
import triton.language as tl

# Fixed columns of a table row.
ROW_ADDRESS = tl.constexpr(0)
ROW_LENGTH = tl.constexpr(1)
ROW_FIRST_CHUNK = tl.constexpr(2)
ROW_POSITION = tl.constexpr(3)
ROW_EXTRA = tl.constexpr(4)

# A strided layout inside a row: number of dimensions, then sizes and strides of up to MAX_DIMS of them,
# innermost first.
MAX_DIMS = 8
LAYOUT_WIDTH = 1 + 2 * MAX_DIMS
_MAX_DIMS = tl.constexpr(MAX_DIMS)

# Lanes of a block whose values are summed, the same for every kernel and dtype: so the order of the sums is.
LANES = tl.constexpr(1024)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def locate(rows_ptr, block_to_tensor_ptr, WIDTH: tl.constexpr):
    """Return this program's tensor, the pointer to its table row, and its chunk's number in the tensor."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(block_to_tensor_ptr + pid).to(tl.int64)
    row_ptr = rows_ptr + tensor * WIDTH
    return tensor, row_ptr, pid - tl.load(row_ptr + ROW_FIRST_CHUNK)


@triton.jit
def is_aligned(address):
    """Tell whether 16-byte loads may start at this address."""
    return (address & 15) == 0


@triton.jit
def strided_offsets(layout_ptr, index):
    """Return the memory offset of each logical row-major index in a layout stored in a table row."""
    ndim = tl.load(layout_ptr)
    offs = tl.zeros_like(index)
    # The outermost dimension needs no division, so a contiguous tensor (one dimension) needs none at all.
    for d in range(1, ndim):
        size = tl.load(layout_ptr + d)
        rest = index // size
        offs += (index - rest * size) * tl.load(layout_ptr + _MAX_DIMS + d)
        index = rest
    return offs + index * tl.load(layout_ptr + _MAX_DIMS + ndim)


@triton.jit
def is_contiguous(layout_ptr, step):
    """Tell whether a layout is a single dimension with this stride."""
    return (tl.load(layout_ptr) == 1) & (tl.load(layout_ptr + _MAX_DIMS + 1) == step)


@triton.jit
def is_periodic(layout_ptr, step):
    """Tell whether a layout is a single dimension with this stride, or the same over and over."""
    repeated = (tl.load(layout_ptr) <= 2) & (tl.load(layout_ptr + _MAX_DIMS + 2) == 0)
    # Indices inside a period are 32-bit, with room for a chunk more.
    return repeated & (tl.load(layout_ptr + _MAX_DIMS + 1) == step) & (tl.load(layout_ptr + 1) < (1 << 31))


@triton.jit
def tree_sum(x):
    """Sum 1024 lanes by pairs of neighbours: the order is the program's, not that of a layout or a number of warps."""
    for _ in tl.static_range(10):
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return tl.sum(x)


@triton.jit
def is_last(counter_ptr, num_chunks):
    """Count this program's chunk; tell whether it was its tensor's last, which then sees what all of them wrote."""
    tl.debug_barrier()  # all of this program's writes come before its count
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_chunks - 1
    if last:
        tl.store(counter_ptr, 0)  # ready for the next call, or the next replay of a graph
    return last


@triton.jit
def wide(x):
    """Return x in the dtype of the arithmetic: float32 for the narrow dtypes, else unchanged."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round x to the nearest value of a storage dtype."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter truncates where the hardware rounds to nearest even, and loses subnormals.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def from_pair(high, low):
    """Return the float64 that the host split into two float32 arguments (a kernel takes no float64)."""
    return tl.full((), high, tl.float64) + tl.full((), low, tl.float64)


@triton.jit
def magnitude(w, r, SMOOTH: tl.constexpr):
    """Return a = sqrt(w^2 + r) and s = w / a; where r is 0, a = |w| and s = sign(w)."""
    if not SMOOTH:
        a = tl.abs(w)
        s = (w > 0).to(w.dtype) - (w < 0).to(w.dtype)
    elif w.dtype == tl.float64:
        a = tl.sqrt(tl.fma(w, w, r))
        s = w / a
    else:  # one special-function instruction for both
        v = tl.fma(w, w, r)
        inverse = tl.rsqrt(v)  # to 2 units in the last place; one step of Newton's rounds the root right
        a = v * inverse
        a = tl.fma(tl.fma(-a, a, v) * 0.5, inverse, a)
        s = w * inverse
    return a, s


@triton.jit
def magnitude_key(x, KEY_BITS: tl.constexpr):
    """Return the bit pattern of |x| in the comparison dtype, an integer ordered like |x| (int32, or int64)."""
    if KEY_BITS == 16:
        key = x.to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF
    elif KEY_BITS == 64:
        key = x.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype == tl.bfloat16:  # the upper half of the float32 pattern
        key = (x.to(tl.uint16, bitcast=True).to(tl.int32) & 0x7FFF) << 16
    else:
        key = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


# What a score needs beside the weight: nothing, a number per element, per input (column), or per layer. A table row
# then ends with the numbers' address, and for columns with the distance of two of them and how many there are.
NOTHING, ELEMENTS, COLUMNS, LAYER = range(4)
_ELEMENTS, _COLUMNS = tl.constexpr(ELEMENTS), tl.constexpr(COLUMNS)
AUX_WIDTH = 3


@triton.jit
def score_numbers(aux_ptr, start, offs, place, mask, KIND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the numbers beside some weights: ``start + offs`` in the table's order, at ``place`` in memory."""
    numbers_ptr = tl.load(aux_ptr).to(tl.pointer_type(DTYPE))
    if KIND == _ELEMENTS:
        if ALIGNED:
            a = tl.load(tl.multiple_of(numbers_ptr, 16) + place)
        else:
            a = tl.load(numbers_ptr + place, mask=mask, other=0.0)
    elif KIND == _COLUMNS:
        inner, columns = tl.load(aux_ptr + 1), tl.load(aux_ptr + 2)
        if offs.dtype == tl.int32:  # of a chunk: 64-bit division, once an element, would take longer than all the rest
            period = inner * columns
            index = (start % period).to(tl.uint32) + offs.to(tl.uint32)
            column = index % period.to(tl.uint32) // inner.to(tl.uint32)
        else:
            column = (start + offs) // inner % columns
        a = tl.load(numbers_ptr + column, mask=mask, other=0.0)
    else:
        a = tl.load(numbers_ptr)
    return a


@triton.jit
def score_key(x, a, KEY_BITS: tl.constexpr, SCORE: tl.constexpr):
    """Return the bit pattern of a score in the comparison dtype, ordered like it; a negative one counts as NaN."""
    w = wide(x)
    score = SCORE(w, a.to(w.dtype))
    if KEY_BITS == 64:
        bits = score.to(tl.float64).to(tl.int64, bitcast=True)
        key = tl.where(score < 0, 0x7FFFFFFFFFFFFFFF, bits & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = score.to(tl.float32).to(tl.int32, bitcast=True)
        key = tl.where(score < 0, 0x7FFFFFFF, bits & 0x7FFFFFFF)
    return key


@triton.jit
def keys_at(
    x,
    aux_ptr,
    start,
    offs,
    place,
    mask,
    KEY_BITS: tl.constexpr,
    SCORE: tl.constexpr,
    KIND: tl.constexpr,
    AUX_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the keys of some weights: of their magnitudes, or of a score."""
    if SCORE is None:
        key = magnitude_key(x, KEY_BITS)
    else:
        a = score_numbers(aux_ptr, start, offs, place, mask, KIND, AUX_DTYPE, ALIGNED)
        key = score_key(x, a, KEY_BITS, SCORE)
    return key


@triton.jit
def write_kept(out_ptr, offs, x, stays, mask, TO_MASK: tl.constexpr):
    """Write what stays of some weights, +0.0 for the rest; or only whether they stay."""
    if TO_MASK:
        tl.store(out_ptr + offs, stays.to(tl.uint8), mask=mask)
    else:
        tl.store(out_ptr + offs, tl.where(stays, x, 0.0), mask=mask)
