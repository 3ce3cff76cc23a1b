"""SGD and AdamW in one launch, with the penalty's gradient, the mask and the next step's moments in the same pass.

Per weight, with s, a, b, c and the moments of :mod:`moments`, those of the weights as they are when the step begins:

    g <- sign (g / scale + lam s (b + c ((a - p) - shift)))          the gradient of loss + lam psi
    SGD:    g <- g + wd w,  buf <- mu buf + (1 - damp) g,  w <- w - lr (buf, or g + mu buf with Nesterov)
    AdamW:  m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g^2,
            w <- (1 - lr wd) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Reads and writes each array once: nothing is added to the bytes of the plain step but, with a mask, 1 bit a weight.
Each program steps one chunk and reduces the magnitudes it read and those it stored. The first must equal, bit for
bit, what was stored for this chunk before: a weight written by anyone else in between raises a flag in host memory.
The last program of a tensor merges the new ones into the coefficients of the next step, and counts the step.
Where a threshold is tracked, the keys of what is stored are counted on the way: see :mod:`track`.
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
    ROW_POSITION,
    is_aligned,
    is_last,
    locate,
    magnitude,
    narrow,
    wide,
)
from .launch import CHUNK, INF_KEYS, TRITON_DTYPES, LaunchConfig, Variant, config, launch
from .moments import add_moments, close_moments, finish_layer, open_moments
from .track import add_tracked, close_tracked, open_tracked
from .update import adamw, joined, mixed, rounded_at_random, sgd, split
from .window import counting

_CHUNK = tl.constexpr(CHUNK)

# A row of the table: what every table has, then for a step. Addresses are 0 where there is no such thing.
ROW = (
    *("address", "numel", "first_chunk", "position"),  # position: column of the moments, -1 without penalty
    *("layer_size", "group", "step", "first", "second", "third", "master", "words", "order", "tracked"),
)
# A parameter group's numbers, float64; lr, weight decay and lam may instead be read from the device.
SETTINGS = (
    *("lr", "weight_decay", "lam", "beta1", "beta2", "eps", "sign", "nesterov", "log_beta1", "log_beta2", "seed"),
    *("r", "penalty_eps", "penalty_total"),
)
# In place of a gradient's address: the weight has none and is stepped for its penalty alone.
PENALTY_ONLY = 1
_PENALTY_ONLY = tl.constexpr(PENALTY_ONLY)

_WIDTH = tl.constexpr(len(ROW))
_LAYER_SIZE = tl.constexpr(ROW.index("layer_size"))
_GROUP = tl.constexpr(ROW.index("group"))
_STEP = tl.constexpr(ROW.index("step"))
_FIRST = tl.constexpr(ROW.index("first"))
_SECOND = tl.constexpr(ROW.index("second"))
_THIRD = tl.constexpr(ROW.index("third"))
_MASTER = tl.constexpr(ROW.index("master"))
_WORDS = tl.constexpr(ROW.index("words"))
_ORDER = tl.constexpr(ROW.index("order"))
_TRACKED = tl.constexpr(ROW.index("tracked"))

_NUM_SETTINGS = tl.constexpr(len(SETTINGS))
_LR = tl.constexpr(SETTINGS.index("lr"))
_WEIGHT_DECAY = tl.constexpr(SETTINGS.index("weight_decay"))
_LAM = tl.constexpr(SETTINGS.index("lam"))
_BETA1 = tl.constexpr(SETTINGS.index("beta1"))  # SGD's momentum
_BETA2 = tl.constexpr(SETTINGS.index("beta2"))  # SGD's dampening
_EPS = tl.constexpr(SETTINGS.index("eps"))
_SIGN = tl.constexpr(SETTINGS.index("sign"))
_NESTEROV = tl.constexpr(SETTINGS.index("nesterov"))
_LOG_BETA1 = tl.constexpr(SETTINGS.index("log_beta1"))
_LOG_BETA2 = tl.constexpr(SETTINGS.index("log_beta2"))
_SEED = tl.constexpr(SETTINGS.index("seed"))
_R = tl.constexpr(SETTINGS.index("r"))
_PENALTY_EPS = tl.constexpr(SETTINGS.index("penalty_eps"))
_PENALTY_TOTAL = tl.constexpr(SETTINGS.index("penalty_total"))

# Per group the addresses of lr, weight decay and lam (bit 0 set: float64, else float32), then that of the flag.
_ADDRESSES = tl.constexpr(4)
_CHANGED = tl.constexpr(3)


@triton.jit
def _setting(settings_ptr, addresses_ptr, COLUMN: tl.constexpr, TENSOR: tl.constexpr):
    """Return a setting in float64: the number, or the scalar in device memory that stands for it."""
    value = tl.load(settings_ptr + COLUMN)
    address = tl.load(addresses_ptr + TENSOR)
    if address != 0:
        if (address & 1) == 1:
            value = tl.load((address - 1).to(tl.pointer_type(tl.float64)))
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def _step_block(
    i,
    lanes,
    count,
    grad_count,
    penalised,
    pointers,
    words,
    key,
    factor,
    layer,
    numbers,
    ALGORITHM: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    PENALTY: tl.constexpr,
    SMOOTH: tl.constexpr,
    MASK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Step one block; return what was stored, and the magnitudes of what was read and of that."""
    weight_ptr, grad_ptr, first_ptr, second_ptr, third_ptr, master_ptr = pointers
    pivot, shift, b, c, decoupled, r = layer
    offs = i * LANES + lanes
    mask = (offs < count) if MASKED else None
    other = 0.0 if MASKED else None

    raw = tl.load(weight_ptr + offs, mask=mask, other=other)
    stored = wide(raw)
    x = stored
    if MASTER == "float32":
        master = tl.load(master_ptr + offs, mask=mask, other=other)
        # A weight that somebody else wrote since counts, not the master copy of its old value.
        x = tl.where(narrow(master, raw.dtype) == raw, master, stored)
    elif MASTER == "remainder":
        x = joined(raw, tl.load(master_ptr + offs, mask=mask, other=0 if MASKED else None))
    if MASKED:
        g = wide(tl.load(grad_ptr + offs, mask=offs < grad_count, other=0.0)).to(x.dtype)
    else:
        g = wide(tl.load(grad_ptr + offs)).to(x.dtype)
    g *= factor
    before = stored
    pull = stored
    if PENALTY is not None:
        before, s = magnitude(stored, r, SMOOTH)
        pull = s * tl.fma((before - pivot) - shift, c, b)
        if PENALTY == "coupled":
            g = tl.where(penalised, g + pull, g)

    first, second, third = x, x, x
    if ALGORITHM == "sgd":
        if MOMENTUM:
            first = wide(tl.load(first_ptr + offs, mask=mask, other=other)).to(x.dtype)
        new, first = sgd(x, g, first, numbers, MOMENTUM)
    else:
        first = wide(tl.load(first_ptr + offs, mask=mask, other=other)).to(x.dtype)
        second = wide(tl.load(second_ptr + offs, mask=mask, other=other)).to(x.dtype)
        if AMSGRAD:
            third = wide(tl.load(third_ptr + offs, mask=mask, other=other)).to(x.dtype)
        new, first, second, third = adamw(x, g, first, second, third, numbers, AMSGRAD)
        if PENALTY == "decoupled":
            new = tl.where(penalised, tl.fma(pull, decoupled, new), new)
    if MASK:
        keep = ((words >> i) & 1) != 0
        new = tl.where(keep, new, 0.0)
        first = tl.where(keep, first, 0.0)
        second = tl.where(keep, second, 0.0)
        third = tl.where(keep, third, 0.0)

    if MASTER == "remainder":
        rounded, remainder = split(new)
        tl.store(master_ptr + offs, remainder, mask=mask)
    else:
        if MASTER == "float32":
            tl.store(master_ptr + offs, new, mask=mask)
        if STOCHASTIC:
            new = rounded_at_random(new, key, offs)
        rounded = narrow(new, raw.dtype)
    tl.store(weight_ptr + offs, rounded, mask=mask)
    if ALGORITHM == "adamw" or MOMENTUM:
        tl.store(first_ptr + offs, narrow(first, first_ptr.dtype.element_ty), mask=mask)
    if ALGORITHM == "adamw":
        tl.store(second_ptr + offs, narrow(second, second_ptr.dtype.element_ty), mask=mask)
        if AMSGRAD:
            tl.store(third_ptr + offs, narrow(third, third_ptr.dtype.element_ty), mask=mask)
    after = before
    if PENALTY is not None:
        after, _ = magnitude(wide(rounded), r, SMOOTH)
    return rounded, before, after


