"""Random lists of weights, drawn to be hard for a selection: by seed, so that a failure names what to draw again."""

import math

import numpy as np
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {torch.float32: np.int32, torch.float64: np.int64, torch.float16: np.int16, torch.bfloat16: np.int16}
SCOPES = ["global", "global", "global", "layer", "row", "2:4", "4:8", "1:4", "1:16", "3:5"]


def _signed(rng, magnitudes):
    return np.where(rng.random(len(magnitudes)) < 0.5, -1.0, 1.0) * magnitudes


def normal(rng, n, dtype):
    return rng.standard_normal(n) * 2.0 ** rng.integers(-9, 10)


def ordered(rng, n, dtype):
    values = np.linspace(-1, 1, n) if rng.random() < 0.5 else _signed(rng, np.linspace(0, 2, n))
    return values[:: rng.choice([-1, 1])]


def constant(rng, n, dtype):
    return _signed(rng, np.full(n, rng.choice([0.0, 0.3, 1.0, math.inf])))


def two_values(rng, n, dtype):
    return _signed(rng, np.where(rng.random(n) < rng.random(), 0.25, rng.choice([0.0, 0.2500305, 3.0])))


def one_binade(rng, n, dtype):
    return _signed(rng, 1 + rng.random(n))


def periodic(rng, n, dtype):
    """Lines of 128 bytes that differ, with a period that a sample at even steps could fall in with."""
    line = 128 // dtype.itemsize
    period = line * int(rng.choice([1, 2, 3, 64])) * int(rng.choice([1, 2, 8]))
    return 1 + np.arange(n) % period // max(period // 7, 1) + rng.random(n) * rng.choice([0, 1e-3])


def tiny(rng, n, dtype):
    """Subnormals, and zeros of both signs."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return _signed(rng, rng.integers(0, 40, n) * step)


def coarse(rng, n, dtype):
    return np.round(rng.standard_normal(n) * rng.choice([0.3, 1, 4, 30]))


def mostly_zeros(rng, n, dtype):
    return rng.standard_normal(n) * (rng.random(n) < rng.choice([0.02, 0.1, 0.5]))


def infinities(rng, n, dtype):
    return np.where(rng.random(n) < rng.random(), math.inf, rng.standard_normal(n)) * _signed(rng, np.ones(n))


def wide(rng, n, dtype):
    return _signed(rng, np.exp2(rng.standard_normal(n) * 20))


def any_bits(rng, n, dtype):
    """Every number of the dtype is as likely as any other."""
    bits = torch.from_numpy(rng.integers(0, 1 << 62, n).astype(INTEGERS[dtype]))
    values = bits.view(dtype).double()
    return torch.where(values.isnan(), 0.0, values).numpy()


KINDS = [normal, ordered, constant, two_values, one_binade, periodic, tiny, coarse, mostly_zeros, infinities, wide]
KINDS += [any_bits, normal, coarse]


def _values(rng, shape, dtype):
    n = math.prod(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.array(KINDS[rng.integers(len(KINDS))](rng, max(n, 1), dtype)[:n])
    return torch.tensor(values).to(dtype).view(shape)


def _tensor(rng, size, dtype):
    """Return a tensor of about so many weights, in any layout."""
    side = max(1, math.isqrt(size))
    match rng.integers(11):
        case 0:
            return _values(rng, (), dtype)
        case 1:
            return torch.empty((0, 4) if rng.random() < 0.5 else 0, dtype=dtype)
        case 2:
            deep = _values(rng, (max(1, size // 24), 3, 2, 4), dtype)
            return deep.to(memory_format=torch.channels_last)
        case 3:
            return _values(rng, (side, side + 3), dtype).t()
        case 4:
            return _values(rng, (side, 2 * side), dtype)[:, ::2]
        case 5:
            return _values(rng, (side, 1), dtype).expand(side, side)
        case 6:
            return _values(rng, (size + 1,), dtype)[1:]
        case 7:
            return _values(rng, (side, side, 2), dtype).permute(2, 0, 1)
        case 8:
            return _values(rng, (size,), dtype)
        case _:
            return _values(rng, (side, side), dtype)


def draw(seed, *, limit=3000):
    """Return (weights, sparsity, scope); sparsity is None for n:m. ``limit``: weights of the largest tensor, about."""
    rng = np.random.default_rng(seed)
    scope = SCOPES[rng.integers(len(SCOPES))]
    own = DTYPES[rng.integers(4)]
    mixed = rng.random() < 0.3
    weights = []
    for _ in range(rng.integers(1, 6)):
        dtype = DTYPES[rng.integers(4)] if mixed else own
        size = int(np.exp(rng.random() * np.log(limit))) if rng.random() < 0.7 else limit
        weights.append(_tensor(rng, size, dtype))
    total = max(1, sum(w.numel() for w in weights))
    choices = [0.0, 1.0, 1 / total, 1 - 1 / total, 0.5, 0.9, 0.99, *rng.random(6)]
    return weights, None if ":" in scope else float(choices[rng.integers(len(choices))]), scope
