"""Sums of penalties: the gradient of the sum of the formulas, whatever their members differ in."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

import wcr_fast
from wcr_fast.optim import SGD


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(6, 11)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def net(device):
    return Net().to(device)


# family, lam, options, excluded
PAIRS = {
    "two r": [("wcr", 1e-3, {}, ()), ("l1", 1e-2, {}, ())],
    "one r": [("hoyer_square", 1e-2, {}, ()), ("l1", 1e-2, {}, ())],
    "two smooth, other weights": [("log", 1.0, {"r": 1e-3}, "conv"), ("relative", 0.1, {"r": 1e-6}, "fc")],
    "four": [
        ("wcr", 1e-3, {"eps": 1e-4}, ()),
        ("wcr", 2e-3, {"eps": 1e-3}, "embed"),
        ("l2", -1e-2, {}, ()),
        ("l1", 1e-2, {}, "fc"),
    ],
}
KINDS = {
    "wcr": wcr_fast.WCR,
    "l1": wcr_fast.L1,
    "l2": wcr_fast.L2,
    "hoyer_square": wcr_fast.HoyerSquare,
    "relative": wcr_fast.RelativeConcentration,
    "log": wcr_fast.LogConcentration,
}


def members(net, kinds):
    return [KINDS[family](net, lam, exclude=out, **options) for family, lam, options, out in kinds]


def wanted(net, kinds, regs):
    """Return value and gradients of the sum, by float64 autograd of the formulas."""
    psi, grads = 0.0, {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in net.named_parameters()}
    for (family, lam, _, _), reg in zip(kinds, regs, strict=True):
        value, found = reference.penalty_and_grads(family, list(reg.weights.values()), reg.eps, reg.r)
        psi += lam * value.item()
        for name, g in zip(reg.weights, found, strict=True):
            grads[name] += lam * g.cpu()
    return psi, grads


@pytest.mark.parametrize("kinds", PAIRS.values(), ids=PAIRS)
def test_value_and_gradient_match_the_formulas(backend, net, kinds):
    regs = members(net, kinds)
    penalty = regs[0] + regs[1] if len(regs) == 2 else sum(regs)
    assert penalty.terms == tuple(regs)
    psi, want = wanted(net, kinds, regs)
    value = penalty()
    assert value.dim() == 0
    assert value.item() == pytest.approx(psi, rel=1e-5)
    value.backward()
    through_loss = {n: p.grad for n, p in penalty.weights.items()}
    for p in penalty.weights.values():
        p.grad = torch.ones_like(p)
    for times in (1, 2):  # anew, then as prepared
        penalty.add_grad_()
        for n, p in penalty.weights.items():
            assert reference.relative_error(p.grad, 1 + times * want[n].to(p.device)) < 5e-6
    for n, g in through_loss.items():
        assert reference.relative_error(g, want[n].to(g.device)) < 5e-6
    assert any(part._plan is not None for part in penalty._parts) == (backend == "triton")


def test_the_kernels_and_torch_agree_with_the_members_one_by_one(backend, device):
    """Large and small layers, of every dtype, misaligned, permuted, empty and with one element only."""
    dtypes = (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        weights = [
            torch.randn(33_001, dtype=dtype, device=device)[1:],
            torch.randn(3, 4, 5, 5, dtype=dtype, device=device).to(memory_format=torch.channels_last),
            torch.randn(0, 3, dtype=dtype, device=device),
            torch.randn(1, 1, dtype=dtype, device=device),
            torch.randn(40, 60, dtype=dtype, device=device)[:, ::2],
        ]
        weights = [w.requires_grad_() for w in weights]
        regs = wcr_fast.HoyerSquare(weights, 1e-2, r=1e-8), wcr_fast.L1(weights, 1e-2)
        for reg in regs:
            reg.add_grad_()
        want = [w.grad for w in weights if w.numel()]
        for w in weights:
            w.grad = None
        sum(regs).add_grad_()
        bound = 4 * torch.finfo(dtype).eps if dtype.itemsize < 8 else 1e-14
        for w, g in zip([w for w in weights if w.numel()], want, strict=True):
            assert w.grad.stride() == g.stride()
            assert reference.relative_error(w.grad, g.double()) <= bound


def test_mixed_dtypes_and_bitwise_repeatable(backend, device):
    weights = [torch.randn(100, 340, device=device, dtype=d).requires_grad_() for d in (torch.float32, torch.bfloat16)]
    penalty = wcr_fast.WCR(weights, 1e-3) + wcr_fast.L1(weights, 1e-3)
    seen = []
    for _ in range(3):
        for w in weights:
            w.grad = None if len(seen) != 1 else torch.zeros_like(w)
        penalty.add_grad_()
        seen.append([w.grad.clone() for w in weights])
    for grads in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], grads, strict=True))


def test_equal_magnitudes_feel_no_spread(backend, device):
    """The part of each smoothing that depends on deviations is exactly zero."""
    w = torch.full((40, 1000), 0.3, device=device).requires_grad_()
    square = [wcr_fast.FromMoments([w], lambda m, v, n, N: n * v, 1.0, r=r) for r in (1e-8, 0.0)]
    sum(square).add_grad_()
    assert torch.count_nonzero(w.grad) == 0


@pytest.mark.parametrize("r", [0.0, 1e-3])
def test_a_users_function(backend, net, r):
    def spread(mean, var, numel, total):
        return numel * (var + mean).sqrt()

    own = wcr_fast.FromMoments(net, spread, 0.5, r=r, exclude="fc")
    assert "spread" in repr(own)
    penalty = wcr_fast.WCR(net, 1e-3) + own
    want, xs = 0.0, {n: p.detach().double().cpu().requires_grad_() for n, p in penalty.weights.items()}
    for name in own.weights:
        a = xs[name].abs() if r == 0 else (xs[name] ** 2 + r).sqrt()
        want = want + 0.5 * a.numel() * (a.var(unbiased=False) + a.mean()).sqrt()
    for x in xs.values():
        want = want + 1e-3 / ((x * x + 1e-8).sqrt().var(unbiased=False) + 1e-8)
    want.backward()
    assert penalty().item() == pytest.approx(want.item(), rel=1e-5)
    penalty.add_grad_()
    for name, p in penalty.weights.items():
        assert reference.relative_error(p.grad, xs[name].grad.to(p.device)) < 5e-6


def test_a_users_function_has_to_fit():
    w = torch.randn(3, 4)
    with pytest.raises(TypeError, match="function must take"):
        wcr_fast.FromMoments([w], 3)
    with pytest.raises(TypeError, match="one value per layer, 1 of them, got shape"):
        wcr_fast.FromMoments([w], lambda m, v, n, N: v.sum())()
    with pytest.raises(TypeError, match="got float"):
        wcr_fast.FromMoments([w], lambda m, v, n, N: 1.0)()


def test_differentiable_twice():
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    op = torch.ops.wcr_fast.joint_moments
    inputs = [w.requires_grad_() for w in weights]

    def function(*ws):
        mean, var, _ = op(list(ws), (1e-2, 0.0))
        return mean, var

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_strengths_change_and_may_be_tensors(backend, net):
    def added(penalty):
        net.zero_grad(set_to_none=False)
        penalty.add_grad_()
        return net.conv.weight.grad.clone()

    l1, wcr = wcr_fast.L1(net, 1.0), wcr_fast.WCR(net, 1e-3)
    penalty = l1 + wcr
    wcr.lam = 0.0
    alone = added(penalty)
    torch.testing.assert_close(alone, net.conv.weight.detach().sign())
    l1.lam = 3.0
    torch.testing.assert_close(added(penalty), 3 * alone)
    l1.lam = torch.tensor(2.0, device=alone.device)
    torch.testing.assert_close(added(penalty), 2 * alone)
    l1.lam.fill_(4.0)
    torch.testing.assert_close(added(penalty), 4 * alone)
    assert penalty().item() == pytest.approx(4 * sum(w.abs().sum().item() for w in penalty.weights.values()), rel=1e-5)
    l1.lam = 0.0
    for p in net.parameters():
        p.grad = None
    penalty.add_grad_()
    assert penalty().item() == 0.0
    assert net.conv.weight.grad is None
    wcr.lam = 1e-3
    l1.r = 1e-8
    assert torch.isfinite(added(penalty)).all()


def test_factors_and_repr(net):
    l1, wcr = wcr_fast.L1(net, 1e-3, exclude="conv"), wcr_fast.WCR(net, 1e-5)
    penalty = 2 * (wcr + l1 * 3)
    assert [t.lam for t in penalty.terms] == pytest.approx([2e-5, 6e-3])
    assert l1.lam == 1e-3
    assert repr(penalty).startswith("Sum(WCR(lam=2e-05, eps=1e-08, r=1e-08) + L1(lam=0.006, eps=1e-08, r=0)) on 3 ")
    assert penalty.lam == 1.0
    with pytest.raises(AttributeError):
        penalty.lam = 2.0


def test_frozen_replaced_and_copied(backend, net):
    penalty = wcr_fast.WCR(net, 1e-3) + wcr_fast.L1(list(net.fc.parameters())[:1], 1e-2)
    for _ in range(2):
        penalty.add_grad_()
    net.conv.weight.requires_grad_(False)
    net.conv.weight.grad = None
    net.fc.weight = nn.Parameter(net.fc.weight.detach() * 2)
    penalty.add_grad_()
    assert net.conv.weight.grad is None
    apart = copy.deepcopy(net)
    apart.zero_grad()
    (wcr_fast.WCR(apart, 1e-3) + wcr_fast.L1([apart.fc.weight], 1e-2)).add_grad_()
    torch.testing.assert_close(net.fc.weight.grad, apart.fc.weight.grad)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert twin().item() == pytest.approx(penalty().item())


def test_nan_shows(backend, device):
    w = torch.randn(4, 4, device=device)
    penalty = wcr_fast.WCR([w]) + wcr_fast.L1([w])
    w[1, 1] = float("nan")
    assert penalty().isnan()


def test_what_cannot_be_summed(net):
    regs = [wcr_fast.L1(net, r=r) for r in (0.0, 1e-8, 1e-3)]
    with pytest.raises(ValueError, match=r"differ in r: 0\.001, 1e-08, 0\.0; at most two"):
        sum(regs)
    with pytest.raises(TypeError):
        regs[0] + 3
    with pytest.raises(TypeError, match=r"terms\[1\] must be a penalty, got int"):
        wcr_fast.Sum([regs[0], 3])
    with pytest.raises(ValueError, match="no penalty"):
        wcr_fast.Sum([])
    two = regs[0] + regs[1]
    regs[1].r = 1e-2
    regs[0].r = 0.5
    two()
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="Sum: the gradient of weight is sparse"):
        (wcr_fast.WCR(model) + wcr_fast.L1(model)).add_grad_()


def test_attached_with_a_closure(backend, net):
    penalty = wcr_fast.WCR(net, 1e-4) + wcr_fast.L1(net.fc, 1e-2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with penalty.attach(optimizer):
        loss = optimizer.step(lambda: torch.tensor(1.5))
        assert loss.item() == pytest.approx(1.5 + penalty().item(), rel=1e-5)
        with pytest.raises(ValueError, match="this Sum is attached"):
            penalty.attach(optimizer)
    want = {n: p.grad.clone() for n, p in penalty.weights.items()}
    net.zero_grad()
    halves = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (net.embed, net.conv, net.fc)]
    for optimizer in halves:
        penalty.attach(optimizer)
        optimizer.step()
    for n, p in penalty.weights.items():
        torch.testing.assert_close(p.grad, want[n])


def test_attach_warns_of_a_members_long_steps(net):
    penalty = wcr_fast.WCR(net, 1.0) + wcr_fast.L1(net, 1e-6)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty.attach(optimizer)
    with pytest.warns(UserWarning, match="WCR: the step is"):
        optimizer.step()


def test_in_a_fused_optimizer(backend, net):
    twin = copy.deepcopy(net)
    ours = [wcr_fast.HoyerSquare(net, 1e-3), wcr_fast.L1(net, 1e-3, exclude="conv"), wcr_fast.L2(net, 1e-2)]
    theirs = [wcr_fast.HoyerSquare(twin, 1e-3), wcr_fast.L1(twin, 1e-3, exclude="conv"), wcr_fast.L2(twin, 1e-2)]
    first = SGD(net.parameters(), lr=0.05, momentum=0.9, penalty=sum(ours))
    second = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        for model, optimizer in ((net, first), (twin, second)):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(p.device)
            if optimizer is second:
                sum(reg() for reg in theirs).backward()
        if step == 3:
            value = first.step(lambda: torch.zeros(()))
            assert value.item() == pytest.approx(sum(reg().item() for reg in theirs), rel=1e-4)
            second.step()
        else:
            first.step()
            second.step()
        if step == 1:
            ours[1].lam = theirs[1].lam = 1e-2
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_l2_in_a_step_is_weight_decay(backend, device):
    weights = [torch.randn(30, 20, device=device).requires_grad_() for _ in range(2)]
    twins = [w.detach().clone().requires_grad_() for w in weights]
    ours = SGD(weights, lr=0.1, momentum=0.9, penalty="l2", lam=0.3)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=0.3)
    for _ in range(3):
        for params, optimizer in ((weights, ours), (twins, theirs)):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    for a, b in zip(weights, twins, strict=True):
        torch.testing.assert_close(a, b)


def test_var_is_the_first_name_of_wcr():
    assert wcr_fast.VAR is wcr_fast.WCR


def test_what_a_fused_optimizer_does_not_take(net):
    with pytest.raises(ValueError, match=r"differ in r.*attach it to the SGD"):
        SGD(net.parameters(), lr=0.1, penalty=wcr_fast.WCR(net) + wcr_fast.L1(net))


def test_inside_a_compiled_step(net):
    penalty = wcr_fast.WCR(net, 1e-3) + wcr_fast.L1(net.fc, 1e-2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return net.fc(x).square().mean() + penalty()

    x = torch.randn(2, 6)
    step(x).backward()
    got = net.fc.weight.grad.clone()
    net.zero_grad()
    (net.fc(x).square().mean() + penalty()).backward()
    torch.testing.assert_close(got, net.fc.weight.grad)


def test_one_launch_for_the_moments_and_one_for_the_gradient(net, monkeypatch):
    pytest.importorskip("triton")
    from wcr_fast.kernels import joint, moments

    launched = []
    for module in (joint, moments):
        ordinary = module.launch
        monkeypatch.setattr(
            module, "launch", lambda kernel, *a, ordinary=ordinary: (launched.append(kernel), ordinary(kernel, *a))
        )
    if next(net.parameters()).device.type == "cpu":
        with wcr_fast.backend("triton"):
            penalty = wcr_fast.WCR(net, 1e-3) + wcr_fast.L1(net, 1e-2) + wcr_fast.HoyerSquare(net.fc, 1e-2)
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            for _ in range(2):
                launched.clear()
                penalty.add_grad_()
                assert launched == [joint._joint_moments_kernel, joint._joint_gradient_kernel]
            launched.clear()
            penalty().backward()
            assert launched == [joint._joint_moments_kernel, joint._joint_gradient_kernel]
