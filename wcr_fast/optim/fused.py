"""What SGD and AdamW share: the penalty's weights, states and their dtypes, and what each step is told.

A step on a GPU is one launch per kind of arrays. It uses the moments of the weights that the step before left behind,
so whoever writes a weight in between has to be noticed: a raised version counter, a moved or replaced tensor and a
loaded state cost one more pass over the weights; a write that leaves no trace (``.data``, numpy, other fused
optimizers) is found by the step itself, which compares what it reads with what was stored, and is warned about.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from wcr_fast import regularizers
from wcr_fast.backend import active_backend, use_triton
from wcr_fast.ops.moments import stats_of
from wcr_fast.ops.sharded import aligned, is_sharded, local, merged_stats
from wcr_fast.optim.watch import Watch, watch
from wcr_fast.regularizers import Regularizer
from wcr_fast.slots import STATE_NAMES, Penalty, Rule, Slot, Step
from wcr_fast.table import capturing, keep_for_graph
from wcr_fast.torch_path.layout import is_dense, same_layout
from wcr_fast.torch_path.step import PlainStep, step_
from wcr_fast.weights import Exclude, Excluder

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
PenaltyT = Regularizer | type[Regularizer] | str | None

PENALTIES: dict[str, type[Regularizer]] = {
    kind.family: kind
    for kind in vars(regularizers).values()
    if isinstance(kind, type) and issubclass(kind, Regularizer) and kind.family
}
_version = attrgetter("_version")

MASTERS = (None, "float32", "remainder")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of :class:`wcr_fast.optim.SGD` and :class:`wcr_fast.optim.AdamW`; not for use of its own."""

    algorithm: ClassVar[str]
    # Gradient scalers hand scale and overflow over as tensors: the step unscales, or does nothing, on the device.
    _step_supports_amp_scaling = True

    def _prepare(
        self,
        params: ParamsT,
        *,
        penalty: PenaltyT,
        lam: float | Tensor | None,
        exclude: Exclude,
        state_dtype: torch.dtype | None,
        master: str | None,
        stochastic_rounding: bool,
        differentiable: bool,
        decoupled: bool = False,
    ) -> ParamsT:
        """Check and keep what torch's constructor doesn't know; return the parameters as a list."""
        name = type(self).__name__
        if differentiable:
            raise ValueError(f"{name}: differentiable=True needs autograd through the step: use torch.optim.{name}")
        if master not in MASTERS:
            raise ValueError(f"{name}: master must be None, 'float32' or 'remainder', got {master!r}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"{name}: state_dtype must be float32, bfloat16, float16 or None, got {state_dtype}")
        if stochastic_rounding and master:
            raise ValueError(f"{name}: with master weights nothing is lost in rounding: drop stochastic_rounding")
        if isinstance(penalty, str) and penalty not in PENALTIES:
            raise ValueError(f"{name}: no penalty is called {penalty!r}; there are {', '.join(PENALTIES)}")
        built = isinstance(penalty, Regularizer)
        if not (penalty is None or built or isinstance(penalty, str)) and not (
            isinstance(penalty, type) and issubclass(penalty, Regularizer)
        ):
            raise TypeError(f"{name}: penalty must be a regularizer, its class or its name, got {penalty!r}")
        if penalty is None and (lam is not None or decoupled):
            raise ValueError(f"{name}: lam and decoupled need a penalty")
        if Excluder(exclude) and (penalty is None or built):
            raise ValueError(f"{name}: exclude goes with a penalty's class or name; give it to the regularizer instead")
        self._asked = PENALTIES[penalty] if isinstance(penalty, str) else penalty
        self._exclude = exclude
        self._lam = lam
        self._mode = "decoupled" if decoupled else "coupled"
        self._state_dtype, self._master, self._stochastic = state_dtype, master, bool(stochastic_rounding)
        self._seed = torch.initial_seed() & 0xFFFFFFFF
        self._masks: dict[Tensor, Tensor] = {}
        self._regularizer: Regularizer | None = None
        self._ready = False
        self._forget()
        return params if isinstance(params, Tensor) else list(params)

    def _finish(self) -> None:
        self._ready = True
        self.defaults["lam"] = self._lam
        self._check_groups()
        self._resolve_penalty()

    @property
    def penalty(self) -> Regularizer | None:
        """The regularizer whose gradient is part of the step."""
        return self._regularizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; ``lam`` may be one of its options."""
        param_group.setdefault("lam", self._lam)
        if self._stochastic:
            param_group.setdefault("seed", self._seed)
        super().add_param_group(param_group)
        if self._ready:
            self._check_groups()
            self._resolve_penalty()
            self._forget()

    def _check_groups(self) -> None:
        name = type(self).__name__
        for number, group in enumerate(self.param_groups):
            lam = group["lam"]
            if lam is not None and self._asked is None:
                raise ValueError(f"{name}: group {number} has lam={lam}, but there is no penalty")
            if isinstance(lam, Tensor) and lam.dim() != 0:
                raise ValueError(f"{name}: lam must be a number or a 0-d tensor, got {lam.dim()}-d")
            if lam is not None and not isinstance(lam, Tensor) and not abs(float(lam)) < float("inf"):
                raise ValueError(f"{name}: lam must be finite, got {lam}")
            for p in group["params"]:
                if not p.is_floating_point() or p.element_size() < 2:
                    raise TypeError(f"{name}: parameters must be float16, bfloat16, float32 or float64, got {p.dtype}")
                if self._master == "remainder" and p.dtype not in (torch.bfloat16, torch.float32):
                    raise TypeError(f"{name}: master='remainder' is the rest of a bfloat16 weight, got {p.dtype}")
                if p.dtype == torch.float64 and self._state_dtype is not None:
                    raise TypeError(f"{name}: float64 weights keep float64 state: leave state_dtype out")

    def _resolve_penalty(self) -> None:
        """Build the regularizer where only its class is known, and see that it has weights here."""
        name = type(self).__name__
        params = [p for group in self.param_groups for p in group["params"]]
        if self._asked is None:
            return
        if isinstance(self._asked, Regularizer):
            self._regularizer = self._asked
        else:
            chosen = self._named_choice()
            if not chosen:
                raise ValueError(
                    f"{name}: no parameter has two or more dimensions and requires a gradient: nothing to penalise"
                )
            self._regularizer = self._asked(chosen)
        owned = {id(p) for p in params}
        if not any(id(w.current()) in owned for w in self._regularizer._choice.weights):
            raise ValueError(
                f"{name} owns none of the weights of this {type(self._regularizer).__name__}; build it on the same "
                "parameters, and after anything that replaces them (fully_shard, load_state_dict(assign=True))"
            )

    def _named_choice(self) -> list[Tensor]:
        """Choose by dimensions and requires_grad, without those whose name is excluded."""
        excluder = Excluder(self._exclude)
        known, chosen = [], []
        for group in self.param_groups:
            names = group.get("param_names")
            if excluder and names is None:
                raise ValueError(
                    f"{type(self).__name__}: exclude needs names: give model.named_parameters(), or a regularizer "
                    "built on the model with exclude="
                )
            for i, p in enumerate(group["params"]):
                known.append(names[i] if names else str(i))
                left_out = excluder and excluder.reason(known[-1], (), p)
                if p.dim() >= 2 and p.requires_grad and p.numel() and not left_out:
                    chosen.append(p)
        if excluder:
            excluder.check_all_matched(known)
        return chosen

    # --- what a step is told -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was prepared for the parameters as they were."""
        self._slots: list[Slot] | None = None
        self._plan: Any = None
        self._plain: PlainStep | None = None
        self._prepared: tuple | None = None
        self._watch: Watch | None = None
        self._versions: list[int] | None = None

    def weights_changed(self) -> None:
        """Say that weights were written in a way that leaves no trace: the next step takes their moments anew.

        Not needed after in-place operations of torch under autograd's eyes, nor on the CPU.
        """
        self._versions = None

    def _set_mask(self, param: Tensor, words: Tensor | None) -> None:
        """Keep the weights whose bit is 0 at zero, with their state, in every step; None lifts the mask.

        words: int32 on the parameter's device, interleaved in memory order: bit j of word i of chunk k stands for
        element 32768 k + 1024 j + i; a last chunk of c elements has min(1024, c) words.
        """
        if words is None:
            self._masks.pop(param, None)
        else:
            self._masks[param] = words
        self._forget()

    def _fingerprint(self, params: Sequence[Tensor]) -> tuple:
        """Return what a plan depends on and anyone might change between two steps."""
        penalised = [] if self._regularizer is None else self._regularizer._choice.weights
        currents = [w.current() for w in penalised]
        arrays = [t for p in params for t in self.state.get(p, {}).values() if isinstance(t, Tensor)]
        kinds = [[self._has(group, name) for name in STATE_NAMES[self.algorithm]] for group in self.param_groups]
        return (
            kinds,
            self._constants(),
            [len(group["params"]) for group in self.param_groups],
            [id(p) for p in params],
            [(local(p).data_ptr(), local(p).stride()) for p in params],
            [local(t).data_ptr() for t in arrays],
            [(id(p), p.requires_grad) for p in currents],
            active_backend(),
        )

    def _constants(self) -> tuple[float, float] | None:
        return None if self._regularizer is None else (self._regularizer.eps, self._regularizer.r)

    def _prepare_slots(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        self._refuse_replaced(params)
        layers = self._layers()
        places = {id(p): g for g, group in enumerate(self.param_groups) for p in group["params"]}
        self._slots = []
        for order, (p, grad) in enumerate(zip(params, grads, strict=True)):
            layer = layers.get(id(p), -1)
            if grad is None and layer < 0 and not self.state.get(p):
                continue
            group = self.param_groups[places[id(p)]]
            state = self._state_of(p, group)
            unused = {name for name in STATE_NAMES[self.algorithm] if not self._has(group, name)}
            self._slots.append(
                Slot(
                    p,
                    local(p),
                    {k: local(t) for k, t in state.items() if isinstance(t, Tensor) and k not in unused},
                    places[id(p)],
                    order,
                    layer,
                    p.numel() if layer >= 0 else 1,
                    self._masks.get(p),
                )
            )
            _refuse_overlap(self._slots[-1].weight, type(self).__name__)

    def _layers(self) -> dict[int, int]:
        """Return the place among the penalised weights of each parameter that is one, by id."""
        if self._regularizer is None:
            return {}
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        current = [w.current() for w in self._regularizer._choice.weights]
        self._indices = [i for i, p in enumerate(current) if id(p) in owned and p.requires_grad]
        return {id(current[i]): layer for layer, i in enumerate(self._indices)}

    def _refuse_replaced(self, params: Sequence[Tensor]) -> None:
        """Raise where a penalised weight was replaced and the optimizer still holds the old parameter.

        A penalty that was given by its class or name has no other weights than the optimizer's, and is built anew.
        """
        if self._regularizer is None:
            return
        owned = {id(p) for p in params}
        weights = self._regularizer._choice.weights
        if self._regularizer is not self._asked and not all(id(w.param) in owned for w in weights):
            self._resolve_penalty()
            return
        for weight in weights:
            if id(weight.param) in owned and id(weight.current()) not in owned:
                raise RuntimeError(
                    f"{type(self).__name__}: {weight.label()} was replaced by a new parameter (load_state_dict with "
                    "assign=True, fully_shard), but the optimizer still holds the old one: build it anew, or put the "
                    "new parameter into its group"
                )

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the parameter's state, with the arrays that are missing made."""
        state = self.state[p]
        dtype = self._state_dtype or p.dtype
        if p.dtype == torch.float64:
            dtype = torch.float64
        for name in STATE_NAMES[self.algorithm]:
            if self._has(group, name) and state.get(name) is None:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                if name == "momentum_buffer" and "step" in state:
                    state["step"].zero_()  # its first step takes the gradient as it is
            elif self._has(group, name) and not is_sharded(p) and not _in_step(p, state[name]):
                # The weight has another memory format since: its state goes with it.
                state[name] = torch.empty_like(p, dtype=state[name].dtype, requires_grad=False).copy_(state[name])
        counted = self.algorithm == "adamw" or self._has(group, "momentum_buffer") or self._stochastic
        if counted and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if self._master == "float32" and p.element_size() == 2 and "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        if self._master == "remainder" and p.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
        return state

    def _has(self, group: dict[str, Any], name: str) -> bool:
        """Tell whether parameters of this group have this array in their state."""
        raise NotImplementedError

    def _rule(self) -> Rule:
        reg = self._regularizer
        penalty = None
        if reg is not None and self._indices:
            sharded = any(is_sharded(reg._choice.weights[i].current()) for i in self._indices)
            penalty = Penalty(
                self._mode, None if sharded else reg.family, reg.eps, reg.r, sum(reg._numels), len(self._indices)
            )
        return Rule(self.algorithm, self._master, self._stochastic, penalty)

    def _groups_now(self) -> list[dict[str, Any]]:
        """Return the groups with the strength that holds now."""
        default = self._regularizer.lam if self._regularizer else 0.0
        return [{**group, "lam": default if group["lam"] is None else group["lam"]} for group in self.param_groups]

    # --- the step ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model anew and returns the loss; the step returns it, with lam * psi added.

        Raises:
            TypeError: a gradient is sparse. RuntimeError: a penalised parameter was replaced behind the optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = None
        if loss is None and self._watch is not None and self._constants() == self._prepared[1]:
            found = self._watch.look(self.param_groups, self.state)
        if found is not None:
            if self._plain is None:
                self._repeat(*found)
                return None
            if getattr(self, "grad_scale", None) is None and getattr(self, "found_inf", None) is None:
                with torch.no_grad():
                    self._plain.run([p.grad for g in self.param_groups for p in g["params"]], self.param_groups)
                return None
        with torch.no_grad():
            value = self._step(loss is not None)
        if value is None:
            return loss
        return loss + (value.to(loss) if isinstance(loss, Tensor) else float(value))

    def _step(self, with_value: bool) -> Tensor | None:
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        fingerprint = self._fingerprint(params)
        if self._slots is None or fingerprint != self._prepared or self._appeared(grads):
            self._refuse_sparse(params, grads)
            self._forget()
            self._prepare_slots(params, grads)
            self._prepared = self._fingerprint(params)
            self._current_rule = self._rule()
        slots = self._slots
        if not slots:
            return None
        step = Step(
            [None if g is None else local(aligned(g, s.param)) for s in slots for g in (grads[s.order],)],
            self._groups_now(),
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        rule = self._current_rule
        value = None
        if use_triton([s.weight for s in slots]):
            value = self._step_on_triton(step, rule, with_value)
        else:
            stats, coef = self._moments() if rule.penalty else (None, None)
            if with_value and coef is not None:
                value = self._value(coef, step)
            plain = step_(slots, rule, step, stats, coef)
            self._plain = plain if rule.penalty is None else None
            self._watch = self._watch_over(step) if self._plain else None
        torch.autograd.graph.increment_version([s.param for s in slots])
        if rule.penalty and self._versions is not None:
            self._versions = self._versions_now()
        return value

    def _step_on_triton(self, step: Step, rule: Rule, with_value: bool) -> Tensor | None:
        from wcr_fast.triton_path.step import StepPlan

        if self._plan is None or not self._plan.fits(step.grads):
            self._plan = StepPlan(self._slots, rule, step.grads)
            self._watch = self._versions = None
            penalised = [s for s in self._slots if s.layer >= 0]
            # An operation on a DTensor counts there, one on its shard only there.
            self._penalised = [s.param for s in penalised]
            self._penalised += [s.weight for s in penalised if s.weight is not s.param]
        plan, value = self._plan, None
        if rule.penalty:
            self._know_moments(plan, rule, self._versions_now())
            if with_value:
                value = self._value(plan.coef(), step)
        plan.run(step)
        for device in plan.devices:
            if capturing(device):
                keep_for_graph(device, plan)
        if rule.penalty:
            self._complete(plan, rule)
        if self._watch is None and plan.repeatable:
            self._watch = self._watch_over(step)
        return value

    def _watch_over(self, step: Step) -> Watch | None:
        """Return what tells whether the next step is like this one, or None where it has more to find out."""
        if len(self._slots) != sum(len(g["params"]) for g in step.groups):
            return None
        params = [s.param for s in self._slots]
        weights = self._regularizer._choice.weights if self._regularizer else []
        owners = [(w.owner[0]._parameters, w.owner[1]) for w in weights if w.owner]
        watched = {id(w.current()) for w in weights}
        layers = [s.layer for s in self._slots]
        return watch(params, layers, watched, owners, self.param_groups, self.state)

    def _repeat(self, addresses: list[int], versions: list[int]) -> None:
        """Take a step like the last one, where only gradients and numbers differ."""
        plan, rule = self._plan, self._current_rule
        if rule.penalty:
            self._know_moments(plan, rule, versions)
        lam = self._regularizer.lam if rule.penalty else 0.0
        for device in plan.devices:
            if capturing(device):
                keep_for_graph(device, plan)
        plan.repeat(
            addresses, self.param_groups, lam, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        if rule.penalty:
            if rule.penalty.family is None:
                with torch.no_grad():
                    self._complete(plan, rule)
            self._versions = [version + 1 for version in versions]

    def _know_moments(self, plan: Any, rule: Rule, versions: list[int]) -> None:
        """Take the moments of the penalised weights where they may not be what the last step left behind."""
        self._look_for_changes()
        if self._versions != versions:
            with torch.no_grad():
                plan.take_moments()
                self._complete(plan, rule)
            self._versions = versions

    def _appeared(self, grads: Sequence[Tensor | None]) -> bool:
        """Tell whether a parameter that was left out has a gradient now."""
        if len(self._slots) == len(grads):
            return False
        known = {s.order for s in self._slots}
        return any(g is not None and i not in known for i, g in enumerate(grads))

    def _refuse_sparse(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            if grad is not None and grad.layout != torch.strided:
                raise TypeError(
                    f"{type(self).__name__}: parameter {i} of shape {tuple(params[i].shape)} has a sparse gradient; "
                    "use sparse=False there, or torch.optim.SparseAdam for it"
                )

    def _versions_now(self) -> list[int]:
        return list(map(_version, self._penalised))

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return stats and coefficients of the penalised weights, on the torch path."""
        reg = self._regularizer
        params = [reg._choice.weights[i].current() for i in self._indices]
        stats, _ = stats_of([local(p).detach() for p in params], reg.r)
        stats = merged_stats(stats, params)
        return stats, torch.stack(reg._derivatives_at(stats, self._indices))

    def _complete(self, plan: Any, rule: Rule) -> None:
        """Compute what the kernels leave open: moments over all shards, coefficients of a user's own formula."""
        if rule.penalty.family is not None:
            return
        reg = self._regularizer
        params = [reg._choice.weights[i].current() for i in self._indices]
        stats = merged_stats(plan.stats(), params)
        plan.set_moments(stats, torch.stack(reg._derivatives_at(stats, self._indices)))

    def _value(self, coef: Tensor, step: Step) -> Tensor:
        """Return lam * psi of the weights that step."""
        value = coef.new_zeros(())
        for slot in self._slots:
            if slot.layer >= 0:
                value = value + step.groups[slot.group]["lam"] * coef[0, slot.layer]
        return value

    def _look_for_changes(self) -> None:
        layer = self._plan.changed_layer()
        if layer is not None:
            weight = self._regularizer._choice.weights[self._indices[layer]]
            warnings.warn(
                f"{type(self).__name__}: {weight.label()} was written between two steps in a way that leaves no trace "
                "(.data, numpy, another fused optimizer): one step used the penalty of the old values; call "
                "weights_changed() after such writes",
                stacklevel=4,
            )

    # --- saving and loading ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_slots", "_plan", "_plain", "_prepared", "_watch", "_versions", "_current_rule", "_penalised")
        own = {k: v for k, v in self.__dict__.items() if k.startswith("_") and k not in left_out}
        own = {k: v for k, v in own.items() if not k.startswith(("_optimizer_", "_zero_grad", "_warned"))}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            group.setdefault("lam", self._lam)
            if self._stochastic:
                group.setdefault("seed", self._seed)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of torch's of the same name; tensors are copied.

        Arrays take this optimizer's state dtype and the layout of their weights; master weights and remainders are
        taken as they are. A state without them starts from the weights as they are when it is loaded.
        """
        seen: dict[str, Any] = {}
        # The last of the hooks: what it sees is what torch loads, and casts to the dtype of the weights.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.update(loaded))
        first = self.register_load_state_dict_post_hook(lambda _: self._restore(seen), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            first.remove()

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Put the loaded arrays in, in their own dtypes."""
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i not in loaded["state"]:
                continue
            state = {name: self._restored(p, name, value) for name, value in loaded["state"][i].items()}
            state = {name: value for name, value in state.items() if value is not None}
            if "step" not in state and state.get("momentum_buffer") is not None:
                state["step"] = torch.ones((), dtype=torch.float32, device=p.device)
            self.state[p] = state
        self._forget()

    def _restored(self, p: Tensor, name: str, value: Any) -> Any:
        if name == "step":
            return torch.as_tensor(value, dtype=torch.float32).to(p.device).clone()
        if not isinstance(value, Tensor) or value.shape != p.shape:
            return value
        dtype = {"master": torch.float32, "remainder": torch.int16}.get(name, self._state_dtype or p.dtype)
        if p.dtype == torch.float64 and name not in ("master", "remainder"):
            dtype = torch.float64
        made = torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.preserve_format)
        return made.copy_(value)


def _in_step(weight: Tensor, array: Tensor) -> bool:
    """Tell whether an array of the state runs through memory as its weight does, or as a dense copy of it would."""
    return same_layout(weight if is_dense(weight) else torch.empty_like(weight), array)


def _refuse_overlap(weight: Tensor, op: str) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"{op}: a parameter of shape {tuple(weight.shape)} is expanded: its elements share memory")
