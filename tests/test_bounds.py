"""Floors and caps of a global selection: exact totals, bounds kept, nested masks, equal to a search by hand."""

import math

import pytest
import reference_selection as ref
import torch
from conftest import DEVICE, needs_triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import wcr_fast
from wcr_fast import Masks, prune_, score_masks


def by_hand(weights, sparsity, low, high):
    """Take weights in order of magnitude (list order, then place, among equal ones) as the layers' bounds allow."""
    total = sum(w.numel() for w in weights)
    keep = ref.num_keep(sparsity, total)
    ranked = sorted(
        ((-m, i, j) for i, w in enumerate(weights) for j, m in enumerate(ref.flat64(w).tolist())),
    )
    kept = [0] * len(weights)
    masks = [torch.zeros(w.numel(), dtype=torch.bool) for w in weights]
    spare = keep - sum(low)  # what is left when every layer has its floor
    for _, i, j in ranked:
        if kept[i] < low[i]:
            masks[i][j] = True
        elif kept[i] < high[i] and spare > 0:
            masks[i][j] = True
            spare -= 1
        else:
            continue
        kept[i] += 1
    return [m.view(w.shape) for m, w in zip(masks, weights, strict=True)]


values = st.lists(st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10, width=32)), min_size=1, max_size=12)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(
    layers=st.lists(values, min_size=1, max_size=4),
    sparsities=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    floor=st.floats(0, 0.5),
    cap=st.floats(0.5, 1),
)
def test_bounded_masks_equal_a_search_by_hand_and_are_nested(layers, sparsities, floor, cap):
    weights = [torch.tensor(v) for v in layers]
    numels = [w.numel() for w in weights]
    low = [math.ceil(round(floor * n, 6)) for n in numels]
    high = [math.floor(round(cap * n, 6)) for n in numels]
    before = None
    for sparsity in sorted(sparsities):
        keep = ref.num_keep(sparsity, sum(numels))
        if any(a > b for a, b in zip(low, high, strict=True)) or not sum(low) <= keep <= sum(high):
            with pytest.raises(ValueError, match="floor"):
                score_masks(weights, sparsity, floor=floor, cap=cap)
            continue
        found = score_masks(weights, sparsity, floor=floor, cap=cap)
        assert sum(int(m.sum()) for m in found) == keep
        assert all(torch.equal(m, w) for m, w in zip(found, by_hand(weights, sparsity, low, high), strict=True))
        if before is not None:
            assert all(not (m & ~b).any() for m, b in zip(found, before, strict=True))
        before = found


def test_a_layer_with_a_floor_is_never_emptied(backend, device):
    weights = [torch.randn(40, 50).to(device), 1e-3 * torch.randn(6, 5).to(device), torch.randn(30, 10).to(device)]
    low = [math.ceil(0.001 * w.numel()) for w in weights]
    assert int(wcr_fast.magnitude_masks(weights, 0.9)[1].sum()) == 0
    found = score_masks(weights, 0.9, floor=0.001)
    assert [int(m.sum()) for m in found][1] == 1
    wanted = by_hand([w.cpu() for w in weights], 0.9, low, [w.numel() for w in weights])
    assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree(dtype):
    weights = [(torch.randn(60, 40) * s).to(dtype) for s in (1.0, 0.1, 3.0)]
    with wcr_fast.backend("torch"):
        wanted = score_masks(weights, 0.8, floor=0.1, cap=0.5)
    with wcr_fast.backend("triton"):
        found = score_masks([w.to(DEVICE) for w in weights], 0.8, floor=0.1, cap=0.5)
    assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_cannot_be_ranked_is_refused(dtype, backend, device):
    for spoilt in (math.nan, -math.nan):
        weights = [torch.full((20, 3), math.inf, dtype=dtype), torch.randn(9, 5).to(dtype)]
        weights[1][3, 2] = spoilt
        weights = [w.to(device) for w in weights]
        with pytest.raises(ValueError, match=r"weights\[1\] holds NaN"):
            score_masks(weights, 0.5, floor=0.1, cap=0.9)
    numbers = [torch.ones_like(weights[0]), -torch.ones_like(weights[0][:9, :1]).expand(9, 5)]
    weights[1] = torch.randn(9, 5).to(weights[1])
    with pytest.raises(ValueError, match=r"a fisher score of weights\[1\] is NaN or negative"):
        score_masks(weights, 0.5, "fisher", aux=numbers, floor=0.1, cap=0.9)


