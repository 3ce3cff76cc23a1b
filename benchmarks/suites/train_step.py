"""A whole training step of ResNet-18 (SGD) and GPT-2 small (AdamW) on random data, with and without the penalty.

Verified is what the optimizer's step does with drawn gradients, and the eager penalty's own gradient: forward and
backward are torch's on every side. Under bfloat16 autocast on a GPU, in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wcr_fast
from benchmarks import verify
from benchmarks.harness import Case, Device, Side, Subject
from benchmarks.models import GPT, ResNet18
from benchmarks.rivals import eager_penalty
from benchmarks.stepper import Stepper
from wcr_fast import optim

LAM = 1e-6
LR = 1e-4  # of the timed steps: small, random data teach nothing
VERIFIED_LR = 1e-3


@dataclass(frozen=True)
class Net:
    """A net with its optimizer and one batch of random data."""

    name: str
    make: Callable[[], nn.Module]
    rule: verify.Rule
    batch: Callable[[], tuple[Tensor, Tensor]]


def nets(device: Device, *, quick: bool) -> list[Net]:
    """Return both nets; small ones or small batches on the CPU."""
    prefix = "tiny " if quick and device.name == "cpu" else ""
    cuda, tiny = device.name == "cuda", quick and device.name == "cpu"
    images, side = (128, 224) if cuda else (4, 32 if tiny else 64)
    sequences, length = (8, 1024) if cuda else (1, 32 if tiny else 128)
    vocabulary = 256 if tiny else 50257
    resnet = {"width": 8, "classes": 10} if tiny else {}
    gpt = {"layers": 2, "width": 64, "heads": 2, "vocabulary": vocabulary, "context": length} if tiny else {}
    where = device.torch_device

    def pictures() -> tuple[Tensor, Tensor]:
        x = torch.randn(images, 3, side, side, device=where).to(memory_format=torch.channels_last)
        return x, torch.randint(10, (images,), device=where)

    def tokens() -> tuple[Tensor, Tensor]:
        text = torch.randint(vocabulary, (sequences, length + 1), device=where)
        return text[:, :-1], text[:, 1:]

    def resnet18() -> nn.Module:
        return ResNet18(**resnet).to(memory_format=torch.channels_last)

    sgd = verify.Rule("SGD", weight_decay=5e-4)
    adam = verify.Rule("AdamW", weight_decay=0.1, betas=(0.9, 0.95))
    return [
        Net(f"{prefix}resnet18", resnet18, sgd, pictures),
        Net(f"{prefix}gpt2", lambda: GPT(**gpt), adam, tokens),
    ]


def cases(device: Device, *, quick: bool) -> Iterator[Case]:
    """Yield one case for each net."""
    for net in nets(device, quick=quick):
        with torch.device("meta"):
            params = list(net.make().parameters())
        count = sum(p.numel() for p in params)
        dtype = "bf16 mixed" if device.name == "cuda" else "float32"
        held = count * 4 * (2 + len(net.rule.state))
        # The working set is far beyond any cache: one copy will do.
        yield Case(net.name, net.rule.kind, dtype, len(params), count, 1 << 40, tuple(sides(net, device, held)))


def sides(net: Net, device: Device, held: int) -> list[Side]:
    """Return the ways of training with the penalty, and without it."""

    def side(name: str, way: Way, *, ours: bool = False) -> Side:
        return Side(name, lambda copies: _subject(net, way, device), ours, None, held)

    return [
        side("no penalty, torch fused", Way()),
        side("ours, no penalty", Way(ours=True), ours=True),
        side("ours, penalty", Way(ours=True, penalty=True), ours=True),
        side("torch fused, attach", Way(penalty=True), ours=True),
        side("torch fused, eager penalty", Way(penalty=True, eager=True)),
    ]


@dataclass(frozen=True)
class Way:
    """Whose optimizer, and where the penalty comes in: in our step, by ``attach``, or in the loss."""

    ours: bool = False
    penalty: bool = False
    eager: bool = False


def _subject(net: Net, way: Way, device: Device) -> Subject:
    torch.manual_seed(0)
    with device.torch_device:
        model = net.make()
    weights = list(wcr_fast.WCR(model).weights.values())
    optimizer = _optimizer(net.rule, way, model)
    if way.penalty and not way.ours and not way.eager:
        wcr_fast.WCR(model, lam=LAM).attach(optimizer)
    inputs, targets = net.batch()
    in_step = LAM if way.penalty and not way.eager else 0.0
    stepper = Stepper(list(model.parameters()), optimizer, net.rule, in_step)

    def train(_: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.name == "cuda"):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        if way.eager:
            loss = loss + eager_penalty(weights, LAM)
        loss.backward()
        stepper.step()

    def check() -> None:
        if way.eager:
            optimizer.zero_grad()
            eager_penalty(weights, LAM).backward()
            verify.check_gradients(weights, LAM)
        train(0)  # every parameter has a gradient again
        stepper.verify(VERIFIED_LR)
        stepper.set_lr(LR)

    return Subject(train, check)


def _optimizer(rule: verify.Rule, way: Way, model: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": LR, **rule.options}
    if not way.ours:
        return getattr(torch.optim, rule.kind)(model.parameters(), fused=True, **settings)
    penalty = {"penalty": wcr_fast.WCR(model, lam=LAM)} if way.penalty else {}
    return getattr(optim, rule.kind)(model.parameters(), **settings, **penalty)
