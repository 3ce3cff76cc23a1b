"""Is it the selection that was asked for? From the definition, in float64, piece by piece: lists of any size fit.

A stable descending sort of the magnitudes keeps exactly ``keep`` of them, none smaller than one that goes, and of equal
ones the earlier. Counting shows all of that without a sort. Rivals may break ties their own way (``by_order`` False),
but neither keep more nor less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness import WrongResult
from benchmarks.verify import pieces, sample


def check_threshold(weights: Sequence[Tensor], found: Tensor, keep: int) -> None:
    """Raise WrongResult unless a threshold (0-d) is the keep-th largest magnitude: fewer are larger, enough reach."""
    limit = found.to(weights[0].device).double()
    larger = reached = torch.zeros((), dtype=torch.int64, device=limit.device)
    for w in weights:
        for (x,) in pieces(w):
            magnitude = x.abs()
            larger, reached = larger + (magnitude > limit).sum(), reached + (magnitude >= limit).sum()
    if not int(larger) < keep <= int(reached):
        raise WrongResult(
            f"{float(limit):.9g} is not the magnitude of rank {keep}: {larger} are larger, {reached} reach it"
        )


def check_masks(weights: Sequence[Tensor], masks: Sequence[Tensor], keep: int, *, by_order: bool) -> None:
    """Raise WrongResult unless masks (kept: not 0) select the ``keep`` largest; by_order: of equal ones the earlier."""
    device = weights[0].device
    count = torch.zeros((), dtype=torch.int64, device=device)
    least, most = torch.full((), torch.inf, device=device).double(), torch.full((), -1.0, device=device).double()
    for _, magnitude, kept in _judged(weights, masks):
        count += kept.sum()
        least = torch.minimum(least, magnitude.where(kept, torch.inf).min())
        most = torch.maximum(most, magnitude.where(~kept, -1.0).max())
    if int(count) != keep:
        raise WrongResult(f"{int(count)} weights are kept, {int(count) - keep:+} of those asked for")
    if float(least) < float(most):
        raise WrongResult(f"a weight of magnitude {float(least):.9g} is kept, one of {float(most):.9g} is not")
    if not by_order or float(least) > float(most):
        return
    last_kept, first_gone = torch.full((), -1, device=device), torch.full((), torch.iinfo(torch.int64).max).to(device)
    for start, magnitude, kept in _judged(weights, masks):
        place = torch.arange(start, start + kept.numel(), device=device)
        tied = magnitude == least
        last_kept = torch.maximum(last_kept, place.where(tied & kept, -1).max())
        first_gone = torch.minimum(first_gone, place.where(tied & ~kept, torch.iinfo(torch.int64).max).min())
    if int(last_kept) > int(first_gone):
        raise WrongResult(f"of equal magnitudes weight {int(last_kept)} is kept, the earlier {int(first_gone)} is not")


def _judged(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield pieces as (place of the first weight in the list, magnitudes, kept)."""
    start = 0
    for w, mask in zip(weights, masks, strict=True):
        for x, kept in pieces(w, mask):
            yield start, x.abs(), kept != 0
            start += x.numel()


def check_pruned(dense: Sequence[Tensor], pruned: Sequence[Tensor], keep: int, *, by_order: bool) -> None:
    """Raise WrongResult unless the ``keep`` largest of the dense weights stay as they are and all others are zero."""
    nonzero = changed = 0
    for before, after in zip(dense, pruned, strict=True):
        for x, y in pieces(before, after):
            nonzero, changed = nonzero + x.count_nonzero(), changed + ((y != 0) & (y != x)).sum()
    if int(changed):
        raise WrongResult(f"{int(changed)} weights are neither kept as they were nor zero")
    check_masks(dense, pruned, min(keep, int(nonzero)), by_order=by_order)  # zeros go first, and none can be told apart


def check_groups(dense: Sequence[Tensor], pruned: Sequence[Tensor], n: int, m: int, *, by_order: bool) -> None:
    """Raise WrongResult unless of every m weights along dimension 1 the n largest stay and the others are zero."""
    for i in sample([w.numel() for w in dense]):
        before, after = (w.detach().movedim(1, -1) for w in (dense[i], pruned[i]))
        main = before.shape[-1] // m * m
        if not torch.equal(before[..., main:], after[..., main:]):
            raise WrongResult(f"weight {i}: inputs that fill no group of {m} were changed")
        for x, y in pieces(before[..., :main], after[..., :main]):  # a piece holds whole groups of 2, 4, 8, ...
            x, y = x.view(-1, m), y.view(-1, m)
            ranked = x.abs().sort(dim=1, descending=True, stable=True)
            keep = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ranked.indices[:, :n], True)
            right = y == x.where(keep, 0.0)
            if not by_order:
                ranked.values[:, n:] = 0.0
                as_large = y.abs().sort(dim=1, descending=True).values == ranked.values
                right = ((y == x) | (y == 0.0)) & as_large
            if not bool(right.all()):
                raise WrongResult(f"weight {i}: not {n} of {m} are kept, or not the largest")
