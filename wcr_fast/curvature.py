"""A look at whether SGD's steps are too long for a penalty."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.table import capturing, upload

if TYPE_CHECKING:
    from wcr_fast.regularizers import Regularizer

# The curvature changes slowly: look at the first step, then now and then.
WATCH_EVERY = 128


class CurvatureWatch:
    """Warns once where a step of SGD is too long for the penalty's curvature and would throw a layer outward.

    In the direction of its own gradient a layer's term has curvature 4 V f_VV / n + 2 f_V / n. SGD with momentum
    mu is stable on a quadratic while lr * lam * curvature < 2 (1 + mu), with Nesterov 2 (1 + mu) / (1 + 2 mu).
    """

    def __init__(self) -> None:
        self._steps = 0
        self._done = False
        self._pending: tuple[Tensor, Any, list[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pending": None}

    def look(
        self,
        regularizer: Regularizer,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        find: Callable[[], tuple[Mapping[int, dict[str, Any]], Tensor]],
    ) -> None:
        """Look at a step that is about to be taken; at most of them there is nothing to do.

        Args:
            device: where the moments lie.
            find: returns the parameter group by the weight's place in the regularizer, and the moments of these
                weights as they are, [2 or more, L].
        """
        if self._done or not isinstance(optimizer, torch.optim.SGD):
            return
        due = self._steps % WATCH_EVERY == 0
        self._steps += 1
        if (due or self._pending is not None) and not capturing(device):
            if self._pending is None:
                self._measure(regularizer, *find())
            self._read(regularizer)

    def _measure(self, reg: Regularizer, groups: Mapping[int, dict[str, Any]], stats: Tensor) -> None:
        indices = list(groups)
        numel, _ = reg._sizes(stats, indices)
        with torch.enable_grad():
            mean, var = stats[0].detach(), stats[1].detach().requires_grad_()
            f = reg._formula_at(mean, var, indices).sum()
            if not f.requires_grad:
                return  # no dependence on the variance, no such curvature
            (slope,) = torch.autograd.grad(f, var, create_graph=True)
            second = torch.zeros_like(slope)
            if slope.requires_grad:
                (second,) = torch.autograd.grad(slope.sum(), var, allow_unused=True, materialize_grads=True)
        slope, second, var = slope.detach(), second.detach(), var.detach()
        lams = [reg.lam if group.get("lam") is None else group["lam"] for group in groups.values()]
        lrs = [group["lr"] for group in groups.values()]
        step = _per_layer(lams, stats) * _per_layer(lrs, stats) / numel
        limit = _per_layer([_stable(group) for group in groups.values()], stats)
        excess, worst = (step * (4.0 * var * second + 2.0 * slope) / limit).max(0)
        factor = (1.0 - 2.0 * step * slope).gather(0, worst.view(1))[0]
        report = torch.stack([excess, factor, worst.to(stats.dtype)])
        event = None
        if report.is_cuda:  # read some steps later, when the copy has arrived: no synchronisation
            stream = torch.cuda.current_stream(report.device)
            report = report.to("cpu", non_blocking=True)
            event = stream.record_event()
        self._pending = (report, event, [reg._choice.weights[i].label() for i in indices])

    def _read(self, reg: Regularizer) -> None:
        if self._pending is None or (self._pending[1] is not None and not self._pending[1].query()):
            return
        report, _, labels = self._pending
        self._pending = None
        excess, factor, worst = report.tolist()
        if excess > 1.0:
            self._done = True
            warnings.warn(
                f"{reg._title}: the step is {excess:.3g} times too long for the penalty's curvature at "
                f"{labels[int(worst)]}: one SGD step throws its spread outward by a factor of {factor:.3g}; lower lr "
                "or lam, or exclude it",
                stacklevel=2,
            )


def _per_layer(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Return one value per layer where ``like`` is, without waiting for the device."""
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([torch.as_tensor(v, dtype=like.dtype).to(like.device, non_blocking=True) for v in values])
    return upload(np.array(values, dtype=np.float64), like.device).to(like.dtype)


def _stable(group: Mapping[str, Any]) -> float:
    mu = float(group.get("momentum", 0.0))
    return 2.0 * (1.0 + mu) / (1.0 + 2.0 * mu) if group.get("nesterov") else 2.0 * (1.0 + mu)
