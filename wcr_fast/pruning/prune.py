"""Pruning by magnitude in place: weights become +0.0, parameters stay what they are."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wcr_fast.ops import select
from wcr_fast.ops.paths import group_views, row_counts, row_views
from wcr_fast.ops.ranks import all_or_none
from wcr_fast.ops.sharded import is_sharded, local, reshard
from wcr_fast.pruning.ranking import Aux, Bound, Ranking
from wcr_fast.pruning.record import LayerRecord, PruneRecord
from wcr_fast.score import Score
from wcr_fast.torch_path.cuts import Cuts, num_keep, values_of
from wcr_fast.torch_path.layout import is_dense
from wcr_fast.torch_path.window import shares
from wcr_fast.weights import Exclude, Weight, as_weights, choose


def prune_(
    model_or_weights: Tensor | nn.Module | Iterable[Tensor],
    sparsity: float | None,
    *,
    scope: str = "global",
    exclude: Exclude = (),
    score: str | Score = "magnitude",
    aux: Aux = None,
    floor: Bound = None,
    cap: Bound = None,
) -> PruneRecord:
    """Set the smallest weights to zero, in place, and return a record of it.

    Of N weights exactly round(sparsity * N) go, zeros first, so pruning twice at 0.5 stays at 0.5. Ties are
    broken as in :func:`wcr_fast.magnitude_masks`. Names, ``state_dict`` keys, storage and hooks stay as they are.
    Of DTensors every process writes its shards; the record is that of the whole weights.

    Args:
        model_or_weights: a module (its weights with two or more dimensions, frozen ones too, without
            normalisation), a tensor, or tensors, taken literally.
        sparsity: the fraction removed, in [0, 1]; None for n:m.
        scope: ``"global"``, ``"layer"``, ``"row"`` (each output by itself) or n:m such as ``"2:4"``, n kept of
            each m along the input dimension.
        exclude: what to leave out of a module: name patterns, module types or functions.
        score: by what weights are ranked, and ``aux`` what that needs: see :func:`wcr_fast.score_masks`.
        floor: for scope ``"global"``: the share of each layer that stays at least, one number, or by name pattern (the
            first match counts); above 0 a layer keeps one weight. The total is exact, masks nested as sparsity grows.
        cap: the share of each layer that stays at most.

    Returns:
        The record: counts, threshold (the smallest score kept) and a row per layer; ``print(record)`` shows a table.
        Waits for the device.

    Raises:
        ValueError: before anything is written: NaN (naming the parameter), nothing to prune, the same or
            overlapping tensors, a pattern that matches nothing, a wrong sparsity or scope. TypeError: for
            weights that aren't real floating-point tensors. RuntimeError: for an error in another process, where
            weights are sharded.

    Warns:
        UserWarning: when a layer loses all its weights.

    Example:
        >>> import torch, wcr_fast
        >>> model = torch.nn.Linear(10, 10)
        >>> wcr_fast.prune_(model, 0.9).zeros
        90
    """
    value = _checked(sparsity, scope, "prune_")
    weights, left_out = chosen(model_or_weights, exclude, "prune_")
    ranking = Ranking.of(weights, scope, "prune_", score=score, aux=aux, floor=floor, cap=cap)
    return Plan.of(weights, [value], scope, left_out, "prune_", ranking).apply(0)


def warn_of_emptied(names: Sequence[str], op: str, *, stacklevel: int) -> None:
    """Warn where layers lose all their weights."""
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(f"{op}: nothing is left of {shown}", stacklevel=stacklevel)


def _checked(sparsity: float | None, scope: str, op: str) -> float | None:
    if select.check_scope(scope, sparsity, op):
        return None
    return select.check_sparsity(sparsity, op)


def chosen(
    model_or_weights: Tensor | nn.Module | Iterable[Tensor], exclude: Exclude, op: str
) -> tuple[list[Weight], tuple[tuple[str, str], ...]]:
    """Return the weights to prune and what is left out; raise when they can't be pruned in place."""
    left_out: tuple[tuple[str, str], ...] = ()
    if isinstance(model_or_weights, nn.Module):
        reshard(model_or_weights)
        choice = choose(model_or_weights, exclude=exclude, trainable=False, sharded=True)
        weights, left_out = choice.weights, tuple(choice.left_out)
        for weight in weights:
            if weight.param.element_size() < 2:
                raise TypeError(f"{op}: {weight.label()} has dtype {weight.param.dtype}; exclude it")
    else:
        weights = as_weights(model_or_weights, op=op, exclude=exclude, sharded=True)
    if not weights:
        found = ", ".join(f"{name} ({reason})" for name, reason in left_out[:4]) or "no parameters at all"
        raise ValueError(f"{op}: nothing to prune: no floating-point weight with 2 or more dimensions; found {found}")
    with all_or_none([w.param for w in weights], op):
        for weight in weights:
            check_writable(weight, op)
        _check_apart(weights, op)
    return weights, left_out


