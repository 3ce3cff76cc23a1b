"""Exact magnitude selection over a list of tensors: thresholds and masks as ops of torch.

Of N weights, N - round(sparsity * N) stay: the largest; of equal magnitudes those first in list order, then in
logical row-major order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.torch_path.cuts import Cuts, num_keep, threshold_dtype, values_of
from wcr_fast.weights import Weight, tensor_dims

SCOPES = ("global", "layer", "row")

_lib = torch.library.Library("wcr_fast", "FRAGMENT")
_lib.define("magnitude_threshold(Tensor[] weights, float[] sparsities, str scope) -> Tensor")
_lib.define("magnitude_masks(Tensor[] weights, float sparsity, str scope) -> Tensor[]")


def path_for(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module that selects among these tensors: Triton's, or torch's where they span devices."""
    if use_triton(tensors) and len({t.device for t in tensors}) == 1:
        from wcr_fast.triton_path import select
    else:
        from wcr_fast.torch_path import select
    return select


def check_sparsity(sparsity: float | None, op: str) -> float:
    """Return the sparsity as a float, or raise when it isn't a number in [0, 1]."""
    if isinstance(sparsity, (bool, str)) or sparsity is None:
        raise TypeError(f"{op}: sparsity must be a number in [0, 1], got {sparsity!r}")
    value = float(sparsity)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: sparsity is the fraction removed and must lie in [0, 1], got {sparsity}")
    return value


def check_scope(scope: str, sparsity: float | None, op: str) -> tuple[int, int] | None:
    """Return (n, m) of an n:m scope, None for the others; raise for unknown scopes and a stray sparsity."""
    if scope in SCOPES:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", scope) if isinstance(scope, str) else None
    if match is None:
        raise ValueError(f'{op}: scope must be "global", "layer", "row" or n:m such as "2:4", got {scope!r}')
    n, m = int(match[1]), int(match[2])
    if not 0 < n <= m:
        raise ValueError(f'{op}: scope "n:m" keeps n of every m weights, 0 < n <= m, got {scope!r}')
    if sparsity is not None:
        raise ValueError(f"{op}: scope {scope!r} already says how much stays; sparsity must be None")
    return n, m


def keep_counts(tensors: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> list[list[int]]:
    """Return how many weights stay, [S][Q], for the scopes "global" and "layer"."""
    numels = [t.numel() for t in tensors]
    pools = [sum(numels)] if scope == "global" else numels
    return [[num_keep(s, pool) for s in sparsities] for pool in pools]


def raise_on_nan(bad: Tensor, names: Sequence[str], op: str) -> None:
    """Raise ValueError naming the tensors flagged as holding NaN (one sync)."""
    named = [name for name, flag in zip(names, bad.tolist(), strict=True) if flag]
    if named:
        more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        raise ValueError(f"{op}: {named[0]}{more} holds NaN: magnitudes can't be ranked, nothing was written")


def _raise_on_cpu(bad: Tensor, op: str) -> None:
    if bad.device.type == "cpu":  # elsewhere reading the flag would wait for the device
        raise_on_nan(bad, [f"weights[{i}]" for i in range(len(bad))], op)


def row_views(weights: Sequence[Weight], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with their output dimension first."""
    return [t.movedim(w.out_dim, 0) if t.dim() else t.view(1) for w, t in zip(weights, tensors, strict=True)]


def group_views(weights: Sequence[Weight], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with their input dimension last."""
    return [t.movedim(w.in_dim, -1) if t.dim() else t.view(1) for w, t in zip(weights, tensors, strict=True)]


def row_counts(views: Sequence[Tensor], sparsity: float) -> list[int]:
    """Return how many weights of a row stay, for each view."""
    return [num_keep(sparsity, v[0].numel()) if v.shape[0] else 0 for v in views]


def threshold(tensors: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> Tensor:
    """Return the smallest magnitudes kept, [Q] or [Q, L]; see :func:`wcr_fast.magnitude_threshold`."""
    dtype = threshold_dtype(t.dtype for t in tensors)
    if not tensors:
        shape = (len(sparsities),) if scope == "global" else (len(sparsities), 0)
        return torch.full(shape, torch.inf, dtype=dtype)
    tensors = [t.detach() for t in tensors]
    cuts = path_for(tensors).find_cuts(tensors, keep_counts(tensors, sparsities, scope))
    _raise_on_cpu(cuts.bad, "magnitude_threshold")
    values = values_of(cuts.key, cuts.dtype).to(dtype)  # [S, Q]
    if scope == "global":
        return values[0].masked_fill(cuts.bad.any(), torch.nan)
    return values.masked_fill(cuts.bad[:, None], torch.nan).t().contiguous()


def masks(weights: Sequence[Weight], sparsity: float, scope: str) -> list[Tensor]:
    """Return keep masks; see :func:`wcr_fast.magnitude_masks`."""
    tensors = [w.param.detach() for w in weights]
    if not tensors:
        return []
    out = [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    path, op = path_for(tensors), "magnitude_masks"
    if scope in ("global", "layer"):
        cuts: Cuts = path.find_cuts(tensors, keep_counts(tensors, [sparsity], scope))
        _raise_on_cpu(cuts.bad, op)
        path.apply(tensors, cuts, out)
        return out
    if all(t.device.type == "cpu" for t in tensors):
        _raise_on_cpu(survey(tensors)[1], op)
    if scope == "row":
        views = row_views(weights, tensors)
        path.apply_rows(views, row_counts(views, sparsity), row_views(weights, out))
    else:
        n, m = check_scope(scope, None, op)
        path.apply_nm(group_views(weights, tensors), n, m, group_views(weights, out))
    return out


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    return path_for(tensors).survey(tensors)


def _literal(tensors: Sequence[Tensor]) -> list[Weight]:
    return [Weight(f"weights[{i}]", t, (), *tensor_dims(t)) for i, t in enumerate(tensors)]


def _threshold_fake(weights: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> Tensor:
    dtype = threshold_dtype(t.dtype for t in weights)
    shape = (len(sparsities),) if scope == "global" else (len(sparsities), len(weights))
    return weights[0].new_empty(shape, dtype=dtype) if weights else torch.empty(shape, dtype=dtype)


def _masks_impl(weights: Sequence[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    return masks(_literal(weights), sparsity, scope)


def _masks_fake(weights: Sequence[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=torch.bool, device=w.device) for w in weights]


_lib.impl("magnitude_threshold", threshold, "CompositeExplicitAutograd")
_lib.impl("magnitude_masks", _masks_impl, "CompositeExplicitAutograd")
torch.library.register_fake("wcr_fast::magnitude_threshold", _threshold_fake)
torch.library.register_fake("wcr_fast::magnitude_masks", _masks_fake)
