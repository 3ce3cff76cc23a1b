"""A fused optimizer's step on Triton: one launch per device and kind of arrays, moments carried from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.moments import launch_moments
from wcr_fast.kernels.step import PENALTY_ONLY, ROW, SETTINGS, constants, launch_step
from wcr_fast.slots import STATE_NAMES, TENSORS, Rule, Slot, Step
from wcr_fast.table import TensorTable, build_table, on_device, send
from wcr_fast.torch_path.layout import is_dense, same_layout
from wcr_fast.triton_path.track import Tracker


def _settings(group: dict[str, Any], rule: Rule, device: torch.device, flag: int) -> tuple[tuple, tuple]:
    """Return a group's row of numbers, and of addresses for those that are tensors on the device."""
    addresses = []
    values = dict.fromkeys(SETTINGS, 0.0)
    for name in TENSORS:
        value = group[name]
        address = 0
        if isinstance(value, Tensor):
            if value.device == device:
                if value.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"{name} must be a float32 or float64 tensor, got {value.dtype}")
                address = value.data_ptr() + (value.dtype == torch.float64)
                value = 0.0
            else:
                value = float(value)
        values[name] = value
        addresses.append(address)
    if rule.algorithm == "sgd":
        values["beta1"], values["beta2"] = group["momentum"], group["dampening"]
        values["nesterov"] = group["nesterov"]
    else:
        for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
            values[name] = beta = float(beta)
            values[f"log_{name}"] = math.log(beta) if beta else -math.inf
        values["eps"] = group["eps"]
    values["sign"] = -1.0 if group["maximize"] else 1.0
    values["seed"] = group.get("seed", 0)
    if rule.penalty is not None:
        values["r"], values["penalty_eps"] = rule.penalty.r, rule.penalty.eps
        values["penalty_total"] = rule.penalty.total
    return tuple(float(v) for v in values.values()), (*addresses, flag)


def _numbers(groups: Sequence[dict[str, Any]], default: Any) -> tuple[list[Any], list[float]]:
    """Return the options of all groups, to be compared by identity, and what tells of changes inside of them."""
    values = [value for group in groups for name, value in group.items() if name != "params"] + [default]
    tensors = [value for value in values if isinstance(value, Tensor)]
    tensors += [beta for group in groups for beta in group.get("betas", ()) if isinstance(beta, Tensor)]
    # The host may have read them: one on the CPU counts by its value, another by its version, for it is not waited for.
    inside = [t.item() if t.device.type == "cpu" else t._version for t in tensors]
    return values, [t.data_ptr() for t in tensors] + inside


# Kernels write these by their address, which the host's allocator can't know of: they are never given back.
_flags: list[Tensor] = []


@dataclass
class _Device:
    """What the launches on one device share: the groups' settings, and the moments of the weights as they are."""

    device: torch.device
    stats: Tensor  # float64 [4, layers]
    coef: Tensor  # float64 [3, layers]
    flag: Tensor  # int64 [1] in host memory that the device can write: 1 + a layer whose weights changed, or 0
    flag_seen: np.ndarray  # the same memory, for a look without torch
    settings: Tensor | None = None
    addresses: Tensor | None = None
    sent: tuple | None = None

    def send(self, groups: Sequence[dict[str, Any]], rule: Rule) -> None:
        """Bring the settings up to date on the device."""
        rows = tuple(_settings(group, rule, self.device, self.flag.data_ptr()) for group in groups)
        if rows == self.sent:
            return
        numbers = np.array([numbers for numbers, _ in rows], dtype=np.float64)
        addresses = np.array([addresses for _, addresses in rows], dtype=np.int64)
        self.settings = send(numbers, self.device, self.settings)
        self.addresses = send(addresses, self.device, self.addresses)
        self.sent = rows


@dataclass
class _Launch:
    """The slots of one launch, their table and scratch."""

    on: _Device
    places: list[int]
    table: TensorTable
    partials: Tensor
    counters: Tensor
    constants: dict[str, Any]
    grad_dtype: torch.dtype
    weights: list[Tensor]  # dense: a weight with gaps is copied here before the launch, and back after it
    tracked: tuple[Tensor, Tensor, Tensor] | None = None  # a threshold's counters
    sent: np.ndarray | None = None
    grad_addrs: Tensor | None = None
    copies: list[Tensor] = field(default_factory=list)

    def send(self, addresses: np.ndarray) -> None:
        """Bring the gradients' addresses up to date on the device."""
        if self.sent is None or not np.array_equal(addresses, self.sent):
            self.grad_addrs = send(addresses, self.on.device, self.grad_addrs)
            self.sent = addresses


