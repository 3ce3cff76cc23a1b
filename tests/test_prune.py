"""prune_ and its record: exact counts, untouched parameters, clear errors."""

import copy
import json
import math

import pytest
import reference_selection as ref
import torch
from conftest import CUDA
from torch import nn

from wcr_fast.pruning.magnitude import magnitude_masks
from wcr_fast.pruning.prune import prune_


def small_net(device="cpu"):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
    )
    return net.to(device)


def matrices(model):
    return [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("scope", ["global", "layer", "row", "2:4", "1:2"])
def test_prunes_what_the_stable_sort_says(scope, backend, device):
    net = small_net(device)
    before = [p.detach().clone() for p in net.parameters()]
    weights = [p.detach().clone() for p in matrices(net)]
    sparsity = None if ":" in scope else 0.7
    masks = ref.masks(weights, sparsity, scope)
    record = prune_(net, sparsity, scope=scope)
    for found, wanted in zip(matrices(net), ref.prune(weights, masks), strict=True):
        assert torch.equal(found.detach(), wanted)
    for now, then in zip(net.parameters(), before, strict=True):
        assert now.dim() > 1 or torch.equal(now.detach(), then)
    removed = [int((~m).sum()) for m in masks]
    assert [layer.removed for layer in record.per_layer] == removed
    assert [layer.zeros for layer in record.per_layer] == removed
    assert record.asked == record.removed == record.zeros == record.pruned_now == sum(removed)
    assert record.achieved == sum(removed) / sum(w.numel() for w in weights)
    if scope == "global":
        assert record.threshold == ref.threshold(weights, sparsity).item()
    if scope == "layer":
        assert [layer.threshold for layer in record.per_layer] == ref.threshold(weights, 0.7, "layer").tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:prune_. nothing is left")
def test_ties_odd_layouts_and_signed_zeros(dtype, backend, device):
    base = torch.randint(-2, 3, (12, 20), device=device).to(dtype)
    signed = torch.tensor([0.0, -0.0, -0.0, 1.0, -0.0, math.inf], dtype=dtype, device=device)
    interpreted = backend == "triton" and not CUDA  # at some 6 ms a program, one sparsity has to do
    for sparsity in (0.3,) if interpreted else (0.05, 0.15, 0.3, 0.5, 0.8, 0.99):
        weights = [
            base.clone(),
            signed.clone(),
            base.clone().t(),
            base.clone()[:, ::2],
            base.view(3, 4, 4, 5).to(memory_format=torch.channels_last, copy=True),
            torch.empty(0, 3, dtype=dtype, device=device),
            torch.tensor(1.0, dtype=dtype, device=device),
        ]
        originals = [w.clone() for w in weights]
        record = prune_(weights, sparsity)
        masks = ref.masks(originals, sparsity)
        for found, wanted in zip(weights, ref.prune(originals, masks), strict=True):
            assert torch.equal(found, wanted)
            assert torch.equal(found.signbit(), wanted.signbit())  # removed is +0.0, kept is untouched
        total = sum(w.numel() for w in weights)
        assert record.removed == record.asked == round(sparsity * total)
        assert [layer.zeros for layer in record.per_layer] == [int((w == 0).sum()) for w in weights]
        zeros_before = sum(int((w == 0).sum()) for w in originals)
        assert record.pruned_now == record.zeros - zeros_before


def test_mixed_dtypes_in_one_pool(backend, device):
    weights = [torch.randint(-9, 10, (9, 9), device=device).div(3).to(d) for d in (torch.float32, torch.bfloat16)]
    originals = [w.clone() for w in weights]
    prune_(weights, 0.6)
    for found, wanted in zip(weights, ref.prune(originals, ref.masks(originals, 0.6)), strict=True):
        assert torch.equal(found, wanted)


def test_large_blocks_and_a_cut_tensor_of_ties():
    coarse = (torch.randn(300, 1000) * 3).round()
    weights = [coarse.clone(), coarse.flip(0).t(), torch.randn(200_000)]
    originals = [w.clone() for w in weights]
    prune_(weights, 0.55)
    for found, wanted in zip(weights, ref.prune(originals, ref.masks(originals, 0.55)), strict=True):
        assert torch.equal(found, wanted)


def test_long_rows_and_large_groups():
    weight = (torch.randn(3, 70_000) * 3).round()
    original = weight.clone()
    prune_(weight, 0.5, scope="row")
    assert torch.equal(weight, torch.where(ref.rows(original, 0.5), original, 0.0))
    weight = original.clone()
    prune_(weight, None, scope="7:20")
    assert torch.equal(weight, torch.where(ref.nm(original, 7, 20), original, 0.0))


def test_twice_is_once(backend, device):
    net = small_net(device)
    first = prune_(net, 0.5)
    after = copy.deepcopy(net.state_dict())
    second = prune_(net, 0.5)
    assert second.pruned_now == 0
    assert (second.zeros, second.asked) == (first.zeros, first.asked)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, after[name])
    third = prune_(net, 0.75)
    assert third.pruned_now == third.zeros - second.zeros > 0


