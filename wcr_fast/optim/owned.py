"""A penalty as an optimizer has it: which of the optimizer's parameters feel it, and their moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_fast.curvature import CurvatureWatch
from wcr_fast.ops.moments import stats_of
from wcr_fast.ops.sharded import is_sharded, local, merged_stats
from wcr_fast.regularizers import Regularizer, Sum
from wcr_fast.regularizers import family as members
from wcr_fast.slots import Penalty, Slot, Step
from wcr_fast.weights import Exclude, Excluder, Weight

PenaltyT = Regularizer | Sum | type[Regularizer] | str | None

PENALTIES: dict[str, type[Regularizer]] = {
    kind.family: kind
    for kind in vars(members).values()
    if isinstance(kind, type) and issubclass(kind, Regularizer) and kind.family
}


def owned_penalty(
    optimizer: str, penalty: PenaltyT, lam: float | Tensor | None, decoupled: bool, exclude: Exclude
) -> OwnedPenalty | None:
    """Check what a constructor was given; return the penalty, not yet resolved, or None."""
    if isinstance(penalty, str) and penalty not in PENALTIES:
        raise ValueError(f"{optimizer}: no penalty is called {penalty!r}; there are {', '.join(PENALTIES)}")
    asked = PENALTIES[penalty] if isinstance(penalty, str) else penalty
    built = isinstance(asked, Regularizer | Sum)
    if not (asked is None or built or (isinstance(asked, type) and issubclass(asked, Regularizer))):
        raise TypeError(f"{optimizer}: penalty must be a regularizer, its class or its name, got {penalty!r}")
    if asked is None and (lam is not None or decoupled):
        raise ValueError(f"{optimizer}: lam and decoupled need a penalty")
    if Excluder(exclude) and (asked is None or built):
        raise ValueError(
            f"{optimizer}: exclude goes with a penalty's class or name; give it to the regularizer instead"
        )
    if built:
        _check_in_a_step(optimizer, asked)
    return None if asked is None else OwnedPenalty(optimizer, asked, exclude, "decoupled" if decoupled else "coupled")


def _check_in_a_step(optimizer: str, asked: Regularizer | Sum) -> None:
    """Refuse what is not one formula of one kind of moments, for gradients."""
    instead = f"attach it to the {optimizer}, without penalty="
    others = [term for term in asked.terms if not isinstance(term, Regularizer)]
    if others:
        raise TypeError(f"{optimizer}: a step takes the moments family only, not {type(others[0]).__name__}: {instead}")
    if asked._on_weights():
        raise ValueError(
            f'{optimizer}: {type(asked).__name__} in mode "{asked.mode}" acts on the weights: {instead}; or give it in '
            'mode "loss" with decoupled=True'
        )
    if len({term.r for term in asked.terms}) > 1:
        raise ValueError(f"{optimizer}: the sum's members differ in r: give them the same r, or {instead}")


def _strengths(terms: Sequence[Regularizer]) -> list[Any]:
    """Return what tells whether a strength has changed."""
    return [(id(t.lam), t.lam._version) if isinstance(t.lam, Tensor) else t.lam for t in terms]


class OwnedPenalty:
    """The regularizer in an optimizer's step. A layer is one of its weights that the optimizer owns and trains."""

    regularizer: Regularizer | Sum

    def __init__(
        self, optimizer: str, asked: Regularizer | Sum | type[Regularizer], exclude: Exclude, mode: str
    ) -> None:
        self._optimizer, self._asked, self._exclude, self._mode = optimizer, asked, exclude, mode
        self._layers: list[Weight] = []
        self._places: list[int] = []  # of the layers among the regularizer's weights
        self._curvature = CurvatureWatch()

    @property
    def weights(self) -> list[Weight]:
        """All weights of the regularizer, owned or not."""
        return self.regularizer._choice.weights

    @property
    def constants(self) -> list[Any]:
        """What the formula and the magnitudes depend on: eps, r, and the strengths of a sum's members."""
        terms = self.regularizer.terms
        strengths = _strengths(terms) if isinstance(self.regularizer, Sum) else []
        return [*((term.eps, term.r) for term in terms), *strengths]

    @property
    def _formula(self) -> Any:
        """The regularizer, or what computes a sum's members together."""
        return self.regularizer.formula() if isinstance(self.regularizer, Sum) else self.regularizer

    def resolve(self, groups: Sequence[dict[str, Any]]) -> None:
        """Build the regularizer where only its class is known, and see that it has weights here."""
        if isinstance(self._asked, Regularizer | Sum):
            self.regularizer = self._asked
        else:
            self.regularizer = self._asked(self._chosen(groups))
        owned = {id(p) for group in groups for p in group["params"]}
        if not any(id(w.current()) in owned for w in self.weights):
            raise ValueError(
                f"{self._optimizer} owns none of the weights of this {type(self.regularizer).__name__}; build it on "
                "the same parameters, and after anything that replaces them (fully_shard, load_state_dict(assign=True))"
            )

    def _chosen(self, groups: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor]]:
        """Choose by dimensions and requires_grad, without those whose name is excluded; return them by name."""
        excluder = Excluder(self._exclude)
        if excluder.types:
            raise ValueError(
                f"{self._optimizer}: exclude takes names here, an optimizer knows no modules: give a regularizer built "
                f"on the model, with exclude={excluder.types[0].__name__}"
            )
        known: list[str] = []
        chosen: list[tuple[str, Tensor]] = []
        left_out = False
        for group in groups:
            names = group.get("param_names")
            if excluder and names is None:
                raise ValueError(
                    f"{self._optimizer}: exclude needs names: give model.named_parameters(), or a regularizer built "
                    "on the model with exclude="
                )
            for i, p in enumerate(group["params"]):
                known.append(names[i] if names else f"parameter {len(known)}")
                excluded = excluder and excluder.reason(known[-1], (), p)
                if p.dim() >= 2 and p.requires_grad and p.numel():
                    left_out = left_out or bool(excluded)
                    if not excluded:
                        chosen.append((known[-1], p))
        if excluder:
            excluder.check_all_matched(known)
        if not chosen:
            why = "exclude leaves none" if left_out else "none has two or more dimensions and requires a gradient"
            raise ValueError(f"{self._optimizer}: no parameter to penalise: {why}")
        return chosen

    def find_layers(self, groups: Sequence[dict[str, Any]]) -> dict[int, int]:
        """Return the layer of each penalised parameter, by its id.

        Raises RuntimeError where a weight was replaced and the optimizer still holds the old parameter. A penalty that
        was given by its class or name has no other weights than the optimizer's, and is built anew.
        """
        owned = {id(p) for group in groups for p in group["params"]}
        if self.regularizer is not self._asked and not all(id(w.param) in owned for w in self.weights):
            self.resolve(groups)
        else:
            for weight in self.weights:
                if id(weight.param) in owned and id(weight.current()) not in owned:
                    raise RuntimeError(
                        f"{self._optimizer}: {weight.label()} was replaced by a new parameter (load_state_dict with "
                        "assign=True, fully_shard), but the optimizer still holds the old one: build it anew, or put "
                        "the new parameter into its group"
                    )
        current = [w.current() for w in self.weights]
        self._places = [i for i, p in enumerate(current) if id(p) in owned and p.requires_grad]
        self._layers = [self.weights[i] for i in self._places]
        return {id(current[i]): layer for layer, i in enumerate(self._places)}

    def label(self, layer: int) -> str:
        """Return a layer's names."""
        return self._layers[layer].label()

    def rule(self) -> Penalty | None:
        """Return what a step is told of it, None where there is no layer."""
        if not self._layers:
            return None
        reg = self._formula
        sharded = any(is_sharded(w.current()) for w in self._layers)
        family, eps = (reg.family, reg.eps) if isinstance(reg, Regularizer) and not sharded else (None, 0.0)
        return Penalty(self._mode, family, eps, reg.r, sum(reg._numels), len(self._layers))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return stats and coefficients of the layers as they are, on the torch path."""
        stats, _ = stats_of([local(w.current()).detach() for w in self._layers], self._formula.r)
        return self._completed(stats)

    def complete(self, plan: Any) -> None:
        """Compute what a plan's kernels leave open: moments over all shards, coefficients of a user's own formula."""
        plan.set_moments(*self._completed(plan.stats()))

    def warn_of_long_steps(
        self, optimizer: torch.optim.Optimizer, slots: Sequence[Slot], stats: Callable[[], Tensor]
    ) -> None:
        """Warn once where SGD is about to take a step that is too long for the penalty's curvature."""

        def find() -> tuple[Mapping[int, dict[str, Any]], Tensor]:
            groups = {slot.layer: optimizer.param_groups[slot.group] for slot in slots}
            return {place: groups[layer] for layer, place in enumerate(self._places)}, stats()

        self._curvature.look(self._formula, optimizer, slots[0].weight.device, find)

    def _completed(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        stats = merged_stats(stats, [w.current() for w in self._layers])
        return stats, self._formula._derivatives_at(stats, self._places)


def value(slots: Sequence[Slot], coef: Tensor, step: Step) -> Tensor:
    """Return lam * psi of the weights that step."""
    terms = [step.groups[slot.group]["lam"] * coef[0, slot.layer] for slot in slots if slot.layer >= 0]
    return sum(terms, coef.new_zeros(()))
