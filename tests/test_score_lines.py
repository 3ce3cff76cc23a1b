"""Scores in rows and n:m groups against a stable sort of scores computed whole, on both backends."""

import pytest
import reference_selection as ref
import torch
from torch import nn

import wcr_fast
from wcr_fast import Score, score_masks
from wcr_fast.torch_path import scores as torch_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMULAS = {
    "gradient": ("element", lambda w, a: (w * a).abs()),
    "fisher": ("element", lambda w, a: (w * w) * a),
    "wanda": ("column", lambda w, a: w.abs() * a),
    "normalised": ("layer", lambda w, a: w.abs() * a),
    "square": ("element", lambda w, a: w * w + a),
}


@pytest.fixture(autouse=True)
def only_this_backend(backend, monkeypatch):
    """Make the torch path fail where Triton's is under test."""
    if backend == "triton":
        monkeypatch.setattr(torch_scores, "apply_lines", None)


def score_of(name):
    """Return a score's name, or the score of one's own."""
    if name != "square":
        return name
    pytest.importorskip("triton")
    from score_kernels import square

    return Score("square", lambda w, a: w * w + a, per="element", kernel=square)


def ties(*shape):
    return (torch.randn(shape) * 2).round()


def numbers_for(weight, per, dtype=None):
    """Return few different numbers of the kind that a score needs, so that scores are often equal."""
    shape = weight.shape if per == "element" else (weight.shape[1] if weight.dim() > 1 else 1,)
    numbers = torch.rand(()) + 0.5 if per == "layer" else torch.randint(1, 4, shape) / 3
    return numbers.to(dtype or weight.dtype).to(weight.device)


def scores_of(name, weight, numbers):
    """Return scores by their formula, float32 (float64 for float64 weights)."""
    per, formula = FORMULAS[name]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, a = weight.detach().cpu().to(wide), numbers.detach().cpu().to(wide)
    if per == "column" and w.dim() > 1:
        unfolded = a.numel() != w.shape[1]
        a = a.view(1, *w.shape[1:]) if unfolded else a.view(1, -1, *[1] * (w.dim() - 2))
    elif per == "column":
        a = a.view(())
    return formula(w, a.expand(w.shape))


def check(name, weights, numbers, scope):
    sparsity = 0.4 if scope == "row" else None
    wanted = ref.masks([scores_of(name, w, a) for w, a in zip(weights, numbers, strict=True)], 0.4, scope)
    found = score_masks(weights, sparsity, score_of(name), aux=numbers, scope=scope)
    assert all(m.is_contiguous() and m.dtype == torch.bool for m in found)
    assert [torch.equal(m.cpu(), w) for m, w in zip(found, wanted, strict=True)] == [True] * len(weights)
    copies = [w.detach().clone() for w in weights]
    wcr_fast.prune_(weights, sparsity, scope=scope, score=score_of(name), aux=numbers)
    for weight, copy, keep in zip(weights, copies, wanted, strict=True):
        assert torch.equal(weight, torch.where(keep.to(weight.device), copy, 0.0))
        assert not weight[~keep.to(weight.device)].signbit().any()


CASES = [(name, scope, dtype) for name in FORMULAS for scope in ("row", "2:4") for dtype in DTYPES[:2]]
CASES += [("wanda", scope, dtype) for scope in ("row", "2:4") for dtype in DTYPES[2:]]
CASES += [("wanda", scope, torch.float32) for scope in ("1:4", "3:5", "8:16")]


@pytest.mark.parametrize(("name", "scope", "dtype"), CASES, ids=str)
def test_lines_equal_a_stable_sort(name, scope, dtype, backend, device):
    weights = [
        ties(5, 48),
        ties(4, 18, 3, 3).to(memory_format=torch.channels_last),
        ties(6, 20, 1, 1),
        ties(7, 72)[:, ::2],
        ties(37, 6).t(),
        ties(1, 1),
        torch.empty(0, 4),
        torch.tensor(-2.0),
    ]
    weights = [w.to(dtype).to(device) for w in weights]
    check(name, weights, [numbers_for(w, FORMULAS[name][0]) for w in weights], scope)


