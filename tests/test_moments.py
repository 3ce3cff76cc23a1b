"""layer_moments and concentration_penalty: values, derivatives, awkward input, registration."""

import sys

import pytest
import reference
import torch

import wcr_fast
from wcr_fast.backend import active_backend
from wcr_fast.ops import moments as ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# A layer of V = O(m^2): float32 sums of short rows, merged in float64, cost less than the rounding of the result.
RTOL = {torch.float32: 2**-23, torch.float64: 1e-13, torch.float16: 2**-23, torch.bfloat16: 2**-23}
# Written in the weight's dtype, a gradient carries that dtype's half ulp.
GRAD_RTOL = {torch.float32: 4e-6, torch.float64: 1e-11, torch.float16: 6e-4, torch.bfloat16: 8e-3}
SHAPES = [(0,), (), (1,), (7,), (33, 5), (16, 3, 3, 3), (4099,), (130, 1031)]


def interpreted(backend, device):
    """Interpreted programs take milliseconds each: fewer of them there."""
    return backend == "triton" and device.type == "cpu"


def make(shape, dtype, device, scale=0.05):
    return (torch.randn(shape) * scale).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1e-8, 0.0, 1e-2])
def test_values_match_the_formula(backend, device, dtype, r):
    weights = [make(s, dtype, device) for s in SHAPES]
    mean, var = wcr_fast.layer_moments(weights, r=r)
    want = [reference.moments(w, r) for w in weights]
    assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mean.shape == var.shape == (len(weights),)
    rtol = RTOL[dtype]
    torch.testing.assert_close(mean.double().cpu(), torch.stack([m for m, _ in want]), rtol=rtol, atol=0)
    for v, (m, wanted) in zip(var.double().tolist(), want, strict=True):
        # Half a unit of a magnitude is m / sigma times as much of its distance to the mean.
        spread = (m / wanted.sqrt()).item() if wanted > 0 else 0.0
        assert abs(v - wanted.item()) <= (3.0 + spread) * rtol * wanted.item() + 1e-30


def test_the_number_of_threads_changes_nothing():
    weights = [torch.randn(n) for n in (1000, 100_003, (1 << 18) + 511, 1_000_001)]
    weights.append(torch.randn(9_000_000, dtype=torch.float64))  # more rows than torch sums on one thread
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.stack(wcr_fast.layer_moments(weights)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_small_variance_is_accurate(backend, device, spread):
    """V = 1e-8 of m^2 and less: E[a^2] - m^2 in float32 would be noise."""
    w = (0.5 + spread * torch.randn(5000)).to(device)
    _, var = wcr_fast.layer_moments([w])
    _, want = reference.moments(w, 1e-8)
    # each magnitude is rounded to 2^-23 of 0.5 (2 ulp, the GPU's square root); against the spread, that is
    assert abs(var.item() / want.item() - 1) < 2 * 2**-23 * 0.5 / spread + 1e-5


def test_outlier_in_first_place(backend, device):
    """The first element is the pivot: far from all others it must not cost accuracy."""
    w = 0.01 * torch.randn(20000)
    w[0] = 50.0
    _, var = wcr_fast.layer_moments([w.to(device)])
    _, want = reference.moments(w, 1e-8)
    assert abs(var.item() / want.item() - 1) < 1e-5


@pytest.mark.parametrize("n", [1, 9, 1000, 1728, 1 << 20])
@pytest.mark.parametrize("value", [0.1, -0.3, 1e-20, 0.0])
def test_equal_magnitudes_have_zero_variance_and_gradient(backend, device, n, value):
    if interpreted(backend, device) and n == 1 << 20 and value != 0.1:
        pytest.skip("one large size is enough in the interpreter")
    w = torch.full((n,), value)
    w[::2] *= -1
    w = w.to(device).requires_grad_()
    mean, var = wcr_fast.layer_moments([w])
    assert var.item() == 0.0
    wcr_fast.concentration_penalty([w]).backward()
    assert torch.count_nonzero(w.grad) == 0
    assert mean.item() == pytest.approx(reference.magnitudes(w, 1e-8)[0].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1e-8, 0.0])
