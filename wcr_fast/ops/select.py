"""Exact magnitude selection over a list of tensors: thresholds and masks as ops of torch.

Of N weights, N - round(sparsity * N) stay: the largest; of equal magnitudes those first in list order, then in
logical row-major order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.paths import group_views, plain_path, row_counts, row_views
from wcr_fast.ops.sharded import is_sharded, local
from wcr_fast.torch_path.cuts import Cuts, num_keep, threshold_dtype, values_of
from wcr_fast.weights import Weight, tensor_dims

SCOPES = ("global", "layer", "row")

_lib = torch.library.Library("wcr_fast", "FRAGMENT")
_lib.define("magnitude_threshold(Tensor[] weights, float[] sparsities, str scope) -> Tensor")
# transposed: per weight 0 where outputs come first; else inputs do, in so many groups. Left out: all 0.
_lib.define("magnitude_masks(Tensor[] weights, float sparsity, str scope, int[] transposed=[]) -> Tensor[]")


def path_for(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module that selects among these tensors: over all processes where one is sharded."""
    if any(is_sharded(t) for t in tensors):
        from wcr_fast.ops import select_sharded

        return select_sharded
    return plain_path(tensors)


def check_sparsity(sparsity: float | None, op: str) -> float:
    """Return the sparsity as a float, or raise when it isn't a number (or 0-d array or tensor) in [0, 1]."""
    boolean = isinstance(sparsity, (bool, np.bool_)) or getattr(sparsity, "dtype", None) in (torch.bool, np.bool_)
    if boolean or isinstance(sparsity, (str, bytes)) or getattr(sparsity, "ndim", 0):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1] (or scope an n:m), got {sparsity!r}")
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1], got {sparsity!r}") from None
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: sparsity is the fraction removed and must lie in [0, 1], got {sparsity}")
    return value


def check_sparsities(sparsity: float | Iterable[float], op: str) -> tuple[list[float], bool]:
    """Return the sparsities as floats, and whether they were several: a 1-d array or tensor, or any other iterable."""
    dims = getattr(sparsity, "ndim", None)  # arrays and tensors without dimensions have __iter__ too
    many = dims == 1 if dims is not None else isinstance(sparsity, Iterable) and not isinstance(sparsity, (str, bytes))
    if many and isinstance(sparsity, Tensor):
        sparsity = sparsity.tolist()  # one sync on CUDA
    return [check_sparsity(s, op) for s in (sparsity if many else [sparsity])], many


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
        raise ValueError(f"{op}: scope {scope!r} already says how much stays: leave sparsity out (None)")
    return n, m


