"""Formulas of the named scores, for kernels that rank weights by them; the torch path has its own.

Each takes the weight and a number beside it, both float32 (float64 for float64 weights), and rounds after every
operation in the order written, so that both paths give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
