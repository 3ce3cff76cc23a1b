"""The state of a fused optimizer: arrays in torch's names, their dtypes and layouts, made and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wcr_fast.ops.sharded import local
from wcr_fast.torch_path.layout import is_dense, same_layout

MASTERS = (None, "float32", "remainder")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """How weights and state are kept: the options of a fused optimizer about rounding."""

    state_dtype: torch.dtype | None
    master: str | None
    stochastic: bool

    def check(self, optimizer: str) -> None:
        """Raise ValueError for options that don't exist, or don't go together."""
        if self.master not in MASTERS:
            raise ValueError(f"{optimizer}: master must be None, 'float32' or 'remainder', got {self.master!r}")
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"{optimizer}: state_dtype must be float32, bfloat16, float16 or None, got {self.state_dtype}"
            )
        if self.stochastic and self.master:
            raise ValueError(f"{optimizer}: with master weights nothing is lost in rounding: drop stochastic_rounding")

    def check_param(self, optimizer: str, p: Tensor) -> None:
        """Raise TypeError for a parameter that can't be kept so."""
        if not p.is_floating_point() or p.element_size() < 2:
            raise TypeError(f"{optimizer}: parameters must be float16, bfloat16, float32 or float64, got {p.dtype}")
        if self.master == "remainder" and p.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"{optimizer}: master='remainder' is the rest of a bfloat16 weight, got {p.dtype}")
        if self.stochastic and p.dtype == torch.float16:
            raise TypeError(f"{optimizer}: stochastic_rounding is for bfloat16 weights; for float16 ones take a master")
        if p.dtype == torch.float64 and self.state_dtype is not None:
            raise TypeError(f"{optimizer}: float64 weights keep float64 state: leave state_dtype out")

    def of(self, p: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's state."""
        return torch.float64 if p.dtype == torch.float64 else self.state_dtype or p.dtype

    def complete(self, state: dict[str, Any], p: Tensor, names: Sequence[str], counted: bool) -> None:
        """Make what is missing in a parameter's state: the arrays of these names, the count of steps, a master copy.

        A first step takes the gradient undampened; what has a momentum buffer already has had it.
        """
        begun = state.get("momentum_buffer") is not None
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(p, dtype=self.of(p), memory_format=torch.preserve_format)
                if name == "momentum_buffer" and "step" in state:
                    state["step"].zero_()
            elif not _in_step(local(p), local(state[name])):
                # The weight has another memory format since: its state goes with it.
                state[name] = torch.empty_like(p, dtype=state[name].dtype, requires_grad=False).copy_(state[name])
        if (counted or self.stochastic) and "step" not in state:
            state["step"] = torch.full((), float(begun), dtype=torch.float32, device=p.device)
        if self.master == "float32" and p.element_size() == 2 and "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        if self.master == "remainder" and p.dtype == torch.bfloat16 and "remainder" not in state:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)

    def restored(self, saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Return a loaded state as this parameter keeps it: copies in its own dtypes and layout."""
        foreign = {"master": "float32", "remainder": "remainder"}  # of an optimizer with other options
        used = {k: v for k, v in saved.items() if v is not None and foreign.get(k, self.master) == self.master}
        return {name: self._restored(p, name, value) for name, value in used.items()}

    def _restored(self, p: Tensor, name: str, value: Any) -> Any:
        if name == "step":
            return torch.as_tensor(value, dtype=torch.float32).to(p.device).clone()
        if not isinstance(value, Tensor) or value.shape != p.shape:
            return value
        dtype = {"master": torch.float32, "remainder": torch.int16}.get(name, self.of(p))
        return torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.preserve_format).copy_(value)


def _in_step(weight: Tensor, array: Tensor) -> bool:
    """Tell whether an array of the state runs through memory as its weight does, or as a dense copy of it would."""
    return same_layout(weight if is_dense(weight) else torch.empty_like(weight), array)
