"""One copy of a model's parameters with its optimizer: steps it, captures it, verifies it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import verify
from benchmarks.harness import captured


@dataclass
class Stepper:
    """One copy of the parameters with its optimizer, and what a step must do to them."""

    params: list[Tensor]
    optimizer: torch.optim.Optimizer
    rule: verify.Rule
    lam: float = 0.0
    before: Callable[[], object] | None = None
    keep: list[Tensor] | None = None
    count: int = 0
    run: Callable[[], object] = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.issue

    def issue(self) -> None:
        if self.before is not None:
            self.before()
        self.optimizer.step()

    def step(self) -> None:
        self.run()
        self.count += 1

    def capture(self) -> None:
        """Replace the step by the replay of a graph of it."""
        self.run = captured(self.issue)
        self.count += 3

    def state(self, i: int) -> list[Tensor]:
        """Return the state of the i-th parameter in the rule's order; bitsandbytes has names of its own."""
        state = self.optimizer.state[self.params[i]]
        return [state[name] if name in state else state[f"state{at}"] for at, name in enumerate(self.rule.state, 1)]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def verify(self, lr: float) -> None:
        """Raise WrongResult unless a step with this learning rate does what the formulas say; then set it to 0."""
        keep = None if self.keep is None else self.keep.__getitem__
        self.set_lr(lr)
        verify.check_step(
            self.rule, self.params, self.state, self.step, lr=lr, t=self.count + 1, lam=self.lam, keep=keep
        )
        self.set_lr(0.0)
