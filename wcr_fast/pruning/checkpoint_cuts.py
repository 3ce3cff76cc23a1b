"""Where a checkpoint's weights are cut: one search over its files for each selection, for all sparsities at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_plan import FLOATS, Part, Plan, Scope, Selection
from wcr_fast.pruning.erase import CutEraser, Eraser, nm_eraser, row_eraser
from wcr_fast.pruning.file_keys import FileKeys, OpenFile
from wcr_fast.pruning.ranks import Ranks
from wcr_fast.pruning.stored import Contents, StoredTensor
from wcr_fast.pruning.stream import BLOCK_BYTES, Block, Meter, Ring, Segment, blocks_of
from wcr_fast.pruning.tie_order import first_ties, logical_indices
from wcr_fast.torch_path.cuts import comparison_dtype, keys_of, num_keep, value_of
from wcr_fast.torch_path.shared import shared_search, together
from wcr_fast.torch_path.window import Found, shares, window_search


@dataclass
class Job:
    """A checkpoint with its files open, its weights chosen, and what competes with what.

    Attributes:
        stretches: what this process writes: at most one stretch of each file.
    """

    source: Path
    contents: Contents
    opened: list[OpenFile]
    weights: list[StoredTensor]
    plan: Plan
    stretches: list[Segment]
    ranks: Ranks
    meter: Meter

    def my_parts(self) -> list[Part]:
        """Return the parts that this process reads and writes."""
        return [part for part in self.plan.parts if part.rank == self.ranks.index]

    def load(self, block: Block, view: memoryview) -> None:
        """Read a block of a file."""
        self.opened[block.shard].read_into(view, block.start)

    def dtype(self, part: Part) -> torch.dtype:
        """Return the dtype of a part's weight."""
        return FLOATS[self.weights[part.weight].dtype]

    def numel(self, part: Part) -> int:
        """Return how many weights a part has."""
        return (part.segment.stop - part.segment.start) // self.dtype(part).itemsize


@dataclass
class Cuts:
    """What goes at one sparsity: counts and the cut per weight, and per part what erases.

    Attributes:
        sparsity: the sparsity, None for n:m.
        zeros: zeros before, int64 [L] as the other counts.
        removed: weights that go, zeros among them.
        zeros_known: zeros afterwards, of what a search has cut.
        zeros_counted: those of rows and n:m groups, which are counted while erasing.
        thresholds: weight -> the smallest magnitude kept, where it is one for the whole weight.
        erasers: index of a part -> what erases in it.
    """

    sparsity: float | None
    zeros: np.ndarray
    removed: np.ndarray
    zeros_known: np.ndarray
    zeros_counted: np.ndarray
    thresholds: dict[int, float] = field(default_factory=dict)
    erasers: dict[int, Eraser] = field(default_factory=dict)

    @property
    def zeros_after(self) -> np.ndarray:
        """Return the zeros afterwards, per weight."""
        return self.zeros_known + self.zeros_counted


def find_cuts(job: Job, scope: Scope, sparsities: Sequence[float | None]) -> list[Cuts]:
    """Search every selection at all sparsities; raise UsageError naming a tensor that holds NaN."""
    zeros = np.zeros(len(job.weights), np.int64)
    made = [Cuts(s, zeros, *(np.zeros_like(zeros) for _ in range(3))) for s in sparsities]
    for selection in job.plan.selections:
        if not selection.parts:
            continue
        found = _search(job, selection)
        if found.bad.any():
            part = selection.parts[int(found.bad.argmax())]
            where = job.contents.shards[part.chunk.shard].path
            raise UsageError(f"{where}: tensor {job.weights[part.weight].name!r} holds NaN: nothing was written")
        np.add.at(zeros, [part.weight for part in selection.parts], found.zeros)
        if selection.keeps:
            _take(job, made, scope, selection, found)
    for cuts in made:
        _cut_within_rows(job, cuts, scope)
    return made


def _search(job: Job, selection: Selection) -> Found:
    """Run one search in a thread of its own, so that Ctrl-C finds the caller free to stop it."""
    # What other processes read is empty here: counts have the same places everywhere.
    segments = [
        part.segment if part.rank == job.ranks.index else part.segment.between(part.segment.start, part.segment.start)
        for part in selection.parts
    ]
    source = FileKeys(job.opened, segments, [job.dtype(part) for part in selection.parts], job.meter)
    with ThreadPoolExecutor(1, "wcr-fast-search") as pool:
        if job.ranks.size > 1:
            found = pool.submit(_search_together, job, source, selection)
        else:
            found = pool.submit(window_search, source, selection.keeps)
        try:
            return found.result()
        except BaseException:
            source.stop()
            raise