@pytest.mark.parametrize(
    ("name", "scope", "dtype"),
    [
        ("wanda", "2:4", torch.bfloat16),
        ("wanda", "8:16", torch.float32),
        ("gradient", "2:4", torch.float32),
        ("normalised", "2:4", torch.float32),
    ],
    ids=str,
)
def test_whole_chunks_of_groups(name, scope, dtype, backend, device):
    """Programs without masks, whose groups start inside a row and run through many, and those at the ends."""
    weights = [ties(460, 144), ties(4, 17_008), ties(130, 32, 3, 3).to(memory_format=torch.channels_last)]
    weights = [w.to(dtype).to(device) for w in (weights if name == "wanda" else weights[:1])]
    numbers = [numbers_for(w, FORMULAS[name][0], torch.float32 if name == "wanda" else dtype) for w in weights]
    check(name, weights, numbers, scope)


@pytest.mark.parametrize("scope", ["row", "2:4"])
def test_numbers_of_unfolded_columns(scope, backend, device):
    weights = [ties(6, 8, 3, 3).to(device), ties(6, 8, 3, 3).to(device).to(memory_format=torch.channels_last)]
    check("wanda", weights, [torch.randint(1, 4, (72,), device=device) / 3 for _ in weights], scope)


@pytest.mark.parametrize("scope", ["row", "2:4"])
@pytest.mark.parametrize("name", ["gradient", "wanda"])
def test_numbers_that_lie_otherwise_than_weights(name, scope, backend, device):
    weights = [ties(257, 128).to(device) for _ in range(4 if name == "gradient" else 2)]
    numbers = [numbers_for(w, FORMULAS[name][0]) for w in weights]
    numbers[0] = torch.cat([numbers[0].view(-1)[:1], numbers[0].view(-1)])[1:].view(numbers[0].shape)  # not aligned
    numbers[1] = torch.stack([numbers[1], numbers[1] + 1], -1)[..., 0]
    if name == "gradient":
        numbers[2] = numbers[2].t().contiguous().t()
        numbers[3] = numbers[3][:1].expand(257, 128)
    if scope == "row":
        weights, numbers = [w[:9] for w in weights], [a[:9] if name == "gradient" else a for a in numbers]
    check(name, weights, numbers, scope)


@pytest.mark.parametrize("scope", ["row", "2:4"])
def test_mixed_dtypes(scope, backend, device):
    weights = [ties(6, 16).to(device).to(dtype) for dtype in (*DTYPES, torch.float32)]
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float16]
    numbers = [(torch.rand(6, 16, device=device) + 0.1).to(dtype) for dtype in kinds]
    check("fisher", [w.clone() for w in weights], numbers, scope)
    check("fisher", [weights[0], weights[4]], [numbers[0], numbers[4]], scope)
    check("fisher", [weights[1]], [numbers[1].to(torch.float8_e4m3fn)], scope)


@pytest.mark.parametrize("scope", ["row", "2:4"])
@pytest.mark.parametrize("name", ["gradient", "wanda", "normalised"])
def test_transposed_convolutions_with_groups(name, scope, backend, device):
    layer = nn.ConvTranspose2d(16, 6, 3, groups=2, device=device)
    with torch.no_grad():
        layer.weight.copy_(ties(16, 3, 3, 3))
    per, formula = FORMULAS[name]
    shape = {"element": (16, 3, 3, 3), "column": (16,), "layer": ()}[per]
    numbers = (torch.randint(1, 4, shape) / 3).to(device)
    a = numbers.view(16, 1, 1, 1) if per == "column" else numbers
    scores = formula(layer.weight.detach(), a.expand(layer.weight.shape)).cpu()
    parts = [ref.rows(p, 0.4, out_dim=1) if scope == "row" else ref.nm(p, 2, 4, in_dim=0) for p in scores.chunk(2)]
    sparsity = 0.4 if scope == "row" else None
    (found,) = score_masks(layer, sparsity, name, aux=[numbers], scope=scope)
    assert torch.equal(found.cpu(), torch.cat(parts))


def test_what_triton_leaves_to_torch(backend, device, monkeypatch):
    """Groups larger than 16, and scores without a kernel."""
    monkeypatch.undo()
    weight = ties(4, 40).to(device)
    check("wanda", [weight.clone()], [numbers_for(weight, "column")], "9:20")
    plain = Score("plain", lambda w, a: w.abs() * a, per="layer")
    found = score_masks(weight, 0.4, plain, aux=[2.0], scope="row")
    assert torch.equal(found[0].cpu(), ref.rows(weight, 0.4))
