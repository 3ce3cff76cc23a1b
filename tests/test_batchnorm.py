"""recalibrate_batchnorm: exact pooled statistics, and nothing else touched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wcr_fast.pruning.batchnorm import recalibrate_batchnorm


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_full_batch_statistics_for_any_split_and_order(affine, momentum, data):
    values = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    values = values * torch.tensor([1e-3, 1.0, 50.0])[:, None] + torch.tensor([100.0, 0.0, -7.0])[:, None]
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=6)))
    order = torch.tensor(data.draw(st.permutations(range(40))))
    norm = nn.BatchNorm1d(3, affine=affine, momentum=momentum)
    assert recalibrate_batchnorm(norm, values[order].tensor_split(cuts)) == 1
    exact = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), exact.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var.double(), exact.var(1, unbiased=True), rtol=1e-6, atol=0)
    assert int(norm.num_batches_tracked) == 0


def test_unequal_batches_weigh_by_their_size():
    norm = nn.BatchNorm1d(1)
    recalibrate_batchnorm(norm, [torch.zeros(100, 1), torch.full((3, 1), 101.0)])
    assert norm.running_mean.item() == pytest.approx(303 / 103)


def test_everything_else_stays():
    net = make_net()
    net.train()
    net[1].eval()
    net[1].momentum = 0.3
    net[1].num_batches_tracked.fill_(7)
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    pointers = [b.data_ptr() for b in net.buffers()]
    state = torch.get_rng_state()
    recalibrate_batchnorm(net, [torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))])
    assert torch.equal(torch.get_rng_state(), state)  # dropout drew nothing
    assert [m.training for m in net.modules()] == flags
    assert [b.data_ptr() for b in net.buffers()] == pointers
    assert net[1].momentum == 0.3
    assert not net[1]._forward_pre_hooks
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert all(p.grad is None for p in net.parameters())


def test_second_layer_sees_inputs_normalised_with_batch_statistics():
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    batches = [torch.randn(8, 3) + 5, torch.randn(12, 3) * 4]
    assert recalibrate_batchnorm(nn.Sequential(first, second), batches) == 2
    seen = torch.cat([nn.functional.batch_norm(b, None, None, training=True) for b in batches]).double()
    torch.testing.assert_close(second.running_var.double(), seen.var(0), rtol=1e-5, atol=1e-6)


def test_a_layer_used_twice_pools_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x), self.norm(input=3 * x + 1)

    net, x = Twice(), torch.randn(9, 2)
    assert recalibrate_batchnorm(net, [x]) == 1
    both = torch.cat([x, 3 * x + 1]).double()
    torch.testing.assert_close(net.norm.running_mean.double(), both.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var.double(), both.var(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "label"), lambda x: [x], lambda x: {"input": x}])
def test_kinds_of_batches(wrap):
    values = torch.randn(10, 3)
    norm = nn.BatchNorm1d(3)
    recalibrate_batchnorm(norm, (wrap(part) for part in values.split(4)))
    torch.testing.assert_close(norm.running_mean, values.mean(0))


def test_restores_all_when_the_model_raises():
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(net, [torch.randn(6, 2, 4, 4), torch.randn(6, 2, 9, 9)])
    assert net.training
    assert not net[1]._forward_pre_hooks
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_without_batch_norm_nothing_is_read():
    def batches():
        raise AssertionError("read")
        yield

    frozen = nn.BatchNorm1d(3, track_running_stats=False)
    assert recalibrate_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), frozen), batches()) == 0


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        recalibrate_batchnorm(nn.BatchNorm1d(3), [])


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    net = make_net()
    net.spare = nn.BatchNorm2d(4)
    net.forward = lambda x: net[1](net[0](x))
    assert recalibrate_batchnorm(net, [torch.randn(6, 2, 4, 4)]) == 2
    assert torch.equal(net.spare.running_var, torch.ones(4))


def test_half_precision_buffers():
    norm = nn.BatchNorm1d(2).to(torch.bfloat16)
    recalibrate_batchnorm(norm, [torch.randn(16, 2, dtype=torch.bfloat16)])
    assert norm.running_mean.dtype == torch.bfloat16
