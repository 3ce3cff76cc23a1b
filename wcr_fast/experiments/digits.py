"""The demo's data and net: UCI digits with a fixed split, and a small conv net with batch norm."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wcr_fast.errors import require

SPLIT_SEED = 1
SHARES = {"train": 0.50, "val": 0.25, "test": 0.25}


@dataclass(frozen=True)
class Part:
    """One part of the split: images [N, 1, 8, 8] (float32, channels_last) and labels [N] (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> list[Tensor]:
        """Return the images in order, in equal batches of at most ``size``: what batch-norm recalibration reads."""
        return list(self.images.tensor_split(-(-len(self) // size)))


@dataclass(frozen=True)
class Digits:
    """The three parts of the fixed split."""

    train: Part
    val: Part
    test: Part


def split(labels: np.ndarray, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Return the indices of each part, stratified by class and the same on every machine.

    Each class is ordered by the SHA-256 of "seed:index" and cut at the shares of :data:`SHARES`. A hash
    instead of a random generator: its stream can't change with a library's version.

    Args:
        labels: class of each sample, [N] integers.
        seed: part of the hashed text.

    Returns:
        Name of the part -> sorted indices; together each sample exactly once.

    Example:
        >>> {name: len(rows) for name, rows in split(np.arange(80) % 2).items()}
        {'train': 40, 'val': 20, 'test': 20}
    """
    parts: dict[str, list[int]] = {name: [] for name in SHARES}
    edges = np.cumsum(list(SHARES.values()))[:-1]
    for label in np.unique(labels):
        rows = sorted(
            np.flatnonzero(labels == label).tolist(),
            key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest(),
        )
        cuts = [0, *(round(len(rows) * edge) for edge in edges), len(rows)]
        for name, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            parts[name].extend(rows[start:stop])
    return {name: np.sort(np.array(rows, dtype=np.int64)) for name, rows in parts.items()}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [1797, 64] (float64, 0 to 16) and labels [1797] of the digits that scikit-learn carries.

    Raises:
        MissingExtra: when scikit-learn isn't installed.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository (its test part).
    """
    return require("sklearn.datasets", "demo").load_digits(return_X_y=True)


def prepare(pixels: np.ndarray, labels: np.ndarray) -> Digits:
    """Split the digits and standardise all parts with the training part's mean and deviation."""
    parts = split(labels)
    train = pixels[parts["train"]]
    images = ((pixels - train.mean()) / train.std()).astype(np.float32).reshape(-1, 1, 8, 8)

    def part(rows: np.ndarray) -> Part:
        chosen = torch.from_numpy(images[rows]).contiguous(memory_format=torch.channels_last)
        return Part(chosen, torch.from_numpy(labels[rows].astype(np.int64)))

    return Digits(**{name: part(rows) for name, rows in parts.items()})


def build_net() -> nn.Module:
    """Return the demo's net, initialised from torch's global generator.

    Three 3 x 3 convolutions with batch norm (1 -> 32 -> 64 -> 64 channels, 8 x 8 then 4 x 4 pixels) and a
    linear layer: 65,824 weights in four tensors. channels_last is about a fifth faster on the CPU.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = [*block(1, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64 * 16, 10)).to(memory_format=torch.channels_last)
