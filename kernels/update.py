"""What happens to one weight in a step: SGD's and AdamW's arithmetic, and the rounding of 16-bit weights."""

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """Scramble 32 bits (lowbias32, Chris Wellons, public domain)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounded_at_random(x, key, offs):
    """Round float32 to a bfloat16 value, up with the probability of the part cut off; inf and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    noise = mixed(key ^ offs.to(tl.uint32)) & 0xFFFF
    rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def joined(stored, remainder):
    """Return the float32 whose nearest bfloat16 is ``stored`` and whose low bits are ``remainder``; 0 for 0."""
    high = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
    whole = (high + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(high * 2 == 0, 0.0, whole)  # pruned since by somebody else: what it lacked is no longer meant


@triton.jit
def split(x):
    """Return the nearest bfloat16 (halves away from zero) and what is missing, as int16."""
    bits = tl.where(x == x, x, float("nan")).to(tl.int32, bitcast=True)  # one NaN: no carry into the sign
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def sgd(x, g, first, numbers, MOMENTUM: tl.constexpr):
    """Return the new value and momentum buffer."""
    minus_lr, weight_decay, mu, share, nesterov = numbers
    g = tl.fma(x, weight_decay, g)
    if MOMENTUM:
        first = tl.fma(g, share, mu * first)
        g = tl.where(nesterov, tl.fma(first, mu, g), first)
    return tl.fma(g, minus_lr, x), first


@triton.jit
def adamw(x, g, first, second, third, numbers, AMSGRAD: tl.constexpr):
    """Return the new value, both moments of the gradient and the largest second one."""
    minus_step, kept, share, beta2, share2, root, eps = numbers
    first = tl.fma(g - first, share, first)
    second = tl.fma(g * g, share2, second * beta2)
    if AMSGRAD:
        third = tl.maximum(third, second, propagate_nan=tl.PropagateNan.ALL)
        spread = tl.sqrt(third)
    else:
        spread = tl.sqrt(second)
    return tl.fma(first / tl.fma(spread, root, eps), minus_step, x * kept), first, second, third
