"""A fused optimizer's step in torch: its own fused kernels, fed with blocks whose gradient has the penalty's in it.

The penalty's gradient is added in a copy of the gradient, a block at a time and still in cache; the user's gradient
is not touched. Small parameters share a block's room and a call. Where weight and state need no such care (no penalty,
no mask, one dtype) the whole list goes to torch in one call. Moments are taken anew at every step, so no write to a
weight can go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wcr_fast.slots import STATE_NAMES, Rule, Slot, Step
from wcr_fast.torch_path.keep import keep_block_
from wcr_fast.torch_path.layout import flat_view, is_dense, same_layout
from wcr_fast.torch_path.moments import BLOCK, Scratch, compute_dtype, pulls, put

_CHUNK = 32768  # the noise of stochastic rounding is hashed by chunk and place in it


class StepPlan:
    """The step of an optimizer whose parameters and states stay where they are."""

    def __init__(self, slots: Sequence[Slot], rule: Rule) -> None:
        self._slots, self._rule = slots, rule
        self._updates = [_Update(slot, rule, place) for place, slot in enumerate(slots)]
        # How the last step was taken.
        self._sorted_by: tuple = ()
        self._batches: list[_Batch] = []
        self._queued: list[_Update] = []
        self._steps: list[Tensor] = []

    def run(self, step: Step, stats: Tensor | None, coef: Tensor | None, *, repeated: bool = False) -> None:
        """Step every slot that has a gradient, or a penalty; see :class:`wcr_fast.optim.FusedOptimizer`.

        stats [4, L] and coef [3, L] are those of the penalised weights, by ``slot.layer``, as they are now. repeated:
        all slots have gradients, of the dtypes and layouts that they had when it last ran.
        """
        if not repeated:
            self._sorted_by = ()
        if step.found_inf is not None and step.found_inf.item():
            return
        pull = _pulls(self._slots, self._rule, step, stats, coef)
        scale = 1.0 if step.grad_scale is None else 1.0 / float(step.grad_scale)
        begun: list[_Update] = []
        sorted_by = scale == 1.0, *pull
        if sorted_by != self._sorted_by or self._queued or any(batch.counts for batch in self._batches):
            begun = self._begin(step, pull, scale)
        if sorted_by != self._sorted_by:
            self._sort(begun)
            self._sorted_by = sorted_by
        if self._steps:  # of parameters without elements, too: other ranks may hold some
            torch._foreach_add_(self._steps, 1.0)
        queue = _Queue(self._rule)
        for update in self._queued:
            queue.add(update)
        queue.flush()
        for batch in self._batches:
            batch.run(step)
        for update in begun:
            update.grad = None  # it is not kept alive until the next step

    def _begin(self, step: Step, pull: dict[int, tuple[float, ...]], scale: float) -> list[_Update]:
        """Tell the updates what holds for this step; return those that step."""
        begun = []
        for update, grad in zip(self._updates, step.grads, strict=True):
            slot = update.slot
            if grad is not None or slot.layer in pull:
                update.begin(grad, step.groups[slot.group], pull.get(slot.layer), scale)
                begun.append(update)
        return begun

    def _sort(self, begun: Sequence[_Update]) -> None:
        """Find out which parameters torch's kernels can take as they are."""
        whole: dict[tuple, list[_Update]] = {}
        self._queued = []
        self._steps = [u.slot.state["step"] for u in begun if "step" in u.slot.state]
        for update in begun:
            if update.slot.weight.numel() == 0:
                continue
            if update.is_plain():
                whole.setdefault(update.kind(), []).append(update)
            else:
                self._queued.append(update)
        self._batches = [_Batch(updates) for updates in whole.values()]


class _Batch:
    """Parameters of one kind that torch's kernel takes in one call, as they are."""

    def __init__(self, updates: Sequence[_Update]) -> None:
        self._first, slots = updates[0], [u.slot for u in updates]
        self._places = [u.place for u in updates]
        self._weights = [slot.weight.detach() for slot in slots]
        self._states = [[slot.state.get(name) for slot in slots] for name in STATE_NAMES[self._first.rule.algorithm]]
        self._steps = [slot.state["step"] for slot in slots if "step" in slot.state]

    @property
    def counts(self) -> bool:
        """Whether the call depends on the number of the step."""
        return self._first.counts

    def run(self, step: Step) -> None:
        grads = [step.grads[place] for place in self._places]
        group = step.groups[self._first.slot.group]
        self._first.call(group, self._weights, grads, self._states, self._steps)


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
    felt = {slot.layer for slot in slots if step.pulls_at(slot)}
    return {layer: pull for layer, pull in enumerate(pulls(stats, coef, sizes, lams)) if layer in felt}


