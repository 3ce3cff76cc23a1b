"""Where a checkpoint's weights are cut: one search over its files for each selection, for all sparsities at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_plan import FLOATS, Part, Plan, Scope, Selection
from wcr_fast.pruning.erase import CutEraser, Eraser, nm_eraser, row_eraser
from wcr_fast.pruning.file_keys import FileKeys, OpenFile
from wcr_fast.pruning.ranks import Ranks
from wcr_fast.pruning.stored import Contents, StoredTensor
from wcr_fast.pruning.stream import Meter, Segment
from wcr_fast.torch_path.cuts import comparison_dtype, num_keep, value_of
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
    segments = [part.segment for part in selection.parts]
    source = FileKeys(job.opened, segments, [job.dtype(part) for part in selection.parts], job.meter)
    with ThreadPoolExecutor(1, "wcr-fast-search") as pool:
        found = pool.submit(window_search, source, selection.keeps)
        try:
            return found.result()
        except BaseException:
            source.stop()
            raise


def _take(job: Job, made: Sequence[Cuts], scope: Scope, selection: Selection, found: Found) -> None:
    """Turn what one search found into counts and erasers of its parts."""
    comparison = comparison_dtype(map(job.dtype, selection.parts))
    stay = shares(np.array(found.ties), found.tied)
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
