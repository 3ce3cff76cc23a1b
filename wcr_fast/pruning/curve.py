"""A model's results along a ladder of sparsities; the model comes back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wcr_fast.ops import select
from wcr_fast.ops.sharded import local, reshard
from wcr_fast.pruning.prune import Plan, chosen
from wcr_fast.pruning.record import PruneRecord
from wcr_fast.weights import Exclude, Weight


@dataclass(frozen=True)
class PrunePoint:
    """One sparsity of a curve: what ``evaluate`` returned there, and the pruning's record."""

    sparsity: float
    value: Any
    record: PruneRecord


@dataclass(frozen=True)
class PruningCurve:
    """The points of a curve, in the order in which the sparsities were given."""

    points: list[PrunePoint]

    @property
    def sparsities(self) -> list[float]:
        """Return the sparsities."""
        return [point.sparsity for point in self.points]

    @property
    def values(self) -> list[Any]:
        """Return what ``evaluate`` returned at each sparsity."""
        return [point.value for point in self.points]


def pruning_curve(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Any],
    sparsities: Iterable[float],
    *,
    scope: str = "global",
    exclude: Exclude = (),
    recalibrate: Iterable[Any] | None = None,
) -> PruningCurve:
    """Evaluate a model pruned one-shot at each sparsity, and give it back bit for bit.

    All cuts come from one scan of the dense weights. While it runs, the function holds one copy of the weights it
    prunes, and of all buffers. Weights, buffers and training flags are restored at the end, also when
    ``evaluate`` raises; between points only as far as the next point needs. With sharded weights all processes call
    it, and each keeps a copy of its shards.

    Args:
        model: the model, pruned in place for each point.
        evaluate: called as ``evaluate(model)``; its result, of any kind, becomes the point's value.
        sparsities: fractions removed, each in [0, 1], in any order.
        scope: ``"global"``, ``"layer"`` or ``"row"``.
        exclude: as for :func:`wcr_fast.prune_`.
        recalibrate: batches for :func:`wcr_fast.recalibrate_batchnorm`, run before each evaluation; something
            that can be iterated again and again, such as a DataLoader.

    Returns:
        The curve; ``.points`` holds sparsity, value and record in the caller's order.

    Raises:
        ValueError, TypeError: as :func:`wcr_fast.prune_`, and for an n:m scope, which has no sparsity to vary.

    Example:
        >>> import torch, wcr_fast
        >>> model = torch.nn.Linear(10, 10)
        >>> curve = wcr_fast.pruning_curve(model, lambda m: int((m.weight == 0).sum()), [0.0, 0.5])
        >>> curve.values
        [0, 50]
    """
    op = "pruning_curve"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a module, got {type(model).__name__}")
    if scope not in select.SCOPES:
        raise ValueError(f'{op}: scope must be "global", "layer" or "row", got {scope!r}')
    if recalibrate is not None and iter(recalibrate) is recalibrate:
        raise TypeError(f"{op}: recalibrate is read once per sparsity: pass a list or a DataLoader, not an iterator")
    wanted, many = select.check_sparsities(sparsities, op)
    if not many:
        raise TypeError(f"{op}: sparsities must be several numbers in [0, 1], got {sparsities!r}")
    weights, left_out = chosen(model, exclude, op)
    plan = Plan.of(weights, wanted, scope, left_out, op)
    points = []
    with _given_back(model, weights) as restore:
        for q, sparsity in enumerate(wanted):
            restore()
            record = plan.apply(q)
            if recalibrate is not None:
                from wcr_fast.pruning.batchnorm import recalibrate_batchnorm

                recalibrate_batchnorm(model, recalibrate)
            points.append(PrunePoint(sparsity, evaluate(model), record))
    return PruningCurve(points)


@contextlib.contextmanager
def _given_back(model: nn.Module, weights: Sequence[Weight]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores weights, buffers and training flags; call it on the way out."""
    saved = [(shard, shard.clone()) for shard in (local(w.param).detach() for w in weights)]
    owners = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    training = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore() -> None:
        reshard(model)  # evaluate may have gathered the weights of a sharded model
        for shard, values in saved:
            shard.copy_(values)
        for module, name, buffer, values in owners:
            module._buffers[name] = buffer  # evaluate may have replaced it
            if buffer is not None:
                buffer.copy_(values)
        for module, flag in training:
            module.training = flag

    try:
        yield restore
    finally:
        restore()
