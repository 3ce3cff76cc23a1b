"""Removed weights that stay zero while an optimizer trains the rest."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from wcr_fast.backend import use_triton
from wcr_fast.ops.sharded import is_sharded, local
from wcr_fast.torch_path.bits import pack, unpack, words_for
from wcr_fast.weights import Weight

# The handles at work on each optimizer.
_handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[KeepHandle]] = weakref.WeakKeyDictionary()


def words_of(packed: Tensor, tensor: Tensor) -> Tensor:
    """Turn plain bits into the words of a tensor (see ``words_for``), or of this rank's shard of a DTensor."""
    if not is_sharded(tensor):
        return words_for(packed, tensor)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    whole = unpack(packed.to(local(tensor).device), tensor.numel()).view(tensor.shape)
    # Every rank has all the bits: it takes its part, nothing is sent.
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
    return words_for(pack(part), local(tensor))


def enforce_(tensors: Sequence[Tensor], words: Sequence[Tensor]) -> None:
    """Write +0.0 where the interleaved words of each tensor (see ``words_of``) have a 0; any devices and dtypes."""
    tensors = [local(t).detach() for t in tensors]
    for device in dict.fromkeys(t.device for t in tensors):
        here = [i for i, t in enumerate(tensors) if t.device == device]
        listed = [tensors[i] for i in here]
        if use_triton(listed):
            from wcr_fast.triton_path import keep
        else:
            from wcr_fast.torch_path import keep
        keep.keep_(listed, [words[i] for i in here])
    # Kernels write behind autograd's back; a backward pass across this must notice.
    torch.autograd.graph.increment_version(tensors)


def _states(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """Return the state tensors that hold a value per weight: momentum_buffer, exp_avg, exp_avg_sq, a master copy.

    Zero means nothing removed in floating-point tensors only: quantised ones are left alone.
    """
    held = optimizer.state.get(param, {})
    return [
        t
        for name, t in (held.items() if isinstance(held, Mapping) else ())
        if name != "step"
        and (type(t) in (Tensor, nn.Parameter) or is_sharded(t))
        and t.shape == param.shape
        and t.is_floating_point()
        and t.element_size() >= 2
    ]


def _layout(tensor: Tensor) -> tuple:
    """Return what the words of a mask depend on."""
    if is_sharded(tensor):
        return tensor.device, local(tensor).stride(), tensor.placements, tensor.device_mesh
    return tensor.device, tensor.stride()


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class KeepHandle:
    """Undoes a ``Masks.keep``: call ``remove()``, or use it as a context manager.

    wcr-fast's own optimizers are given the bits and enforce them inside of their step; any other one has weights and
    state zeroed after each step. The weights are looked up in their modules every time, so one that was replaced or
    moved since is found again.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Sequence[Weight], packed: Sequence[Tensor]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._weights, self._packed = weights, packed
        # Words of each weight by device and strides: state may be laid out otherwise than its weight.
        self._words: list[dict[tuple, Tensor]] = [{} for _ in weights]
        self._ever_owned: set[int] = set()
        self._told: dict[int, tuple[Tensor, tuple]] = {}
        self._fused = hasattr(optimizer, "_set_mask")
        params = self._current(optimizer)
        self._check(optimizer, params)
        if self._fused:
            self._tell(optimizer, params)
            self._hook = optimizer.register_step_pre_hook(self._before_step)
        else:
            self._zero(optimizer, params)
            self._hook = optimizer.register_step_post_hook(self._after_step)
        _handles.setdefault(optimizer, []).append(self)

    def _check(self, optimizer: torch.optim.Optimizer, params: dict[int, Tensor]) -> None:
        kind = type(optimizer).__name__
        if not params:
            raise ValueError(
                f"keep: {kind} owns none of the masked weights; name the model that it trains: keep(optimizer, model)"
            )
        taken = {id(p) for other in _handles.get(optimizer, ()) for p in other._current(optimizer).values()}
        for i, param in params.items():
            if id(param) in taken:
                raise ValueError(f"keep: {self._weights[i].label()} is kept by {kind} already; remove() that first")

    def _current(self, optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
        """Return the weights that the optimizer owns, or owned before they were replaced, by their place."""
        owned, found = _owned(optimizer), {}
        for i, weight in enumerate(self._weights):
            param = weight.current()
            if id(param) in owned:
                self._ever_owned.add(i)
            if i in self._ever_owned:
                if param.shape != weight.param.shape:
                    raise RuntimeError(
                        f"{weight.label()} was replaced: it has shape {tuple(param.shape)} now, its mask "
                        f"{tuple(weight.param.shape)}; make new masks"
                    )
                found[i] = param
        return found

    def _words_of(self, i: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the words of the i-th mask for tensors of its shape, packed anew where a layout changed."""
        used: dict[tuple, Tensor] = {}
        for tensor in tensors:
            key = _layout(tensor)
            if key not in used:
                known = self._words[i].get(key)
                used[key] = words_of(self._packed[i], tensor) if known is None else known
        self._words[i] = used
        return [used[_layout(tensor)] for tensor in tensors]

    def _zero(self, optimizer: torch.optim.Optimizer, params: dict[int, Tensor]) -> None:
        tensors: list[Tensor] = []
        words: list[Tensor] = []
        for i, param in params.items():
            arrays = [param, *_states(optimizer, param)]
            tensors += arrays
            words += self._words_of(i, arrays)
        enforce_(tensors, words)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._zero(optimizer, self._current(optimizer))

    def _before_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        params = self._current(optimizer)
        changed = {}
        for i, param in params.items():
            told, layout = self._told.get(i, (None, None))
            if told is not param or layout != _layout(param):
                changed[i] = param
        if changed:
            self._tell(optimizer, changed)

    def _tell(self, optimizer: Any, params: dict[int, Tensor]) -> None:
        """Hand the words to a fused optimizer, for weights that it hasn't got them for."""
        self._zero(optimizer, params)
        owned = _owned(optimizer)
        for i, param in params.items():
            if id(param) in owned:
                optimizer._set_mask(param, *self._words_of(i, [param]))
            self._told[i] = param, _layout(param)
        optimizer.weights_changed()

    def remove(self) -> None:
        """Let the removed weights train again; a second call does nothing."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        optimizer = self._optimizer()
        if optimizer is not None:
            _handles[optimizer].remove(self)
            if self._fused:
                owned = _owned(optimizer)
                for param, _ in self._told.values():
                    if id(param) in owned:
                        optimizer._set_mask(param, None)
        self._told.clear()

    def __enter__(self) -> KeepHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
