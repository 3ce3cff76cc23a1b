"""The ``state_dict`` of models under ``torch.nn.utils.prune``: NAME_orig and NAME_mask in place of NAME."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ORIG, MASK = "_orig", "_mask"


def pairs(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (values, mask) by the name of the weight; raise ValueError where there is none, or shapes differ."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected the state_dict of a model under torch.nn.utils.prune, got {type(state_dict).__name__}"
        )
    names = [key.removesuffix(ORIG) for key in state_dict if key.endswith(ORIG)]
    found = {n: (state_dict[n + ORIG], state_dict[n + MASK]) for n in names if n + MASK in state_dict}
    if not found:
        raise ValueError(f"no NAME{ORIG} with a NAME{MASK}: this is no state_dict of torch.nn.utils.prune")
    for name, (values, mask) in found.items():
        if values.shape != mask.shape:
            raise ValueError(f"{name}{ORIG} has shape {tuple(values.shape)}, its mask {tuple(mask.shape)}")
    return found


def wrapped(state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict with NAME_orig and NAME_mask for every masked NAME."""
    result = {}
    for name, tensor in state_dict.items():
        if name in masks:
            result[name + ORIG], result[name + MASK] = tensor, masks[name]
        else:
            result[name] = tensor
    return result


def dense_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain ``state_dict`` of a model under ``torch.nn.utils.prune``: removed weights are +0.0.

    By selection, where torch multiplies: what is removed is +0.0, not -0.0 or NaN.

    Raises:
        ValueError: when nothing in it is pruned, or shapes differ.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> model = torch.nn.Linear(4, 4)
        >>> _ = prune.l1_unstructured(model, "weight", 0.25)
        >>> sorted(dense_state_dict(model.state_dict()))
        ['bias', 'weight']
    """
    found = pairs(state_dict)
    result = {}
    for key, tensor in state_dict.items():
        if key.removesuffix(ORIG) in found and key.endswith(ORIG):
            values, mask = found[key.removesuffix(ORIG)]
            result[key.removesuffix(ORIG)] = torch.where(mask != 0, values, torch.zeros_like(values))
        elif not (key.endswith(MASK) and key.removesuffix(MASK) in found):
            result[key] = tensor
    return result
