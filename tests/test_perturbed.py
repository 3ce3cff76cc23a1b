"""SAM, ASAM, CrAM, CrAM+ and S2SAM: against their formulas in float64, and what all of them promise."""

import copy

import pytest
import reference_perturbed as reference
import torch
from torch import nn

import wcr_fast
from wcr_fast.optim import ASAM, S2SAM, SAM, CrAM, CrAMPlus

TWO_PASS = {
    "sam": lambda model, *args, **kw: SAM(model, *args, rho=0.1, **kw),
    "asam": lambda model, *args, **kw: ASAM(model, *args, rho=0.7, **kw),
    "cram": lambda model, *args, **kw: CrAM(model, *args, rho=0.3, sparsities=[0.4, 0.6], **kw),
    "cram+": lambda model, *args, **kw: CrAMPlus(model, *args, rho=0.3, sparsities=[0.4, "2:4"], **kw),
}
ALL = {**TWO_PASS, "s2sam": lambda model, *args, **kw: S2SAM(model, *args, rho=0.1, **kw)}
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
    "ours": (wcr_fast.optim.SGD, {"lr": 0.1, "momentum": 0.9, "penalty": "l1", "lam": 1e-3}),
}


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


def batch(dtype=torch.float64, n=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator, dtype=torch.float64).to(dtype), torch.randint(
        4, (n,), generator=generator
    )


def loss_on(x, y):
    return lambda model: nn.functional.cross_entropy(model(x).float() if x.dtype.itemsize < 4 else model(x), y)


def closure_of(model, optimizer, loss_of, zero=True):
    def closure():
        if zero:
            optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


def step(model, optimizer, loss_of):
    optimizer.zero_grad()
    return optimizer.step(closure_of(model, optimizer, loss_of))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(reference.values(first), reference.values(second), strict=True))


def close(first, second, bound=1e-12):
    pairs = zip(reference.values(first), reference.values(second), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs) <= bound


# --- formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [None, "weights", "all"])
def test_sam_and_asam_by_their_formulas(base, adaptive):
    kind, options = BASES[base]
    mine, other = net(), net()
    if adaptive is None:
        optimizer = SAM(mine, kind, rho=0.1, **options)
    else:
        optimizer = ASAM(mine, kind, rho=0.7, eta=0.02, adaptive=adaptive, **options)
    plain = kind(other.parameters(), **options)
    for k in range(4):
        loss_of = loss_on(*batch(seed=k))
        loss = step(mine, optimizer, loss_of)
        w, g = reference.values(other), reference.gradients(other, loss_of)
        assert torch.allclose(loss, loss_of(other))
        point = reference.sam_point(w, g, 0.1)
        if adaptive is not None:
            point = reference.asam_point(w, g, 0.7, 0.02, adaptive == "all")
        reference.descend(plain, other, reference.gradients(other, loss_of, point))
    assert close(mine, other)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("kind", [CrAM, CrAMPlus])
def test_cram_by_its_formula(kind, sparse_grad, scope):
    mine, other = net(), net()
    optimizer = kind(
        mine, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.2, sparsities=0.55, sparse_grad=sparse_grad, scope=scope
    )
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for k in range(4):
        loss_of = loss_on(*batch(seed=k))
        step(mine, optimizer, loss_of)
        grads = reference.cram_gradient(
            other, loss_of, 0.2, 0.55, plus=kind is CrAMPlus, sparse_grad=sparse_grad, scope=scope
        )
        reference.descend(plain, other, grads)
    assert close(mine, other)


def test_cram_normalised():
    mine, other = net(), net()
    optimizer = CrAM(mine, torch.optim.SGD, lr=0.1, rho=0.2, sparsities=0.5, normalise=True)
    loss_of = loss_on(*batch())
    step(mine, optimizer, loss_of)
    g = reference.gradients(other, loss_of)
    grads = reference.cram_gradient(
        other, loss_of, 0.2 / (reference.norm(g).item() + 1e-12), 0.5, plus=False, sparse_grad=True
    )
    reference.descend(torch.optim.SGD(other.parameters(), lr=0.1), other, grads)
    assert close(mine, other)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_s2sam_by_hand(set_to_none):
    """The second gradient is that at w1 + rho g0 / ||g0||, and not SGD's."""
    mine, other, third = net(), net(), net()
    optimizer = S2SAM(mine, torch.optim.SGD, lr=0.1, rho=0.3)
    plain, sgd = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (other, third))
    h = None
    for k in range(3):
        loss_of = loss_on(*batch(seed=k))

        def closure(loss_of=loss_of):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = loss_of(mine)
            loss.backward()
            return loss

        optimizer.step(closure)
        point = None if h is None else reference.sam_point(reference.values(other), h, 0.3)
        h = reference.gradients(other, loss_of, point)
        reference.descend(plain, other, h)
        reference.descend(sgd, third, reference.gradients(third, loss_of))
        assert close(mine, other)
        assert close(mine, third) == (k == 0)


