"""Safetensors files whose zeros are packed: a bit per element and the elements that are left, exactly.

An element is left out when all its bits are 0, whatever its dtype: -0.0 and NaN are values. Everything passes through
in pieces of a few megabytes. docs/mask-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from wcr_fast.errors import UsageError
from wcr_fast.pruning.safetensors_io import (
    ITEM_BYTES,
    Header,
    TensorInfo,
    pack_header,
    parse_header,
    read_header,
    read_into,
    reading,
    write_all,
    writing,
)

FORMAT = "wcr-fast/export/1"
VALUES, BITMASK = ".values", ".bitmask"

# Bytes handled at a time; holds whole bytes of the bitmask for elements of any size.
PIECE = 4 << 20
# What two more entries take in the header, about: a tensor has to save more than that.
OVERHEAD = 256
ZLIB_LEVEL = 6

Meter = Callable[[int], None]


@dataclass(frozen=True)
class Survey:
    """What one pass over a dense file found.

    Attributes:
        header: its header, checked.
        raw: the header's JSON text.
        left: of the tensors to pack, how many elements are left, by name.
        sha256: of the whole file.
        zlib_bytes: what zlib makes of the whole file; None where it wasn't asked for.
    """

    header: Header
    raw: str
    left: dict[str, int]
    sha256: str
    zlib_bytes: int | None


@dataclass(frozen=True)
class Packed:
    """A packed file with its header checked: the dense file that it stands for, and where each tensor is."""

    header: Header
    dense: Header
    raw: bytes
    sha256: str
    stored: dict[str, tuple[TensorInfo, ...]]  # as it is; or its values and its bitmask


def _raw_header(path: Path, header: Header) -> bytes:
    raw = bytearray(header.data_start - 8)
    with reading(path) as fd:
        read_into(fd, memoryview(raw), 8, path)
    return bytes(raw)


def _items(info: TensorInfo, data: np.ndarray) -> np.ndarray:
    return data.view(f"<u{ITEM_BYTES[info.dtype]}")


def _pieces(fd: int, start: int, stop: int, path: Path) -> Iterator[np.ndarray]:
    """Yield the bytes between two places; each piece holds until the next one."""
    buffer = np.empty(min(PIECE, stop - start), np.uint8)
    for at in range(start, stop, PIECE):
        piece = buffer[: min(PIECE, stop - at)]
        read_into(fd, memoryview(piece), at, path)
        yield piece


def survey(path: Path, *, compress: bool, meter: Meter) -> Survey:
    """Read a dense file once: count what is not zero, and say which tensors become smaller when packed."""
    header = read_header(path)
    if header.metadata.get("format") == FORMAT:
        raise UsageError(f"{path}: is packed already; --restore makes it dense again")
    raw = _raw_header(path, header)
    sha, left, size = hashlib.sha256(), {}, 0
    deflate = zlib.compressobj(ZLIB_LEVEL) if compress else None

    def see(data: bytes | np.ndarray) -> None:
        nonlocal size
        sha.update(data)
        if deflate is not None:
            size += len(deflate.compress(data))
        meter(len(data))

    see(len(raw).to_bytes(8, "little") + raw)
    names = {info.name for info in header.tensors}
    with reading(path) as fd:
        for info in header.tensors:
            count, known = 0, info.dtype in ITEM_BYTES
            for piece in _pieces(fd, info.start, info.stop, path):
                see(piece)
                count += np.count_nonzero(_items(info, piece)) if known else 0
            if known and not {info.name + VALUES, info.name + BITMASK} & names:
                packed = count * ITEM_BYTES[info.dtype] + -(-info.numel // 8)
                if packed + OVERHEAD < info.stop - info.start:
                    left[info.name] = int(count)
    if deflate is not None:
        size += len(deflate.flush())
    return Survey(header, raw.decode(), left, sha.hexdigest(), size if compress else None)


def write_packed(found: Survey, target: Path, *, meter: Meter) -> int:
    """Write the packed form of a surveyed file; return its size."""
    source, entries = found.header.path, []
    for info in found.header.tensors:
        count = found.left.get(info.name)
        if count is None:
            entries.append((info.name, info.dtype, info.shape, info.stop - info.start))
        else:
            entries.append((info.name + VALUES, info.dtype, (count,), count * ITEM_BYTES[info.dtype]))
            entries.append((info.name + BITMASK, "U8", (-(-info.numel // 8),), -(-info.numel // 8)))
    entries.sort(key=lambda entry: -ITEM_BYTES.get(entry[1], 1))  # so that all begin at multiples of their size
    metadata = {
        "format": FORMAT,
        "dense_header": found.raw,
        "dense_bytes": str(found.header.size),
        "dense_sha256": found.sha256,
    }
    head = pack_header(entries, metadata)
    places, ends, end = {}, {}, len(head)
    for name, _, _, size in entries:
        places[name], ends[name] = end, end + size
        end += size
    with reading(source) as src, writing(target) as dst:
        write_all(dst, memoryview(head), target)

        def put(name: str, data: np.ndarray) -> None:
            os.lseek(dst, places[name], os.SEEK_SET)
            write_all(dst, memoryview(data).cast("B"), target)
            places[name] += data.nbytes

        for info in found.header.tensors:
            for piece in _pieces(src, info.start, info.stop, source):
                if info.name in found.left:
                    items = _items(info, piece)
                    kept = items != 0
                    put(info.name + VALUES, items[kept])
                    put(info.name + BITMASK, np.packbits(kept, bitorder="little"))
                else:
                    put(info.name, piece)
                meter(len(piece))
    if places != ends:
        raise UsageError(f"{source}: changed while it was read: nothing was written")
    return end


def open_packed(path: Path) -> Packed:
    """Read and check the header of a packed file.

    Raises:
        UsageError: when the file is missing, damaged, or not packed.
    """
    header = read_header(path)
    found = header.metadata.get("format", "")
    if found != FORMAT:
        newer = found.startswith(FORMAT.rpartition("/")[0])
        raise UsageError(
            f"{path}: format {found!r} is not known; update wcr-fast"
            if newer
            else f"{path}: not a file of wcr-fast export ({FORMAT}); a dense one needs no unpacking"
        )
    try:
        raw = header.metadata["dense_header"].encode()
        size, sha256 = int(header.metadata["dense_bytes"]), header.metadata["dense_sha256"]
    except (KeyError, ValueError):
        damaged(path, "its metadata is incomplete")
    dense = parse_header(path, raw, size)
    there = {info.name: info for info in header.tensors}
    stored = {info.name: _stored(path, info, there) for info in dense.tensors}
    if there:
        damaged(path, f"{next(iter(there))!r} belongs to no tensor")
    return Packed(header, dense, raw, sha256, stored)


def _stored(path: Path, info: TensorInfo, there: dict[str, TensorInfo]) -> tuple[TensorInfo, ...]:
    """Take a tensor's entries out of those that are there."""
    names = [info.name] if info.name in there else [info.name + VALUES, info.name + BITMASK]
    parts = tuple(there.pop(name) for name in names if name in there)
    if len(parts) < len(names) or not _fit(info, *parts):
        damaged(path, f"tensor {info.name!r} is missing, or not what its header says")
    return parts