class StepPlan:
    """The launches of an optimizer's step, made once for parameters and states that stay where they are."""

    def __init__(
        self,
        slots: Sequence[Slot],
        rule: Rule,
        grads: Sequence[Tensor | None],
        tracked: tuple[Tracker, frozenset[int]] | None = None,
    ) -> None:
        self.slots, self.rule = slots, rule
        # The threshold that is tracked, and the ids of the parameters that belong to it.
        self.tracker, self._tracked = tracked or (None, frozenset())
        self.devices: dict[torch.device, _Device] = {}
        self.launches: list[_Launch] = []
        self._seen: tuple[list[Any], list[float]] = [], []
        kinds: dict[tuple, list[int]] = {}
        for i, (slot, grad) in enumerate(zip(slots, grads, strict=True)):
            if slot.weight.numel():
                kinds.setdefault(self._kind(slot, grad), []).append(i)
            else:
                self._device(slot.weight.device)
        for kind, places in kinds.items():
            self._add(kind, places)

    def _device(self, device: torch.device) -> _Device:
        if device not in self.devices:
            layers = self.rule.penalty.layers if self.rule.penalty else 0
            both = torch.zeros((7, layers), dtype=torch.float64, device=device)
            flag = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
            _flags.append(flag)
            self.devices[device] = _Device(device, both[:4], both[4:], flag, flag.numpy())
        return self.devices[device]

    def _kind(self, slot: Slot, grad: Tensor | None) -> tuple:
        names = STATE_NAMES[self.rule.algorithm]
        states = tuple(slot.state[name].dtype for name in names if slot.state.get(name) is not None)
        grad_dtype = slot.weight.dtype if grad is None else grad.dtype
        # Only 16-bit weights have a master copy or a remainder.
        master = self.rule.master if {"master", "remainder"} & slot.state.keys() else None
        return slot.weight.device, slot.weight.dtype, grad_dtype, states, master

    def _add(self, kind: tuple, places: list[int]) -> None:
        device, dtype, grad_dtype, states, master = kind
        rule, slots = self.rule, [self.slots[i] for i in places]
        if len(set(states)) > 1:
            raise TypeError(f"the state of {dtype} parameters has several dtypes, {states}; load it by load_state_dict")
        on = self._device(device)
        weights = [_dense(slot.weight) for slot in slots]
        table = build_table(weights, [s.layer for s in slots], CHUNK, extra=[self._columns(s) for s in slots])
        penalty = rule.penalty
        tracker = self.tracker if any(id(s.param) in self._tracked for s in slots) else None
        self.launches.append(
            _Launch(
                on,
                places,
                table,
                torch.zeros(2 * table.num_chunks, dtype=torch.float64, device=device),
                torch.zeros(len(places), dtype=torch.int32, device=device),
                constants(
                    rule.algorithm,
                    dtype,
                    grad=grad_dtype,
                    state=states[0] if states else dtype,
                    master=master,
                    momentum=bool(states),
                    amsgrad=len(states) == 3,
                    penalty=penalty.mode if penalty else None,
                    family=penalty.family if penalty else None,
                    smooth=penalty is not None and penalty.r != 0,
                    mask=any(s.words is not None for s in slots),
                    stochastic=rule.stochastic and dtype == torch.bfloat16,
                    tracked=tracker and tracker.dtype,
                ),
                grad_dtype,
                weights,
                tracker and tracker.counters,
            )
        )

    def _columns(self, slot: Slot) -> list[int]:
        """Return a slot's row of the table behind the columns that every table has."""
        names = STATE_NAMES[self.rule.algorithm]
        arrays = [slot.state.get(name) for name in names] + [None] * (3 - len(names))
        arrays.append(slot.state.get("master", slot.state.get("remainder")))
        arrays.append(slot.words)
        addresses = [0 if t is None else t.data_ptr() for t in (slot.state.get("step"), *arrays)]
        columns = [slot.layer_size, slot.group, *addresses, slot.order, int(id(slot.param) in self._tracked)]
        assert len(columns) == len(ROW) - 4, "a row has these columns"
        return columns

    def take_moments(self) -> None:
        """Take the moments of the penalised weights as they are, with the coefficients where the kernels know them."""
        penalty = self.rule.penalty
        for launch in self.launches:
            self._copy_in(launch)
            with on_device(launch.on.device):
                launch_moments(
                    launch.table.rows,
                    launch.table.block_to_tensor,
                    launch.partials,
                    launch.counters,
                    launch.on.stats,
                    launch.on.coef,
                    dtype=launch.table.dtype,
                    r=penalty.r,
                    rule=(penalty.family, penalty.eps) if penalty.family else None,
                    total=penalty.total,
                )

    def stats(self) -> Tensor:
        """Return the stats of all penalised weights, float64 [4, layers], on the first device."""
        return self._gathered("stats")

    def coef(self) -> Tensor:
        """Return their coefficients, float64 [3, layers], on the first device."""
        return self._gathered("coef")

    def _gathered(self, name: str) -> Tensor:
        # A layer's columns are zero on every device but its own.
        first, *others = (getattr(on, name) for on in self.devices.values())
        return sum((t.to(first.device) for t in others), first)

    def set_moments(self, stats: Tensor, coef: Tensor) -> None:
        """Write stats and coefficients that were completed outside back to where the kernels read them."""
        owners = {s.layer: s.weight.device for s in self.slots if s.layer >= 0}
        for device, on in self.devices.items():
            here = torch.tensor([owners.get(i) == device for i in range(stats.shape[1])], device=device)
            on.stats.copy_(torch.where(here, stats.to(device), 0.0))
            on.coef.copy_(torch.where(here, coef.to(device), 0.0))

    def changed_layer(self) -> int | None:
        """Return a layer whose weights were found changed by an earlier step, once; no synchronisation."""
        for on in self.devices.values():
            found = on.flag_seen[0]
            if found:
                on.flag_seen[0] = 0
                return int(found) - 1
        return None

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Tell whether these gradients have the dtypes that the launches were made for."""
        return all(
            grads[i] is None or grads[i].dtype == launch.grad_dtype for launch in self.launches for i in launch.places
        )

    def run(self, step: Step) -> None:
        """Step every slot with a gradient, or with a penalty; the weights' moments must be known."""
        for on in self.devices.values():
            on.send(step.groups, self.rule)
        self._seen = [], []
        self._rearm()
        for launch in self.launches:
            self._copy_in(launch)
            self._send_gradients(launch, step)
            self._launch(launch, step.grad_scale, step.found_inf)
            for i, weight in zip(launch.places, launch.weights, strict=True):
                if weight is not self.slots[i].weight:
                    self.slots[i].weight.detach().copy_(weight)
        self._count_empty(step)

    def _rearm(self) -> None:
        if self.tracker is not None:
            self.tracker.rearm()

    def _count_empty(self, step: Step) -> None:
        """Count the step of parameters without elements here: other ranks may hold some."""
        for slot, grad in zip(self.slots, step.grads, strict=True):
            if "step" in slot.state and not slot.weight.numel() and (grad is not None or step.pulls_at(slot)):
                taken = 1.0 if step.found_inf is None else 1.0 - step.found_inf.to(slot.weight.device)
                slot.state["step"] += taken

    def _launch(self, launch: _Launch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        device, chosen = launch.on.device, launch.constants
        if grad_scale is not None or found_inf is not None:
            grad_scale, found_inf = (None if t is None else t.to(device) for t in (grad_scale, found_inf))
            chosen = {**chosen, "SCALED": grad_scale is not None, "SKIPPABLE": found_inf is not None}
        with on_device(device):
            launch_step(
                launch.table.rows,
                launch.table.block_to_tensor,
                launch.grad_addrs,
                launch.on.settings,
                launch.on.addresses,
                launch.partials,
                launch.counters,
                launch.on.stats,
                launch.on.coef,
                grad_scale,
                found_inf,
                launch.tracked,
                dtype=launch.table.dtype,
                constants=chosen,
            )

    @property
    def repeatable(self) -> bool:
        """Tell whether the last run stepped every slot where its arrays lie, by gradients laid out as they are."""
        stepped = sum(len(launch.places) for launch in self.launches if not launch.copies)
        return stepped == len(self.slots) and all(
            weight is self.slots[i].weight
            for launch in self.launches
            for i, weight in zip(launch.places, launch.weights, strict=True)
        )

    def repeat(
        self,
        addresses: np.ndarray,
        groups: Sequence[dict[str, Any]],
        default_lam: float | Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step all slots by the gradients at these addresses; everything else is as it was at the last run."""
        numbers, places = _numbers(groups, default_lam)
        seen, seen_places = self._seen
        if len(numbers) != len(seen) or places != seen_places or not all(map(is_, numbers, seen)):
            filled = [{**g, "lam": default_lam if g["lam"] is None else g["lam"]} for g in groups]
            for on in self.devices.values():
                on.send(filled, self.rule)
            self._seen = numbers, places
        self._rearm()
        for launch in self.launches:
            launch.send(addresses if len(self.launches) == 1 else addresses[launch.places])
            self._launch(launch, grad_scale, found_inf)

    def _copy_in(self, launch: _Launch) -> None:
        for i, weight in zip(launch.places, launch.weights, strict=True):
            if weight is not self.slots[i].weight:
                weight.copy_(self.slots[i].weight.detach())

    def _send_gradients(self, launch: _Launch, step: Step) -> None:
        launch.copies.clear()
        pointers = []
        for i, weight in zip(launch.places, launch.weights, strict=True):
            grad = step.grads[i]
            if grad is None:
                pointers.append(PENALTY_ONLY if step.pulls_at(self.slots[i]) else 0)
                continue
            if not same_layout(weight, grad):
                grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad.detach())
                launch.copies.append(grad)
            pointers.append(grad.data_ptr())
        launch.send(np.array(pointers, dtype=np.int64))


def _dense(weight: Tensor) -> Tensor:
    return weight if is_dense(weight) else torch.empty_like(weight.detach())
