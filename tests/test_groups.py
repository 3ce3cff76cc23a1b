"""Group lasso and group Hoyer-Square: values, gradients, groups of every layout, and exact zeros."""

import copy
import pickle

import pytest
import reference
import torch
from torch import nn

import wcr_fast

KINDS = {
    "lasso filters": (wcr_fast.GroupLasso, {}),
    "lasso inputs, weighted": (wcr_fast.GroupLasso, {"groups": "inputs", "weighted": True}),
    "lasso both": (wcr_fast.GroupLasso, {"groups": "both"}),
    "hoyer": (wcr_fast.GroupHoyerSquare, {}),
    "hoyer inputs": (wcr_fast.GroupHoyerSquare, {"groups": "inputs"}),
}


class Conv1D(nn.Module):  # as transformers has it: [inputs, outputs]
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(70, 40)
        self.conv = nn.Conv2d(3, 6, 3)
        self.wide = nn.Conv2d(5, 4, 3).to(memory_format=torch.channels_last)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.stored_transposed = Conv1D()


@pytest.fixture
def net(device):
    return Net().to(device)


def members_of(name, w):
    """The groups of a weight of ``Net``, as lists of tensors: filters, inputs."""
    if name.startswith("up"):
        halves = w[:3], w[3:]  # two inputs-and-outputs parts, 2 outputs each
        return [h[:, j] for h in halves for j in range(2)], list(w)
    if name.startswith("stored"):
        return list(w.unbind(1)), list(w)
    return list(w), list(w.unbind(1))


def wanted(name, w, kind):
    """psi of one float64 weight."""
    cls, options = KINDS[kind]
    filters, inputs = members_of(name, w)
    chosen = {"filters": [filters], "inputs": [inputs], "both": [filters, inputs]}
    lasso = cls is wcr_fast.GroupLasso
    lists = chosen[options.get("groups", "filters" if lasso else "both")]
    norms = [[torch.linalg.vector_norm(g) for g in groups] for groups in lists]
    if lasso:
        scale = [g[0].numel() ** 0.5 if options.get("weighted") else 1.0 for g in lists]
        return sum(s * n for s, group in zip(scale, norms, strict=True) for n in group)
    return sum(sum(group) ** 2 for group in norms) / (w * w).sum()