def _fit(info: TensorInfo, first: TensorInfo, mask: TensorInfo | None = None) -> bool:
    """Tell whether a stored tensor, or values and a bitmask, can be this dense one."""
    if first.dtype != info.dtype:
        return False
    if mask is None:
        return first.shape == info.shape and first.stop - first.start == info.stop - info.start
    bits = (mask.dtype, mask.shape) == ("U8", (-(-info.numel // 8),))
    return bits and len(first.shape) == 1 and info.dtype in ITEM_BYTES


def unpacked(packed: Packed, fd: int, info: TensorInfo) -> Iterator[np.ndarray]:
    """Yield a tensor's dense bytes in pieces; raise UsageError where bits and values don't go together."""
    path, parts = packed.header.path, packed.stored[info.name]
    if len(parts) == 1:
        yield from _pieces(fd, parts[0].start, parts[0].stop, path)
        return
    values, mask = parts
    item, at = ITEM_BYTES[info.dtype], values.start
    step = PIECE // item
    for first in range(0, info.numel, step):
        count = min(step, info.numel - first)
        bits = np.empty(-(-count // 8), np.uint8)
        read_into(fd, memoryview(bits), mask.start + first // 8, path)
        kept = np.unpackbits(bits, count=count, bitorder="little").view(bool)
        part = np.empty(int(np.count_nonzero(kept)), f"<u{item}")
        if at + part.nbytes > values.stop:
            damaged(path, f"{info.name!r} has fewer values than its bitmask says")
        read_into(fd, memoryview(part).cast("B"), at, path)
        at += part.nbytes
        dense = np.zeros(count, f"<u{item}")
        dense[kept] = part
        yield dense.view(np.uint8)
    if at != values.stop:
        damaged(path, f"{info.name!r} has more values than its bitmask says")


def check_sha256(packed: Packed, sha256: str) -> None:
    """Raise UsageError unless this is the hash of the dense file."""
    if sha256 != packed.sha256:
        damaged(packed.header.path, "its content doesn't match dense_sha256")


def damaged(path: Path, what: str) -> NoReturn:
    raise UsageError(f"{path}: damaged export: {what}; export the checkpoint again")
