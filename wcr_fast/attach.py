"""A regularizer's gradient before every step of an optimizer: for loops whose loss can't be changed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.table import upload

if TYPE_CHECKING:
    from wcr_fast.regularizers import Regularizer

# The curvature changes slowly: look at the first step, then now and then.
WATCH_EVERY = 32


class AttachHandle:
    """Undoes an ``attach``: call ``remove()``, or use it as a context manager."""

    def __init__(self, regularizer: Regularizer, optimizer: torch.optim.Optimizer, hook: Any) -> None:
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


def _attached(regularizer: Regularizer) -> weakref.WeakSet:
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

    def __init__(self, regularizer: Regularizer) -> None:
        self.regularizer = regularizer
        self.watch = _CurvatureWatch(regularizer)

    def owned(self, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
        """Return index of each penalised weight that the optimizer owns now -> its parameter group."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        current = ((i, w.current()) for i, w in enumerate(self.regularizer._choice.weights))
        return {i: groups[id(p)] for i, p in current if id(p) in groups and p.requires_grad}

    def add(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Add the gradient to what the optimizer owns; return lam * psi of that part."""
        owned = self.owned(optimizer)
        lam = self.regularizer.lam
        # A fused optimizer divides by this scale inside its step: what is added has to carry it too.
        scale = getattr(optimizer, "grad_scale", None)
        scaled = lam if scale is None else lam * scale.to(torch.float32)
        added = self.regularizer._add_grad(list(owned), scaled)
        if added is None:
            return None
        values, stats = added
        self.watch.look(optimizer, owned, stats)
        return lam * values.sum()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.add(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            value = self.add(optimizer)
            if loss is None or value is None:
                return loss
            return loss + (value.to(loss) if isinstance(loss, Tensor) else float(value))

        if len(args) > 1:
            return (args[0], with_penalty, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_penalty}


class _CurvatureWatch:
    """Warns once where a step of SGD is too long for the penalty's curvature and would throw a layer outward.

    In the direction of its own gradient a layer's term has curvature 4 V f_VV / n + 2 f_V / n. SGD with momentum
    mu is stable on a quadratic while lr * curvature < 2 (1 + mu), with Nesterov 2 (1 + mu) / (1 + 2 mu).
    """

    def __init__(self, regularizer: Regularizer) -> None:
        self.regularizer = regularizer
        self.steps = 0
        self.done = False
        self.pending: tuple[Tensor, Any, list[int]] | None = None

    def look(self, optimizer: torch.optim.Optimizer, owned: dict[int, dict[str, Any]], stats: Tensor) -> None:
        if self.done or not isinstance(optimizer, torch.optim.SGD):
            return
        if stats.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._read()
        if self.steps % WATCH_EVERY == 0 and self.pending is None:
            self._measure(list(owned), list(owned.values()), stats)
        self.steps += 1

    def _measure(self, indices: list[int], groups: list[dict[str, Any]], stats: Tensor) -> None:
        reg = self.regularizer
        numel, total = reg._sizes(stats, indices)
        with torch.enable_grad():
            mean, var = stats[0].detach(), stats[1].detach().requires_grad_()
            f = reg.formula(mean, var, numel, total).sum()
            if not f.requires_grad:
                return  # no dependence on the variance, no such curvature
            (slope,) = torch.autograd.grad(f, var, create_graph=True)
            second = torch.zeros_like(slope)
            if slope.requires_grad:
                (second,) = torch.autograd.grad(slope.sum(), var, allow_unused=True, materialize_grads=True)
        slope = slope.detach()
        step = reg.lam * _per_layer([g["lr"] for g in groups], stats) / numel
        limit = _per_layer([_stable(g) for g in groups], stats)
        excess, worst = (step * (4.0 * stats[1] * second + 2.0 * slope) / limit).max(0)
        factor = (1.0 - 2.0 * step * slope).gather(0, worst.view(1))[0]
        report = torch.stack([excess, factor, worst.to(stats.dtype)])
        event = None
        if report.is_cuda:  # read some steps later, when the copy has arrived: no synchronisation
            stream = torch.cuda.current_stream(report.device)
            report = report.to("cpu", non_blocking=True)
            event = stream.record_event()
        self.pending = (report, event, indices)
        self._read()

    def _read(self) -> None:
        if self.pending is None or (self.pending[1] is not None and not self.pending[1].query()):
            return
        report, _, indices = self.pending
        self.pending = None
        excess, factor, worst = report.tolist()
        if excess > 1.0:
            self.done = True
            name = self.regularizer._choice.weights[indices[int(worst)]].label()
            warnings.warn(
                f"{type(self.regularizer).__name__}: the step is {excess:.3g} times too long for the penalty's "
                f"curvature at {name}: one SGD step throws its spread outward by a factor of {factor:.3g}; lower lr "
                "or lam, or exclude it",
                stacklevel=2,
            )


def _per_layer(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Return one value per layer where ``like`` is, without waiting for the device."""
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([torch.as_tensor(v, dtype=like.dtype).to(like.device, non_blocking=True) for v in values])
    return upload(np.array(values, dtype=np.float64), like.device).to(like.dtype)


def _stable(group: dict[str, Any]) -> float:
    mu = float(group.get("momentum", 0.0))
    return 2.0 * (1.0 + mu) / (1.0 + 2.0 * mu) if group.get("nesterov") else 2.0 * (1.0 + mu)


def attach(regularizer: Regularizer, optimizer: Any) -> AttachHandle:
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
