"""The members of the moments family: a formula each, with its derivatives by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.ops.shrink import refuse_overlap, shrink_
from wcr_fast.regularizers.base import Regularizer
from wcr_fast.regularizers.modes import Moded
from wcr_fast.weights import Exclude, Weights


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


#: the name that the paper's first version gave it
VAR = WCR


class L1(Moded, Regularizer):
    """The sum of magnitudes: f = n m, gradient lam * sign(w), 0 at 0.

    In the loss it leaves no exact zeros (weights swing about 0), and under Adam its pull is divided by each weight's
    own gradient's size. Two modes act on the weights instead, by ``attach`` or ``shrink_(lr)``, one launch per dtype:

        "decoupled":  w <- w - lr lam sign(w)                      before the step, as AdamW's weight decay
        "proximal":   w <- sign(w) max(|w| - lr lam, 0)            after the step: exact zeros (+0.0)

    Args: as :class:`Regularizer`; r = 0 by default (with r = 1e-8 and 99 % zeros it would be 20 % too large).
        mode: "loss" (default), "decoupled" or "proximal"; in the latter two a call gives the value without a
            gradient, ``add_grad_`` is an error, r must be 0 and lam >= 0.

    Raises:
        ValueError: as :class:`Regularizer`, and for another mode.

    Exactness: lr * lam is rounded to the dtype of the arithmetic (float32; float64 for float64 weights), the result to
    the weight's: in bfloat16 a weight of 512 lr * lam or more doesn't move. NaN stays.

    Source: Tibshirani 1996 (the lasso); proximal: Daubechies, Defrise, De Mol 2004, soft thresholding.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.25]]))
        >>> L1([weight], lam=0.5)().item()
        1.625
        >>> L1([weight], lam=0.5, mode="proximal").shrink_(lr=1.0)
        >>> weight.tolist()
        [[0.5, -1.5, 0.0]]
    """

    family = "l1"

    def __init__(
        self,
        model: Weights,
        lam: float | Tensor | None = None,
        *,
        mode: str = "loss",
        eps: float = 1e-8,
        r: float | None = None,
        exclude: Exclude = (),
    ) -> None:
        self._set_mode(mode, ("loss", "decoupled", "proximal"))
        super().__init__(model, lam, eps=eps, r=r, exclude=exclude)
        if self._on_weights():
            if self.r != 0:
                raise ValueError(f'L1: mode "{mode}" has no smoothing: r must be 0, got {self.r}')
            for weight in self._choice.weights:
                refuse_overlap(weight.param, f"L1: {weight.label()}")

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return numel * mean

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        return numel * mean, numel, torch.zeros_like(var)

    def _shrink(
        self, places: Sequence[int], which: Sequence[int], lrs: Sequence[float | Tensor], found_inf: Tensor | None
    ) -> None:
        if not self._off():
            weights = [self._choice.weights[i].current() for i in places]
            amounts = [lr * self.lam for lr in lrs]
            shrink_(weights, which, amounts, proximal=self.mode == "proximal", found_inf=found_inf)


class L2(Regularizer):
    """Half the sum of squares: f = n (V + m^2) / 2, gradient lam * w: weight decay as torch.optim.SGD has it.

    Args: as :class:`Regularizer`; r = 0 by default (r adds n r / 2 to the value and nothing to the gradient).

    Exactness: with r = 0 the torch path adds lam * w to the bit; the kernels sum it from the moments, to a few units in
    the last place of the layer's largest weight.

    Source: Hoerl and Kennard 1970 (ridge regression).

    Example:
        >>> import torch
        >>> L2([torch.nn.Parameter(torch.tensor([[1.0, -3.0]]))], lam=0.1)().item()
        0.5
    """

    family = "l2"

    def formula(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> Tensor:
        return 0.5 * numel * (var + mean * mean)

    def derivatives(self, mean: Tensor, var: Tensor, numel: Tensor, total: float) -> tuple[Tensor, Tensor, Tensor]:
        return 0.5 * numel * (var + mean * mean), numel * mean, 0.5 * numel


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