def _search_together(job: Job, source: FileKeys, selection: Selection) -> Found:
    total = sum(map(job.numel, selection.parts))
    return together([shared_search(source, selection.keeps, total)], job.ranks.sum)[0]


def _take(job: Job, made: Sequence[Cuts], scope: Scope, selection: Selection, found: Found) -> None:
    """Turn what one search found into counts and erasers of its parts."""
    comparison = comparison_dtype(map(job.dtype, selection.parts))
    stay = shares(np.array(found.ties), found.tied)
    _divide_ties(job, selection, found, stay, comparison)
    for q, cuts in enumerate(made):
        threshold = value_of(found.key[q], comparison)
        for i, part in enumerate(selection.parts):
            above, tied, ties = (int(counts[i, q]) for counts in (found.above, found.tied, stay))
            removed = job.numel(part) - above - ties
            cuts.removed[part.weight] += removed
            # Either every zero lies below the cut and goes, or the cut is zero and only zeros go.
            cuts.zeros_known[part.weight] += max(removed, int(found.zeros[i]))
            if scope.kind != "row":
                cuts.thresholds[part.weight] = threshold
            cuts.erasers[part.segment.part] = CutEraser(found.key[q], ties, tied, job.dtype(part), comparison)


def _divide_ties(job: Job, selection: Selection, found: Found, stay: np.ndarray, comparison: torch.dtype) -> None:
    """Correct which ties stay in weights whose chunks interleave; the order of parts decides in all others."""
    members: dict[int, list[int]] = {}
    for i, part in enumerate(selection.parts):
        weight = job.weights[part.weight]
        if not all(chunk.is_run(weight.shape) for chunk in weight.chunks):
            members.setdefault(part.weight, []).append(i)
    for i, mine in members.items():
        weight, parts = job.weights[i], [selection.parts[p] for p in mine]
        for q, key in enumerate(found.key):
            staying = int(stay[mine, q].sum())
            if 0 < staying < found.tied[mine, q].sum():
                sweep = partial(_ties, job, weight, parts, key, comparison)
                stay[mine, q] = first_ties(staying, weight.numel, len(parts), sweep, job.ranks.sum)


def _ties(
    job: Job, weight: StoredTensor, parts: Sequence[Part], key: int, comparison: torch.dtype
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a weight; yield where in it this process's parts hold the key."""
    numbers = {part.segment.part: n for n, part in enumerate(parts)}
    segments = [part.segment for part in parts if part.rank == job.ranks.index]
    dtype = FLOATS[weight.dtype]
    job.meter.expect(sum(segment.stop - segment.start for segment in segments))
    with Ring(BLOCK_BYTES) as ring:
        for block, data in ring.flow(blocks_of(segments, BLOCK_BYTES), job.load):
            for piece in block.parts:
                part = job.plan.parts[piece.part]
                # The copy starts at an aligned address, which the number in the file may not.
                stretch = data[piece.start - block.start : piece.stop - block.start].clone().view(dtype)
                places = keys_of(stretch, comparison).eq(key).nonzero().squeeze(1).numpy()
                places += (piece.start - part.chunk.start) // dtype.itemsize
                yield numbers[piece.part], logical_indices(part.chunk, weight.shape, places)
            job.meter.add(block.stop - block.start)


def _cut_within_rows(job: Job, cuts: Cuts, scope: Scope) -> None:
    """Say how many weights go where every row or n:m group is its own selection, and what erases them."""
    for part in job.plan.parts:
        if part.group >= 0:
            continue
        shape = part.chunk.shape
        row = math.prod(shape[1:])
        rows = job.numel(part) // row
        if scope.kind == "n:m":
            cuts.removed[part.weight] += rows * (row // shape[1]) * (shape[1] // scope.m * (scope.m - scope.n))
            cuts.erasers[part.segment.part] = nm_eraser(shape, scope.n, scope.m)
        else:
            keep = num_keep(cuts.sparsity, row)
            cuts.removed[part.weight] += rows * (row - keep)
            cuts.erasers[part.segment.part] = row_eraser(row, keep)
