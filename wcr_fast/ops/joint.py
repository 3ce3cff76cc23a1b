"""Moments for one or two smoothings at once, and the gradient of several penalties on them.

For J different r, falling: stats float64 [J, 4, L] and coef float64 [J, 3, L], each row as in :mod:`.moments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wcr_fast.backend import active_backend, backend, use_triton
from wcr_fast.ops import moments
from wcr_fast.ops.moments import moments_of, result_dtype, second_order
from wcr_fast.ops.sharded import is_sharded, local, local_coef, merged_stats

if TYPE_CHECKING:
    from wcr_fast.triton_path.joint import JointPlan

_lib = torch.library.Library("wcr_fast", "FRAGMENT")
_lib.define("joint_moments(Tensor[] weights, float[] rs) -> (Tensor mean, Tensor var, Tensor stats)")
_lib.define(
    "joint_moments_backward(Tensor[] weights, Tensor stats, Tensor grad_mean, Tensor grad_var, float[] rs) -> Tensor[]"
)
_lib.define(
    "add_joint_grad_(Tensor(a!)[] grads, Tensor[] weights, Tensor stats, Tensor coef, Tensor lam, float[] rs) -> ()"
)


class MemberRule(NamedTuple):
    """A member as kernels are told of it."""

    family: str | None  # None: its coefficients are computed outside
    eps: float
    which: int  # of the smoothings
    total: float
    lam: float | Tensor
    columns: Sequence[int]  # the layers that feel it


def path_for(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module that computes joint moments for these tensors: Triton's or torch's."""
    if use_triton(tensors):
        from wcr_fast.triton_path import joint
    else:
        from wcr_fast.torch_path import joint
    return joint


