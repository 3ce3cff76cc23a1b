"""The Triton path below the ops: tables, layouts, alignment, many and tiny tensors, repeatability."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, TRITON_SKIP

if TRITON_SKIP:
    pytest.skip(TRITON_SKIP, allow_module_level=True)

from wcr_fast.kernels.launch import CHUNK, float_pair

import wcr_fast
import wcr_fast.table as tables
from wcr_fast.torch_path import moments as torch_moments
from wcr_fast.torch_path.cuts import Cuts
from wcr_fast.triton_path import moments, select

FP32 = torch.float32


def normal(*shape, dtype=FP32):
    return torch.randn(*shape).to(DEVICE, dtype)


def mean_and_var(tensor, r=1e-8):
    a = (tensor.double().square() + r).sqrt()
    return a.mean().item(), a.var(unbiased=False).item()


def kept(flat, count):
    """Mask of the ``count`` largest magnitudes; of equal ones the earlier."""
    order = torch.sort(flat.double().abs(), descending=True, stable=True).indices
    return torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device).index_fill_(0, order[:count], True)


def masks_at(tensors, counts):
    cuts = select.find_cuts(tensors, counts)
    out = [torch.empty(t.shape, dtype=torch.bool, device=DEVICE) for t in tensors]
    select.apply(tensors, cuts, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP32, torch.float64])
@pytest.mark.parametrize("numel", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1])
def test_misaligned_views_give_the_same_moments(dtype, numel):
    storage = normal(numel + 1, dtype=dtype)
    shifted = storage[1:]
    assert shifted.data_ptr() % 16
    aligned = shifted.clone()
    stats, _ = moments.layer_moments([shifted, aligned], 1e-8)
    mean, var = mean_and_var(aligned)
    assert stats[0].tolist() == pytest.approx([mean, mean], rel=1e-6)
    assert stats[1].tolist() == pytest.approx([var, var], rel=1e-6, abs=1e-18)


def test_misaligned_gradients_and_weights():
    weight = normal(CHUNK + 5)[1:]
    grad = torch.zeros(CHUNK + 8, device=DEVICE)
    before = grad.clone()
    stats, coef = moments.layer_moments([weight], 0.0, ("l1", 0.0))
    moments.add_grad_([grad[3:-1]], [weight], stats, coef, 0.5, 0.0)
    assert torch.equal(grad[3:-1], 0.5 * weight.sign())
    assert torch.equal(grad[:3], before[:3])
    assert torch.equal(grad[-1:], before[-1:])


def test_misaligned_selection():
    weight = normal(CHUNK + 9)[1:]
    masks = masks_at([weight], [[CHUNK // 3]])
    assert torch.equal(masks[0], kept(weight, CHUNK // 3))
    pruned = torch.cat([weight[:1], weight])[1:]
    select.apply([pruned], select.find_cuts([pruned], [[CHUNK // 3]]))
    assert torch.equal(pruned, torch.where(masks[0], weight, 0.0))


def test_gradient_in_another_layout_than_its_weight():
    weight = normal(3, 4, 2, 2).to(memory_format=torch.channels_last)
    stats, coef = moments.layer_moments([weight], 1e-8, ("wcr", 1e-8))
    (written,) = moments.grads([weight], stats, coef, 1e-8)
    assert written.stride() == weight.stride()
    plain = torch.zeros(weight.shape, device=DEVICE)
    strided = torch.zeros(3, 4, 2, 4, device=DEVICE)[..., ::2]
    for grad in (plain, strided):
        moments.add_grad_([grad], [weight], stats, coef, 1.0, 1e-8)
        torch.testing.assert_close(grad, written, rtol=0, atol=0, check_stride=False)


@pytest.mark.parametrize("path", [moments, torch_moments], ids=["triton", "torch"])
@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("weight_dtype", "grad_dtype"),
    [
        (torch.bfloat16, FP32),
        (FP32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (FP32, torch.float64),
        (torch.float64, FP32),
    ],
)
def test_gradient_of_another_dtype_than_its_weight(path, lam, weight_dtype, grad_dtype):
    lam = lam.to(DEVICE) if isinstance(lam, torch.Tensor) else lam
    strided = normal(9, 8, dtype=weight_dtype)[:, ::2]
    weights = [normal(300, dtype=weight_dtype), normal(4, 6, dtype=weight_dtype).t(), strided, normal(0), normal(20)]
    stats = coef = None
    if path is moments:
        stats, coef = path.layer_moments(weights, 1e-8, ("wcr", 1e-8))
    else:
        stats, _ = path.layer_moments(weights, 1e-8)
        coef = torch.stack([1 / (stats[1] + 1e-8), 0 * stats[1], -((stats[1] + 1e-8) ** -2)])
    guarded = [torch.ones(w.numel() + 64, dtype=grad_dtype, device=DEVICE) for w in weights[:4]]
    grads = [g[32:-32].view(w.shape) for g, w in zip(guarded, weights, strict=False)]
    grads.append(torch.ones_like(weights[4]))
    path.add_grad_(grads, weights, stats, coef, lam, 1e-8)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, FP32: 1e-5, torch.float64: 1e-5}
    for w, grad in zip(weights, grads, strict=True):
        if w.numel():
            x = w.double()
            a = (x.square() + 1e-8).sqrt()
            var = a.var(unbiased=False)
            wanted = 1 - 0.25 * 2 / w.numel() / (var + 1e-8) ** 2 * x / a * (a - a.mean())
            error = (grad.double() - wanted).abs().max() / wanted.abs().max()
            # The torch path may round to the weight's dtype on the way where the layouts differ.
            rounded = (grad.dtype, w.dtype) if path is torch_moments else (grad.dtype,)
            assert error <= max(tolerance[dtype] for dtype in rounded)
    assert all((g[:32] == 1).all() and (g[-32:] == 1).all() for g in guarded)


@pytest.mark.parametrize("grad_dtype", [FP32, torch.float64])
def test_equal_magnitudes_give_zero_in_a_gradient_of_another_dtype(grad_dtype):
    weight = torch.full((1000,), 0.3, dtype=torch.bfloat16 if grad_dtype == FP32 else FP32, device=DEVICE)
    weight[::3] *= -1
    stats, coef = moments.layer_moments([weight], 1e-8, ("wcr", 1e-8))
    grad = torch.zeros(1000, dtype=grad_dtype, device=DEVICE)
    moments.add_grad_([grad], [weight], stats, coef, 1.0, 1e-8)
    assert not grad.any()


def test_gradient_on_another_device_than_its_weight():
    weight = normal(5)
    stats, coef = moments.layer_moments([weight], 1e-8, ("wcr", 1e-8))
    with pytest.raises(ValueError, match=r"grads\[1\] is on meta"):
        moments.add_grad_([normal(5), weight.to("meta")], [weight, weight], stats, coef, 1.0, 1e-8)


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0, 0.0], [1e-100, 3e-100], [1.0, 3.0]])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(
    "member", [wcr_fast.HoyerSquare, wcr_fast.RelativeConcentration, wcr_fast.LogConcentration], ids=lambda m: m.family
)
def test_coefficients_are_those_of_the_torch_path(member, eps, values):
    weights = [torch.tensor(values, dtype=torch.float64, device=DEVICE), normal(50)]
    stats, coef = moments.layer_moments(weights, 0.0, (member.family, eps))
    penalty = member([normal(50)], eps=eps)
    numel = torch.tensor([len(values), 50.0], dtype=torch.float64, device=DEVICE)
    wanted = torch.stack(penalty.derivatives(stats[0], stats[1], numel, float(numel.sum())))
    assert coef.isfinite().all()
    torch.testing.assert_close(coef, wanted, rtol=1e-12, atol=0)


def test_a_table_is_built_once_and_again_when_something_moved(monkeypatch):
    weights = [normal(5), normal(CHUNK + 1), normal(0)]
    positions = [0, 1]
    first = tables.build_table(weights[:2], positions, CHUNK)
    assert tables.build_table(list(weights[:2]), positions, CHUNK) is first
    assert tables.build_table([w.detach() for w in weights[:2]], positions, CHUNK) is first
    assert first.block_to_tensor.tolist() == [0, 1, 1]
    assert first.rows[:, 1:].tolist() == [[5, 0, 0], [CHUNK + 1, 1, 1]]
    moved = tables.build_table([weights[0].clone(), weights[1]], positions, CHUNK)
    assert moved is not first
    assert tables.build_table(weights[:2], [0, 2], CHUNK) is not first


def test_addresses_are_sent_again_only_when_they_changed(monkeypatch):
    weights = [normal(5), normal(6)]
    grads = [normal(5), normal(6)]
    table = tables.build_table(weights, [0, 1], CHUNK)
    sent = table.addresses(grads)
    assert sent.tolist() == [g.data_ptr() for g in grads]
    monkeypatch.setattr(tables, "upload", lambda *_: pytest.fail("sent again"))
    assert table.addresses([g.detach() for g in grads]) is sent


def test_nothing_is_made_while_a_graph_is_captured(monkeypatch):
    weights, grads = [normal(6)], [normal(6)]
    other, more = [normal(7)], [normal(6)]
    table = tables.build_table(weights, [0], CHUNK)
    scratch, sent = table.scratch("counters", 1, torch.int32), table.addresses(grads)
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    monkeypatch.setattr(tables, "_captured", {})
    for make in (
        lambda: tables.build_table(other, [0], CHUNK),
        lambda: table.scratch("partials", 2, torch.float64),
        lambda: table.addresses(more),
    ):
        with pytest.raises(RuntimeError, match="run the op once on the capture stream before capturing"):
            make()
    # What is there may be used, and stays as long as the graph may be replayed.
    assert tables.build_table(weights, [0], CHUNK) is table
    assert table.scratch("counters", 1, torch.int32) is scratch
    assert table.addresses(grads) is sent
    assert [kept is used for kept, used in zip(tables._captured.values(), (table, sent), strict=True)] == [True, True]
    monkeypatch.undo()
    built = tables.build_table(other, [0], CHUNK)
    assert built.rows[0].tolist() == [other[0].data_ptr(), 7, 0, 0]
    assert table.addresses(more).tolist() == [more[0].data_ptr()]


@pytest.mark.cuda
def test_a_captured_penalty_replays():
    weights = [torch.nn.Parameter(normal(*shape)) for shape in ((300, 200), (64, 3, 3, 3))]
    penalty = wcr_fast.WCR(weights, lam=0.5)
    for w in weights:
        w.grad = torch.zeros_like(w)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    refused = pytest.raises(RuntimeError, match="run the op once on the capture stream before capturing")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        penalty.add_grad_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        penalty.add_grad_()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        penalty.add_grad_()
    tables._build.cache_clear()  # the graph must not depend on the cache
    with torch.no_grad():
        for w in weights:
            w.mul_(1.5)
    for w in weights:
        w.grad.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [w.grad.clone() for w in weights]
    for w in weights:
        w.grad.zero_()
    penalty.add_grad_()
    for w, got in zip(weights, replayed, strict=True):
        torch.testing.assert_close(got, 2 * w.grad)


def test_scratch_is_left_ready_for_the_next_call():
    weights = [normal(3 * CHUNK + 1), normal(10)]
    first, _ = moments.layer_moments(weights, 1e-8)
    table = tables.build_table(weights, [0, 1], CHUNK)
    assert not table.scratch("counters", 2, torch.int32).any()
    again, _ = moments.layer_moments(weights, 1e-8)
    assert torch.equal(first, again)


def test_empty_tensors_leave_their_columns_zero():
    weights = [normal(0), normal(4, 3), normal(0, 5)]
    stats, coef = moments.layer_moments(weights, 1e-8, ("wcr", 1e-8))
    assert not stats[:, [0, 2]].any()
    assert not coef[:, [0, 2]].any()
    assert stats[0, 1].item() == pytest.approx(mean_and_var(weights[1])[0], rel=1e-6)
    assert [g.shape for g in moments.grads(weights, stats, coef, 1e-8)] == [w.shape for w in weights]
    cuts = select.find_cuts([normal(0)], [[0]])
    assert cuts.ties.item() == 0


def test_many_tiny_tensors_beside_a_large_one_take_one_launch(monkeypatch):
    launches = []
    launch = moments.launch_moments
    monkeypatch.setattr(moments, "launch_moments", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    count = 2000 if DEVICE == "cuda" else 100  # interpreted, every program takes milliseconds
    weights = [normal(1 + i % 7) for i in range(count)] + [normal(2 * CHUNK + 3)]
    stats, _ = moments.layer_moments(weights, 1e-8)
    assert len(launches) == 1
    for i in (0, 1, 6, count - 1, count):
        mean, var = mean_and_var(weights[i])
        assert stats[0, i].item() == pytest.approx(mean, rel=1e-6)
        assert stats[1, i].item() == pytest.approx(var, rel=1e-5, abs=1e-14)


def test_offsets_beyond_two_to_the_31():
    # One strided row of a table whose memory offsets exceed 32 bits, read through a fake base address: element i
    # of the layout lies i * stride elements on, and the base is moved back by what the first index skips.
    size, stride, skip = 4, 1 << 30, 1 << 33
    weight = normal(1)
    layout = select._layout((2, size), (stride, 0))
    assert layout[0] == 2
    entry = (2 * size, 0, *layout)
    base = weight.data_ptr() - 4 * skip
    table = tables._build(weight.device, FP32, 0, CHUNK, (0,), ((base, *entry),))
    assert table.rows.dtype == torch.int64
    assert table.rows[0, 0].item() + 4 * skip == weight.data_ptr()
    # Chunk numbers and starts of a tensor with more than 2^31 elements.
    huge = tables._build(weight.device, FP32, 0, CHUNK, (0, 1), ((0, 3 << 31), (0, 5)))
    assert huge.num_chunks == (3 << 31) // CHUNK + 1
    assert huge.rows[1, 2].item() == (3 << 31) // CHUNK


def test_layouts_merge_dimensions():
    assert select._layout((2, 3, 4), (12, 4, 1))[:2] == (1, 24)
    assert select._layout((), ())[:2] == (1, 1)
    assert select._layout((5, 1, 2), (2, 99, 1))[:2] == (1, 10)
    channels_last = normal(2, 3, 4, 5).to(memory_format=torch.channels_last)
    layout = select._layout(channels_last.shape, channels_last.stride())
    assert layout[:4] == (3, 20, 3, 2)
    with pytest.raises(ValueError, match="more than 8; make it contiguous"):
        select._layout((2,) * 9, tuple(2**k for k in range(9)))


def test_ties_in_a_permuted_tensor_follow_logical_order():
    weight = normal(CHUNK // 64, 8, 3, 3).mul(2).round().to(memory_format=torch.channels_last)
    weights = [normal(50).mul(2).round(), weight, normal(40).mul(2).round()]
    flat = torch.cat([w.reshape(-1) for w in weights])
    for count in (flat.numel() // 10, flat.numel() // 2):
        masks = masks_at(weights, [[count]])
        assert torch.equal(torch.cat([m.reshape(-1) for m in masks]), kept(flat, count))


def test_every_cut_of_several_sparsities_equals_its_own():
    weights = [normal(3000).mul(8).round(), normal(500, dtype=torch.bfloat16)]
    counts = [3500, 3000, 1234, 1, 0]
    together = select.find_cuts(weights, [counts])
    for q, count in enumerate(counts):
        alone = select.find_cuts(weights, [[count]])
        assert together.key[0, q] == alone.key[0, 0]
        assert together.ties[0, q] == alone.ties[0, 0]


def test_nothing_is_written_in_place_beside_a_nan():
    weights = [normal(10), normal(10)]
    weights[1][3] = torch.nan
    before = [w.clone() for w in weights]
    cuts = select.find_cuts(weights, [[4]])
    assert cuts.bad.tolist() == [False, True]
    select.apply(weights, cuts)
    rows = select.apply_rows([w.view(1, 10) for w in weights[1:]], [2])
    assert rows.tolist() == [True]
    for weight, old in zip(weights, before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=0, equal_nan=True)


def test_nan_just_behind_the_end_is_not_seen():
    storage = normal(CHUNK + 40)
    storage[33:] = torch.nan
    stats, _ = moments.layer_moments([storage[:33]], 1e-8)
    assert stats.isfinite().all()
    assert not select.find_cuts([storage[:33]], [[3]]).bad.any()


def test_cuts_per_tensor():
    weights = [normal(60).mul(4).round(), normal(9, 7), normal(0), normal(30)]
    counts = [[20], [0], [0], [30]]
    for mask, weight, (count,) in zip(masks_at(weights, counts), weights, counts, strict=True):
        assert torch.equal(mask.reshape(-1), kept(weight.reshape(-1), count))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (1, 2), (3, 8), (11, 16)])
def test_nm_in_every_layout(n, m):
    dense = normal(6, 4 * m + 1).mul(3).round()
    for weight, dim in (
        (dense, 1),
        (dense[:, :-1].contiguous(), 1),
        (dense.t().contiguous(), 0),
        (normal(3, 2 * m, 3, 3).mul(3).round().to(memory_format=torch.channels_last), 1),
    ):
        out = torch.empty(weight.shape, dtype=torch.bool, device=DEVICE)
        select.apply_nm([weight.movedim(dim, -1)], n, m, [out.movedim(dim, -1)])
        groups = weight.movedim(dim, -1).unfold(-1, m, m)
        masks = out.movedim(dim, -1).unfold(-1, m, m)
        wanted = torch.stack([kept(g, n) for g in groups.reshape(-1, m)]).view(groups.shape)
        assert torch.equal(masks, wanted)
        assert out.movedim(dim, -1)[..., weight.shape[dim] // m * m :].all()
        pruned = weight.clone()
        select.apply_nm([pruned.movedim(dim, -1)], n, m)
        assert torch.equal(pruned, torch.where(out, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_n_of_sixteen(dtype):
    """Groups of 9 to 16 are ranked by a network of comparisons: ties, and every n."""
    weight = torch.randint(-3, 4, (40, 16)).to(DEVICE, dtype)
    weight[:4], weight[4:8] = 0.0, torch.arange(16)
    for n, m in [*((n, 16) for n in range(1, 17)), (4, 9), (9, 10), (13, 15)]:
        groups = weight[:, :m].contiguous()
        out = torch.empty(groups.shape, dtype=torch.bool, device=DEVICE)
        select.apply_nm([groups], n, m, [out])
        assert torch.equal(out, torch.stack([kept(g, n) for g in groups])), (n, m)


def test_nm_groups_are_at_most_sixteen():
    with pytest.raises(ValueError, match="m up to 16, got 32; use backend 'torch'"):
        select.apply_nm([normal(4, 64)], 2, 32)


def test_survey_counts_zeros_and_finds_nan():
    weights = [normal(100).round(), normal(CHUNK + 3).mul(2).round(), normal(5), normal(0)]
    weights[2][1] = torch.nan
    zeros, bad = select.survey(weights)
    assert zeros.tolist() == [(w == 0).sum().item() for w in weights]
    assert bad.tolist() == [False, False, True, False]


def test_two_runs_give_the_same_bits():
    weights = [normal(2 * CHUNK + 100), normal(777, dtype=torch.bfloat16)]
    runs = []
    for _ in range(2):
        stats, coef = moments.layer_moments(weights, 1e-8, ("log", 1e-8))
        grads = moments.grads(weights, stats, coef, 1e-8)
        cuts: Cuts = select.find_cuts(weights, [[1000, 5000]])
        runs.append([stats, coef, *grads, cuts.key, cuts.ties])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-5, 0.1, 1 / 3, 12345.678, -2.5e-7])
def test_scalars_keep_48_bits(value):
    high, low = float_pair(value)
    assert np.float32(high) == high
    assert float(np.float32(high)) + float(np.float32(low)) == pytest.approx(value, rel=2**-47, abs=1e-45)
