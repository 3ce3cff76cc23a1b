"""Selection by scores, and a global selection with a floor and a cap for every layer: see ``ops.select``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from torch import Tensor

from wcr_fast.ops.paths import group_views, row_counts, row_views, takes_triton
from wcr_fast.ops.sharded import is_sharded
from wcr_fast.score import Scored, kernel_of
from wcr_fast.torch_path import allocate
from wcr_fast.torch_path import scores as torch_scores
from wcr_fast.torch_path import select as torch_select
from wcr_fast.torch_path.blocks import MemorySource
from wcr_fast.torch_path.cuts import Counts, Cuts
from wcr_fast.torch_path.window import KeyCounter, KeySource, window_search
from wcr_fast.weights import Weight


def check_whole(tensors: Sequence[Tensor], op: str) -> None:
    """Raise TypeError for a DTensor: scores, floors and caps don't take them yet."""
    for i, t in enumerate(tensors):
        if is_sharded(t):
            raise TypeError(f"{op}: weights[{i}] is a DTensor: scores, floors and caps take whole tensors only")


def _source(tensors: Sequence[Tensor], scored: Scored | None) -> KeySource | KeyCounter:
    """Return the source of these tensors' keys: of Triton where they take it, and the score has a kernel."""
    if takes_triton(tensors) and (scored is None or kernel_of(scored.score) is not None):
        from wcr_fast.triton_path.source import DeviceSource

        return DeviceSource(tensors, scored)
    return MemorySource(tensors) if scored is None else torch_scores.ScoreSource(tensors, scored)


def _triton(tensors: Sequence[Tensor], scored: Scored) -> ModuleType | None:
    """Return Triton's module where these tensors take it, and the score has a kernel."""
    if takes_triton(tensors) and kernel_of(scored.score) is not None:
        from wcr_fast.triton_path import select

        return select
    return None


def find_cuts(tensors: Sequence[Tensor], num_keep: Sequence[Sequence[int]], scored: Scored) -> Cuts:
    """Return the cuts that keep the num_keep[s][q] best of the whole list (S = 1) or of every tensor (S = L)."""
    triton = _triton(tensors, scored)
    if triton is not None:
        return triton.find_cuts(tensors, num_keep, scored)
    if len(num_keep) == 1:
        found = [window_search(torch_scores.ScoreSource(tensors, scored), num_keep[0])]
        dtypes = [torch_scores.threshold_dtype(t.dtype for t in tensors)]
    else:
        sources = [torch_scores.ScoreSource([t], scored.only(i)) for i, t in enumerate(tensors)]
        found = [window_search(s, keep) for s, keep in zip(sources, num_keep, strict=True)]
        dtypes = [s.dtype for s in sources]
    return torch_select.cuts_of(found, dtypes, tensors[0].device)


def apply(tensors: Sequence[Tensor], cuts: Cuts, scored: Scored, out: Sequence[Tensor] | None = None) -> Counts | None:
    """Write +0.0 to what the cuts (Q = 1) remove, or with ``out`` their keep masks (bool, contiguous) into it.

    Returns, in place, what was counted on the way where the search of the cuts counted nothing.
    """
    triton = _triton(tensors, scored)
    if triton is not None:
        return triton.apply(tensors, cuts, out, scored)
    return torch_scores.apply(tensors, cuts, out, scored)


def apply_lines(
    weights: Sequence[Weight],
    tensors: Sequence[Tensor],
    sparsity: float,
    nm: tuple[int, int] | None,
    scored: Scored,
    out: Sequence[Tensor] | None = None,
) -> None:
    """Select in every row (``nm`` None) or group of m by itself: in place, or keep masks into ``out``."""
    triton = _triton(tensors, scored)
    if triton is not None and nm is not None and nm[1] > triton.MAX_GROUP:
        triton = None
    if triton is not None:
        scored = triton.in_one_dtype(scored, tensors)
    beside = [scored.beside(i, t) for i, t in enumerate(tensors)]
    make = row_views if nm is None else group_views
    views, numbers = make(weights, tensors), make(weights, beside)
    outs = None if out is None else make(weights, out)
    if triton is not None:
        listed = triton.numbers_in_lines(scored, numbers)
        if nm is None:
            triton.apply_rows(views, row_counts(views, sparsity), outs, listed)
        else:
            triton.apply_nm(views, *nm, outs, listed)
        return
    if nm is None:
        counts, sizes = row_counts(views, sparsity), [max(v[0].numel(), 1) if len(v) else 1 for v in views]
    else:
        n, m = nm
        if outs is not None:
            for o in outs:
                o.fill_(True)

        def whole(listed: Sequence[Tensor]) -> list[Tensor]:
            cut = [v[..., : v.shape[-1] // m * m] for v in listed]
            return [v.unsqueeze(0) if v.dim() == 1 else v for v in cut]

        views, numbers = whole(views), whole(numbers)
        outs = None if outs is None else whole(outs)
        counts, sizes = [n] * len(views), [m] * len(views)
    torch_scores.apply_lines(views, numbers, scored, counts, sizes, outs)


def keep_per_layer(
    tensors: Sequence[Tensor],
    keeps: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
    scored: Scored | None = None,
) -> list[list[int]]:
    """Return how many weights of each layer stay, [L][Q]: the best of all, but at least ``low`` and at most ``high``.

    keeps[q] of all weights stay; sum(low) <= keeps[q] <= sum(high).
    """
    source = _source(tensors, scored)
    return np.stack([allocate.bounded(source, keep, low, high) for keep in keeps], axis=1).tolist()


def lamp_per_layer(tensors: Sequence[Tensor], keeps: Sequence[int]) -> list[list[int]]:
    """Return how many weights of each layer stay, [L][Q], where LAMP ranks all of them."""
    found = window_search(allocate.LampSource(tensors), list(keeps))
    if found.bad.any():
        raise ValueError("LAMP: a weight is NaN or infinite: its layer's sum of squares has no value")
    stay = torch_select.shares(np.array(found.ties), found.tied)
    return (found.above + stay).tolist()