def keep_counts(tensors: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> list[list[int]]:
    """Return how many weights stay, [S][Q], for the scopes "global" and "layer"."""
    numels = [t.numel() for t in tensors]
    pools = [sum(numels)] if scope == "global" else numels
    return [[num_keep(s, pool) for s in sparsities] for pool in pools]


def raise_on_nan(bad: Tensor, names: Sequence[str], op: str, then: str = "", *, score: str = "magnitude") -> None:
    """Raise ValueError naming the tensors flagged as holding NaN (one sync); ``then`` ends the message."""
    named = [name for name, flag in zip(names, bad.tolist(), strict=True) if flag]
    if named:
        more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        if score == "magnitude":
            raise ValueError(f"{op}: {named[0]}{more} holds NaN: magnitudes can't be ranked{then}")
        raise ValueError(f"{op}: a {score} score of {named[0]}{more} is NaN or negative: it can't be ranked{then}")


def _raise_on_cpu(bad: Tensor, op: str) -> None:
    if bad.device.type == "cpu":  # elsewhere reading the flag would wait for the device
        raise_on_nan(bad, [f"weights[{i}]" for i in range(len(bad))], op)


def threshold(
    tensors: Sequence[Tensor], sparsities: Sequence[float], scope: str, op: str = "magnitude_threshold"
) -> Tensor:
    """Return the smallest magnitudes kept, [Q] or [Q, L]; see :func:`wcr_fast.magnitude_threshold`."""
    dtype = threshold_dtype(t.dtype for t in tensors)
    if not tensors or not sparsities:
        shape = (len(sparsities),) if scope == "global" else (len(sparsities), len(tensors))
        return torch.full(shape, torch.inf, dtype=dtype, device=tensors[0].device if tensors else None)
    tensors = [t.detach() for t in tensors]
    cuts = path_for(tensors).find_cuts(tensors, keep_counts(tensors, sparsities, scope))
    _raise_on_cpu(cuts.bad, op)
    values = values_of(cuts.key, cuts.dtype).to(local(tensors[0]).device, dtype)  # [S, Q]
    if scope == "global":
        return values[0].masked_fill(cuts.bad.any(), torch.nan)
    return values.masked_fill(cuts.bad[:, None], torch.nan).t().contiguous()


def masks(weights: Sequence[Weight], sparsity: float, scope: str) -> list[Tensor]:
    """Return keep masks; see :func:`wcr_fast.magnitude_masks`."""
    tensors = [w.param.detach() for w in weights]
    if not tensors:
        return []
    out = [torch.empty(local(t).shape, dtype=torch.bool, device=local(t).device) for t in tensors]
    path, op = path_for(tensors), "magnitude_masks"
    if scope in ("global", "layer"):
        cuts: Cuts = path.find_cuts(tensors, keep_counts(tensors, [sparsity], scope))
        _raise_on_cpu(cuts.bad, op)
        path.apply(tensors, cuts, out)
    else:
        if any(is_sharded(t) for t in tensors) or all(t.device.type == "cpu" for t in tensors):
            _raise_on_cpu(survey(tensors)[1], op)
        apply_lines(weights, tensors, sparsity, scope, out)
    if any(is_sharded(t) for t in tensors):
        from wcr_fast.ops.shards import like_shard

        return [like_shard(mask, t) for mask, t in zip(out, tensors, strict=True)]
    return out


def apply_lines(
    weights: Sequence[Weight],
    tensors: Sequence[Tensor],
    sparsity: float | None,
    scope: str,
    out: Sequence[Tensor] | None = None,
) -> None:
    """Prune every row, or every group of n:m, by itself: in place, or masks into ``out`` (of DTensors: of shards)."""
    nm = check_scope(scope, sparsity if scope == "row" else None, "prune")
    if any(is_sharded(t) for t in tensors):
        from wcr_fast.ops.lines_sharded import apply_lines as apply_sharded

        apply_sharded(weights, tensors, sparsity, nm, out)
        return
    path = plain_path(tensors)
    if nm is None:
        views = row_views(weights, tensors)
        path.apply_rows(views, row_counts(views, sparsity), None if out is None else row_views(weights, out))
    else:
        path.apply_nm(group_views(weights, tensors), *nm, None if out is None else group_views(weights, out))


def survey(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the zeros of every tensor (int64 [L]) and whether it holds NaN (bool [L])."""
    return path_for(tensors).survey(tensors)


def transposed(weights: Sequence[Weight]) -> list[int]:
    """Return the op's argument of this name."""
    return [w.groups if w.out_dim == 1 else 0 for w in weights]


def _literal(tensors: Sequence[Tensor], transposed: Sequence[int]) -> list[Weight]:
    groups = transposed or [0] * len(tensors)
    return [
        Weight(f"weights[{i}]", t, (), *((1, 0) if g else tensor_dims(t)), groups=max(g, 1))
        for i, (t, g) in enumerate(zip(tensors, groups, strict=True))
    ]


def _threshold_fake(weights: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> Tensor:
    dtype = threshold_dtype(t.dtype for t in weights)
    shape = (len(sparsities),) if scope == "global" else (len(sparsities), len(weights))
    return weights[0].new_empty(shape, dtype=dtype) if weights else torch.empty(shape, dtype=dtype)


def _masks_impl(weights: Sequence[Tensor], sparsity: float, scope: str, transposed: Sequence[int] = ()) -> list[Tensor]:
    return masks(_literal(weights, transposed), sparsity, scope)


def _masks_fake(weights: Sequence[Tensor], sparsity: float, scope: str, transposed: Sequence[int] = ()) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=torch.bool, device=w.device) for w in weights]


_lib.impl("magnitude_threshold", threshold, "CompositeExplicitAutograd")
_lib.impl("magnitude_masks", _masks_impl, "CompositeExplicitAutograd")
torch.library.register_fake("wcr_fast::magnitude_threshold", _threshold_fake)
torch.library.register_fake("wcr_fast::magnitude_masks", _masks_fake)