# --- invariants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SAM, ASAM, CrAM, S2SAM])
def test_without_radius_and_sparsity_it_is_the_base_optimizer(kind, dtype, base):
    cls, options = BASES[base]
    mine, other = net(dtype), net(dtype)
    extra = {"sparsities": 0.0} if kind is CrAM else {}
    optimizer, plain = kind(mine, cls, rho=0.0, **extra, **options), cls(other.parameters(), **options)
    for k in range(5):
        loss_of = loss_on(*batch(dtype, seed=k))
        step(mine, optimizer, loss_of)
        step(other, plain, loss_of)
    assert same(mine, other)


def test_cram_plus_without_both_is_the_base_at_twice_the_rate():
    mine, other = net(), net()
    optimizer = CrAMPlus(mine, torch.optim.SGD, lr=0.1, rho=0.0, sparsities=[0.0])
    plain = torch.optim.SGD(other.parameters(), lr=0.2)
    for k in range(3):
        step(mine, optimizer, loss_on(*batch(seed=k)))
        step(other, plain, loss_on(*batch(seed=k)))
    assert same(mine, other)


class Everything(nn.Module):
    """Dropout and all kinds of statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 6, 3)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6, momentum=None)
        self.third = nn.InstanceNorm2d(6, track_running_stats=True)
        self.synced = nn.SyncBatchNorm(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6 * 36, 4)
        self.flat = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.synced(self.third(self.second(self.first(self.conv(x.unflatten(1, (8, 8)).unsqueeze(1))))))
        return self.flat(self.last(self.drop(x.flatten(1))))


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 64, generator=generator), torch.randint(4, (16,), generator=generator)


@pytest.mark.parametrize("kind", [SAM, ASAM, CrAM])
def test_without_radius_dropout_and_statistics_are_the_base_optimizers(kind):
    mine, other = Everything(), Everything()
    extra = {"sparsities": 0.0} if kind is CrAM else {}
    optimizer = kind(mine, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.0, **extra)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for model, opt in ((mine, optimizer), (other, plain)):
        torch.manual_seed(5)
        for k in range(3):
            step(model, opt, loss_on(*images(k)))
    assert same(mine, other)
    for (name, a), (_, b) in zip(mine.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", TWO_PASS)
def test_statistics_are_of_the_first_pass_only(name):
    model, probe = Everything(), Everything()
    optimizer = TWO_PASS[name](model, torch.optim.SGD, lr=0.1)
    torch.manual_seed(5)
    step(model, optimizer, loss_on(*images(0)))
    torch.manual_seed(5)
    loss_on(*images(0))(probe)
    for (name, a), (_, b) in zip(model.named_buffers(), probe.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_statistics_in_the_two_step_form_and_layers_that_are_not_tracked():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    frozen = nn.Sequential(model, nn.BatchNorm1d(4).eval())
    optimizer = SAM(frozen.parameters(), torch.optim.SGD, lr=0.1, model=frozen)
    x, y = batch(torch.float32)
    loss_on(x, y)(frozen).backward()
    seen = model[1].running_mean.clone()
    optimizer.first_step(zero_grad=True)
    assert not model[1].track_running_stats
    loss_on(x, y)(frozen).backward()
    optimizer.second_step()
    assert torch.equal(model[1].running_mean, seen)
    assert model[1].num_batches_tracked == 1
    assert [m.track_running_stats for m in (model[1], model[2], frozen[1])] == [True, False, True]
    assert set(frozen.state_dict()) == set(copy.deepcopy(frozen).state_dict())


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("kind", [SAM, ASAM])
def test_the_distance_is_the_radius_whatever_the_scale(kind, scale):
    model = net(torch.float32)
    optimizer = kind(model, torch.optim.SGD, lr=0.1, rho=0.25)
    (loss_on(*batch(torch.float32))(model) * scale).backward()
    w = reference.values(model)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    e = [b.double() - a.double() for a, b in zip(w, reference.values(model), strict=True)]
    t = [a.double().abs() + 0.01 if kind is ASAM and a.dim() > 1 else torch.ones_like(a.double()) for a in w]
    assert abs(reference.norm([a / b for a, b in zip(e, t, strict=True)]).item() - 0.25) < 1e-6
    along = [b * b * g.double() for b, g in zip(t, grads, strict=True)]
    cosine = sum((a * b).sum() for a, b in zip(e, along, strict=True)) / (reference.norm(e) * reference.norm(along))
    assert cosine > 1 - 1e-6
    optimizer.restore()
    assert all(torch.equal(a, b) for a, b in zip(w, reference.values(model), strict=True))


def test_crams_way_is_in_proportion_to_the_gradient():
    ways = []
    for scale in (1.0, 4.0):
        model = net()
        optimizer = CrAM(model, torch.optim.SGD, lr=0.1, rho=0.25, sparsities=0.0)
        (loss_on(*batch())(model) * scale).backward()
        w = reference.values(model)
        optimizer.first_step()
        ways.append([b - a for a, b in zip(w, reference.values(model), strict=True)])
    assert all(torch.allclose(4.0 * a, b) for a, b in zip(*ways, strict=True))


def test_asam_does_not_see_the_scale_of_weights():
    """With eta = 0, w -> a w and g -> g / a gives e -> a e; zero weights don't move."""
    moved = []
    for a in (1.0, 8.0):
        w = nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 0.5]], dtype=torch.float64) * a)
        optimizer = ASAM([w], torch.optim.SGD, lr=0.1, eta=0.0)
        w.grad = torch.tensor([[0.3, 1.0], [2.0, -1.0]], dtype=torch.float64) / a
        before = w.detach().clone()
        optimizer.first_step()
        moved.append((w.detach() - before) / a)
    assert torch.allclose(*moved)
    assert moved[0][1, 0] == 0.0


