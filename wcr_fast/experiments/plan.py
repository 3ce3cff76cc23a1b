"""What the demo compares: methods, their ladders of strengths, and the sizes of the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wcr_fast import regularizers

SPARSITIES = (0.0, 0.50, 0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99)

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 128
WCR_BESIDE_L1 = 1e-5

LADDER_STEPS = 6


@dataclass(frozen=True)
class Method:
    """One row of the comparison: a penalty (or none) and the ladder of its strengths."""

    key: str
    label: str
    knob: str
    ladder: tuple[float, ...]

    def weight_decay(self, strength: float) -> float:
        return strength if self.key == "sgd" else WEIGHT_DECAY

    def penalties(self, net: nn.Module, strength: float) -> list[regularizers.Regularizer]:
        """Return the regularizers to attach at this strength."""
        if self.key == "sgd":
            return []
        if self.key == "l1+wcr":
            return [regularizers.L1(net, lam=strength), regularizers.WCR(net, lam=WCR_BESIDE_L1)]
        return [_FAMILY[self.key](net, lam=strength)]


_FAMILY = {
    "l1": regularizers.L1,
    "hoyer_square": regularizers.HoyerSquare,
    "wcr": regularizers.WCR,
    "log": regularizers.LogConcentration,
}

#: Each ladder has LADDER_STEPS strengths, about a factor of two to three apart. Plain SGD has no penalty, so it
#: gets a ladder of weight decays; the others keep WEIGHT_DECAY.
METHODS = (
    Method("sgd", "SGD", "weight decay", (5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
    Method("l1", "SGD + L1", "lam", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    Method("hoyer_square", "SGD + Hoyer-Square", "lam", (1.5e-5, 3e-5, 6e-5, 1.2e-4, 2.5e-4, 5e-4)),
    Method("wcr", "SGD + WCR", "lam", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)),
    Method(
        "l1+wcr",
        "SGD + L1 + WCR",
        f"lam of L1; WCR at {WCR_BESIDE_L1:g}",
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    Method("log", "SGD + log concentration", "lam", (0.15, 0.3, 0.6, 1.2, 2.5, 5.0)),
)
BY_KEY = {method.key: method for method in METHODS}


@dataclass(frozen=True)
class Run:
    """One training run; everything that its numbers depend on beside this file's constants."""

    method: str
    strength: float
    seed: int
    epochs: int


@dataclass(frozen=True)
class Plan:
    """The size of the comparison: which steps of every ladder, how many seeds, how many epochs."""

    size: str
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int

    def runs(self) -> list[Run]:
        """Return all runs, seed by seed, every method with the same number of strengths."""
        return [
            Run(method.key, method.ladder[step], seed, self.epochs)
            for seed in self.seeds
            for step in self.steps
            for method in METHODS
        ]

    def describe(self) -> dict[str, Any]:
        """Return the plan and the fixed settings as plain values, for results.json."""
        return {
            "size": self.size,
            "steps": list(self.steps),
            "seeds": list(self.seeds),
            "epochs": self.epochs,
            "methods": {
                m.key: {"label": m.label, "knob": m.knob, "strengths": [m.ladder[step] for step in self.steps]}
                for m in METHODS
            },
            "sparsities": list(SPARSITIES),
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "batch_size": BATCH_SIZE,
            "schedule": "cosine to 0, per step",
        }


# The shorter the runs, the more of a penalty's pull is missing: quick takes the stronger half of each ladder.
PLANS = {
    "quick": Plan("quick", steps=(3, 5), seeds=(0, 1), epochs=6),
    "default": Plan("default", steps=(0, 2, 3, 4), seeds=(0, 1, 2), epochs=25),
    "full": Plan("full", steps=tuple(range(LADDER_STEPS)), seeds=(0, 1, 2, 3, 4), epochs=60),
}
