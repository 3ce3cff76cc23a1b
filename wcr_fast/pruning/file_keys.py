"""Weights in files as a source of keys for the window search: read through small buffers, never held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wcr_fast.pruning.safetensors_io import read_into
from wcr_fast.pruning.stream import Block, Meter, Segment, blocks_of
from wcr_fast.torch_path.cuts import KEY_DTYPES, comparison_dtype, keys_of
from wcr_fast.torch_path.window import KeyBlock

# A buffer of this size stays in the second-level cache between the read and the count.
SWEEP_BYTES = 1 << 20
# Keys read per place by the sample: one call each; more would only repeat what neighbours say.
LINE = 128


class OpenFile:
    """A file open for reading, with its path for messages."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a buffer from a place in the file."""
        read_into(self.fd, view, offset, self.path)


class FileKeys:
    """The keys of parts of tensors in open files, in the order given.

    Args:
        files: the open files, indexed by ``Segment.shard``.
        segments: where the parts lie; the i-th is tensor i of the search.
        dtypes: their dtypes.
        meter: told of each block read, from any thread, and of every sweep after the first.
    """

    def __init__(
        self,
        files: Sequence[OpenFile],
        segments: Sequence[Segment],
        dtypes: Sequence[torch.dtype],
        meter: Meter,
    ) -> None:
        self.dtype = comparison_dtype(dtypes)
        # A piece of a segment knows it by its place in this list; keys may be cut anywhere between elements.
        self.segments = [
            Segment(s.shard, s.start, s.stop, part=i, grain=dtype.itemsize, unit=dtype.itemsize)
            for i, (s, dtype) in enumerate(zip(segments, dtypes, strict=True))
        ]
        self.numels = [(s.stop - s.start) // s.unit for s in self.segments]
        self._files, self._dtypes, self._meter = files, dtypes, meter
        self._ends = np.array(list(accumulate(self.numels)))
        self._plain = all(dtype == self.dtype for dtype in dtypes)
        self._stopped, self._swept = False, False

    def stop(self) -> None:
        """Make running and later streams raise, from another thread."""
        self._stopped = True

    def streams(self, count: int, windows: int = 1) -> list[Iterator[KeyBlock]]:
        """Return ``count`` iterators that share the blocks among them: whoever is ready takes the next."""
        if self._swept:
            self._meter.expect(sum(s.stop - s.start for s in self.segments))
        self._swept = True
        blocks, lock = blocks_of(self.segments, SWEEP_BYTES), threading.Lock()
        return [self._stream(blocks, lock, self._meter.add) for _ in range(count)]

    def _stream(
        self, blocks: Iterator[Block], lock: threading.Lock, progress: Callable[[int], None]
    ) -> Iterator[KeyBlock]:
        buffer = torch.empty(SWEEP_BYTES, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            if self._stopped:
                raise InterruptedError("the sweep was stopped")
            size = block.stop - block.start
            self._files[block.shard].read_into(view[:size], block.start)
            yield self._key_block(block, buffer[:size])
            progress(size)

    def _key_block(self, block: Block, data: Tensor) -> KeyBlock:
        tensors = [part.part for part in block.parts]
        if self._plain:
            integer = KEY_DTYPES[self.dtype]
            keys = data.view(integer).bitwise_and_(torch.iinfo(integer).max)
            starts = [(part.start - block.start) // integer.itemsize for part in block.parts]
        else:
            # The copies start at aligned addresses, which a tensor behind one of another dtype may not.
            pieces = [
                keys_of(data[p.start - block.start : p.stop - block.start].clone().view(dtype), self.dtype)
                for p, dtype in zip(block.parts, (self._dtypes[i] for i in tensors), strict=True)
            ]
            keys = torch.cat(pieces)
            starts = [0, *accumulate(piece.numel() for piece in pieces[:-1])]
        return KeyBlock(tensors, starts, keys.numpy())

    def sample(self, size: int) -> np.ndarray:
        """Return about ``size`` keys as [lines, keys per line], one line in each of as many equal stretches."""
        total = int(self._ends[-1])
        if size >= total:
            stream = self._stream(blocks_of(self.segments, SWEEP_BYTES), threading.Lock(), lambda _: None)
            return np.concatenate([block.keys.copy() for block in stream]).reshape(1, -1)
        integer = torch.iinfo(KEY_DTYPES[self.dtype])
        lines = np.empty((max(1, size // LINE), min(LINE, total)), integer.dtype)
        # A fixed seed, and a random place in each stretch: even steps could fall on the same columns only.
        places = np.arange(len(lines)) + np.random.default_rng(0).random(len(lines))
        places = (places * ((total - lines.shape[1]) / len(lines))).astype(np.int64)
        for line, place in zip(lines, places, strict=True):
            self._read_line(int(place), line)
        return lines

    def _read_line(self, place: int, line: np.ndarray) -> None:
        """Fill a line with the keys from a place in the list, across tensors."""
        done, i = 0, int(np.searchsorted(self._ends, place, side="right"))
        while done < line.size:
            first = place + done - (int(self._ends[i]) - self.numels[i])
            count = min(line.size - done, self.numels[i] - first)
            segment, dtype = self.segments[i], self._dtypes[i]
            raw = bytearray(count * segment.unit)
            if raw:
                file = self._files[segment.shard]
                file.read_into(memoryview(raw), segment.start + first * segment.unit)
                line[done : done + count] = keys_of(torch.frombuffer(raw, dtype=dtype), self.dtype).numpy()
            done, i = done + count, i + 1
