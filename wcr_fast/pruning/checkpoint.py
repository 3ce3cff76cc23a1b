"""Pruning a checkpoint in files as a stream: one pass to find the cuts, one to write.

Memory doesn't depend on the size of the files: blocks of a few megabytes pass through fixed buffers.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_files import (
    WEIGHTS,
    CheckpointFiles,
    check_index,
    check_target,
    copy_file,
    find_files,
    staging,
)
from wcr_fast.pruning.checkpoint_plan import (
    Plan,
    Scope,
    Selection,
    StoredWeight,
    choose_stored,
    parse_scope,
    plan,
)
from wcr_fast.pruning.checkpoint_record import CheckpointRecord, StoredLayer
from wcr_fast.pruning.erase import CutEraser, Eraser, nm_eraser, row_eraser
from wcr_fast.pruning.file_keys import FileKeys, OpenFile
from wcr_fast.pruning.safetensors_io import (
    Header,
    read_header,
    reading,
    write_all,
    write_behind,
    writing,
)
from wcr_fast.pruning.stream import BLOCK_BYTES, Block, Ring, Segment, blocks_of
from wcr_fast.torch_path.cuts import comparison_dtype, num_keep, value_of
from wcr_fast.torch_path.window import Found, shares, window_search

Progress = Callable[[int, int], None]


class _Meter:
    """Adds up the bytes of finished blocks and tells the caller: ``progress(done, total)``."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def add(self, count: int) -> None:
        self.done = min(self.done + count, self.total)  # a search may sweep more than once
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass
class _Job:
    """A checkpoint with its files open, its weights chosen, and what competes with what."""

    source: Path
    files: CheckpointFiles
    headers: list[Header]
    opened: list[OpenFile]
    weights: list[StoredWeight]
    plan: Plan
    meter: _Meter


@dataclass
class _Cuts:
    """What the search found per weight: how many go, how many are zero, the cut; and what erases.

    ``zeros_after`` is known beforehand for cuts, and counted while writing for rows and n:m groups.
    """

    removed: np.ndarray
    zeros: np.ndarray
    zeros_after: np.ndarray
    thresholds: dict[int, float]
    erasers: dict[tuple[int, int], Eraser]


def _search(job: _Job, selection: Selection) -> Found:
    """Run one search in a thread of its own, so that Ctrl-C finds the caller free to stop it."""
    dtypes = [job.weights[i].dtype for i in selection.members]
    source = FileKeys(job.opened, selection.segments, dtypes, job.meter.add)
    ranks = [] if selection.keep is None else [selection.keep]
    with ThreadPoolExecutor(1, "wcr-fast-search") as pool:
        found = pool.submit(window_search, source, ranks)
        try:
            return found.result()
        except BaseException:
            source.stop()
            raise


def _find_cuts(job: _Job, scope: Scope, sparsity: float | None) -> _Cuts:
    """Search every selection; raise UsageError naming a tensor that holds NaN."""
    count = len(job.weights)
    cuts = _Cuts(*(np.zeros(count, np.int64) for _ in range(3)), {}, {})
    for group, selection in enumerate(job.plan.selections):
        if not selection.members:
            continue
        found = _search(job, selection)
        if found.bad.any():
            weight = job.weights[selection.members[int(found.bad.argmax())]]
            raise UsageError(
                f"{job.headers[weight.shard].path}: tensor {weight.info.name!r} holds NaN: nothing was written"
            )
        cuts.zeros[selection.members] += found.zeros
        if selection.keep is not None:
            _take(job, cuts, group, selection, found)
    for i, weight in enumerate(job.weights):
        if job.plan.segments[i][0].group < 0:
            cuts.removed[i], cuts.erasers[-1, i] = _within_rows(weight.info.shape, scope, sparsity)
    return cuts


def _within_rows(shape: tuple[int, ...], scope: Scope, sparsity: float | None) -> tuple[int, Eraser]:
    """Return how many weights go where every row or n:m group is its own selection, and what erases them."""
    if scope.kind == "n:m":
        gone = shape[1] // scope.m * (scope.m - scope.n)
        return math.prod((shape[0], gone, *shape[2:])), nm_eraser(shape, scope.n, scope.m)
    row = math.prod(shape[1:])
    keep = num_keep(sparsity, row)
    return shape[0] * (row - keep), row_eraser(row, keep)


