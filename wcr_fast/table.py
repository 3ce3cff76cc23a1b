"""Tables: how a list of tensors is described to a kernel, without copying or joining any of them.

A table covers the tensors of one device and dtype. It holds one row of int64 per tensor (address, length, first
chunk, position in the caller's list, then what else the kernel needs) and, per chunk, the number of its tensor.
Tables are cached by what is in them, so a list that didn't move costs one comparison and no upload.

While a CUDA graph is captured nothing is made or sent: it would be recorded instead of done, so the cache would
hold garbage, and a replay would copy from host memory that is long free. What was made before may be used; a
graph reads it at every replay, so it is then kept for good.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Small: a table is a few kilobytes, and a training loop plus a pruning call need a handful.
CACHE_SIZE = 32

# Device memory that captured graphs read, by id: a few kilobytes a capture.
_captured: dict[int, object] = {}


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured on this device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _refuse_capture(device: torch.device) -> None:
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph capture can't build the tables of an op: run the op once on the capture stream before "
            "capturing: `with torch.cuda.stream(s): ...`, then `torch.cuda.graph(g, stream=s)`, with the same "
            "tensors; an op that copies a weight with gaps, or a gradient whose dtype or layout isn't its weight's, "
            "can't be captured"
        )


def keep_for_graph(device: torch.device, used: object) -> None:
    """Keep an object for good where a graph that reads its memory is being captured."""
    if capturing(device):
        _captured[id(used)] = used


@dataclass
class TensorTable:
    """The device-side description of some tensors, with the scratch that belongs to it and its stream."""

    device: torch.device
    dtype: torch.dtype
    rows: Tensor  # int64 [tensors, 4 + extra]
    block_to_tensor: Tensor  # int32 [chunks]
    positions: tuple[int, ...]
    _scratch: dict[str, Tensor] = field(default_factory=dict)
    _addresses: tuple[np.ndarray, Tensor] | None = None

    @property
    def num_chunks(self) -> int:
        return self.block_to_tensor.numel()

    def scratch(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a buffer that is zero when first taken and keeps what kernels leave in it.

        Raises RuntimeError when it would have to be made while a CUDA graph is captured.
        """
        if name not in self._scratch:
            _refuse_capture(self.device)
            self._scratch[name] = torch.zeros(numel, dtype=dtype, device=self.device)
        return self._scratch[name]

    def addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the addresses of further tensors, one per row, uploaded only when they changed.

        Raises RuntimeError when they would have to be sent while a CUDA graph is captured.
        """
        return self.sent(np.array(pointers(tensors), dtype=np.int64))

    def sent(self, numbers: np.ndarray) -> Tensor:
        """Return addresses, int64, on the device, as :meth:`addresses` does of tensors."""
        if self._addresses is None or not np.array_equal(self._addresses[0], numbers):
            self._addresses = numbers, upload(numbers, self.device)
        keep_for_graph(self.device, self._addresses[1])
        return self._addresses[1]


def pointers(tensors: Iterable[Tensor]) -> list[int]:
    """Return where the tensors' elements lie."""
    return list(map(Tensor.data_ptr, tensors))


def current_stream(device: torch.device) -> int:
    """Return the handle of a device's current stream, 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small array to a device without waiting for it; RuntimeError while a CUDA graph is captured."""
    _refuse_capture(device)
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    # The caching host allocator hands a pinned buffer out again only after the copy from it has run.
    return host.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=2 * CACHE_SIZE)
def constants_on(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return some numbers on a device, uploaded once."""
    return upload(np.array(values, dtype=np.float64), device).to(dtype)


def numbers_on(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return numbers, some of them perhaps 0-d tensors, as float64 on a device, without waiting for it."""
    if not any(isinstance(number, Tensor) for number in numbers):
        return constants_on(tuple(numbers), torch.float64, device)
    tensors = (torch.as_tensor(number, dtype=torch.float64) for number in numbers)
    return torch.stack([t.to(device, non_blocking=True) for t in tensors])


def send(array: np.ndarray, device: torch.device, into: Tensor | None) -> Tensor:
    """Copy a small array over a tensor that stays where it is (a captured graph reads it there), or to a new one."""
    if into is None:
        return upload(array, device)
    _refuse_capture(device)
    host = torch.from_numpy(array)
    return into.copy_(host.pin_memory() if device.type == "cuda" else host, non_blocking=True)


@functools.lru_cache(maxsize=CACHE_SIZE)
def _build(
    device: torch.device,
    dtype: torch.dtype,
    stream: int,  # part of the key: a table's uploads and scratch are ordered by one stream
    chunk: int,
    positions: tuple[int, ...],
    entries: tuple[tuple[int, ...], ...],
) -> TensorTable:
    columns = np.array(entries, dtype=np.int64)
    chunks = -(-columns[:, 1] // chunk)
    first = np.cumsum(chunks) - chunks
    rows = np.column_stack([columns[:, :2], first, np.array(positions, dtype=np.int64), columns[:, 2:]])
    owners = np.repeat(np.arange(len(entries), dtype=np.int32), chunks)
    return TensorTable(device, dtype, upload(np.ascontiguousarray(rows), device), upload(owners, device), positions)


def build_table(
    tensors: Sequence[Tensor],
    positions: Sequence[int],
    chunk: int,
    *,
    lengths: Sequence[int] | None = None,
    extra: Sequence[Sequence[int]] | None = None,
) -> TensorTable:
    """Return the table of tensors that share device and dtype, from the cache when nothing moved.

    Args:
        tensors: non-empty tensors; what a kernel may assume of their layout is the caller's business.
        positions: their places in the caller's list.
        chunk: units of work per program.
        lengths: units of work per tensor; the number of elements when None.
        extra: further int64 columns, one sequence per tensor, all of one length.

    Raises:
        RuntimeError: the table would have to be built while a CUDA graph is captured.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if lengths is None:
        lengths = [t.numel() for t in tensors]
    if extra is None:
        entries = tuple((t.data_ptr(), n) for t, n in zip(tensors, lengths, strict=True))
    else:
        entries = tuple((t.data_ptr(), n, *more) for t, n, more in zip(tensors, lengths, extra, strict=True))
    table = _build(device, dtype, current_stream(device), chunk, tuple(positions), entries)
    keep_for_graph(device, table)
    return table


def group(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the non-empty tensors, grouped by device and dtype, in list order."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(groups.values())


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which launches go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
