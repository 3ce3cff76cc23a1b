"""SGD with the penalty in its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wcr_fast.optim.fused import FusedOptimizer, ParamsT
from wcr_fast.optim.owned import PenaltyT
from wcr_fast.weights import Exclude


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with ``lam * psi`` of a penalty added to what it minimises, at no cost in memory traffic.

    Equal to training on ``loss + lam * psi`` through autograd: the penalty's gradient joins the loss's before weight
    decay and momentum. With ``maximize=True`` the sum is maximised, as it would be through autograd. Gradients are
    left as they are, scaled ones too. Without a penalty it is torch's SGD, in one launch.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD. lr, weight_decay
            and lam may be 0-d float32 or float64 tensors on the weights' device: they are read there, at each step.
        foreach, fused, differentiable: accepted as torch does; ``differentiable=True`` is an error.
        penalty: a regularizer built on the model, or a regularizer class or its name ("wcr", "l1", "hoyer_square",
            "relative", "log") for the parameters with two or more dimensions that require a gradient; None for none.
        lam: its strength, a group option; None takes the regularizer's own ``lam``, as it is at each step.
        exclude: patterns over the names of parameters, for a class or name, where named parameters are given.
        state_dtype: dtype of the momentum buffer (float32, bfloat16, float16); None is the weight's.
        master: "float32" keeps a float32 copy of 16-bit weights, "remainder" the 16 bits that bfloat16 lacks of it.
        stochastic_rounding: round bfloat16 weights at random, right in the mean; repeatable. ``seed`` is a
            group option, torch's initial seed by default: replicas (DDP, HSDP) need the same one on every rank.

    Raises:
        ValueError: for values that torch refuses, or a penalty that finds no weight here. TypeError: for sparse
            gradients, at the step.

    Source: torch.optim.SGD; the penalty: Yun, Jo, Lee, arXiv 2511.14282.

    Example:
        >>> import torch, wcr_fast
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, penalty=wcr_fast.WCR(model), lam=1e-5)
        >>> model(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        penalty: PenaltyT = None,
        lam: float | Tensor | None = None,
        exclude: Exclude = (),
        state_dtype: torch.dtype | None = None,
        master: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        params = self._prepare(
            params,
            penalty=penalty,
            lam=lam,
            exclude=exclude,
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            differentiable=differentiable,
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._finish()

    def _has(self, group: dict[str, Any], name: str) -> bool:
        return group["momentum"] != 0

    def _counts(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0 and group["dampening"] != 0
