"""SAM and its kin in training loops: scalers, accumulation, checkpoints, schedulers, regularizers."""

import copy
import pickle
import warnings
import weakref

import pytest
import reference_perturbed as reference
import torch
from conftest import CUDA, needs_triton
from test_perturbed import ALL, BASES, TWO_PASS, batch, close, closure_of, loss_on, net, same, step
from torch import nn

import wcr_fast
from wcr_fast.optim import S2SAM, SAM, CrAM

DEVICE = "cuda" if CUDA else "cpu"


# --- mixed precision -------------------------------------------------------------------------------------------


def amp_step(model, optimizer, x, y, dtype, scaler=None, spoil=None):
    """One step under autocast; spoil: in which pass a gradient becomes inf."""
    passes = 0

    def closure():
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if passes == spoil:
            next(model.parameters()).grad[0, 0] = float("inf")
        return loss

    loss = optimizer.step(closure) if scaler is None else optimizer.step(closure, scaler=scaler)
    if scaler is not None:
        scaler.update()
    return loss.item()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scaled", [False, True])
def test_lowers_a_loss_under_autocast(name, scaled):
    model = net(torch.float32).to(DEVICE)
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.05, momentum=0.9)
    x, y = (t.to(DEVICE) for t in batch(torch.float32))
    scaler = torch.amp.GradScaler(DEVICE) if scaled else None
    dtype = torch.float16 if scaled else torch.bfloat16
    losses = [amp_step(model, optimizer, x, y, dtype, scaler) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_second_pass_sees_the_perturbation_inside_of_one_autocast():
    model = net(torch.float32)
    optimizer = SAM(model, torch.optim.SGD, lr=0.1, rho=5.0)
    x, y = batch(torch.float32)
    outputs = []

    def closure():
        optimizer.zero_grad()
        outputs.append(model(x))
        loss = nn.functional.cross_entropy(outputs[-1], y)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        after = model(x)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], after)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoil", [1, 2])
@pytest.mark.parametrize("name", TWO_PASS)
def test_an_overflow_in_either_pass_skips_the_step(name, spoil, fused):
    model = net(torch.float32).to(DEVICE)
    optimizer = TWO_PASS[name](model, torch.optim.AdamW, lr=0.1, fused=fused)
    x, y = (t.to(DEVICE) for t in batch(torch.float32))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    amp_step(model, optimizer, x, y, torch.float16, scaler)
    before, state = reference.values(model), copy.deepcopy(optimizer.base_optimizer.state_dict())
    scale = scaler.get_scale()
    amp_step(model, optimizer, x, y, torch.float16, scaler, spoil=spoil)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))
    for one, other in zip(
        state["state"].values(), optimizer.base_optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert scaler.get_scale() == scale / 2
    amp_step(model, optimizer, x, y, torch.float16, scaler)
    assert not all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))


def test_s2sam_keeps_its_direction_over_an_overflow():
    model = net(torch.float32)
    optimizer = S2SAM(model, torch.optim.SGD, lr=0.1)
    x, y = batch(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    amp_step(model, optimizer, x, y, torch.float16, scaler)
    before, h = reference.values(model), [t.clone() for t in optimizer._previous.values()]
    amp_step(model, optimizer, x, y, torch.float16, scaler, spoil=1)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(h, optimizer._previous.values(), strict=True))


