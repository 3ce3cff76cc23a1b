"""Moments and gradients for one or two smoothings on Triton: one launch each per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels.joint import TERM_WIDTH, launch_joint_gradient, launch_joint_moments
from wcr_fast.kernels.moments import FAMILIES
from wcr_fast.table import TensorTable, group, keep_for_graph, on_device, send, upload
from wcr_fast.triton_path import moments
from wcr_fast.triton_path.moments import GradPlan, dense, grad_plan, gradient_targets, put_back, table_of

if TYPE_CHECKING:
    from wcr_fast.ops.joint import MemberRule


def _numbers(rules: Sequence[MemberRule]) -> np.ndarray:
    """Return what kernels are told of the members; strengths that are tensors come later."""
    numbers = np.empty((len(rules), TERM_WIDTH))
    for row, rule in zip(numbers, rules, strict=True):
        known = FAMILIES.index(rule.family) if rule.family is not None and rule.columns else -1
        row[:] = known, rule.eps, rule.which, rule.total, 0.0 if isinstance(rule.lam, Tensor) else rule.lam
    return numbers


def _fill_strengths(terms: Tensor, rules: Sequence[MemberRule]) -> None:
    for row, rule in zip(terms, rules, strict=True):
        if isinstance(rule.lam, Tensor):
            row[4].copy_(rule.lam, non_blocking=True)


def _bits(rules: Sequence[MemberRule], layers: int) -> np.ndarray:
    """Return a number for each layer whose bits say which members it feels."""
    bits = np.zeros(layers, dtype=np.int64)
    for k, rule in enumerate(rules):
        bits[list(rule.columns)] |= 1 << k
    return bits


def _launch_moments(
    table: TensorTable, members: Tensor, stats: Tensor, coef: Tensor, terms: Tensor, rs: tuple[float, ...]
) -> None:
    launch_joint_moments(
        table.rows,
        table.block_to_tensor,
        members,
        table.scratch("joint partials", 4 * table.num_chunks, torch.float64),
        table.scratch("counters", len(table.positions), torch.int32),
        stats,
        coef,
        terms,
        dtype=table.dtype,
        rs=rs,
    )


def joint_moments(
    tensors: Sequence[Tensor], rs: tuple[float, ...], rules: Sequence[MemberRule] = ()
) -> tuple[Tensor, Tensor]:
    """Return stats [J, 4, L] and coef [J, 3, L]: the sums over the members of known formulas.

    Both lie on the first tensor's device; an empty tensor's columns are 0. No synchronisation with the host, bitwise
    repeatable.
    """
    tensors = [dense(t) for t in tensors]
    home = tensors[0].device
    bits, numbers = _bits(rules, len(tensors)), _numbers(rules)
    outputs: dict[torch.device, tuple[Tensor, Tensor]] = {}
    groups = group(tensors)
    for device in (home, *(tensors[positions[0]].device for positions in groups)):
        if device not in outputs:
            sizes = ((len(rs), rows, len(tensors)) for rows in (4, 3))
            outputs[device] = tuple(torch.zeros(s, dtype=torch.float64, device=device) for s in sizes)
    for positions in groups:
        table = table_of(tensors, positions)
        with on_device(table.device):
            terms = upload(numbers, table.device)
            _fill_strengths(terms, rules)
            _launch_moments(table, upload(bits[list(positions)], table.device), *outputs[table.device], terms, rs)
    for device, out in outputs.items():
        if device != home:
            columns = [i for i, t in enumerate(tensors) if t.device == device]
            for mine, theirs in zip(outputs[home], out, strict=True):
                mine[:, :, columns] = theirs[:, :, columns].to(home)
    return outputs[home]


def _launch_gradient(
    table: TensorTable,
    out_addrs: Tensor,
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: tuple[float, ...],
    *,
    accumulate: bool,
) -> None:
    if len(rs) == 1:
        moments.launch_table_gradient(table, out_addrs, stats[0], coef[0], lam, rs[0], accumulate=accumulate)
        return
    launch_joint_gradient(
        table.rows,
        table.block_to_tensor,
        out_addrs,
        stats,
        coef,
        lam.to(table.device) if isinstance(lam, Tensor) else lam,
        dtype=table.dtype,
        rs=rs,
        accumulate=accumulate,
    )


def _gradient(
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: tuple[float, ...],
    *,
    accumulate: bool,
) -> None:
    for positions in group(tensors):
        table = table_of(tensors, positions)
        device = table.device
        with on_device(device):
            addrs = table.addresses([outs[i] for i in positions])
            _launch_gradient(table, addrs, stats.to(device), coef.to(device), lam, rs, accumulate=accumulate)


def add_joint_grad_(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    stats: Tensor,
    coef: Tensor,
    lam: float | Tensor,
    rs: tuple[float, ...],
) -> None:
    """Add lam times the gradient of all smoothings to every gradient; see ``moments.add_grad_``."""
    weights, outs = gradient_targets(grads, tensors)
    _gradient(weights, outs, stats, coef, lam, rs, accumulate=True)
    put_back(grads, tensors, outs)


def joint_grads(tensors: Sequence[Tensor], stats: Tensor, coef: Tensor, rs: tuple[float, ...]) -> list[Tensor]:
    """Return the gradient of all smoothings of every tensor, laid out like ``torch.empty_like`` of it."""
    tensors = [dense(t) for t in tensors]
    outs = [torch.empty_like(t) for t in tensors]
    _gradient(tensors, outs, stats, coef, 1.0, rs, accumulate=False)
    return outs


class JointPlan(GradPlan):
    """Moments and gradient of a list that stays as it is, for several members; made by :func:`joint_plan`."""

    def prepare(self, rs: tuple[float, ...], shares: Sequence[tuple[list[int], list[int]]], state: tuple) -> None:
        """Keep what belongs to the members."""
        self.rs, self.shares, self._state = rs, shares, state
        self._joint = tuple(
            torch.empty((len(rs), rows, self._stats.shape[1]), dtype=torch.float64, device=self._device)
            for rows in (4, 3)
        )
        self._terms: Tensor | None = None
        self._sent: np.ndarray | None = None
        self._members: list[Tensor] = []

    def fits(self, state: tuple) -> bool:
        """Tell whether a call finds the members as they were."""
        return state == self._state

    def moments(self, rules: Sequence[MemberRule]) -> tuple[Tensor, Tensor]:
        """Take the moments, in one launch a dtype; return stats and the coefficients of known formulas."""
        keep_for_graph(self._device, self)
        numbers = _numbers(rules)
        if self._sent is None or not np.array_equal(numbers, self._sent):
            self._terms, self._sent = send(numbers, self._device, self._terms), numbers
        _fill_strengths(self._terms, rules)
        if not self._members:
            bits = _bits(rules, self._stats.shape[1])
            self._members = [upload(bits[list(table.positions)], self._device) for table in self._tables]
        with on_device(self._device):
            for table, members in zip(self._tables, self._members, strict=True):
                _launch_moments(table, members, *self._joint, self._terms, self.rs)
        return self._joint

    def gradient(self, addresses: np.ndarray, lam: float | Tensor) -> None:
        """Add lam times the gradient, in one launch a dtype."""
        with on_device(self._device):
            for table in self._tables:
                here = addresses if len(self._tables) == 1 else addresses[list(table.positions)]
                _launch_gradient(table, table.sent(here), *self._joint, lam, self.rs, accumulate=True)


def joint_plan(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    owners: Sequence[tuple[dict, str, Tensor]],
    rs: tuple[float, ...],
    shares: Sequence[tuple[list[int], list[int]]],
    state: tuple,
) -> JointPlan | None:
    """Return the plan of such lists as ``moments.grad_plan`` takes, or None."""
    plan = grad_plan(weights, grads, owners, JointPlan)
    if plan is not None:
        plan.prepare(rs, shares, state)
    return plan
