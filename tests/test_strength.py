"""Strengths in time: shapes, sums, resuming, and that none launches nothing."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import wcr_fast


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


def strengths(reg, schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append(float(reg.lam))
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup": 2}, [0, 0.5, 1, 1, 1, 1]),
        ({"shape": "linear"}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"shape": "linear", "warmup": 2}, [0, 0.5, 1, 0.5, 0, 0]),
        ({"shape": "cosine"}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0]),
        ({"off_after": 3}, [1, 1, 1, 0, 0, 0]),
        ({"shape": "linear", "off_after": 2}, [1, 0.5, 0, 0, 0, 0]),
        ({"warmup": 4, "off_after": 4, "shape": "cosine"}, [0, 0.25, 0.5, 0.75, 0, 0]),
        ({"off_after": 0}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_shapes(net, options, want):
    reg = wcr_fast.WCR(net, 2e-3)
    schedule = wcr_fast.StrengthSchedule(reg, 4, **options)
    assert strengths(reg, schedule, 6) == pytest.approx([2e-3 * f for f in want], abs=1e-18)


def test_members_of_a_sum_keep_their_ratio(net):
    penalty = wcr_fast.WCR(net, 1e-5) + wcr_fast.L1(net, torch.tensor(1e-3))
    tensor = penalty.terms[1].lam
    schedule = wcr_fast.StrengthSchedule(penalty, 4, shape="linear")
    schedule.step()
    assert penalty.terms[0].lam == pytest.approx(0.75e-5)
    assert penalty.terms[1].lam is tensor
    assert tensor.item() == pytest.approx(0.75e-3)


def test_resuming_goes_on(net):
    reg = wcr_fast.WCR(net, 1.0) + wcr_fast.L1(net, torch.tensor(2.0))
    schedule = wcr_fast.StrengthSchedule(reg, 10, warmup=3, shape="cosine")
    for _ in range(5):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    other = wcr_fast.WCR(net, 5.0) + wcr_fast.L1(net, torch.tensor(5.0))
    resumed = wcr_fast.StrengthSchedule(other, 10, warmup=3, shape="cosine")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert [float(t.lam) for t in reg.terms] == [float(t.lam) for t in other.terms]
        schedule.step(), resumed.step()
    with pytest.raises(ValueError, match="2 strengths, there are 1"):
        wcr_fast.StrengthSchedule(wcr_fast.L1(net), 3).load_state_dict(schedule.state_dict())


def test_none_launches_nothing(net):
    penalty = wcr_fast.WCR(net, 1.0) + wcr_fast.L1(net, 1.0)
    schedule = wcr_fast.StrengthSchedule(penalty, 2, off_after=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    schedule.step()
    with penalty.attach(optimizer):
        optimizer.step()
    assert penalty().item() == 0.0
    assert net[0].weight.grad is None


def test_a_fused_optimizer_follows_it(backend, device, net):
    net = net.to(device)
    twin = copy.deepcopy(net)
    reg, other = wcr_fast.L1(net, 1.0), wcr_fast.L1(twin, 1.0)
    first = wcr_fast.optim.SGD(net.parameters(), lr=0.1, penalty=reg)
    second = torch.optim.SGD(twin.parameters(), lr=0.1)
    other.attach(second)
    schedules = [wcr_fast.StrengthSchedule(r, 3, shape="linear", warmup=1) for r in (reg, other)]
    for _ in range(4):
        for model, optimizer in ((net, first), (twin, second)):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_errors(net):
    reg = wcr_fast.WCR(net)
    with pytest.raises(TypeError, match="expected a penalty, got Linear"):
        wcr_fast.StrengthSchedule(net[0], 3)
    with pytest.raises(ValueError, match="shape must be one of constant, linear, cosine, got 'exp'"):
        wcr_fast.StrengthSchedule(reg, 3, shape="exp")
    for options in ({"warmup": 4}, {"off_after": 5}, {"warmup": 2, "off_after": 1}, {"warmup": -1}):
        with pytest.raises(ValueError, match="0 <= warmup <= off_after <= total_steps"):
            wcr_fast.StrengthSchedule(reg, 3, **options)
    with pytest.raises(ValueError, match="at least 1"):
        wcr_fast.StrengthSchedule(reg, 0)
    assert reg.lam == 1e-5
