"""Parameter lists of known networks, by shape, in the order of ``model.parameters()``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def resnet(depth: int, *, width: int = 64, classes: int = 1000) -> list[Shape]:
    """Return ResNet-18's or ResNet-50's parameters (He et al. 2016, torchvision's order): 62 or 161 tensors."""
    blocks, expansion = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[depth]
    shapes: list[Shape] = []

    def convolution(outputs: int, inputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])  # with its batch norm

    convolution(width, 3, 7)
    inputs = width
    for stage, count in enumerate(blocks):
        planes = width << stage
        for block in range(count):
            if expansion == 1:
                convolution(planes, inputs, 3)
                convolution(planes, planes, 3)
            else:
                convolution(planes, inputs, 1)
                convolution(planes, planes, 3)
                convolution(planes * expansion, planes, 1)
            if block == 0 and inputs != planes * expansion:
                convolution(planes * expansion, inputs, 1)
            inputs = planes * expansion
    return [*shapes, (classes, inputs), (classes,)]


def vit_b16() -> list[Shape]:
    """Return ViT-B/16's parameters (Dosovitskiy et al. 2021, torchvision's order): 152 tensors, 86.57 M values."""
    width, hidden = 768, 3072
    block: list[Shape] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    head: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*head, *block * 12, (width,), (width,), (1000, width), (1000,)]


def gpt2(*, layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """Return GPT-2 small's parameters (Radford et al. 2019), the head tied: 148 tensors, 124.4 M values."""
    block: list[Shape] = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *block * layers, (width,), (width,)]


def _llama(layers: int, width: int, hidden: int, keys: int) -> list[Shape]:
    block: list[Shape] = [(width, width), (keys, width), (keys, width), (width, width)]
    block += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(32000, width), *block * layers, (width,), (32000, width)]


def llama_1b() -> list[Shape]:
    """Return TinyLlama's parameters (Zhang et al. 2024): 201 tensors, 1.10 G values."""
    return _llama(22, 2048, 5632, 256)


def llama_7b() -> list[Shape]:
    """Return Llama 2 7B's parameters (Touvron et al. 2023): 291 tensors, 6.74 G values."""
    return _llama(32, 4096, 11008, 4096)


#: name -> parameters of every list the suites know
LISTS = {
    "tiny": lambda: resnet(18, width=8, classes=10),
    "resnet18": lambda: resnet(18),
    "resnet50": lambda: resnet(50),
    "vit_b16": vit_b16,
    "gpt2": gpt2,
    "llama_1b": llama_1b,
    "llama_7b": llama_7b,
}


def weights_of(shapes: Sequence[Shape]) -> list[Shape]:
    """Return those that penalties and pruning choose: two or more dimensions."""
    return [shape for shape in shapes if len(shape) > 1]


def values_of(shapes: Sequence[Shape]) -> int:
    """Return the number of values in all."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def resnet18() -> list[Shape]:
    """Return the shapes of ResNet-18's 21 convolution and linear weights, 11.68 M values."""
    return weights_of(resnet(18))


def small_tensors(count: int = 1000) -> list[Shape]:
    """Return many small matrices: the list on which the cost of a call, not of a byte, decides."""
    return [(32, 16 + i % 17) for i in range(count)]


def make(shapes: Sequence[Shape], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return Gaussian weights scaled as He initialisation does."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for shape in shapes:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        weights.append((torch.randn(shape, generator=generator) * (2.0 / fan_in) ** 0.5).to(dtype))
    return weights


def balanced(shapes: Sequence[Shape], *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Return Gaussian weights of spread 4 n^(-1/3): WCR's gradients then have one scale, lam / 7, in every layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: Shape) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.mul_(4.0 * values.numel() ** (-1 / 3)).to(dtype)

    return [draw(shape) for shape in shapes]
