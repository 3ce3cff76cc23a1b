"""The weights that masks are for, found by their names in a model, a state_dict or a list of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.ops.sharded import is_sharded
from wcr_fast.pruning.prune import check_writable
from wcr_fast.weights import Weight, as_weights, check_plain

Named = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]

# What holds a model under another name, with all its parameters.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


def listed(model: Any) -> Any:
    """Return the model inside of wrappers, so that names are its own; an iterable of tensors as a list."""
    while isinstance(model, _WRAPPERS) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
    once = isinstance(model, Iterable) and not isinstance(model, (nn.Module, Tensor, Mapping))
    return list(model) if once else model


def remember(source: Any) -> Any:
    """Return weak references to a module, or to tensors: masks keep no model alive."""
    if source is None or isinstance(source, Mapping):
        return None
    if isinstance(source, (nn.Module, Tensor)):
        return weakref.ref(source)
    return tuple(weakref.ref(t) for t in source)


def recalled(source: Any) -> Named | None:
    """Return what ``remember`` was given, while it exists."""
    if isinstance(source, tuple):
        found = [ref() for ref in source]
        return None if any(t is None for t in found) else found
    return None if source is None else source()


def find(target: Named, names: Sequence[str], op: str) -> dict[str, Weight]:
    """Return the weights of these names; raise ValueError when one is missing."""
    if isinstance(target, nn.Module):
        target = _unwrapped(target, names)
        found = {name: weight for name in names if (weight := _parameter(target, name)) is not None}
        known = [name for name, _ in target.named_parameters()]
    else:
        tensors = (
            target
            if isinstance(target, Mapping)
            else {w.name: w.param for w in as_weights(target, op=op, sharded=True)}
        )
        found = {name: Weight(name, tensors[name], (name,)) for name in names if name in tensors}
        known = list(tensors)
    missing = [name for name in names if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        there = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(f"{op}: there is no parameter {missing[0]}{more}; there are: {there or 'none'}")
    return found


def check_fits(weight: Weight, shape: Sequence[int], op: str) -> None:
    """Raise for a weight that can't have a mask of this shape, or can't be written."""
    param = weight.param
    if not is_sharded(param):
        check_plain(param, f"{op}: {weight.name}")
    if not param.is_floating_point() or param.element_size() < 2:
        raise TypeError(f"{op}: {weight.name} must be float16, bfloat16, float32 or float64, got {param.dtype}")
    if param.shape != shape:
        raise ValueError(f"{op}: {weight.name} has shape {tuple(param.shape)}, its mask {tuple(shape)}")
    check_writable(weight, op)


def optimizer_names(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the parameters of an optimizer that was built on named ones."""
    named = [zip(group.get("param_names", ()), group["params"]) for group in optimizer.param_groups]  # noqa: B905
    return {name: param for pairs in named for name, param in pairs}


def _parameter(model: nn.Module, name: str) -> Weight | None:
    """Return the parameter of this name, with the module that owns it, or None."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    param = module._parameters.get(attribute)
    return None if param is None else Weight(name, param, (name,), owner=(module, attribute))


def _unwrapped(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the module inside of wrappers (averaged, distributed, compiled) whose parameters have these names."""
    inside: nn.Module | None = model
    while inside is not None:
        if all(_parameter(inside, name) is not None for name in names):
            return inside
        inside = next((m for key in ("module", "_orig_mod") if (m := inside._modules.get(key)) is not None), None)
    return model
