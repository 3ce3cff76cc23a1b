"""Files as a stream of blocks through a few fixed buffers: one thread reads ahead, one writes behind.

Memory is ``BUFFERS * BLOCK_BYTES`` whatever the size of the files.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from wcr_fast.errors import UsageError

# Large enough to hide what a block costs in Python (some 50 us), small enough that the buffers stay warm.
BLOCK_BYTES = 8 << 20
BUFFERS = 5

Progress = Callable[[int, int], None]


class Meter:
    """Adds up the bytes of finished blocks and tells the caller: ``progress(done, total)``.

    Args:
        total: bytes that pass by here.
        progress: what to call.
        share: their share of the bytes that several processes work on at the same pace; all are told.
    """

    def __init__(self, total: int, progress: Progress | None, share: float = 1.0) -> None:
        self.total, self.done, self.progress, self.share = total, 0, progress, share

    def add(self, count: int) -> None:
        """Count finished bytes."""
        self.done += count
        if self.progress is not None:
            self.progress(round(self.done / self.share), round(self.total / self.share))

    def expect(self, count: int) -> None:
        """Count bytes to do that nobody knew of before."""
        self.total += count


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one file: bytes to copy, or a part of a tensor to prune.

    Attributes:
        shard: index of the file.
        start: first byte in the file.
        stop: one past the last byte.
        part: index of the part to prune, -1 for bytes to copy.
        grain: bytes that belong together (a row, or a slice along the first dimension); the segment may be
            cut between them.
        unit: finer pieces, counted from the start of a grain, at which a grain larger than a block may be cut.
    """

    shard: int
    start: int
    stop: int
    part: int = -1
    grain: int = 1
    unit: int = 1

    def cut(self, start: int, room: int) -> int:
        """Return where a part that starts at ``start`` ends, within ``room`` bytes; ``start`` if none fits.

        A part is a number of whole grains, or lies inside one.
        """
        inside = (start - self.start) % self.grain
        if inside == 0 and room >= self.grain:
            return min(start + room // self.grain * self.grain, self.stop)
        return min(start + room // self.unit * self.unit, start - inside + self.grain, self.stop)

    def between(self, start: int, stop: int) -> Segment:
        """Return the stretch of this segment between two places."""
        return dataclasses.replace(self, start=start, stop=stop)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """What is read at once: a stretch of one file, and the parts of tensors in it."""

    shard: int
    start: int
    stop: int
    parts: tuple[Segment, ...]


def blocks_of(segments: Iterable[Segment], size: int) -> Iterator[Block]:
    """Cut segments into blocks of at most ``size`` bytes; neighbours in a file share a block.

    Raises:
        UsageError: when a segment has a unit larger than a block.
    """
    shard = start = stop = -1
    parts: list[Segment] = []
    for segment in segments:
        at = segment.start
        if segment.shard != shard or at != stop:
            if stop > start:
                yield Block(shard, start, stop, tuple(parts))
            shard, start, stop, parts = segment.shard, at, at, []
        while at < segment.stop:
            end = segment.cut(at, size - (stop - start))
            if end > at:
                if segment.part >= 0:
                    parts.append(segment.between(at, end))
                at = stop = end
            elif stop > start:
                yield Block(shard, start, stop, tuple(parts))
                start, parts = stop, []
            else:
                raise UsageError(f"one group of weights takes {segment.unit:,} bytes: more than {size:,}")
    if stop > start:
        yield Block(shard, start, stop, tuple(parts))


class Ring:
    """The buffers and the two threads; leave the ``with`` block before closing the files.

    Args:
        size: bytes of a buffer.
        count: number of buffers, at least 3.
    """

    def __init__(self, size: int, count: int = BUFFERS) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        self.views = [memoryview(buffer.numpy()) for buffer in self.buffers]
        self.reader = ThreadPoolExecutor(1, "wcr-fast-read")
        self.writer = ThreadPoolExecutor(1, "wcr-fast-write")

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What waits is dropped, what runs ends: at most one block each.
        self.reader.shutdown(cancel_futures=True)
        self.writer.shutdown(cancel_futures=True)

    def flow(
        self,
        blocks: Iterable[Block],
        load: Callable[[Block, memoryview], None],
        store: Callable[[Block, memoryview], None] | None = None,
    ) -> Iterator[tuple[Block, Tensor]]:
        """Yield each block with its bytes (uint8, to be edited in place); then store it.

        Blocks are loaded and stored in order. An error of ``load`` or ``store`` is raised here.
        """
        count = len(self.buffers)
        todo = iter(blocks)
        loads: deque[tuple[Block, int, Future[None]]] = deque()
        stores: list[Future[None] | None] = [None] * count
        started = 0

        def read_ahead() -> None:
            nonlocal started
            block = next(todo, None)
            if block is None:
                return
            slot = started % count
            if (pending := stores[slot]) is not None:
                pending.result()
            view = self.views[slot][: block.stop - block.start]
            loads.append((block, slot, self.reader.submit(load, block, view)))
            started += 1

        for _ in range(count - 2):  # the other two: one being edited, one being written
            read_ahead()
        while loads:
            block, slot, loaded = loads.popleft()
            loaded.result()
            length = block.stop - block.start
            yield block, self.buffers[slot][:length]
            if store is not None:
                stores[slot] = self.writer.submit(store, block, self.views[slot][:length])
            read_ahead()
        for pending in stores:
            if pending is not None:
                pending.result()