@pytest.mark.parametrize("name", TWO_PASS)
def test_a_scaler_changes_nothing_else(name):
    """float32 with a scale of a power of two: the same bits, by a closure, in two steps, and by scaler.step."""
    found = []
    x, y = batch(torch.float32)
    for way in ("plain", "closure", "two", "step", "step with it", "unscaled"):
        model = net(torch.float32)
        optimizer = TWO_PASS[name](model, torch.optim.SGD, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            if way == "plain":
                step(model, optimizer, loss_on(x, y))
            elif way == "closure":
                optimizer.step(
                    closure_of(model, optimizer, lambda m, s=scaler: s.scale(loss_on(x, y)(m))), scaler=scaler
                )
            else:
                optimizer.zero_grad()
                scaler.scale(loss_on(x, y)(model)).backward()
                optimizer.first_step(zero_grad=True, scaler=scaler)
                scaler.scale(loss_on(x, y)(model)).backward()
                if way == "two":
                    optimizer.second_step(zero_grad=True, scaler=scaler)
                elif way == "step":
                    scaler.step(optimizer)
                elif way == "step with it":
                    optimizer.step(scaler=scaler)
                else:
                    scaler.unscale_(optimizer)
                    optimizer.second_step(scaler=scaler)
            if way != "plain":
                scaler.update()
        found.append(model)
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("way", ["closure", "second_step", "step", "unscaled"])
def test_s2sam_with_a_scaler(way):
    x, y = batch(torch.float32)
    plain, model = net(torch.float32), net(torch.float32)
    one, optimizer = (S2SAM(m, torch.optim.AdamW, lr=0.1, fused=True) for m in (plain, model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        step(plain, one, loss_on(x, y))
        optimizer.zero_grad()
        if way == "closure":
            closure = closure_of(model, optimizer, lambda m: scaler.scale(loss_on(x, y)(m)))
            optimizer.step(closure, scaler=scaler)
        else:
            optimizer.first_step()
            scaler.scale(loss_on(x, y)(model)).backward()
            if way == "unscaled":
                scaler.unscale_(optimizer)
            {"step": optimizer.step}.get(way, optimizer.second_step)(scaler=scaler)
        scaler.update()
    assert same(plain, model)


@pytest.mark.parametrize("kind", [SAM, S2SAM])
def test_a_scaler_that_passes_the_closure_itself_is_told_how(kind):
    model = net(torch.float32)
    optimizer = kind(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    closure = closure_of(model, optimizer, lambda m: scaler.scale(loss_on(*batch(torch.float32))(m)))
    closure()
    with pytest.raises(RuntimeError, match=r"step\(closure, scaler=scaler\)"):
        scaler.step(optimizer, closure)
    scaler.update()
    optimizer.step(closure, scaler=scaler)
    assert not same(model, net(torch.float32))


@pytest.mark.parametrize("base", [torch.optim.SGD, wcr_fast.optim.SGD])
@pytest.mark.parametrize("way", ["closure", "two", "accumulate"])
@pytest.mark.parametrize("name", ALL)
def test_hooks_of_the_base_see_unscaled_gradients(name, way, base):
    """The place for clipping, in every way of calling and for bases that unscale by themselves."""
    if way == "accumulate" and name == "s2sam":
        pytest.skip("a window needs no call")
    model = net(torch.float32)
    optimizer = ALL[name](model, base, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def clip(*_):
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) < 5

    optimizer.base_optimizer.register_step_pre_hook(clip)
    before = reference.values(model)
    closure = closure_of(model, optimizer, lambda m: scaler.scale(loss_on(*batch(torch.float32))(m)))
    if way == "closure":
        optimizer.step(closure, scaler=scaler)
    elif way == "accumulate":
        optimizer.accumulate(closure, scaler=scaler)
        scaler.step(optimizer)
    else:
        if name != "s2sam":
            closure()
            optimizer.first_step(scaler=scaler)
        closure()
        optimizer.second_step(scaler=scaler)
    scaler.update()
    moved = reference.norm([a - b for a, b in zip(before, reference.values(model), strict=True)])
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_an_overflow_is_forgotten_with_the_step():
    model = net(torch.float32)
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch(torch.float32)
    scaler.scale(loss_on(x, y)(model)).backward()
    model[0].bias.grad[0] = float("inf")
    optimizer.first_step(scaler=scaler)
    optimizer.restore()
    scaler.update()
    optimizer.step(closure_of(model, optimizer, lambda m: scaler.scale(loss_on(x, y)(m))), scaler=scaler)
    assert not same(model, net(torch.float32))


def test_no_gradient_in_the_second_pass_of_a_scaler():
    model = net(torch.float32)
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_on(*batch(torch.float32))(model)).backward()
    optimizer.first_step(zero_grad=True, scaler=scaler)
    scaler.step(optimizer)
    assert same(model, net(torch.float32))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ALL)
def test_fp16_on_a_gpu_with_an_overflow(name):
    model = net(torch.float32).cuda()
    optimizer = ALL[name](model, torch.optim.AdamW, lr=0.05, fused=True)
    x, y = (t.cuda() for t in batch(torch.float32))
    scaler = torch.amp.GradScaler("cuda")
    losses = [amp_step(model, optimizer, x, y, torch.float16, scaler, spoil=1 if k == 5 else None) for k in range(30)]
    assert losses[-1] < 0.5 * losses[0]


# --- accumulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_PASS)
def test_one_perturbation_for_all_micro_batches_is_the_big_batch(name):
    whole, parts = net(), net()
    x, y = batch()
    one, other = (TWO_PASS[name](m, torch.optim.SGD, lr=0.1, momentum=0.9) for m in (whole, parts))

    def closure():
        other.zero_grad()
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
            (loss_on(a, b)(parts) / 4).backward()

    for _ in range(3):
        step(whole, one, loss_on(x, y))
        other.step(closure)
    assert close(whole, parts)


@pytest.mark.parametrize("name", ["sam", "asam"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_perturbation_for_each_micro_batch(name, scaled):
    mine, other = net(), net()
    optimizer = TWO_PASS[name](mine, torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    x, y = batch()
    for _ in range(3):
        total = None
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
            loss_of = loss_on(a, b)
            optimizer.accumulate(
                closure_of(mine, optimizer, lambda m, f=loss_of: scaler.scale(f(m) / 4), False), scaler=scaler
            )
            w, g = reference.values(other), reference.gradients(other, loss_of)
            point = reference.sam_point(w, g, 0.1) if name == "sam" else reference.asam_point(w, g, 0.7, 0.01)
            second = [s / 4 for s in reference.gradients(other, loss_of, point)]
            total = second if total is None else [s + t for s, t in zip(total, second, strict=True)]
        scaler.step(optimizer)
        scaler.update()
        reference.descend(plain, other, total)
    assert close(mine, other)


def test_an_overflow_in_a_micro_batch_skips_the_step():
    model = net(torch.float32)
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss_of = loss_on(*batch(torch.float32))
    for spoiled in (False, True, False):

        def closure(spoiled=spoiled):
            scaler.scale(loss_of(model)).backward()
            if spoiled and not optimizer.perturbed:
                model[0].bias.grad[0] = float("nan")

        optimizer.accumulate(closure, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert same(model, net(torch.float32))
    assert scaler.get_scale() == 512.0


def test_a_micro_batch_that_fails_leaves_what_was_accumulated():
    model = net()
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    optimizer.accumulate(closure_of(model, optimizer, loss_on(*batch()), False))
    kept = [p.grad.clone() for p in model.parameters()]

    def fails():
        loss_on(*batch(seed=2))(model).backward()
        if optimizer.perturbed:
            raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.accumulate(fails)
    assert same(model, net())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_before_are_not_mixed_up(set_to_none):
    """A closure may leave zeroing to the line before the step; one that would add to gradients is an error."""
    model, other = net(), net()
    optimizer, plain = (SAM(m, torch.optim.SGD, lr=0.1) for m in (model, other))
    for k in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step(closure_of(model, optimizer, loss_on(*batch(seed=k)), zero=False))
        step(other, plain, loss_on(*batch(seed=k)))
    assert same(model, other)
    loss_on(*batch())(model).backward()
    before = reference.values(model)
    with pytest.raises(RuntimeError, match=r"added to them: call optimizer.zero_grad.*accumulate"):
        optimizer.step(closure_of(model, optimizer, loss_on(*batch()), zero=False))
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))
    step(model, optimizer, loss_on(*batch()))


def test_s2sam_perturbs_once_for_a_window():
    whole, parts = net(), net()
    one = S2SAM(whole, torch.optim.SGD, lr=0.1, rho=0.3)
    other = S2SAM(parts.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=parts)
    for k in range(3):
        x, y = batch(seed=k)
        step(whole, one, loss_on(x, y))
        other.zero_grad()
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
            (loss_on(a, b)(parts) / 4).backward()
        assert other.perturbed
        other.step()
        assert not other.perturbed
    assert close(whole, parts)


# --- saving and loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ALL)
def test_saved_loaded_and_continued(name, base, tmp_path):
    cls, options = BASES[base]
    steady, model = net(torch.float32), net(torch.float32)
    one, optimizer = ALL[name](steady, cls, **options), ALL[name](model, cls, **options)
    for k in range(6):
        step(steady, one, loss_on(*batch(torch.float32, seed=k)))
    for k in range(3):
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    model = net(torch.float32, seed=9)
    optimizer = ALL[name](model, cls, **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for k in range(3, 6):
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
    assert same(steady, model)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue(name, how):
    model = net(torch.float32)
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for k in range(2):
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
    both = (model, optimizer)
    other, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for k in range(2, 4):
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
        step(other, copied, loss_on(*batch(torch.float32, seed=k)))
    assert same(model, other)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_model_with_its_s2sam_continue(how):
    model = net(torch.float32)
    optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)

    def train(model, optimizer, seed):
        optimizer.zero_grad()
        loss_on(*batch(torch.float32, seed=seed))(model).backward()
        assert optimizer.perturbed
        optimizer.step()

    train(model, optimizer, 0)
    other, copied = (
        copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    )
    for k in range(1, 4):
        train(model, optimizer, k)
        train(other, copied, k)
    assert same(model, other)


def test_s2sam_lets_go_of_the_model():
    model = net(torch.float32)
    loss_of = loss_on(*batch(torch.float32))
    optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    before = reference.values(model)
    loss_of(model)
    optimizer.remove()
    loss_of(model)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))
    optimizer = weakref.ref(S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model))
    assert optimizer() is None  # no cycle keeps it, nor the copy of the weights
    loss_of(model)


def test_s2sam_says_where_its_model_is_not_called():
    model = net(torch.float32)
    optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for k in range(3):
        optimizer.zero_grad()
        loss_on(*batch(torch.float32))(model.forward).backward()
        if k == 1:
            with pytest.warns(UserWarning, match="no training forward pass"):
                optimizer.step()
        else:
            optimizer.step()


def test_s2sam_gets_over_a_gradient_that_is_not_finite():
    model = net(torch.float32)
    optimizer = S2SAM(model, torch.optim.SGD, lr=0.1)
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: [p.grad.nan_to_num_() for p in model.parameters()] and None
    )
    for k in range(4):

        def closure(k=k):
            optimizer.zero_grad()
            loss = loss_on(*batch(torch.float32))(model)
            loss.backward()
            if k == 1:
                model[0].bias.grad[0] = float("nan")
            return loss

        assert torch.isfinite(optimizer.step(closure))


