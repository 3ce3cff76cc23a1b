"""Selection by scores against a stable sort of scores computed whole, on both backends; rows: test_score_lines."""

import math

import pytest
import reference_selection as ref
import torch
from torch import nn

import wcr_fast
from wcr_fast import Score, score_masks
from wcr_fast.score import inverse_rms

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def weights_and_numbers(dtype, device, per):
    """Contiguous, permuted, strided, tiny, empty and 0-d weights with many ties, and numbers beside them."""
    weights = [
        (torch.randn(60, 40) * 3).round(),
        (torch.randn(6, 5, 3, 3) * 3).round().to(memory_format=torch.channels_last),
        torch.randn(30, 16)[:, ::2],
        torch.randn(12, 20).t(),
        torch.randn(1, 1),
        torch.empty(0, 4),
        torch.tensor(2.0),
    ]
    weights = [w.to(dtype).to(device) for w in weights]
    numbers = []
    for w in weights:
        a = torch.randint(1, 4, w.shape).float() / 3
        if per == "column":
            a = torch.randint(1, 4, (w.shape[1] if w.dim() > 1 else 1,)).float() / 3
        elif per == "layer":
            a = torch.rand(()) + 0.5
        numbers.append(a.to(dtype).to(device))
    return weights, numbers


def wide(x):
    return x.detach().cpu().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


FORMULAS = {
    "gradient": ("element", lambda w, a: (w * a).abs()),
    "fisher": ("element", lambda w, a: (w * w) * a),
    "wanda": ("column", lambda w, a: w.abs() * a),
    "normalised": ("layer", lambda w, a: w.abs() * a),
}


def scores_of(name, weights, numbers):
    per, formula = FORMULAS[name]
    found = []
    for w, a in zip(weights, numbers, strict=True):
        w, a = wide(w), wide(a).to(wide(w).dtype)
        if per == "column" and w.dim():
            a = a.view([-1 if d == 1 else 1 for d in range(w.dim())])
        elif per == "column":
            a = a.view(())
        found.append(formula(w, a.expand(w.shape)))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_global_and_layer_scores_equal_a_stable_sort(name, dtype, backend, device):
    weights, numbers = weights_and_numbers(dtype, device, FORMULAS[name][0])
    scores = scores_of(name, weights, numbers)
    for scope in ("global", "layer"):
        for sparsity in (0.0, 0.4, 0.9, 1.0) if backend == "torch" else (0.4,):
            wanted = ref.masks(scores, sparsity, scope)
            found = score_masks(weights, sparsity, name, aux=numbers, scope=scope)
            assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True)), (scope, sparsity)
            assert all(m.is_contiguous() and m.dtype == torch.bool for m in found)


def test_mixed_dtypes_and_large_tensors(backend, device):
    weights = [
        torch.randn(300, 130).to(device),
        torch.randn(70, 90).bfloat16().to(device),
        torch.randn(40, 40).double(),
    ]
    weights = [w.to(device) for w in weights]
    numbers = [torch.rand(w.shape, device=device).to(w.dtype) for w in weights]
    for count in (2, 3):
        wanted = ref.masks(scores_of("fisher", weights[:count], numbers[:count]), 0.7)
        found = score_masks(weights[:count], 0.7, "fisher", aux=numbers[:count])
        assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))


def test_a_sampled_search_by_scores(backend, device, monkeypatch):
    if backend == "triton":
        from wcr_fast.triton_path import cuts

        monkeypatch.setattr(cuts, "SAMPLE_FROM", 1)
        monkeypatch.setattr(cuts, "SAMPLES", dict.fromkeys(cuts.SAMPLES, 1 << 12))
    weights = [
        torch.randn(200, 100).to(device),
        torch.randn(40, 6, 3, 3).to(memory_format=torch.channels_last).to(device),
    ]
    for name, (per, _) in FORMULAS.items():
        numbers = [
            torch.rand(w.shape if per == "element" else (w.shape[1],) if per == "column" else (), device=device)
            for w in weights
        ]
        wanted = ref.masks(scores_of(name, weights, numbers), 0.8)
        found = score_masks(weights, 0.8, name, aux=numbers)
        assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True)), name


