"""Pruned checkpoints that are really smaller on disk, and back to dense ones without a bit's difference."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_files import (
    CheckpointFiles,
    check_index,
    check_target,
    copy_file,
    find_files,
    make_folders,
)
from wcr_fast.pruning.packed_file import (
    ZLIB_LEVEL,
    Packed,
    check_sha256,
    open_packed,
    survey,
    unpacked,
    write_packed,
)
from wcr_fast.pruning.safetensors_io import reading, write_all, writing
from wcr_fast.pruning.staging import staging

Progress = Callable[[int, int], None]

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class ExportRecord:
    """What an export did; ``str()`` is a summary, ``to_dict()`` is ready for JSON. Sizes are those of whole files.

    Attributes:
        source: the input's path.
        target: the output's path.
        files: the weight files, by name.
        tensors: how many tensors they hold.
        packed: how many of them became bitmask and values; the others would not shrink.
        zeros: elements left out.
        dense_bytes: size of the input files.
        bitmask_bytes: size of the output files.
        zlib_bytes: what zlib makes of the input files, for information; None where it wasn't asked for.
    """

    source: str
    target: str
    files: tuple[str, ...]
    tensors: int
    packed: int
    zeros: int
    dense_bytes: int
    bitmask_bytes: int
    zlib_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"zlib_level": None if self.zlib_bytes is None else ZLIB_LEVEL}

    def __str__(self) -> str:
        rows = [
            ("dense", self.dense_bytes, "as it was"),
            (
                "bitmask",
                self.bitmask_bytes,
                f"{self.packed} of {self.tensors} tensors: 1 bit per element, and what is not 0",
            ),
        ]
        if self.zlib_bytes is not None:
            rows.append(
                ("compressed", self.zlib_bytes, f"the dense files through zlib, level {ZLIB_LEVEL}; not written")
            )
        width = len(f"{max(size for _, size, _ in rows):,}")
        lines = [
            f"{name:<10}  {size:>{width},} bytes  {size / max(self.dense_bytes, 1):7.2%}  {what}"
            for name, size, what in rows
        ]
        return "\n".join([*lines, f"wrote {self.target}: {self.zeros:,} zeros left out"])


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    compress: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportRecord:
    """Write a pruned checkpoint with its zeros packed: a bit per element, and the elements that are not zero.

    Exact to the bit: only elements whose bits are all 0 are left out; -0.0 and NaN are values like any other. Tensors
    that would not shrink stay dense. Reads the input twice, a few megabytes at a time.

    Args:
        source: a .safetensors file or a folder with a sharded checkpoint, whose other files are copied.
        target: the file or folder to write. It appears whole or not at all.
        compress: also find out what zlib would make of the input; the slowest part of it all.
        force: replace an existing target.
        progress: called with the bytes done and the bytes to do.

    Returns:
        The record: dense, bitmask and compressed sizes.

    Raises:
        UsageError: missing, damaged or packed input, an existing target, a full disk. Nothing is left behind.

    Example:
        >>> import torch, safetensors.torch
        >>> safetensors.torch.save_file({"w": torch.eye(100)}, "dense.safetensors")
        >>> export_checkpoint("dense.safetensors", "packed.safetensors", force=True).zeros
        9900
        >>> torch.equal(load_exported("packed.safetensors")["w"], torch.eye(100))
        True
    """
    source, target = Path(source), Path(target)
    files, others = _files(source, target, force)
    sizes = [(files.root / shard).stat().st_size for shard in files.shards]
    meter = _Meter(2 * sum(sizes), progress)
    found = [survey(files.root / shard, compress=compress, meter=meter) for shard in files.shards]
    check_index(files, [f.header for f in found])
    written = 0
    with staging(target, files) as stage:
        _copy(files, others, stage)
        for shard, one in zip(files.shards, found, strict=True):
            written += write_packed(one, stage / _name(files, shard, target), meter=meter)
            shutil.copymode(files.root / shard, stage / _name(files, shard, target))
    numels = {info.name: info.numel for one in found for info in one.header.tensors}
    return ExportRecord(
        source=str(source),
        target=str(target),
        files=tuple(map(str, files.shards)),
        tensors=len(numels),
        packed=sum(len(one.left) for one in found),
        zeros=sum(numels[name] - count for one in found for name, count in one.left.items()),
        dense_bytes=sum(sizes),
        bitmask_bytes=written,
        zlib_bytes=sum(one.zlib_bytes or 0 for one in found) if compress else None,
    )


def restore_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the dense checkpoint that an export was made from, identical to the bit; return its weight files' bytes.

    Args:
        source: a file or folder written by :func:`export_checkpoint`.
        target, force, progress: as there.

    Raises:
        UsageError: missing, damaged or dense input, an existing target, a full disk. Nothing is left behind.

    Example:
        >>> import torch, safetensors.torch
        >>> safetensors.torch.save_file({"w": torch.eye(100)}, "dense.safetensors")
        >>> record = export_checkpoint("dense.safetensors", "packed.safetensors", force=True)
        >>> restore_checkpoint("packed.safetensors", "restored.safetensors", force=True) == record.dense_bytes
        True
    """
    source, target = Path(source), Path(target)
    files, others = _files(source, target, force)
    packed = [open_packed(files.root / shard) for shard in files.shards]
    meter = _Meter(sum(one.dense.size for one in packed), progress)
    with staging(target, files) as stage:
        _copy(files, others, stage)
        for shard, one in zip(files.shards, packed, strict=True):
            _write_dense(one, stage / _name(files, shard, target), meter)
            shutil.copymode(files.root / shard, stage / _name(files, shard, target))
    return meter.total


