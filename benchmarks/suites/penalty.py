"""Moments and the penalty's gradient, added to ``.grad``: ours, eager autograd, torch.compile, ``_foreach``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import wcr_fast
from benchmarks import shapes, verify
from benchmarks.harness import Case, Device, Side, Subject, WrongResult, captured
from benchmarks.rivals import R, eager_penalty, foreach_gradient_

LAM = 0.1
FLOAT32_COPIES = 4  # what eager autograd and _foreach hold at a time, in float32 copies of the weights
# Lists whose compilation is worth its seconds; a language model's layers repeat, so that there one layer is compiled.
COMPILED = ("resnet18", "resnet50", "gpt2")
COMPILED_BY_LAYER = ("llama_1b",)


def lists(device: Device, *, quick: bool) -> list[tuple[str, torch.dtype]]:
    """Return (list, dtype) of every case."""
    if device.name == "cpu":
        return [("tiny" if quick else "resnet18", dtype) for dtype in (torch.float32, torch.bfloat16)]
    if quick:
        return [("resnet18", torch.float32), ("resnet18", torch.bfloat16)]
    nets = ("resnet50", "gpt2", "resnet18", "vit_b16")
    large = [(name, torch.bfloat16) for name in ("llama_7b", "llama_1b")]
    listed = [(net, dtype) for dtype in (torch.float32, torch.bfloat16) for net in nets]
    return [listed[0], *large, *listed[1:]]  # what must not be missing when time runs out comes first


def cases(device: Device, *, quick: bool) -> Iterator[Case]:
    """Yield two cases a list: the moments, and the gradient."""
    for name, dtype in lists(device, quick=quick):
        listed = shapes.weights_of(shapes.LISTS[name]())
        size = shapes.values_of(listed) * dtype.itemsize
        head = (name, str(dtype).removeprefix("torch."), len(listed), shapes.values_of(listed))
        yield _case("gradient", head, 2 * size, gradient_sides(name, listed, dtype, device, quick=quick))
        yield _case("moments", head, size, moments_sides(listed, dtype, device))


def _case(op: str, head: tuple[str, str, int, int], working_set: int, sides: Sequence[Side]) -> Case:
    name, dtype, tensors, weights = head
    return Case(name, op, dtype, tensors, weights, working_set, tuple(sides))


def gradient_sides(
    name: str, listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device, *, quick: bool
) -> list[Side]:
    """Return the ways of adding the gradient; at least, weights are read twice, gradients read and written."""
    count = shapes.values_of(listed)

    def side(label: str, bind: Bind, *, ours: bool = False, wide: int = 0) -> Side:
        def build(copies: int) -> Subject:
            return _adding(bind, _leaves(listed, dtype, device, copies))

        return Side(label, build, ours, 4 * dtype.itemsize * count, count * (2 * dtype.itemsize + 4 * wide))

    sides = [side("add_grad_", _add_grad, ours=True)]
    if device.name == "cuda":
        sides.append(side("add_grad_ in a graph", lambda weights: captured(_add_grad(weights)), ours=True))
    sides.append(side("wcr() + backward", _loss, ours=True, wide=1))
    sides.append(side("eager autograd", _eager, wide=FLOAT32_COPIES))
    if name in COMPILED and dtype == torch.float32 and not quick:
        sides.append(side("torch.compile", _compiled, wide=1))
    if name in COMPILED_BY_LAYER and not quick:
        sides.append(side("torch.compile by layer", _compiled_by_layer, wide=1))
    return [*sides, side("_foreach", lambda w: lambda: foreach_gradient_(w, LAM), wide=FLOAT32_COPIES)]


Bind = Callable[[list[Tensor]], Callable[[], object]]


def _leaves(listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device, copies: int) -> list[list[Tensor]]:
    made = []
    for seed in range(copies):
        weights = shapes.balanced(listed, dtype=dtype, device=device.torch_device, seed=seed)
        for w in weights:
            w.requires_grad_().grad = torch.zeros_like(w)
        made.append(weights)
    return made


def _adding(bind: Bind, made: list[list[Tensor]]) -> Subject:
    calls = [bind(weights) for weights in made]

    def check() -> None:
        for weights, call in zip(made, calls, strict=True):
            for w in weights:
                w.grad.zero_()
            call()
            verify.check_gradients(weights, LAM)

    return Subject(lambda i: calls[i](), check)


def _add_grad(weights: list[Tensor]) -> Callable[[], object]:
    return wcr_fast.WCR(weights, lam=LAM).add_grad_


def _loss(weights: list[Tensor]) -> Callable[[], object]:
    wcr = wcr_fast.WCR(weights, lam=LAM)
    return lambda: wcr().backward()


def _eager(weights: list[Tensor]) -> Callable[[], object]:
    return lambda: eager_penalty(weights, LAM).backward()


def _compiled(weights: list[Tensor]) -> Callable[[], object]:
    torch.compiler.reset()  # every list is a recompilation, and torch gives up after eight
    compiled = torch.compile(eager_penalty, dynamic=False)
    return lambda: compiled(weights, LAM).backward()


def _compiled_by_layer(weights: list[Tensor]) -> Callable[[], object]:
    torch.compiler.reset()
    compiled = torch.compile(eager_penalty, dynamic=False)
    return lambda: sum(compiled([w], LAM) for w in weights).backward()


def moments_sides(listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device) -> list[Side]:
    """Return the ways of taking every layer's mean and variance; at least, weights are read once."""
    count = shapes.values_of(listed)

    def side(label: str, moments: Callable[[list[Tensor]], object], *, ours: bool = False, wide: int = 0) -> Side:
        def build(copies: int) -> Subject:
            made = [
                shapes.balanced(listed, dtype=dtype, device=device.torch_device, seed=seed) for seed in range(copies)
            ]
            return Subject(lambda i: moments(made[i]), lambda: _check_moments(made[0], moments(made[0])))

        return Side(label, build, ours, dtype.itemsize * count, dtype.itemsize * count + 4 * wide)

    largest = max(torch.Size(shape).numel() for shape in listed)  # of the eager form's temporaries
    return [
        side("layer_moments", wcr_fast.layer_moments, ours=True),
        side("eager", _eager_moments, wide=FLOAT32_COPIES * largest),
    ]


def _eager_moments(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    pairs = []
    for w in weights:
        a = torch.sqrt(w.float() ** 2 + R)
        pairs.append(torch.var_mean(a, correction=0))
    return torch.stack([mean for _, mean in pairs]), torch.stack([var for var, _ in pairs])


def _check_moments(weights: list[Tensor], got: tuple[Tensor, Tensor]) -> None:
    for i in verify.sample([w.numel() for w in weights]):
        for what, value, want in zip(("mean", "variance"), got, verify.moments(weights[i]), strict=True):
            error = abs(float(value[i]) / float(want) - 1.0)
            if not error < verify.BOUND[torch.float32]:
                raise WrongResult(f"{what} of weight {i} is off by {error:.1e} of it")
