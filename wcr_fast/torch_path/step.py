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
from wcr_fast.torch_path.layout import flat_view, is_dense, same_layout
from wcr_fast.torch_path.moments import BLOCK, Scratch, compute_dtype, pulls, put

_CHUNK = 32768  # of the interleaved mask words
_WORDS = 1024


def step_(slots: Sequence[Slot], rule: Rule, step: Step, stats: Tensor | None, coef: Tensor | None) -> None:
    """Step the slots that have a gradient, or a penalty; see :class:`wcr_fast.optim.FusedOptimizer`.

    stats [4, L] and coef [3, L] are those of the penalised weights, by ``slot.layer``, as they are now.
    """
    if step.found_inf is not None and step.found_inf.item():
        return
    scale = 1.0 if step.grad_scale is None else 1.0 / float(step.grad_scale)
    layers = _layers(slots, rule, step, stats, coef)
    whole: dict[tuple, list[int]] = {}
    pieces = []
    for i, (slot, grad) in enumerate(zip(slots, step.grads, strict=True)):
        layer = layers.get(slot.layer)
        if slot.weight.numel() == 0 or (grad is None and layer is None):
            continue
        first = "step" in slot.state and not slot.state["step"].item()
        if "step" in slot.state:
            slot.state["step"] += 1
        if layer is None and scale == 1.0 and _plain(slot, grad, rule):
            whole.setdefault((slot.group, slot.weight.device, slot.weight.dtype, first), []).append(i)
        else:
            pieces.append((slot, grad, layer, first))
    for (group, _, _, first), places in whole.items():
        chosen = [slots[i] for i in places]
        states = [[s.state.get(name) for s in chosen] for name in STATE_NAMES[rule.algorithm]]
        steps = [s.state["step"] for s in chosen] if rule.algorithm == "adamw" else []
        weights, grads = [s.weight.detach() for s in chosen], [step.grads[i] for i in places]
        _fused(rule.algorithm, weights, grads, states, steps, step.groups[group], first)
    scratch = Scratch(0.0 if rule.penalty is None else rule.penalty.r)
    for slot, grad, layer, first in pieces:
        _step_slot(slot, grad, rule, step.groups[slot.group], layer, scale, first, scratch)


def _layers(
    slots: Sequence[Slot], rule: Rule, step: Step, stats: Tensor | None, coef: Tensor | None
) -> dict[int, tuple[float, ...]]:
    """Return the pull of every layer that has one now."""
    if rule.penalty is None or stats is None or coef is None:
        return {}
    sizes, lams = [1] * stats.shape[1], [0.0] * stats.shape[1]
    for slot in slots:
        if slot.layer >= 0:
            group = step.groups[slot.group]
            sizes[slot.layer] = slot.layer_size
            lams[slot.layer] = float(group["lam"])
            if rule.penalty.mode == "decoupled":
                lams[slot.layer] *= -float(group["lr"])
    return {i: layer for i, (layer, lam) in enumerate(zip(pulls(stats, coef, sizes, lams), lams)) if lam != 0.0}


def _plain(slot: Slot, grad: Tensor, rule: Rule) -> bool:
    """Tell whether torch's own kernel can take the arrays as they are."""
    weight = slot.weight
    states = [slot.state[name] for name in STATE_NAMES[rule.algorithm] if slot.state.get(name) is not None]
    return (
        slot.words is None
        and rule.master is None
        and not rule.stochastic
        and all(t.dtype == weight.dtype for t in (grad, *states))
        and is_dense(weight)
        and all(same_layout(weight, t) for t in (grad, *states))
    )