def test_rows_and_groups_follow_the_layer_kind(backend, device):
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(8, 4, 3, groups=2)).to(device)
    for scope, sparsity in (("row", 0.5), ("2:4", None)):
        model = copy.deepcopy(net)
        up, down = (m.weight.detach().clone() for m in model)
        record = prune_(model, sparsity, scope=scope)
        if scope == "row":
            wanted = ref.rows(up, 0.5, out_dim=1), ref.rows(down, 0.5)
        else:
            wanted = ref.nm(up, 2, 4, in_dim=0), ref.nm(down, 2, 4, in_dim=1)
        for module, mask, original in zip(model, wanted, (up, down), strict=True):
            assert torch.equal(module.weight.detach(), torch.where(mask.to(device), original, 0.0))
        assert record.removed == sum(int((~m).sum()) for m in wanted)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_a_transposed_convolution_are_apart(groups, backend, device):
    """An output's weights are those of its group's inputs, and a group of m inputs lies within one of them."""
    layer = nn.ConvTranspose2d(12, 8, (2, 1), groups=groups).to(device)
    with torch.no_grad():
        layer.weight.mul_(9).round_()  # ties
    original = layer.weight.detach().clone()
    for scope, sparsity in (("row", 0.4), ("2:4", None)):
        parts = original.chunk(groups)
        masks = [ref.rows(p, 0.4, out_dim=1) if scope == "row" else ref.nm(p, 2, 4, in_dim=0) for p in parts]
        wanted = torch.cat(masks)
        assert torch.equal(magnitude_masks(layer, sparsity, scope=scope)[0].cpu(), wanted)
        record = prune_(layer, sparsity, scope=scope)
        assert torch.equal(layer.weight.detach(), torch.where(wanted.to(device), original, 0.0))
        assert record.removed == record.asked == int((~wanted).sum())
        assert record.zeros == int((layer.weight == 0).sum())
        if scope == "2:4":
            assert ("fill no group of 4" in record.per_layer[0].note) == (12 // groups % 4 > 0)
        with torch.no_grad():
            layer.weight.copy_(original)


def test_records_of_large_strided_weights_count_their_zeros():
    base = (torch.randn(250, 800) * 3).round()
    for scope, sparsity, mask in (("row", 0.5, ref.rows), ("2:4", None, None)):
        for make in (lambda: [base.clone()[:, ::4]], lambda: [torch.ones(2, 4), base.bfloat16()]):
            weights = make()
            originals = [w.clone() for w in weights]
            record = prune_(weights, sparsity, scope=scope)
            masks = [mask(w, 0.5) if mask else ref.nm(w, 2, 4) for w in originals]
            for found, wanted in zip(weights, ref.prune(originals, masks), strict=True):
                assert torch.equal(found, wanted)
            assert [layer.zeros for layer in record.per_layer] == [int((w == 0).sum()) for w in weights]
            assert record.pruned_now == record.zeros - sum(int((w == 0).sum()) for w in originals)


def test_a_remainder_stays_dense_and_is_named(backend, device):
    layer = nn.Linear(10, 3).to(device)
    tail = layer.weight.detach()[:, 8:].clone()
    record = prune_(layer, None, scope="2:4")
    assert torch.equal(layer.weight.detach()[:, 8:], tail)
    assert record.removed == 3 * 2 * 2
    assert "last 2 of 10" in record.per_layer[0].note
    assert "last 2 of 10" in str(record)


def test_parameters_stay_what_they_are(backend, device):
    net = small_net(device)
    keys, ids = list(net.state_dict()), [id(p) for p in net.parameters()]
    pointers = [p.data_ptr() for p in net.parameters()]
    versions = [p._version for p in net.parameters()]
    handle = net[4].register_forward_hook(lambda *args: None)
    prune_(net, 0.5)
    assert list(net.state_dict()) == keys
    assert [id(p) for p in net.parameters()] == ids
    assert [p.data_ptr() for p in net.parameters()] == pointers
    for p, version in zip(net.parameters(), versions, strict=True):
        assert (p._version > version) == (p.dim() > 1)
        assert p.requires_grad
        assert p.is_leaf
    assert handle.id in net[4]._forward_hooks
    assert torch.equal(copy.deepcopy(net)[4].weight, net[4].weight)


@pytest.mark.parametrize("scope", ["global", "row", "2:4"])
def test_backward_across_pruning_raises(scope, backend, device):
    layer = nn.Linear(8, 8).to(device)
    loss = layer(torch.ones(2, 8, device=device, requires_grad=True)).sum()
    prune_(layer, None if scope == "2:4" else 0.5, scope=scope)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_count_once_and_frozen_ones_too():
    net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    net["head"].weight = net["embed"].weight
    net["head"].weight.requires_grad_(False)
    record = prune_(net, 0.5)
    assert record.numel == 40
    assert record.zeros == 20
    assert [layer.name for layer in record.per_layer] == ["embed.weight = head.weight"]


def test_exclude_and_the_left_out_list():
    net = small_net()
    kept = net[0].weight.detach().clone()
    record = prune_(net, 0.5, exclude=nn.Conv2d)
    assert torch.equal(net[0].weight.detach(), kept)
    assert [layer.name for layer in record.per_layer] == ["4.weight", "5.weight"]
    assert ("0.weight", "excluded as Conv2d") in record.left_out
    assert "left out: 0.weight (excluded as Conv2d)" in str(record)
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        prune_(net, 0.5, exclude="nothing")


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_warns_when_a_layer_loses_everything(scope, backend, device):
    net = small_net(device)
    with pytest.warns(UserWarning, match=r"nothing is left of 0\.weight, 4\.weight, 5\.weight"):
        record = prune_(net, 1.0, scope=scope)
    assert record.achieved == 1.0
    assert all(not p.any() for p in matrices(net))
    json.dumps(record.to_dict(), allow_nan=False)


def test_warns_about_the_one_emptied_layer():
    with torch.no_grad():
        net = small_net()
        net[4].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"nothing is left of 4\.weight$"):
        prune_(net, 0.5)