def test_a_state_of_the_base_alone_is_taken():
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    step(model, plain, loss_on(*batch()))
    optimizer = SAM(model, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.2)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert torch.equal(
        optimizer.state[model[0].weight]["momentum_buffer"], plain.state[model[0].weight]["momentum_buffer"]
    )
    optimizer.base_optimizer.load_state_dict(plain.state_dict())  # behind its back, and without rho
    step(model, optimizer, loss_on(*batch()))


def test_hooks_of_states_are_the_bases():
    model, seen = net(), []
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "saved", "load", "loaded"]


def test_perturbed_weights_are_not_saved():
    model = net()
    optimizer = SAM(model, torch.optim.SGD, lr=0.1)
    loss_on(*batch())(model).backward()
    optimizer.first_step()
    for save in (optimizer.state_dict, lambda: pickle.dumps(optimizer), lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match="perturbed"):
            save()
    optimizer.restore()
    optimizer.state_dict()


# --- with others -----------------------------------------------------------------------------------------------


def test_a_built_optimizer_groups_and_schedulers():
    model = net()
    base = torch.optim.SGD([{"params": model[0].parameters(), "rho": 0.4}, {"params": model[2].parameters()}], lr=0.1)
    optimizer = SAM(base, rho=0.2, model=model)
    assert [g["rho"] for g in optimizer.param_groups] == [0.4, 0.2]
    assert optimizer.param_groups is base.param_groups
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    other = torch.optim.lr_scheduler.ExponentialLR(base, 0.5)
    loss_on(*batch())(model).backward()
    before = reference.values(model)
    g = [p.grad.clone() for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    near, far = reference.sam_point(before, g, 0.2), reference.sam_point(before, g, 0.4)
    expected = [*far[:2], *near[2:]]
    assert all(torch.allclose(a, b) for a, b in zip(expected, reference.values(model), strict=True))
    loss_on(*batch())(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.second_step()
        schedule.step()
        other.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert base.param_groups[2]["rho"] == 0.2
    assert "SAM" in repr(optimizer)
    optimizer.param_groups = optimizer.param_groups[:1]
    assert len(base.param_groups) == 1


def test_dense_as_a_generator():
    model = net()
    optimizer = CrAM(model, torch.optim.SGD, lr=0.1, dense=(name for name in ["2"]))
    assert [w.name for w in optimizer._weights] == ["0.weight"]


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_is_converted_between_steps(name):
    model = net(torch.float32)
    optimizer = ALL[name](model, torch.optim.SGD, lr=0.1)
    step(model, optimizer, loss_on(*batch(torch.float32)))
    model.double()
    before = reference.values(model)
    step(model, optimizer, loss_on(*batch()))
    assert not all(torch.equal(a, b) for a, b in zip(before, reference.values(model), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_named_parameters_and_groups(name):
    model = net()
    optimizer = ALL[name](model.named_parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    other = net()
    plain = ALL[name](other, torch.optim.SGD, lr=0.1)
    for k in range(2):
        step(model, optimizer, loss_on(*batch(seed=k)))
        step(other, plain, loss_on(*batch(seed=k)))
    assert same(model, other)


@pytest.mark.parametrize("how", ["attach", "step"])
def test_a_regularizer_acts_once_at_the_restored_weights(how):
    """SAM + WCR: the penalty bends neither the perturbation nor the second gradient."""
    mine, other = net(), net()
    if how == "attach":
        optimizer = SAM(mine, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)
        wcr_fast.WCR(mine, lam=1e-3).attach(optimizer)
    else:
        optimizer = SAM(mine, wcr_fast.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, penalty=wcr_fast.WCR(mine, lam=1e-3))
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for k in range(3):
        loss_of = loss_on(*batch(seed=k))
        step(mine, optimizer, loss_of)
        w, g = reference.values(other), reference.gradients(other, loss_of)
        second = reference.gradients(other, loss_of, reference.sam_point(w, g, 0.1))
        pull = reference.gradients(
            other,
            lambda m: (
                1e-3
                * sum(1 / (torch.sqrt(p**2 + 1e-8).var(correction=0) + 1e-8) for p in m.parameters() if p.dim() > 1)
            ),
        )
        reference.descend(plain, other, [a + b for a, b in zip(second, pull, strict=True)])
    assert close(mine, other, 1e-10)


@needs_triton
@pytest.mark.parametrize("name", ["sam", "cram+"])
def test_moments_are_carried_over_the_perturbation(name, monkeypatch):
    """The fused penalty stays free: weights that were put back need no pass for their moments."""
    from wcr_fast.triton_path.step import StepPlan

    taken, take = [], StepPlan.take_moments
    monkeypatch.setattr(StepPlan, "take_moments", lambda plan: (taken.append(1), take(plan)))
    model, other = net(torch.float32).to(DEVICE), net(torch.float32).to(DEVICE)
    with wcr_fast.backend("triton"):
        make = ALL[name]
        optimizer, plain = (make(m, wcr_fast.optim.SGD, lr=0.1, penalty="wcr", lam=1e-3) for m in (model, other))
        for k in range(4):
            x, y = (t.to(DEVICE) for t in batch(torch.float32, seed=k))
            step(model, optimizer, loss_on(x, y))
        assert len(taken) == 1
        for k in range(4):
            x, y = (t.to(DEVICE) for t in batch(torch.float32, seed=k))
            plain.base_optimizer.weights_changed()
            step(other, plain, loss_on(x, y))
        assert len(taken) == 5
        assert same(model, other)
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        step(model, optimizer, loss_on(x, y))
        assert len(taken) == 6


@pytest.mark.parametrize("base", ["sgd", "ours"])
@pytest.mark.parametrize("name", ALL)
def test_masks_are_kept(name, base):
    model = net(torch.float32)
    cls, options = BASES[base]
    optimizer = ALL[name](model, cls, **options)
    masks = wcr_fast.Masks.from_sparsity(model, 0.5)
    masks.keep(optimizer)
    for k in range(3):
        step(model, optimizer, loss_on(*batch(torch.float32, seed=k)))
        for key, mask in masks.items():
            assert (dict(model.named_parameters())[key][~mask] == 0).all()


def test_clipping_of_the_final_gradient():
    model = net()
    optimizer = SAM(model, torch.optim.SGD, lr=1.0, rho=0.1)

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    optimizer.base_optimizer.register_step_pre_hook(clip)
    before = reference.values(model)
    step(model, optimizer, loss_on(*batch()))
    moved = reference.norm([a - b for a, b in zip(before, reference.values(model), strict=True)])
    assert moved.item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at the loss while it traces torch's hooks
def test_a_compiled_model_and_a_compiled_step():
    model, other = (nn.Sequential(*net(torch.float32), nn.BatchNorm1d(4)) for _ in range(2))
    fast = torch.compile(model, backend="aot_eager")
    optimizer = SAM(fast, torch.optim.SGD, lr=0.1, rho=0.1)
    plain = SAM(other, torch.optim.SGD, lr=0.1, rho=0.1)
    whole = torch.compile(lambda f: optimizer.step(f), backend="aot_eager")
    for k in range(3):
        loss_of = loss_on(*batch(torch.float32, seed=k))
        whole(closure_of(fast, optimizer, loss_of))
        step(other, plain, loss_of)
    assert close(model, other, 1e-6)
    assert torch.allclose(model[-1].running_mean, other[-1].running_mean)
    assert model[-1].num_batches_tracked == other[-1].num_batches_tracked == 3


def test_s2sam_by_the_models_forward_pass():
    """An ordinary loop, evaluation in between, copies of the model: only training forwards perturb."""
    mine, other = net(), net()
    optimizer = S2SAM(mine.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=mine)
    closures = S2SAM(other, torch.optim.SGD, lr=0.1, rho=0.3)
    for k in range(3):
        loss_of = loss_on(*batch(seed=k))
        optimizer.zero_grad()
        loss_of(mine).backward()
        optimizer.step()
        step(other, closures, loss_of)
        mine.eval()
        loss_of(mine)
        mine.train()
        with torch.no_grad():
            loss_of(mine)
        twin = copy.deepcopy(mine)
        loss_of(twin)
        assert not optimizer.perturbed
    assert same(mine, other)
