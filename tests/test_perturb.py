"""Norm, perturbation and restoring as multi-tensor ops, on both paths, against float64."""

import pytest
import torch
from conftest import CUDA

from wcr_fast.ops.perturb import ascend_, local_grad, restore_, squares
from wcr_fast.slots import Site

SHAPES = [(), (1,), (7,), (33, 1000), (32768,), (32769,), (3, 5, 3, 3), (0, 4)]


def tensors(device, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def sites_of(weights, rho=0.3, eta=-1.0):
    return [Site(w, w, torch.empty_like(w), rho, eta) for w in weights]


def scales(w, eta, keep_zeros):
    t = torch.ones_like(w) if eta < 0 else w.abs() + eta
    return torch.where(w == 0, torch.zeros_like(t), t) if keep_zeros else t


def expected(weights, grads, rho, eta, keep_zeros):
    """Squares and perturbed weights, float64."""
    ws, gs = [w.double() for w in weights], [g.double() for g in grads]
    ts = [scales(w, eta, keep_zeros) for w in ws]
    total = sum(((t * g) ** 2).sum() for t, g in zip(ts, gs, strict=True))
    return total, [w + rho * t * t * g / (total.sqrt() + 1e-12) for w, t, g in zip(ws, ts, gs, strict=True)]


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("eta", [-1.0, 0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_float64(backend, device, dtype, eta, keep_zeros):
    weights, grads = tensors(device, dtype), [g.flip(0) if g.dim() else g for g in tensors(device, dtype)]
    weights[3][:, ::3] = 0.0
    before = [w.clone() for w in weights]
    total, moved = expected(weights, grads, 0.3, eta, keep_zeros)
    sites = sites_of(weights, eta=eta)
    found = squares(sites, grads, keep_zeros)
    assert found.dtype == torch.float64
    assert abs(found.sum().item() / total.item() - 1) < (1e-12 if dtype == torch.float64 else 3e-6)
    ascend_(sites, grads, found, keep_zeros, [])
    for w, old, new in zip(weights, before, moved, strict=True):
        bound = torch.finfo(dtype).eps * new.abs() + 1e-6 * (new - old).abs() + 2 * torch.finfo(dtype).tiny
        assert ((w.double() - new).abs() <= bound + (1e-7 if dtype == torch.float16 else 0)).all()
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_lists_of_several_dtypes_share_one_norm(backend, device):
    weights = (
        tensors(device, shapes=[(40, 30)])
        + tensors(device, torch.bfloat16, [(70,)])
        + tensors(device, torch.float64, [(9, 2)])
    )
    grads = [torch.randn_like(w) for w in weights]
    before = [w.clone() for w in weights]
    _, moved = expected(weights, grads, 0.3, -1.0, False)
    sites = sites_of(weights)
    ascend_(sites, grads, squares(sites, grads, False), False, [])
    for w, new in zip(weights, moved, strict=True):
        assert torch.allclose(w.double(), new, rtol=torch.finfo(w.dtype).eps, atol=1e-6)
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_gradients_of_another_dtype(backend, device):
    weights = tensors(device, torch.bfloat16, [(64, 30), (5,)])
    grads = [torch.randn(w.shape, device=device) for w in weights]
    before, (_, moved) = [w.clone() for w in weights], expected(weights, grads, 0.3, -1.0, False)
    sites = sites_of(weights)
    ascend_(sites, grads, squares(sites, grads, False), False, [])
    for w, new in zip(weights, moved, strict=True):
        assert torch.allclose(w.double(), new, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_layouts(backend, device):
    """channels_last, gradients laid out otherwise, misaligned views, and elements with gaps."""
    store = torch.randn(5000, device=device)
    wide = torch.randn(20, 60, device=device)
    weights = [
        torch.randn(8, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 4, 3, 3, device=device).contiguous(memory_format=torch.channels_last),
        store[1:4098],
        wide[:, ::2],
        torch.randn(30, 20, device=device).t(),
    ]
    grads = [torch.randn(w.shape, device=device) for w in weights]
    grads[1] = grads[1].contiguous(memory_format=torch.channels_last)
    before, untouched = [w.clone() for w in weights], wide[:, 1::2].clone()
    _, moved = expected(weights, grads, 0.3, -1.0, False)
    sites = sites_of(weights)
    ascend_(sites, grads, squares(sites, grads, False), False, [])
    for w, new in zip(weights, moved, strict=True):
        assert torch.allclose(w.double(), new, rtol=1e-6, atol=1e-7)
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    assert torch.equal(wide[:, 1::2], untouched)


def test_undivided(backend, device):
    weights, grads = tensors(device), tensors(device)
    moved = [w.double() + 0.3 * g.double() for w, g in zip(weights, grads, strict=True)]
    ascend_(sites_of(weights), grads, None, False, [])
    assert all(torch.allclose(w.double(), m, rtol=1e-6, atol=1e-7) for w, m in zip(weights, moved, strict=True))


def test_zero_gradients_move_nothing(backend, device):
    weights = tensors(device)
    before = [w.clone() for w in weights]
    sites, grads = sites_of(weights), [torch.zeros_like(w) for w in weights]
    ascend_(sites, grads, squares(sites, grads, False), False, [])
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_restores_after_what_is_not_finite(backend, device, value):
    weights, grads = tensors(device), tensors(device)
    grads[3][0, 0] = value
    before, sites = [w.clone() for w in weights], sites_of(weights)
    found = squares(sites, grads, False)
    assert not torch.isfinite(found.sum())
    ascend_(sites, grads, found, False, [])
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_masks_gradients_of_zero_weights(backend, device):
    weights = [torch.tensor([[0.0, 2.0], [-0.0, 1.0]], device=device), torch.zeros(3, device=device)]
    weights.append(torch.zeros(4, 3, 2, 2, device=device).contiguous(memory_format=torch.channels_last))
    grads = [torch.ones_like(w, memory_format=torch.contiguous_format) for w in weights]
    sites = sites_of(weights)
    for site in sites:
        site.saved.fill_(7.0)
    restore_(sites, [grads[0], None, grads[2]])
    assert grads[0].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert grads[1].tolist() == [1.0, 1.0, 1.0]
    assert not grads[2].any()
    assert all((w == 7.0).all() for w in weights)


def test_repeatable_and_the_same_for_any_number_of_threads():
    weights, grads = tensors("cpu"), tensors("cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(squares(sites_of(weights), grads, False).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1


def test_thousands_of_small_tensors(backend, device):
    count = 200 if backend == "triton" and not CUDA else 2000  # interpreted, a program takes milliseconds
    weights = [torch.randn(n % 5 + 1, device=device) for n in range(count)]
    grads = [torch.randn_like(w) for w in weights]
    before, sites = [w.clone() for w in weights], sites_of(weights)
    total, _ = expected(weights, grads, 0.3, -1.0, False)
    found = squares(sites, grads, False)
    assert abs(found.sum().item() / total.item() - 1) < 1e-6
    ascend_(sites, grads, found, False, [])
    restore_(sites)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_autograd_notices():
    w = torch.randn(3, 3, requires_grad=True)
    loss = (w * w).sum()
    sites = [Site(w, w.detach(), torch.empty(3, 3), 0.1)]
    with torch.no_grad():
        ascend_(sites, [torch.ones(3, 3)], None, False, [])
        restore_(sites)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        local_grad(embedding.weight)
