"""Perturbing parameters along their gradients and putting them back: what SAM, CrAM and their kin have in common.

    e = rho T^2 g / (||T g|| + 1e-12),    w <- w + e,    ...,    w <- what it was, bit for bit

with the norm over all parameters, whatever their dtype, device or group, and over all shards of DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from wcr_fast.backend import use_triton
from wcr_fast.ops.sharded import aligned, is_sharded, local, shard_groups
from wcr_fast.slots import Site
from wcr_fast.torch_path import perturb as torch_path
from wcr_fast.torch_path.layout import is_dense
from wcr_fast.torch_path.moments import stats_dtype


def _parts(sites: Sequence[Site]) -> Iterator[tuple[ModuleType, list[int]]]:
    """Yield which path takes which sites: torch's those whose elements have gaps, on any device."""
    dense = [i for i, site in enumerate(sites) if site.weight.numel() and is_dense(site.weight)]
    loose = [i for i, site in enumerate(sites) if site.weight.numel() and not is_dense(site.weight)]
    if dense:
        if use_triton([sites[i].weight for i in dense]):
            from wcr_fast.triton_path import perturb

            yield perturb, dense
        else:
            yield torch_path, dense
    if loose:
        yield torch_path, loose


def _at(values: Sequence, places: Sequence[int]) -> list:
    return [values[i] for i in places]


def squares(sites: Sequence[Site], grads: Sequence[Tensor], keep_zeros: bool) -> Tensor:
    """Return sums of (T g)^2 that add up to that of all parameters, float64 [K]; no host sync on CUDA.

    With DTensors a collective: every rank of their meshes must call it with the same parameters.

    Args:
        sites: at least one; DTensors tell over which ranks a sum goes.
        grads: local gradients, cut as the weights are.
        keep_zeros: weights that are zero don't count.
    """
    cuts: dict[tuple, list[int]] = {}
    for i, site in enumerate(sites):
        cuts.setdefault(shard_groups(site.param), []).append(i)
    found = []
    for groups, places in cuts.items():
        here = [sites[i] for i in places]
        parts = [
            path.squares(_at(here, some), _at(_at(grads, places), some), keep_zeros) for path, some in _parts(here)
        ]
        sums = _joined(parts) if parts else _zero(here)
        if groups:
            sums = sums.sum(0, keepdim=True)  # ranks may have other dtypes' sums, or none
            for group in groups:
                torch.distributed.all_reduce(sums, group=group)
        found.append(sums)
    return _joined(found)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([p.to(parts[0].device) for p in parts])


def _zero(sites: Sequence[Site]) -> Tensor:
    return torch.zeros(1, dtype=stats_dtype(sites[0].weight.device), device=sites[0].weight.device)


def ascend_(
    sites: Sequence[Site], grads: Sequence[Tensor], sums: Tensor | None, keep_zeros: bool, saved: list[Site]
) -> None:
    """Save the weights and perturb them; ``sums`` as :func:`squares` returns them, None leaves rho undivided.

    Sums that are not finite perturb nothing. ``saved`` gets the sites whose copies hold the weights, in time for
    whoever has to put them back after an error.
    """
    for path, places in _parts(sites):
        path.ascend_(_at(sites, places), _at(grads, places), sums, keep_zeros, saved)
    _written(saved)


def restore_(sites: Sequence[Site], masked: Sequence[Tensor | None] | None = None) -> None:
    """Put the weights back; before that, set gradients in ``masked`` to zero where their weight is zero."""
    for path, places in _parts(sites):
        path.restore_(_at(sites, places), None if masked is None else _at(masked, places))
    _written(sites)


def _written(sites: Sequence[Site]) -> None:
    """Let autograd know: a backward pass across this must notice. An operation on a DTensor counts there."""
    sharded = [site.weight for site in sites if site.weight is not site.param]
    torch.autograd.graph.increment_version([*(site.param for site in sites), *sharded])


def local_grad(param: Tensor) -> Tensor | None:
    """Return a parameter's gradient on this rank, cut as the parameter is; None where there is none.

    Raises:
        TypeError: the gradient is sparse.
    """
    if param.grad is None:
        return None
    if param.grad.layout != torch.strided:
        raise TypeError(f"a parameter of shape {tuple(param.shape)} has a sparse gradient: use sparse=False there")
    if is_sharded(param.grad):
        param.grad = aligned(param.grad, param)
    return local(param.grad).detach()