def psi_and_grads(weights, kind):
    xs = {n: w.detach().double().cpu().requires_grad_() for n, w in weights.items()}
    psi = sum(wanted(n, x, kind) for n, x in xs.items())
    psi.backward()
    return psi.item(), {n: x.grad for n, x in xs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_match_the_formula(backend, net, kind):
    cls, options = KINDS[kind]
    reg = cls(net, 0.5, **options)
    psi, want = psi_and_grads(reg.weights, kind)
    value = reg()
    assert value.dim() == 0
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(0.5 * psi, rel=1e-6)
    value.backward()
    for n, p in reg.weights.items():
        assert reference.relative_error(p.grad, 0.5 * want[n].to(p.device)) < 2e-6
        p.grad = torch.ones_like(p)
    reg.add_grad_()
    for n, p in reg.weights.items():
        assert reference.relative_error(p.grad, 1 + 0.5 * want[n].to(p.device)) < 2e-6
    assert net.linear.bias.grad is None


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lasso both", torch.bfloat16),
        ("lasso both", torch.float64),
        ("hoyer", torch.float16),
        ("hoyer", torch.float32),
    ],
)
def test_every_kind_of_tensor(backend, device, kind, dtype):
    cls, options = KINDS[kind]
    weights = {
        "many long": torch.randn(3, 5, 900, device=device),
        "many short": torch.randn(1_030, 17, device=device),
        "misaligned": torch.randn(40 * 30 + 1, device=device)[1:].view(40, 30),
        "gaps": torch.randn(20, 60, device=device)[:, ::2],
        "one": torch.randn(1, 1, device=device),
        "empty": torch.randn(0, 3, device=device),
        "column": torch.randn(50, 1, device=device),
        "row": torch.randn(1, 50, device=device),
        "cube": torch.randn(4, 5, 6, device=device).permute(2, 0, 1),
    }
    weights = {n: w.to(dtype) if n != "gaps" else w.to(dtype).contiguous() for n, w in weights.items()}
    weights["gaps"] = weights["gaps"].repeat_interleave(2, 1)[:, ::2]
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    reg = cls(leaves.items(), 1.0, **options)
    assert list(reg.weights) == [n for n in weights if n != "empty"]
    psi, want = psi_and_grads(reg.weights, kind)
    assert reg().item() == pytest.approx(psi, rel=1e-5)
    reg.add_grad_()
    bound = 2 * torch.finfo(dtype).eps + (1e-6 if dtype == torch.float32 else 0.0)
    for n, p in reg.weights.items():
        error = (p.grad.double() - want[n].to(p.device)).abs().max()
        # a factor is rounded, and may be next to nothing against its terms, of the size of 1 / |w|
        assert error <= bound * (want[n].abs().max() + 1 / p.abs().max()), n
    first = [p.grad for p in reg.weights.values()]
    for p in reg.weights.values():
        p.grad = None
    reg.add_grad_()
    assert all(torch.equal(g, p.grad) for g, p in zip(first, reg.weights.values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    cls, options = KINDS[kind]
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: cls([w], 1.0, **options)(), [w])


def test_zero_groups_and_tensors(backend, device):
    w = torch.randn(4, 6, device=device)
    w[1], w[:, 2] = 0.0, 0.0
    weights = [w.requires_grad_(), torch.zeros(3, 5, device=device).requires_grad_()]
    for cls, options in KINDS.values():
        reg = cls(weights, 1.0, **options)
        reg().backward()
        reg.add_grad_()
        for p in weights:
            assert torch.isfinite(p.grad).all()
            assert torch.count_nonzero(p.grad[p == 0]) == 0
            p.grad = None
        assert torch.isfinite(reg())


def test_special_cases(backend, device):
    w = torch.randn(30, 1, device=device)
    lam = 1.0
    assert wcr_fast.GroupLasso([w], lam)().item() == pytest.approx(wcr_fast.L1([w], lam)().item(), rel=1e-6)
    hoyer = wcr_fast.HoyerSquare([w], lam)().item()
    assert wcr_fast.GroupHoyerSquare([w], lam, groups="filters")().item() == pytest.approx(hoyer, rel=1e-6)
    norm = torch.linalg.vector_norm(w).item()
    assert wcr_fast.GroupLasso([w], lam, groups="inputs")().item() == pytest.approx(norm, rel=1e-6)
    square = torch.randn(12, 9, device=device)
    value = wcr_fast.GroupHoyerSquare([square], lam)().item()
    assert 2 <= value <= 12 + 9
    assert wcr_fast.GroupHoyerSquare([square * -3.0], lam)().item() == pytest.approx(value, rel=1e-6)
    assert wcr_fast.GroupHoyerSquare([torch.full((12, 9), 0.3, device=device)], lam)().item() == pytest.approx(21)


def test_hoyer_leaves_the_length_alone(backend, device):
    w = torch.randn(12, 9, device=device).requires_grad_()
    wcr_fast.GroupHoyerSquare([w], 1.0).add_grad_()
    assert abs((w * w.grad).sum().item()) < 1e-5 * (w.norm() * w.grad.norm()).item()


@pytest.mark.parametrize("groups", ["filters", "inputs"])
@pytest.mark.parametrize("weighted", [False, True])
def test_proximal(backend, net, groups, weighted):
    reg = wcr_fast.GroupLasso(net, 0.5, groups=groups, weighted=weighted, mode="proximal")
    lr = 0.4 if weighted else 3.0
    before = {n: p.detach().double().cpu() for n, p in reg.weights.items()}
    version = net.conv.weight._version
    reg.shrink_(lr)
    assert net.conv.weight._version > version
    seen = set()
    for n, p in reg.weights.items():
        for list_of in (0, 1):
            if (groups == "filters") != (list_of == 0):
                continue
            pairs = zip(members_of(n, before[n])[list_of], members_of(n, p.detach().cpu())[list_of], strict=True)
            for old, new in pairs:
                t = lr * 0.5 * (old.numel() ** 0.5 if weighted else 1.0)
                factor = max(0.0, 1.0 - t / torch.linalg.vector_norm(old).item())
                seen.add(factor > 0)
                torch.testing.assert_close(new.double(), factor * old, rtol=1e-5, atol=1e-7)
                if factor == 0:
                    assert not new.signbit().any()
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["sgd", "fused", "ours"])
def test_proximal_attached(backend, device, name):
    net = nn.Linear(6, 4).to(device)
    twin = copy.deepcopy(net)
    kinds = {
        "sgd": torch.optim.SGD,
        "fused": lambda p, lr: torch.optim.SGD(p, lr, fused=True),
        "ours": wcr_fast.optim.SGD,
    }
    first, second = kinds[name](net.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    wcr_fast.GroupLasso(net, torch.tensor(2.0), mode="proximal").attach(first)
    for model, optimizer in ((net, first), (twin, second)):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    wcr_fast.GroupLasso(twin, 2.0, mode="proximal").shrink_(torch.tensor(0.1))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    if name == "fused":
        kept = [p.detach().clone() for p in net.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(net(torch.ones(1, 6)).sum() * float("inf")).backward()
        scaler.step(first)
        assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))


