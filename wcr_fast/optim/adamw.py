"""AdamW with the penalty in its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wcr_fast.optim.fused import FusedOptimizer, ParamsT
from wcr_fast.optim.owned import PenaltyT
from wcr_fast.weights import Exclude


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW with a penalty in its step, at no cost in memory traffic.

    By default the penalty's gradient joins the loss's: equal to training on ``loss + lam * psi`` through autograd,
    where the adaptive scaling evens out the pull (weights with small gradients feel it most). ``decoupled=True``
    applies it as weight decay is applied, outside of that scaling: w <- w - lr (weight_decay w + lam grad psi(w)).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW. lr, weight_decay and lam
            may be 0-d float32 or float64 tensors on the weights' device: they are read there, at each step.
        capturable, foreach, fused, differentiable: accepted as torch does; a step on a GPU can always be captured,
            and ``differentiable=True`` is an error.
        decoupled: apply the penalty outside of the adaptive scaling.
        penalty, lam, exclude, state_dtype, master, stochastic_rounding: as in :class:`wcr_fast.optim.SGD`.

    Raises:
        ValueError: for values that torch refuses, or a penalty that finds no weight here. TypeError: for sparse
            gradients, at the step.

    Source: torch.optim.AdamW (Loshchilov, Hutter, arXiv 1711.05101); the penalty: Yun, Jo, Lee, arXiv 2511.14282.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3, penalty="l1", lam=1e-4, exclude="*.bias")
        Traceback (most recent call last):
        ValueError: exclude: '*.bias' matches no parameter; there are: weight, bias
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, penalty="l1", lam=1e-4, decoupled=True)
        >>> model(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    algorithm = "adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        penalty: PenaltyT = None,
        lam: float | Tensor | None = None,
        decoupled: bool = False,
        exclude: Exclude = (),
        state_dtype: torch.dtype | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        params = self._prepare(
            params,
            penalty=penalty,
            lam=lam,
            decoupled=decoupled,
            exclude=exclude,
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            differentiable=differentiable,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._finish()

    def _has(self, group: dict[str, Any], name: str) -> bool:
        return name != "max_exp_avg_sq" or group["amsgrad"]

    def _counts(self, group: dict[str, Any]) -> bool:
        return True
