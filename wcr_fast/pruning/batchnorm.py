"""Batch-norm statistics re-estimated exactly, as a pruned network needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Pool:
    """Count, mean and sum of squared deviations per channel of one layer's inputs, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Merge one batch [N, C, ...] (Chan, Golub and LeVeque 1983)."""
        values = inputs.detach().to(torch.float64, copy=True)
        count = values.numel() // max(values.shape[1], 1)
        if count == 0:
            return
        dims = [0, *range(2, values.dim())]
        center = values.mean(dims, keepdim=True)
        squares = values.sub_(center).square_().sum(dims)
        mean = center.flatten()
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def write(self, norm: _BatchNorm) -> None:
        """Copy the mean and the unbiased variance into the layer's running statistics."""
        if self.mean is None or self.squares is None:
            return
        norm.running_mean.copy_(self.mean)
        # One value per channel has no variance to estimate: the old one is kept.
        if self.count > 1:
            norm.running_var.copy_(self.squares / (self.count - 1))


@contextlib.contextmanager
def _batch_statistics(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Put the model in eval mode but for ``norms``; afterwards put everything back but the running statistics.

    While it holds, the running statistics are detached from the layers: the forward pass can't move them, and
    a layer without them normalises with those of the batch.
    """
    training = [(module, module.training) for module in model.modules()]
    kept = [(norm, norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        yield
    finally:
        for norm, mean, var, tracked in kept:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, tracked
        for module, flag in training:
            module.training = flag


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(batch[0])
    else:
        model(batch)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Write the exact pooled input statistics of ``batches`` into every batch norm of ``model``.

    Pruning shifts the inputs of each batch norm, whose running statistics still belong to the dense network.
    Each layer's mean and unbiased variance are taken over all values of all batches together (in float64:
    neither a moving average nor a mean over batches), while it normalises with the statistics of the current
    batch, as in training. Everything else runs in eval mode: no dropout, no gradients.

    Args:
        model: any module. Its batch norms with running statistics (every subclass of torch's ``_BatchNorm``)
            are re-estimated; other layers, the parameters, ``momentum``, ``num_batches_tracked`` and all
            training flags stay what they are. A layer that no batch reaches keeps its statistics.
        batches: inputs on the model's device: tensors, tuples or lists (the first item is the input), or
            dicts (passed as keywords). Labels aren't needed.

    Returns:
        The number of batch norms re-estimated; 0, without reading ``batches``, when there is none.

    Raises:
        ValueError: when ``batches`` is empty. When the model raises, its statistics are left as they were.

    Exactness: for a single batch norm independent of how the values are split into batches and of their
    order, to float64 rounding; layers behind it see inputs normalised batch by batch, as in training.

    Source: the practice of Peste et al., CrAM (ICLR 2023) and Frantar et al., OBC (NeurIPS 2022); unlike
    ``torch.optim.swa_utils.update_bn`` batches of different sizes weigh by their size and the variance
    between batches counts.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> recalibrate_batchnorm(model, [torch.randn(8, 4), torch.randn(5, 4)])
        1
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    pools = {norm: _Pool() for norm in norms}

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        pools[norm].add(inputs[0] if inputs else keywords["input"])

    hooks = [norm.register_forward_pre_hook(collect, with_kwargs=True) for norm in norms]
    seen = 0
    try:
        with _batch_statistics(model, norms):
            for batch in batches:
                _forward(model, batch)
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
    if seen == 0:
        raise ValueError("recalibrate_batchnorm: batches is empty; pass at least one batch of inputs")
    for norm, pool in pools.items():
        pool.write(norm)
    return len(norms)
