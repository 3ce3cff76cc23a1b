"""A fused optimizer's step in torch: its own fused kernels, fed with blocks whose gradient has the penalty's in it.

The penalty's gradient is added in a copy of the gradient, a block at a time and still in cache; the user's gradient
is not touched. Where weight and state need no such care (no penalty, no mask, one dtype) the whole list goes to torch
in one call. Moments are taken anew at every step, so no write to a weight can go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_fast.slots import STATE_NAMES, Rule, Slot, Step
from wcr_fast.torch_path.keep import keep_block_
from wcr_fast.torch_path.layout import flat_view, is_dense, same_layout
from wcr_fast.torch_path.moments import BLOCK, Scratch, compute_dtype, pulls, put

_CHUNK = 32768  # the noise of stochastic rounding is hashed by chunk and place in it


def step_(slots: Sequence[Slot], rule: Rule, step: Step, stats: Tensor | None, coef: Tensor | None) -> PlainStep | None:
    """Step the slots that have a gradient, or a penalty; see :class:`wcr_fast.optim.FusedOptimizer`.

    stats [4, L] and coef [3, L] are those of the penalised weights, by ``slot.layer``, as they are now. Returns what
    can take the next step, where torch's own kernels took all of this one.
    """
    if step.found_inf is not None and step.found_inf.item():
        return None
    pull = _pulls(slots, rule, step, stats, coef)
    scale = 1.0 if step.grad_scale is None else 1.0 / float(step.grad_scale)
    scratch = Scratch(rule.penalty.r if rule.penalty else 0.0)
    whole: dict[tuple, list[_Update]] = {}
    plain = step.found_inf is None
    for slot, grad in zip(slots, step.grads, strict=True):
        if grad is None and slot.layer not in pull:
            continue
        update = _Update(slot, grad, rule, step.groups[slot.group], pull.get(slot.layer), scale, scratch)
        if slot.weight.numel() == 0:
            continue  # counted all the same: other ranks may hold elements
        if update.is_plain():
            whole.setdefault((slot.group, slot.weight.device, slot.weight.dtype, update.first), []).append(update)
        else:
            plain = False
            update.run()
    batches = [_Batch(updates) for updates in whole.values()]
    for batch, updates in zip(batches, whole.values(), strict=True):
        batch.run([u.grad for u in updates])
    return PlainStep(batches) if plain else None


class _Batch:
    """Parameters of one group that torch's kernel takes in one call."""

    def __init__(self, updates: Sequence[_Update]) -> None:
        self.leader, self.group = updates[0], updates[0].slot.group
        self.orders = [u.slot.order for u in updates]
        self.weights = [u.slot.weight.detach() for u in updates]
        self.states = [[u.slot.state.get(name) for u in updates] for name in STATE_NAMES[self.leader.rule.algorithm]]
        self.steps = [u.slot.state["step"] for u in updates if "step" in u.slot.state]

    def run(self, grads: list[Tensor]) -> None:
        self.leader.call(self.weights, grads, self.states, self.steps)