def test_in_place_equals_masks_and_the_record_counts(backend, device):
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 3)).to(device).to(memory_format=layout)
        with torch.no_grad():
            model[0].weight[0] = 0.0
        gradients = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.dim() > 1}
        masks = score_masks(model, 0.6, "gradient", aux=gradients)
        before = [model[0].weight.detach().clone(), model[1].weight.detach().clone()]
        record = wcr_fast.prune_(model, 0.6, score="gradient", aux=gradients)
        for layer, mask, w in zip(model, masks, before, strict=True):
            assert torch.equal(layer.weight, torch.where(mask, w, 0.0))
        total = sum(w.numel() for w in before)
        assert record.asked == record.removed == round(0.6 * total)
        assert [r.removed for r in record.per_layer] == [int((~m).sum()) for m in masks]
        assert [r.zeros for r in record.per_layer] == [int((m.weight == 0).sum()) for m in model]
        pairs = zip(before, masks, gradients.values(), strict=True)
        assert record.threshold == min((w * g).abs()[m].min().item() for w, m, g in pairs)


def test_gradients_are_the_default_numbers():
    model = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"prune_: weight has no \.grad"):
        wcr_fast.prune_(model, 0.5, score="gradient")
    model(torch.randn(3, 6)).square().sum().backward()
    expected = ref.masks([(model.weight * model.weight.grad).abs()], 0.5)
    assert torch.equal(score_masks(model, 0.5, "gradient")[0], expected[0])


def test_wanda_is_magnitude_where_inputs_are_alike():
    weight = torch.randn(10, 12)
    found = score_masks(weight, 0.5, "wanda", aux=[torch.full((12,), 2.0)], scope="row")
    assert torch.equal(found[0], wcr_fast.magnitude_masks(weight, 0.5, scope="row")[0])


def test_normalised_ignores_a_layers_scale():
    weights = [torch.randn(30, 20), torch.randn(40, 50)]
    before = score_masks(weights, 0.7, "normalised")
    after = score_masks([weights[0] * 1024, weights[1] / 4096], 0.7, "normalised")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0], wcr_fast.magnitude_masks([weights[0] * 1024, weights[1]], 0.7)[0])
    assert score_masks([torch.zeros(4, 4)], 0.5, "normalised")[0].sum() == 8


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_layers_scale_has_no_order_and_is_right(scale):
    for dtype in (torch.float32, torch.float64):
        weight = (torch.randn(70, 90) * scale).to(dtype)
        shuffled = weight.view(-1)[torch.randperm(weight.numel())].view(90, 70).t()
        (one,), (other,) = inverse_rms([weight]), inverse_rms([shuffled])
        assert torch.equal(one, other)
        assert one.item() == pytest.approx(1 / weight.double().square().mean().sqrt().item(), rel=1e-6)
    assert inverse_rms([torch.zeros(3), torch.empty(0)]) == (torch.tensor(1.0), torch.tensor(1.0))
    assert inverse_rms([torch.tensor([1.0, math.inf])])[0].isnan()


def lamp(weight):
    """LAMP scores from the formula, in float64, one by one."""
    flat = weight.double().reshape(-1)
    order = torch.sort(flat.abs(), descending=True, stable=True).indices
    scores, total = torch.zeros_like(flat), 0.0
    for i in order.tolist():
        total += flat[i].item() ** 2
        scores[i] = flat[i].item() ** 2 / total if total else 0.0
    return scores.view(weight.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99])
def test_lamp_equals_its_formula(sparsity, backend, device):
    weights = [torch.randn(20, 30), torch.randn(8, 4, 3, 3) * 50, (torch.randn(10, 10) * 2).round()]
    wanted = ref.masks([lamp(w) for w in weights], sparsity)
    found = score_masks([w.to(device) for w in weights], sparsity, "lamp")
    assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))
    assert all(m.any() for m in found)


def test_lamp_ignores_scale_and_keeps_the_largest_of_each_layer():
    weights = [torch.randn(30, 20), torch.randn(40, 50)]
    before = score_masks(weights, 0.9, "lamp")
    after = score_masks([weights[0] * 1e3, weights[1] * 1e-3], 0.9, "lamp")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    last = score_masks(weights, 1 - 2 / 2600, "lamp")
    assert [int(m.sum()) for m in last] == [1, 1]
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    record = wcr_fast.prune_(model, 0.8, score="lamp")
    assert record.removed == round(0.8 * 900)