def test_a_quadratic():
    """L = w'Aw / 2: the gradient is A (w + rho A w / ||A w||)."""
    a = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    w = nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    optimizer = SAM([w], torch.optim.SGD, lr=0.1, rho=0.2)
    expected = w.detach() - 0.1 * a @ (w.detach() + 0.2 * (a @ w.detach()) / (a @ w.detach()).norm())

    def closure():
        loss = w @ a @ w / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(w.detach(), expected, rtol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_zero_gradients_stay_finite(name):
    model = net()
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        step(model, optimizer, lambda m: 0.0 * loss_on(*batch())(m))
    assert same(model, net())


@pytest.mark.parametrize("name", ALL)
def test_restored_before_the_base_steps_and_addresses_stay(name):
    model = net(torch.float32)
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    seen = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append(reference.values(model)))
    places = [p.data_ptr() for p in model.parameters()]
    for k in range(3):
        before = reference.values(model)
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
        assert all(torch.equal(a, b) for a, b in zip(before, seen[-1], strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("sparsity", [0.3, 0.9, "2:4", "1:4"])
def test_the_second_pass_sees_exactly_so_many_zeros(sparsity):
    model = net(torch.float32)
    optimizer = CrAM(model, torch.optim.SGD, lr=0.1, sparsities=sparsity, rho=0.1)
    zeros = []

    def closure():
        optimizer.zero_grad()
        zeros.append([int((p == 0).sum()) for p in model.parameters()])
        loss = loss_on(*batch(torch.float32))(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    kept = {"2:4": 0.5, "1:4": 0.75}.get(sparsity, sparsity)
    assert zeros[0] == [0, 0, 0, 0]
    assert zeros[1][0] + zeros[1][2] == round(kept * (8 * 12 + 12 * 4))
    assert zeros[1][1] == zeros[1][3] == 0


def test_crams_threshold_does_not_depend_on_groups():
    found = []
    for grouped in (False, True):
        model = net()
        with torch.no_grad():
            model[2].weight.mul_(0.01)
        groups = [{"params": [p]} for p in model.parameters()] if grouped else model.parameters()
        optimizer = CrAM(groups, torch.optim.SGD, lr=0.1, sparsities=0.5)
        step(model, optimizer, loss_on(*batch()))
        found.append(model)
    assert same(*found)


def test_cram_leaves_dense_what_it_is_told_to():
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4), nn.LayerNorm((4,)))
    optimizer = CrAM(model, torch.optim.SGD, lr=0.1, sparsities=0.9, dense="2", rho=0.01)
    loss_on(*batch(torch.float32))(model).backward()
    optimizer.first_step()
    assert int((model[0].weight == 0).sum()) == round(0.9 * 96)
    assert not (model[2].weight == 0).any()
    assert [w.name for w in optimizer._weights] == ["0.weight"]


def test_cram_draws_by_seed_and_step():
    def drawn(**options):
        optimizer = CrAM(net(), torch.optim.SGD, lr=0.1, sparsities=[0.1, 0.2, 0.3, "2:4"], **options)
        return [optimizer._draw() for _ in range(400)]

    first = drawn()
    assert first == drawn()
    assert first != drawn(seed=1)
    assert all(70 < first.count(s) < 130 for s in (0.1, 0.2, 0.3, "2:4"))


@pytest.mark.parametrize("name", ["sam", "asam", "s2sam"])
def test_zeros_are_kept_where_asked(name):
    model = net(torch.float32)
    wcr_fast.prune_(model, 0.5)
    zeros = [p == 0 for p in model.parameters()]
    kind = {"sam": SAM, "asam": ASAM, "s2sam": S2SAM}[name]
    optimizer = kind(model, torch.optim.SGD, lr=0.1, keep_zeros=True)
    loss_of = loss_on(*batch(torch.float32))
    for _ in range(2):

        def closure():
            optimizer.zero_grad()
            if optimizer.perturbed:
                moved = [p.detach() for p in model.parameters() if p.dim() > 1]
                assert all((w[z] == 0).all() for w, z in zip(moved, [z for z in zeros if z.dim() > 1], strict=True))
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            for p, z in zip(model.parameters(), zeros, strict=True):
                p[z] = 0.0