@triton.jit
def _step_chunk(
    count,
    grad_count,
    penalised,
    pointers,
    words_ptr,
    words_count,
    key,
    factor,
    layer,
    numbers,
    tracked,
    bad_ptr,
    ALGORITHM: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    PENALTY: tl.constexpr,
    SMOOTH: tl.constexpr,
    MASK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRACK: tl.constexpr,
    INF: tl.constexpr,
    INLINE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Step one chunk; return mean and squared deviations of the magnitudes read, then of those stored."""
    lanes = tl.arange(0, LANES)
    words = lanes
    if MASK:  # bit i of a lane's word belongs to its element of block i; a weight without a mask keeps all
        words = tl.load(words_ptr + lanes, mask=lanes < words_count, other=-1)
    rounded, before, after = _step_block(
        0, lanes, count, grad_count, penalised, pointers, words, key, factor, layer, numbers,
        ALGORITHM, MASTER, MOMENTUM, AMSGRAD, PENALTY, SMOOTH, MASK, STOCHASTIC, MASKED,
    )  # fmt: skip
    if PENALTY is not None:
        old = open_moments(before, lanes, count, MASKED)
        new = open_moments(after, lanes, count, MASKED)
    if TRACK:
        seen = add_tracked(rounded, lanes, count, open_tracked(LANES), tracked, TRACK, INF, INLINE, MASKED)
    steps = tl.cdiv(count, LANES).to(tl.int32) if MASKED else _CHUNK // LANES
    for i in range(1, steps):
        rounded, before, after = _step_block(
            i, lanes, count, grad_count, penalised, pointers, words, key, factor, layer, numbers,
            ALGORITHM, MASTER, MOMENTUM, AMSGRAD, PENALTY, SMOOTH, MASK, STOCHASTIC, MASKED,
        )  # fmt: skip
        offs = i * LANES + lanes
        if PENALTY is not None:
            old = add_moments(before, offs, count, old, MASKED)
            new = add_moments(after, offs, count, new, MASKED)
        if TRACK:
            seen = add_tracked(rounded, offs, count, seen, tracked, TRACK, INF, INLINE, MASKED)
    if TRACK:
        close_tracked(seen, tracked, bad_ptr)
    zero = tl.full((), 0.0, tl.float64)
    old_mean, old_squares, new_mean, new_squares = zero, zero, zero, zero
    if PENALTY is not None:
        old_mean, old_squares = close_moments(count, old)
        new_mean, new_squares = close_moments(count, new)
    return old_mean, old_squares, new_mean, new_squares


@triton.jit
def _track_chunk(ptr, count, tracked, bad_ptr, TRACK: tl.constexpr, INF: tl.constexpr, INLINE: tl.constexpr):
    """Count the weights of a chunk that isn't stepped."""
    lanes = tl.arange(0, LANES)
    seen = open_tracked(LANES)
    for i in range(tl.cdiv(count, LANES).to(tl.int32)):
        offs = i * LANES + lanes
        x = tl.load(ptr + offs, mask=offs < count, other=0.0)
        seen = add_tracked(x, offs, count, seen, tracked, TRACK, INF, INLINE, True)
    close_tracked(seen, tracked, bad_ptr)


@triton.jit
def _store_partials(entry_ptr, moments, flag_address, column):
    """Store a chunk's new moments; raise the flag where the old ones are not those that were stored."""
    old_mean, old_squares, mean, squares = moments
    same = old_mean.to(tl.int64, bitcast=True) == tl.load(entry_ptr).to(tl.int64, bitcast=True)
    same &= old_squares.to(tl.int64, bitcast=True) == tl.load(entry_ptr + 1).to(tl.int64, bitcast=True)
    if not same:
        tl.store(flag_address.to(tl.pointer_type(tl.int64)), column + 1)
    tl.store(entry_ptr, mean)
    tl.store(entry_ptr + 1, squares)


@triton.jit(do_not_specialize=["num_layers", "num_cuts", "max_bins"])
def _step_kernel(
    rows_ptr,
    block_to_tensor_ptr,
    grad_addrs_ptr,
    settings_ptr,
    addresses_ptr,
    partials_ptr,
    counters_ptr,
    stats_ptr,
    coef_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    cuts_ptr,
    hist_ptr,
    bad_ptr,
    num_layers,
    num_cuts,
    max_bins,
    ALGORITHM: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    PENALTY: tl.constexpr,
    FAMILY: tl.constexpr,
    SMOOTH: tl.constexpr,
    MASK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    TRACK: tl.constexpr,
    INF: tl.constexpr,
    INLINE: tl.constexpr,
):
    """One program per chunk writes weight, state and ``partials``; the last of a tensor ``stats``, ``coef``, step."""
    tensor, row_ptr, chunk = locate(rows_ptr, block_to_tensor_ptr, _WIDTH)
    grad_address = tl.load(grad_addrs_ptr + tensor)
    active = grad_address != 0
    if SKIPPABLE:  # a gradient scaler found an overflow: nothing moves
        active &= tl.load(found_inf_ptr) == 0.0
    if TRACK:
        num_cuts = tl.where(tl.load(row_ptr + _TRACKED) != 0, num_cuts, 0)
    tracked = (cuts_ptr, hist_ptr, max_bins, num_cuts)
    if active:
        COMPUTE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
        address = tl.load(row_ptr + ROW_ADDRESS)
        numel = tl.load(row_ptr + ROW_LENGTH)
        column = tl.load(row_ptr + ROW_POSITION)
        group = tl.load(row_ptr + _GROUP)
        group_ptr = settings_ptr + group * _NUM_SETTINGS
        tensors_ptr = addresses_ptr + group * _ADDRESSES
        step_address = tl.load(row_ptr + _STEP)
        first_address = tl.load(row_ptr + _FIRST)
        second_address = tl.load(row_ptr + _SECOND)
        third_address = tl.load(row_ptr + _THIRD)
        master_address = tl.load(row_ptr + _MASTER)
        words_address = tl.load(row_ptr + _WORDS)
        start = chunk * _CHUNK
        count = tl.minimum(numel - start, _CHUNK)
        penalised = column >= 0
        # Nothing is loaded where there is no gradient, or no mask.
        grad_count = tl.where(grad_address == _PENALTY_ONLY, 0, count)
        words_count = tl.where(words_address == 0, 0, count)

        t = tl.full((), 0.0, tl.float64)
        step_ptr = step_address.to(tl.pointer_type(tl.float32))
        if step_address != 0:
            t = tl.load(step_ptr).to(tl.float64)
        lr = _setting(group_ptr, tensors_ptr, _LR, 0)
        weight_decay = _setting(group_ptr, tensors_ptr, _WEIGHT_DECAY, 1)
        beta1 = tl.load(group_ptr + _BETA1)
        beta2 = tl.load(group_ptr + _BETA2)
        if ALGORITHM == "sgd":
            share = tl.where(t == 0.0, 1.0, 1.0 - beta2)  # the first buffer is the gradient, not dampened
            nesterov = tl.load(group_ptr + _NESTEROV) != 0.0
            numbers = (
                (-lr).to(COMPUTE),
                weight_decay.to(COMPUTE),
                beta1.to(COMPUTE),
                share.to(COMPUTE),
                nesterov,
            )
        else:
            correction1 = 1.0 - tl.exp((t + 1.0) * tl.load(group_ptr + _LOG_BETA1))
            correction2 = 1.0 - tl.exp((t + 1.0) * tl.load(group_ptr + _LOG_BETA2))
            numbers = (
                (-lr / correction1).to(COMPUTE),
                (1.0 - lr * weight_decay).to(COMPUTE),
                (1.0 - beta1).to(COMPUTE),
                beta2.to(COMPUTE),
                (1.0 - beta2).to(COMPUTE),
                (1.0 / tl.sqrt(correction2)).to(COMPUTE),
                tl.load(group_ptr + _EPS).to(COMPUTE),
            )
        # What is maximised is the whole sum: the sign goes on gradient and coupled pull, not on a decoupled one.
        sign = tl.load(group_ptr + _SIGN)
        factor = sign
        if SCALED:
            factor = sign / tl.load(grad_scale_ptr).to(tl.float64)
        key = tl.full((), 0, tl.uint32)
        if STOCHASTIC:
            key = mixed(tl.load(group_ptr + _SEED).to(tl.int64).to(tl.uint32) ^ tl.load(row_ptr + _ORDER).to(tl.uint32))
            key = mixed(mixed(key ^ t.to(tl.int64).to(tl.uint32)) ^ chunk.to(tl.uint32))
        r = tl.load(group_ptr + _R).to(COMPUTE)
        zero = tl.full((), 0.0, COMPUTE)
        layer = (zero, zero, zero, zero, zero, r)
        if PENALTY is not None:
            place = tl.where(penalised, column, 0)
            per_element = 1.0 / tl.load(row_ptr + _LAYER_SIZE).to(tl.float64)
            lam = _setting(group_ptr, tensors_ptr, _LAM, 2)
            pull = per_element
            decoupled = zero
            if PENALTY == "decoupled":
                decoupled = (-lr * lam).to(COMPUTE)
            else:
                pull *= sign * lam
            layer = (
                tl.load(stats_ptr + 2 * num_layers + place).to(COMPUTE),
                tl.load(stats_ptr + 3 * num_layers + place).to(COMPUTE),
                (tl.load(coef_ptr + num_layers + place) * pull).to(COMPUTE),
                (2.0 * tl.load(coef_ptr + 2 * num_layers + place) * pull).to(COMPUTE),
                decoupled,
                r,
            )

        weight_ptr = address.to(tl.pointer_type(DTYPE))
        grad_ptr = grad_address.to(tl.pointer_type(GRAD))
        first_ptr = first_address.to(tl.pointer_type(STATE))
        second_ptr = second_address.to(tl.pointer_type(STATE))
        third_ptr = third_address.to(tl.pointer_type(STATE))
        if MASTER == "remainder":
            master_ptr = master_address.to(tl.pointer_type(tl.int16))
        else:
            master_ptr = master_address.to(tl.pointer_type(tl.float32))
        words_ptr = words_address.to(tl.pointer_type(tl.int32)) + chunk * LANES
        together = address | grad_address | first_address | second_address | third_address | master_address
        if (count == _CHUNK) & is_aligned(together | words_address):
            pointers = (
                tl.multiple_of(weight_ptr, 16) + start,
                tl.multiple_of(grad_ptr, 16) + start,
                tl.multiple_of(first_ptr, 16) + start,
                tl.multiple_of(second_ptr, 16) + start,
                tl.multiple_of(third_ptr, 16) + start,
                tl.multiple_of(master_ptr, 16) + start,
            )
            moments = _step_chunk(
                count, grad_count, penalised, pointers, words_ptr, words_count, key,
                factor.to(COMPUTE), layer, numbers, tracked, bad_ptr, ALGORITHM, MASTER, MOMENTUM, AMSGRAD, PENALTY,
                SMOOTH, MASK, STOCHASTIC, TRACK, INF, INLINE, MASKED=False,
            )  # fmt: skip
        else:
            pointers = (
                weight_ptr + start,
                grad_ptr + start,
                first_ptr + start,
                second_ptr + start,
                third_ptr + start,
                master_ptr + start,
            )
            moments = _step_chunk(
                count, grad_count, penalised, pointers, words_ptr, words_count, key,
                factor.to(COMPUTE), layer, numbers, tracked, bad_ptr, ALGORITHM, MASTER, MOMENTUM, AMSGRAD, PENALTY,
                SMOOTH, MASK, STOCHASTIC, TRACK, INF, INLINE, MASKED=True,
            )  # fmt: skip
        pid = tl.program_id(0).to(tl.int64)
        if PENALTY is not None:  # noqa: SIM102 (known when compiled; the next one only when run)
            if penalised:
                _store_partials(partials_ptr + 2 * pid, moments, tl.load(tensors_ptr + _CHANGED), column)
        if is_last(counters_ptr + tensor, tl.cdiv(numel, _CHUNK)):
            if step_address != 0:
                tl.store(step_ptr, (t + 1.0).to(tl.float32))
            if PENALTY is not None:  # noqa: SIM102
                if penalised:
                    finish_layer(
                        row_ptr,
                        partials_ptr,
                        pid - chunk,
                        stats_ptr,
                        coef_ptr,
                        r,
                        tl.load(group_ptr + _PENALTY_EPS),
                        tl.load(group_ptr + _PENALTY_TOTAL),
                        num_layers,
                        DTYPE,
                        SMOOTH,
                        FAMILY,
                    )
    elif TRACK:
        start = chunk * _CHUNK
        count = tl.minimum(tl.load(row_ptr + ROW_LENGTH) - start, _CHUNK)
        ptr = tl.load(row_ptr + ROW_ADDRESS).to(tl.pointer_type(DTYPE)) + start
        if num_cuts > 0:
            _track_chunk(ptr, count, tracked, bad_ptr, TRACK, INF, INLINE)


def constants(
    algorithm: str,
    dtype: torch.dtype,
    *,
    grad: torch.dtype | None = None,
    state: torch.dtype | None = None,
    master: str | None = None,
    momentum: bool = True,
    amsgrad: bool = False,
    penalty: str | None = None,
    family: str | None = None,
    smooth: bool = True,
    mask: bool = False,
    stochastic: bool = False,
    scaled: bool = False,
    skippable: bool = False,
    tracked: torch.dtype | None = None,
) -> dict:
    """Return a step's compile-time constants.

    penalty: None, "coupled" or "decoupled". tracked: the dtype in which weights are compared, where a threshold is.
    """
    return {
        "ALGORITHM": algorithm,
        "DTYPE": TRITON_DTYPES[dtype],
        "GRAD": TRITON_DTYPES[grad or dtype],
        "STATE": TRITON_DTYPES[state or dtype],
        "MASTER": master,
        "MOMENTUM": momentum,
        "AMSGRAD": amsgrad,
        "PENALTY": penalty,
        "FAMILY": family,
        "SMOOTH": smooth,
        "MASK": mask,
        "STOCHASTIC": stochastic,
        "SCALED": scaled,
        "SKIPPABLE": skippable,
        "TRACK": 0 if tracked is None else 8 * tracked.itemsize,
        "INF": 0 if tracked is None else INF_KEYS[tracked],
        "INLINE": tracked is not None and counting().inline,
    }


def launch_step(
    rows: Tensor,
    block_to_tensor: Tensor,
    grad_addrs: Tensor,
    settings: Tensor,
    addresses: Tensor,
    partials: Tensor,
    counters: Tensor,
    stats: Tensor,
    coef: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    tracked: tuple[Tensor, Tensor, Tensor] | None,
    *,
    dtype: torch.dtype,
    constants: dict,
) -> None:
    """Step the parameters of a table: rows int64 [T, ROW], settings float64 [G, SETTINGS], addresses int64 [G, 4].

    partials: float64, two per chunk, of the weights as they are. counters: int32 [T], zero before and after.
    grad_addrs: int64 [T]; 0 leaves a parameter alone, PENALTY_ONLY steps it without a gradient.
    tracked: the windows' state, their histograms [Q, bins] and the flag of NaN, made ready by ``launch_rearm``.
    """
    cuts, hist, bad = (rows, counters, counters) if tracked is None else tracked
    args = (
        rows,
        block_to_tensor,
        grad_addrs,
        settings,
        addresses,
        partials,
        counters,
        stats,
        coef,
        settings if grad_scale is None else grad_scale,
        settings if found_inf is None else found_inf,
        cuts,
        hist,
        bad,
        stats.shape[1],
        0 if tracked is None else hist.shape[0],
        0 if tracked is None else hist.shape[1],
    )
    launch(_step_kernel, block_to_tensor.numel(), args, constants, _config(dtype, constants).options())


def _config(dtype: torch.dtype, constants: dict) -> LaunchConfig:
    return config("tracked step" if constants["TRACK"] else "amsgrad step" if constants["AMSGRAD"] else "step", dtype)


_SIGNATURE = {
    **dict.fromkeys(("rows_ptr", "grad_addrs_ptr", "addresses_ptr"), "*i64"),
    **dict.fromkeys(("block_to_tensor_ptr", "counters_ptr"), "*i32"),
    **dict.fromkeys(("settings_ptr", "partials_ptr", "stats_ptr", "coef_ptr"), "*fp64"),
    **dict.fromkeys(("grad_scale_ptr", "found_inf_ptr"), "*fp32"),
    "cuts_ptr": "*i64",
    "hist_ptr": "*i32",
    "bad_ptr": "*u8",
    **dict.fromkeys(("num_layers", "num_cuts", "max_bins"), "i32"),
}


def _moved(constants: dict) -> tuple[float, float]:
    """Return the bytes that the full-chunk path reads per weight, and those it reads and writes."""
    weight, grad, state = (constants[name].primitive_bitwidth // 8 for name in ("DTYPE", "GRAD", "STATE"))
    arrays = 2 + constants["AMSGRAD"] if constants["ALGORITHM"] == "adamw" else int(constants["MOMENTUM"])
    master = {None: 0, "float32": 4, "remainder": 2}[constants["MASTER"]]
    read = weight + grad + arrays * state + master
    return read, read + weight + arrays * state + master + 0.125 * constants["MASK"]


def variants() -> list[Variant]:
    """Return the forms of the step that the code generation check compiles."""
    wcr = {"penalty": "coupled", "family": "wcr"}
    kept = {"state": torch.float32}
    forms = [
        (torch.float32, "plain", {}),
        (torch.float32, "wcr", wcr),
        (torch.float32, "wcr, mask", {**wcr, "mask": True}),
        (torch.bfloat16, "wcr", wcr),
        (torch.bfloat16, "wcr, float32 state", {**wcr, **kept}),
        (torch.bfloat16, "wcr, float32 state, mask", {**wcr, **kept, "mask": True}),
        (torch.bfloat16, "wcr, float32 master", {**wcr, **kept, "master": "float32"}),
        (torch.bfloat16, "wcr, remainder", {**wcr, **kept, "master": "remainder"}),
        (torch.bfloat16, "wcr, stochastic", {**wcr, **kept, "stochastic": True}),
        (torch.float16, "wcr, float32 master, scaled", {**wcr, **kept, "master": "float32", "scaled": True}),
        (torch.float64, "wcr", wcr),
        (torch.float32, "wcr, tracked", {**wcr, "tracked": torch.float32}),
        (torch.bfloat16, "wcr, float32 state, mask, tracked", {**wcr, **kept, "mask": True, "tracked": torch.bfloat16}),
    ]
    only = {
        "sgd": [(torch.float32, "no momentum, l1 r=0", {"momentum": False, **wcr, "family": "l1", "smooth": False})],
        "adamw": [
            (torch.float32, "decoupled log", {"penalty": "decoupled", "family": "log"}),
            (torch.float32, "amsgrad, scaled", {**wcr, "amsgrad": True, "scaled": True, "skippable": True}),
        ],
    }
    listed = []
    for algorithm in ("sgd", "adamw"):
        for dtype, label, options in forms + only[algorithm]:
            chosen = constants(algorithm, dtype, **options)
            read, moved = _moved(chosen)
            listed.append(
                Variant(
                    _step_kernel,
                    f"{algorithm} {str(dtype).removeprefix('torch.')} {label}",
                    _SIGNATURE,
                    chosen,
                    _config(dtype, chosen).warps,
                    read / dtype.itemsize,
                    # The tests compile what every user runs; each form takes seconds.
                    essential=label in ("wcr, mask", "wcr, float32 state, mask"),
                    bytes_per_element=moved,
                    options=_config(dtype, chosen).options(),
                    backend="cuda" if chosen["TRACK"] else None,  # counting differs
                )
            )
    return listed
