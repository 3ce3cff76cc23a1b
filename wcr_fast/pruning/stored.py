"""What a checkpoint holds, whatever its format: files, and tensors that lie in them in one or more chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wcr_fast.pruning.checkpoint_files import CheckpointFiles, check_index
from wcr_fast.pruning.safetensors_io import read_header


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, stored row-major in one stretch of one file.

    Attributes:
        shard: index of the file.
        start: first byte in the file.
        stop: one past the last byte.
        shape: of the box.
        offset: where its first element lies in the tensor.
    """

    shard: int
    start: int
    stop: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def is_run(self, shape: Sequence[int]) -> bool:
        """Tell whether the box holds consecutive elements of a tensor of this shape."""
        sizes = list(zip(self.shape, shape, strict=True))
        while sizes and sizes[0][0] == 1:
            sizes.pop(0)
        return all(mine == whole for mine, whole in sizes[1:])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor by name: the format's name of its dtype (F32, BF16, ...), its shape, its chunks by offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Checksummed:
    """A stretch of a file whose CRC-32 is stored (4 bytes, little endian) at some places behind or before it."""

    shard: int
    start: int
    stop: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that holds weights: its path and its size in bytes."""

    path: Path
    size: int


@dataclass(frozen=True)
class Contents:
    """Everything about a checkpoint but its numbers.

    Attributes:
        files: which files it consists of; ``shards`` are those of ``files``.
        shards: the files that hold tensors.
        tensors: in list order, which decides between equal magnitudes.
        reasons: tensor -> why the format says that it is no weight.
        unfit: weight -> why it can't be pruned where it lies.
        checksums: what must be corrected where a stretch was changed.
    """

    files: CheckpointFiles
    shards: tuple[Shard, ...]
    tensors: tuple[StoredTensor, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    checksums: tuple[Checksummed, ...] = ()


def read_safetensors(files: CheckpointFiles) -> Contents:
    """Read what safetensors files hold; list order is their order by name, then the tensors' places in them.

    Raises:
        UsageError: damaged files, a tensor in two of them, an index that doesn't fit.
    """
    headers = [read_header(files.root / shard) for shard in files.shards]
    check_index(files, headers)
    tensors = tuple(
        StoredTensor(
            info.name, info.dtype, info.shape, (Chunk(i, info.start, info.stop, info.shape, (0,) * len(info.shape)),)
        )
        for i, header in enumerate(headers)
        for info in header.tensors
    )
    return Contents(files, tuple(Shard(h.path, h.size) for h in headers), tensors)
