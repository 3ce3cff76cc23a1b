"""The moments family: penalties that are one function of each layer's mean and variance of magnitudes.

A member is a formula f(mean, var, n, N) per layer, summed over layers; its gradient needs two numbers a layer:

    d(sum f)/dw_i = s_i (b + c (a_i - mean)),   b = (df/dmean) / n,   c = 2 (df/dvar) / n

with a_i = sqrt(w_i^2 + r) and s_i = w_i / a_i. Each regularizer adds to the loss (call it), adds its gradient
directly (``add_grad_``), or does so before every optimizer step (``attach``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from wcr_fast.attach import AttachHandle, attach
from wcr_fast.ops.moments import (
    add_grad_,
    check_constant,
    check_smoothing,
    moments_of,
    plan_of,
    result_dtype,
    stats_of,
)
from wcr_fast.ops.sharded import aligned, is_sharded, local
from wcr_fast.table import pointers, upload
from wcr_fast.weights import Choice, Exclude, Weights, as_weights, choose

if TYPE_CHECKING:
    from wcr_fast.triton_path.moments import GradPlan


class Regularizer:
    """A penalty lam * sum over layers of f(mean, var, n, N) on the weights of a model.

    Subclass it with a formula and, if wanted, other defaults; the derivatives come from autograd on the [L]
    vectors unless ``derivatives`` is overridden:

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
    default_lam: ClassVar[float] = 1e-4
    default_r: ClassVar[float] = 0.0
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
        self._numels = tuple(w.param.numel() for w in self._choice.weights)
        self._vectors: dict[tuple, Tensor] = {}
        self._refuse_degenerate()

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
        if not abs(float(value)) < float("inf"):
            raise ValueError(f"{type(self).__name__}: lam must be finite, got {value}")
        self._lam = float(value)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The penalised weights as the module holds them now: name -> parameter."""
        return {w.name: w.current() for w in self._choice.weights}

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

    def _refuse_twice(self) -> None:
        seen: dict[tuple, str] = {}
        for weight in self._choice.weights:
            key = (weight.param.device, local(weight.param).data_ptr())
            if key in seen and key[1] != 0:
                raise ValueError(
                    f"{type(self).__name__}: {seen[key]} and {weight.label()} are the same weights; pass each once"
                )
            seen[key] = weight.label()

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
        tensors = [self._choice.weights[i].current() for i in active or range(len(self._numels))]
        if not active or (not isinstance(self.lam, Tensor) and self.lam == 0.0):
            return torch.zeros((), dtype=result_dtype(tensors), device=tensors[0].device)
        mean, var = moments_of(tensors, self.r)
        return (self.lam * self.formula(mean, var, *self._sizes(mean, active)).sum()).to(mean.dtype)

    def _active(self) -> list[int]:
        """Return the places of the weights that are penalised now: those not frozen since the choice.

        Tensors of a list without any requires_grad are taken as they are: a value is all that is wanted of them.
        """
        weights = self._choice.weights
        if not any(w.param.requires_grad for w in weights):
            return list(range(len(weights)))
        return [i for i, w in enumerate(weights) if w.current().requires_grad]

    def add_grad_(self) -> None:
        """Add lam * grad psi to the weights' ``.grad``, without autograd; None becomes a new gradient.

        Call it after backward. Weights frozen since the choice are skipped. No host synchronisation on CUDA.

        Raises:
            TypeError: a weight's gradient is sparse.
        """
        self._add_grad(None, self.lam)

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

    def _add_grad(self, indices: Sequence[int] | None, lam: float | Tensor) -> tuple[Tensor, Tensor] | None:
        """Add the gradient to these weights, by default the active ones; return their (f, stats).

        None where nothing is to do. The next call may overwrite what is returned.
        """
        if not isinstance(lam, Tensor) and lam == 0.0:
            return None
        everything = indices is None or len(indices) == len(self._numels)
        if self._plan is not None and everything and not torch.compiler.is_compiling():
            addresses = self._plan.addresses()
            if addresses is not None:
                return self._run_plan(addresses, lam)
        return self._add_grad_anew(self._active() if indices is None else indices, lam)

    def _run_plan(self, addresses: np.ndarray, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        stats, coef = self._plan.run(addresses, lam, self.r, (self.family, self.eps))
        return coef[0], stats

    @torch.no_grad()
    def _add_grad_anew(self, indices: Sequence[int], lam: float | Tensor) -> tuple[Tensor, Tensor] | None:
        """Add the gradient without knowing anything of earlier calls, and leave a plan for later ones."""
        self._plan = None
        if not indices:
            return None
        params = [self._choice.weights[i].current() for i in indices]
        for i, param in zip(indices, params, strict=True):
            if param.grad is None:
                # grad_dtype (torch 2.10 and later): None where any will do
                param.grad = torch.zeros_like(param, dtype=getattr(param, "grad_dtype", None) or param.dtype)
            elif param.grad.layout != torch.strided:
                name = self._choice.weights[i].name
                raise TypeError(f"{type(self).__name__}: the gradient of {name} is sparse; use sparse=False there")
            elif is_sharded(param.grad):
                param.grad = aligned(param.grad, param)
        tensors, grads = [p.detach() for p in params], [p.grad for p in params]
        # N is the whole regularizer's: the kernels know only the list they are given.
        rule = (self.family, self.eps) if self.family and len(indices) == len(self._numels) else None
        if rule and not torch.compiler.is_compiling():
            # A module's weights are looked up where it keeps them: that dictionary lives as long as the module.
            chosen = zip(self._choice.weights, params, strict=True)
            owners = [(w.owner[0]._parameters, w.owner[1], p) for w, p in chosen if w.owner]
            self._plan = plan_of(params, grads, owners)
            if self._plan is not None:
                torch.autograd.graph.increment_version(grads)
                return self._run_plan(np.array(pointers(grads), dtype=np.int64), lam)
        stats, coef = stats_of(tensors, self.r, rule)
        if coef is None:
            coef = torch.stack(self._derivatives_at(stats, indices))
        add_grad_(grads, tensors, stats, coef, lam, self.r)
        return coef[0], stats

    def _derivatives_at(self, stats: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        return self.derivatives(stats[0], stats[1], *self._sizes(stats, indices))

    def moments(self) -> dict[str, tuple[float, float]]:
        """Return (mean, variance) of the smooth magnitudes by name, as Python floats (one synchronisation)."""
        with torch.no_grad():
            mean, var = moments_of([w.current() for w in self._choice.weights], self.r)
        rows = torch.stack([mean, var]).tolist()
        return {w.name: (m, v) for w, m, v in zip(self._choice.weights, *rows, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        # What it is attached to stays here, and so does what was found out of these tensors.
        return {k: v for k, v in self.__dict__.items() if k not in ("_optimizers", "_plan")}

    def __repr__(self) -> str:
        lam = self.lam.item() if isinstance(self.lam, Tensor) else self.lam
        head = (
            f"{type(self).__name__}(lam={lam:g}, eps={self.eps:g}, r={self.r:g}) "
            f"on {len(self._numels)} weights, {sum(self._numels):,} values"
        )
        lines = [f"  {w.label()} {list(w.param.shape)}" for w in self._choice.weights]
        lines += [f"  left out: {name} ({why})" for name, why in self._choice.left_out]
        return "\n".join([head, *lines])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 (and zero slopes) where the denominator is 0: an all-zero layer."""
    empty = denominator == 0
    return torch.where(empty, torch.zeros_like(numerator), numerator) / torch.where(
        empty, torch.ones_like(denominator), denominator
    )