class _Update:
    """The step of one parameter: what stays, and after ``begin`` what holds for this step."""

    grad: Tensor | None
    group: dict[str, Any]
    pull: tuple[float, ...] | None
    scale: float
    count = 1  # of the steps before this one, where it matters

    def __init__(self, slot: Slot, rule: Rule, place: int) -> None:
        self.slot, self.rule, self.place = slot, rule, place
        self.counts = "step" in slot.state and (rule.algorithm == "sgd" or rule.stochastic)
        self.names = [name for name in STATE_NAMES[rule.algorithm] if name in slot.state]
        self._views: _Views | None = None

    def begin(self, grad: Tensor | None, group: dict[str, Any], pull: tuple[float, ...] | None, scale: float) -> None:
        self.grad, self.group, self.pull, self.scale = grad, group, pull, scale
        if self.counts:
            self.count = int(self.slot.state["step"].item())

    def kind(self) -> tuple:
        """Return what the parameters of one call have in common."""
        weight = self.slot.weight
        return self.slot.group, weight.device, compute_dtype(weight.dtype), self.count == 0

    def is_plain(self) -> bool:
        """Tell whether torch's own kernel can take the arrays as they are."""
        weight = self.slot.weight
        special = self.pull or self.slot.words is not None or self.rule.master or self.rule.stochastic
        # 16-bit weights are stepped in float32: torch 2.13's fused SGD is wrong for them on the CPU.
        if special or self.scale != 1.0 or weight.dtype != compute_dtype(weight.dtype) or not is_dense(weight):
            return False
        arrays = [self.grad, *(self.slot.state[name] for name in self.names)]
        return all(t.dtype == weight.dtype and same_layout(weight, t) for t in arrays)

    def call(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        states: Sequence[list[Tensor | None]],
        steps: list[Tensor],
    ) -> None:
        """Call torch's fused kernel on lists of this update's kind, with the options of its group."""
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
                is_first_step=self.count == 0,
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

    def views(self) -> _Views:
        """Return the parameter's arrays as they are stepped; they serve every step, but where a copy was needed."""
        if self._views is not None:
            return self._views
        weight, state = self.slot.weight.detach(), self.slot.state
        dense = weight if is_dense(weight) else weight.clone()
        arrays = {name: state[name] for name in (*self.names, "master", "remainder") if name in state}
        copies = {name: _laid_out(t, dense) for name, t in arrays.items()}
        pairs = [(weight, dense), *((arrays[name], copies[name]) for name in arrays)]
        copied = [(into, made) for into, made in pairs if into.data_ptr() != made.data_ptr()]
        values, flat = flat_view(dense), {name: flat_view(t) for name, t in copies.items()}
        size = BLOCK if weight.device.type == "cpu" else values.numel()
        blocks = []
        for start in range(0, values.numel(), size):
            here = slice(start, start + size)
            blocks.append(_Block(start, values[here], {name: t[here] for name, t in flat.items()}))
        views = _Views(dense, blocks, copied)
        if not copied:
            self._views = views
        return views


@dataclass(frozen=True)
class _Views:
    """A parameter's arrays in blocks of memory order; those laid out otherwise than the weight are copies."""

    dense: Tensor  # the weight, or a copy without gaps
    blocks: list[_Block]
    copied: list[tuple[Tensor, Tensor]]  # where to write back to, and what

    def finish(self) -> None:
        """Write copies back, when all blocks are done."""
        for into, made in self.copied:
            into.copy_(made)


