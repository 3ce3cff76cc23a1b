"""Float64 references for lists of any size, piece by piece: WCR's moments and gradient, one SGD or AdamW step.

Written from the formulas, independent of both backends; the tests compare them with autograd and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import WrongResult
from benchmarks.rivals import EPS, R

PIECE = 1 << 24
#: largest error over the largest value: float32 arithmetic, or rounding of what is stored (several times in _foreach)
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float64: 1e-11}
SAMPLED = 200_000_000
MASK_CHUNK, MASK_WORDS = 32768, 1024


def sample(numels: Sequence[int], limit: int = SAMPLED) -> list[int]:
    """Return which tensors to check: all, or the largest, both ends and evenly spread ones up to a limit of values."""
    count = len(numels)
    largest = max(range(count), key=numels.__getitem__)
    spread = sorted(range(count), key=lambda i: (i * 0.6180339887) % 1.0)
    chosen: list[int] = []
    total = 0
    for i in dict.fromkeys([largest, 0, count - 1, *spread]):
        if not chosen or total + numels[i] <= limit:
            chosen.append(i)
            total += numels[i]
    return sorted(chosen)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield equal slices of tensors of one size as float64."""
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), PIECE):
        yield tuple(t[start : start + PIECE].double() for t in flat)


def moments(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of sqrt(w^2 + r), 0-d float64."""
    n = w.numel()
    mean = sum(torch.sqrt(x * x + R).sum() for (x,) in pieces(w)) / n
    return mean, sum((torch.sqrt(x * x + R) - mean).square().sum() for (x,) in pieces(w)) / n


def penalty_gradient(w: Tensor, lam: float) -> Callable[[Tensor], Tensor]:
    """Return the function from a float64 piece of a layer to lam times WCR's gradient there."""
    mean, var = moments(w)
    slope = -2.0 * lam / (w.numel() * (var + EPS).square())

    def gradient(x: Tensor) -> Tensor:
        a = torch.sqrt(x * x + R)
        return slope * x / a * (a - mean)

    return gradient


def check_gradients(weights: Sequence[Tensor], lam: float) -> None:
    """Raise WrongResult unless every sampled weight's ``.grad`` is lam times WCR's gradient."""
    for i in sample([w.numel() for w in weights]):
        gradient = penalty_gradient(weights[i], lam)
        worst = Worst()
        for x, got in pieces(weights[i], weights[i].grad):
            worst.see(got, gradient(x))
        worst.check(f"gradient of weight {i}", BOUND[weights[i].grad.dtype])


class Worst:
    """The largest error and the largest wanted value of what was seen, on the device until ``check``."""

    def __init__(self) -> None:
        self.error: Tensor | float = 0.0
        self.scale: Tensor | float = 0.0

    def see(self, got: Tensor, want: Tensor, slack: Tensor | float = 0.0) -> None:
        """Note the largest error beyond the slack, and the largest wanted value."""
        error = ((got - want).abs() - slack).max()
        self.error = torch.maximum(error, torch.as_tensor(self.error).to(error))
        self.scale = torch.maximum(want.abs().max(), torch.as_tensor(self.scale).to(error))

    def check(self, what: str, bound: float) -> None:
        """Raise WrongResult where the error exceeds bound * scale, or is not a number."""
        error, allowed = float(self.error), bound * float(self.scale)
        if not error <= allowed:
            raise WrongResult(f"{what} is off by {error:.2e}, allowed are {allowed:.2e}")


@dataclass(frozen=True)
class Rule:
    """One optimizer with its settings; ``step`` is its update in float64."""

    kind: str
    weight_decay: float
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def state(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.kind == "SGD" else ("exp_avg", "exp_avg_sq")

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of an optimizer that follows the rule, without lr."""
        if self.kind == "SGD":
            return {"weight_decay": self.weight_decay, "momentum": self.momentum}
        return {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}

    def step(self, w: Tensor, g: Tensor, state: Sequence[Tensor], lr: float, t: int) -> tuple[Tensor, ...]:
        """Return the new weight and state from gradient g (penalty included) in the t-th step, t >= 2."""
        if self.kind == "SGD":
            buffer = self.momentum * state[0] + g + self.weight_decay * w
            return w - lr * buffer, buffer
        beta1, beta2 = self.betas
        average, square = beta1 * state[0] + (1 - beta1) * g, beta2 * state[1] + (1 - beta2) * g * g
        root = torch.sqrt(square / (1 - beta2**t)) + self.eps
        return w * (1 - lr * self.weight_decay) - lr / (1 - beta1**t) * average / root, average, square


def check_step(
    rule: Rule,
    params: Sequence[Tensor],
    state: Callable[[int], Sequence[Tensor]],
    step: Callable[[], object],
    *,
    lr: float,
    t: int,
    lam: float,
    keep: Callable[[int], Tensor] | None = None,
) -> None:
    """Draw gradients and state of the penalty's scale, run one step, and compare weight and state with float64.

    Args:
        rule: the optimizer's settings.
        params: the parameters, their ``.grad`` at hand; those of two or more dimensions are penalised by lam.
        state: place in the list -> its state tensors, in the order of ``rule.state``.
        step: runs the step with learning rate lr, the t-th one.
        keep: place in the list -> bool mask, flat; None: no mask.

    Raises:
        WrongResult: weight or state differs by more than the stored dtypes' rounding.
    """
    chosen = sample([p.numel() for p in params])
    penalised = {i: penalty_gradient(params[i], lam) for i in chosen if lam and params[i].dim() > 1}
    for i in chosen:
        scale = 1e-2
        if i in penalised:  # as large as the penalty's gradient, so that neither hides behind the other
            scale = float(max(penalised[i](x).square().mean().sqrt() for (x,) in pieces(params[i])))
        _draw(params[i].grad, state(i), scale)
    before = {i: [t.detach().clone() for t in (params[i], params[i].grad, *state(i))] for i in chosen}
    step()
    for i in chosen:
        worst = [Worst() for _ in range(1 + len(rule.state))]
        mask = None if keep is None else keep(i)
        for at, parts in enumerate(pieces(*before[i], params[i], *state(i))):
            w, g, *rest = parts
            old, got = rest[: len(rule.state)], rest[len(rule.state) :]
            total = g + penalised[i](w) if i in penalised else g
            want = rule.step(w, total, old, lr, t)
            if mask is not None:
                kept = mask[at * PIECE : at * PIECE + w.numel()]
                want = tuple(torch.where(kept, x, 0.0) for x in want)
                if any(bool(x[~kept].any()) for x in got):
                    raise WrongResult(f"a masked value of parameter {i} is not zero")
            # The weight's own rounding, before and after, hides a part of the update; the rest must be right.
            slack = torch.finfo(params[i].dtype).eps * (w.abs() + want[0].abs())
            worst[0].see(got[0] - w, want[0] - w, slack)
            for seen, new, wanted in zip(worst[1:], got[1:], want[1:], strict=True):
                seen.see(new, wanted)
        worst[0].check(f"the update of parameter {i}", BOUND[params[i].dtype])
        for label, seen, stored in zip(rule.state, worst[1:], state(i), strict=True):
            seen.check(f"{label} of parameter {i}", BOUND[stored.dtype])


def _draw(grad: Tensor, state: Sequence[Tensor], scale: float) -> None:
    with torch.no_grad():
        grad.normal_(std=scale)
        state[0].normal_(std=scale)
        for square in state[1:]:
            square.uniform_(0.5, 1.5).mul_(scale * scale)


def pack_words(keep: Tensor) -> Tensor:
    """Return a flat bool mask as int32 words: bit j of word i of a chunk of 32768 is its element j * 1024 + i."""
    n = keep.numel()
    chunks = -(-n // MASK_CHUNK)
    padded = torch.zeros(chunks * MASK_CHUNK, dtype=torch.int32, device=keep.device)
    padded[:n] = keep
    shifts = torch.arange(MASK_CHUNK // MASK_WORDS, dtype=torch.int32, device=keep.device)
    words = (padded.view(chunks, -1, MASK_WORDS) << shifts[None, :, None]).sum(1, dtype=torch.int32).view(-1)
    last = n - (chunks - 1) * MASK_CHUNK
    return words[: (chunks - 1) * MASK_WORDS + min(MASK_WORDS, last)]
