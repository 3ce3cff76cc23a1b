"""What is compared: which methods, at which strengths, with how many seeds and epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wcr_fast.experiments import methods

SPARSITIES = (0.0, 0.50, 0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99)
BATCH_SIZE = 128


@dataclass(frozen=True)
class Run:
    """One training run; everything that its numbers depend on beside this file's constants."""

    method: str
    strength: float
    seed: int
    epochs: int


@dataclass(frozen=True)
class Plan:
    """The size of a comparison: which steps of every ladder, how many seeds, how many epochs, which methods."""

    size: str
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: int
    methods: tuple[str, ...] = tuple(method.key for method in methods.DEMO)

    def runs(self) -> list[Run]:
        """Return all runs, seed by seed, every method with the same number of strengths."""
        return [
            Run(key, methods.BY_KEY[key].ladder[step], seed, self.epochs)
            for seed in self.seeds
            for step in self.steps
            for key in self.methods
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
                for m in map(methods.BY_KEY.__getitem__, self.methods)
            },
            "sparsities": list(SPARSITIES),
            "learning_rate": methods.LEARNING_RATE,
            "momentum": methods.MOMENTUM,
            "weight_decay": methods.WEIGHT_DECAY,
            "batch_size": BATCH_SIZE,
            "schedule": "cosine to 0, per step",
        }


# The shorter the runs, the more of a penalty's pull is missing: quick takes the stronger half of each ladder.
PLANS = {
    "quick": Plan("quick", steps=(3, 5), seeds=(0, 1), epochs=6),
    "default": Plan("default", steps=(0, 2, 3, 4), seeds=(0, 1, 2), epochs=25),
    "full": Plan("full", steps=tuple(range(methods.LADDER_STEPS)), seeds=(0, 1, 2, 3, 4), epochs=60),
    "methods": Plan(
        "methods",
        steps=tuple(range(methods.LADDER_STEPS)),
        seeds=(0, 1, 2),
        epochs=60,
        methods=tuple(method.key for method in methods.ALL),
    ),
}