class PlainStep:
    """A step that torch's kernels take in one call for each group, as long as nothing but gradients changes."""

    def __init__(self, batches: Sequence[_Batch]) -> None:
        self._batches = batches

    def run(self, grads: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> None:
        """Step all parameters, by the gradients in the optimizer's order."""
        for batch in self._batches:
            batch.leader.group, batch.leader.first = groups[batch.group], False
            if batch.steps:
                torch._foreach_add_(batch.steps, 1.0)
            batch.run([grads[i] for i in batch.orders])


def _pulls(
    slots: Sequence[Slot], rule: Rule, step: Step, stats: Tensor | None, coef: Tensor | None
) -> dict[int, tuple[float, ...]]:
    """Return the penalty's pull on every layer that feels one now."""
    if rule.penalty is None or stats is None or coef is None:
        return {}
    sizes, lams = [1] * stats.shape[1], [0.0] * stats.shape[1]
    for slot in slots:
        if slot.layer >= 0:
            group = step.groups[slot.group]
            sizes[slot.layer], lams[slot.layer] = slot.layer_size, float(group["lam"])
            if rule.penalty.mode == "decoupled":
                lams[slot.layer] *= -float(group["lr"])
    felt = zip(pulls(stats, coef, sizes, lams), lams, strict=True)
    return {layer: pull for layer, (pull, lam) in enumerate(felt) if lam != 0.0}


class _Update:
    """The step of one parameter, in blocks; counts it in the state."""

    def __init__(
        self,
        slot: Slot,
        grad: Tensor | None,
        rule: Rule,
        group: dict[str, Any],
        pull: tuple[float, ...] | None,
        scale: float,
        scratch: Scratch,
    ) -> None:
        self.slot, self.grad, self.rule, self.group = slot, grad, rule, group
        self.pull, self.scale, self.scratch = pull, scale, scratch
        self.names = [name for name in STATE_NAMES[rule.algorithm] if slot.state.get(name) is not None]
        self.count = int(slot.state["step"].item()) if "step" in slot.state else 1  # the steps before this one
        self.first = self.count == 0
        if "step" in slot.state:
            slot.state["step"] += 1

    def is_plain(self) -> bool:
        """Tell whether torch's own kernel can take the arrays as they are."""
        weight = self.slot.weight
        arrays = [self.grad, *(self.slot.state[name] for name in self.names)]
        special = self.pull or self.slot.words is not None or self.rule.master or self.rule.stochastic
        return (
            not special
            and self.scale == 1.0
            # 16-bit weights are stepped in float32: torch 2.13's fused SGD is wrong for them on the CPU.
            and weight.dtype == compute_dtype(weight.dtype)
            and is_dense(weight)
            and all(t.dtype == weight.dtype and same_layout(weight, t) for t in arrays)
        )

    def call(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        states: Sequence[list[Tensor | None]],
        steps: list[Tensor],
    ) -> None:
        """Call torch's fused kernel on lists that share this update's group."""
        group = self.group
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        if self.rule.algorithm == "sgd":
            torch._fused_sgd_(
                weights,
                grads,
                states[0] if group["momentum"] else [],
                weight_decay=weight_decay,
                momentum=float(group["momentum"]),
                lr=lr,
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                maximize=bool(group["maximize"]),
                is_first_step=self.first,
            )
        else:
            torch._fused_adamw_(
                weights,
                grads,
                states[0],
                states[1],
                states[2] if group["amsgrad"] else [],
                steps,
                lr=lr,
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                weight_decay=weight_decay,
                eps=float(group["eps"]),
                amsgrad=bool(group["amsgrad"]),
                maximize=bool(group["maximize"]),
            )

    def run(self) -> None:
        """Step the parameter a block at a time; arrays laid out otherwise than the weight take a copy."""
        weight, state = self.slot.weight.detach(), self.slot.state
        dense = weight if is_dense(weight) else weight.clone()
        arrays = {name: state[name] for name in (*self.names, "master", "remainder") if name in state}
        copies = {name: _laid_out(t, dense) for name, t in arrays.items()}
        if self.grad is not None:
            copies["grad"] = _laid_out(self.grad, dense)
        flat = {name: flat_view(t) for name, t in copies.items()}
        values = flat_view(dense)
        size = BLOCK if weight.device.type == "cpu" else values.numel()
        for start in range(0, values.numel(), size):
            self._step_block(start, values[start : start + size], {k: t[start : start + size] for k, t in flat.items()})
        for name, array in arrays.items():
            if copies[name].data_ptr() != array.data_ptr():
                array.copy_(copies[name])
        if dense is not weight:
            weight.copy_(dense)

    def _step_block(self, start: int, stored: Tensor, arrays: dict[str, Tensor]) -> None:
        dtype = compute_dtype(stored.dtype)
        wide = stored.to(dtype)  # the weights themselves where they have the dtype of the arithmetic
        g = self.scratch.take("gradient", wide, dtype)
        g.copy_(arrays["grad"]) if "grad" in arrays else g.zero_()
        if self.scale != 1.0:
            g.mul_(self.scale)
        pull = None
        if self.pull is not None:
            if self.rule.penalty.mode == "coupled":
                put(g, wide, self.pull, self.scratch, add=True)
            else:
                pull = self.scratch.take("pull", wide, dtype)
                put(pull, wide, self.pull, self.scratch, add=False)
        x = _current(stored, wide, arrays)
        states = {name: arrays[name].to(dtype) for name in self.names}
        columns = [[states.get(name)] for name in STATE_NAMES[self.rule.algorithm]]
        self.call([x], [g], columns, [self.slot.state.get("step")])
        if pull is not None:
            x.add_(pull)
        if self.slot.words is not None:
            keep_block_((x, *states.values()), self.slot.words, start)
        for name, t in states.items():
            if t is not arrays[name]:
                arrays[name].copy_(t)
        self._store(start, stored, x, arrays)

    def _store(self, start: int, stored: Tensor, x: Tensor, arrays: dict[str, Tensor]) -> None:
        """Write new values back, rounded as the rule says."""
        if "remainder" in arrays:
            bits = torch.where(x == x, x, torch.full_like(x, torch.nan)).view(torch.int32)
            high = (bits + 0x8000) >> 16
            arrays["remainder"].copy_(bits - (high << 16))
            stored.view(torch.int16).copy_(high)
        elif self.rule.stochastic and stored.dtype == torch.bfloat16:
            key = _mixed(_mixed((int(self.group["seed"]) & _WORD) ^ self.slot.order) ^ self.count)
            stored.copy_(_rounded_at_random(x, key, start))
        elif x.data_ptr() != stored.data_ptr():
            stored.copy_(x)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the values of a tensor laid out like another one: itself where it is, else a copy."""
    tensor = tensor.detach()
    return tensor if same_layout(like, tensor) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _current(stored: Tensor, wide: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """Return the values that the update starts from, in the dtype of the arithmetic; written in place by it."""
    if "master" in arrays:
        master = arrays["master"]
        # A weight that somebody else wrote since counts, not the master copy of its old value.
        return master.copy_(torch.where(master.to(stored.dtype) == stored, master, wide))
    if "remainder" in arrays:
        high = stored.view(torch.int16).to(torch.int32) << 16
        joined = (high + arrays["remainder"].to(torch.int32)).view(torch.float32)
        return joined.masked_fill_(stored == 0, 0.0)  # pruned since by somebody else
    return wide


_WORD = 0xFFFFFFFF


def _mixed(x: Any) -> Any:
    """Scramble 32 bits held in wider integers (lowbias32, Chris Wellons, public domain)."""
    x = (x ^ (x >> 16)) & _WORD
    x = (x * 0x7FEB352D) & _WORD
    x = (x ^ (x >> 15)) & _WORD
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _rounded_at_random(x: Tensor, key: int, start: int) -> Tensor:
    """Round float32 to bfloat16 values as the kernels do: the noise is a hash of seed, parameter, step and place."""
    places = torch.arange(start, start + x.numel(), device=x.device)
    chunk_keys = torch.tensor(
        [_mixed(key ^ c) for c in range(start // _CHUNK, (start + x.numel() - 1) // _CHUNK + 1)], device=x.device
    )
    keys = chunk_keys[places // _CHUNK - start // _CHUNK]
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    rounded = (bits + (_mixed(keys ^ (places % _CHUNK)) & 0xFFFF)) & 0xFFFF0000
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32).view(torch.float32)
    return torch.where(x.abs() < torch.inf, rounded, x)