def _fused(
    algorithm: str,
    weights: list[Tensor],
    grads: list[Tensor],
    states: Sequence[list[Tensor | None]],
    steps: list[Tensor],
    group: dict[str, Any],
    first: bool,
) -> None:
    """Call torch's fused kernel on lists; ``steps`` are counted already."""
    if algorithm == "sgd":
        momentum = float(group["momentum"])
        torch._fused_sgd_(
            weights,
            grads,
            states[0] if momentum else [],
            weight_decay=float(group["weight_decay"]),
            momentum=momentum,
            lr=float(group["lr"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            is_first_step=first,
        )
        return
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        weights,
        grads,
        states[0],
        states[1],
        states[2] if group["amsgrad"] else [],
        steps,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
    )


def _in_step(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the values of a tensor laid out like another one: itself where it is, else a copy."""
    tensor = tensor.detach()
    return tensor if same_layout(like, tensor) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _step_slot(
    slot: Slot,
    grad: Tensor | None,
    rule: Rule,
    group: dict[str, Any],
    layer: tuple[float, ...] | None,
    scale: float,
    first: bool,
    scratch: Scratch,
) -> None:
    weight = slot.weight.detach()
    names = [name for name in STATE_NAMES[rule.algorithm] if slot.state.get(name) is not None]
    master = slot.state.get("master", slot.state.get("remainder"))
    arrays = {name: slot.state[name] for name in names}
    if grad is not None:
        arrays["grad"] = grad
    if master is not None:
        arrays["master"] = master
    dense = weight if is_dense(weight) else weight.clone()
    arrays = {name: _in_step(t, dense) for name, t in arrays.items()}
    flat = {name: flat_view(t) for name, t in arrays.items()}
    values = flat_view(dense)
    size = BLOCK if weight.device.type == "cpu" else max(values.numel(), 1)
    key = _key(group, slot, values.numel()) if rule.stochastic else 0
    for start in range(0, values.numel(), size):
        block = {name: t[start : start + size] for name, t in flat.items()}
        kept = None if slot.words is None else unpack_words(slot.words, start, min(size, values.numel() - start))
        _step_block(
            values[start : start + size],
            block,
            names,
            rule,
            group,
            slot,
            layer,
            scale,
            first,
            kept,
            (key, start),
            scratch,
        )
    for name, t in arrays.items():
        target = master if name == "master" else slot.state.get(name)
        if target is not None and t.data_ptr() != target.data_ptr():
            target.copy_(t)
    if dense is not weight:
        weight.copy_(dense)


def _step_block(
    stored: Tensor,
    arrays: dict[str, Tensor],
    names: Sequence[str],
    rule: Rule,
    group: dict[str, Any],
    slot: Slot,
    layer: tuple[float, ...] | None,
    scale: float,
    first: bool,
    kept: Tensor | None,
    noise: tuple[int, int],
    scratch: Scratch,
) -> None:
    dtype = compute_dtype(stored.dtype)
    wide = stored.to(dtype)  # the weight itself where it has the dtype of the arithmetic
    x = _current(stored, wide, arrays.get("master"), rule.master)
    g = scratch.take("gradient", stored, dtype)
    g.zero_() if "grad" not in arrays else g.copy_(arrays["grad"])
    if scale != 1.0:
        g.mul_(scale)
    pull = None
    if layer is not None and rule.penalty is not None:
        if rule.penalty.mode == "coupled":
            put(g, wide, layer, scratch, add=True)
        else:
            pull = scratch.take("pull", wide, dtype)
            put(pull, wide, layer, scratch, add=False)
    states = {name: arrays[name].to(dtype) for name in names}
    columns = [[states[name]] if name in states else [None] for name in STATE_NAMES[rule.algorithm]]
    steps = [slot.state["step"]] if rule.algorithm == "adamw" else []
    _fused(rule.algorithm, [x], [g], columns, steps, group, first)
    if pull is not None:
        x.add_(pull)
    if kept is not None:
        for t in (x, *states.values()):
            t.masked_fill_(~kept, 0.0)
    for name, t in states.items():
        if t is not arrays[name]:
            arrays[name].copy_(t)
    _store(stored, x, arrays.get("master"), rule, noise)


def _current(stored: Tensor, wide: Tensor, master: Tensor | None, kind: str | None) -> Tensor:
    """Return the values that the update starts from, in the dtype of the arithmetic."""
    if master is None:
        return wide
    if kind == "float32":
        # A weight that somebody else wrote since counts, not the master copy of its old value.
        return master.copy_(torch.where(master.to(stored.dtype) == stored, master, wide))
    high = stored.view(torch.int16).to(torch.int32) << 16
    return (high + master.to(torch.int32)).view(torch.float32)


def _store(stored: Tensor, x: Tensor, master: Tensor | None, rule: Rule, noise: tuple[int, int]) -> None:
    """Write new values back, rounded as the rule says."""
    if rule.master == "remainder" and master is not None:
        bits = torch.where(x == x, x, torch.full_like(x, torch.nan)).view(torch.int32)
        high = (bits + 0x8000) >> 16
        master.copy_(bits - (high << 16))
        stored.view(torch.int16).copy_(high)
    elif rule.stochastic and stored.dtype == torch.bfloat16:
        stored.copy_(_rounded_at_random(x, *noise))
    elif x.data_ptr() != stored.data_ptr():
        stored.copy_(x)


_WORD = 0xFFFFFFFF


def _mixed(x: Any) -> Any:
    """Scramble 32 bits held in wider integers (lowbias32, Chris Wellons, public domain)."""
    x = (x ^ (x >> 16)) & _WORD
    x = (x * 0x7FEB352D) & _WORD
    x = (x ^ (x >> 15)) & _WORD
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _key(group: dict[str, Any], slot: Slot, numel: int) -> int:
    """Return what the noise of this tensor and step depends on; the step is counted already."""
    key = _mixed((int(group["seed"]) & _WORD) ^ slot.order)
    return _mixed(key ^ (int(slot.state["step"].item()) - 1))


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


def unpack_words(words: Tensor, start: int, count: int) -> Tensor:
    """Return which of ``count`` elements from ``start`` (a multiple of 32768) stay, bool, from interleaved words."""
    parts = []
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)[:, None]
    for chunk in range(start // _CHUNK, -(-(start + count) // _CHUNK)):
        part = words[chunk * _WORDS : (chunk + 1) * _WORDS]
        bits = ((part >> shifts) & 1).bool()
        if part.numel() == _WORDS:
            parts.append(bits.view(-1))
        else:  # a last chunk shorter than a row of words: only its first row has elements
            parts.append(bits[0])
    return torch.cat(parts)[:count] if len(parts) != 1 else parts[0][:count]
