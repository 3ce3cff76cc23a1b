"""Tensors in memory as blocks of keys, without concatenating or copying more than a block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.torch_path.cuts import KEY_DTYPES, comparison_dtype, keys_of
from wcr_fast.torch_path.layout import flat_view, is_dense
from wcr_fast.torch_path.scan import KeyBlock, compiled

# 512 KB of float32 keys and their two flags per key stay in a core's L2.
BLOCK = 1 << 17
# Compiled code needs no copy of what it reads: only its calls cost. What it finds is written to a row per window, each
# in huge pages of its own: with many windows, smaller blocks take less of them.
COMPILED, COMPILED_MANY = 1 << 20, 1 << 18
MANY_WINDOWS = 4
# torch runs an op on fewer elements than this on the calling thread. Its own pool waits in busy loops, which
# costs far more than it brings as soon as another process wants the core.
SERIAL = (1 << 15) - 64
LINE_BYTES = 128
GOLDEN = (5**0.5 - 1) / 2

Piece = tuple[int, np.ndarray | Tensor]


def pieces(tensor: Tensor, limit: int = BLOCK) -> Iterator[Tensor]:
    """Yield views of at most ``limit`` elements that together run through the tensor in logical order."""
    if tensor.numel() <= limit:
        if tensor.numel():
            yield tensor
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(limit)
        return
    row = tensor[0].numel()
    if row > limit:
        for i in range(tensor.shape[0]):
            yield from pieces(tensor[i], limit)
    else:
        yield from tensor.split(limit // row)


def spread(total: int, strata: int) -> np.ndarray:
    """Return one place from each of so many strata of [0, total), rising.

    It moves on by the golden ratio: no period of a layout falls in step with it. (numpy.random would do, but costs 5 MB
    to import.)
    """
    order = np.arange(strata)
    return ((order + order * GOLDEN % 1.0) * (total / strata)).astype(np.int64)


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the tensor's memory can be read as keys of this dtype where it lies."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and is_dense(tensor)


def _patterns(flat: Tensor) -> np.ndarray:
    return flat.view(KEY_DTYPES[flat.dtype]).numpy()


class MemorySource:
    """A list of tensors as a source of keys; order inside a tensor is memory order where it is dense."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t.detach() for t in tensors]
        self.dtype = comparison_dtype(t.dtype for t in tensors)
        self.numels = [t.numel() for t in tensors]
        self._keys = np.dtype(str(KEY_DTYPES[self.dtype]).removeprefix("torch."))
        self._mask = np.iinfo(self._keys).max

    def sample(self, size: int) -> np.ndarray:
        """Return about ``size`` keys, in lines of 128 bytes at fixed places; see KeySource."""
        total = sum(self.numels)
        if total <= size:
            return self._everything(total)
        per_line = LINE_BYTES // self._keys.itemsize
        strata = max(size // per_line, 1)
        places = spread(total, strata)
        ends = np.cumsum(self.numels)
        stops = np.searchsorted(places, ends)
        lines = np.empty((strata, per_line), self._keys)
        for i, tensor in enumerate(self.tensors):
            start = stops[i - 1] if i else 0
            if start < stops[i]:
                inside = places[start : stops[i]] - (ends[i] - self.numels[i])
                self._lines(tensor, inside, lines[start : stops[i]])
        lines &= self._mask
        return lines

    def _lines(self, tensor: Tensor, places: np.ndarray, out: np.ndarray) -> None:
        """Write the lines that hold these flat places; tensors shorter than a line repeat themselves."""
        per_line = out.shape[1]
        count = tensor.numel() // per_line
        if _plain(tensor, self.dtype) and count:
            whole = _patterns(flat_view(tensor))[: count * per_line].reshape(count, per_line)
            # the last line may be cut short: "clip" takes the one before, and needs no buffer for ``out``
            np.take(whole, places // per_line, axis=0, out=out, mode="clip")
            return
        index = places[:, None] // per_line * per_line + np.arange(per_line)
        index = torch.from_numpy(index % tensor.numel()).to(tensor.device)
        coords = torch.unravel_index(index.view(-1), tensor.shape) if tensor.dim() else ()
        picked = tensor[coords].reshape(-1).expand(index.numel())
        out[...] = keys_of(picked, self.dtype).cpu().numpy().reshape(out.shape)

    def _everything(self, total: int) -> np.ndarray:
        keys, end = np.empty(total, self._keys), 0
        for block in self.streams(1)[0]:
            np.bitwise_and(block.keys, self._mask, out=keys[end : end + block.keys.size])
            end += block.keys.size
        return keys.reshape(-1, 1)

    def streams(self, count: int, windows: int = 1) -> list[Iterator[KeyBlock]]:
        """Return iterators over every count-th block, where compiled code compares them with many windows; else one.

        A block takes numpy some 20 microseconds a call: two threads spend what they gain on handing over the
        interpreter's lock, and lose much more when another process wants a core. Compiled code waits for memory where
        there are few windows: two threads then take 1.1 times as long as one, with ten 0.8 times (2 cores).
        """
        many = windows >= MANY_WINDOWS
        # Another device is read on the stream of the thread that asked.
        worthwhile = compiled() and many and all(t.device.type == "cpu" for t in self.tensors)
        count = min(count, sum(self.numels) // COMPILED + 1) if worthwhile else 1
        size = (COMPILED_MANY if many else COMPILED) if compiled() else BLOCK
        return [self._blocks(size, first, count) for first in range(count)]

    def _groups(self, size: int) -> Iterator[list[Piece]]:
        """Cut the list into groups of pieces of one block together; small tensors share a block."""
        group: list[Piece] = []
        room = BLOCK
        for i, tensor in enumerate(self.tensors):
            for piece in self._pieces(tensor, size):
                length = piece.size if isinstance(piece, np.ndarray) else piece.numel()
                if group and length > room:
                    yield group
                    group, room = [], BLOCK
                group.append((i, piece))
                room -= length
        if group:
            yield group

    def _pieces(self, tensor: Tensor, size: int) -> Iterator[np.ndarray | Tensor]:
        if not _plain(tensor, self.dtype):
            # In memory order where the tensor is dense: copies of strided pieces are slow.
            limit = SERIAL if tensor.device.type == "cpu" else BLOCK
            yield from pieces(flat_view(tensor) if is_dense(tensor) else tensor, limit)
            return
        flat = _patterns(flat_view(tensor))
        for start in range(0, flat.size, size):
            yield flat[start : start + size]

    def _blocks(self, size: int, first: int, step: int) -> Iterator[KeyBlock]:
        buffer = np.empty(min(BLOCK, sum(self.numels)), self._keys)
        for group in itertools.islice(self._groups(size), first, None, step):
            if len(group) == 1 and isinstance(group[0][1], np.ndarray):
                yield KeyBlock([group[0][0]], [0], group[0][1], signed=True)
                continue
            tensors, starts, end = [], [], 0
            for i, piece in group:
                if not tensors or tensors[-1] != i:  # neighbouring pieces of one tensor are one segment
                    tensors.append(i)
                    starts.append(end)
                length = piece.size if isinstance(piece, np.ndarray) else piece.numel()
                out = buffer[end : end + length]
                if isinstance(piece, np.ndarray):
                    np.bitwise_and(piece, self._mask, out=out)
                else:
                    out[...] = keys_of(piece.reshape(-1), self.dtype).cpu().numpy()
                end += length
            yield KeyBlock(tensors, starts, buffer[:end])
