"""What an optimizer's step is told of its parameters, groups and penalty: plain data, the same for both paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# The numbers of a parameter group; those in TENSORS may be 0-d tensors on the weights' device.
TENSORS = ("lr", "weight_decay", "lam")

# The arrays of an algorithm's state, in torch's names; a parameter may lack some.
STATE_NAMES = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}


@dataclass
class Slot:
    """One parameter: its values and state on this rank, and where its numbers are found."""

    param: Tensor
    weight: Tensor  # the parameter itself, or a DTensor's local shard
    state: dict[str, Tensor]  # momentum_buffer | exp_avg, exp_avg_sq, max_exp_avg_sq; step, master, remainder
    group: int
    order: int  # its place among all parameters of the optimizer
    layer: int = -1  # its place among the penalised weights, -1 without penalty
    layer_size: int = 1  # elements of the whole layer, over all shards
    words: Tensor | None = None  # interleaved mask bits


@dataclass(frozen=True)
class Rule:
    """How a step is taken, the same for all groups of an optimizer."""

    algorithm: str  # "sgd" or "adamw"
    master: str | None = None  # "float32", "remainder" or None
    stochastic: bool = False
    penalty: Penalty | None = None


@dataclass(frozen=True)
class Penalty:
    """The penalty of a step: its formula in the kernels' terms, and where its pull is added."""

    mode: str  # "coupled": to the gradient; "decoupled": to the weight, as weight decay is
    family: str | None  # None: the coefficients are computed outside, from the moments
    eps: float
    r: float
    total: int
    layers: int


@dataclass
class Step:
    """One call of an optimizer: gradients of the slots (None: none), the groups' numbers, a scaler's tensors."""

    grads: list[Tensor | None]
    groups: list[dict[str, Any]]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def pulls_at(self, slot: Slot) -> bool:
        """Tell whether the penalty pulls at a parameter: a strength of 0 counts as none, but a tensor is not read."""
        lam = self.groups[slot.group]["lam"]
        return slot.layer >= 0 and (isinstance(lam, Tensor) or lam != 0.0)


@dataclass(frozen=True)
class Site:
    """A parameter to perturb: its values on this rank, room for their copy, and how far it goes."""

    param: Tensor
    weight: Tensor  # its values, or a DTensor's local shard; detached
    saved: Tensor  # dense
    rho: float
    eta: float = -1.0  # directions and distances are scaled by |w| + eta; below 0 they are not
