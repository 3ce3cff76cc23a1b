"""Memory layout of dense tensors: views in memory order, without a copy where there is one."""

from __future__ import annotations

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_view(tensor: Tensor) -> Tensor:
    """Return the elements as a 1-d tensor in memory order; a copy in logical order where they have gaps."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().view(-1)


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Tell whether the flat views of two dense tensors run through the same logical elements in step."""
    if first.is_contiguous() and second.is_contiguous():
        return True
    return first.stride() == second.stride() and is_dense(first)
