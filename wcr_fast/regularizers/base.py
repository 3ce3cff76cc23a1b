"""The base of the moments family: one function of each layer's mean and variance of magnitudes, summed over layers.

Its gradient needs two numbers a layer:

    d(sum f)/dw_i = s_i (b + c (a_i - mean)),   b = (df/dmean) / n,   c = 2 (df/dvar) / n

with a_i = sqrt(w_i^2 + r) and s_i = w_i / a_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.moments import add_grad_, check_constant, check_smoothing, moments_of, plan_of, stats_of
from wcr_fast.regularizers.joint import Joint
from wcr_fast.regularizers.terms import Added, Look, Term
from wcr_fast.table import pointers
from wcr_fast.weights import Exclude, Weights

if TYPE_CHECKING:
    from wcr_fast.triton_path.moments import GradPlan


class Regularizer(Term):
    """A penalty lam * sum over layers of f(mean, var, n, N) on the weights of a model.

    Each adds to the loss (call it), adds its gradient directly (``add_grad_``), or does so before every optimizer
    step (``attach``). Subclass it with a formula and, if wanted, other defaults (or see :class:`FromMoments`); the
    derivatives come from autograd on the [L] vectors unless ``derivatives`` is overridden:

        >>> import torch, wcr_fast
        >>> class Spread(wcr_fast.Regularizer):
        ...     def formula(self, mean, var, numel, total):
        ...         return -var
        >>> Spread(torch.nn.Linear(4, 4), lam=0.1)().item() < 0
        True

    Args:
        model: a module (its weights are chosen: floating point, two or more dimensions, not of a
            normalisation module, requires_grad; tied weights once) or an iterable of parameters, taken literally.
            DTensors (FSDP2, tensor parallel) count as the whole layers they are parts of; then every rank has to
            build it, and to call it, add its gradient or ask for moments, together with the others.
        lam: strength, a float or a 0-d tensor (read on the device, without a sync); may be set between steps.
            A float 0 launches nothing.
        eps: the formula's small constant, >= 0.
        r: smoothing of the magnitudes, 0 or at least 1e-30; 0 means |w|.
        exclude: glob patterns over parameter or module names, ``"re:..."``, module types, or functions of
            (name, parameter).

    Raises:
        ValueError: no weight is left, a pattern matches nothing, a constant is negative, or a weight is so
            concentrated on one magnitude (all zeros, constant) that its term would drown the loss.
    """

    #: name of the formula in the kernels, which then compute the coefficients in the moments' own launch
    family: ClassVar[str | None] = None
    default_r: ClassVar[float] = 0.0
    _joined = Joint
    _plan: GradPlan | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "formula" in cls.__dict__:  # another formula: what was known of the parent's no longer holds
            cls.family = cls.__dict__.get("family")
            if "derivatives" not in cls.__dict__:
                cls.derivatives = Regularizer.derivatives

    def __init__(
        self,
        model: Weights,
        lam: float | Tensor | None = None,
        *,
        eps: float = 1e-8,
        r: float | None = None,
        exclude: Exclude = (),
    ) -> None:
        name = type(self).__name__
        self.eps = check_constant(name, "eps", eps)
        self.r = check_smoothing(name, self.default_r if r is None else r)
        super().__init__(model, lam, exclude)
        self._refuse_degenerate()

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        """Return f of every layer, [L], from its mean and variance [L], sizes n [L] and their sum N."""
        raise TypeError(f"{type(self).__name__} must define formula(mean, var, numel, total)")

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (f, df/dmean, df/dvar), each [L]; by autograd of the formula unless a subclass knows better."""
        with torch.enable_grad():
            mean, var = mean.detach().requires_grad_(), var.detach().requires_grad_()
            f = self.formula(mean, var, numel, total)
            slopes = torch.autograd.grad(f.sum(), (mean, var), allow_unused=True)
        slope_mean, slope_var = (torch.zeros_like(mean) if s is None else s for s in slopes)
        return f.detach(), slope_mean, slope_var

    def degenerate(self, mean: Tensor, var: Tensor) -> Tensor:
        """Return which layers' terms can't be trained against, bool [L]: none unless a subclass says so."""
        return torch.zeros_like(var, dtype=torch.bool)

    def _refuse_degenerate(self) -> None:
        tensors = [w.param.detach() for w in self._choice.weights]
        if any(t.device.type == "meta" for t in tensors) or torch.compiler.is_compiling():
            return
        with torch.no_grad():
            flags = self.degenerate(*moments_of(tensors, self.r)).tolist()
        names = [w.label() for w, flag in zip(self._choice.weights, flags, strict=True) if flag]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"{type(self).__name__}: all magnitudes are (nearly) equal in {shown}: variance <= eps, so the "
                "penalty's gradient would drown the loss's; exclude these weights, or initialise them first "
                "(those that are pruned away can only be excluded)"
            )

    def __call__(self) -> Tensor:
        """Return lam * psi as a 0-d tensor for the loss, float32 (float64 when any weight is).

        Weights frozen since the choice are skipped.
        """
        active = self._active()
        if not active or self._off():
            return self._nothing()
        mean, var = moments_of([self._choice.weights[i].current() for i in active], self.r)
        return self._value_at(mean, var, active)

    def _value_at(self, mean: Tensor, var: Tensor, indices: Sequence[int]) -> Tensor:
        """Return lam * psi of these weights from their moments."""
        return (self.lam * self._formula_at(mean, var, indices).sum()).to(mean.dtype)

    def _formula_at(self, mean: Tensor, var: Tensor, indices: Sequence[int]) -> Tensor:
        return self.formula(mean, var, *self._sizes(mean, indices))

    def _add_grad(self, indices: Sequence[int] | None, scale: Tensor | None) -> Added | None:
        if self._off():
            return None
        lam = self.lam if scale is None else self.lam * scale
        everything = indices is None or len(indices) == len(self._numels)
        if self._plan is not None and everything and not torch.compiler.is_compiling():
            addresses = self._plan.addresses()
            if addresses is not None:
                return self._run_plan(addresses, lam)
        return self._add_grad_anew(self._active() if indices is None else indices, lam)

    def _run_plan(self, addresses: np.ndarray, lam: float | Tensor) -> Added:
        stats, coef = self._plan.run(addresses, lam, self.r, (self.family, self.eps))
        return self._added(range(len(self._numels)), stats, coef)

    def _added(self, indices: Sequence[int], stats: Tensor, coef: Tensor) -> Added:
        return Added(lambda: self.lam * coef[0].sum(), [Look(self, stats.device, indices, lambda: stats)])

    @torch.no_grad()
    def _add_grad_anew(self, indices: Sequence[int], lam: float | Tensor) -> Added | None:
        """Add the gradient without knowing anything of earlier calls, and leave a plan for later ones."""
        self._plan = None
        if not indices:
            return None
        params, grads = self._gradients(indices)
        tensors = [p.detach() for p in params]
        # N is the whole regularizer's: the kernels know only the list they are given.
        rule = (self.family, self.eps) if self.family and len(indices) == len(self._numels) else None
        if rule and not torch.compiler.is_compiling():
            self._plan = plan_of(params, grads, self._owners(indices, params))
            if self._plan is not None:
                torch.autograd.graph.increment_version(grads)
                return self._run_plan(np.array(pointers(grads), dtype=np.int64), lam)
        stats, coef = stats_of(tensors, self.r, rule)
        if coef is None:
            coef = self._derivatives_at(stats, indices)
        add_grad_(grads, tensors, stats, coef, lam, self.r)
        return self._added(indices, stats, coef)

    def _derivatives_at(self, stats: Tensor, indices: Sequence[int]) -> Tensor:
        return torch.stack(self.derivatives(stats[0], stats[1], *self._sizes(stats, indices)))

    def moments(self) -> dict[str, tuple[float, float]]:
        """Return (mean, variance) of the smooth magnitudes by name, as Python floats (one synchronisation)."""
        with torch.no_grad():
            mean, var = moments_of([w.current() for w in self._choice.weights], self.r)
        rows = torch.stack([mean, var]).tolist()
        return {w.name: (m, v) for w, m, v in zip(self._choice.weights, *rows, strict=True)}

    def _options(self) -> str:
        return f", eps={self.eps:g}, r={self.r:g}"


