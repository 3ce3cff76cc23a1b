"""A score of one's own, as a user writes it for CUDA; a file of its own, as Triton must find ``tl`` beside it."""

import triton
import triton.language as tl


@triton.jit
def square(w, a):
    return tl.abs(w) * tl.abs(w) + a
