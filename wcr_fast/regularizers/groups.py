"""Penalties on whole rows and columns of weights: output filters and inputs that can be taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wcr_fast.backend import active_backend, backend
from wcr_fast.ops.groups import Groups, add_scaled_, group_squares, groups_of, scale_
from wcr_fast.ops.moments import result_dtype
from wcr_fast.ops.sharded import is_sharded
from wcr_fast.ops.shrink import refuse_overlap
from wcr_fast.regularizers.modes import Moded
from wcr_fast.regularizers.terms import Added
from wcr_fast.table import constants_on, numbers_on
from wcr_fast.weights import Exclude, Weights

KINDS = {"filters": ("filters",), "inputs": ("inputs",), "both": ("filters", "inputs")}


class _Value(torch.autograd.Function):
    """psi of a group penalty, float64; backward scales the weights by their groups' factors."""

    @staticmethod
    def forward(ctx: Any, term: GroupTerm, groups: Groups, *tensors: Tensor) -> Tensor:
        value, factors = term._evaluate(groups, group_squares(groups, tensors))
        ctx.groups, ctx.backend = groups, active_backend()
        ctx.save_for_backward(factors, *tensors)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, *tensors = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in tensors]
        with backend(ctx.backend):
            add_scaled_(grads, ctx.groups, tensors, factors * grad)
        return None, None, *grads