class WCR(Regularizer):
    """Weight concentration: f = 1 / (V + eps), with a = sqrt(w^2 + r).

    Pushes magnitudes below the layer's mean to zero and those above it outward (57 % of a Gaussian go down). Not
    scale-free: halving all weights quadruples it. Called VAR in the paper's first version. Where
    lr * lam * (6 V - 2 eps) / (n (V + eps)^3) exceeds the optimizer's stability limit, ``attach`` warns.

    Args: as :class:`Regularizer`; lam = 1e-5 and r = eps = 1e-8 are the paper's.

    Source: Yun, Jo, Lee, arXiv 2511.14282.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> wcr = WCR(model, lam=1e-5)
        >>> loss = model(torch.randn(4, 8)).square().mean() + wcr()
        >>> loss.backward()
    """

    family = "wcr"
    default_lam = 1e-5
    default_r = 1e-8

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return 1.0 / (var + self.eps)

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        f = 1.0 / (var + self.eps)
        return f, torch.zeros_like(f), -f * f

    def degenerate(self, mean: Tensor, var: Tensor) -> Tensor:
        return var <= self.eps


class L1(Regularizer):
    """The sum of magnitudes: f = n m, gradient lam * sign(w). Source: Tibshirani 1996 (the lasso).

    Args: as :class:`Regularizer`; r = 0 by default (with r = 1e-8 and 99 % zeros it would be 20 % too large).

    Example:
        >>> import torch
        >>> L1([torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))], lam=0.5)().item()
        1.5
    """

    family = "l1"

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return numel * mean

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        return numel * mean, numel, torch.zeros_like(var)


