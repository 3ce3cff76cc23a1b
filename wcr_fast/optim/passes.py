"""What the second pass over a batch must not do: move running statistics again, draw other random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class FrozenStatistics:
    """Keeps the running statistics of a model's normalisation layers still, from ``freeze`` to ``thaw``.

    Layers in training mode go on to normalise with the statistics of their batch; neither running mean, running
    variance nor the count of batches moves. Covers batch norms of any dimension, SyncBatchNorm, instance norms, and
    others that look at ``track_running_stats`` as torch's do.
    """

    def __init__(self) -> None:
        self._frozen: list[nn.Module] = []

    def freeze(self, model: nn.Module | None) -> None:
        """Freeze what isn't frozen yet."""
        if model is not None:
            for module in model.modules():
                if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                    module.track_running_stats = False
                    self._frozen.append(module)

    def thaw(self) -> None:
        """Let the layers track again; a second call does nothing."""
        for module in self._frozen:
            module.track_running_stats = True
        self._frozen = []


class RandomState:
    """The state of torch's generators that a pass over parameters on these devices may draw from, to be replayed."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._devices = {p.device for p in params if p.device.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in self._devices}

    def replay(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
