"""A regularizer's gradient before every step of an optimizer: for loops whose loss can't be changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wcr_fast.curvature import CurvatureWatch

if TYPE_CHECKING:
    from wcr_fast.regularizers.modes import Moded
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
    """Return the torch optimizer inside wrappers: ``.optimizer`` (Accelerate's, for one), ``.base_optimizer`` (SAM's).

    It is the one that steps at the weights as they are, once for each batch.
    """
    seen = optimizer
    while True:
        held = (getattr(seen, name, None) for name in ("optimizer", "base_optimizer"))
        inner = next((one for one in held if isinstance(one, torch.optim.Optimizer)), None)
        if inner is None:
            break
        seen = inner
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


class _ShrinkHook:
    """The hook of a penalty that acts on weights: before a step or after it, as its mode says."""

    def __init__(self, regularizer: Moded) -> None:
        self.regularizer = regularizer

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        numbers = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        current = ((i, w.current()) for i, w in enumerate(self.regularizer._choice.weights))
        owned = [(i, numbers[id(p)]) for i, p in current if id(p) in numbers and p.requires_grad]
        # A scaler hands it to fused optimizers, which then do nothing themselves; others it doesn't let step.
        found_inf = getattr(optimizer, "found_inf", None)
        lrs = [group["lr"] for group in optimizer.param_groups]
        self.regularizer._shrink([i for i, _ in owned], [group for _, group in owned], lrs, found_inf)


def attach_shrinking(regularizer: Moded, optimizer: Any) -> AttachHandle:
    """Register the hook of a penalty that acts on weights on an optimizer; see ``Moded.attach``."""
    base = unwrap(optimizer, "attach")
    name = type(base).__name__
    if any("lr" not in group for group in base.param_groups):
        raise ValueError(f"attach: a parameter group of this {name} has no lr: call shrink_(lr) beside its step")
    if getattr(getattr(base, "_precision", None), "master", None) is not None:
        raise ValueError(f"attach: this {name} writes weights from its master copies, which this mode doesn't reach")
    hook = _ShrinkHook(regularizer)
    register = base.register_step_post_hook if regularizer.mode == "proximal" else base.register_step_pre_hook
    return _registered(regularizer, base, lambda: register(hook))


def attach(regularizer: Term, optimizer: Any) -> AttachHandle:
    """Register the regularizer's step pre-hook on an optimizer; see ``Regularizer.attach``."""
    base = unwrap(optimizer, "attach")
    if getattr(base, "penalty", None) is not None:
        raise ValueError(f"attach: this {type(base).__name__} has a penalty of its own in its step; use one of the two")
    return _registered(regularizer, base, lambda: base.register_step_pre_hook(_Hook(regularizer)))


def _registered(regularizer: Term, base: torch.optim.Optimizer, register: Callable[[], Any]) -> AttachHandle:
    """Register a hook, unless there is one already or the optimizer has no weight for it."""
    name, attached = type(regularizer).__name__, _attached(regularizer)
    if base in attached:
        raise ValueError(f"attach: this {name} is attached to this {type(base).__name__} already; remove() it first")
    owned = {id(p) for group in base.param_groups for p in group["params"]}
    if not any(id(p) in owned and p.requires_grad for p in regularizer.weights.values()):
        raise ValueError(
            f"attach: {type(base).__name__} owns none of the weights of this {name}; build it on the same "
            "parameters, and after anything that replaces them (fully_shard, load_state_dict(assign=True))"
        )
    attached.add(base)
    return AttachHandle(regularizer, base, register())