def test_bounds_with_a_score():
    weights = [torch.randn(20, 30), torch.randn(10, 10) * 1e-3]
    numbers = [torch.rand_like(w) for w in weights]
    scores = [w * w * a for w, a in zip(weights, numbers, strict=True)]
    found = score_masks(weights, 0.6, "fisher", aux=numbers, floor=0.3)
    assert all(torch.equal(m, w) for m, w in zip(found, by_hand(scores, 0.6, [180, 30], [600, 100]), strict=True))


@pytest.mark.filterwarnings("ignore:prune_. nothing is left")
def test_pruning_with_bounds_records_who_was_held():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30), nn.Linear(30, 10))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[2].weight.mul_(1e3)
    total = 2000 + 1200 + 300
    record = prune_(model, 0.9, floor={"1.weight": 0.05, "*": 0.0}, cap={"2.*": 0.4})
    assert record.asked == record.removed == record.zeros == round(0.9 * total)
    kept = [layer.numel - layer.removed for layer in record.per_layer]
    assert kept == [350 - 60 - 120, 60, 120]
    assert [layer.note for layer in record.per_layer] == [
        "",
        "held at its floor of 60 weights",
        "held at its cap of 120 weights",
    ]
    assert record.threshold is None
    for layer, module in zip(record.per_layer, model, strict=True):
        assert layer.threshold == module.weight[module.weight != 0].abs().min().item()
    unheld = prune_([torch.ones(4, 4), torch.full((2, 2), 1e-3)], 0.2, cap=1.0)
    assert [(layer.removed, layer.note) for layer in unheld.per_layer] == [(0, ""), (4, "")]
    again = prune_(model, 0.9, floor={"1.weight": 0.05, "*": 0.0}, cap={"2.*": 0.4})
    assert again.pruned_now == 0


def test_masks_take_bounds_and_scores():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    masks = Masks.from_sparsity(model, 0.5, floor=0.4, cap=0.6)
    assert masks.kept == 100
    assert all(40 <= int(mask.sum()) <= 60 for _, mask in masks.items())
    model(torch.randn(4, 10)).square().sum().backward()
    by_gradient = Masks.from_sparsity(model, 0.5, score="gradient")
    for (_, mask), wanted in zip(by_gradient.items(), score_masks(model, 0.5, "gradient"), strict=True):
        assert torch.equal(mask, wanted)


def test_wrong_bounds():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    before = model[0].weight.detach().clone()
    for match, arguments in (
        (r"20 of 200 weights would stay, but floors and caps ask for 100 to 200: .* between 0 and 0.5", {"floor": 0.5}),
        (r"floor is a share of each layer's weights, in \[0, 1\], got 1.5", {"floor": 1.5}),
        (r"0.weight must keep 60 weights \(floor\) and may keep 50 \(cap\)", {"floor": 0.6, "cap": 0.5}),
        (r"floor: '2\.\*' matches none of 0.weight, 1.weight", {"floor": {"2.*": 0.1}}),
        (r'floor and cap are for scope "global"', {"floor": 0.1, "scope": "layer"}),
        (r"floor and cap don't go with LAMP", {"floor": 0.1, "score": "lamp"}),
    ):
        with pytest.raises(ValueError, match=match):
            prune_(model, 0.9, **arguments)
    assert torch.equal(model[0].weight, before)
