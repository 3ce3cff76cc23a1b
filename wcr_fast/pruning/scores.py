"""Masks by scores other than the magnitude, and the norms that Wanda asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcr_fast.ops import select
from wcr_fast.pruning.ranking import Aux, Bound, Ranking
from wcr_fast.score import Score
from wcr_fast.weights import Exclude, Weights, as_weights, choose


def score_masks(
    weights: Weights,
    sparsity: float | None,
    score: str | Score = "magnitude",
    *,
    aux: Aux = None,
    scope: str = "global",
    floor: Bound = None,
    cap: Bound = None,
    exclude: Exclude = (),
) -> list[Tensor]:
    """Return masks of the weights that stay (True = kept): those with the largest scores.

    Of N weights the N - round(sparsity * N) best stay, exactly; of equal scores the first ones, in list order, then in
    logical row-major order. Scores are computed where they are compared and never stored. In float32 (float64 for
    float64 weights), each operation rounded, as written:

    - ``"magnitude"``: abs(w)
    - ``"gradient"``: abs(w * g), first order; aux defaults to the parameters' ``.grad``
    - ``"fisher"``: w * w * F, second order, F any diagonal that isn't negative
    - ``"wanda"``: abs(w) * norm of the input (arXiv 2306.11695; its own scope is ``"row"``): see :func:`column_norms`
    - ``"normalised"``: abs(w) / root mean square of the layer
    - ``"lamp"``: w^2 / sum of the layer's squares that are at least as large (arXiv 2010.07611), in float64
    - a :class:`wcr_fast.Score` of your own

    Args:
        weights: a tensor, a module (its weights with two or more dimensions, without normalisation), or tensors.
        sparsity: the fraction removed, in [0, 1]; None for the n:m scopes.
        score: a name, or a Score.
        aux: what the score needs beside each weight: a list, or a dict by parameter name; of the weight's shape, or
            for ``"wanda"`` 1-d, one number per input (of a convolution per input channel, or per input channel
            and place in the kernel).
        scope: ``"global"``, ``"layer"``, ``"row"`` or n:m such as ``"2:4"``.
        floor: for scope ``"global"``: the share of each layer that stays at least, one number, or by name pattern (the
            first match counts); above 0 a layer keeps one weight.
        cap: the share of each layer that stays at most.
        exclude: what to leave out of a module.

    Returns:
        One contiguous bool tensor per weight, with its shape and on its device.

    Raises:
        ValueError: aux missing or of the wrong shape, a negative or NaN score (naming the weight), floors and caps that
            leave no room for the number of weights to keep. TypeError: for DTensors.

    Exactness: the same masks whatever backend, device and memory format.

    Example:
        >>> import torch, wcr_fast
        >>> w = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> wcr_fast.score_masks(w, 0.5, "wanda", aux=[torch.tensor([9.0, 1.0, 1.0, 1.0])])
        [tensor([[ True,  True, False, False]])]
    """
    op = "score_masks"
    nm = select.check_scope(scope, sparsity, op)
    value = 0.0 if nm else select.check_sparsity(sparsity, op)
    chosen = as_weights(weights, op=op, exclude=exclude)
    if not chosen:
        return []
    ranking = Ranking.of(chosen, scope, op, score=score, aux=aux, floor=floor, cap=cap) or Ranking()
    return ranking.masks(chosen, value, scope, op)


@torch.no_grad()
def column_norms(model: nn.Module, batches: Iterable[Any], *, exclude: Exclude = ()) -> dict[str, Tensor]:
    """Return the L2 norm of every input of every linear and convolution layer over some batches, for Wanda.

    The model runs in evaluation mode, without gradients; its training flags are restored. Sums are in float64.

    Args:
        model: the model.
        batches: each is passed to the model: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        exclude: what to leave out.

    Returns:
        By weight name: float32, 1-d: of a linear layer one number per input feature, of a convolution per input channel
        and place in the kernel (the norm of the column that an unfolded input has there).

    Raises:
        ValueError: no batches, or a layer that no batch reached.

    Source: Sun et al. 2023 (arXiv 2306.11695), section 3; convolutions unfolded.

    Example:
        >>> import torch, wcr_fast
        >>> model = torch.nn.Linear(2, 3)
        >>> wcr_fast.column_norms(model, [torch.tensor([[3.0, 1.0], [4.0, 1.0]])])["weight"]
        tensor([5.0000, 1.4142])
    """
    chosen = {w.owner[0]: w for w in choose(model, exclude=exclude).weights if w.owner is not None}
    sums: dict[str, Tensor] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = chosen[module]
        squares = _squares(module, args[0].detach())
        sums[weight.name] = sums.get(weight.name, 0.0) + squares

    modules = [m for m in chosen if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    hooks = [module.register_forward_pre_hook(record) for module in modules]
    training = [(module, module.training) for module in model.modules()]
    count = 0
    try:
        model.eval()
        for batch in batches:
            count += 1
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
    missing = [chosen[m].name for m in modules if chosen[m].name not in sums]
    if not count or missing:
        raise ValueError(f"column_norms: {f'no batch reached {missing[0]}' if count else 'batches are empty'}")
    return {name: total.sqrt().float() for name, total in sums.items()}


def _squares(module: nn.Module, x: Tensor) -> Tensor:
    """Return the sums of squares of a layer's inputs, float64 [columns]."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double().square().sum(0)
    if isinstance(module, nn.Conv1d):  # as a convolution of one row
        x = x.unsqueeze(-2)
        two = {
            name: (fill, getattr(module, name)[0])
            for name, fill in (("kernel_size", 1), ("dilation", 1), ("stride", 1))
        }
        padding = module.padding if isinstance(module.padding, str) else (0, module.padding[0])
    else:
        two = {name: getattr(module, name) for name in ("kernel_size", "dilation", "stride")}
        padding = module.padding
    if x.dim() == 3:
        x = x.unsqueeze(0)
    x = F.pad(
        x.double(), _pads(padding, two), mode="constant" if module.padding_mode == "zeros" else module.padding_mode
    )
    columns = F.unfold(x, two["kernel_size"], two["dilation"], 0, two["stride"]).square().sum((0, 2))
    # Of a grouped convolution every group has its own inputs; its weight has one group's: those of all count.
    return columns.view(module.groups, -1).sum(0)


def _pads(padding: str | tuple[int, int], two: dict[str, tuple[int, int]]) -> list[int]:
    """Return the padding of a convolution as F.pad takes it: last dimension first."""
    pads: list[int] = []
    for d in (1, 0):
        whole = two["dilation"][d] * (two["kernel_size"][d] - 1)
        if padding == "same":
            pads += [whole // 2, whole - whole // 2]
        else:
            pads += [0, 0] if padding == "valid" else [padding[d]] * 2
    return pads