def test_gradient_of_the_penalty(backend, device, dtype, r):
    weights = [make(s, dtype, device).requires_grad_() for s in SHAPES[4:]]
    wcr_fast.concentration_penalty(weights, r=r).backward()
    _, want = reference.penalty_and_grads("wcr", weights, 1e-8, r)
    if dtype == torch.float16:  # 1/V^2 overflows half precision where the reference is beyond 65504
        want = [g.clamp(-65504, 65504) for g in want]
    for w, g in zip(weights, want, strict=True):
        assert w.grad.dtype == dtype
        assert reference.relative_error(w.grad.clamp(-65504, 65504), g) < GRAD_RTOL[dtype]


def test_mixed_dtypes_and_layouts(backend, device):
    base = make((6, 8, 5, 5), torch.float32, device)
    weights = [
        base.contiguous(memory_format=torch.channels_last),
        base.to(torch.bfloat16),
        base.double(),
        base[:, ::2],
        base.permute(3, 1, 0, 2),
        base.flatten()[1:],
        base[:1, :1].expand(4, 7, 5, 5),
    ]
    mean, var = wcr_fast.layer_moments(weights)
    assert mean.dtype == torch.float64
    for i, w in enumerate(weights):
        m, v = reference.moments(w.float() if w.dtype == torch.bfloat16 else w, 1e-8)
        assert mean[i].item() == pytest.approx(m.item(), rel=2e-6)
        assert var[i].item() == pytest.approx(v.item(), rel=2e-5)


def test_thousands_of_tiny_tensors(backend, device):
    count = 200 if interpreted(backend, device) else 3000
    flat = make((count * 5,), torch.float32, device)
    weights = list(flat.split(5))
    mean, var = wcr_fast.layer_moments(weights)
    a = reference.magnitudes(flat, 1e-8).cpu().view(count, 5)
    torch.testing.assert_close(mean.double().cpu(), a.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double().cpu(), a.var(1, unbiased=False), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_show(backend, device, bad):
    w = torch.ones(100)
    w[3] = bad
    mean, var = wcr_fast.layer_moments([torch.randn(5).to(device), w.to(device)])
    assert torch.isfinite(mean[0])
    assert torch.isfinite(var[0])
    assert not torch.isfinite(mean[1])
    assert not torch.isfinite(var[1])


def test_repeatable_bit_for_bit(backend, device):
    weights = [make(s, torch.float32, device) for s in SHAPES]
    first, second = wcr_fast.layer_moments(weights), wcr_fast.layer_moments(weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_result_does_not_depend_on_the_memory_format(backend, device):
    w = make((16, 8, 3, 3), torch.float32, device)
    last = w.contiguous(memory_format=torch.channels_last)
    a, b = wcr_fast.layer_moments([w]), wcr_fast.layer_moments([last])
    torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("r", [1e-8, 0.01, 0.0])
def test_gradcheck_and_gradgradcheck(backend, device, r):
    shapes = [(2, 2), (3,)] if interpreted(backend, device) else [(4, 3), (7,)]
    weights = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]

    def moments(*w):
        return wcr_fast.layer_moments(list(w), r=r)

    def psi(*w):
        return wcr_fast.concentration_penalty(list(w), eps=0.1, r=r)

    for function in (moments, psi):
        assert torch.autograd.gradcheck(function, weights)
        assert torch.autograd.gradgradcheck(function, weights)


def test_opcheck(backend, device):
    weights = [torch.randn(4, 3, device=device).requires_grad_(), torch.randn(9, device=device).requires_grad_()]
    torch.library.opcheck(torch.ops.wcr_fast.layer_moments.default, (weights, 1e-8))
    stats = torch.ops.wcr_fast.layer_moments(weights, 1e-8)[2].detach()
    slopes = [torch.randn(2, device=device).requires_grad_() for _ in range(2)]
    torch.library.opcheck(torch.ops.wcr_fast.layer_moments_backward.default, (weights, stats, *slopes, 1e-8))
    tensors = [w.detach() for w in weights]
    grads = [torch.zeros_like(t) for t in tensors]
    coef = torch.randn(3, 2, dtype=torch.float64, device=device)
    lam = torch.tensor(0.5, device=device)
    torch.library.opcheck(torch.ops.wcr_fast.add_moments_grad_.default, (grads, tensors, stats, coef, lam, 1e-8))


def test_compiles_fullgraph():
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(9, requires_grad=True)]
    compiled = torch.compile(wcr_fast.concentration_penalty, fullgraph=True, backend="aot_eager")
    compiled(weights).backward()
    got = [w.grad.clone() for w in weights]
    for w in weights:
        w.grad = None
    wcr_fast.concentration_penalty(weights).backward()
    assert all(torch.equal(g, w.grad) for g, w in zip(got, weights, strict=True))
    assert compiled([]).item() == 0.0


