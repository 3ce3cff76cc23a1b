"""Writing a pruned checkpoint: every file once, block by block, erasing on the way."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from wcr_fast.pruning.checkpoint_cuts import Cuts, Job
from wcr_fast.pruning.checkpoint_files import copy_file, make_folders
from wcr_fast.pruning.erase import Eraser
from wcr_fast.pruning.safetensors_io import create, write_at, write_behind, writing
from wcr_fast.pruning.staging import staging
from wcr_fast.pruning.stored import Checksummed
from wcr_fast.pruning.stream import BLOCK_BYTES, Block, Ring, Segment, blocks_of


def write(job: Job, cuts: Cuts, target: Path, others: Sequence[Path]) -> None:
    """Write the pruned checkpoint; all its files take their places at the end, or none."""
    files, ranks = job.contents.files, job.ranks
    paths = [shard if files.is_folder else target.name for shard in files.shards]
    with staging(target, files) if ranks.index == 0 else contextlib.nullcontext() as stage:
        if stage is not None:
            make_folders(others, stage)
            for path, shard in zip(paths, job.contents.shards, strict=True):
                create(stage / path, shard.size)
                shutil.copymode(shard.path, stage / path)
        stage = ranks.share(stage)
        for other in others[ranks.index :: ranks.size]:
            copy_file(files.root / other, stage / other)
        segments = sorted((part.segment for part in job.my_parts()), key=lambda segment: (segment.shard, segment.start))
        by_shard = {shard: list(parts) for shard, parts in groupby(segments, key=lambda segment: segment.shard)}
        for stretch in job.stretches:
            _write_stretch(job, cuts, stretch, by_shard.get(stretch.shard, []), stage / paths[stretch.shard])
        cuts.zeros_counted = ranks.sum(cuts.zeros_counted)
    ranks.meet()


def rehearse(job: Job, made: Sequence[Cuts]) -> None:
    """Select within rows and n:m groups without writing, for the counts of a dry run."""
    segments = [part.segment for part in job.my_parts() if part.group < 0]
    with Ring(BLOCK_BYTES) as ring:
        for block, data in ring.flow(blocks_of(segments, BLOCK_BYTES), job.load):
            for cuts in made[1:]:
                _edit(job, cuts, block, data.clone())
            _edit(job, made[0], block, data)
            job.meter.add(block.stop - block.start)
    for cuts in made:
        cuts.zeros_counted = job.ranks.sum(cuts.zeros_counted)


def _write_stretch(job: Job, cuts: Cuts, stretch: Segment, parts: Sequence[Segment], target: Path) -> None:
    """Write a stretch of one file: copy it block by block, erasing in its parts, which come in order."""
    starts = [part.start for part in parts]
    records = (record for record in job.contents.checksums if record.shard == stretch.shard)
    checksums = [_Crc(r) for r in records if bisect_left(starts, r.start) < bisect_left(starts, r.stop)]

    def store(block: Block, view: memoryview) -> None:
        for crc in checksums:
            crc.add(block.start, view)
        write_at(fd, view, block.start, target)
        write_behind(fd, stretch.start, block.start, block.stop)

    with writing(target, existing=True) as fd:
        with Ring(BLOCK_BYTES) as ring:
            for block, data in ring.flow(blocks_of(_filled(stretch, parts), BLOCK_BYTES), job.load, store):
                _edit(job, cuts, block, data)
                job.meter.add(block.stop - block.start)
        for crc in checksums:
            for place in crc.record.places:
                write_at(fd, memoryview(crc.value.to_bytes(4, "little")), place, target)


def _filled(stretch: Segment, parts: Sequence[Segment]) -> Iterator[Segment]:
    """Yield the parts of a stretch, and between them what is only copied."""
    at = stretch.start
    for part in parts:
        if part.start > at:
            yield stretch.between(at, part.start)
        yield part
        at = part.stop
    if stretch.stop > at:
        yield stretch.between(at, stretch.stop)


class _Crc:
    """The CRC-32 of a record whose bytes pass by in order."""

    def __init__(self, record: Checksummed) -> None:
        self.record, self.value = record, 0

    def add(self, start: int, view: memoryview) -> None:
        """Take what a block that begins at ``start`` holds of the record."""
        first, last = max(self.record.start - start, 0), self.record.stop - start
        if first < last and first < len(view):
            self.value = zlib.crc32(view[first:last], self.value)


def _edit(job: Job, cuts: Cuts, block: Block, data: Tensor) -> None:
    """Erase in the parts of one block; count the zeros where only now it is known what goes."""
    for piece in block.parts:
        part = job.plan.parts[piece.part]
        stretch = data[piece.start - block.start : piece.stop - block.start]
        weights = _erase(stretch, job.dtype(part), cuts.erasers[piece.part])
        if part.group < 0:
            cuts.zeros_counted[part.weight] += weights.numel() - int(weights.count_nonzero())


def _erase(data: Tensor, dtype: torch.dtype, eraser: Eraser) -> Tensor:
    """Erase in place; return the weights."""
    # Behind a tensor of another dtype numbers may start at any byte.
    aligned = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
    weights = aligned.view(dtype)
    eraser(weights)
    if aligned is not data:
        data.copy_(aligned)
    return weights