def test_record_is_a_table_and_json(backend, device):
    record = prune_(small_net(device), 0.5)
    lines = str(record).splitlines()
    assert lines[0].startswith("sparsity 0.5, scope global: 144 asked, 144 pruned now, threshold 0.")
    assert lines[1].split() == ["layer", "shape", "weights", "removed", "zeros", "sparsity"]
    assert lines[2].split()[:3] == ["0.weight", "8x3x3x3", "216"]
    plain = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert plain["achieved"] == 0.5
    assert plain["per_layer"][0]["shape"] == [8, 3, 3, 3]
    with pytest.raises(AttributeError):
        record.zeros = 3


@pytest.mark.parametrize(("sparsity", "scope"), [(0.5, "global"), (0.5, "layer"), (0.5, "row"), (None, "2:4")])
def test_nan_is_named_before_anything_is_written(sparsity, scope, backend, device):
    net = small_net(device)
    with torch.no_grad():
        net[4].weight[2, 3] = math.nan
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"prune_: 4\.weight holds NaN.*nothing was written"):
        prune_(net, sparsity, scope=scope)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_refuses_what_it_cannot_write():
    weight = torch.randn(4, 4)
    for wrong in (torch.ones(3).expand(4, 3), torch.randn(10).as_strided((4, 4), (2, 1))):
        with pytest.raises(ValueError, match=r"weights\[1\] is expanded or overlaps itself"):
            prune_([weight, wrong], 0.5)
    with pytest.raises(ValueError, match=r"weights\[0\] and weights\[1\] share memory"):
        prune_([weight, weight], 0.5)
    with pytest.raises(ValueError, match="share memory"):
        prune_([weight[:3], weight[1:]], 0.5)
    with pytest.raises(ValueError, match="meta device"):
        prune_(torch.ones(3, device="meta"), 0.5)
    prune_([weight[:, :2], weight[:, 2:]], 0.5)
    assert int((weight == 0).sum()) == 8


def test_refuses_wrong_arguments():
    for nothing in (nn.ReLU(), nn.LayerNorm(3), []):
        with pytest.raises(ValueError, match="nothing to prune"):
            prune_(nothing, 0.5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        prune_(small_net(), 90)
    with pytest.raises(TypeError, match="sparsity must be a number"):
        prune_(small_net(), None)
    with pytest.raises(ValueError, match="leave sparsity out"):
        prune_(small_net(), 0.5, scope="2:4")
    with pytest.raises(ValueError, match="scope must be"):
        prune_(small_net(), 0.5, scope="channel")
    with pytest.raises(ValueError, match="exclude needs a module"):
        prune_([torch.ones(3)], 0.5, exclude="*")
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        prune_([torch.ones(3), torch.arange(3)], 0.5)


def test_generators_are_read_once():
    weights = [torch.randn(5, 5) for _ in range(3)]
    assert prune_((w for w in weights), 0.2).zeros == sum(int((w == 0).sum()) for w in weights) == 15
