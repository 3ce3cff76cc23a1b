"""Where in a file of ``torch.save`` a single tensor's numbers lie; nothing is loaded, nothing in it is run.

Such a file, or a stretch of one, is a zip of uncompressed records: ``data.pkl`` says how the tensor is built of
``data/0``, its storage, and ``byteorder`` in which order the bytes of a number are.
"""

from __future__ import annotations

import io
import math
import operator
import os
import struct
import sys
import zipfile
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from wcr_fast.pruning.inert_pickle import Inert, InertUnpickler, type_name

# Storage classes of data.pkl.
STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# Of data.pkl, which takes some 200.
MAX_SMALL_BYTES = 1 << 20


class NotPlain(ValueError):
    """The stretch holds no tensor that can be pruned where it lies; the text says why."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor's dtype, shape and place, and its storage's place and the places of that one's CRC-32, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    record: tuple[int, int]
    crc_places: tuple[int, ...]


class _Stretch(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.fd, self.start, self.size, self.at = fd, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        if self.at < 0:
            raise OSError("a place before the start")
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.fd, max(0, min(len(buffer), self.size - self.at)), self.start + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def find_tensor(fd: int, start: int, size: int) -> SavedTensor:
    """Find the tensor that a stretch of an open file holds, as ``torch.save(tensor)`` wrote it.

    Raises:
        NotPlain: when it is something else: no such zip, a tensor of another class, numbers of other dtypes than
            float16, bfloat16, float32 and float64, not row-major, or of a machine with the other byte order.
    """
    stretch = _Stretch(fd, start, size)
    try:
        with zipfile.ZipFile(stretch) as archive:
            return _find(archive, stretch)
    except (NotPlain, OSError):
        raise
    except Exception as error:  # a damaged zip or pickle can lead anywhere
        raise NotPlain(f"not what torch.save writes ({type(error).__name__}: {error})") from None


def _find(archive: zipfile.ZipFile, stretch: _Stretch) -> SavedTensor:
    root = archive.namelist()[0].partition("/")[0]

    def read(name: str) -> bytes:
        start, stop = _record(stretch, archive.getinfo(f"{root}/{name}"))
        if stop - start > MAX_SMALL_BYTES:
            raise NotPlain(f"its {name} takes {stop - start:,} bytes")
        return os.pread(stretch.fd, stop - start, start)

    if f"{root}/byteorder" in archive.namelist() and read("byteorder").decode() != sys.byteorder:
        raise NotPlain("written on a machine with the other byte order")
    dtype, key, offset, shape, strides = _describe(read("data.pkl"))
    info = archive.getinfo(f"{root}/data/{key}")
    record = _record(stretch, info)
    contiguous = list(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
    if any(mine != want and n > 1 for mine, want, n in zip(strides, contiguous, shape, strict=True)):
        raise NotPlain("stored in another memory order than row-major, such as channels_last")
    begin = record[0] + offset * ITEM_BYTES[dtype]
    end = begin + math.prod(shape) * ITEM_BYTES[dtype]
    if end > record[1]:
        raise NotPlain("a damaged zip: the tensor is larger than its storage")
    return SavedTensor(dtype, shape, begin, end, record, _crc_places(archive, stretch, info, record[1]))


def _record(stretch: _Stretch, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where a record's bytes lie in the file. They are not checked: torch can leave checksums out."""
    header = os.pread(stretch.fd, 30, stretch.start + info.header_offset)
    if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
        raise NotPlain("a damaged zip, or compressed")
    start = stretch.start + info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    return start, start + info.file_size


class _Unpickler(InertUnpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def _describe(pickled: bytes) -> tuple[str, str, int, tuple[int, ...], tuple[int, ...]]:
    """Return dtype, the storage's key, offset in it, shape and strides of a pickled tensor."""
    tensor = _Unpickler(io.BytesIO(pickled)).load()
    if isinstance(tensor, Inert) and type_name(tensor) == "_rebuild_parameter":
        tensor = tensor.args[0]
    if not isinstance(tensor, Inert) or type_name(tensor) != "_rebuild_tensor_v2":
        raise NotPlain(f"not a plain tensor ({type_name(tensor)})")
    storage, offset, shape, strides = tensor.args[:4]
    dtype = STORAGES.get(type_name(storage[1]))
    if dtype is None:
        raise NotPlain(f"its storage is a {type_name(storage[1])}")
    return dtype, str(storage[2]), offset, tuple(shape), tuple(strides)


def _crc_places(archive: zipfile.ZipFile, stretch: _Stretch, info: zipfile.ZipInfo, stop: int) -> tuple[int, ...]:
    """Return where a record's CRC-32 is stored: in the zip's directory, and behind the record or in its header."""
    at = stretch.start + archive.start_dir
    for entry in archive.infolist():
        if entry is info:
            break
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        at += 46 + len(name) + len(entry.extra) + len(entry.comment)
    near = stop + 4 if info.flag_bits & 8 else stretch.start + info.header_offset + 14
    crc = info.CRC.to_bytes(4, "little")
    signed = os.pread(stretch.fd, 4, at) == b"PK\x01\x02" and (
        not info.flag_bits & 8 or os.pread(stretch.fd, 4, stop) == b"PK\x07\x08"
    )
    if not signed or os.pread(stretch.fd, 4, at + 16) != crc or os.pread(stretch.fd, 4, near) != crc:
        raise NotPlain("a damaged zip: its checksums are not where they should be")
    return (near, at + 16)
