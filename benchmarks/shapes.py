"""Weight lists of known networks, by shape."""

from __future__ import annotations

import torch
from torch import Tensor


def resnet18() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-18's 21 convolution and linear weights (He et al. 2016), 11.68 M values."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for planes in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(planes, width, 3, 3), (planes, planes, 3, 3)]
            if block == 0 and planes != width:
                shapes.append((planes, width, 1, 1))
            width = planes
    return [*shapes, (1000, 512)]


def small_tensors(count: int = 1000) -> list[tuple[int, ...]]:
    """Return many small matrices: the list on which the cost of a call, not of a byte, decides."""
    return [(32, 16 + i % 17) for i in range(count)]


def make(shapes: list[tuple[int, ...]], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return Gaussian weights scaled as He initialisation does."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for shape in shapes:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        weights.append((torch.randn(shape, generator=generator) * (2.0 / fan_in) ** 0.5).to(dtype))
    return weights
