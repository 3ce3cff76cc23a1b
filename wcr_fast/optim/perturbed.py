"""Optimizers whose gradient is taken at perturbed weights: what SAM, ASAM, CrAM and S2SAM share.

They wrap a torch optimizer, perturb its parameters in place, and put them back by copying, bit for bit, before it
steps. Parameter groups and states are the wrapped optimizer's own objects, so schedulers may hold either of the two.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.ops.perturb import ascend_, local_grad, restore_, squares
from wcr_fast.ops.sharded import local
from wcr_fast.optim.passes import FrozenStatistics, RandomState
from wcr_fast.slots import Site
from wcr_fast.torch_path.layout import is_dense, same_layout

ParamsT = nn.Module | torch.optim.Optimizer | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Under this key a state_dict holds what is not the wrapped optimizer's.
OWN_STATE = "wcr_fast"

_HOOKS = ("_optimizer_", "_zero_grad", "_patched", "_warned")


class _Pass:
    """One pass as a GradScaler sees it: an optimizer of its own, with the same parameters."""

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: PerturbedOptimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        self._optimizer._descend(self.grad_scale, self.found_inf)


class PerturbedOptimizer(torch.optim.Optimizer):
    """Base of :class:`SAM`, :class:`ASAM`, :class:`CrAM`, :class:`CrAMPlus` and :class:`S2SAM`; not for its own use.

    Attributes:
        base_optimizer: the wrapped optimizer. Hooks on its ``step`` see the final gradient at the restored weights:
            the place for clipping. ``attach`` of a regularizer goes there by itself.
    """

    # A GradScaler then calls step() on overflow, too: weights are put back whatever happens.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | None,
        base_options: Mapping[str, Any],
        *,
        model: nn.Module | None,
        group_options: Mapping[str, float],
        keep_zeros: bool,
    ) -> None:
        name = type(self).__name__
        for option, value in group_options.items():
            _check_option(name, option, value)
        self._group_options, self._keep_zeros = dict(group_options), bool(keep_zeros)
        self._model = params if model is None and isinstance(params, nn.Module) else model
        self.base_optimizer = _wrapped(name, params, base_optimizer, base_options)
        self._fill_groups()
        self._begin()
        super().__setstate__({})  # torch's hooks, without groups and states of its own

    def _begin(self) -> None:
        """Be as between two steps."""
        self._sites: list[Site] | None = None  # of the parameters that are perturbed now
        self._room: dict[Tensor, Tensor] = {}
        self._known = False  # the wrapped optimizer knew the weights' moments before they were perturbed
        self._statistics = FrozenStatistics()
        # A scaler knows passes by their ids until it updates: they are kept.
        self._first_passes: list[_Pass] = []
        self._second_pass = _Pass(self)
        self._passed = 0  # first passes since the last step
        self._overflow: Tensor | None = None  # one of them had one

    # --- groups and states are those of the wrapped optimizer ---------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; ``rho`` is an option of each."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's states."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.base_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; ``rho`` may be one of its options."""
        for option in self._group_options:
            if option in param_group:
                _check_option(type(self).__name__, option, param_group[option])
        self.base_optimizer.add_param_group(param_group)
        self._fill_groups()

    def _fill_groups(self) -> None:
        for group in self.param_groups:
            for option, value in self._group_options.items():
                _check_option(type(self).__name__, option, group.setdefault(option, value))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        self.base_optimizer.zero_grad(set_to_none)

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    # --- there and back ----------------------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether the weights are perturbed now."""
        return self._sites is not None

    def _eta(self, param: Tensor, group: dict[str, Any]) -> float:
        """Return eta for a parameter whose perturbation is scaled by |w| + eta, a negative number for the others."""
        return -1.0

    @torch.no_grad()
    def _ascend(self, directions: Mapping[Tensor, Tensor], *, normalised: bool = True) -> None:
        """Perturb the parameters along local directions."""
        if self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: the weights are perturbed already: second_step() or restore()")
        sites = [
            Site(p, local(p).detach(), self._room_for(p), _radius(group), self._eta(p, group))
            for group in self.param_groups
            for p in group["params"]
            if p in directions
        ]
        along = [directions[site.param] for site in sites]
        hold = getattr(self.base_optimizer, "_moments_hold", None)
        self._known = hold is not None and hold()
        self._sites = []
        if sites:
            length = squares(sites, along, self._keep_zeros) if normalised or self._scaled else None
            if self._scaled:
                self._note_overflow(length)
            ascend_(sites, along, length if normalised else None, self._keep_zeros)
            self._sites = sites
        torch.clear_autocast_cache()  # else the next forward pass takes the copies of the weights as they were

    def _room_for(self, p: Tensor) -> Tensor:
        """Return the place of a weight's copy: the same from step to step, as a captured graph needs it."""
        weight, room = local(p).detach(), self._room.get(p)
        fits = room is not None and (room.dtype, room.device) == (weight.dtype, weight.device)
        if not fits or room.shape != weight.shape or (is_dense(weight) and not same_layout(room, weight)):
            room = self._room[p] = torch.empty_like(weight)
        return room

    def restore(self) -> None:
        """Put the weights back, bit for bit, if they are perturbed; running statistics may move again."""
        self._restore({})

    @torch.no_grad()
    def _restore(self, masked: Mapping[Tensor, Tensor]) -> None:
        """Put the weights back; gradients among ``masked`` become zero where their weight is zero now."""
        sites, self._sites = self._sites, None
        try:
            if sites:
                restore_(sites, [masked.get(site.param) for site in sites] if masked else None)
                torch.clear_autocast_cache()
                if self._known:
                    self.base_optimizer._weights_restored()
        finally:
            self._statistics.thaw()

    # --- the step of the wrapped optimizer ---------------------------------------------------------------------

    _scaled = False  # by a GradScaler: overflows matter

    @contextlib.contextmanager
    def _unscaled(self, scaler: Any) -> Iterator[None]:
        """Unscale the gradients of a first pass, and let the scaler know of its overflow."""
        if scaler is not None and scaler.is_enabled():
            if self._passed == len(self._first_passes):
                self._first_passes.append(_Pass(self))
            scaler.unscale_(self._first_passes[self._passed])
            self._passed += 1
            self._scaled = True
        try:
            yield
        finally:
            self._scaled = False

    def _note_overflow(self, length: Tensor) -> None:
        overflow = ~torch.isfinite(length.sum())
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    @torch.no_grad()
    def _descend(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Let the wrapped optimizer step, unless a scaler found an overflow in any of the passes."""
        base, overflow = self.base_optimizer, self._overflow
        self._overflow, self._passed = None, 0
        if found_inf is None:
            base.step()
            return
        if overflow is not None:
            found_inf = torch.maximum(found_inf, overflow.to(found_inf))
        if getattr(base, "_step_supports_amp_scaling", False):
            base.grad_scale, base.found_inf = scale, found_inf
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf
        elif not found_inf.item():
            if scale is not None:
                grads = [local(p.grad) for p in self._params() if p.grad is not None]
                torch._foreach_mul_(grads, scale.double().reciprocal().float().item())
            base.step()

    def _step_base(self, scaler: Any) -> None:
        if scaler is not None and scaler.is_enabled():
            scaler.step(self._second_pass)
        else:
            self._descend(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        self._opt_called = True  # torch's schedulers ask, where only second_step() is called

    # --- saving and loading ------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        """Return the method's own state: tensors and plain values."""
        return {}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`_own_state`, or an empty one."""

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state_dict, with the method's own state under ``"wcr_fast"``.

        Raises:
            RuntimeError: the weights are perturbed: a checkpoint would hold them so.
        """
        if self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: the weights are perturbed: second_step() or restore() first")
        return {**self.base_optimizer.state_dict(), OWN_STATE: self._own_state()}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this optimizer, or one of the wrapped optimizer alone; tensors are copied."""
        loaded = dict(state_dict)
        own = loaded.pop(OWN_STATE, {})
        self.base_optimizer.load_state_dict(loaded)
        self._fill_groups()
        self._load_own_state(own)

    def __getstate__(self) -> dict[str, Any]:
        if self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: the weights are perturbed: second_step() or restore() first")
        left = ("_sites", "_room", "_known", "_statistics", "_first_passes", "_second_pass", "_passed", "_overflow")
        return {k: v for k, v in self.__dict__.items() if k not in left and not k.startswith(_HOOKS) and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
        super().__setstate__({})


class TwoPassOptimizer(PerturbedOptimizer):
    """Base of the methods that evaluate each batch twice, at the weights and at perturbed ones."""

    _per_worker = False

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: torch.amp.GradScaler | None = None) -> Any:
        """Take one step: evaluate at the weights, perturb, evaluate again, restore, and step by the second gradient.

        Args:
            closure: zeroes or leaves the gradients, runs forward and backward, and returns the loss. It is called
                twice, with the same random numbers. Without it the step completes what ``first_step`` or
                ``accumulate`` began.
            scaler: a GradScaler by which the closure scales its loss; call ``scaler.update()`` afterwards. The step
                is skipped where either pass overflows.

        Returns:
            What the closure returned at the weights as they are.

        Raises:
            RuntimeError: without a closure, when there is nothing to complete.
        """
        if closure is None:
            if not self.perturbed and not self._ready:
                raise RuntimeError(
                    f"{type(self).__name__}: step() needs a closure that runs forward and backward, to call it twice "
                    "(or first_step() before); a trainer that calls step() without one can't run this optimizer: see "
                    "S2SAM(..., model=model)"
                )
            self._return(getattr(self, "grad_scale", None))
            self._ready = False
            self._step_base(scaler)
            return None
        if getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__}: a GradScaler can't pass a closure: step(closure, scaler=scaler)"
            )
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
        try:
            if scaler is not None and scaler.is_enabled():
                scaler.step(self)  # which calls step(): the gradients may have been unscaled already
            else:
                self.step()
        finally:
            self.restore()
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
        earlier = {p: p.grad for p in self._params() if p.grad is not None} if self._ready else {}
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
        with torch.enable_grad(), self._local_gradients():
            loss = closure()
        try:
            with self._unscaled(scaler):
                self._perturb()
            self._statistics.freeze(self._model)
            self.zero_grad()
            random.replay()
            with torch.enable_grad():
                closure()
            scale = None
            if scaler is not None and scaler.is_enabled():
                if unscale:
                    scaler.unscale_(self._second_pass)
                else:
                    scale = scaler.scale(torch.ones((), device=next(self._params()).device))
            self._return(scale)
        except BaseException:
            self._overflow = overflow
            raise
        finally:
            self.restore()
        return loss

    def _local_gradients(self) -> contextlib.AbstractContextManager:
        """Return a context in which backward leaves each worker its own gradients, where that is wanted."""
        return self._model.no_sync() if self._workers() is not None else contextlib.nullcontext()

    def _workers(self) -> Any:
        """Return the process group whose workers perturb by gradients of their own, None where all do alike."""
        if not self._per_worker or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        parallel = isinstance(self._model, torch.nn.parallel.DistributedDataParallel)
        return self._model.process_group if parallel else None

    def _note_overflow(self, length: Tensor) -> None:
        super()._note_overflow(length)
        if self._workers() is not None:  # whoever overflows, all skip the step
            flag = self._overflow.to(torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._workers())
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
        self.restore()


def _radius(group: Mapping[str, Any]) -> float:
    return -float(group["rho"]) if group.get("maximize") else float(group["rho"])


def _check_option(optimizer: str, option: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{optimizer}: {option} must be a finite number >= 0, got {value!r}")


def _wrapped(
    name: str,
    params: ParamsT,
    base_optimizer: type[torch.optim.Optimizer] | None,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Return the optimizer to wrap: the one given, or one of a class with its options."""
    if isinstance(params, torch.optim.Optimizer):
        if base_optimizer is not None or options:
            given = ["a second optimizer"] if base_optimizer is not None else sorted(options)
            raise TypeError(f"{name}: {type(params).__name__} is built already, it takes no {', '.join(given)}")
        base = params
    else:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
            raise TypeError(
                f"{name}: base_optimizer must be a class such as torch.optim.SGD, with its options behind it "
                f"({name}(model, torch.optim.SGD, lr=0.1)), or give a built optimizer alone, got {base_optimizer!r}"
            )
        base = base_optimizer(params.parameters() if isinstance(params, nn.Module) else params, **options)
    if isinstance(base, PerturbedOptimizer):
        raise TypeError(f"{name}: {type(base).__name__} perturbs weights itself and can't be wrapped")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{name}: {type(base).__name__} evaluates the model itself and can't be wrapped")
    return base
