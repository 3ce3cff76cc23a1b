"""Scores by which weights are ranked: the magnitude, or a formula of the weight and a number beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Weights squared at a time.
PIECE = 1 << 20
#: What the number beside a weight belongs to: the element, its input (column), or its layer.
KINDS = ("element", "column", "layer")


@dataclass(frozen=True)
class Score:
    """A score: large ones stay. Never negative, never NaN.

    Attributes:
        name: for messages.
        formula: a function of torch tensors (w, a), float32 (float64 for float64 weights), of one shape.
        per: which number a it gets: one per ``"element"``, per ``"column"`` (input) or per ``"layer"``.
        kernel: the same as a ``triton.jit`` function, for CUDA; None: such tensors take the torch path, slowly.

    Example:
        >>> Score("cube", lambda w, a: w.abs() ** 3 * a, per="layer").name
        'cube'
    """

    name: str
    formula: Callable[[Tensor, Tensor], Tensor]
    per: str
    kernel: Any = None

    def __post_init__(self) -> None:
        if self.per not in KINDS:
            raise ValueError(f"Score: per must be one of {', '.join(KINDS)}, got {self.per!r}")
        if not callable(self.formula):
            raise TypeError(f"Score: formula must be a function of two tensors, got {type(self.formula).__name__}")


def _kernel(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from wcr_fast.kernels import scores

        return getattr(scores, name)

    return load


#: The named scores with a number beside the weight; their kernels are imported when a launch needs them.
NAMED = {
    "gradient": (Score("gradient", lambda w, a: (w * a).abs_(), "element"), _kernel("product")),
    "fisher": (Score("fisher", lambda w, a: (w * w).mul_(a), "element"), _kernel("quadratic")),
    "wanda": (Score("wanda", lambda w, a: w.abs().mul_(a), "column"), _kernel("scaled")),
    "normalised": (Score("normalised", lambda w, a: w.abs().mul_(a), "layer"), _kernel("scaled")),
}


def kernel_of(score: Score) -> Any:
    """Return a score's jit function, None where it has none."""
    named, load = NAMED.get(score.name, (None, None))
    return load() if named is score else score.kernel


@dataclass(frozen=True)
class Scored:
    """A score with its numbers for a list of tensors.

    Attributes:
        score: the score.
        numbers: per tensor one that expands to its shape: of this shape for "element", with one dimension (its inputs)
            or all but that of its outputs for "column", 0-d for "layer".
    """

    score: Score
    numbers: tuple[Tensor, ...]

    def beside(self, i: int, tensor: Tensor) -> Tensor:
        """Return the numbers of tensor i, expanded to its shape without a copy."""
        return self.numbers[i].expand(tensor.shape)

    def only(self, i: int) -> Scored:
        """Return the same for tensor i alone."""
        return replace(self, numbers=(self.numbers[i],))


def compute(score: Score, w: Tensor, a: Tensor) -> Tensor:
    """Return scores, float32 (float64 for float64 weights); negative ones as NaN, which every selection refuses."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    found = score.formula(w.to(wide), a.to(wide))
    if found.shape != w.shape or found.dtype != wide:
        raise ValueError(
            f"score {score.name}: the formula must give {wide} of the weight's shape {tuple(w.shape)}, "
            f"got {found.dtype} {tuple(found.shape)}"
        )
    return found.masked_fill(found < 0, torch.nan)


def inverse_rms(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return 1 / sqrt(mean(w^2)) of each tensor, 0-d float32 (float64 for float64); 1 where all weights are zero.

    Squares are rounded to a fixed point below the largest one, with as many bits as a 63-bit sum has room for. Such a
    sum has no order: every device and layout gives the same bits. Waits for the device.
    """
    return tuple(map(_inverse_rms, tensors))


def _inverse_rms(tensor: Tensor) -> Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    pieces = tensor.detach().reshape(-1).split(PIECE)
    largest = max((float(piece.abs().max()) for piece in pieces if piece.numel()), default=0.0)
    scale = math.nan
    if largest == 0.0:
        scale = 1.0
    elif math.isfinite(largest):
        exponent, bits = math.frexp(largest)[1], 62 - tensor.numel().bit_length()
        half = exponent // 2  # in two steps, as one factor may be out of range
        below_one = (piece.double() * 2.0**-half * 2.0 ** (half - exponent) for piece in pieces)
        total = sum(int((x.square() * 2.0**bits).round().long().sum()) for x in below_one)
        scale = 1.0 / math.ldexp(math.sqrt(total / (tensor.numel() << bits)), exponent)
    return torch.tensor(scale, dtype=torch.float64, device=tensor.device).to(wide).clamp_(max=torch.finfo(wide).max)
