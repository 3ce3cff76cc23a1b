"""Ways to train a net that is to be pruned: every regularizer and every pruning-robust optimizer, alone and with WCR.

All share one recipe, SGD with momentum, weight decay and a cosine schedule; each has one knob and a ladder of its
values, about a factor of two to three apart, so all are compared along as many strengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wcr_fast import optim, regularizers

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WCR_BESIDE = 1e-5
LADDER_STEPS = 6
#: What CrAM draws from: the demo prunes to 80 to 99 %.
CRAM_SPARSITIES = (0.8, 0.9, 0.95)

Penalties = Callable[[nn.Module, float], list[Any]]
Optimizer = Callable[[nn.Module, float], torch.optim.Optimizer]


def _options(weight_decay: float | None = None) -> dict[str, Any]:
    decay = WEIGHT_DECAY if weight_decay is None else weight_decay
    return {"lr": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": decay}


def _sgd(net: nn.Module, strength: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **_options())


def _around_sgd(kind: type[optim.PerturbedOptimizer], **more: Any) -> Optimizer:
    return lambda net, strength: kind(net, torch.optim.SGD, rho=strength, **more, **_options())


def _penalty(kind: Callable[..., Any], **more: Any) -> Penalties:
    return lambda net, strength: [kind(net, lam=strength, **more)]


@dataclass(frozen=True)
class Method:
    """One row of a comparison: what its knob turns, the ladder of its strengths, and how a net is trained by it."""

    key: str
    label: str
    knob: str
    ladder: tuple[float, ...]
    #: the regularizers to attach at a strength
    penalties: Penalties = lambda net, strength: []
    optimizer: Optimizer = _sgd

    def with_wcr(self) -> Method:
        """Return the method with WCR beside it, at a fixed strength."""
        return replace(
            self,
            key=f"{self.key}+wcr",
            label=f"{self.label} + WCR",
            knob=f"{self.knob} of {self.label.removeprefix('SGD + ')}; WCR at {WCR_BESIDE:g}",
            penalties=lambda net, strength: [
                *self.penalties(net, strength),
                regularizers.WCR(net, lam=WCR_BESIDE),
            ],
        )


_L1_LADDER = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
#: Past the optimizer a pull isn't gathered by the momentum, a factor of ten at 0.9.
_L1_LADDER_BESIDE = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1)
_RHO_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

#: Plain SGD has no penalty, so it gets a ladder of weight decays; the others keep WEIGHT_DECAY.
SGD = Method(
    *("sgd", "SGD", "weight decay", (5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
    optimizer=lambda net, strength: torch.optim.SGD(net.parameters(), **_options(strength)),
)
L1 = Method("l1", "SGD + L1", "lam", _L1_LADDER, _penalty(regularizers.L1))
HOYER_SQUARE = Method(
    *("hoyer_square", "SGD + Hoyer-Square", "lam", (1.5e-5, 3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4)),
    _penalty(regularizers.HoyerSquare),
)
WCR = Method("wcr", "SGD + WCR", "lam", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4), _penalty(regularizers.WCR))
LOG = Method(
    *("log", "SGD + log concentration", "lam", (0.15, 0.3, 0.6, 1.2, 2.5, 5.0)),
    _penalty(regularizers.LogConcentration),
)

_OTHERS = (
    Method("l1 decoupled", "SGD + decoupled L1", "lam", _L1_LADDER_BESIDE, _penalty(regularizers.L1, mode="decoupled")),
    Method("l1 proximal", "SGD + proximal L1", "lam", _L1_LADDER_BESIDE, _penalty(regularizers.L1, mode="proximal")),
    Method("l2", "SGD + L2", "lam", (2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2), _penalty(regularizers.L2)),
    Method(
        *("relative", "SGD + relative concentration", "lam", (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
        _penalty(regularizers.RelativeConcentration),
    ),
    Method(
        *("group_lasso", "SGD + group lasso", "lam", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
        _penalty(regularizers.GroupLasso),
    ),
    Method(
        *("group_hoyer_square", "SGD + Group-Hoyer-Square", "lam", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        _penalty(regularizers.GroupHoyerSquare),
    ),
    Method("sam", "SAM", "rho", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), optimizer=_around_sgd(optim.SAM)),
    Method("asam", "ASAM", "rho", (0.05, 0.1, 0.25, 0.5, 1.0, 2.0), optimizer=_around_sgd(optim.ASAM)),
    Method(
        *("cram", "CrAM", "rho", _RHO_LADDER),
        optimizer=_around_sgd(optim.CrAM, sparsities=CRAM_SPARSITIES),
    ),
    Method(
        *("cram+", "CrAM+", "rho", _RHO_LADDER),
        optimizer=_around_sgd(optim.CrAMPlus, sparsities=CRAM_SPARSITIES),
    ),
    Method("s2sam", "S2SAM", "rho", _RHO_LADDER, optimizer=_around_sgd(optim.S2SAM)),
)
_ALONE = (SGD, L1, HOYER_SQUARE, WCR, LOG, *_OTHERS)

#: The demo's comparison.
DEMO = (SGD, L1, HOYER_SQUARE, WCR, L1.with_wcr(), LOG)
#: Every method alone, then with WCR beside it.
ALL = (*_ALONE, *(method.with_wcr() for method in _ALONE if method not in (SGD, WCR)))
BY_KEY = {method.key: method for method in ALL}