def load_exported(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load the tensors of an export, as they were: on the CPU, dense, by name.

    Args:
        path: a file or folder written by ``wcr-fast export``.

    Returns:
        A ``state_dict``: equal to what safetensors loads from the dense checkpoint, to the bit.

    Raises:
        UsageError (a ValueError): a missing, damaged or dense file, or a dtype that torch lacks.

    Example:
        >>> import torch, safetensors.torch
        >>> safetensors.torch.save_file({"w": torch.eye(100)}, "dense.safetensors")
        >>> record = export_checkpoint("dense.safetensors", "packed.safetensors", force=True)
        >>> load_exported("packed.safetensors")["w"].shape
        torch.Size([100, 100])
    """
    files, tensors = find_files(Path(path)), {}
    for shard in files.shards:
        packed = open_packed(files.root / shard)
        sha = _head_sha(packed)
        with reading(packed.header.path) as fd:
            for info in packed.dense.tensors:
                if info.dtype not in TORCH_DTYPES:
                    raise UsageError(f"{packed.header.path}: {info.name!r} has dtype {info.dtype}; use --restore")
                data, at = torch.empty(info.stop - info.start, dtype=torch.uint8), 0
                for piece in unpacked(packed, fd, info):
                    data[at : at + len(piece)] = torch.from_numpy(piece)
                    sha.update(piece)
                    at += len(piece)
                tensors[info.name] = data.view(TORCH_DTYPES[info.dtype]).view(info.shape)
        check_sha256(packed, sha.hexdigest())
    return tensors


def _head_sha(packed: Packed) -> Any:
    return hashlib.sha256(len(packed.raw).to_bytes(8, "little") + packed.raw)


def _write_dense(packed: Packed, target: Path, meter: _Meter) -> None:
    sha = _head_sha(packed)
    with reading(packed.header.path) as src, writing(target) as dst:
        write_all(dst, memoryview(len(packed.raw).to_bytes(8, "little") + packed.raw), target)
        meter(packed.dense.data_start)
        for info in packed.dense.tensors:
            for piece in unpacked(packed, src, info):
                write_all(dst, memoryview(piece), target)
                sha.update(piece)
                meter(len(piece))
    check_sha256(packed, sha.hexdigest())


def _files(source: Path, target: Path, force: bool) -> tuple[CheckpointFiles, Sequence[Path]]:
    """Return the files of a checkpoint, and those to copy; raise UsageError where the target may not be written."""
    files = find_files(source)
    return files, () if check_target(source, files, target, force=force) else files.others


def _name(files: CheckpointFiles, shard: Path, target: Path) -> Path | str:
    return shard if files.is_folder else target.name


def _copy(files: CheckpointFiles, others: Sequence[Path], stage: Path) -> None:
    make_folders(others, stage)
    for other in others:
        copy_file(files.root / other, stage / other)
