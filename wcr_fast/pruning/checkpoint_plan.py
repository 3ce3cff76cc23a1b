"""Which tensors of a checkpoint are weights to prune, and which of them compete with one another."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from wcr_fast.errors import UsageError
from wcr_fast.ops.select import check_scope, check_sparsities
from wcr_fast.pruning.stored import Chunk, Contents, StoredTensor
from wcr_fast.pruning.stream import BLOCK_BYTES, Segment
from wcr_fast.torch_path.cuts import num_keep
from wcr_fast.weights import Excluder

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def choose_stored(
    contents: Contents, exclude: str | Sequence[str] = ()
) -> tuple[list[StoredTensor], list[tuple[str, str]]]:
    """Choose the weights of a checkpoint: float16, bfloat16, float32 or float64, two or more dimensions.

    Args:
        contents: the tensors.
        exclude: globs, or ``"re:..."`` for regular expressions (full match), over tensor names and the names
            of the modules around them.

    Returns:
        The weights in list order, and (name, reason) of the tensors left as they are.

    Raises:
        UsageError: when a pattern matches nothing or is malformed, or nothing is left to prune.
    """
    names = [tensor.name for tensor in contents.tensors]
    weights: list[StoredTensor] = []
    left_out: list[tuple[str, str]] = []
    packed = {_parent(tensor.name) for tensor in contents.tensors if _is_packed(tensor)}
    where = contents.shards[0].path
    try:
        excluder = Excluder(exclude)
        for tensor in contents.tensors:
            reason = excluder.reason(tensor.name, (), None)
            reason = reason or contents.reasons.get(tensor.name) or _unfit(tensor, packed)
            if reason:
                left_out.append((tensor.name, reason))
            elif tensor.name in contents.unfit:
                raise ValueError(
                    f"tensor {tensor.name!r}: {contents.unfit[tensor.name]}; exclude it to prune the others"
                )
            else:
                weights.append(tensor)
        excluder.check_all_matched(names)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if not weights:
        raise UsageError(
            f"{where}: nothing to prune: of {len(names)} tensors none is a weight "
            "(float16, bfloat16, float32 or float64, two or more dimensions, not excluded)"
        )
    return weights, left_out


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_packed(tensor: StoredTensor) -> bool:
    return tensor.dtype not in FLOATS and tensor.dtype != "BOOL" and len(tensor.shape) > 0


def _unfit(tensor: StoredTensor, packed: set[str]) -> str | None:
    if tensor.dtype not in FLOATS:
        return f"dtype {tensor.dtype}"
    if len(tensor.shape) < 2:
        return f"{len(tensor.shape)}-d"
    if tensor.numel == 0:
        return "empty"
    # weight_scale beside an fp8 weight, scales beside qweight: erasing one would wipe out whole groups.
    if "scale" in tensor.name.rpartition(".")[2] and _parent(tensor.name) in packed:
        return "scale of a quantised tensor"
    return None


@dataclass(frozen=True)
class Scope:
    """``"global"``, ``"layer"``, ``"row"``, or ``"n:m"`` with its two numbers."""

    kind: str
    n: int = 0
    m: int = 0


def parse_scope(scope: str, sparsity: float | Sequence[float] | None) -> tuple[Scope, list[float | None], bool]:
    """Return the scope, the sparsities, and whether they came as several; n:m has one, None.

    Raises:
        UsageError: when the scope is unknown or doesn't go with the sparsity.
    """
    try:
        groups = check_scope(scope, sparsity, "prune")
        if groups:
            return Scope("n:m", *groups), [None], False
        sparsities, many = check_sparsities(sparsity, "prune")
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    if not sparsities:
        raise UsageError("prune: sparsity is an empty list: give at least one number in [0, 1]")
    return Scope(scope), sparsities, many


@dataclass(frozen=True, slots=True)
class Part:
    """What is searched and erased by itself: a chunk of a weight, or a stretch of one.

    Attributes:
        weight: index of the weight.
        group: index of the selection it belongs to, -1 where its rows or n:m groups are their own selections.
        chunk: the chunk it lies in.
        segment: where it lies; ``segment.part`` is the index of this part.
        rank: the process that reads and writes it.
    """

    weight: int
    group: int
    chunk: Chunk
    segment: Segment
    rank: int = 0


@dataclass
class Selection:
    """Parts that compete for ``keeps[q]`` places at each sparsity; without ``keeps`` they are only counted."""

    keeps: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


@dataclass
class Plan:
    """What competes with what, and where it lies.

    Attributes:
        selections: the first holds the weights of a global selection, or those only to be counted because rows
            or n:m groups are selected while they are written; then come layers, and rows larger than a block.
        parts: all of them, in list order, those of one weight by their place in it.
    """

    selections: list[Selection] = field(default_factory=lambda: [Selection()])
    parts: list[Part] = field(default_factory=list)

    def add(self, group: int, weight: int, chunk: Chunk, bounds: tuple[int, int], grain: int, unit: int) -> None:
        """Add a part; ``group`` is -1 for what is only counted."""
        self.append(Part(weight, group, chunk, Segment(chunk.shard, *bounds, grain=grain, unit=unit)))

    def append(self, part: Part) -> None:
        """Add a part, and number it."""
        part = replace(part, segment=replace(part.segment, part=len(self.parts)))
        self.parts.append(part)
        self.selections[max(part.group, 0)].parts.append(part)


def plan(weights: Sequence[StoredTensor], scope: Scope, sparsities: Sequence[float | None]) -> Plan:
    """Say which weights compete, and where their files may be cut into blocks.

    Args:
        weights: the weights in list order.
        scope: what is selected together.
        sparsities: the shares removed; one None for n:m.

    Raises:
        UsageError: when a row or an n:m group lies in several chunks.
    """
    made = Plan()
    if scope.kind == "global":
        made.selections[0].keeps = [num_keep(s, sum(w.numel for w in weights)) for s in sparsities]
    for i, weight in enumerate(weights):
        item = FLOATS[weight.dtype].itemsize
        if scope.kind == "layer":
            made.selections.append(Selection([num_keep(s, weight.numel) for s in sparsities]))
        for chunk in weight.chunks:
            whole = (chunk.start, chunk.stop)
            if scope.kind == "global":
                made.add(0, i, chunk, whole, item, item)
            elif scope.kind == "layer":
                made.add(len(made.selections) - 1, i, chunk, whole, item, item)
            elif scope.kind == "row":
                _plan_rows(made, i, weight, chunk, sparsities)
            else:
                _check_groups(weight, chunk, scope)
                row = (chunk.stop - chunk.start) // chunk.shape[0]
                made.add(-1, i, chunk, whole, row, row // chunk.shape[1] * scope.m)
    return made


def _plan_rows(made: Plan, i: int, weight: StoredTensor, chunk: Chunk, sparsities: Sequence[float]) -> None:
    if chunk.shape[1:] != weight.shape[1:]:
        raise UsageError(f'scope "row": {weight.name!r} is sharded within its rows; the scope can be global or layer')
    row, numel = (chunk.stop - chunk.start) // chunk.shape[0], math.prod(weight.shape[1:])
    if row <= BLOCK_BYTES:
        made.add(-1, i, chunk, (chunk.start, chunk.stop), row, row)
        return
    item = row // numel
    for start in range(chunk.start, chunk.stop, row):
        made.selections.append(Selection([num_keep(s, numel) for s in sparsities]))
        made.add(len(made.selections) - 1, i, chunk, (start, start + row), item, item)


def _check_groups(weight: StoredTensor, chunk: Chunk, scope: Scope) -> None:
    stop = chunk.offset[1] + chunk.shape[1]
    if chunk.offset[1] % scope.m or (stop % scope.m and stop != weight.shape[1]):
        raise UsageError(
            f"scope {scope.n}:{scope.m}: {weight.name!r} is sharded within its groups along dimension 1 "
            f"(at {chunk.offset[1]} and {stop}); the scope can be global or layer"
        )


def spread(planned: Plan, contents: Contents, size: int) -> tuple[Plan, list[list[Segment]]]:
    """Share the files among processes, each an equal stretch of all their bytes; cut the parts at the borders.

    Args:
        planned: what competes with what.
        contents: the files.
        size: number of processes.

    Returns:
        A plan whose parts say which process they belong to, and what each process writes: at most one stretch of
        each file.
    """
    total, bounds = sum(shard.size for shard in contents.shards), []
    for rank in range(1, size):
        at = total * rank // size
        for i, shard in enumerate(contents.shards):
            if at < shard.size:
                bounds.append((i, _border(planned, contents, i, at)))
                break
            at -= shard.size
    made = Plan([Selection(selection.keeps) for selection in planned.selections])
    for part in planned.parts:
        shard, start, stop = part.segment.shard, part.segment.start, part.segment.stop
        inside = [at for i, at in bounds if i == shard and start < at < stop]
        for first, last in pairwise(dict.fromkeys([start, *inside, stop])):
            piece = part.segment.between(first, last)
            made.append(replace(part, segment=piece, rank=bisect_right(bounds, (shard, first))))
    stretches = []
    for first, last in pairwise([(0, 0), *bounds, (len(contents.shards), 0)]):
        mine = [
            Segment(i, first[1] if i == first[0] else 0, last[1] if i == last[0] else shard.size)
            for i, shard in enumerate(contents.shards)
            if first[0] <= i <= last[0]
        ]
        stretches.append([stretch for stretch in mine if stretch.stop > stretch.start])
    return made, stretches


def _border(planned: Plan, contents: Contents, shard: int, at: int) -> int:
    """Return the last place at or before this one where a file may be divided."""
    for record in contents.checksums:
        if record.shard == shard and record.start < at < record.stop:
            return record.start
    for segment in (part.segment for part in planned.parts):
        if segment.shard == shard and segment.start < at < segment.stop:
            return segment.start + (at - segment.start) // segment.grain * segment.grain
    return at
