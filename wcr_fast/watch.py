"""What a repeated call has to look at before it launches, in as little host time as it takes.

A step or a penalty's call that prepared its launches once may repeat them as long as nothing but the gradients has
changed. Anybody may replace, move, freeze or write any tensor in between, so each of them is looked at every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast import native
from wcr_fast.table import pointers

try:  # compares a list's types, dtypes, devices, sizes, strides and requires_grad in one call of C++
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch moved it: every call is prepared anew
    TensorGuards = None

# Tensors looked at together: what is read of them stays in cache from one look to the next.
_PIECE = 128

_grad, _version = map(attrgetter, ("grad", "_version"))


def _guards(tensors: Sequence[Tensor]) -> Any:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


class _Piece:
    """Some tensors, as they were."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._guards, self._places = _guards(tensors), pointers(tensors)

    def is_as_it_was(self) -> bool:
        return self._guards.check(*self.tensors) and pointers(self.tensors) == self._places


class _Params(_Piece):
    """Some of the parameters, with their gradients."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._grad_guards = _guards(list(map(_grad, params)))

    def grads(self) -> list[Tensor] | None:
        """Return the gradients; None where anything but their addresses has changed."""
        grads = list(map(_grad, self.tensors))
        try:
            same = self._grad_guards.check(*grads)
        except TypeError:  # a gradient is gone
            return None
        return grads if same and self.is_as_it_was() else None


def _pieces(tensors: Sequence[Tensor], kind: type[_Piece]) -> list[Any]:
    return [kind(tensors[i : i + _PIECE]) for i in range(0, len(tensors), _PIECE)]


class Watch:
    """Tells whether some parameters, and what belongs to them, are as they were, and where their gradients lie.

    Made by :func:`watch`. It has two ways to look, with the same answers: from Python, and compiled (``native.py``).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        entries: Sequence[tuple[dict, Any, Tensor]],
        arrays: Sequence[Tensor],
        counted: Sequence[int],
        grads_written: bool,
    ) -> None:
        self._params, self._arrays, self._counted = list(params), list(arrays), list(counted)
        self._dicts, self._keys, self._held = map(list, zip(*entries, strict=True)) if entries else ([], [], [])
        self._grads_written = grads_written
        self._pieces, self._array_pieces = _pieces(self._params, _Params), _pieces(self._arrays, _Piece)
        self._compiled: Any = None
        self._compile()

    def _compile(self) -> None:
        """Let the compiled twin take over where it is loaded (by now)."""
        if native.module() is not None:
            self._compiled = native.module().Watch(self._params, self._arrays, self._counted, self._grads_written)

    def look(self, params: list[Tensor] | None = None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the gradients' addresses and the counted parameters' versions, and raise the written ones' counters.

        None, with nothing raised, where anything else is not as it was, or ``params``, where given, are other objects.
        """
        params = self._params if params is None else params
        if self._compiled is None:
            found = self._look(params)
            if found is not None:
                self._compile()
            return found
        found = self._compiled.look(params, self._params, self._arrays, self._dicts, self._keys, self._held)
        return None if found is None else (np.frombuffer(found[0], np.int64), np.frombuffer(found[1], np.int64))

    def _look(self, params: list[Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        if not all(map(is_, map(dict.get, self._dicts, self._keys), self._held)):
            return None
        if not all(piece.is_as_it_was() for piece in self._array_pieces):
            return None
        grads: list[Tensor] = []
        addresses: list[int] = []
        for piece in self._pieces:
            found = piece.grads()
            if found is None:
                return None
            grads += found
            addresses += pointers(found)
        versions = list(map(_version, map(params.__getitem__, self._counted)))
        torch.autograd.graph.increment_version(grads if self._grads_written else params)
        return np.array(addresses, dtype=np.int64), np.array(versions, dtype=np.int64)


def watch(
    params: Sequence[Tensor],
    *,
    entries: Sequence[tuple[dict, Any, Tensor]] = (),
    arrays: Sequence[Tensor] = (),
    counted: Sequence[int] = (),
    grads_written: bool = False,
) -> Watch | None:
    """Return a watch over these parameters, or None where there is no way to look at them fast.

    Args:
        params: at least one, plain tensors on one device, all with gradients.
        entries: (dictionary, key, tensor): what has to be found there still.
        arrays: further plain tensors that have to stay in place.
        counted: places of the parameters whose versions are to be told, ascending.
        grads_written: whether a call writes the gradients; the parameters otherwise.
    """
    plain = (Tensor, torch.nn.Parameter)
    known = all(type(p) in plain and p.grad is not None and p.device == params[0].device for p in params)
    if TensorGuards is None or not known or not all(type(t) in plain for t in arrays):
        return None
    if any(params[i].is_inference() for i in counted):  # they count no versions
        return None
    if params[0].device.type == "cuda":
        native.request()
    return Watch(params, entries, arrays, counted, grads_written)
