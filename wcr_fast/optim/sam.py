"""Sharpness-aware minimisation: SAM and ASAM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.optim.perturbed import ParamsT
from wcr_fast.optim.two_pass import TwoPassOptimizer


class SAM(TwoPassOptimizer):
    """Sharpness-aware minimisation around any torch optimizer: it steps by the gradient at the worst point nearby.

        e = rho g / (||g|| + 1e-12),    w <- base step by grad L(w + e), from w

    ||g|| is over all parameters with a gradient, in all groups. Two forward and backward passes a step, one copy of
    the weights. Weight decay and a regularizer that is attached, or in the base optimizer's own step, act once, at w;
    in the closure's loss they would act on e, too.

    Args:
        params: parameters or groups (``rho`` may be an option of each), a model, or a built optimizer.
        base_optimizer: the class to wrap (torch's, :class:`wcr_fast.optim.SGD`, any other), None for a built one.
        rho: radius of the perturbation, >= 0; 0 gives the base optimizer, bit for bit.
        model: the module that the closure runs: its batch-norm statistics then move in the first pass only, and where
            it is a DistributedDataParallel ``per_worker`` holds. Taken from ``params`` where that is a module.
        per_worker: with DistributedDataParallel and a closure, each worker perturbs by the gradient of its own part of
            the batch, as in the paper; only the second gradient is averaged. False averages both: SAM of the whole
            batch. With FSDP2, and in ``first_step`` without ``no_sync()`` around the first pass, both are averaged.
        keep_zeros: leave weights that are zero at zero (pruned networks), and out of the norm.
        base_options: of the class: lr, momentum, ...

    Raises:
        TypeError, ValueError: for what can't be wrapped, or a rho that is no finite number >= 0.

    Exactness: restored weights have the same bits. With float32 weights the norm is summed in float64 over parts.

    Source: Foret et al., ICLR 2021, arXiv 2010.01412, algorithm 1 (rho = 0.05). Batch-norm statistics
    as in the authors' code; their L2 term is part of the loss in both passes, ours is the base optimizer's.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SAM(model, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(3, 4)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | None = None,
        *,
        rho: float = 0.05,
        model: nn.Module | None = None,
        per_worker: bool = True,
        keep_zeros: bool = False,
        **base_options: Any,
    ) -> None:
        self._per_worker = bool(per_worker)
        super().__init__(
            *(params, base_optimizer, base_options), model=model, group_options={"rho": rho}, keep_zeros=keep_zeros
        )


class ASAM(TwoPassOptimizer):
    """Adaptive SAM: the perturbation of a weight is in proportion to its magnitude, so scaling weights changes nothing.

        e = rho T^2 g / (||T g|| + 1e-12),    T = |w| + eta for weights, 1 for biases

    Args:
        params, base_optimizer, model, per_worker, keep_zeros, base_options: as in :class:`SAM`.
        rho: radius, about ten times SAM's.
        eta: added to the magnitudes, >= 0; a group option as rho is.
        adaptive: ``"weights"`` scales parameters with two or more dimensions, ``"all"`` every one.

    Source: Kwon et al., ICML 2021, arXiv 2102.11600, the elementwise form. The authors' code goes by names and so
    scales the gains of normalisation layers, too; other implementations scale everything, with eta = 0.

    Example:
        >>> import torch
        >>> optimizer = ASAM(torch.nn.Linear(4, 2), torch.optim.SGD, lr=0.1, rho=0.5)
        >>> optimizer.param_groups[0]["eta"]
        0.01
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | None = None,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        adaptive: str = "weights",
        model: nn.Module | None = None,
        per_worker: bool = True,
        keep_zeros: bool = False,
        **base_options: Any,
    ) -> None:
        if adaptive not in ("weights", "all"):
            raise ValueError(f'ASAM: adaptive must be "weights" or "all", got {adaptive!r}')
        self._per_worker, self._adaptive = bool(per_worker), adaptive
        options = {"rho": rho, "eta": eta}
        super().__init__(
            *(params, base_optimizer, base_options), model=model, group_options=options, keep_zeros=keep_zeros
        )

    def _eta(self, param: Tensor, group: dict[str, Any]) -> float:
        return float(group["eta"]) if self._adaptive == "all" or param.dim() >= 2 else -1.0
