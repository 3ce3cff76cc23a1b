"""Magnitude selection as users write it today: what ours is compared with.

All rank the magnitudes of the whole list in one tensor, ``torch.cat`` of the weights, except for selection layer by
layer. Where torch offers a choice, the form with fewer temporaries is taken: ``abs_`` of the copy, masks from indices.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Return the magnitudes of all weights in one tensor."""
    return torch.cat([w.detach().reshape(-1) for w in weights]).abs_()


def _partition(x: Tensor, places: Sequence[int]) -> Tensor:
    """Return the values at these places of the sorted magnitudes; by NumPy, or by CuPy on a GPU."""
    x = x.float()  # neither has bfloat16
    if x.device.type == "cpu":
        return torch.from_numpy(np.partition(x.numpy(), list(places))[list(places)])
    cupy = importlib.import_module("cupy")
    return torch.from_dlpack(cupy.partition(cupy.from_dlpack(x), list(places))[list(places)])


def _places(x: Tensor, keep: Sequence[int]) -> list[int]:
    return [x.numel() - k for k in keep]


#: way -> the thresholds of magnitudes (1-d) that keep so many, 1-d
THRESHOLDS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "topk": lambda x, keep: x.topk(max(keep)).values[[k - 1 for k in keep]],
    "topk unsorted": lambda x, keep: torch.stack([x.topk(k, sorted=False).values.min() for k in keep]),
    "kthvalue": lambda x, keep: torch.stack([x.kthvalue(p + 1).values for p in _places(x, keep)]),
    "sort": lambda x, keep: x.sort(descending=True).values[[k - 1 for k in keep]],
    "partition": lambda x, keep: _partition(x, _places(x, keep)),
}
#: way -> where the ``keep`` largest magnitudes (1-d) are, as bool
LARGEST: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk unsorted": lambda x, keep: _marked(x, x.topk(keep, sorted=False).indices),
    "sort": lambda x, keep: _marked(x, x.argsort(descending=True, stable=True)[:keep]),
    "kthvalue": lambda x, keep: x >= x.kthvalue(x.numel() - keep + 1).values,  # keeps all ties
}


def _marked(x: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool).index_fill_(0, indices, True)


def ways(device: str) -> list[str]:
    """Return the ways to find a threshold that there are on a device."""
    absent = {"partition"} if device == "cuda" and importlib.util.find_spec("cupy") is None else set()
    return [way for way in THRESHOLDS if way not in absent]


def masks(way: str, weights: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Return the keep masks of a list."""
    parts = LARGEST[way](joined(weights), keep).split([w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


def prune_(way: str, weights: Sequence[Tensor], keep: int) -> Sequence[Tensor]:
    """Set to zero what the way's masks don't keep; return the weights."""
    for w, mask in zip(weights, masks(way, weights, keep), strict=True):
        w.mul_(mask)
    return weights


#: way -> the indices of the n largest in every line of magnitudes
GROUPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk unsorted": lambda x, n: x.topk(n, dim=1, sorted=False).indices,
    "sort": lambda x, n: x.argsort(dim=1, descending=True)[:, :n],
}


def prune_groups_(way: str, weights: Sequence[Tensor], n: int, m: int) -> Sequence[Tensor]:
    """Keep the n largest of every m weights along dimension 1, in place, weight by weight; return the weights."""
    for w in weights:
        lines = w.detach().movedim(1, -1)
        part = lines[..., : lines.shape[-1] // m * m]
        groups = part.reshape(-1, m).abs()
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, GROUPS[way](groups, n), True)
        part.mul_(keep.view(part.shape))
    return weights


class Holder(nn.Module):
    """Weights as modules with a ``weight`` each: the form that torch's pruning asks for."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for w in weights:
            layer = nn.Module()
            layer.weight = nn.Parameter(w)
            self.layers.append(layer)


def global_unstructured(holder: Holder, sparsity: float) -> list[Tensor]:
    """Prune a fresh holder, as ``torch.nn.utils.prune`` does; return its pruned weights (the originals stay)."""
    parameters = [(layer, "weight") for layer in holder.layers]
    torch_prune.global_unstructured(parameters, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    return [layer.weight for layer in holder.layers]


class Lines(nn.Module):
    """Weights as linear layers, which NNCF can trace."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([w.detach().flatten(1) for w in weights])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x[:, : w.shape[1]], w) for w in self.weights]


def in_nncf(weights: Sequence[Tensor], sparsity: float) -> Any:
    """Return NNCF's pruned model of the weights: what ``nncf_masks`` updates."""
    nncf = importlib.import_module("nncf")
    model = Lines(weights)
    inputs = weights[0].new_zeros(1, max(w[0].numel() for w in weights))
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    return nncf.prune(model, mode, ratio=sparsity, examples_inputs=inputs)


def nncf_masks(model: Any, sparsity: float) -> list[Tensor]:
    """Renew the masks of ``in_nncf``'s model, layer by layer: what its schedulers call at every step."""
    magnitude = importlib.import_module("nncf.torch.function_hook.pruning.magnitude.algo")
    nncf = importlib.import_module("nncf")
    magnitude.update_pruning_ratio(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, sparsity)
    hooks = magnitude.get_pruned_modules(model)
    return [hooks[name].binary_mask for name in sorted(hooks, key=lambda name: int(name.rpartition(".")[2]))]


def nncf_keep(sparsity: float, numel: int) -> int:
    """Return how many weights of a layer NNCF keeps, by its own rounding, where there are no ties."""
    return numel - int((numel - 1) * sparsity) - 1
