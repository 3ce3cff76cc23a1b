"""Several members of the moments family, computed together: one pass for the moments, one for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.joint import MemberRule, add_joint_grad_, joint_moments_of, joint_plan_of, joint_stats_of
from wcr_fast.regularizers.terms import Added, Look, Term, union
from wcr_fast.table import pointers, upload

if TYPE_CHECKING:
    from wcr_fast.regularizers.base import Regularizer
    from wcr_fast.triton_path.joint import JointPlan

# One number a layer says which members it feels: its sign bit stays free.
MAX_MEMBERS = 62


class Joint(Term):
    """The moments family's members in a sum. A layer that a member lacks has a coefficient of 0 from it."""

    _plan: JointPlan | None = None

    def __init__(self, members: Sequence[Regularizer]) -> None:
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"Sum: at most {MAX_MEMBERS} members of the moments family, got {len(members)}")
        self._members = tuple(members)
        self._choice, self._places = union(members)
        self._measure()
        self.smoothings()

    @property
    def _title(self) -> str:
        return "Sum"

    @property
    def r(self) -> float:
        """The members' common r; ValueError where there are two."""
        rs = self.smoothings()
        if len(rs) > 1:
            raise ValueError(f"Sum: members differ in r: {rs[0]} and {rs[1]}; give them the same r")
        return rs[0]

    @property
    def lam(self) -> float:
        """1: the members have strengths of their own."""
        return 1.0

    @property
    def terms(self) -> tuple[Term, ...]:
        return self._members

    def _off(self) -> bool:
        return all(member._off() for member in self._members)

    def _active(self) -> list[int]:
        members = zip(self._members, self._places, strict=True)
        return sorted({places[i] for member, places in members for i in member._active()})

    def smoothings(self) -> tuple[float, ...]:
        """Return the members' r, falling; ValueError for more than two."""
        rs = tuple(sorted({member.r for member in self._members}, reverse=True))
        if len(rs) > 2:
            raise ValueError(
                f"Sum: members differ in r: {', '.join(map(str, rs))}; at most two can be computed together: give "
                "some of them the same r, or attach them apart"
            )
        return rs

    def _shares(self, indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return, for each member, which of its weights are among these, and where there."""
        column = {place: i for i, place in enumerate(indices)}
        shares = []
        for member, places in zip(self._members, self._places, strict=True):
            mine = [i for i in member._active() if places[i] in column] if not member._off() else []
            shares.append((mine, [column[places[i]] for i in mine]))
        return shares

    def __call__(self) -> Tensor:
        shares = self._shares(range(len(self._numels)))
        used = sorted({place for _, places in shares for place in places})
        if not used:
            return self._nothing()
        rs = self.smoothings()
        mean, var = joint_moments_of([self._choice.weights[i].current() for i in used], rs)
        column = {place: i for i, place in enumerate(used)}
        total = mean.new_zeros(())
        for member, (mine, places) in zip(self._members, shares, strict=True):
            if mine:
                which, columns = rs.index(member.r), [column[place] for place in places]
                both = (self._columns(moments[which], columns) for moments in (mean, var))
                total = total + member._value_at(*both, mine)
        return total

    def _columns(self, stats: Tensor, columns: Sequence[int]) -> Tensor:
        """Return these columns of stats or coefficients."""
        if len(columns) == stats.shape[-1]:
            return stats
        return stats.index_select(-1, self._index(columns, stats.device))

    def _index(self, columns: Sequence[int], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(columns, device=device)
        key = (tuple(columns), device)
        if key not in self._vectors:  # uploaded once: a copy from pageable memory waits for the device
            self._vectors[key] = upload(np.array(columns, dtype=np.int64), device)
        return self._vectors[key]

    # With one r they are a formula of the moments like any other, with a strength of 1.

    def _formula_at(self, mean: Tensor, var: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the sum over the members of lam f, 0-d: each layer's moments are in its own terms only."""
        total = mean.new_zeros(())
        for member, (mine, columns) in zip(self._members, self._shares(indices), strict=True):
            if mine:
                both = (self._columns(moments, columns) for moments in (mean, var))
                total = total + (member.lam * member._formula_at(*both, mine)).sum()
        return total

    def _derivatives_at(self, stats: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the sums over the members of lam (f, df/dmean, df/dvar), [3, L]."""
        coef = stats.new_zeros(1, 3, len(indices))
        self._add_open(stats[None], coef, self._shares(indices), (self.r,), all_open=True)
        return coef[0]

    def _rules(self, shares: Sequence[tuple[list[int], list[int]]], rs: tuple[float, ...]) -> list[MemberRule]:
        return [
            MemberRule(m.family, m.eps, rs.index(m.r), float(sum(m._numels)), m.lam, columns)
            for m, (_, columns) in zip(self._members, shares, strict=True)
        ]

    def _add_grad(self, indices: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        if self._off():
            return None
        plan = self._plan
        if plan is not None and not torch.compiler.is_compiling() and plan.fits(self._state(indices)):
            addresses = plan.addresses()
            if addresses is not None:
                return self._run_plan(addresses, scale)
        return self._add_grad_anew(self._active() if indices is None else indices, indices, scale)

    def _state(self, indices: Sequence[int] | None) -> tuple:
        """Return what a plan was made for, beside what its watch looks at."""
        members = ((m.r, m._off()) for m in self._members)
        return (None if indices is None else tuple(indices), *members)

    def _run_plan(self, addresses: np.ndarray, scale: Tensor | None) -> Added:
        plan = self._plan
        rs, shares = plan.rs, plan.shares
        stats, coef = plan.moments(self._rules(shares, rs))
        self._add_open(stats, coef, shares, rs, all_open=False)
        plan.gradient(addresses, 1.0 if scale is None else scale)
        return self._added(stats, coef, shares, rs)

    @torch.no_grad()
    def _add_grad_anew(self, indices: Sequence[int], asked: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        """Add the gradient without knowing anything of earlier calls, and leave a plan for later ones."""
        self._plan = None
        shares = self._shares(indices)
        used = sorted({column for _, columns in shares for column in columns})
        if not used:
            return None
        if len(used) < len(indices):
            indices = [indices[column] for column in used]
            shares = self._shares(indices)
        rs = self.smoothings()
        params, grads = self._gradients(indices)
        if not torch.compiler.is_compiling():
            owners = self._owners(indices, params)
            self._plan = joint_plan_of(params, grads, owners, rs, shares, self._state(asked))
            if self._plan is not None:
                torch.autograd.graph.increment_version(grads)
                return self._run_plan(np.array(pointers(grads), dtype=np.int64), scale)
        tensors = [p.detach() for p in params]
        stats, coef = joint_stats_of(tensors, rs, self._rules(shares, rs))
        all_open = coef is None
        if all_open:
            coef = stats.new_zeros(len(rs), 3, len(tensors))
        self._add_open(stats, coef, shares, rs, all_open=all_open)
        add_joint_grad_(grads, tensors, stats, coef, 1.0 if scale is None else scale, rs)
        return self._added(stats, coef, shares, rs)

    def _add_open(
        self,
        stats: Tensor,
        coef: Tensor,
        shares: Sequence[tuple[list[int], list[int]]],
        rs: tuple[float, ...],
        *,
        all_open: bool,
    ) -> None:
        """Add lam (f, df/dmean, df/dvar) of the members that the kernels don't know to the coefficients."""
        for member, (mine, columns) in zip(self._members, shares, strict=True):
            if mine and (all_open or member.family is None):
                which = rs.index(member.r)
                terms = member._derivatives_at(self._columns(stats[which], columns), mine)
                if len(columns) == coef.shape[-1]:
                    coef[which].add_(member.lam * terms)
                else:
                    coef[which].index_add_(1, self._index(columns, coef.device), member.lam * terms)

    def _added(
        self,
        stats: Tensor,
        coef: Tensor,
        shares: Sequence[tuple[list[int], list[int]]],
        rs: tuple[float, ...],
    ) -> Added:
        def look(member: Regularizer, mine: list[int], columns: list[int]) -> Look:
            which = rs.index(member.r)
            return Look(member, stats.device, mine, lambda: self._columns(stats[which], columns))

        looks = [look(m, mine, columns) for m, (mine, columns) in zip(self._members, shares, strict=True) if mine]
        return Added(lambda: coef[:, 0].sum(), looks)