def check_writable(weight: Weight, op: str) -> None:
    """Raise ValueError when a weight can't be written in place: it has no values, or overlaps itself."""
    param = local(weight.param)
    if param.device.type == "meta":
        raise ValueError(f"{op}: {weight.label()} is on the meta device and has no values")
    reach = 0  # distance between the first and the last element over the dimensions so far
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and param.numel():
            if stride <= reach:
                raise ValueError(
                    f"{op}: {weight.label()} is expanded or overlaps itself (strides {param.stride()}) and can't "
                    "be written in place; pass a clone"
                )
            reach += stride * (size - 1)


def _check_apart(weights: Sequence[Weight], op: str) -> None:
    """Raise when two weights share memory. Interleaved views of one buffer pass: they can be disjoint."""
    spans = []
    for weight in weights:
        param = local(weight.param)
        if param.numel():
            start = param.data_ptr()
            reach = sum(stride * (size - 1) for stride, size in zip(param.stride(), param.shape, strict=True))
            spans.append((str(param.device), start, start + (reach + 1) * param.element_size(), weight))
    spans.sort(key=lambda span: span[:2])
    for (device, start, stop, first), (other, at, _, second) in itertools.pairwise(spans):
        dense = is_dense(local(first.param)) and is_dense(local(second.param))
        if device == other and (at == start or (at < stop and dense)):
            raise ValueError(f"{op}: {first.label()} and {second.label()} share memory; pass each weight once")


