"""Optimizers that evaluate each batch twice: what SAM, ASAM and CrAM share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wcr_fast.ops.perturb import local_grad
from wcr_fast.optim.passes import RandomState
from wcr_fast.optim.perturbed import PerturbedOptimizer, is_enabled


class TwoPassOptimizer(PerturbedOptimizer):
    """Base of the methods that evaluate each batch twice, at the weights and at perturbed ones."""

    _per_worker = False

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Take one step: evaluate at the weights, perturb, evaluate again, restore, and step by the second gradient.

        Args:
            closure: zeroes the gradients (or ``zero_grad()`` came before the step), runs forward and backward, and
                returns the loss. It is called twice, with the same random numbers. Without it the step completes what
                ``first_step`` or ``accumulate`` began.
            scaler: a GradScaler by which the closure scales its loss; call ``scaler.update()`` afterwards. The step
                is skipped where either pass overflows.

        Returns:
            What the closure returned at the weights as they are.

        Raises:
            RuntimeError: without a closure, when there is nothing to complete; when the closure adds to gradients of
                before.
        """
        if closure is None:
            if not self.perturbed and not self._ready:
                raise RuntimeError(
                    f"{type(self).__name__}: step() needs a closure that runs forward and backward, to call it twice "
                    "(or first_step() before); a trainer that calls step() without one can't run this optimizer: see "
                    "S2SAM(..., model=model)"
                )
            if is_enabled(scaler):
                self._step_again(scaler)
                return None
            try:
                self._return(getattr(self, "grad_scale", None))
            finally:
                self._restore({})
            self._ready = False
            self._step_base(None)
            return None
        self._refuse_closure()
        loss = self._evaluate_twice(closure, scaler)
        self._ready = False
        self._step_base(scaler)
        return loss

    @torch._disable_dynamo
    def first_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Perturb the weights along the gradients of a first pass, scaled ones where there is a scaler.

        Then run the second pass, on the same batch, and call ``second_step``. Dropout draws anew in it.
        """
        with self._unscaled(scaler):
            self._perturb()
        self._statistics.freeze(self._model)
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    def second_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Restore the weights and let the wrapped optimizer step by the gradients of the second pass.

        Raises:
            RuntimeError: the weights are not perturbed.
        """
        if not self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: second_step() without first_step() before it")
        self._step_again(scaler)
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    def accumulate(self, closure: Callable[[], Any], *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Evaluate one micro-batch twice, with a perturbation of its own, and add its gradient to ``.grad``.

        ``step()`` (with a scaler ``scaler.step(optimizer)``) then takes the step. For one perturbation of the whole
        batch let the closure of ``step`` run over all micro-batches instead.

        Returns:
            What the closure returned at the weights as they are.
        """
        # Copies: the gradients may lie in a bucket that the next backward pass writes to.
        earlier = {p: p.grad.clone() for p in self._params() if p.grad is not None} if self._ready else {}
        self.zero_grad()
        try:
            loss = self._evaluate_twice(closure, scaler, unscale=False)
        except BaseException:
            self.zero_grad()
            for p, grad in earlier.items():
                p.grad = grad
            raise
        for p, grad in earlier.items():
            p.grad = grad if p.grad is None else grad.add_(p.grad)
        self._ready = True
        return loss

    def _begin(self) -> None:
        super()._begin()
        self._ready = False  # gradients of second passes wait for a step

    def _evaluate_twice(self, closure: Callable[[], Any], scaler: Any, *, unscale: bool = True) -> Any:
        if self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: the weights are perturbed already: second_step() or restore()")
        random, overflow = RandomState(self._params()), self._overflow
        there = {p: p.grad for p in self._params() if p.grad is not None and not self._is_zeroed(p)}
        self._zeroed = {}
        with torch.enable_grad(), self._local_gradients():
            loss = closure()
        if there and not self._zeroed and any(p.grad is grad for p, grad in there.items()):
            raise RuntimeError(
                f"{type(self).__name__}: there were gradients before the step, and its closure added to them: call "
                "optimizer.zero_grad() in the closure or before the step; to gather those of several micro-batches "
                "call accumulate(closure) for each, or let one closure run over all of them"
            )
        try:
            with self._unscaled(scaler):
                self._perturb()
            self._statistics.freeze(self._model)
            self.zero_grad()
            random.replay()
            with torch.enable_grad():
                closure()
            scale = None
            if is_enabled(scaler):
                if unscale:
                    scaler.unscale_(self._second_pass)
                else:
                    scale = scaler.scale(torch.ones((), device=next(self._params()).device))
            self._return(scale)
        except BaseException:
            self._overflow = overflow
            raise
        finally:
            self._restore({})
        return loss

    def _is_zeroed(self, p: Tensor) -> bool:
        """Tell whether zero_grad() left this gradient, and nothing was added to it since."""
        return self._zeroed.get(p) == (id(p.grad), p.grad._version)

    def _local_gradients(self) -> contextlib.AbstractContextManager:
        """Return a context in which backward leaves each worker its own gradients, where that is wanted."""
        parallel = self._parallel()
        return contextlib.nullcontext() if parallel is None else parallel.no_sync()

    def _parallel(self) -> torch.nn.parallel.DistributedDataParallel | None:
        """Return the module whose workers perturb by gradients of their own, None where all do alike."""
        if not self._per_worker or self._model is None or not torch.distributed.is_available():
            return None
        kind = torch.nn.parallel.DistributedDataParallel
        parallel = next((m for m in self._model.modules() if isinstance(m, kind)), None)  # it may be compiled
        if parallel is not None and parallel.static_graph:
            raise RuntimeError(
                f"{type(self).__name__}: DistributedDataParallel with static_graph=True can't leave gradients local: "
                "give per_worker=False"
            )
        return parallel

    def _note_overflow(self, length: Tensor | None) -> None:
        super()._note_overflow(length)
        parallel = self._parallel()
        if parallel is not None:  # whoever overflows, all skip the step
            flag = self._overflow.to(torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=parallel.process_group)
            self._overflow = flag > 0

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Return the local gradients there are."""
        try:
            found = {p: local_grad(p) for p in self._params()}
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        return {p: grad for p, grad in found.items() if grad is not None}

    def _perturb(self) -> None:
        """Perturb the weights by the gradients of the first pass."""
        self._ascend(self._gradients())

    def _return(self, scale: Tensor | None) -> None:
        """Come back from the perturbed weights, with the gradient that the wrapped optimizer is to step by.

        scale: what the second gradients are multiplied by still; the first ones were unscaled.
        """
        self._restore({})
