"""What SGD and AdamW share: the parameters and states of a step, what it is told, and when it can be repeated.

A step on a GPU is one launch per kind of arrays. It uses the moments of the weights that the step before left behind,
so whoever writes a weight in between has to be noticed: a raised version counter, a moved or replaced tensor and a
loaded state cost one more pass over the weights; a write that leaves no trace (``.data``, numpy, other fused
optimizers) is found by the step itself, which compares what it reads with what was stored, and is warned about.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, ClassVar, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from wcr_fast.backend import active_backend, use_triton
from wcr_fast.ops.select import check_sparsities
from wcr_fast.ops.sharded import aligned, local
from wcr_fast.optim.owned import OwnedPenalty, PenaltyT, owned_penalty, value
from wcr_fast.optim.state import Precision
from wcr_fast.optim.track import MAX_TRACKED, TrackedThreshold
from wcr_fast.regularizers import Regularizer
from wcr_fast.slots import STATE_NAMES, Rule, Slot, Step
from wcr_fast.table import capturing, current_stream, keep_for_graph
from wcr_fast.watch import Watch, watch
from wcr_fast.weights import Exclude, Weights, as_weights

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_version = attrgetter("_version")

# What is found out anew, never copied or pickled.
_PREPARED = ("_slots", "_rule", "_plan", "_on_triton", "_fingerprint", "_watch", "_watched", "_versions", "_counted")
_PREPARED += ("_tracked",)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of :class:`wcr_fast.optim.SGD` and :class:`wcr_fast.optim.AdamW`; not for use of its own."""

    algorithm: ClassVar[str]
    _tracked: TrackedThreshold | None = None
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
        self._precision = Precision(state_dtype, master, bool(stochastic_rounding))
        self._precision.check(name)
        self._penalty: OwnedPenalty | None = owned_penalty(name, penalty, lam, decoupled, exclude)
        self._lam = lam
        self._seed = torch.initial_seed() & 0xFFFFFFFF
        self._masks: dict[Tensor, Tensor] = {}
        self._ready = False
        self._forget()
        return params if isinstance(params, Tensor) else list(params)

    def _finish(self) -> None:
        self._ready = True
        self.defaults["lam"] = self._lam
        self._check_groups()
        if self._penalty is not None:
            self._penalty.resolve(self.param_groups)

    @property
    def penalty(self) -> Regularizer | None:
        """The regularizer whose gradient is part of the step."""
        return None if self._penalty is None else self._penalty.regularizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; ``lam`` may be one of its options."""
        self._fill(param_group)
        super().add_param_group(param_group)
        if self._ready:
            self._check_groups()
            if self._penalty is not None:
                self._penalty.resolve(self.param_groups)
            self._forget()

    def _fill(self, group: dict[str, Any]) -> None:
        """Give a group the options that it lacks."""
        group.setdefault("lam", self._lam)
        if self._precision.stochastic:
            group.setdefault("seed", self._seed)

    def _check_groups(self) -> None:
        name = type(self).__name__
        for number, group in enumerate(self.param_groups):
            lam = group["lam"]
            if lam is not None and self._penalty is None:
                raise ValueError(f"{name}: group {number} has lam={lam}, but there is no penalty")
            if isinstance(lam, Tensor) and lam.dim() != 0:
                raise ValueError(f"{name}: lam must be a number or a 0-d tensor, got {lam.dim()}-d")
            if not (lam is None or isinstance(lam, (Tensor, SupportsFloat))):
                raise TypeError(f"{name}: lam must be a number or a 0-d tensor, got {lam!r}")
            if not (lam is None or isinstance(lam, Tensor) or abs(float(lam)) < float("inf")):
                raise ValueError(f"{name}: lam must be finite, got {lam}")
            for p in group["params"]:
                self._precision.check_param(name, p)

    def _has(self, group: dict[str, Any], name: str) -> bool:
        """Tell whether parameters of this group have this array in their state."""
        raise NotImplementedError

    def _counts(self, group: dict[str, Any]) -> bool:
        """Tell whether a step of this group depends on its number."""
        raise NotImplementedError

    # --- what a step is told -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was prepared for the parameters as they were."""
        self._slots: list[Slot] | None = None
        self._rule: Rule | None = None
        self._fingerprint: tuple | None = None
        # How they are stepped, by launches or by torch.
        self._plan: Any = None
        self._on_triton = False
        # The penalised weights, and their versions whose moments the launches know.
        self._counted: list[Tensor] = []
        self._versions: np.ndarray | None = None
        # What tells whether a step is like the last one.
        self._watch: Watch | None = None
        self._watched: tuple = ()

    def weights_changed(self) -> None:
        """Say that weights were written in a way that leaves no trace: the next step takes their moments anew.

        Not needed after in-place operations of torch under autograd's eyes, nor on the CPU.
        """
        self._versions = None
        if self._tracked is not None:
            self._tracked.stepped(counted=False)

    def track_threshold(self, weights: Weights, sparsity: float | Iterable[float]) -> TrackedThreshold:
        """Let every step count the weights that it writes, so that their pruning threshold is known for nothing.

        On a GPU the step counts each weight's magnitude in a window around the last threshold while it still has it in
        registers: no byte more is read. Elsewhere :meth:`TrackedThreshold.threshold` reads the weights. A second call
        takes the place of the first. Copies of the optimizer and its ``state_dict`` know nothing of it.

        Args:
            weights: a module (its weights with two or more dimensions, without normalisation) or tensors, as for
                :func:`wcr_fast.magnitude_threshold`. All of them should be parameters of this optimizer: where one is
                not, is a DTensor, or lies on another device, thresholds are right, but read the weights.
            sparsity: the fraction removed, in [0, 1], or up to 5 of them.

        Returns:
            A handle: ``threshold()`` after a step returns what ``magnitude_threshold(weights, sparsity)`` would, and
            ``remove()`` ends it.

        Raises:
            TypeError, ValueError: as ``magnitude_threshold``; ValueError for no weights or more than 5 sparsities.

        Example:
            >>> import torch, wcr_fast
            >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
            >>> optimizer = wcr_fast.optim.SGD([weight], lr=0.5)
            >>> tracked = optimizer.track_threshold([weight], 0.5)
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> tracked.threshold()
            tensor(1.5000)
        """
        op = f"{type(self).__name__}.track_threshold"
        sparsities, several = check_sparsities(sparsity, op)
        if not 1 <= len(sparsities) <= MAX_TRACKED:
            raise ValueError(
                f"{op}: sparsity must be 1 to {MAX_TRACKED} numbers, got {len(sparsities)}; "
                "magnitude_threshold takes any number of them"
            )
        chosen = as_weights(weights, op=op, sharded=True)
        if not chosen:
            raise ValueError(f"{op}: there are no weights to track")
        self._tracked = TrackedThreshold(self, chosen, sparsities, several)
        self._forget()
        return self._tracked

    def _untrack(self, tracked: TrackedThreshold) -> None:
        if self._tracked is tracked:
            self._tracked = None
            self._forget()

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

    def _fingerprint_of(self, params: Sequence[Tensor]) -> tuple:
        """Return what a plan depends on and anyone might change between two steps."""
        currents = [] if self._penalty is None else [w.current() for w in self._penalty.weights]
        arrays = [t for p in params for t in self.state.get(p, {}).values() if isinstance(t, Tensor)]
        names = STATE_NAMES[self.algorithm]
        kinds = [(self._counts(group), *(self._has(group, name) for name in names)) for group in self.param_groups]
        return (
            kinds,
            None if self._penalty is None else self._penalty.constants,
            [len(group["params"]) for group in self.param_groups],
            [id(p) for p in params],
            [(local(p).data_ptr(), local(p).shape, local(p).stride()) for p in params],
            [local(t).data_ptr() for t in arrays],
            [(id(p), p.requires_grad) for p in currents],
            active_backend(),
        )

    def _prepare_slots(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        self._forget()
        layers = {} if self._penalty is None else self._penalty.find_layers(self.param_groups)
        places = {id(p): g for g, group in enumerate(self.param_groups) for p in group["params"]}
        self._slots = []
        for order, (p, grad) in enumerate(zip(params, grads, strict=True)):
            layer = layers.get(id(p), -1)
            if grad is None and layer < 0 and not self.state.get(p):
                continue
            group = self.param_groups[places[id(p)]]
            names = [name for name in STATE_NAMES[self.algorithm] if self._has(group, name)]
            self._precision.complete(self.state[p], p, names, self._counts(group))
            used = (*names, "step", "master", "remainder")
            self._slots.append(
                Slot(
                    p,
                    local(p),
                    {k: local(t) for k, t in self.state[p].items() if k in used and isinstance(t, Tensor)},
                    places[id(p)],
                    order,
                    layer,
                    p.numel() if layer >= 0 else 1,
                    self._masks.get(p),
                )
            )
            _refuse_overlap(self._slots[-1].weight, type(self).__name__)
        self._rule = Rule(
            self.algorithm,
            self._precision.master,
            self._precision.stochastic,
            None if self._penalty is None else self._penalty.rule(),
        )
        self._fingerprint = self._fingerprint_of(params)

    def _groups_now(self) -> list[dict[str, Any]]:
        """Return the groups with the strength that holds now."""
        default = self.penalty.lam if self.penalty else 0.0
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
        if self._tracked is not None:
            self._tracked.stepped(counted=False)  # until all of it is done
        found = self._look() if loss is None and self._watch is not None else None
        if found is not None:
            self._repeat(*found)
            self._note_counts()
            return None
        self._watch = None  # what it saw is not what the next step is like
        with torch.no_grad():
            added = self._step(loss is not None)
            if loss is None and (not self._on_triton or self._plan.repeatable):
                self._watch = self._watch_over()
        self._note_counts()
        if added is None:
            return loss
        return loss + (added.to(loss) if isinstance(loss, Tensor) else float(added))

    def _note_counts(self) -> None:
        if self._tracked is not None:
            self._tracked.stepped(self._on_triton and self._plan is not None and self._plan.tracker is not None)

    def _step(self, with_value: bool) -> Tensor | None:
        """Find out what there is to step, and step it; return lam * psi where asked for."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if self._slots is None or self._fingerprint_of(params) != self._fingerprint or self._appeared(grads):
            self._refuse_sparse(params, grads)
            self._prepare_slots(params, grads)
        slots, rule = self._slots, self._rule
        if not slots:
            return None
        step = Step(
            [None if g is None else local(aligned(g, s.param)) for s in slots for g in (grads[s.order],)],
            self._groups_now(),
            *self._scaler(),
        )
        self._on_triton = use_triton([s.weight for s in slots])
        added = (self._step_on_triton if self._on_triton else self._step_on_torch)(step, rule, with_value)
        torch.autograd.graph.increment_version([s.param for s in slots])
        if rule.penalty and self._versions is not None:
            self._versions = self._versions_now()
        return added

    def _step_on_torch(self, step: Step, rule: Rule, with_value: bool) -> Tensor | None:
        from wcr_fast.torch_path.step import StepPlan

        if self._plan is None:
            self._plan = StepPlan(self._slots, rule)
        stats, coef = self._moments()
        added = value(self._slots, coef, step) if with_value and rule.penalty else None
        self._plan.run(step, stats, coef)
        return added

    def _moments(self) -> tuple[Tensor | None, Tensor | None]:
        """Return stats and coefficients of the penalised weights, on the torch path."""
        if self._rule.penalty is None:
            return None, None
        stats, coef = self._penalty.moments()
        self._penalty.warn_of_long_steps(self, self._slots, lambda: stats)
        return stats, coef

    def _step_on_triton(self, step: Step, rule: Rule, with_value: bool) -> Tensor | None:
        from wcr_fast.triton_path.step import StepPlan

        if self._plan is None or not self._plan.fits(step.grads):
            tracked = None if self._tracked is None else self._tracked.tracker(self._slots)
            self._plan = StepPlan(self._slots, rule, step.grads, tracked)
            self._versions = None
            penalised = [s for s in self._slots if s.layer >= 0]
            # An operation on a DTensor counts there, one on its shard only there.
            self._counted = [s.param for s in penalised] + [s.weight for s in penalised if s.weight is not s.param]
        plan, added = self._plan, None
        if rule.penalty:
            self._know_moments(plan, self._versions_now(), depth=3)
            if with_value:
                added = value(self._slots, plan.coef(), step)
        plan.run(step)
        self._keep_for_graphs(plan)
        if rule.penalty and rule.penalty.family is None:
            self._penalty.complete(plan)
        return added

    def _know_moments(self, plan: Any, versions: np.ndarray, depth: int) -> None:
        """Take the moments of the penalised weights where they may not be what the last step left behind.

        depth: of the calls from the step on, for whoever reads where a warning comes from.
        """
        self._warn_of_changes(plan, depth)
        if self._versions is None or not np.array_equal(self._versions, versions):
            with torch.no_grad():
                plan.take_moments()
                if self._rule.penalty.family is None:
                    self._penalty.complete(plan)
            self._versions = versions
        self._penalty.warn_of_long_steps(self, self._slots, plan.stats)

    def _moments_hold(self) -> bool:
        """Tell whether the moments at hand are those of the weights as they are."""
        return self._versions is not None and np.array_equal(self._versions, self._versions_now())

    def _weights_restored(self) -> None:
        """Take the weights for what they were when their moments held: who perturbed them has put them back."""
        self._versions = self._versions_now()

    def _versions_now(self) -> np.ndarray:
        return np.array(list(map(_version, self._counted)), dtype=np.int64)

    def _warn_of_changes(self, plan: Any, depth: int) -> None:
        layer = plan.changed_layer()
        if layer is not None:
            warnings.warn(
                f"{type(self).__name__}: {self._penalty.label(layer)} was written between two steps in a way that "
                "leaves no trace (.data, numpy, another fused optimizer): one step used the penalty of the old values; "
                "call weights_changed() after such writes",
                stacklevel=depth + 4,  # behind this, _know_moments and torch's wrapper of the step
            )

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

    # --- the step once more ------------------------------------------------------------------------------------

    def _watch_over(self) -> Watch | None:
        """Return what tells whether the next step is like this one, or None where it has more to find out."""
        if not self._slots or len(self._slots) != sum(len(g["params"]) for g in self.param_groups):
            return None
        states = list(self.state.values())
        entries = [(state, name, t) for state in states for name, t in state.items() if isinstance(t, Tensor)]
        arrays = [t for _, name, t in entries if name != "step"]
        weights = [] if self._penalty is None else self._penalty.weights
        entries += [(w.owner[0]._parameters, w.owner[1], w.current()) for w in weights if w.owner]
        counted = [i for i, slot in enumerate(self._slots) if slot.layer >= 0]
        self._watched = self._circumstances(), states
        return watch([slot.param for slot in self._slots], entries=entries, arrays=arrays, counted=counted)

    def _circumstances(self) -> tuple:
        """Return what a repeated step depends on beside its tensors."""
        kinds = [
            (len(g["params"]), g.get("momentum") == 0, g.get("dampening") == 0, g.get("amsgrad"))
            for g in self.param_groups
        ]
        constants = None if self._penalty is None else self._penalty.constants
        return kinds, constants, active_backend(), current_stream(self._slots[0].weight.device)

    def _scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the scale and the overflow that a gradient scaler handed over for this step."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _look(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the gradients' addresses and the penalised weights' versions; None where this step is another one."""
        circumstances, states = self._watched
        if self._circumstances() != circumstances or len(self.state) != len(states):
            return None
        if not all(map(is_, self.state.values(), states)):
            return None
        return self._watch.look([p for group in self.param_groups for p in group["params"]])

    def _repeat(self, addresses: np.ndarray, versions: np.ndarray) -> None:
        """Take a step like the last one, where only gradients and numbers differ."""
        if not self._on_triton:
            with torch.no_grad():
                grads = [p.grad for group in self.param_groups for p in group["params"]]
                self._plan.run(Step(grads, self._groups_now(), *self._scaler()), *self._moments(), repeated=True)
            return
        plan, penalty = self._plan, self._rule.penalty
        if penalty:
            self._know_moments(plan, versions, depth=2)
        self._keep_for_graphs(plan)
        lam = self.penalty.lam if penalty else 0.0
        plan.repeat(addresses, self.param_groups, lam, *self._scaler())
        if penalty:
            if penalty.family is None:
                with torch.no_grad():
                    self._penalty.complete(plan)
            self._versions = versions + 1

    def _keep_for_graphs(self, plan: Any) -> None:
        for device in plan.devices:
            if capturing(device):
                keep_for_graph(device, plan)

    # --- saving and loading ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k.startswith("_") and k not in _PREPARED}
        own = {k: v for k, v in own.items() if not k.startswith(("_optimizer_", "_zero_grad", "_warned"))}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            self._fill(group)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of torch's of the same name; tensors are copied.

        Arrays take this optimizer's state dtype and the layout of their weights; master weights and remainders are
        taken as they are. A state without them starts from the weights as they are when it is loaded, and one without
        ``lam`` leaves each group its own.
        """
        seen: dict[str, Any] = {}
        own = [{name: group[name] for name in ("lam", "seed") if name in group} for group in self.param_groups]
        # The last of the hooks: what it sees is what torch loads, and casts to the dtype of the weights.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.update(loaded))
        first = self.register_load_state_dict_post_hook(lambda _: self._restore(seen, own), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            first.remove()
        foreign = [group for group in self.param_groups if self._penalty is None and group["lam"] is not None]
        if foreign:
            name, lam = type(self).__name__, foreign[0]["lam"]
            warnings.warn(f"{name}: the loaded state has lam={lam}, but there is no penalty here", stacklevel=4)
        for group in foreign:
            group["lam"] = None

    def _restore(self, loaded: dict[str, Any], own: Sequence[dict[str, Any]]) -> None:
        """Put the loaded arrays in, in their own dtypes, and the groups' own options that torch's lack."""
        for group, options, mine in zip(self.param_groups, loaded["param_groups"], own, strict=True):
            group.update({name: option for name, option in mine.items() if options.get(name) is None})
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in loaded["state"]:
                self.state[p] = self._precision.restored(loaded["state"][i], p)
        self._forget()


def _refuse_overlap(weight: Tensor, op: str) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"{op}: a parameter of shape {tuple(weight.shape)} is expanded: its elements share memory")
