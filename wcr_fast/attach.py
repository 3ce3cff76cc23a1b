"""A regularizer's gradient before every step of an optimizer: for loops whose loss can't be changed."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wcr_fast.curvature import CurvatureWatch

if TYPE_CHECKING:
    from wcr_fast.regularizers.terms import Added, Look, Term


class AttachHandle:
    """Undoes an ``attach``: call ``remove()``, or use it as a context manager."""

    def __init__(self, regularizer: Term, optimizer: torch.optim.Optimizer, hook: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._attached = _attached(regularizer)
        self._hook = hook

    def remove(self) -> None:
        """Stop adding the penalty's gradient; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            optimizer = self._optimizer()
            if optimizer is not None:
                self._attached.discard(optimizer)

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _attached(regularizer: Term) -> weakref.WeakSet:
    found = regularizer.__dict__.get("_optimizers")
    if found is None:
        found = regularizer.__dict__["_optimizers"] = weakref.WeakSet()
    return found


def unwrap(optimizer: Any, op: str) -> torch.optim.Optimizer:
    """Return the torch optimizer inside wrappers that hold it as ``.optimizer`` (Accelerate's, for one)."""
    seen = optimizer
    while hasattr(seen, "optimizer") and isinstance(seen.optimizer, torch.optim.Optimizer):
        seen = seen.optimizer
    if not isinstance(seen, torch.optim.Optimizer):
        raise TypeError(f"{op}: expected a torch optimizer, got {type(optimizer).__name__}")
    return seen


class _Hook:
    """The step pre-hook: with a closure it wraps that, without one it adds the gradient at once."""

    def __init__(self, regularizer: Term) -> None:
        self.regularizer = regularizer
        self.curvature = {term: CurvatureWatch() for term in regularizer.terms}

    def owned(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Return the places of the penalised weights that the optimizer owns now."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        current = ((i, w.current()) for i, w in enumerate(self.regularizer._choice.weights))
        return [i for i, p in current if id(p) in owned and p.requires_grad]

    def add(self, optimizer: torch.optim.Optimizer) -> Added | None:
        """Add the gradient to what the optimizer owns; return what there is to know of it."""
        # A fused optimizer divides by this scale inside its step: what is added has to carry it too.
        scale = getattr(optimizer, "grad_scale", None)
        added = self.regularizer._add_grad(self.owned(optimizer), None if scale is None else scale.to(torch.float32))
        for look in added.looks if added else ():
            self.curvature[look.term].look(look.term, optimizer, look.device, lambda look=look: _found(look, optimizer))
        return added

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.add(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            added = self.add(optimizer)
            if loss is None or added is None:
                return loss
            value = added.value()
            return loss + (value.to(loss) if isinstance(loss, Tensor) else float(value))

        if len(args) > 1:
            return (args[0], with_penalty, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_penalty}


def _found(look: Look, optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Any]], Tensor]:
    """Return the parameter group of each weight that was looked at, and the moments of these weights."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    weights = look.term._choice.weights
    return {i: groups[id(weights[i].current())] for i in look.places}, look.moments()


def attach(regularizer: Term, optimizer: Any) -> AttachHandle:
    """Register the regularizer's step pre-hook on an optimizer; see ``Regularizer.attach``."""
    base = unwrap(optimizer, "attach")
    name = type(regularizer).__name__
    attached = _attached(regularizer)
    if base in attached:
        raise ValueError(f"attach: this {name} is attached to this {type(base).__name__} already; remove() it first")
    if getattr(base, "penalty", None) is not None:
        raise ValueError(f"attach: this {type(base).__name__} has a penalty of its own in its step; use one of the two")
    hook = _Hook(regularizer)
    if not hook.owned(base):
        raise ValueError(
            f"attach: {type(base).__name__} owns none of the weights of this {name}; build it on the same "
            "parameters, and after anything that replaces them (fully_shard, load_state_dict(assign=True))"
        )
    attached.add(base)
    return AttachHandle(regularizer, base, base.register_step_pre_hook(hook))
