"""One SGD or AdamW step over all parameters: torch's fused and foreach forms, the penalty beside them, and ours.

A side is verified by one step with a learning rate, from drawn gradients and state; it's timed with a learning rate
of 0, so that weights stay where they are (the state converges, and rivals that add the penalty to ``.grad`` let
that grow slowly: no step takes longer for it).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import wcr_fast
from benchmarks import shapes, verify
from benchmarks.harness import Case, Device, Side, Subject
from benchmarks.rivals import eager_penalty
from benchmarks.stepper import Stepper
from wcr_fast import optim

LAM = 0.1
RULES = {"SGD": verify.Rule("SGD", weight_decay=1e-2), "AdamW": verify.Rule("AdamW", weight_decay=1e-1)}
LR = {"SGD": 0.5, "AdamW": 1e-2}  # of the verified step: large enough to show in bfloat16
DENSITY = 0.5
FLOAT32_COPIES = 4  # what eager autograd holds at a time, in float32 copies of the weights


def lists(device: Device, *, quick: bool) -> list[tuple[str, torch.dtype, str]]:
    """Return (list, dtype, rule) of every case."""
    if device.name == "cpu" or quick:
        name = "tiny" if device.name == "cpu" and quick else "resnet18"
        return [(name, dtype, rule) for dtype in (torch.float32, torch.bfloat16) for rule in RULES]
    nets = [(net, rule) for net in ("resnet50", "gpt2", "resnet18", "vit_b16") for rule in RULES]
    large = [(name, torch.bfloat16, rule) for name in ("llama_7b", "llama_1b") for rule in RULES]
    listed = [(net, dtype, rule) for dtype in (torch.float32, torch.bfloat16) for net, rule in nets]
    return [*listed[:2], *large, *listed[2:]]  # what must not be missing when time runs out comes first


def cases(device: Device, *, quick: bool) -> Iterator[Case]:
    """Yield one case for each list, dtype and optimizer."""
    for name, dtype, kind in lists(device, quick=quick):
        listed = shapes.LISTS[name]()
        count = shapes.values_of(listed)
        sides = tuple(Ways(kind, listed, dtype, device).sides())
        touched = count * dtype.itemsize * (2 + len(RULES[kind].state))
        yield Case(name, kind, str(dtype).removeprefix("torch."), len(listed), count, touched, sides)


@dataclass(frozen=True)
class Ways:
    """The sides of one case."""

    kind: str
    listed: Sequence[shapes.Shape]
    dtype: torch.dtype
    device: Device

    def sides(self) -> list[Side]:
        """Return all ways of taking the step, those to be compared most directly first."""
        cuda = self.device.name == "cuda"
        sides = [
            self.side("torch fused", self._torch(fused=True)),
            self.side("ours", self._ours(), ours=True),
            self.side("ours, penalty", self._ours(penalty=True), ours=True),
            self.side("ours, penalty, mask", self._ours(penalty=True), ours=True, masked=True),
        ]
        if cuda:
            sides.append(self.side("ours, penalty, in a graph", self._ours(penalty=True), ours=True, graph=True))
        if self.dtype == torch.bfloat16:
            wide = {"state_dtype": torch.float32}
            sides.append(self.side("ours, fp32 state", self._ours(**wide), ours=True, state=4))
            sides.append(self.side("ours, penalty, fp32 state", self._ours(penalty=True, **wide), ours=True, state=4))
        sides.append(self.side("torch fused, add_grad_", self._torch(fused=True), before=_add_grad))
        sides.append(self.side("torch fused, eager penalty", self._torch(fused=True), before=_eager, extra=16))
        sides.append(self.side("torch foreach", self._torch(foreach=True), extra=self.dtype.itemsize))
        if cuda and importlib.util.find_spec("apex"):
            name = {"SGD": "FusedSGD", "AdamW": "FusedAdam"}[self.kind]  # FusedAdam is AdamW by default
            sides.append(self.side("apex", self._elsewhere("apex.optimizers", name)))
        if cuda and self.kind == "AdamW" and importlib.util.find_spec("bitsandbytes"):
            sides.append(
                self.side("bitsandbytes, fp32 state", self._elsewhere("bitsandbytes.optim", "AdamW32bit"), state=4)
            )
        return sides

    def side(
        self,
        name: str,
        make: Callable[..., torch.optim.Optimizer],
        *,
        ours: bool = False,
        state: int | None = None,
        before: Callable[[list[Tensor]], Callable[[], object]] | None = None,
        masked: bool = False,
        graph: bool = False,
        extra: int = 0,
    ) -> Side:
        """Describe one side; ``state`` is a state value's bytes, ``extra`` its temporaries' bytes for each weight."""
        rule, item, count = RULES[self.kind], self.dtype.itemsize, shapes.values_of(self.listed)
        stored = (state or item) * len(rule.state)
        moved = count * (3 * item + 2 * stored)  # weight in and out, gradient in, state in and out
        if masked:
            moved += count // 8
        if before is not None:  # the penalty beside the step: weights twice, gradients in and out
            moved += 4 * item * shapes.values_of(shapes.weights_of(self.listed))
        penalised = before is not None or "penalty" in name

        def build(copies: int) -> Subject:
            made = [self._stepper(seed, make, before, masked, graph) for seed in range(copies)]
            for stepper in made:
                stepper.lam = LAM if penalised else 0.0
                stepper.step()
                if graph:
                    stepper.capture()
            return Subject(lambda i: made[i].step(), lambda: made[0].verify(LR[self.kind]))

        return Side(name, build, ours, moved, count * (2 * item + stored + extra + masked))

    def _stepper(self, seed: int, make: Any, before: Any, masked: bool, graph: bool) -> Stepper:
        values = shapes.balanced(self.listed, dtype=self.dtype, device=self.device.torch_device, seed=seed)
        params = [nn.Parameter(value) for value in values]
        for p in params:
            p.grad = torch.empty_like(p).normal_(std=LAM / 7)
        keep = [torch.rand(p.numel(), device=p.device) < DENSITY for p in params] if masked else None
        lr = torch.zeros((), device=self.device.torch_device) if graph else 0.0
        optimizer = make(params, lr=lr, **({"capturable": True} if graph and self.kind == "AdamW" else {}))
        for p, kept in zip(params, keep or (), strict=bool(keep)):
            p.data.view(-1).mul_(kept)
            optimizer._set_mask(p, verify.pack_words(kept))
        return Stepper(params, optimizer, RULES[self.kind], before=before and before(params), keep=keep)

    def _torch(self, **how: bool) -> Callable[..., torch.optim.Optimizer]:
        kind = getattr(torch.optim, self.kind)
        return lambda params, **options: kind(params, **RULES[self.kind].options, **how, **options)

    def _ours(self, *, penalty: bool = False, **how: Any) -> Callable[..., torch.optim.Optimizer]:
        if penalty:
            how |= {"penalty": "wcr", "lam": LAM}

        kind = getattr(optim, self.kind)
        return lambda params, **options: kind(params, **RULES[self.kind].options, **how, **options)

    def _elsewhere(self, module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
        def make(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
            return getattr(importlib.import_module(module), name)(params, **RULES[self.kind].options, **options)

        return make


def _matrices(params: list[Tensor]) -> list[Tensor]:
    return [p for p in params if p.dim() > 1]


def _add_grad(params: list[Tensor]) -> Callable[[], object]:
    return wcr_fast.WCR(_matrices(params), lam=LAM).add_grad_


def _eager(params: list[Tensor]) -> Callable[[], object]:
    weights = _matrices(params)
    return lambda: eager_penalty(weights, LAM).backward()
