"""Strengths that change in time: warm-up, decay, and none at all for the last steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wcr_fast.regularizers.terms import Term

SHAPES = ("constant", "linear", "cosine")


class StrengthSchedule:
    """Sets a penalty's strength at every step: lam(t) = lam * factor(t), t = 0, 1, ...

    factor rises as t / warmup, then follows the shape: 1, or from 1 to 0 at the end, along a line or half a cosine; the
    end is ``off_after``, where given, else ``total_steps``. From the end on it is 0, but for "constant" without
    ``off_after``. A strength of 0 launches nothing (a tensor is not read: give a float where that matters).

    Args:
        regularizer: any penalty; of a sum each member is scheduled, from its own lam.
        total_steps: how long the shape takes; steps or epochs, whatever ``step`` counts.
        warmup: steps until full strength, 0 by default.
        shape: "constant" (default), "linear" or "cosine".
        off_after: the first step without a penalty, which leaves the weights the last steps for the loss alone.

    Raises:
        TypeError: no penalty. ValueError: an unknown shape, or numbers that don't fit:
            0 <= warmup <= off_after <= total_steps.

    A fused optimizer follows it as long as its own ``lam`` is None. A lam that is a tensor stays the same tensor and is
    written in place.

    Example:
        >>> import torch, wcr_fast
        >>> wcr = wcr_fast.WCR(torch.nn.Linear(8, 4), lam=1.0)
        >>> schedule = StrengthSchedule(wcr, 5, warmup=2, off_after=4)
        >>> for _ in range(3):
        ...     schedule.step()  # after the optimizer's step
        >>> wcr.lam, [schedule.factor(t) for t in range(5)]
        (1.0, [0.0, 0.5, 1.0, 1.0, 0.0])
    """

    def __init__(
        self,
        regularizer: Term,
        total_steps: int,
        *,
        warmup: int = 0,
        shape: str = "constant",
        off_after: int | None = None,
    ) -> None:
        if not isinstance(regularizer, Term):
            raise TypeError(f"StrengthSchedule: expected a penalty, got {type(regularizer).__name__}")
        if shape not in SHAPES:
            raise ValueError(f"StrengthSchedule: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
        end = total_steps if off_after is None else off_after
        if not 0 <= warmup <= end <= total_steps or total_steps < 1:
            raise ValueError(
                "StrengthSchedule: 0 <= warmup <= off_after <= total_steps must hold, total_steps at least 1; got "
                f"warmup={warmup}, off_after={off_after}, total_steps={total_steps}"
            )
        self._terms = regularizer.terms
        self._warmup, self._end, self._shape = warmup, end, shape
        self._goes_off = off_after is not None or shape != "constant"
        self._strengths = [t.lam.detach().clone() if isinstance(t.lam, Tensor) else t.lam for t in self._terms]
        self._step = 0
        self._apply()

    def factor(self, step: int) -> float:
        """Return the share of the strength at a step."""
        if step >= self._end and self._goes_off:
            return 0.0
        if step < self._warmup:
            return step / self._warmup
        if self._shape == "constant":
            return 1.0
        done = (step - self._warmup) / (self._end - self._warmup)
        return 1.0 - done if self._shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def step(self) -> None:
        """Go on to the next step, and set the strengths for it: call it after the optimizer's step."""
        self._step += 1
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        factor = self.factor(self._step)
        for term, strength in zip(self._terms, self._strengths, strict=True):
            if isinstance(term.lam, Tensor):
                term.lam.copy_(factor * strength)
            else:
                term.lam = factor * strength

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the full strengths, as numbers and tensors."""
        return {"step": self._step, "strengths": list(self._strengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved schedule was, with its strengths; shape and numbers are this one's own.

        Raises:
            ValueError: it was saved with another number of members.
        """
        strengths = state["strengths"]
        if len(strengths) != len(self._terms):
            raise ValueError(
                f"StrengthSchedule: the state has {len(strengths)} strengths, there are {len(self._terms)} members"
            )
        self._step, self._strengths = int(state["step"]), list(strengths)
        self._apply()
