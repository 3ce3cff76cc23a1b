"""What a prepared step has to look at before it is repeated, in as little host time as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from wcr_fast.backend import active_backend
from wcr_fast.table import current_stream, pointers

try:  # compares a list's types, dtypes, devices, sizes, strides and requires_grad in one call of C++
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch moved it: every step is prepared anew
    TensorGuards = None

# Tensors looked at together: what is read of them stays in cache from one look to the next.
_PIECE = 128
# What a state may hold for each weight.
STATE_ARRAYS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder")

_grad, _version, _requires_grad = map(attrgetter, ("grad", "_version", "requires_grad"))
_step = itemgetter("step")


def _guards(tensors: Sequence[Tensor]) -> Any:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


class _Piece:
    """Some parameters with their gradients and states, as they were."""

    def __init__(
        self, params: list[Tensor], states: list[dict[str, Any]], penalised: list[Tensor], watched: list[Tensor]
    ) -> None:
        self.params, self.states, self.penalised, self.watched = params, states, penalised, watched
        self.grads = _guards(list(map(_grad, params)))
        self.places = pointers(params)
        # The arrays by address, so that one moved with ``.data`` is noticed; of the step counts it need not be.
        self.names = [name for name in STATE_ARRAYS if name in states[0]]
        self.arrays = [pointers(map(itemgetter(name), states)) for name in self.names]
        self.steps = list(map(_step, states)) if "step" in states[0] else []
        self.trainable = list(map(_requires_grad, watched))
        self.contiguous = list(map(Tensor.is_contiguous, params))

    def look(self, params: list[Tensor]) -> tuple[list[int], list[int]] | None:
        if pointers(params) != self.places or not all(map(is_, params, self.params)):
            return None
        grads = list(map(_grad, params))
        if not self.grads.check(*grads) or list(map(_requires_grad, self.watched)) != self.trainable:
            return None
        if list(map(Tensor.is_contiguous, params)) != self.contiguous:  # ``.data`` of the same memory, transposed
            return None
        for name, places in zip(self.names, self.arrays, strict=True):
            if pointers(map(itemgetter(name), self.states)) != places:
                return None
        if self.steps and not all(map(is_, map(_step, self.states), self.steps)):
            return None
        versions = list(map(_version, self.penalised))
        torch.autograd.graph.increment_version(params)
        return pointers(grads), versions


class Watch:
    """Tells whether nothing but the gradients' addresses has changed since a step was prepared.

    For plain parameters on one device that all have gradients and the same kinds of state; made by :func:`watch`.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[dict[str, Any]],
        layers: list[int],
        watched: set[int],
        owners: tuple[list[dict], list[str]],
        groups: Sequence[dict[str, Any]],
        everything: dict[Tensor, dict[str, Any]],
    ) -> None:
        self._groups = _kinds(groups)
        self._everything, self._all_states = everything, list(everything.values())
        self._owners = owners
        self._owned = list(map(dict.get, *owners)) if owners else []
        self._device = params[0].device
        self._pieces = []
        for start in range(0, len(params), _PIECE):
            here = slice(start, start + _PIECE)
            penalised = [p for p, layer in zip(params[here], layers[here], strict=True) if layer >= 0]
            trained = [p for p in params[here] if id(p) in watched]
            self._pieces.append((here, _Piece(params[here], states[here], penalised, trained)))
        self._around = self._surroundings()

    def _surroundings(self) -> tuple:
        return active_backend(), current_stream(self._device)

    def look(
        self, groups: Sequence[dict[str, Any]], everything: dict[Tensor, dict[str, Any]]
    ) -> tuple[list[int], list[int]] | None:
        """Return the gradients' addresses and the penalised weights' versions, then raise the version counters.

        None where anything else is not as it was: some counters may then be raised, which costs a pass over the weights
        and harms nothing.
        """
        params = [p for group in groups for p in group["params"]]
        if _kinds(groups) != self._groups or self._surroundings() != self._around:
            return None
        if everything is not self._everything or len(everything) != len(self._all_states):
            return None
        if not all(map(is_, everything.values(), self._all_states)):
            return None
        if self._owners and not all(map(is_, map(dict.get, *self._owners), self._owned)):
            return None
        addresses: list[int] = []
        versions: list[int] = []
        for here, piece in self._pieces:
            try:
                found = piece.look(params[here])
            except (KeyError, TypeError):  # a state or a gradient is gone
                return None
            if found is None:
                return None
            addresses += found[0]
            versions += found[1]
        return addresses, versions


def _kinds(groups: Sequence[dict[str, Any]]) -> list[tuple]:
    """Return what of the groups decides on states and launches: members, momentum or none, amsgrad."""
    return [(len(g["params"]), g.get("momentum") == 0, g.get("amsgrad")) for g in groups]


def watch(
    params: list[Tensor],
    layers: list[int],
    watched: set[int],
    owners: list[tuple[dict, str]],
    groups: Sequence[dict[str, Any]],
    everything: dict[Tensor, dict[str, Any]],
) -> Watch | None:
    """Return a watch over these parameters, or None where a step has more to look at.

    layers: -1 for a parameter without penalty. watched: the ids of those whose requires_grad counts. owners: for each
    penalised parameter of a module the dictionary that holds it, and its name there. everything: the optimizer's state.
    """
    states = [everything.get(p, {}) for p in params]
    kinds = {(p.device, *sorted(state)) for p, state in zip(params, states, strict=True)}
    plain = all(p.grad is not None and not hasattr(p, "_local_tensor") for p in params) and len(kinds) == 1
    plain = plain and TensorGuards is not None and set(states[0]) <= {*STATE_ARRAYS, "step"}
    kept = tuple(map(list, zip(*owners, strict=True)))
    return Watch(params, states, layers, watched, kept, groups, everything) if plain else None
