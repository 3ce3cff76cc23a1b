"""attach: the same training as with the penalty in the loss, under everything an optimizer step can meet."""

import copy

import pytest
import torch
from torch import nn

import wcr_fast


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def loss_of(model):
    x, y = data()
    return (model(x) - y).square().mean()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def train(optimizer_name, mode, steps=8, scaler=None):
    """Train the small net with the penalty in the loss, by add_grad_ or attached; return its weights."""
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    wcr = wcr_fast.WCR(model, lam=1e-5)
    if mode == "attach":
        wcr.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        if mode == "loss":
            loss = loss + wcr()
        if scaler is None:
            loss.backward()
            if mode == "add_grad":
                wcr.add_grad_()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_ways_train_alike(name):
    plain = train(name, "none")
    in_loss = train(name, "loss")
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(plain, in_loss, strict=True))
    for mode in ("add_grad", "attach"):
        for a, b in zip(in_loss, train(name, mode), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "sgd_fused", "adamw", "adamw_fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_of_both_kinds(name, unscale):
    want = train(name, "loss")
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    wcr_fast.WCR(model, lam=1e-5).attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(want, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "sgd_fused"])
def test_overflow_skips_the_step(name):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    wcr_fast.WCR(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    (scaler.scale(loss_of(model)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("keyword", [False, True])
def test_closure(keyword):
    models = make(), make()
    optimizers = [torch.optim.LBFGS(m.parameters(), max_iter=5) for m in models]
    losses = []
    for model, optimizer, attached in zip(models, optimizers, (False, True), strict=True):
        wcr = wcr_fast.WCR(model, lam=1e-6)
        if attached:
            wcr.attach(optimizer)

        def closure(model=model, optimizer=optimizer, wcr=wcr, attached=attached):
            optimizer.zero_grad()
            loss = loss_of(model) + (0.0 if attached else wcr())
            loss.backward()
            return loss

        losses.append(optimizer.step(closure=closure) if keyword else optimizer.step(closure))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("result", [None, 1.5])
def test_closure_without_a_tensor(result):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wcr = wcr_fast.WCR(model, lam=1e-3)
    wcr.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss_of(model).backward()
        return result

    got = optimizer.step(closure)
    assert got is None if result is None else got == pytest.approx(1.5 + wcr().item(), rel=1e-5)


def test_several_optimizers_share_one_penalty():
    models = make(), make()
    wcr = wcr_fast.WCR(models[0], lam=1e-5)
    one = torch.optim.SGD(models[0].parameters(), lr=0.1)
    (loss_of(models[0]) + wcr()).backward()
    one.step()
    wcr = wcr_fast.WCR(models[1], lam=1e-5)
    split = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (models[1][0], models[1][2])]
    for optimizer in split:
        wcr.attach(optimizer)
    loss_of(models[1]).backward()
    for optimizer in split:
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_log_concentration_split_over_optimizers_keeps_its_total():
    model = make()
    reg = wcr_fast.LogConcentration(model, lam=1.0)
    reg.add_grad_()
    want = [p.grad.clone() for p in reg.weights.values()]
    model.zero_grad()
    for layer in (model[0], model[2]):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        reg.attach(optimizer)
        optimizer.step()
    for g, p in zip(want, reg.weights.values(), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_two_regularizers_on_one_optimizer():
    models = make(), make()
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    regs = [wcr_fast.WCR(models[0], lam=1e-5), wcr_fast.L1(models[0], lam=1e-3)]
    (loss_of(models[0]) + regs[0]() + regs[1]()).backward()
    optimizer.step()
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.1)
    wcr_fast.WCR(models[1], lam=1e-5).attach(optimizer)
    wcr_fast.L1(models[1], lam=1e-3).attach(optimizer)
    loss_of(models[1]).backward()
    optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_accumulation_adds_once_a_step():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wcr = wcr_fast.WCR(model, lam=1e-4)
    wcr.attach(optimizer)
    for _ in range(4):
        (loss_of(model) / 4).backward()
    before = model[0].weight.grad.clone()
    optimizer.step()
    added = model[0].weight.grad - before
    model.zero_grad()
    wcr.add_grad_()
    torch.testing.assert_close(added, model[0].weight.grad, rtol=1e-4, atol=1e-7)


def test_clipping_before_the_step_leaves_the_penalty_whole():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wcr = wcr_fast.WCR(model, lam=1e-2)
    wcr.attach(optimizer)
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    optimizer.step()
    total = torch.linalg.vector_norm(model[0].weight.grad)
    model.zero_grad()
    wcr.add_grad_()
    assert total.item() == pytest.approx(torch.linalg.vector_norm(model[0].weight.grad).item(), rel=1e-5)


def test_handle_removes_and_is_a_context():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wcr = wcr_fast.WCR(model)
    with wcr.attach(optimizer) as handle:
        with pytest.raises(ValueError, match="attached to this SGD already"):
            wcr.attach(optimizer)
        handle.remove()
        handle.remove()
    model.zero_grad()
    optimizer.step()
    assert model[0].weight.grad is None
    wcr.attach(optimizer)
    optimizer.step()
    assert model[0].weight.grad is not None


def test_wrong_optimizers_are_refused():
    model = make()
    wcr = wcr_fast.WCR(model)
    with pytest.raises(ValueError, match="owns none"):
        wcr.attach(torch.optim.SGD(make(1).parameters(), lr=0.1))
    with pytest.raises(TypeError, match="expected a torch optimizer"):
        wcr.attach("sgd")


def test_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wcr_fast.WCR(model).attach(Wrapper(optimizer))
    optimizer.step()
    assert model[0].weight.grad is not None


def test_parameters_that_join_later():
    model = make()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    wcr_fast.WCR(model).attach(optimizer)
    optimizer.step()
    assert model[2].weight.grad is None
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step()
    assert model[2].weight.grad is not None


def test_optimizer_state_and_copies_are_untouched():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wcr_fast.WCR(model).attach(optimizer)
    loss_of(model).backward()
    optimizer.step()
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}
    copy.deepcopy(optimizer.state_dict())
