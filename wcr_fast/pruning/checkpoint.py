"""Pruning a checkpoint in files as a stream: one pass to find the cuts, one to write.

Memory doesn't depend on the size of the files: blocks of a few megabytes pass through fixed buffers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_cuts import Cuts, Job, find_cuts
from wcr_fast.pruning.checkpoint_files import WEIGHTS, CheckpointFiles, check_target, find_files
from wcr_fast.pruning.checkpoint_plan import Plan, Scope, choose_stored, parse_scope, plan, spread
from wcr_fast.pruning.checkpoint_record import CheckpointRecord, StoredLayer
from wcr_fast.pruning.checkpoint_write import rehearse, write
from wcr_fast.pruning.dcp_files import is_dcp, read_dcp
from wcr_fast.pruning.file_keys import OpenFile
from wcr_fast.pruning.ranks import Ranks
from wcr_fast.pruning.safetensors_io import reading
from wcr_fast.pruning.stored import Contents, read_safetensors
from wcr_fast.pruning.stream import Meter, Progress, Segment

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
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
    group: ProcessGroup | None = None,
) -> CheckpointRecord: ...


@overload
def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    sparsity: Sequence[float],
    *,
    scope: str = "global",
    exclude: str | Sequence[str] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> list[CheckpointRecord]: ...


@torch.no_grad()
def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    sparsity: float | Sequence[float] | None,
    *,
    scope: str = "global",
    exclude: str | Sequence[str] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> CheckpointRecord | list[CheckpointRecord]:
    """Prune a safetensors file, a Hugging Face folder or a distributed checkpoint into a new one, as a stream.

    Weights are the tensors of two or more dimensions in float16, bfloat16, float32 or float64, in a distributed
    checkpoint but for the state of an optimizer. Everything else is copied byte for byte: other tensors, header, index
    or metadata, and the other files of a folder.

    Args:
        source: a .safetensors file, a folder with shards and their index, or a folder that
            ``torch.distributed.checkpoint.save`` has written.
        target: what to write; may be ``source`` itself with ``force``. None only with ``dry_run``.
        sparsity: the share removed, in [0, 1]; None for an n:m scope. With ``dry_run`` it may be several, which
            the same read of the files answers.
        scope: ``"global"``, ``"layer"``, ``"row"`` (along dimension 0), or ``"n:m"`` such as ``"2:4"`` (along
            dimension 1).
        exclude: globs, or ``"re:..."`` for regular expressions (full match), over tensor and module names.
        dry_run: find the cuts and write nothing.
        force: replace an existing target.
        progress: called with the bytes done and the bytes to do, from several threads.
        group: processes that share the work, each calling this with the same arguments and seeing the same files: a
            group of torch.distributed with a CPU backend such as gloo. All return the same records.

    Returns:
        The record: counts, threshold, per-tensor rows, what was left as it is and why. For several sparsities a
        list of records in their order.

    Raises:
        UsageError: wrong arguments, missing, truncated or damaged input, NaN, nothing to prune, an existing
            target, a full disk. Nothing is left behind.

    Exactness: the same weights go as with ``prune_`` on the tensors in file order (shards by name, tensors by
    their place in the file) or in the order of the state_dict that a distributed checkpoint was saved from:
    ``round(sparsity * N)`` over all, of equal magnitudes the earlier ones stay. A row or an n:m group may not lie in
    several chunks.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> safetensors.torch.save_file({"w": torch.randn(8, 8)}, folder / "a.safetensors")
        >>> prune_checkpoint(folder / "a.safetensors", folder / "b.safetensors", 0.75).removed
        48
    """
    made, sparsities, several = parse_scope(scope, sparsity)
    if several and not dry_run:
        raise UsageError("several sparsities can only be compared: give --dry-run (dry_run=True), or one sparsity")
    ranks = Ranks(group)
    with ranks.together():
        source, target = Path(source), None if target is None else Path(target)
        contents = read_dcp(source) if is_dcp(source) else read_safetensors(find_files(source))
        others = _check_target(source, contents.files, target, dry_run, force)
        weights, left_out = choose_stored(contents, exclude)
        planned, stretches = spread(plan(weights, made, sparsities), contents, ranks.size)
        meter = _meter(contents, planned, stretches, dry_run, ranks, progress)
        with contextlib.ExitStack() as stack:
            opened = [OpenFile(stack.enter_context(reading(shard.path)), shard.path) for shard in contents.shards]
            job = Job(source, contents, opened, weights, planned, stretches[ranks.index], ranks, meter)
            cuts = find_cuts(job, made, sparsities)
            if dry_run:
                rehearse(job, cuts)
            else:
                write(job, cuts[0], target, others)
    records = [_record(job, c, made, scope, left_out, None if dry_run else target, others) for c in cuts]
    return records if several else records[0]


def _check_target(
    source: Path, files: CheckpointFiles, target: Path | None, dry_run: bool, force: bool
) -> Sequence[Path]:
    """Return the files to copy; raise UsageError where the target may not be written."""
    if target is None:
        if not dry_run:
            raise UsageError("an output is needed: give OUT, or --dry-run")
        return files.others
    same = check_target(source, files, target, force=force)
    return () if same else files.others  # else they are where they belong


def _meter(
    contents: Contents,
    planned: Plan,
    stretches: Sequence[Sequence[Segment]],
    dry_run: bool,
    ranks: Ranks,
    progress: Progress | None,
) -> Meter:
    """Count what passes by: each weight in the search, then each file, or in a dry run what it rehearses."""
    todo = [0] * ranks.size
    for part in planned.parts:
        rehearsed = dry_run and part.group < 0
        todo[part.rank] += (1 + rehearsed) * (part.segment.stop - part.segment.start)
    for rank, mine in enumerate(stretches):
        todo[rank] += 0 if dry_run else sum(stretch.stop - stretch.start for stretch in mine)
    return Meter(todo[ranks.index], progress, todo[ranks.index] / max(sum(todo), 1) or 1.0)


def _record(
    job: Job,
    cuts: Cuts,
    made: Scope,
    scope: str,
    left_out: Sequence[tuple[str, str]],
    target: Path | None,
    others: Sequence[Path],
) -> CheckpointRecord:
    layers = tuple(_layer(job, cuts, made, i) for i in range(len(job.weights)))
    files = job.contents.files
    sizes = [shard.size for shard in job.contents.shards] + [(files.root / o).stat().st_size for o in others]
    zeros = int(cuts.zeros_after.sum())
    return CheckpointRecord(
        scope=scope,
        requested=cuts.sparsity,
        asked=sum(layer.removed for layer in layers),
        pruned_now=zeros - int(cuts.zeros.sum()),
        zeros=zeros,
        numel=sum(layer.numel for layer in layers),
        threshold=cuts.thresholds.get(0) if made.kind == "global" else None,
        per_layer=layers,
        left_out=tuple(left_out),
        source=str(job.source),
        target=None if target is None else str(target),
        pruned_files=tuple(map(str, files.shards)),
        copied_files=() if target is None else tuple(map(str, others)),
        bytes_written=0 if target is None else sum(sizes),
        notes=tuple(_notes(job, layers)),
    )


def _layer(job: Job, cuts: Cuts, scope: Scope, i: int) -> StoredLayer:
    weight = job.weights[i]
    rest = weight.shape[1] % scope.m if scope.m else 0
    note = f"the last {rest} of {weight.shape[1]} inputs fill no group of {scope.m} and stay dense" if rest else ""
    homes = dict.fromkeys(str(job.contents.files.shards[chunk.shard]) for chunk in weight.chunks)
    return StoredLayer(
        name=weight.name,
        shape=weight.shape,
        numel=weight.numel,
        removed=int(cuts.removed[i]),
        zeros=int(cuts.zeros_after[i]),
        threshold=cuts.thresholds.get(i),
        note=note,
        dtype=weight.dtype,
        file=", ".join(homes),
    )


def _notes(job: Job, layers: Sequence[StoredLayer]) -> list[str]:
    """Return what a reader of the numbers might miss."""
    notes = []
    emptied = [layer.name for layer in layers if layer.removed == layer.numel]
    if emptied:
        more = f" and {len(emptied) - 8} more" if len(emptied) > 8 else ""
        notes.append(f"nothing is left of {', '.join(emptied[:8])}{more}")
    beside = [str(other) for other in job.contents.files.others if other.name.endswith(WEIGHTS)]
    if beside:
        notes.append(f"not part of this checkpoint, so not pruned: {', '.join(beside)}")
    return notes