class HoyerSquare(Regularizer):
    """Hoyer-Square: f = (sum |w|)^2 / sum w^2 = n m^2 / (V + m^2), between 1 and n; scale-free.

    Pushes magnitudes below sum w^2 / sum |w| to zero (79 % of a Gaussian). 0 for an all-zero layer.

    Args: as :class:`Regularizer`; r = 0 by default.

    Source: Yang, Wen, Li, "DeepHoyer", ICLR 2020, arXiv 1908.09979, equation for H_S.

    Example:
        >>> import torch
        >>> HoyerSquare([torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))], lam=1.0)().item()
        1.0
    """

    family = "hoyer_square"

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return _ratio(numel * mean * mean, var + mean * mean)

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        square = var + mean * mean
        f = _ratio(numel * mean * mean, square)
        return f, _ratio(2.0 * numel * _ratio(mean, square) * var, square), -_ratio(f, square)


class RelativeConcentration(Regularizer):
    """Relative concentration (ours): f = m^2 / (V + eps m^2), the inverse squared coefficient of variation.

    Scale-free; with h = Hoyer-Square / n it is h / (1 - h), so both turn at the same magnitude.

    Args: as :class:`Regularizer`; lam = 0.1, r = 0 by default.

    Example:
        >>> import torch
        >>> RelativeConcentration([torch.nn.Parameter(torch.tensor([[1.0, 3.0]]))], lam=1.0, eps=0.0)().item()
        4.0
    """

    family = "relative"
    default_lam = 0.1

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return _ratio(mean * mean, var + self.eps * mean * mean)

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        spread = var + self.eps * mean * mean
        f = _ratio(mean * mean, spread)
        return f, _ratio(2.0 * _ratio(mean, spread) * var, spread), -_ratio(f, spread)

    def degenerate(self, mean: Tensor, var: Tensor) -> Tensor:
        return (var <= self.eps * mean * mean) & (mean > 0)


class LogConcentration(Regularizer):
    """Log concentration (ours): f = (n / N) log(m^2 / (V + eps m^2)), the logit of Hoyer-Square / n.

    Scale-free, and weighted by size: the pull on a weight doesn't depend on its layer's size. 0 for an
    all-zero layer.

    Args: as :class:`Regularizer`; lam = 1, r = 0 by default.

    Example:
        >>> import torch
        >>> round(LogConcentration([torch.nn.Parameter(torch.tensor([[1.0, 3.0]]))], eps=0.0)().item(), 6)
        1.386294
    """

    family = "log"
    default_lam = 1.0

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        ratio = _ratio(mean * mean, var + self.eps * mean * mean)
        return numel / total * torch.log(torch.where(ratio == 0, torch.ones_like(ratio), ratio))

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        share = numel / total
        spread = var + self.eps * mean * mean
        f = self.formula(mean, var, numel, total)
        return f, share * 2.0 * _ratio(_ratio(var, spread), mean), -_ratio(share * (spread > 0), spread)

    def degenerate(self, mean: Tensor, var: Tensor) -> Tensor:
        return (var <= self.eps * mean * mean) & (mean > 0)