class GroupTerm(Moded):
    """Base of the group penalties: psi is a function of the norms of groups, its gradient a factor for each group."""

    _kinds: tuple[str, ...]

    def __init__(
        self,
        model: Weights,
        lam: float | Tensor | None,
        *,
        groups: str,
        mode: str,
        modes: Sequence[str],
        exclude: Exclude,
    ) -> None:
        name = type(self).__name__
        if groups not in KINDS:
            raise ValueError(f"{name}: groups must be one of {', '.join(KINDS)}, got {groups!r}")
        self._kinds = KINDS[groups]
        self._set_mode(mode, modes)
        super().__init__(model, lam, exclude)
        self._known: dict[tuple, Groups] = {}

    def _norms(self, groups: Groups, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return every group's norm, and what it is divided by: 1 where it is 0."""
        empty = squares == 0
        divisors = torch.where(empty, torch.ones_like(squares), squares).sqrt()  # a root of 0 has no slope to follow
        return torch.where(empty, torch.zeros_like(squares), divisors), divisors

    def _evaluate(self, groups: Groups, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return psi, 0-d, and the factors of its gradient, from the groups' sums of squares; all float64."""
        raise NotImplementedError

    def _groups(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> Groups:
        """Return the groups of these weights; TypeError for parts of a transposed convolution's on several ranks."""
        weights = [self._choice.weights[i] for i in indices]
        for weight, tensor in zip(weights, tensors, strict=True):
            if is_sharded(tensor) and weight.groups > 1:
                raise TypeError(
                    f"{self._title}: {weight.label()} is a DTensor of a transposed convolution with groups: exclude "
                    "it, or use data parallelism with whole weights (DDP)"
                )
        key = (tuple(indices), tuple(t.shape for t in tensors))
        if key not in self._known:
            self._known[key] = groups_of(weights, key[1], self._kinds)
        return self._known[key]

    def __call__(self) -> Tensor:
        """Return lam * psi as a 0-d tensor for the loss, float32 (float64 when any weight is).

        Weights frozen since the choice are skipped; without a gradient where the mode acts on weights.
        """
        active = self._active()
        if not active or self._off():
            return self._nothing()
        tensors = [self._choice.weights[i].current() for i in active]
        groups = self._groups(active, tensors)
        if torch.compiler.is_compiling():  # the compiler makes its own kernels, forward and back
            psi, _ = self._evaluate(groups, _traced_squares(groups, tensors))
        else:
            psi = _Value.apply(self, groups, *tensors)
        value = (self.lam * psi).to(result_dtype(tensors))
        return value.detach() if self._on_weights() else value

    def _add_grad(self, indices: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        if self._off():
            return None
        indices = self._active() if indices is None else indices
        if not indices:
            return None
        groups = self._groups(indices, [self._choice.weights[i].current() for i in indices])
        params, grads = self._gradients(indices)
        with torch.no_grad():
            value, factors = self._evaluate(groups, group_squares(groups, params))
            lam = self.lam if scale is None else self.lam * scale
            add_scaled_(grads, groups, params, factors * lam)
        return Added(lambda: self.lam * value, [])

    def norms(self) -> dict[str, tuple[Tensor, ...]]:
        """Return the norms of the groups by weight, float64 [groups]: of filters, of inputs, or both in this order."""
        everything = range(len(self._numels))
        tensors = [w.current() for w in self._choice.weights]
        groups = self._groups(everything, tensors)
        found = group_squares(groups, tensors).sqrt().split(groups.lengths)
        kinds = len(self._kinds)
        return {w.name: found[kinds * i : kinds * (i + 1)] for i, w in enumerate(self._choice.weights)}

    def _options(self) -> str:
        return f", groups={' and '.join(self._kinds)}" + (f", mode={self.mode}" if self.mode != "loss" else "")


def _traced_squares(groups: Groups, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums of squares in operations that a compiler and autograd follow."""
    sums = []
    for tensor, parts in zip(tensors, groups.sides, strict=True):
        wide = tensor.to(result_dtype([tensor]))
        for kind in range(len(groups.kinds)):
            for rows, sides in parts:
                part = wide[rows].movedim(sides[kind].dim, 0)
                sums.append(part.square().reshape(len(part), -1).sum(1).double())
    return torch.cat(sums)


class GroupLasso(GroupTerm):
    """Group lasso: psi = sum over groups of ||w_g||_2, gradient w_g / ||w_g||, 0 at 0: takes whole groups to zero.

    Args:
        model, lam, exclude: as :class:`Regularizer`; groups follow each module's output and input dimension (transposed
            convolutions, transformers' Conv1D), in a list the first two dimensions.
        groups: "filters" (default: all weights of one output), "inputs" (all of one input channel), or "both", summed.
            In a grouped convolution a group of inputs is one place of all of them.
        weighted: multiply each norm by sqrt(|g|), the number of its weights: large and small groups are then alike.
        mode: "loss" (default), or "proximal": w_g <- max(0, 1 - lr lam / ||w_g||) w_g after each optimizer step (by
            ``attach`` or ``shrink_(lr)``), which leaves exact zeros; for one kind of groups, lam >= 0.

    Raises:
        ValueError: as :class:`Regularizer`, and for other groups or another mode. TypeError: DTensors of transposed
            convolutions with groups.

    Exactness: squares are summed in the dtype of the arithmetic within a piece of a group, pieces in float64 (on the
    torch path all in float64); repeatable bit for bit. On a GPU squares of magnitudes beyond 1e19 overflow.

    Source: Yuan and Lin 2006; for filters and channels Wen et al., "Structured Sparsity Learning", NeurIPS 2016.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        >>> GroupLasso([weight], lam=1.0)().item(), GroupLasso([weight], lam=1.0, groups="inputs")().item()
        (5.0, 7.0)
    """

    def __init__(
        self,
        model: Weights,
        lam: float | Tensor | None = None,
        *,
        groups: str = "filters",
        weighted: bool = False,
        mode: str = "loss",
        exclude: Exclude = (),
    ) -> None:
        super().__init__(model, lam, groups=groups, mode=mode, modes=("loss", "proximal"), exclude=exclude)
        self.weighted = weighted
        if self._on_weights():
            if len(self._kinds) > 1:
                raise ValueError('GroupLasso: mode "proximal" takes one kind of groups: "filters" or "inputs"')
            for weight in self._choice.weights:
                refuse_overlap(weight.param, f"GroupLasso: {weight.label()}")

    def _group_weights(self, groups: Groups, like: Tensor) -> Tensor | float:
        if not self.weighted:
            return 1.0
        if torch.compiler.is_compiling():
            return _spread(groups, torch.tensor(groups.sizes, dtype=like.dtype, device=like.device).sqrt())
        return _spread(groups, constants_on(groups.sizes, like.dtype, like.device).sqrt())

    def _evaluate(self, groups: Groups, squares: Tensor) -> tuple[Tensor, Tensor]:
        norms, divisors = self._norms(groups, squares)
        sizes = self._group_weights(groups, norms)
        return (sizes * norms).sum(), sizes / divisors * (norms != 0)

    @torch.no_grad()
    def _shrink(
        self, places: Sequence[int], which: Sequence[int], lrs: Sequence[float | Tensor], found_inf: Tensor | None
    ) -> None:
        amounts = [lr * self.lam for lr in lrs]
        if not places or all(not isinstance(t, Tensor) and t == 0.0 for t in amounts):
            return
        tensors = [self._choice.weights[i].current() for i in places]
        groups = self._groups(places, tensors)
        norms, divisors = self._norms(groups, group_squares(groups, tensors))
        # One kind of groups: one length per layer.
        numbers = numbers_on([amounts[group] for group in which], norms.device)
        limits = _spread(groups, numbers) * self._group_weights(groups, norms)
        factors = torch.where(norms <= limits, torch.zeros_like(norms), 1.0 - limits / divisors)
        if found_inf is not None:
            factors = torch.where(found_inf.to(factors.device) != 0, torch.ones_like(factors), factors)
        scale_(groups, tensors, factors)


class GroupHoyerSquare(GroupTerm):
    """Group Hoyer-Square: psi = sum over layers of ((sum_o ||W_o||)^2 + (sum_i ||W_:,i||)^2) / ||W||_F^2; scale-free.

    Between 2 and (outputs + inputs) a layer. 0, with a gradient of 0, for an all-zero layer.

    Args:
        model, lam, exclude: as :class:`Regularizer`; groups as in :class:`GroupLasso`.
        groups: "both" (default, the formula above), or one of its two terms: "filters" or "inputs".

    Raises:
        ValueError: as :class:`Regularizer`, and for other groups. TypeError: as :class:`GroupLasso`.

    Exactness: as :class:`GroupLasso`.

    Source: Yang, Wen, Li, "DeepHoyer", ICLR 2020, arXiv 1908.09979, equation for G_H: groups are whole filters and
    input channels, as in the paper and its CIFAR code; its ImageNet code has finer ones, a group for each place of a
    kernel.

    Example:
        >>> import torch
        >>> GroupHoyerSquare([torch.nn.Parameter(torch.ones(3, 5))], lam=1.0)().item()
        8.0
    """

    def __init__(
        self, model: Weights, lam: float | Tensor | None = None, *, groups: str = "both", exclude: Exclude = ()
    ) -> None:
        super().__init__(model, lam, groups=groups, mode="loss", modes=("loss",), exclude=exclude)

    def _evaluate(self, groups: Groups, squares: Tensor) -> tuple[Tensor, Tensor]:
        norms, divisors = self._norms(groups, squares)
        sums, whole = _sums(groups, norms), _sums(groups, squares)  # by layer and kind
        whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        ratios = sums * sums / whole
        # d(S^2 / Q)/dw = 2 (S / ||w_g||) w / Q - 2 (S^2 / Q) w / Q
        factors = 2.0 * _spread(groups, sums / whole) / divisors * (norms != 0)
        return ratios.sum(), factors - _spread(groups, 2.0 * ratios / whole)


def _lengths(groups: Groups, device: torch.device) -> Tensor:
    return constants_on(groups.lengths, torch.int64, device)


def _sums(groups: Groups, values: Tensor) -> Tensor:
    """Return the sums of a vector's values by layer and kind, in a fixed order."""
    if torch.compiler.is_compiling():
        return torch.stack([part.sum() for part in values.split(groups.lengths)])
    return torch.segment_reduce(values, "sum", lengths=_lengths(groups, values.device), unsafe=True)


def _spread(groups: Groups, values: Tensor) -> Tensor:
    """Return each layer's and kind's value once for each of its groups."""
    if torch.compiler.is_compiling():
        return torch.cat([v.expand(n) for v, n in zip(values, groups.lengths, strict=True)])
    return values.repeat_interleave(_lengths(groups, values.device), output_size=groups.total)
