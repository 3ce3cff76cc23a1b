"""Formulas of the named scores, for kernels that rank weights by them; the torch path has its own.

Each takes the weight and a number beside it, both float32 (float64 for float64 weights), and rounds after every
operation in the order written, so that both paths give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._tile import COLUMNS, ELEMENTS, LAYER, NOTHING
from .launch import TRITON_DTYPES, LaunchConfig, config


@triton.jit
def product(w, a):
    """|w a|: first order, where a is the gradient."""
    return tl.abs(w * a)


@triton.jit
def quadratic(w, a):
    """w^2 a: second order, where a is a diagonal of the Hessian or the Fisher matrix."""
    return w * w * a


@triton.jit
def scaled(w, a):
    """|w| a: Wanda, where a is the norm of the input; or a layer's scale."""
    return tl.abs(w) * a


class KeyFormula(NamedTuple):
    """What the keys are the bit patterns of.

    Attributes:
        formula: jit function of (weight, number), both float32 (float64 for float64 weights); None: the magnitude.
        kind: which number it gets: NOTHING (then whatever the weight is), ELEMENTS, COLUMNS or LAYER.
        dtype: the numbers' dtype.
    """

    formula: Any = None
    kind: int = NOTHING
    dtype: torch.dtype = torch.float32

    def constants(self) -> dict[str, Any]:
        """Return the kernels' constants."""
        return {"SCORE": self.formula, "KIND": self.kind, "AUX_DTYPE": TRITON_DTYPES[self.dtype]}

    def key_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which weights of one dtype are compared with each other."""
        if self.formula is None:
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def settings(self, op: str, dtype: torch.dtype) -> LaunchConfig:
        """Return the launch settings of an op by this formula for one dtype."""
        return config(op if self.formula is None else f"{op} scores", dtype)


MAGNITUDE = KeyFormula()

# Weights' dtypes whose kernels by a score the code generation check compiles; float16 differs in conversions only.
SCORED = (torch.float32, torch.bfloat16, torch.float64)


def score_forms(dtype: torch.dtype) -> list[tuple[str, KeyFormula, int]]:
    """Return the scores whose kernels the code generation check compiles: label, formula, and numbers per weight."""
    return [
        ("gradient", KeyFormula(product, ELEMENTS, dtype), 1),
        ("wanda", KeyFormula(scaled, COLUMNS, torch.float32), 0),
        ("normalised", KeyFormula(scaled, LAYER, torch.float32), 0),
    ]


def line_forms() -> list[tuple[str, torch.dtype, KeyFormula, float, int]]:
    """Return the scores whose kernels for rows and groups are compiled: label, weights' dtype, formula, streams, bytes.

    Numbers per column are loaded like those per element, but come from the cache: they move no bytes.
    """
    return [
        (label, dtype, formula, 1 + beside / dtype.itemsize, (2 + numbers) * dtype.itemsize)
        for dtype in SCORED
        for label, formula, numbers in score_forms(dtype)
        for beside in [0 if formula.kind == LAYER else formula.dtype.itemsize]
    ]
