"""Which tensors of a checkpoint are weights to prune, and which of them compete with one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from wcr_fast.errors import UsageError
from wcr_fast.ops.select import check_scope, check_sparsity
from wcr_fast.pruning.safetensors_io import Header, TensorInfo
from wcr_fast.pruning.stream import BLOCK_BYTES, Segment
from wcr_fast.torch_path.cuts import num_keep
from wcr_fast.weights import Excluder

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A tensor to prune: what the header says of it, its dtype, and the index of its file."""

    info: TensorInfo
    dtype: torch.dtype
    shard: int


def choose_stored(
    headers: Sequence[Header], exclude: str | Sequence[str] = ()
) -> tuple[list[StoredWeight], list[tuple[str, str]]]:
    """Choose the weights of a checkpoint: float16, bfloat16, float32 or float64, two or more dimensions.

    Args:
        headers: the shards' headers; their order and each one's tensor order are the order of the list.
        exclude: globs, or ``"re:..."`` for regular expressions (full match), over tensor names and the names
            of the modules around them.

    Returns:
        The weights in list order, and (name, reason) of the tensors left as they are.

    Raises:
        UsageError: when a pattern matches nothing or is malformed, or nothing is left to prune.
    """
    stored = [(shard, info) for shard, header in enumerate(headers) for info in header.tensors]
    names = [info.name for _, info in stored]
    weights: list[StoredWeight] = []
    left_out: list[tuple[str, str]] = []
    packed = {_parent(info.name) for _, info in stored if _is_packed(info)}
    try:
        excluder = Excluder(exclude)
        for shard, info in stored:
            reason = excluder.reason(info.name, (), None) or _unfit(info, packed)
            if reason:
                left_out.append((info.name, reason))
            else:
                weights.append(StoredWeight(info, FLOATS[info.dtype], shard))
        excluder.check_all_matched(names)
    except ValueError as error:
        raise UsageError(f"{headers[0].path}: {error}") from None
    if not weights:
        raise UsageError(
            f"{headers[0].path}: nothing to prune: of {len(names)} tensors none is a weight "
            "(float16, bfloat16, float32 or float64, two or more dimensions, not excluded)"
        )
    return weights, left_out


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_packed(info: TensorInfo) -> bool:
    return info.dtype not in FLOATS and info.dtype != "BOOL" and len(info.shape) > 0


def _unfit(info: TensorInfo, packed: set[str]) -> str | None:
    if info.dtype not in FLOATS:
        return f"dtype {info.dtype}"
    if len(info.shape) < 2:
        return f"{len(info.shape)}-d"
    if info.numel == 0:
        return "empty"
    # weight_scale beside an fp8 weight, scales beside qweight: erasing one would wipe out whole groups.
    if "scale" in info.name.rpartition(".")[2] and _parent(info.name) in packed:
        return "scale of a quantised tensor"
    return None


@dataclass
class Selection:
    """Weights that compete for ``keep`` places; with ``keep`` None they are only counted."""

    keep: int | None
    members: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, member: int, segment: Segment) -> None:
        """Add a weight, or a part of one."""
        self.members.append(member)
        self.segments.append(segment)


@dataclass(frozen=True)
class Scope:
    """``"global"``, ``"layer"``, ``"row"``, or ``"n:m"`` with its two numbers."""

    kind: str
    n: int = 0
    m: int = 0


def parse_scope(scope: str, sparsity: float | None) -> Scope:
    """Return the scope; raise UsageError when it is unknown or doesn't go with the sparsity."""
    try:
        groups = check_scope(scope, sparsity, "prune")
        if groups is None:
            check_sparsity(sparsity, "prune")
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    return Scope("n:m", *groups) if groups else Scope(scope)


@dataclass
class Plan:
    """What competes with what, and where it lies.

    Attributes:
        selections: the first holds the weights of a global selection, or those only to be counted because rows
            or n:m groups are selected while they are written; then come layers, and rows larger than a block.
        segments: of each weight, in file order.
    """

    selections: list[Selection]
    segments: list[list[Segment]]


def plan(weights: Sequence[StoredWeight], scope: Scope, sparsity: float | None) -> Plan:
    """Say which weights compete, and where their files may be cut into blocks.

    Args:
        weights: the weights in list order.
        scope: what is selected together.
        sparsity: the share removed, None for n:m.
    """
    shared = Selection(None)
    if scope.kind == "global":
        shared.keep = num_keep(sparsity, sum(w.info.numel for w in weights))
    made = Plan([shared], [])
    for i, weight in enumerate(weights):
        info, item = weight.info, weight.dtype.itemsize
        row = (info.stop - info.start) // info.shape[0]
        own = info.stop - info.start if scope.kind == "layer" else row
        if scope.kind == "layer" or (scope.kind == "row" and row > BLOCK_BYTES):
            mine = []
            for start in range(info.start, info.stop, own):
                mine.append(Segment(weight.shard, start, start + own, i, len(made.selections), item, item))
                made.selections.append(Selection(num_keep(sparsity, own // item), [i], [mine[-1]]))
            made.segments.append(mine)
            continue
        grain, unit = (item, item) if scope.kind == "global" else (row, row)
        if scope.kind == "n:m":
            unit = row // info.shape[1] * scope.m
        group = 0 if scope.kind == "global" else -1
        segment = Segment(weight.shard, info.start, info.stop, i, group, grain, unit)
        shared.add(i, segment)
        made.segments.append([segment])
    return made