def test_empty_list_generator_and_single_tensor():
    mean, var = wcr_fast.layer_moments([])
    assert mean.shape == var.shape == (0,)
    assert wcr_fast.concentration_penalty([]).item() == 0.0
    assert wcr_fast.concentration_penalty([torch.zeros(0), torch.zeros(3, 0)]).item() == 0.0
    assert wcr_fast.layer_moments(torch.randn(3))[0].shape == (1,)
    assert wcr_fast.layer_moments(torch.randn(2) for _ in range(4))[0].shape == (4,)


def test_compiles_with_strided_weights():
    w = torch.randn(6, 8).t()[::2].detach().requires_grad_()
    compiled = torch.compile(wcr_fast.concentration_penalty, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled([w]), w)
    (want,) = torch.autograd.grad(wcr_fast.concentration_penalty([w]), w)
    assert torch.equal(got, want)


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    import threading

    w = torch.randn(5, 5, requires_grad=True)
    seen = []
    right = ops.path_for
    monkeypatch.setattr(ops, "path_for", lambda tensors: seen.append(active_backend()) or right(tensors))
    with wcr_fast.backend("torch"):
        psi = wcr_fast.concentration_penalty([w])
    thread = threading.Thread(target=psi.backward)
    thread.start()
    thread.join()
    assert seen == ["torch", "torch"]


def test_meta_tensors_give_shapes():
    mean, _ = wcr_fast.layer_moments([torch.empty(3, 3, device="meta")])
    assert mean.shape == (1,)
    assert mean.device.type == "meta"


@pytest.mark.parametrize(
    "bad",
    [torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.bool), 3.0],
)
def test_wrong_kinds_are_named(bad):
    with pytest.raises(TypeError, match=r"weights\[1\]"):
        wcr_fast.layer_moments([torch.ones(3), bad])


def test_wrong_constants_are_named():
    with pytest.raises(ValueError, match=r"layer_moments: r must"):
        wcr_fast.layer_moments([torch.ones(3)], r=-1.0)
    with pytest.raises(ValueError, match=r"0 or at least 1e-30"):
        wcr_fast.layer_moments([torch.ones(3)], r=1e-40)
    with pytest.raises(ValueError, match=r"eps must"):
        wcr_fast.concentration_penalty([torch.ones(3)], eps=float("nan"))


def test_sparse_tensor_is_refused():
    with pytest.raises(TypeError, match="layout"):
        wcr_fast.layer_moments([torch.eye(3).to_sparse()])


def test_bias_in_a_list_warns():
    model = torch.nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="1-d Parameter"):
        wcr_fast.layer_moments(model.parameters())


def test_backend_choice(monkeypatch):
    monkeypatch.setenv("WCR_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="WCR_FAST_BACKEND"):
        wcr_fast.layer_moments([torch.ones(3)])
    with pytest.raises(ValueError, match="backend must be"), wcr_fast.backend("cuda"):
        pass
    monkeypatch.setenv("WCR_FAST_BACKEND", "triton")
    monkeypatch.setattr(sys.modules["wcr_fast.backend"], "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="interpreter"):
        wcr_fast.layer_moments([torch.ones(3)])


def test_private_helpers_agree_on_dtype():
    assert ops.result_dtype([torch.ones(1), torch.ones(1).double()]) == torch.float64