def test_in_a_sum_and_attached(backend, net):
    penalty = wcr_fast.WCR(net, 1e-4) + wcr_fast.GroupLasso(net.conv, 1e-2) + wcr_fast.L1(net, 1e-3)
    assert "GroupLasso(lam=0.01, groups=filters)" in repr(penalty)
    penalty().backward()
    want = [p.grad for p in penalty.weights.values()]
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    penalty.attach(optimizer)
    loss = optimizer.step(lambda: torch.zeros(()))
    assert loss.item() == pytest.approx(penalty().item(), rel=1e-5)
    for g, p in zip(want, penalty.weights.values(), strict=True):
        assert reference.relative_error(p.grad, g) < 2e-6
    with pytest.raises(TypeError, match=r"takes the moments family only, not GroupLasso.*attach it"):
        wcr_fast.optim.SGD(net.parameters(), lr=0.1, penalty=penalty)


def test_gradients_of_another_layout_and_dtype(backend, device):
    w = torch.randn(4, 6, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    reg = wcr_fast.GroupHoyerSquare([w], 1.0)
    reg.add_grad_()
    want, w.grad = w.grad, torch.zeros(4, 6, 3, 3, device=device)
    assert want.stride() == w.stride() != w.grad.stride()
    reg.add_grad_()
    assert torch.equal(w.grad, want)


def test_frozen_replaced_copied_and_off(backend, net):
    reg = wcr_fast.GroupHoyerSquare(net, 1.0)
    assert pickle.loads(pickle.dumps(reg))().item() == pytest.approx(reg().item())
    net.conv.weight.requires_grad_(False)
    net.linear.weight = nn.Parameter(net.linear.weight.detach() * 2)
    reg.add_grad_()
    assert net.conv.weight.grad is None
    assert net.linear.weight.grad is not None
    net.zero_grad()
    reg.lam = 0.0
    reg.add_grad_()
    assert reg().item() == 0.0
    assert net.linear.weight.grad is None
    norms = reg.norms()["up.weight"]
    assert [len(n) for n in norms] == [4, 6]
    assert norms[0][3].item() == pytest.approx(net.up.weight[3:, 1].norm().item())


def test_nan_shows(backend, device):
    w = torch.randn(4, 4, device=device)
    w[1, 1] = float("nan")
    assert wcr_fast.GroupLasso([w])().isnan()
    assert wcr_fast.GroupHoyerSquare([w])().isnan()


def test_inside_a_compiled_step(net):
    penalty = wcr_fast.GroupHoyerSquare(net, 1e-2) + wcr_fast.GroupLasso(net, 1e-2, groups="both", weighted=True)
    with torch.no_grad():
        net.linear.weight[3] = 0.0

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step():
        return penalty()

    value = step()
    assert value.item() == pytest.approx(penalty().item(), rel=1e-6)
    value.backward()
    got = [p.grad.clone() for p in penalty.weights.values()]
    net.zero_grad()
    penalty().backward()
    for g, p in zip(got, penalty.weights.values(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_errors(net):
    with pytest.raises(ValueError, match="groups must be one of filters, inputs, both, got 'rows'"):
        wcr_fast.GroupLasso(net, groups="rows")
    with pytest.raises(ValueError, match="mode must be one of loss, proximal, got 'decoupled'"):
        wcr_fast.GroupLasso(net, mode="decoupled")
    with pytest.raises(ValueError, match="one kind of groups"):
        wcr_fast.GroupLasso(net, mode="proximal", groups="both")
    with pytest.raises(ValueError, match="share memory"):
        wcr_fast.GroupLasso([torch.ones(3, 1).expand(3, 4)], mode="proximal")
    with pytest.raises(ValueError, match="acts on weights"):
        wcr_fast.GroupLasso(net, mode="proximal").add_grad_()
    with pytest.raises(ValueError, match="no weight to penalise"):
        wcr_fast.GroupHoyerSquare(nn.LayerNorm(5))
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="GroupLasso: the gradient of weight is sparse"):
        wcr_fast.GroupLasso(model).add_grad_()
