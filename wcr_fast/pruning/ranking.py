"""By what weights are ranked, and how many of a layer must or may stay: the arguments of the pruning functions."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wcr_fast.ops import scored as ops
from wcr_fast.ops import select
from wcr_fast.score import NAMED, Score, Scored, inverse_rms
from wcr_fast.torch_path.cuts import Counts, Cuts
from wcr_fast.weights import Weight

MAGNITUDE, LAMP = "magnitude", "lamp"
Aux = Mapping[str, Tensor] | Iterable[Tensor] | None
Bound = float | Mapping[str, float] | None


@dataclass(frozen=True)
class Ranking:
    """A ranking of some weights: by magnitude, LAMP or another score; and bounds for each layer.

    Attributes:
        scored: the score with its numbers; None for the magnitude and LAMP.
        lamp: the global selection ranks by LAMP; inside of a layer that is the magnitude.
        low: the fewest weights that stay in each layer, None without bounds.
        high: the most.
    """

    scored: Scored | None = None
    lamp: bool = False
    low: tuple[int, ...] | None = None
    high: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, weights: Sequence[Weight], scope: str, op: str, *, score: str | Score, aux: Aux, floor: Bound, cap: Bound
    ) -> Ranking | None:
        """Return the ranking that the arguments describe, None for the magnitude without bounds.

        Raises:
            ValueError, TypeError: naming the argument, before anything is written.
        """
        if score == MAGNITUDE and aux is None and floor is None and cap is None:
            return None
        tensors = [w.param.detach() for w in weights]
        ops.check_whole(tensors, op)
        if (floor is not None or cap is not None) and scope != "global":
            raise ValueError(f'{op}: floor and cap are for scope "global": in scope {scope!r} layers don\'t compete')
        if score == LAMP and (floor is not None or cap is not None):
            raise ValueError(f"{op}: floor and cap don't go with LAMP, which keeps the largest weight of every layer")
        numels = [t.numel() for t in tensors]
        bounds = floor is not None or cap is not None
        low, high = _counts(weights, floor, 0.0, "floor", op), _counts(weights, cap, 1.0, "cap", op)
        for weight, a, b in zip(weights, low, high, strict=True):
            if a > b:
                raise ValueError(
                    f"{op}: {weight.label()} must keep {a:,} weights (floor) and may keep {b:,} (cap): "
                    "lower floor or raise cap"
                )
        scored = None if score in (MAGNITUDE, LAMP) else _scored(weights, tensors, score, aux, op)
        if scored is None and aux is not None:
            raise ValueError(f"{op}: score {score!r} takes no aux")
        if not bounds:
            return cls(scored, score == LAMP)
        return cls(scored, False, tuple(low), tuple(min(h, n) for h, n in zip(high, numels, strict=True)))

    def find_cuts(self, tensors: Sequence[Tensor], sparsities: Sequence[float], scope: str, op: str) -> Cuts:
        """Return the cuts, of the list (S = 1) or of every tensor (S = L)."""
        counts = select.keep_counts(tensors, sparsities, scope)
        if scope == "global" and self.lamp:
            counts = ops.lamp_per_layer(tensors, counts[0])
        elif scope == "global" and self.low is not None:
            self._check_feasible(counts[0], tensors, op)
            counts = ops.keep_per_layer(tensors, counts[0], self.low, self.high, self.scored)
        if self.scored is None:
            return select.path_for(tensors).find_cuts(tensors, counts)
        return ops.find_cuts(tensors, counts, self.scored)

    def apply(self, tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None = None) -> Counts | None:
        """Apply cuts (Q = 1): in place, or as keep masks into ``out``.

        Returns, in place, what was counted on the way where the search of the cuts counted nothing.
        """
        if self.scored is None:
            return select.path_for(tensors).apply(tensors, cuts, out)
        return ops.apply(tensors, cuts, self.scored, out)

    def apply_lines(
        self,
        weights: Sequence[Weight],
        tensors: Sequence[Tensor],
        sparsity: float | None,
        scope: str,
        out: Sequence[Tensor] | None = None,
    ) -> None:
        """Select in every row or n:m group by itself: in place, or as keep masks into ``out``."""
        if self.scored is None:
            select.apply_lines(weights, tensors, sparsity, scope, out)
        else:
            ops.apply_lines(weights, tensors, sparsity, select.check_scope(scope, None, "prune"), self.scored, out)

    def masks(self, weights: Sequence[Weight], sparsity: float, scope: str, op: str) -> list[Tensor]:
        """Return keep masks (bool, contiguous); raise ValueError naming a weight that can't be ranked."""
        tensors, labels = [w.param.detach() for w in weights], [w.label() for w in weights]
        out = [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
        if scope in ("global", "layer"):
            cuts = self.find_cuts(tensors, [sparsity], scope, op)
            select.raise_on_nan(cuts.bad, labels, op, score=self.name)
            self.apply(tensors, cuts, out)
        else:
            self.check_lines(tensors, labels, op)
            self.apply_lines(weights, tensors, sparsity, scope, out)
        return out

    @property
    def name(self) -> str:
        """The score's name."""
        return LAMP if self.lamp else MAGNITUDE if self.scored is None else self.scored.score.name

    def check_lines(self, tensors: Sequence[Tensor], labels: Sequence[str], op: str) -> None:
        """Raise ValueError naming a weight that can't be ranked, for scopes without cuts."""
        if self.scored is None:
            bad = select.survey(tensors)[1]
        else:
            bad = ops.find_cuts(tensors, [[0]], self.scored).bad
        select.raise_on_nan(bad, labels, op, score=self.name)

    def note(self, i: int, kept: int, numel: int) -> str:
        """Return what a record says of layer i of so many weights; no floor is 0, no cap is all of them."""
        if self.low is not None and 0 < kept == self.low[i]:
            return f"held at its floor of {kept:,} weights"
        if self.high is not None and kept == self.high[i] < numel:
            return f"held at its cap of {kept:,} weights"
        return ""

    def _check_feasible(self, keeps: Sequence[int], tensors: Sequence[Tensor], op: str) -> None:
        total, least, most = sum(t.numel() for t in tensors), sum(self.low), sum(self.high)
        for keep in keeps:
            if not least <= keep <= most:
                raise ValueError(
                    f"{op}: {keep:,} of {total:,} weights would stay, but floors and caps ask for {least:,} to "
                    f"{most:,}: sparsity must lie between {1 - most / total:.6g} and {1 - least / total:.6g}"
                )


def _counts(weights: Sequence[Weight], bound: Bound, default: float, name: str, op: str) -> list[int]:
    """Return each layer's number of weights for a share of them: of the patterns that match its name the first counts.

    At least one where a floor is above zero.
    """
    shares = dict(bound) if isinstance(bound, Mapping) else {"*": default if bound is None else bound}
    used: set[str | None] = set()
    counts = []
    for weight in weights:
        names = weight.names or (weight.name,)
        pattern = next((p for p in shares if any(fnmatch.fnmatchcase(n, p) for n in names)), None)
        share = default if pattern is None else shares[pattern]
        used.add(pattern)
        try:
            share = select.check_sparsity(share, op)
        except (TypeError, ValueError):
            raise ValueError(f"{op}: {name} is a share of each layer's weights, in [0, 1], got {share!r}") from None
        n = weight.param.numel()
        # To the next whole number, but not beyond a product that is one but for its rounding.
        counts.append(math.ceil(round(share * n, 6)) if name == "floor" else math.floor(round(share * n, 6)))
    unused = [pattern for pattern in shares if pattern not in used and pattern != "*"]
    if unused:
        raise ValueError(f"{op}: {name}: {unused[0]!r} matches none of {', '.join(w.name for w in weights[:8])}")
    return counts


def _scored(weights: Sequence[Weight], tensors: Sequence[Tensor], score: Any, aux: Aux, op: str) -> Scored:
    if isinstance(score, str):
        if score not in NAMED:
            names = ", ".join([MAGNITUDE, *NAMED, LAMP])
            raise ValueError(f"{op}: score must be one of {names}, or a Score, got {score!r}")
        score = NAMED[score][0]
    if not isinstance(score, Score):
        raise TypeError(f"{op}: score must be a name or a Score, got {type(score).__name__}")
    if score.name == "normalised" and aux is None:
        return Scored(score, inverse_rms(tensors))
    if score.name == "gradient" and aux is None:
        missing = [w.label() for w in weights if w.param.grad is None]
        if missing:
            raise ValueError(f"{op}: {missing[0]} has no .grad: run a backward pass first, or give aux")
        aux = [w.param.grad for w in weights]
    return Scored(score, tuple(_numbers(weights, tensors, score, aux, op)))


def _numbers(weights: Sequence[Weight], tensors: Sequence[Tensor], score: Score, aux: Aux, op: str) -> Iterable[Tensor]:
    """Return the numbers beside the weights, each in a shape that expands to its weight's."""
    if aux is None:
        what = {"element": "a tensor of its shape", "column": "the norm of each input", "layer": "a number"}[score.per]
        raise ValueError(f"{op}: score {score.name} needs aux: for each weight {what}")
    if isinstance(aux, Mapping):
        missing = [w.name for w in weights if not any(n in aux for n in (w.name, *w.names))]
        if missing:
            raise ValueError(f"{op}: aux has nothing for {missing[0]}; leave it out with exclude, or add it")
        listed = [next(aux[n] for n in (w.name, *w.names) if n in aux) for w in weights]
    else:
        listed = list([aux] if isinstance(aux, Tensor) else aux)
        if len(listed) != len(weights):
            raise ValueError(f"{op}: aux has {len(listed)} tensors for {len(weights)} weights")
    for weight, tensor, numbers in zip(weights, tensors, listed, strict=True):
        if not isinstance(numbers, Tensor):
            numbers = torch.as_tensor(numbers, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        numbers = numbers.detach().to(tensor.device)
        shape = _shape(weight, tensor, score, numbers)
        if shape is None or not numbers.is_floating_point():
            raise ValueError(
                f"{op}: aux of {weight.label()} must be floating point, one number per {score.per} of "
                f"{tuple(tensor.shape)}, got {numbers.dtype} {tuple(numbers.shape)}"
            )
        yield numbers.reshape(shape) if score.per == "column" else numbers


def _shape(weight: Weight, tensor: Tensor, score: Score, numbers: Tensor) -> list[int] | None:
    """Return the shape in which numbers expand to their weight's, None where they don't fit."""
    if score.per == "element":
        return list(tensor.shape) if numbers.shape == tensor.shape else None
    if score.per == "layer":
        return [] if numbers.numel() == 1 and numbers.dim() == 0 else None
    inputs = [1] * tensor.dim()
    if tensor.dim():
        inputs[weight.in_dim] = tensor.shape[weight.in_dim]
    if numbers.dim() == 1 and numbers.numel() == math.prod(inputs):
        return inputs
    unfolded = [1 if d == weight.out_dim else size for d, size in enumerate(tensor.shape)]
    return unfolded if numbers.dim() == 1 and numbers.numel() == math.prod(unfolded) else None