class _Block:
    """Some elements of one parameter: from what is stored to what is stored anew."""

    def __init__(self, start: int, stored: Tensor, arrays: dict[str, Tensor]) -> None:
        self.start, self.stored, self.arrays = start, stored, arrays

    def prepare(self, update: _Update, grad: Tensor | None, scratch: Scratch, used: int) -> None:
        """Make ready what torch's kernel is given, in the dtype of the arithmetic: values, gradient and state."""
        stored, size = self.stored, self.stored.numel()
        dtype = compute_dtype(stored.dtype)
        wide = _widened(stored, dtype)
        if grad is not None and grad.numel() != size:
            grad = grad[self.start : self.start + size]
        g = self.gradient = scratch.take("gradient", wide, dtype, used)
        if update.scale != 1.0 and grad is not None:
            grad = g.copy_(grad).mul_(update.scale)
        coupled = update.pull is not None and update.rule.penalty.mode == "coupled"
        if coupled:
            base = grad if grad is None or grad.dtype == dtype else g.copy_(grad)
            put(g, wide, update.pull, scratch, base=base)
        elif grad is None:
            g.zero_()
        else:
            g.copy_(grad)
        self.pull = None
        if update.pull is not None and not coupled:
            self.pull = scratch.take("pull", wide, dtype, used)
            put(self.pull, wide, update.pull, scratch, base=None)
        self.values = _current(stored, wide, self.arrays)
        self.states = {name: _widened(self.arrays[name], dtype) for name in update.names}

    def finish(self, update: _Update) -> None:
        """Add what goes outside of the kernel, enforce the mask, and store."""
        if self.pull is not None:
            self.values.add_(self.pull)
        if update.slot.words is not None:
            keep_block_((self.values, *self.states.values()), update.slot.words, self.start)
        for name, t in self.states.items():
            if t is not self.arrays[name]:
                self.arrays[name].copy_(t)
        self._store(update)
        del self.values, self.gradient, self.pull, self.states  # not kept until the next step

    def _store(self, update: _Update) -> None:
        """Write new values back, rounded as the rule says."""
        arrays, stored, x = self.arrays, self.stored, self.values
        if "remainder" in arrays:
            bits = torch.where(x == x, x, torch.full_like(x, torch.nan)).view(torch.int32)
            high = (bits + 0x8000) >> 16
            arrays["remainder"].copy_(bits - (high << 16))
            stored.view(torch.int16).copy_(high)
        elif update.rule.stochastic and stored.dtype == torch.bfloat16:
            key = _mixed(_mixed((int(update.group["seed"]) & _WORD) ^ update.slot.order) ^ update.count)
            stored.copy_(_rounded_at_random(x, key, self.start))
        elif x is not stored:
            stored.copy_(x)


class _Queue:
    """Blocks that wait for one call of torch's kernel: as many of one kind as make up a block, still in cache."""

    def __init__(self, rule: Rule) -> None:
        self._names = STATE_NAMES[rule.algorithm]
        self._scratch = Scratch(rule.penalty.r if rule.penalty else 0.0)
        self._kind: tuple = ()
        self._waiting: list[tuple[_Update, _Views, _Block]] = []
        self._used = 0

    def add(self, update: _Update) -> None:
        """Make a parameter's blocks ready, and have those called that don't fit in with them."""
        kind = update.kind()
        if kind != self._kind:
            self.flush()
            self._kind = kind
        views = update.views()
        grad = None if update.grad is None else flat_view(_laid_out(update.grad, views.dense))
        for block in views.blocks:
            size = block.stored.numel()
            if self._used + size > BLOCK:
                self.flush()
            block.prepare(update, grad, self._scratch, self._used)
            self._waiting.append((update, views, block))
            self._used += size

    def flush(self) -> None:
        """Step the blocks that wait."""
        if not self._waiting:
            return
        waiting, self._waiting, self._used = self._waiting, [], 0
        updates, _, blocks = zip(*waiting, strict=True)
        updates[0].call(
            updates[0].group,
            [b.values for b in blocks],
            [b.gradient for b in blocks],
            [[b.states.get(name) for b in blocks] for name in self._names],
            [u.slot.state["step"] for u in updates if "step" in u.slot.state],
        )
        for update, views, block in waiting:
            block.finish(update)
            if block is views.blocks[-1]:
                views.finish()


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in the dtype of the arithmetic: themselves where they have it."""
    return values if values.dtype == dtype else values.to(dtype)


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
