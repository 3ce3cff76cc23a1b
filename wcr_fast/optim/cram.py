"""Compression-aware minimisers: CrAM and CrAM+."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.ops import select
from wcr_fast.ops.sharded import is_sharded, like, local
from wcr_fast.optim.perturbed import ParamsT
from wcr_fast.optim.two_pass import TwoPassOptimizer
from wcr_fast.weights import Exclude, Excluder, Weight, as_weights, choose

SPARSITIES = (0.5, 0.7, 0.9)


class CrAM(TwoPassOptimizer):
    """Compression-aware minimisation: the base optimizer steps by the gradient at the compressed, perturbed weights.

        w <- base step by grad L(C(w + rho g)), from w;     C: one-shot magnitude pruning, its derivative taken as 1

    At each step one of ``sparsities`` is drawn, all alike, from ``seed`` and the number of the step: on every rank the
    same. C prunes the parameters with two or more dimensions and a gradient, first and last layer too; exactly
    round(sparsity * N) weights go, whatever the parameter groups. Two forward and backward passes a step, one copy of
    the weights; no mask is stored.

    Args:
        params, base_optimizer, model, keep_zeros, base_options: as in :class:`SAM`. With a model, weights are chosen
            as for pruning (normalisation stays), and grouped along its layers' inputs for n:m.
        rho: how far along the gradient, which is not normalised, >= 0.
        sparsities: fractions removed, in [0, 1), and n:m such as ``"2:4"`` (n kept of m), one of them or several.
        scope: of the fractions: ``"global"``, ``"layer"`` or ``"row"``.
        sparse_grad: drop the second gradient of weights that C set to zero, and of those that were zero anyway.
        normalise: divide rho g by ||g|| + 1e-12.
        dense: what C leaves alone: name patterns, module types, functions of (name, parameter); needs a model.
        seed: of the draws.

    Gradients of both passes are averaged over data-parallel workers: with local ones, replicas would drift apart.

    Raises:
        TypeError, ValueError: as :class:`SAM`; for sparsities that are none, or patterns that match nothing.

    Source: Peste et al., ICLR 2023, arXiv 2207.14200. The authors' code (rho 0.05 and these sparsities there too, with
    CrAM+ and sparse gradients) prunes one weight more, counts per parameter group and draws on each process by itself.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = CrAM(model, torch.optim.SGD, lr=0.1, sparsities=[0.5, "2:4"])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(3, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    _plus = False

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | None = None,
        *,
        rho: float = 0.05,
        sparsities: float | str | Iterable[float | str] = SPARSITIES,
        scope: str = "global",
        sparse_grad: bool = True,
        normalise: bool = False,
        dense: Exclude = (),
        seed: int = 0,
        model: nn.Module | None = None,
        keep_zeros: bool = False,
        **base_options: Any,
    ) -> None:
        name = type(self).__name__
        if scope not in select.SCOPES:
            raise ValueError(f"{name}: scope must be one of {', '.join(select.SCOPES)}, got {scope!r}")
        listed = [sparsities] if isinstance(sparsities, (str, int, float)) else list(sparsities)
        self._sparsities = [_compression(name, value) for value in listed]
        if not self._sparsities:
            raise ValueError(f"{name}: sparsities is empty")
        self._scope, self._sparse_grad, self._normalise = scope, bool(sparse_grad), bool(normalise)
        self._seed, self._draws = int(seed), 0
        self._dense = [dense] if isinstance(dense, str) or callable(dense) else list(dense)
        super().__init__(
            *(params, base_optimizer, base_options), model=model, group_options={"rho": rho}, keep_zeros=keep_zeros
        )
        if Excluder(self._dense) and self._model is None:
            raise ValueError(f"{name}: dense goes by names and modules: give model= too")
        self._weights = self._choose()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._weights = self._choose()

    def _choose(self) -> list[Weight]:
        """Return the weights that C may prune."""
        if self._model is None:
            flat = [p for p in self._params() if p.dim() >= 2 and p.numel()]
            return as_weights(flat, op=type(self).__name__, sharded=True)
        owned = set(self._params())
        choice = choose(self._model, exclude=self._dense, sharded=True)
        return [w for w in choice.weights if w.current() in owned]

    def _begin(self) -> None:
        super()._begin()
        self._pruned: list[Tensor] = []  # what C went over in this step
        self._clean: dict[Tensor, Tensor] = {}  # copies of the first gradients

    def _perturb(self) -> None:
        gradients = self._gradients()
        if self._plus:
            self._copy_clean(gradients)
        self._ascend(gradients, normalised=self._normalise)
        self._compress(self._draw(), gradients)

    def _draw(self) -> float | str:
        """Return the sparsity of this step; the numbers are the same in every process and version of Python."""
        drawn = random.Random(f"{self._seed},{self._draws}").random()
        self._draws += 1
        return self._sparsities[int(drawn * len(self._sparsities))]

    @torch.no_grad()
    def _compress(self, sparsity: float | str, gradients: Mapping[Tensor, Tensor]) -> None:
        """Prune the perturbed weights in place."""
        weights = [w for w in self._weights if w.current() in gradients]
        params = [w.current() for w in weights]
        self._pruned = params if sparsity != 0.0 else []
        if not self._pruned:
            return
        tensors = [p.detach() for p in params]
        if isinstance(sparsity, str):
            select.apply_lines(weights, tensors, None, sparsity)
        elif self._scope == "row":
            select.apply_lines(weights, tensors, sparsity, "row")
        else:
            path = select.path_for(tensors)
            cuts = path.find_cuts(tensors, select.keep_counts(tensors, [sparsity], self._scope))
            path.apply(tensors, cuts)  # nothing is written where a weight is NaN
        torch.autograd.graph.increment_version([*params, *(local(p) for p in params if is_sharded(p))])
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _copy_clean(self, gradients: Mapping[Tensor, Tensor]) -> None:
        for p, grad in gradients.items():
            kept = self._clean.get(p)
            if kept is None or _kind(kept) != _kind(grad):
                self._clean[p] = torch.empty_like(grad)
        for p in self._clean.keys() - gradients.keys():
            del self._clean[p]
        if gradients:
            torch._foreach_copy_([self._clean[p] for p in gradients], list(gradients.values()))

    @torch.no_grad()
    def _return(self, scale: Tensor | None) -> None:
        if not self.perturbed:
            return
        gradients = self._gradients()
        self._restore({p: gradients[p] for p in self._pruned if p in gradients} if self._sparse_grad else {})
        if self._plus and self._clean:
            if scale is not None:
                torch._foreach_mul_(list(self._clean.values()), scale.item() if scale.device.type == "cpu" else scale)
            both = [p for p in self._clean if p in gradients]
            if both:
                torch._foreach_add_([gradients[p] for p in both], [self._clean[p] for p in both])
            for p in self._clean.keys() - gradients.keys():  # used in the first pass only
                p.grad = like(self._clean[p].clone(), p)

    def _own_state(self) -> dict[str, Any]:
        return {"draws": self._draws}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._draws = int(state.get("draws", 0))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_pruned", "_clean", "_weights")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._weights = self._choose()


class CrAMPlus(CrAM):
    """CrAM+: the base optimizer steps by the sum of the gradients at the compressed weights and at the weights.

        w <- base step by grad L(C(w + rho g)) + g, from w

    The dense network stays accurate, too. The gradient is about twice as long: with rho = 0 and sparsity 0 it is the
    base optimizer at twice the learning rate (weight decay aside). One copy of the gradients more than CrAM.

    Args: as :class:`CrAM`.

    Source: Peste et al., ICLR 2023, arXiv 2207.14200 (CrAM+).

    Example:
        >>> import torch
        >>> optimizer = CrAMPlus(torch.nn.Linear(4, 2), torch.optim.SGD, lr=0.05, sparsities=0.9)
    """

    _plus = True


def _compression(optimizer: str, value: float | str) -> float | str:
    if isinstance(value, str):
        if value in select.SCOPES:
            raise ValueError(f"{optimizer}: sparsities takes numbers and n:m, got {value!r}")
        select.check_scope(value, None, optimizer)
        return value
    number = select.check_sparsity(value, optimizer)
    if number == 1.0:
        raise ValueError(f"{optimizer}: at sparsity 1 there is nothing left to take a gradient at")
    return number


def _kind(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()
