"""L1 on the weights themselves: soft thresholding and decoupled decay beside an optimizer's step."""

import copy

import pytest
import torch
from torch import nn

import wcr_fast

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected(w, t, mode):
    """Return what a weight becomes, computed in float64 from t as the arithmetic's dtype has it."""
    arithmetic = torch.float64 if w.dtype == torch.float64 else torch.float32
    t = torch.tensor(t, dtype=arithmetic).double()
    x = w.detach().cpu().double()
    moved = x - t * x.sign()
    if mode == "proximal":
        moved = torch.where(x.abs() <= t, 0.0, moved)
    return moved.to(arithmetic).to(w.dtype)


def same(got, want):
    return torch.equal(got.detach().cpu(), want) and torch.equal(got.detach().cpu().signbit(), want.signbit())


@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_tensor(backend, device, mode, dtype):
    t = 0.3 * 0.1
    weights = [
        torch.randn(33_001, dtype=dtype, device=device)[1:],
        torch.randn(3, 4, 5, 5, dtype=dtype, device=device).to(memory_format=torch.channels_last),
        torch.randn(0, 3, dtype=dtype, device=device),
        torch.full((1, 1), t, dtype=dtype, device=device),
        torch.randn(40, 60, dtype=dtype, device=device)[:, ::2],
        torch.tensor([[0.0, -0.0, t, -t, float("inf"), -float("inf"), 1e-7]], dtype=dtype, device=device),
    ]
    before = [w.clone() for w in weights]
    gaps = weights[4]._base.clone()
    wcr_fast.L1(weights, lam=0.3, mode=mode).shrink_(0.1)
    for w, old in zip(weights, before, strict=True):
        assert same(w, expected(old, t, mode))
    assert torch.equal(weights[4]._base[:, 1::2], gaps[:, 1::2])


def test_zeroes_exactly_what_is_small_and_flips_no_sign(backend, device):
    t = torch.tensor(0.25)
    w = torch.linspace(-1, 1, 4097, device=device)
    w[10], w[20] = t, -t
    before = w.clone()
    wcr_fast.L1([w], lam=0.5, mode="proximal").shrink_(0.5)
    assert torch.equal(w == 0, before.abs() <= t.to(device))
    assert not w[w == 0].signbit().any()
    assert ((w.sign() == before.sign()) | (w == 0)).all()
    w[3] = float("nan")
    wcr_fast.L1([w], lam=0.5, mode="proximal").shrink_(0.5)
    assert w[3].isnan()


def test_is_the_minimiser_that_it_is_named_for(backend, device):
    """prox(v) = argmin of t |w| + (w - v)^2 / 2, found by search."""
    v = torch.randn(20, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    found = grid[(0.4 * grid.abs() + (grid - v[:, None]) ** 2 / 2).argmin(1)]
    w = v.to(device)
    wcr_fast.L1([w], lam=0.4, mode="proximal").shrink_(1.0)
    torch.testing.assert_close(w.cpu(), found, rtol=0, atol=1e-4)


def make():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def loss_of(model, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=generator).to(model[0].weight.device)
    return scale * model(x).square().mean()


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd fused": lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "ours": lambda groups: wcr_fast.optim.AdamW(groups),
}


@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_it_takes_each_groups_lr_of_that_step(backend, device, name, mode):
    model = make().to(device)
    twin = copy.deepcopy(model)
    optimizers = []
    for net in (model, twin):
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.02}]
        optimizers.append(OPTIMIZERS[name](groups))
    first, second = optimizers
    wcr_fast.L1(model, lam=0.2, mode=mode).attach(first)
    for step in range(3):
        if step == 2:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.05
        for net in (model, twin):
            net.zero_grad()
            loss_of(net).backward()
        first.step()
        ts = [group["lr"] * 0.2 for group in second.param_groups]
        if mode == "proximal":
            second.step()
        with torch.no_grad():
            for layer, t in zip((twin[0], twin[2]), ts, strict=True):
                layer.weight.copy_(expected(layer.weight, t, mode).to(device))
        if mode == "decoupled":
            second.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    if mode == "proximal":
        assert 0 < (model[0].weight == 0).sum() < model[0].weight.numel()
        assert not (model[0].bias == 0).any()


