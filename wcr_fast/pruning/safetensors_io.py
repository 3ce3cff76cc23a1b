"""Safetensors files as bytes: checked headers, reads into a given buffer, writes that reach the disk.

A file is 8 bytes (length of the header, little endian), a JSON header, and the tensors' bytes without holes.
Nothing here maps a file into memory or builds a tensor.
Source of the format: the README of huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wcr_fast.errors import UsageError

# Bytes per element. A dtype that isn't listed is copied, and only its place in the file is checked.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

# The format's own limit on the header; it keeps a damaged length from filling the memory.
MAX_HEADER_BYTES = 100_000_000

# Written pages are handed to the disk, and given up, in stretches of this size: each call waits for all cores
# to empty their page lists (2 s for 2 GB in calls of 8 MB, 0.1 s in these).
WRITEBACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's name, dtype (the format's name for it), shape and place in the file (absolute bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: the file, its size, where the tensors' bytes start, the tensors in file order."""

    path: Path
    size: int
    data_start: int
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        UsageError: when the file is missing, truncated or damaged: a header longer than the file, bad JSON,
            unknown or missing fields, sizes that don't fit shape and dtype, holes or overlaps.
    """
    with reading(path) as fd:
        size = os.fstat(fd).st_size
        if size < 8:
            _damaged(path, f"{size} bytes are too few for a safetensors file")
        start = os.pread(fd, 8, 0)
        if start[:4] == b"PK\x03\x04":
            _damaged(path, "a zip, as torch.save writes it: save the tensors with safetensors.torch.save_file")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            _damaged(path, f"the header claims {length:,} bytes, the file has {size:,}")
        raw = bytearray(length)
        read_into(fd, memoryview(raw), 8, path)
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes | bytearray, size: int) -> Header:
    """Check the JSON header of a file of this size, wherever it was read; raise UsageError as ``read_header``."""
    fields = _parse_json(path, raw)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _damaged(path, "__metadata__ must map text to text")
    data_start = 8 + len(raw)
    tensors = [_tensor_info(path, name, entry, data_start) for name, entry in fields.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_places(path, tensors, data_start, size)
    return Header(path, size, data_start, tuple(tensors), metadata)


def pack_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return what a file begins with: its tensors, in file order, are (name, dtype, shape, bytes)."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size in tensors:
        if name in fields:
            raise UsageError(f"a safetensors file can't hold a tensor named {name!r} beside what it has")
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(fields, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _damaged(path: Path, what: str) -> NoReturn:
    raise UsageError(f"{path}: damaged or not a safetensors file: {what}")


def _parse_json(path: Path, raw: bytearray) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            _damaged(path, f"{next(n for n in names if names.count(n) > 1)!r} occurs twice in the header")
        return fields

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        _damaged(path, f"the header is not JSON ({type(error).__name__})")
    if not isinstance(fields, dict):
        _damaged(path, "the header is not a JSON object")
    return fields


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(place) or len(place) != 2:
        _damaged(path, f"tensor {name!r} needs dtype, shape and data_offsets")
    start, stop = place
    needed = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else stop - start
    if stop < start or stop - start != needed:
        _damaged(path, f"tensor {name!r} ({dtype} {shape}) needs {needed:,} bytes, its offsets are {place}")
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_places(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.start != end:
            fault = "overlaps" if tensor.start < end else "leaves a hole after"
            _damaged(path, f"tensor {tensor.name!r} {fault} {before}")
        end, before = tensor.stop, repr(tensor.name)
    if end > size:
        raise UsageError(f"{path}: truncated: the header describes {end:,} bytes, the file has {size:,}")
    if end < size:
        _damaged(path, f"{size - end:,} bytes follow the last tensor")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """Open a file for reading and yield its descriptor; errors name the file."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: not a file")
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from a place in a file; raise UsageError where the file ends or can't be read."""
    while len(view):
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        if count == 0:
            raise UsageError(f"{path}: ends {len(view):,} bytes early: it was cut while being read")
        view, offset = view[count:], offset + count


def write_all(fd: int, view: memoryview, path: Path) -> None:
    """Write a whole buffer at the descriptor's position; raise UsageError naming the file where that fails."""
    while len(view):
        try:
            view = view[os.write(fd, view) :]
        except OSError as error:
            raise _unwritten(path, error) from None


def write_at(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Write a whole buffer at a place in a file; raise UsageError naming the file where that fails."""
    while len(view):
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            raise _unwritten(path, error) from None
        view, offset = view[count:], offset + count


def create(path: Path, size: int) -> None:
    """Create a file of a size, to be filled in any order; raise UsageError naming it where that fails."""
    with writing(path) as fd:
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> UsageError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UsageError(f"{path}: {error.strerror}{': nothing was written; free some space' if full else ''}")


@contextlib.contextmanager
def writing(path: Path, *, existing: bool = False) -> Iterator[int]:
    """Create a file or open one, yield its descriptor, and put it on the disk at the end; errors name the file."""
    try:
        fd = os.open(path, os.O_WRONLY | (0 if existing else os.O_CREAT | os.O_EXCL), 0o666)
    except OSError as error:
        raise _unwritten(path, error) from None
    try:
        yield fd
        try:
            os.fsync(fd)
        except OSError as error:
            raise _unwritten(path, error) from None
    finally:
        os.close(fd)


def write_behind(fd: int, first: int, start: int, stop: int) -> None:
    """Let the system put finished stretches on the disk while the next ones are computed.

    Called after the bytes [start, stop) were written, following those from ``first`` on; acts where they complete a
    stretch. It names all bytes so far: the new ones start on their way, and pages that have arrived since are free to
    take the next ones.
    """
    whole = stop // WRITEBACK_BYTES * WRITEBACK_BYTES
    if whole > start and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, first, whole - first, os.POSIX_FADV_DONTNEED)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk, so that a rename survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