def test_a_score_of_ones_own(backend, device):
    mine = Score("cubic", lambda w, a: w.abs() ** 3 * a, per="layer")
    weights = [torch.randn(20, 30).to(device), torch.randn(7, 5).to(device)]
    found = score_masks(weights, 0.5, mine, aux=[1.0, 20.0])
    wanted = ref.masks([wide(w).abs() ** 3 * a for w, a in zip(weights, (1.0, 20.0), strict=True)], 0.5)
    assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))
    if backend == "triton":
        from score_kernels import square

        with_kernel = Score("square", lambda w, a: w * w + a, per="element", kernel=square)
        numbers = [torch.rand_like(w) for w in weights]
        wanted = ref.masks([wide(w) * wide(w) + wide(a) for w, a in zip(weights, numbers, strict=True)], 0.5)
        found = score_masks(weights, 0.5, with_kernel, aux=numbers)
        assert all(torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True))


def test_wrong_scores_and_numbers(backend, device):
    model = nn.Linear(4, 3, bias=False).to(device)
    weight = model.weight.detach()
    for scope, sparsity in (("global", 0.5), ("row", 0.5), ("2:4", None)):
        with pytest.raises(ValueError, match=r"a fisher score of weight is NaN or negative: it can't be ranked"):
            score_masks(model, sparsity, "fisher", aux=[-torch.ones_like(weight)], scope=scope)
        with pytest.raises(ValueError, match=r"a fisher score of weight is NaN"):
            score_masks(model, sparsity, "fisher", aux=[torch.full_like(weight, math.nan)], scope=scope)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"prune_: a wanda score of weight .* nothing was written"):
        wcr_fast.prune_(model, 0.5, score="wanda", aux=[-torch.ones(4)])
    assert torch.equal(model.weight, before)


def test_wrong_arguments():
    w = torch.randn(4, 3)
    for error, match, arguments in (
        (ValueError, "score must be one of magnitude, gradient", {"score": "obd"}),
        (TypeError, "score must be a name or a Score, got int", {"score": 3}),
        (ValueError, "score fisher needs aux: for each weight a tensor of its shape", {"score": "fisher"}),
        (ValueError, "score wanda needs aux: for each weight the norm of each input", {"score": "wanda"}),
        (ValueError, "aux has 2 tensors for 1 weights", {"score": "fisher", "aux": [w, w]}),
        (
            ValueError,
            r"aux of weights must be floating point, one number per element",
            {"score": "fisher", "aux": [w.t()]},
        ),
        (ValueError, r"one number per column", {"score": "wanda", "aux": [torch.ones(4)]}),
        (ValueError, r"aux has nothing for weights", {"score": "fisher", "aux": {"other": w}}),
        (ValueError, r"score 'magnitude' takes no aux", {"score": "magnitude", "aux": [w]}),
    ):
        with pytest.raises(error, match=match):
            score_masks(w, 0.5, **arguments)
    with pytest.raises(ValueError, match="per must be one of element, column, layer"):
        Score("x", lambda w, a: w, per="row")
    flat = Score("flat", lambda w, a: w.sum(), per="layer")
    with pytest.raises(ValueError, match=r"the formula must give torch\.float32 of the weight's shape"):
        score_masks(w, 0.5, flat, aux=[1.0])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    ],
    ids=["linear", "conv1d", "grouped", "reflect"],
)
def test_column_norms_are_those_of_the_unfolded_input(layer):
    """The output is a product of weight and columns: a weight that picks one column gives its norm."""
    shapes = {nn.Linear: (5, 6), nn.Conv1d: (2, 4, 11), nn.Conv2d: (2, 4, 9, 8)}
    batches = [torch.randn(shapes[type(layer)]) for _ in range(3)]
    found = wcr_fast.column_norms(layer, batches)["weight"]
    layer.double()
    with torch.no_grad():
        layer.bias.zero_()
        for column in range(found.numel()):
            layer.weight.zero_()
            layer.weight.view(len(layer.weight), -1)[:, column] = 1.0
            outs = [layer(b.double()) for b in batches]
            groups = getattr(layer, "groups", 1)
            per_group = len(layer.weight) // groups
            picked = [o.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)[::per_group] for o in outs]
            assert found[column].item() == pytest.approx(math.sqrt(sum(p.square().sum() for p in picked)), rel=1e-5)


def test_column_norms_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    norms = wcr_fast.column_norms(model, [torch.ones(3, 4), (torch.ones(2, 4),), {"input": torch.ones(1, 4)}])
    assert [m.training for m in model] == [True, True, False]
    assert norms["0.weight"].tolist() == pytest.approx([math.sqrt(6)] * 4)
    assert not model[0]._forward_pre_hooks
    score_masks(model, 0.5, "wanda", aux=norms, scope="row")
    with pytest.raises(ValueError, match="batches are empty"):
        wcr_fast.column_norms(model, [])