def test_lr_and_lam_may_be_tensors(backend, device):
    w = torch.randn(50, 40, device=device)
    twin = w.clone()
    lam = torch.tensor(0.5, device=device)
    reg = wcr_fast.L1([w], lam=lam, mode="proximal")
    reg.shrink_(torch.tensor(0.25, device=device))
    lam.fill_(1.0)
    reg.shrink_(torch.tensor(0.125, dtype=torch.float64, device=device))
    other = wcr_fast.L1([twin], lam=0.5, mode="proximal")
    other.shrink_(0.25)
    other.shrink_(0.25)
    assert torch.equal(w, twin)


@pytest.mark.parametrize("name", ["sgd", "sgd fused"])
@pytest.mark.parametrize("mode", ["proximal", "decoupled"])
def test_a_skipped_step_changes_nothing(backend, name, mode):
    model = make()
    optimizer = OPTIMIZERS[name]([{"params": model.parameters(), "lr": 0.1}])
    wcr_fast.L1(model, lam=1.0, mode=mode).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, factor)).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(changed) if factor == 1.0 else not any(changed)


def test_only_what_is_owned_and_trained(backend, device):
    model = make().to(device)
    reg = wcr_fast.L1(model, lam=100.0, mode="proximal")
    reg.attach(torch.optim.SGD(model[0].parameters(), lr=0.1)).remove()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with reg.attach(optimizer):
        version = model[0].weight._version
        optimizer.step()
        assert model[0].weight._version > version
        assert torch.count_nonzero(model[0].weight) == 0
        assert torch.count_nonzero(model[2].weight) > 0
    model[2].weight.requires_grad_(False)
    reg.shrink_(1.0)
    assert torch.count_nonzero(model[2].weight) > 0


def test_a_strength_of_zero_does_nothing(backend, device):
    w = torch.tensor([[-0.0, 1.0]], device=device, requires_grad=True)
    version = w._version
    wcr_fast.L1([w], lam=0.0, mode="proximal").shrink_(1.0)
    wcr_fast.L1([w], lam=1.0, mode="proximal").shrink_(0.0)
    assert w._version == version
    wcr_fast.L1([w], lam=torch.zeros((), device=device), mode="proximal").shrink_(1.0)
    assert w.signbit().tolist() == [[True, False]]


def test_the_value_has_no_gradient():
    w = torch.tensor([[1.0, -2.0]], requires_grad=True)
    value = wcr_fast.L1([w], lam=0.5, mode="decoupled")()
    assert value.item() == 1.5
    assert not value.requires_grad


def test_beside_a_penalty_in_the_step(backend, device):
    model = make().to(device)
    optimizer = wcr_fast.optim.SGD(model.parameters(), lr=0.1, penalty="wcr", lam=1e-6)
    wcr_fast.L1(model, lam=0.5, mode="proximal").attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert (model[0].weight == 0).any()


def test_errors():
    model = make()
    reg = wcr_fast.L1(model, mode="proximal")
    with pytest.raises(ValueError, match="mode must be one of loss, decoupled, proximal, got 'prox'"):
        wcr_fast.L1(model, mode="prox")
    with pytest.raises(ValueError, match="r must be 0"):
        wcr_fast.L1(model, mode="decoupled", r=1e-8)
    with pytest.raises(ValueError, match="lam must be >= 0"):
        wcr_fast.L1(model, -1.0, mode="proximal")
    with pytest.raises(ValueError, match=r"acts on weights.*attach it"):
        reg.add_grad_()
    with pytest.raises(ValueError, match='mode "loss" acts on gradients'):
        wcr_fast.L1(model).shrink_(0.1)
    with pytest.raises(ValueError, match='Sum: L1 in mode "proximal"'):
        reg + wcr_fast.WCR(model)
    with pytest.raises(ValueError, match=r"share memory"):
        wcr_fast.L1([torch.ones(3, 1).expand(3, 4)], mode="proximal")
    with pytest.raises(ValueError, match=r"acts on the weights: attach it.*decoupled=True"):
        wcr_fast.optim.SGD(model.parameters(), lr=0.1, penalty=reg)
    with pytest.raises(ValueError, match="owns none"):
        reg.attach(torch.optim.SGD(make().parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    with pytest.raises(ValueError, match="attached to this SGD already"):
        reg.attach(optimizer)
    narrow = make().bfloat16()
    masters = wcr_fast.optim.SGD(narrow.parameters(), lr=0.1, master="float32")
    with pytest.raises(ValueError, match="master copies"):
        wcr_fast.L1(narrow, mode="proximal").attach(masters)