def _take(job: _Job, cuts: _Cuts, group: int, selection: Selection, found: Found) -> None:
    """Turn what one search found into counts and erasers of its weights."""
    comparison = comparison_dtype(job.weights[i].dtype for i in selection.members)
    threshold = value_of(found.key[0], comparison)
    above, tied = found.above[:, 0], found.tied[:, 0]
    stay = shares(np.array(found.ties), found.tied)[:, 0]
    counts = zip(selection.members, selection.segments, above, stay, tied, found.zeros, strict=True)
    for i, segment, a, s, t, zeros in counts:
        dtype = job.weights[i].dtype
        removed = (segment.stop - segment.start) // dtype.itemsize - a - s
        cuts.removed[i] += removed
        # Either every zero lies below the cut and goes, or the cut is zero and only zeros go.
        cuts.zeros_after[i] += max(removed, zeros)
        if len(job.plan.segments[i]) == 1:
            cuts.thresholds[i] = threshold
        cuts.erasers[group, i] = CutEraser(found.key[0], int(s), int(t), dtype, comparison)


def _load(job: _Job, block: Block, view: memoryview) -> None:
    job.opened[block.shard].read_into(view, block.start)


def _edit(job: _Job, cuts: _Cuts, block: Block, data: Tensor) -> None:
    """Erase in the parts of one block; count the zeros where only now it is known what goes."""
    for part in block.parts:
        stretch = data[part.start - block.start : part.stop - block.start]
        weights = _erase(stretch, job.weights[part.tensor].dtype, cuts.erasers[part.group, part.tensor])
        if part.group < 0:
            cuts.zeros_after[part.tensor] += weights.numel() - int(weights.count_nonzero())
    job.meter.add(block.stop - block.start)


def _rehearse(job: _Job, cuts: _Cuts) -> None:
    """Select within rows and n:m groups without writing, for the counts of a dry run."""
    segments = [s for mine in job.plan.segments for s in mine if s.group < 0]
    with Ring(BLOCK_BYTES) as ring:
        for block, data in ring.flow(blocks_of(segments, BLOCK_BYTES), partial(_load, job)):
            _edit(job, cuts, block, data)


def _write_shard(job: _Job, shard: int, cuts: _Cuts, target: Path) -> None:
    """Copy one file block by block, erasing on the way."""
    header = job.headers[shard]
    pruned = {w.info.name: job.plan.segments[i] for i, w in enumerate(job.weights) if w.shard == shard}
    segments = [Segment(shard, 0, header.data_start)]
    for info in header.tensors:
        segments += pruned.get(info.name) or [Segment(shard, info.start, info.stop)]

    def store(block: Block, view: memoryview) -> None:
        write_all(fd, view, target)
        write_behind(fd, block.start, block.stop)

    with writing(target) as fd, Ring(BLOCK_BYTES) as ring:
        for block, data in ring.flow(blocks_of(segments, BLOCK_BYTES), partial(_load, job), store):
            _edit(job, cuts, block, data)
    shutil.copymode(header.path, target)


def _erase(data: Tensor, dtype: torch.dtype, eraser: Eraser) -> Tensor:
    """Erase in place; return the weights."""
    # Behind a tensor of another dtype numbers may start at any byte.
    aligned = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
    weights = aligned.view(dtype)
    eraser(weights)
    if aligned is not data:
        data.copy_(aligned)
    return weights


def _write(job: _Job, cuts: _Cuts, target: Path, others: Sequence[Path]) -> None:
    """Write the pruned checkpoint; all its files take their places at the end, or none."""
    files = job.files
    with staging(target, files) as stage:
        for folder in sorted({parent for other in others for parent in other.parents}):
            (stage / folder).mkdir(exist_ok=True)
        for other in others:
            copy_file(files.root / other, stage / other)
        for shard, name in enumerate(files.shards):
            _write_shard(job, shard, cuts, stage / (name if files.is_folder else target.name))


