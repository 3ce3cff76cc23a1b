"""What all penalties share: the weights they are on, a strength, three ways to act, and sums of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wcr_fast.attach import AttachHandle, attach
from wcr_fast.ops.moments import result_dtype
from wcr_fast.ops.sharded import aligned, is_sharded, local
from wcr_fast.table import upload
from wcr_fast.weights import Choice, Exclude, Weight, Weights, as_weights, choose


class Look(NamedTuple):
    """What a gradient's computation saw of a member of the moments family, for a look at its curvature."""

    term: Any
    device: torch.device  # where its moments lie
    places: Sequence[int]  # among the term's weights
    moments: Callable[[], Tensor]  # [2 or more, places]: the moments of these weights before the step


class Added(NamedTuple):
    """What a call that added a gradient leaves to be asked for; the next call may overwrite it."""

    value: Callable[[], Tensor]  # lam * psi of the weights that it was added to
    looks: list[Look]


class Term:
    """A penalty on chosen weights: base of :class:`Regularizer`, the group penalties and :class:`Sum`.

    Terms add up and take factors: ``WCR(net, 1e-5) + 2 * L1(net, 1e-3)``.
    """

    default_lam: ClassVar[float] = 1e-4
    #: what computes several terms of this kind together in a sum; None: each for itself
    _joined: ClassVar[Callable[[Sequence[Any]], Term] | None] = None

    def __init__(self, model: Weights, lam: float | Tensor | None, exclude: Exclude) -> None:
        name = type(self).__name__
        self.lam = self.default_lam if lam is None else lam
        if isinstance(model, nn.Module):
            self._choice = choose(model, exclude=exclude, trainable=True, sharded=True)
        else:
            listed = as_weights(model, op=name, exclude=exclude, sharded=True)
            self._choice = Choice([w for w in listed if w.param.numel() > 0])
        if not self._choice.weights:
            left = "; ".join(f"{n}: {why}" for n, why in self._choice.left_out[:8])
            raise ValueError(f"{name}: no weight to penalise" + (f" (left out: {left})" if left else ""))
        self._refuse_twice()
        self._measure()

    def _measure(self) -> None:
        self._numels = tuple(w.param.numel() for w in self._choice.weights)
        self._vectors: dict[tuple, Tensor] = {}  # small ones on their devices

    @property
    def _title(self) -> str:
        """The name in messages."""
        return type(self).__name__

    @property
    def lam(self) -> float | Tensor:
        """The strength: a float, or a 0-d tensor that is read on its device."""
        return self._lam

    @lam.setter
    def lam(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"{type(self).__name__}: lam must be a number or a 0-d tensor, got {value.dim()}-d")
            self._lam: float | Tensor = value
            return
        if self._on_weights() and float(value) < 0:
            raise ValueError(f"{type(self).__name__}: lam must be >= 0 in this mode, got {value}")
        if not abs(float(value)) < float("inf"):
            raise ValueError(f"{type(self).__name__}: lam must be finite, got {value}")
        self._lam = float(value)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The members of a sum, each with a strength of its own; of any other penalty itself."""
        return (self,)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The penalised weights as the module holds them now: name -> parameter."""
        return {w.name: w.current() for w in self._choice.weights}

    def _refuse_twice(self) -> None:
        seen: dict[tuple, str] = {}
        for weight in self._choice.weights:
            key = (weight.param.device, local(weight.param).data_ptr())
            if key in seen and key[1] != 0:
                raise ValueError(
                    f"{type(self).__name__}: {seen[key]} and {weight.label()} are the same weights; pass each once"
                )
            seen[key] = weight.label()

    def _off(self) -> bool:
        """Tell whether the strength is known to be 0: then nothing is launched. A tensor is not read."""
        return not isinstance(self.lam, Tensor) and self.lam == 0.0

    def _active(self) -> list[int]:
        """Return the places of the weights that are penalised now: those not frozen since the choice.

        Tensors of a list without any requires_grad are taken as they are: a value is all that is wanted of them.
        """
        weights = self._choice.weights
        if not any(w.param.requires_grad for w in weights):
            return list(range(len(weights)))
        return [i for i, w in enumerate(weights) if w.current().requires_grad]

    def _gradients(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return these weights as they are, and their gradients, made where there is none."""
        params = [self._choice.weights[i].current() for i in indices]
        for i, param in zip(indices, params, strict=True):
            if param.grad is not None and param.grad.layout != torch.strided:
                name = self._choice.weights[i].name
                raise TypeError(f"{self._title}: the gradient of {name} is sparse; use sparse=False there")
        for param in params:
            if param.grad is None:
                # grad_dtype (torch 2.10 and later): None where any will do
                param.grad = torch.zeros_like(param, dtype=getattr(param, "grad_dtype", None) or param.dtype)
            elif is_sharded(param.grad):
                param.grad = aligned(param.grad, param)
        return params, [p.grad for p in params]

    def _owners(self, indices: Sequence[int], params: Sequence[Tensor]) -> list[tuple[dict, str, Tensor]]:
        """Return where modules keep these weights: those dictionaries live as long as the modules."""
        owners = (self._choice.weights[i].owner for i in indices)
        return [(o[0]._parameters, o[1], p) for o, p in zip(owners, params, strict=True) if o]

    def _sizes(self, like: Tensor, indices: Sequence[int] | None = None) -> tuple[Tensor, float]:
        """Return n of these layers [L] (all by default) where and as ``like`` is, and N of the whole regularizer."""
        numels = self._numels if indices is None else tuple(self._numels[i] for i in indices)
        total = float(sum(self._numels))
        if torch.compiler.is_compiling():
            return torch.tensor(numels, dtype=like.dtype, device=like.device), total
        key = (numels, like.dtype, like.device)
        if key not in self._vectors:  # uploaded once: a copy from pageable memory waits for the device
            self._vectors[key] = upload(np.array(numels, dtype=np.float64), like.device).to(like.dtype)
        return self._vectors[key], total

    def _on_weights(self) -> bool:
        """Tell whether it acts on weights, and not on gradients."""
        return False

    def _nothing(self) -> Tensor:
        """Return a value of 0."""
        tensors = [w.current() for w in self._choice.weights]
        return torch.zeros((), dtype=result_dtype(tensors), device=tensors[0].device)

    def __call__(self) -> Tensor:
        """Return lam * psi as a 0-d tensor for the loss, float32 (float64 when any weight is).

        Weights frozen since the choice are skipped.
        """
        raise NotImplementedError

    def add_grad_(self) -> None:
        """Add lam * grad psi to the weights' ``.grad``, without autograd; None becomes a new gradient.

        Call it after backward. Weights frozen since the choice are skipped. No host synchronisation on CUDA.

        Raises:
            TypeError: a weight's gradient is sparse.
        """
        self._add_grad(None, None)

    def attach(self, optimizer: torch.optim.Optimizer) -> AttachHandle:
        """Add the gradient before every step of an optimizer; return a handle with ``.remove()``.

        Only the weights that this optimizer owns are touched (several optimizers may share a penalty). With a
        closure, lam * psi is added to the returned loss and lam * grad psi to the gradients, at each call. A
        GradScaler is taken into account, for fused optimizers too. Clipping done before the step doesn't clip
        the penalty; gradient accumulation needs no division: it is added once a step.

        Raises:
            ValueError: the optimizer owns none of the weights, or this regularizer is attached to it already.
        """
        return attach(self, optimizer)

    def _add_grad(self, indices: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        """Add scale * lam * grad psi to these weights' gradients, by default to the active ones'.

        None where nothing is to do.
        """
        raise NotImplementedError

    def __add__(self, other: Term) -> Sum:
        return Sum([*self.terms, *other.terms]) if isinstance(other, Term) else NotImplemented

    def __radd__(self, other: int) -> Term:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum() starts there

    def __mul__(self, factor: float | Tensor) -> Term:
        """Return the same penalty at ``factor`` times this one's strength as it is now."""
        scaled = copy.copy(self)
        scaled.lam = factor * self.lam
        return scaled

    __rmul__ = __mul__

    def __getstate__(self) -> dict[str, Any]:
        # What it is attached to stays here, and so does what was found out of these tensors.
        return {k: v for k, v in self.__dict__.items() if k not in ("_optimizers", "_plan")}

    def _options(self) -> str:
        """Return what the first line of the repr says of the formula, behind lam."""
        return ""

    def _head(self) -> str:
        lam = self.lam.item() if isinstance(self.lam, Tensor) else self.lam
        return f"{type(self).__name__}(lam={lam:g}{self._options()})"

    def _rows(self) -> str:
        weights = self._choice.weights
        size = f"on {len(weights)} weights, {sum(self._numels):,} values"
        lines = [f"  {w.label()} {list(w.param.shape)}" for w in weights]
        return "\n".join([size, *lines, *(f"  left out: {name} ({why})" for name, why in self._choice.left_out)])

    def __repr__(self) -> str:
        return f"{self._head()} {self._rows()}"


def union(terms: Sequence[Term]) -> tuple[Choice, list[list[int]]]:
    """Return the weights of several terms, each once, and where each term's lie among them."""
    weights: list[Weight] = []
    index: dict[int, int] = {}
    places: list[list[int]] = []
    for term in terms:
        for weight in term._choice.weights:
            if id(weight.param) not in index:
                index[id(weight.param)] = len(weights)
                weights.append(weight)
            elif weight.owner is not None:  # it knows where a replaced parameter is found
                weights[index[id(weight.param)]] = weight
        places.append([index[id(weight.param)] for weight in term._choice.weights])
    return Choice(weights), places


class Sum(Term):
    """A sum of penalties, each with its own strength, constants and weights; made by ``+``.

    Members of the moments family (all but the group penalties) share one launch for their moments and one for their
    gradient, per dtype, also where they smooth magnitudes differently (WCR: r = 1e-8, L1: r = 0).

    Args:
        terms: penalties; sums among them are taken apart. A weight that one of them lacks feels the others only.

    Raises:
        TypeError: for anything else. ValueError: there are none, one of them acts on weights and not on gradients
            (L1's modes "decoupled" and "proximal": attach it by itself), or members of the moments family have more
            than two different r.

    Exactness: the sum of the members' gradients is rounded once to the gradient's dtype, where one after the other
        they round once each.

    Example:
        >>> import torch, wcr_fast
        >>> net = torch.nn.Linear(8, 4)
        >>> penalty = wcr_fast.WCR(net, lam=1e-5) + wcr_fast.L1(net, lam=1e-3)
        >>> loss = net(torch.randn(2, 8)).square().mean() + penalty()
        >>> penalty.terms[1].lam = 2e-3
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        for i, term in enumerate(terms):
            if not isinstance(term, Term):
                raise TypeError(f"Sum: terms[{i}] must be a penalty, got {type(term).__name__}")
            if term._on_weights():
                raise ValueError(
                    f'Sum: {type(term).__name__} in mode "{term.mode}" acts on weights, not on gradients: '
                    "attach it by itself"
                )
        self._terms = tuple(member for term in terms for member in term.terms)
        if not self._terms:
            raise ValueError("Sum: no penalty to sum up")
        kinds: dict[Any, list[Term]] = {}
        for number, term in enumerate(self._terms):
            kinds.setdefault(term._joined or number, []).append(term)
        self._parts = [kind(of) if callable(kind) else of[0] for kind, of in kinds.items()]
        self._choice, self._places = union(self._parts)
        self._measure()

    @property
    def lam(self) -> float:
        """1: the members have strengths of their own, found in ``terms``."""
        return 1.0

    @property
    def terms(self) -> tuple[Term, ...]:
        """The members, in the order in which they were added."""
        return self._terms

    def formula(self) -> Term | None:
        """Return the one formula of moments that a fused optimizer may have in its step, None where there is none."""
        return self._parts[0] if len(self._parts) == 1 else None

    def _off(self) -> bool:
        return all(term._off() for term in self._terms)

    def _active(self) -> list[int]:
        return sorted({p[i] for part, p in zip(self._parts, self._places, strict=True) for i in part._active()})

    def __call__(self) -> Tensor:
        values = [part() for part in self._parts]
        return sum(values[1:], values[0])

    def _add_grad(self, indices: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        chosen = None if indices is None else set(indices)
        found = []
        for part, places in zip(self._parts, self._places, strict=True):
            mine = None if chosen is None else [i for i, place in enumerate(places) if place in chosen]
            found.append(part._add_grad(mine, scale))
        return together([added for added in found if added is not None])

    def __mul__(self, factor: float | Tensor) -> Sum:
        return Sum([term * factor for term in self._terms])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"Sum({' + '.join(term._head() for term in self._terms)}) {self._rows()}"


def together(found: Sequence[Added]) -> Added | None:
    """Return what several calls left, as one."""
    if not found:
        return None

    def value() -> Tensor:
        values = [added.value() for added in found]
        return sum(values[1:], values[0])

    return Added(value, [look for added in found for look in added.looks])
