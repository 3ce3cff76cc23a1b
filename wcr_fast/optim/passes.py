"""What the second pass over a batch must not do: move running statistics again, draw other random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from wcr_fast.table import capturing

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class FrozenStatistics:
    """Keeps the running statistics of a model's normalisation layers still, from ``freeze`` to ``thaw``.

    Layers in training mode go on to normalise with the statistics of their batch; neither these nor the count of
    batches move. Covers batch norms of any dimension, SyncBatchNorm, instance norms and classes derived from them.
    """

    def __init__(self) -> None:
        self._frozen: list[tuple[nn.Module, dict[str, Any]]] = []

    def freeze(self, model: nn.Module | None) -> None:
        """Freeze what isn't frozen yet."""
        for module in () if model is None else model.modules():
            if module.training and isinstance(module, _BatchNorm) and module.track_running_stats:
                self._set(module, {"track_running_stats": False})
            elif module.training and isinstance(module, _InstanceNorm) and module.running_mean is not None:
                self._set(module, dict.fromkeys(_STATISTICS))  # it updates whatever it has

    def _set(self, module: nn.Module, values: dict[str, Any]) -> None:
        self._frozen.append((module, {name: getattr(module, name) for name in values}))
        for name, value in values.items():
            setattr(module, name, value)

    def thaw(self) -> None:
        """Put everything back; a second call does nothing."""
        for module, values in self._frozen:
            for name, value in values.items():
                setattr(module, name, value)
        self._frozen = []


class RandomState:
    """The state of torch's generators that a pass over parameters on these devices may draw from, to be replayed."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        # While a graph is captured, the generator belongs to it.
        devices = {p.device for p in params if p.device.type == "cuda" and not capturing(p.device)}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def replay(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
