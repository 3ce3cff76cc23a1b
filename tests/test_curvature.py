"""The warning that a step of SGD is too long for the penalty's curvature, attached and in the fused step."""

import copy
import warnings

import pytest
import torch
from torch import nn

import wcr_fast
from wcr_fast import curvature
from wcr_fast.optim import SGD, AdamW

LAM = 1e-3
OPTIONS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
MESSAGE = r"WCR: the step is 1.05 times too long .* at {}: one SGD step throws its spread outward by a factor of {:.3g}"


def make(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)


def attached(model, lr, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    wcr_fast.WCR(model, lam=LAM).attach(optimizer)
    return optimizer


def fused(model, lr, **options):
    return SGD(model.parameters(), lr=lr, penalty=wcr_fast.WCR(model, lam=LAM), **options)


def fused_by_group(model, lr, **options):
    """Each group has a strength of its own, and a rate in a tensor that makes up for it."""
    device = model[0].weight.device
    groups = [
        {"params": model[0].parameters(), "lam": 10 * LAM, "lr": torch.tensor(lr / 10, device=device)},
        {"params": model[2].parameters(), "lam": torch.tensor(LAM / 2, device=device), "lr": 2 * lr},
    ]
    return SGD(groups, lr=0.0, penalty=wcr_fast.WCR(model, lam=7.0), **options)


BUILDERS = pytest.mark.parametrize("build", [attached, fused, fused_by_group])


def curvatures(model):
    """Curvature of each weight's term and the factor by which a step of length 1 throws its spread, by name."""
    facts = {}
    for name, (_, var) in wcr_fast.WCR(model).moments().items():
        n, eps = model.get_parameter(name).numel(), 1e-8
        facts[name] = (6 * var - 2 * eps) / (n * (var + eps) ** 3), 2 / (n * (var + eps) ** 2)
    return facts


def limit(options):
    mu = options.get("momentum", 0.0)
    return 2 * (1 + mu) / (1 + 2 * mu) if options.get("nesterov") else 2 * (1 + mu)


def step(optimizer, times=1):
    for _ in range(times):
        optimizer.step()
        if torch.cuda.is_available():  # a report is read when it has arrived
            torch.cuda.synchronize()


def warned(optimizer, times=1):
    """Return what the steps warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(optimizer, times)
    return [str(w.message) for w in caught if w.category is UserWarning]


@BUILDERS
@pytest.mark.parametrize("options", OPTIONS)
def test_at_its_limit(backend, device, build, options):
    model = make(device)
    facts = curvatures(model)
    worst = max(facts, key=lambda name: facts[name][0])
    bound = limit(options) / (LAM * facts[worst][0])
    state = copy.deepcopy(model.state_dict())
    assert warned(build(model, 0.95 * bound, **options), 2) == []
    model.load_state_dict(state)
    model.zero_grad()
    optimizer = build(model, 1.05 * bound, **options)
    with pytest.warns(UserWarning, match=MESSAGE.format(worst, 1 + 1.05 * bound * LAM * facts[worst][1])):
        step(optimizer, 2)


@BUILDERS
def test_once_and_now_and_then(backend, device, build, monkeypatch):
    monkeypatch.setattr(curvature, "WATCH_EVERY", 4)
    model = make(device)
    optimizer = build(model, 0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    state = copy.deepcopy(model.state_dict())
    assert warned(optimizer, 3) == []
    for group in optimizer.param_groups:
        group["lr"] = 1e4 / LAM
    assert warned(optimizer) == []  # nobody looks at the fourth
    model.load_state_dict(state)
    assert len(warned(optimizer, 2)) == 1
    for _ in range(8):
        model.load_state_dict(state)
        assert warned(optimizer) == []


@BUILDERS
def test_frozen_weights_are_not_looked_at(backend, device, build):
    model = make(device)
    facts = curvatures(model)
    worst, other = sorted(facts, key=lambda name: -facts[name][0])
    model.get_parameter(worst).requires_grad_(False)
    bound = limit({}) / (LAM * facts[other][0])
    assert warned(build(copy.deepcopy(model), 0.95 * bound), 2) == []
    with pytest.warns(UserWarning, match=MESSAGE.format(other, 1 + 1.05 * bound * LAM * facts[other][1])):
        step(build(model, 1.05 * bound), 2)


def test_adam_is_not_watched():
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e3)
    wcr_fast.WCR(model, lam=1e6).attach(optimizer)
    assert warned(optimizer) == []
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_adamw_is_not_watched(backend, device):
    model = make(device)
    assert warned(AdamW(model.parameters(), lr=1e3, penalty="wcr", lam=1e6), 2) == []


def test_formulas_without_variance_have_no_such_curvature(backend, device):
    model = make(device)
    assert warned(SGD(model.parameters(), lr=1e6, penalty="l1", lam=1e6)) == []


def test_copies_have_warned_already(monkeypatch):
    monkeypatch.setattr(curvature, "WATCH_EVERY", 1)
    model = make()
    optimizer = fused(model, 1e9)
    state = copy.deepcopy(model.state_dict())
    model, early = copy.deepcopy((model, optimizer))
    assert len(warned(early)) == 1
    model, late = copy.deepcopy((model, early))
    model.load_state_dict(state)
    assert warned(late) == []