def _forward(weights: Sequence[Tensor], rs: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [w.detach() for w in weights]
    stats, _ = path_for(tensors).joint_moments(tensors, tuple(rs))
    narrow = stats[:, :2].to(result_dtype(tensors))
    return narrow[:, 0].clone(), narrow[:, 1].clone(), stats


def _forward_fake(weights: Sequence[Tensor], rs: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    mean = weights[0].new_empty((len(rs), len(weights)), dtype=result_dtype(weights))
    return mean, torch.empty_like(mean), mean.new_empty((len(rs), 4, len(weights)), dtype=torch.float64)


def _backward(
    weights: Sequence[Tensor], stats: Tensor, grad_mean: Tensor, grad_var: Tensor, rs: Sequence[float]
) -> list[Tensor]:
    tensors = [w.detach() for w in weights]
    slopes = grad_mean.to(stats.dtype), grad_var.to(stats.dtype)
    coef = torch.stack([torch.zeros_like(slopes[0]), *slopes], 1)
    return path_for(tensors).joint_grads(tensors, stats, coef, tuple(rs))


def _add_grad(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: Sequence[float],
) -> None:
    path_for(weights).add_joint_grad_(grads, weights, stats, coef, lam, tuple(rs))
    torch.autograd.graph.increment_version(grads)  # a kernel's write leaves no trace of its own


_lib.impl("joint_moments", _forward, "CompositeExplicitAutograd")
_lib.impl("joint_moments_backward", _backward, "CompositeExplicitAutograd")
_lib.impl("add_joint_grad_", _add_grad, "CompositeExplicitAutograd")
torch.library.register_fake("wcr_fast::joint_moments", _forward_fake)
torch.library.register_fake(
    "wcr_fast::joint_moments_backward", lambda weights, *rest: list(map(torch.empty_like, weights))
)
torch.library.register_fake("wcr_fast::add_joint_grad_", lambda *args: None)


def _setup_forward(ctx, inputs, output) -> None:
    weights, ctx.rs = inputs
    ctx.backend = active_backend()
    ctx.save_for_backward(output[2], *weights)


def _backward_of_forward(ctx, grad_mean: Tensor, grad_var: Tensor, _grad_stats: Tensor):
    stats, *weights = ctx.saved_tensors
    with backend(ctx.backend):
        return torch.ops.wcr_fast.joint_moments_backward(weights, stats, grad_mean, grad_var, ctx.rs), None


def _setup_backward(ctx, inputs, output) -> None:
    weights, stats, grad_mean, grad_var, ctx.rs = inputs
    ctx.save_for_backward(stats, grad_mean, grad_var, *weights)


def _backward_of_backward(ctx, grads: Sequence[Tensor | None]):
    stats, grad_mean, grad_var, *weights = ctx.saved_tensors
    found = [
        second_order(weights, grads, *numbers, r)
        for *numbers, r in zip(stats, grad_mean, grad_var, ctx.rs, strict=True)
    ]
    to_weights = [sum(of[1:], of[0]) for of in zip(*(to for to, _, _ in found), strict=True)]
    return to_weights, None, torch.stack([m for _, m, _ in found]), torch.stack([v for _, _, v in found]), None


torch.library.register_autograd("wcr_fast::joint_moments", _backward_of_forward, setup_context=_setup_forward)
torch.library.register_autograd(
    "wcr_fast::joint_moments_backward", _backward_of_backward, setup_context=_setup_backward
)


def joint_moments_of(tensors: Sequence[Tensor], rs: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return (mean, var), each [J, L], of a non-empty list of checked tensors; differentiable as ``moments_of`` is."""
    if len(rs) == 1 or any(map(is_sharded, tensors)):
        found = [moments_of(tensors, r) for r in rs]
        return torch.stack([mean for mean, _ in found]), torch.stack([var for _, var in found])
    mean, var, _ = torch.ops.wcr_fast.joint_moments(list(tensors), rs)
    return mean, var


def joint_stats_of(
    tensors: Sequence[Tensor], rs: tuple[float, ...], rules: Sequence[MemberRule]
) -> tuple[Tensor, Tensor | None]:
    """Return stats and, where they come with the same launch, the coefficients of the members that kernels know.

    Of DTensors they are the whole layers', the same on every rank.
    """
    if any(map(is_sharded, tensors)):
        shards = [local(t).detach() for t in tensors]
        stats, _ = path_for(shards).joint_moments(shards, rs)
        return torch.stack([merged_stats(part, tensors) for part in stats]), None
    if torch.compiler.is_compiling():
        return torch.ops.wcr_fast.joint_moments(list(tensors), rs)[2], None
    return path_for(tensors).joint_moments(tensors, rs, rules)


def add_joint_grad_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: tuple[float, ...],
) -> None:
    """Add lam times the gradient of all members to ``grads`` in place; stats and coef as :func:`joint_stats_of` has."""
    if len(rs) == 1:
        moments.add_grad_(grads, weights, stats[0], coef[0], lam, rs[0])
    elif torch.compiler.is_compiling():
        lam = torch.as_tensor(lam, dtype=stats.dtype, device=stats.device)
        torch.ops.wcr_fast.add_joint_grad_(list(grads), list(weights), stats, coef, lam, rs)
    elif any(map(is_sharded, weights)):
        shards = [local(w).detach() for w in weights]
        coef = torch.stack([local_coef(part, weights) for part in coef])
        _add_grad([local(g) for g in grads], shards, stats, coef, lam, rs)
    else:
        _add_grad(grads, weights, stats, coef, lam, rs)


def joint_plan_of(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    owners: Sequence[tuple[dict, str, Tensor]],
    rs: tuple[float, ...],
    shares: Sequence[tuple[list[int], list[int]]],
    state: tuple,
) -> JointPlan | None:
    """Return a plan for adding the gradient to these lists again and again, or None where there is no faster way."""
    if any(map(is_sharded, weights)):
        return None
    path = path_for(weights)
    return path.joint_plan(weights, grads, owners, rs, shares, state) if hasattr(path, "joint_plan") else None