class FromMoments(Regularizer):
    """A penalty of one's own, from a function of each layer's moments: nothing to subclass.

    Args:
        model, lam, r, exclude: as :class:`Regularizer`; r = 0 by default.
        function: (mean, var, numel, total) -> f of every layer: mean and variance of its smooth magnitudes, its size n,
            all [L], and N, a float. In torch operations: its derivatives come from autograd.

    Raises:
        TypeError: the function is none, or its result is not a tensor with one value per layer. ValueError: as
            :class:`Regularizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 3.0]]))
        >>> FromMoments([weight], lambda mean, var, numel, total: numel * var.sqrt(), lam=0.5)().item()
        1.0
    """

    def __init__(
        self,
        model: Weights,
        function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
        lam: float | Tensor | None = None,
        *,
        r: float | None = None,
        exclude: Exclude = (),
    ) -> None:
        if not callable(function):
            raise TypeError(f"FromMoments: function must take (mean, var, numel, total), got {function!r}")
        self.function = function
        super().__init__(model, lam, r=r, exclude=exclude)

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        """Return what the function does."""
        f = self.function(mean, var, numel, total)
        if not isinstance(f, Tensor) or f.shape != mean.shape:
            got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"FromMoments: function must return one value per layer, {len(mean)} of them, got {got}")
        return f

    def _options(self) -> str:
        return f", {getattr(self.function, '__name__', 'function')}, r={self.r:g}"