@torch.no_grad()
def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    sparsity: float | None,
    *,
    scope: str = "global",
    exclude: str | Sequence[str] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> CheckpointRecord:
    """Prune a safetensors file or a Hugging Face folder into a new one, as a stream.

    Weights are the tensors of two or more dimensions in float16, bfloat16, float32 or float64; everything else
    is copied byte for byte: other tensors, header, index, and the other files of a folder.

    Args:
        source: a .safetensors file, or a folder with shards and their index.
        target: what to write; may be ``source`` itself with ``force``. None only with ``dry_run``.
        sparsity: the share removed, in [0, 1]; None for an n:m scope.
        scope: ``"global"``, ``"layer"``, ``"row"`` (along dimension 0), or ``"n:m"`` such as ``"2:4"`` (along
            dimension 1).
        exclude: globs, or ``"re:..."`` for regular expressions (full match), over tensor and module names.
        dry_run: find the cuts and write nothing.
        force: replace an existing target.
        progress: called with the bytes done and the bytes to do, from several threads.

    Returns:
        The record: counts, threshold, per-tensor rows, what was left as it is and why.

    Raises:
        UsageError: wrong arguments, missing, truncated or damaged input, NaN, nothing to prune, an existing
            target, a full disk. Nothing is left behind.

    Exactness: the same weights go as with ``prune_`` on the tensors in file order (shards by name, tensors by
    their place in the file): ``round(sparsity * N)`` over all, of equal magnitudes the earlier ones stay.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> safetensors.torch.save_file({"w": torch.randn(8, 8)}, folder / "a.safetensors")
        >>> prune_checkpoint(folder / "a.safetensors", folder / "b.safetensors", 0.75).removed
        48
    """
    source, made = Path(source), parse_scope(scope, sparsity)
    files = find_files(source)
    others = files.others
    if target is not None:
        target = Path(target)
        if check_target(source, files, target, force=force):
            others = ()  # they are where they belong
    elif not dry_run:
        raise UsageError("an output is needed: give OUT, or --dry-run")
    headers = [read_header(files.root / shard) for shard in files.shards]
    check_index(files, headers)
    weights, left_out = choose_stored(headers, exclude)
    sizes = sum(h.size for h in headers)
    total = sum(w.info.stop - w.info.start for w in weights) + (0 if dry_run else sizes)
    with contextlib.ExitStack() as stack:
        opened = [OpenFile(stack.enter_context(reading(h.path)), h.path) for h in headers]
        job = _Job(source, files, headers, opened, weights, plan(weights, made, sparsity), _Meter(total, progress))
        cuts = _find_cuts(job, made, sparsity)
        if dry_run:
            _rehearse(job, cuts)
        else:
            _write(job, cuts, target, others)
    return _record(job, cuts, made, scope, sparsity, left_out, None if dry_run else target, others)


def _record(
    job: _Job,
    cuts: _Cuts,
    made: Scope,
    scope: str,
    sparsity: float | None,
    left_out: Sequence[tuple[str, str]],
    target: Path | None,
    others: Sequence[Path],
) -> CheckpointRecord:
    layers = tuple(_layer(job, cuts, made, i) for i in range(len(job.weights)))
    sizes = [header.size for header in job.headers] + [(job.files.root / o).stat().st_size for o in others]
    return CheckpointRecord(
        scope=scope,
        requested=sparsity,
        asked=sum(layer.removed for layer in layers),
        pruned_now=int(cuts.zeros_after.sum() - cuts.zeros.sum()),
        zeros=int(cuts.zeros_after.sum()),
        numel=sum(layer.numel for layer in layers),
        threshold=cuts.thresholds.get(0) if made.kind == "global" else None,
        per_layer=layers,
        left_out=tuple(left_out),
        source=str(job.source),
        target=None if target is None else str(target),
        pruned_files=tuple(map(str, job.files.shards)),
        copied_files=() if target is None else tuple(map(str, others)),
        bytes_written=0 if target is None else sum(sizes),
        notes=tuple(_notes(job, layers)),
    )


def _layer(job: _Job, cuts: _Cuts, scope: Scope, i: int) -> StoredLayer:
    weight = job.weights[i]
    info = weight.info
    rest = info.shape[1] % scope.m if scope.m else 0
    note = f"the last {rest} of {info.shape[1]} inputs fill no group of {scope.m} and stay dense" if rest else ""
    return StoredLayer(
        name=info.name,
        shape=info.shape,
        numel=info.numel,
        removed=int(cuts.removed[i]),
        zeros=int(cuts.zeros_after[i]),
        threshold=cuts.thresholds.get(i),
        note=note,
        dtype=info.dtype,
        file=str(job.files.shards[weight.shard]),
    )


def _notes(job: _Job, layers: Sequence[StoredLayer]) -> list[str]:
    """Return what a reader of the numbers might miss."""
    notes = []
    emptied = [layer.name for layer in layers if layer.removed == layer.numel]
    if emptied:
        more = f" and {len(emptied) - 8} more" if len(emptied) > 8 else ""
        notes.append(f"nothing is left of {', '.join(emptied[:8])}{more}")
    beside = [str(other) for other in job.files.others if other.name.endswith(WEIGHTS)]
    if beside:
        notes.append(f"not part of this checkpoint, so not pruned: {', '.join(beside)}")
    return notes
