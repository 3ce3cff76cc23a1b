"""SAM and its kin where something goes wrong: exceptions, gradients that come and go, bad input."""

import copy

import pytest
import reference_perturbed as reference
import torch
from test_perturbed import ALL, TWO_PASS, Everything, batch, images, loss_on, net, same, step
from torch import nn

from wcr_fast.optim import ASAM, SAM, CrAM, CrAMPlus


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_closure_leaves_the_weights(name, error):
    model = Everything()
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    loss_of = loss_on(*images(0))
    step(model, optimizer, loss_of)
    before = reference.values(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if optimizer.perturbed:
            raise error("oh")
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))
    assert model.first.running_mean is not None
    step(model, optimizer, loss_of)


@pytest.mark.parametrize("where", ["ascend_", "restore_"])
def test_an_interrupt_in_the_middle_leaves_nothing_perturbed(where, monkeypatch):
    """Of weights that go in two parts, the first is perturbed when the second is interrupted."""
    from wcr_fast.torch_path import perturb

    wide = torch.randn(6, 8)
    params = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(wide[:, ::2])]
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1)
    real, calls = getattr(perturb, where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(perturb, where, interrupted)

    def there_and_back():
        optimizer.first_step()
        optimizer.restore()

    with pytest.raises(KeyboardInterrupt):
        there_and_back()
    assert optimizer.perturbed
    optimizer.restore()
    assert not optimizer.perturbed
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_an_error_while_the_step_is_completed_leaves_nothing_perturbed():
    class Late(nn.Module):
        """Its gradient is sparse in the second pass only."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, sparse):
            return nn.functional.embedding(torch.tensor([1, 2]), self.table.weight, sparse=sparse).square().sum()

    model = Late()
    before = reference.values(model)
    optimizer = CrAM(model, torch.optim.SGD, lr=0.1)
    model(False).backward()
    optimizer.first_step(zero_grad=True)
    model(True).backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))


class Branches(nn.Module):
    """Parameters with a gradient in the first pass only, in the second only, and never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.always, self.first, self.second = (nn.Linear(8, 4).double() for _ in range(3))
        self.never, self.frozen = nn.Linear(8, 4).double(), nn.Linear(8, 4).double().requires_grad_(False)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.always(x) + (self.first if self.passes % 2 else self.second)(x) + self.frozen(x)


@pytest.mark.parametrize("name", TWO_PASS)
def test_gradients_in_one_pass_only(name):
    model = Branches()
    optimizer = TWO_PASS[name](model, torch.optim.SGD, lr=0.1)
    before = copy.deepcopy(model)
    step(model, optimizer, loss_on(*batch()))
    assert torch.equal(model.never.weight, before.never.weight)
    assert torch.equal(model.frozen.weight, before.frozen.weight)
    assert torch.equal(model.first.weight, before.first.weight) == (name != "cram+")
    assert not torch.equal(model.second.weight, before.second.weight)
    assert not torch.equal(model.always.weight, before.always.weight)


def test_cram_plus_steps_by_the_first_gradient_where_there_is_no_second():
    model = Branches()
    optimizer = CrAMPlus(model, torch.optim.SGD, lr=0.1, sparsities=0.5)
    probe = copy.deepcopy(model)
    loss_on(*batch())(probe).backward()
    step(model, optimizer, loss_on(*batch()))
    assert torch.allclose(model.first.weight, probe.first.weight - 0.1 * probe.first.weight.grad, rtol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_at_all(name):
    model = net()
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    optimizer.step(lambda: None)
    optimizer.first_step()
    optimizer.second_step()
    assert same(model, net())


def test_tied_weights_move_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    optimizer = SAM(model, torch.optim.SGD, lr=0.1, rho=0.3)
    loss_on(*batch())(model).backward()
    before = reference.values(model)
    g = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step()
    point = reference.sam_point(before, g, 0.3)
    assert all(torch.allclose(a, b) for a, b in zip(point, reference.values(model), strict=True))


@pytest.mark.parametrize("name", ["sam", "s2sam"])
def test_wrong_order(name):
    model = net()
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="perturbed already"):
        optimizer.first_step()
    optimizer.second_step()
    if name == "sam":
        with pytest.raises(RuntimeError, match="without first_step"):
            optimizer.second_step()
        with pytest.raises(RuntimeError, match=r"needs a closure.*S2SAM"):
            optimizer.step()


class FullyShardedDataParallel(nn.Linear):
    """Stands for FSDP1's wrapper, which is known by its name."""

    def __init__(self):
        super().__init__(2, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: SAM(m.parameters(), lr=0.1), TypeError, "base_optimizer must be a class"),
        (lambda m: SAM(m.parameters(), "sgd", lr=0.1), TypeError, "base_optimizer must be a class"),
        (lambda m: SAM(torch.optim.SGD(m.parameters()), lr=0.1), TypeError, "built already, it takes no lr"),
        (lambda m: SAM(SAM(m, torch.optim.SGD)), TypeError, "can't be wrapped"),
        (lambda m: SAM(m, torch.optim.LBFGS), TypeError, "evaluates the model itself"),
        (lambda m: SAM(m, torch.optim.Adadelta, lr=1.0), ValueError, "an option 'rho' of its own"),
        (lambda m: SAM([torch.zeros(2, dtype=torch.complex64)], torch.optim.SGD), TypeError, "real numbers"),
        (lambda m: SAM(FullyShardedDataParallel(), torch.optim.SGD, lr=0.1), TypeError, "use FSDP2"),
        (lambda m: SAM(m, torch.optim.SGD, rho=-1), ValueError, "rho must be a finite number"),
        (lambda m: SAM([{"params": m.parameters(), "rho": float("nan")}], torch.optim.SGD), ValueError, "rho must"),
        (lambda m: ASAM(m, torch.optim.SGD, eta=-0.1), ValueError, "eta must be a finite number"),
        (lambda m: ASAM(m, torch.optim.SGD, adaptive="some"), ValueError, "adaptive must be"),
        (lambda m: CrAM(m, torch.optim.SGD, sparsities=[]), ValueError, "sparsities is empty"),
        (lambda m: CrAM(m, torch.optim.SGD, sparsities=1.0), ValueError, "nothing left"),
        (lambda m: CrAM(m, torch.optim.SGD, sparsities=[1.5]), ValueError, r"must lie in \[0, 1\]"),
        (lambda m: CrAM(m, torch.optim.SGD, sparsities="4:2"), ValueError, "n:m"),
        (lambda m: CrAM(m, torch.optim.SGD, sparsities="layer"), ValueError, "numbers and n:m"),
        (lambda m: CrAM(m, torch.optim.SGD, scope="2:4"), ValueError, "scope must be one of"),
        (lambda m: CrAM(m, torch.optim.SGD, dense="none.such"), ValueError, "matches no parameter"),
        (lambda m: CrAM(m.parameters(), torch.optim.SGD, dense="0"), ValueError, "give model="),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make(net())


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True))
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"SAM: .*sparse"):
        optimizer.step(lambda: model(torch.tensor([1])).sum().backward())
