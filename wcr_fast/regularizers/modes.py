"""Penalties that may act on the weights themselves: past the optimizer's scaling, with exact zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_fast.attach import AttachHandle, attach_shrinking
from wcr_fast.regularizers.terms import Term


class Moded(Term):
    """A penalty with a ``mode``: "loss", or one that acts on weights instead of gradients."""

    mode: str

    def _set_mode(self, mode: str, known: Sequence[str]) -> None:
        if mode not in known:
            raise ValueError(f"{type(self).__name__}: mode must be one of {', '.join(known)}, got {mode!r}")
        self.mode = mode

    def _on_weights(self) -> bool:
        return self.mode != "loss"

    def __call__(self) -> Tensor:
        """Return lam * psi as a 0-d tensor; without a gradient where the mode acts on weights."""
        value = super().__call__()
        return value.detach() if self._on_weights() else value

    def add_grad_(self) -> None:
        """Add lam * grad psi to the weights' ``.grad``, in mode "loss" only; see :meth:`Term.add_grad_`."""
        if self._on_weights():
            raise ValueError(
                f'{type(self).__name__}: mode "{self.mode}" acts on weights, not on gradients: attach it to the '
                "optimizer, or call shrink_(lr) beside its step"
            )
        super().add_grad_()

    def attach(self, optimizer: torch.optim.Optimizer) -> AttachHandle:
        """Act at every step of an optimizer; return a handle with ``.remove()``.

        In mode "loss" as :meth:`Term.attach`. Else on the weights that this optimizer owns, with the lr that each
        one's group has at that step, a number or a tensor: before the step ("decoupled"; a closure then sees the
        weights so moved), or after it ("proximal"). A step that a GradScaler skips changes nothing.

        Raises:
            ValueError: the optimizer owns none of the weights, a group has no lr, master weights would undo it, or it
                is attached to it already.
        """
        return attach_shrinking(self, optimizer) if self._on_weights() else super().attach(optimizer)

    def shrink_(self, lr: float | Tensor) -> None:
        """Act on the weights once, in a loop of one's own: before its step ("decoupled"), or after it ("proximal").

        Args:
            lr: the step's length, a number or a 0-d tensor (read on its device, without a sync).

        Raises:
            ValueError: in mode "loss".
        """
        if not self._on_weights():
            raise ValueError(f'{type(self).__name__}: mode "loss" acts on gradients: call it, add_grad_() or attach it')
        places = self._active()
        self._shrink(places, [0] * len(places), [lr], None)

    def _shrink(
        self, places: Sequence[int], which: Sequence[int], lrs: Sequence[float | Tensor], found_inf: Tensor | None
    ) -> None:
        """Act on these weights, each with its own of the steps' lengths, unless ``found_inf`` says otherwise."""
        raise NotImplementedError
