"""Optimizers whose gradient is taken at perturbed weights: what SAM, ASAM, CrAM and S2SAM share.

They wrap a torch optimizer, perturb its parameters in place, and put them back by copying, bit for bit, before it
steps. Parameter groups and states are the wrapped optimizer's own objects, so schedulers may hold either of the two.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.ops.perturb import ascend_, restore_, squares
from wcr_fast.ops.sharded import local, reshard
from wcr_fast.optim.passes import FrozenStatistics
from wcr_fast.slots import Site
from wcr_fast.torch_path.layout import is_dense, same_layout
from wcr_fast.weights import check_plain

ParamsT = nn.Module | torch.optim.Optimizer | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Under this key a state_dict holds what is not the wrapped optimizer's.
OWN_STATE = "wcr_fast"

_HOOKS = ("_optimizer_", "_zero_grad", "_patched", "_warned")


class _Pass:
    """One pass as a GradScaler sees it: an optimizer of its own, with the same parameters."""

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: PerturbedOptimizer) -> None:
        self._optimizer = weakref.proxy(optimizer)  # a cycle would keep the copies of the weights for a while

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
        taken = [option for option in group_options if option in self.base_optimizer.defaults]
        if taken:
            raise ValueError(
                f"{name}: {type(self.base_optimizer).__name__} has an option {taken[0]!r} of its own in its groups, "
                "where this one's would be: wrap another optimizer"
            )
        _check_model(name, self._model)
        self._fill_groups()
        self._check_params()
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
        self._zeroed: dict[Tensor, tuple[int, int]] = {}  # gradients as the last zero_grad() left them

    # --- groups and states are those of the wrapped optimizer ---------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; ``rho`` is an option of each."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's states."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: Any) -> None:
        self.base_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; ``rho`` may be one of its options."""
        for option in self._group_options:
            if option in param_group:
                _check_option(type(self).__name__, option, param_group[option])
        self.base_optimizer.add_param_group(param_group)
        self._fill_groups()
        self._check_params()

    def _fill_groups(self) -> None:
        """Give groups the options that they lack: the base optimizer may have got some behind this one's back."""
        for group in self.param_groups:
            for option, value in self._group_options.items():
                _check_option(type(self).__name__, option, group.setdefault(option, value))

    def _check_params(self) -> None:
        for p in self._params():
            if not p.is_floating_point():
                raise TypeError(f"{type(self).__name__}: parameters must be real numbers, got {p.dtype}")
            check_plain(p, f"{type(self).__name__}: a parameter", sharded=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        self.base_optimizer.zero_grad(set_to_none)
        self._zeroed = {p: (id(p.grad), p.grad._version) for p in self._params() if p.grad is not None}

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
        self._fill_groups()
        sites = [
            Site(p, local(p).detach(), self._room_for(p), _radius(group), self._eta(p, group))
            for group in self.param_groups
            for p in group["params"]
            if p in directions
        ]
        along = [directions[site.param] for site in sites]
        hold = getattr(self.base_optimizer, "_moments_hold", None)
        self._known = hold is not None and hold()
        length = squares(sites, along, self._keep_zeros) if sites and (normalised or self._scaled) else None
        if self._scaled:
            self._note_overflow(length)
        self._sites = []
        ascend_(sites, along, length if normalised else None, self._keep_zeros, self._sites)
        self._let_go_of_copies()

    def _let_go_of_copies(self) -> None:
        """See that the next forward pass reads the weights as they are."""
        torch.clear_autocast_cache()
        if self._model is not None:  # FSDP2 may have left gathered weights for it
            reshard(self._model)

    def _room_for(self, p: Tensor) -> Tensor:
        """Return the place of a weight's copy: the same from step to step, as a captured graph needs it."""
        weight, room = local(p).detach(), self._room.get(p)
        fits = room is not None and (room.dtype, room.device) == (weight.dtype, weight.device)
        if not fits or room.shape != weight.shape or (is_dense(weight) and not same_layout(room, weight)):
            room = self._room[p] = torch.empty_like(weight)
        return room

    def restore(self) -> None:
        """Put the weights back, bit for bit, if they are perturbed, and forget of the step that was begun.

        Running statistics may move again.
        """
        self._restore({})
        self._overflow, self._passed = None, 0

    @torch.no_grad()
    def _restore(self, masked: Mapping[Tensor, Tensor]) -> None:
        """Put the weights back; gradients among ``masked`` become zero where their weight is zero now."""
        sites = self._sites
        try:
            if sites:
                restore_(sites, [masked.get(site.param) for site in sites] if masked else None)
                self._let_go_of_copies()
                if self._known:
                    self.base_optimizer._weights_restored()
            self._sites = None
        finally:
            self._statistics.thaw()

    # --- the step of the wrapped optimizer ---------------------------------------------------------------------

    _scaled = False  # by a GradScaler: overflows matter

    @contextlib.contextmanager
    def _unscaled(self, scaler: Any) -> Iterator[None]:
        """Unscale the gradients of a first pass, and let the scaler know of its overflow."""
        if is_enabled(scaler):
            if self._passed == len(self._first_passes):
                self._first_passes.append(_Pass(self))
            scaler.unscale_(self._first_passes[self._passed])
            self._passed += 1
            self._scaled = True
        try:
            yield
        finally:
            self._scaled = False

    def _note_overflow(self, length: Tensor | None) -> None:
        if length is None:  # no gradient here, but perhaps on another worker
            length = torch.zeros((), device=local(next(self._params())).device)
        overflow = ~torch.isfinite(length.sum())
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    @torch.no_grad()
    def _descend(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Let the wrapped optimizer step, unless a scaler found an overflow in any of the passes."""
        base, overflow = self.base_optimizer, self._overflow
        self._overflow, self._passed = None, 0
        if scale is not None:  # here, not in the base's own step: its hooks are promised the gradients unscaled
            grads = [local(p.grad) for p in self._params() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, _inverse(scale))
        if found_inf is None:
            base.step()
            return
        if not isinstance(found_inf, Tensor):  # no gradient at all
            found_inf = torch.tensor(float(found_inf))
        if overflow is not None:
            found_inf = torch.maximum(found_inf.to(overflow.device), overflow.to(found_inf.dtype))
        if getattr(base, "_step_supports_amp_scaling", False):
            base.grad_scale, base.found_inf = None, found_inf
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf
        elif not found_inf.item():
            base.step()

    def _step_base(self, scaler: Any) -> None:
        """Step after ``step(closure)``, whose gradients nobody else has seen, or without a scaler."""
        if is_enabled(scaler):
            scaler.step(self._second_pass)
        else:
            self._descend(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _step_again(self, scaler: Any) -> None:
        """Call ``step()``, by way of the scaler where there is one: it knows whether gradients were unscaled."""
        try:
            if is_enabled(scaler):
                scaler.step(self)
            else:
                self.step()
        finally:
            self._restore({})
        self._opt_called = True  # torch's schedulers ask, where only second_step() is called

    def _refuse_closure(self) -> None:
        """Raise where a GradScaler has passed a closure on: it looks for overflows before there are gradients."""
        if getattr(self, "found_inf", None) is not None:
            del self.found_inf, self.grad_scale
            raise RuntimeError(
                f"{type(self).__name__}: a GradScaler can't pass a closure: step(closure, scaler=scaler)"
            )

    # --- saving and loading ------------------------------------------------------------------------------------

    def _refuse_perturbed(self) -> None:
        if self.perturbed:
            raise RuntimeError(f"{type(self).__name__}: the weights are perturbed: second_step() or restore() first")

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Register a hook of the wrapped optimizer's, as the three that follow do."""
        return self.base_optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return self.base_optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return self.base_optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return self.base_optimizer.register_load_state_dict_post_hook(hook, prepend)

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
        self._refuse_perturbed()
        return {**self.base_optimizer.state_dict(), OWN_STATE: self._own_state()}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this optimizer, or one of the wrapped optimizer alone; tensors are copied.

        Raises:
            RuntimeError: the weights are perturbed: what was loaded into them would be lost when they are put back.
        """
        self._refuse_perturbed()
        loaded = dict(state_dict)
        own = loaded.pop(OWN_STATE, {})
        self.base_optimizer.load_state_dict(loaded)
        self._fill_groups()
        self._load_own_state(own)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed()
        left = ("_sites", "_room", "_known", "_statistics", "_first_passes", "_second_pass", "_passed", "_overflow")
        left += ("_zeroed", "grad_scale", "found_inf")
        return {k: v for k, v in self.__dict__.items() if k not in left and not k.startswith(_HOOKS) and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
        super().__setstate__({})


def is_enabled(scaler: Any) -> bool:
    """Tell whether there is a GradScaler at work."""
    return scaler is not None and scaler.is_enabled()


def _inverse(scale: Tensor) -> float | Tensor:
    inverse = scale.double().reciprocal().float()
    return inverse.item() if inverse.device.type == "cpu" else inverse


def _check_model(optimizer: str, model: nn.Module | None) -> None:
    for module in () if model is None else model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(f"{optimizer}: the model is sharded by FSDP1, whose shards can't be told apart: use FSDP2")


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
