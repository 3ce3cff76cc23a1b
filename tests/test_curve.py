"""pruning_curve: every sparsity evaluated, the model given back bit for bit."""

import math

import pytest
import torch
from torch import nn

from wcr_fast.pruning.curve import pruning_curve
from wcr_fast.pruning.prune import prune_


def net(device="cpu"):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).to(device)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
        model[3].weight[0, 1] = math.inf
    return model


def bits(model):
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return {k: v.view(torch.int32) if v.dtype == torch.float32 else v for k, v in state.items()}


def same(model, before):
    return all(torch.equal(v, before[k]) for k, v in bits(model).items())


def zeros(model):
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_each_point_is_one_shot_pruning(scope, backend, device):
    model = net(device)
    before, wanted = bits(model), [0.9, 0.0, 0.5, 0.75, 0.5]

    def evaluate(m):
        return [p.detach().clone() for p in m.parameters()]

    curve = pruning_curve(model, evaluate, iter(wanted), scope=scope)
    assert same(model, before)
    assert curve.sparsities == wanted
    for point in curve.points:
        record = prune_(model, point.sparsity, scope=scope)
        for found, expected in zip(point.value, model.parameters(), strict=True):
            assert torch.equal(found, expected.detach())
        assert point.record == record
        model.load_state_dict({k: v.view(torch.float32) if v.dtype == torch.int32 else v for k, v in before.items()})
    assert curve.values[0] is curve.points[0].value


def test_no_sparsity_gives_no_point(backend, device):
    assert pruning_curve(net(device), zeros, []).points == []


def test_buffers_and_flags_come_back():
    model = net()
    model[1].eval()
    before, flags = bits(model), [m.training for m in model.modules()]
    seen = []

    def evaluate(m):
        m.train()
        m(torch.randn(8, 2, 4, 4))
        m.eval()
        seen.append(m[1].num_batches_tracked.item())
        return zeros(m)

    curve = pruning_curve(model, evaluate, [0.5, 0.9])
    assert seen == [1, 1]  # each point starts from the same buffers
    assert curve.values == [76, 137]
    assert same(model, before)
    assert [m.training for m in model.modules()] == flags


def test_comes_back_when_evaluate_raises():
    model = net()
    before = bits(model)

    def evaluate(m):
        m.train()
        m(torch.randn(8, 2, 4, 4))
        m[1].running_mean = torch.zeros(4)
        raise KeyboardInterrupt

    running = model[1].running_mean
    with pytest.raises(KeyboardInterrupt):
        pruning_curve(model, evaluate, [0.9])
    assert same(model, before)
    assert model[1].running_mean is running


def test_recalibrates_and_restores():
    model = net().eval()
    with torch.no_grad():
        model[3].weight[0, 1] = 1.0
    before, batches = bits(model), [torch.randn(16, 2, 4, 4), torch.randn(16, 2, 4, 4)]
    plain = pruning_curve(model, lambda m: m[1].running_mean.clone(), [0.5])
    fixed = pruning_curve(model, lambda m: m[1].running_mean.clone(), [0.5, 0.8], recalibrate=batches)
    assert not torch.equal(plain.values[0], fixed.values[0])
    assert not torch.equal(fixed.values[0], fixed.values[1])
    assert same(model, before)
    with pytest.raises(TypeError, match="read once per sparsity"):
        pruning_curve(model, zeros, [0.5], recalibrate=iter(batches))


def test_warns_for_each_emptied_point_and_restores():
    model = net()
    before = bits(model)
    with pytest.warns(UserWarning, match="nothing is left"):
        curve = pruning_curve(model, zeros, [1.0])
    assert curve.values == [152]
    assert same(model, before)


def test_refuses_wrong_arguments():
    model = net()
    with pytest.raises(TypeError, match="model must be a module"):
        pruning_curve([torch.ones(3)], zeros, [0.5])
    for sparsities in (0.5, torch.tensor(0.5)):
        with pytest.raises(TypeError, match="sparsities must be several numbers"):
            pruning_curve(model, zeros, sparsities)
    with pytest.raises(ValueError, match="scope must be"):
        pruning_curve(model, zeros, [0.5], scope="2:4")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        pruning_curve(model, zeros, [0.5, 1.5])
    with torch.no_grad():
        model[0].weight[0] = math.nan
    with pytest.raises(ValueError, match=r"pruning_curve: 0\.weight holds NaN"):
        pruning_curve(model, zeros, [0.5])