@dataclass(frozen=True)
class Plan:
    """A selection made, at one or more sparsities, and not written yet."""

    weights: list[Weight]
    sparsities: list[float | None]
    scope: str
    left_out: tuple[tuple[str, str], ...]
    zeros: np.ndarray | None  # int64 [L], before anything is written; None where writing tells
    cuts: Cuts | None  # None for row and n:m, which select and write in one go
    ranking: Ranking  # by magnitude, unless asked otherwise

    @classmethod
    def of(
        cls,
        weights: list[Weight],
        sparsities: list[float | None],
        scope: str,
        left_out: tuple[tuple[str, str], ...],
        op: str,
        ranking: Ranking | None = None,
    ) -> Plan:
        """Select at all sparsities in one scan; raise ValueError for NaN."""
        tensors = [w.param.detach() for w in weights]
        ranking = ranking or Ranking()
        labels = [w.label() for w in weights]
        cuts = None
        if scope in ("global", "layer") and sparsities:
            cuts = ranking.find_cuts(tensors, sparsities, scope, op)
            select.raise_on_nan(cuts.bad, labels, op, ", nothing was written", score=ranking.name)
        elif ranking.scored is not None:
            ranking.check_lines(tensors, labels, op)
        zeros = None
        if cuts is not None and cuts.counts is not None and ranking.scored is None:
            zeros = cuts.counts.zeros.cpu().numpy()
        elif cuts is None or ranking.scored is not None:
            zeros, bad = select.survey(tensors)
            select.raise_on_nan(bad, labels, op, ", nothing was written")
            zeros = zeros.cpu().numpy()
        return cls(weights, sparsities, scope, left_out, zeros, cuts, ranking)

    def apply(self, q: int) -> PruneRecord:
        """Write the q-th sparsity into the weights and return the record; warn where a layer loses everything."""
        tensors = [w.param.detach() for w in self.weights]
        write = self._write_cuts if self.cuts is not None else self._write_lines
        record = write(tensors, q)
        # Kernels write behind autograd's back; a backward pass across this must notice.
        torch.autograd.graph.increment_version([*tensors, *(local(t) for t in tensors if is_sharded(t))])
        emptied = [layer.name for layer in record.per_layer if layer.numel and layer.removed == layer.numel]
        warn_of_emptied(emptied, "prune_", stacklevel=4)
        return record

    def _write_lines(self, tensors: list[Tensor], q: int) -> PruneRecord:
        """Prune every row, or every group of n:m, by itself."""
        notes = [""] * len(tensors)
        shapes = [torch.empty(t.shape, device="meta") for t in tensors]  # of whole weights, where they are sharded
        self.ranking.apply_lines(self.weights, tensors, self.sparsities[q], self.scope)
        if self.scope == "row":
            views = row_views(self.weights, shapes)
            keep = row_counts(views, self.sparsities[q])
            per_view = iter([v.numel() - v.shape[0] * k for v, k in zip(views, keep, strict=True)])
            removed = [sum(itertools.islice(per_view, w.groups)) for w in self.weights]
        else:
            n, m = select.check_scope(self.scope, None, "prune_")
            views = group_views(self.weights, shapes)
            removed = [v.numel() // max(v.shape[-1], 1) * (v.shape[-1] // m) * (m - n) for v in views]
            notes = [
                f"the last {rest} of {v.shape[-1]} inputs fill no group of {m} and stay dense" if rest else ""
                for v in views
                for rest in (v.shape[-1] % m,)
            ]
        after = select.survey(tensors)[0].tolist()
        return self._record(q, removed, after, self.zeros, [None] * len(tensors), notes)

    def _write_cuts(self, tensors: list[Tensor], q: int) -> PruneRecord:
        """Prune at the cuts of the list or of every layer."""
        cuts = self.cuts.at(q)
        counts = self.ranking.apply(tensors, cuts) or cuts.counts
        before = counts.zeros.cpu().numpy() if self.zeros is None else self.zeros
        key, ties = cuts.key[:, 0].cpu().numpy(), cuts.ties[:, 0].cpu().numpy()
        numels = np.array([w.param.numel() for w in self.weights])
        removed = numels - counts.above[:, 0].cpu().numpy() - _share(ties, counts.tied[:, 0].cpu().numpy())
        if self.ranking.scored is None:
            # Above a cut of zero everything stays: there the zeros are what they were.
            after = np.where(key == 0, before, removed)
        else:  # which weights stay doesn't show in their zeros
            after = select.survey(tensors)[0].cpu().numpy()
        thresholds = values_of(cuts.key[:, 0], cuts.dtype).tolist()
        thresholds *= len(tensors) // len(thresholds)
        kept = (numels - removed).tolist()
        notes = [self.ranking.note(i, *counts) for i, counts in enumerate(zip(kept, numels.tolist(), strict=True))]
        return self._record(q, removed.tolist(), after.tolist(), before, thresholds, notes)

    def _record(
        self,
        q: int,
        removed: Sequence[int],
        after: Sequence[int],
        before: np.ndarray,
        thresholds: Sequence[float | None],
        notes: Sequence[str],
    ) -> PruneRecord:
        layers = tuple(
            LayerRecord(w.label(), tuple(w.param.shape), w.param.numel(), *row)
            for w, row in zip(self.weights, zip(removed, after, thresholds, notes, strict=True), strict=True)
        )
        return PruneRecord(
            scope=self.scope,
            requested=self.sparsities[q],
            asked=self._asked(q, removed),
            pruned_now=sum(after) - int(before.sum()),
            zeros=sum(after),
            numel=sum(layer.numel for layer in layers),
            threshold=thresholds[0] if self.scope == "global" and len(set(thresholds)) == 1 else None,
            per_layer=layers,
            left_out=self.left_out,
        )

    def _asked(self, q: int, removed: Sequence[int]) -> int:
        numels = [w.param.numel() for w in self.weights]
        if self.scope == "global":
            return sum(numels) - num_keep(self.sparsities[q], sum(numels))
        if self.scope == "layer":
            return sum(n - num_keep(self.sparsities[q], n) for n in numels)
        return sum(removed)  # rows and groups: counted by shape above


def _share(ties: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Return the ties that each tensor keeps: by list order in one pool, its own in pools per layer."""
    if len(ties) == 1:
        return shares(ties, tied[:, None])[:, 0]
    return np.minimum(ties, tied)
