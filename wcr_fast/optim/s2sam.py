"""Single-step SAM: S2SAM."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.ops.perturb import local_grad
from wcr_fast.ops.sharded import local
from wcr_fast.optim.perturbed import ParamsT, PerturbedOptimizer, is_enabled


class S2SAM(PerturbedOptimizer):
    """Single-step SAM: perturbs along the gradient of the step before, so a step costs one forward and backward pass.

        e = rho h / (||h|| + 1e-12),    h <- grad L(w + e),    w <- base step by h, from w

    h is the gradient of the last step, taken at its own perturbed weights; the first step is the base optimizer's.
    Two copies of the weights (h and the weights while they are perturbed).

    Weights are perturbed before the forward pass: by ``step(closure)``; by ``first_step()``; or, where ``model`` is
    given, by its forward pass in training mode, so that loops which know nothing of it (a Hugging Face Trainer) need no
    change. ``step()`` puts them back. With gradient accumulation that spans the whole window. Batch-norm statistics are
    those of perturbed weights: there is no other pass.

    Args:
        params, base_optimizer, rho, keep_zeros, base_options: as in :class:`SAM`.
        model: perturb when it is called in training mode with gradients enabled, until :meth:`remove`: the module that
            the loop calls, a compiled or parallel one where there is one. Not taken from ``params``.

    Source: Ji et al., NeurIPS 2024, openreview MJgMMqMDu4 (rho = 0.05). The public code tests ``p.grad`` where it means
    the stored gradient and so perturbs nothing under torch 2 and later.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(3, 4)).square().mean().backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | None = None,
        *,
        rho: float = 0.05,
        model: nn.Module | None = None,
        keep_zeros: bool = False,
        **base_options: Any,
    ) -> None:
        self._previous: dict[Tensor, Tensor] = {}  # gradients of the last step, laid out as the parameters
        self._on_forward = model is not None
        super().__init__(
            *(params, base_optimizer, base_options), model=model, group_options={"rho": rho}, keep_zeros=keep_zeros
        )
        self._hook_model()

    def _hook_model(self) -> None:
        self._hook, self._warned_bypass = None, False
        if self._on_forward:
            # Before FSDP gathers the weights.
            self._hook = self._model.register_forward_pre_hook(_PerturbOnForward(self), prepend=True)

    def remove(self) -> None:
        """Leave the model's forward pass alone from now on, with the weights put back."""
        self.restore()
        self._on_forward = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @torch._disable_dynamo
    def first_step(self) -> None:
        """Perturb the weights along the last step's gradient, before the forward pass."""
        owned = [p for p in self._params() if p in self._previous and p.requires_grad]
        self._ascend({p: local(self._previous[p]).to(local(p).device) for p in owned})

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Put the weights back and take one step by the gradients.

        Args:
            closure: zeroes the gradients, runs forward and backward at the perturbed weights, returns the loss.
                Without it the gradients are taken as they are.
            scaler: a GradScaler by which the closure scales its loss; then call ``scaler.update()``. Without a closure
                ``scaler.step(optimizer)`` does the same.

        Returns:
            What the closure returned.
        """
        if closure is None and is_enabled(scaler):
            self._step_again(scaler)
            return None
        loss = None
        if closure is not None:
            self._refuse_closure()
            if not self.perturbed:
                self.first_step()
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self._restore({})
        elif self._on_forward and self._previous and not self.perturbed:
            self._warn_of_bypass()
        self._restore({})
        self._step_base(scaler)
        return loss

    def _warn_of_bypass(self) -> None:
        if not self._warned_bypass:
            self._warned_bypass = True
            warnings.warn(
                "S2SAM: no training forward pass of the model has perturbed the weights before this step: give the "
                "module that the loop calls (model=torch.compile(model), model=DistributedDataParallel(model))",
                stacklevel=4,
            )

    @torch._disable_dynamo
    def second_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Put the weights back and take one step by the gradients, as ``step(scaler=scaler)`` does."""
        self._step_again(scaler)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def _descend(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        if found_inf is None or not float(found_inf):  # after an overflow the last finite gradient stays
            self._remember()
        super()._descend(scale, found_inf)

    def _remember(self) -> None:
        grads = {}
        for p in self._params():
            grad = local_grad(p)
            if grad is not None:
                grads[p] = grad
                if p not in self._previous:
                    self._previous[p] = torch.empty_like(p.detach(), dtype=grad.dtype)
            else:
                self._previous.pop(p, None)
        if grads:
            torch._foreach_copy_([local(self._previous[p]) for p in grads], list(grads.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hook_model()  # of the copied model, whose hooks left this behind

    def _own_state(self) -> dict[str, Any]:
        return {"previous": {i: self._previous[p] for i, p in enumerate(self._params()) if p in self._previous}}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        params = list(self._params())
        self._previous = {
            params[int(i)]: torch.empty_like(params[int(i)].detach(), dtype=h.dtype).copy_(h)
            for i, h in state.get("previous", {}).items()
        }


class _PerturbOnForward:
    """A forward pre-hook; copies and pickles of the model leave the optimizer behind."""

    def __init__(self, optimizer: S2SAM | None = None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and module.training and torch.is_grad_enabled() and not optimizer.perturbed:
            optimizer.first_step()

    def __reduce__(self) -> tuple[type[_PerturbOnForward], tuple[()]]:
        return _PerturbOnForward, ()
