"""A threshold that a fused optimizer's step counts: equal to a pass over the weights, whatever happens in between."""

import copy
import pickle

import pytest
import reference_selection as ref
import torch
from conftest import DEVICE, needs_triton

import wcr_fast
from wcr_fast.optim import SGD, AdamW
from wcr_fast.optim.track import MAX_TRACKED

SPARSITIES = [0.0, 0.3, 0.9, 1.0]


def parameters(device, dtypes=(torch.float32,) * 4, *, rows=30):
    """Return weights with ties in channels_last, of one element, none, of so many rows; and a bias."""
    torch.manual_seed(3)
    made = [
        torch.randn(6, 4, 3, 3).mul(3).round().to(memory_format=torch.channels_last),
        torch.randn(1, 1),
        torch.empty(0, 3),
        torch.randn(rows, 50),
    ]
    params = [t.to(device, d, memory_format=torch.preserve_format) for t, d in zip(made, dtypes, strict=True)]
    bias = torch.randn(7, device=device)
    return [torch.nn.Parameter(p) for p in (*params, bias)]


def draw(params, number, scale=1.0):
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def wanted(weights, sparsity):
    """Return the smallest magnitude that stays, by a sort."""
    flat = torch.cat([w.detach().double().abs().cpu().reshape(-1) for w in weights])
    keep = ref.num_keep(sparsity, flat.numel())
    return flat.sort(descending=True).values[keep - 1].item() if keep else torch.inf


def check(tracked, weights, sparsities=SPARSITIES):
    assert tracked.threshold().tolist() == [wanted(weights, s) for s in sparsities]


@pytest.fixture
def passes(monkeypatch):
    """Record whether passes over the weights were asked for, and whether they began from counts."""
    from wcr_fast.triton_path import track

    asked = []
    for name in ("run", "settle"):
        original = getattr(track.Search, name)

        def spy(self, *args, _name=name, _original=original):
            asked.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(track.Search, name, spy)
    return asked


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("make", "dtypes"),
    [
        (lambda p: AdamW(p, lr=1e-2, penalty=wcr_fast.WCR([p[0], p[3]]), lam=1e-6), (torch.float32,) * 4),
        (lambda p: SGD(p, lr=1e-2, momentum=0.9), (torch.bfloat16,) * 4),
        (
            lambda p: AdamW(p, lr=1e-2, master="remainder"),
            (HALF, SINGLE, SINGLE, HALF),
        ),
        (lambda p: SGD(p, lr=1e-2), (torch.float16,) * 4),
        (lambda p: AdamW(p, lr=1e-2, amsgrad=True), (DOUBLE, SINGLE, SINGLE, SINGLE)),
    ],
    ids=["float32", "bfloat16", "remainder, mixed", "float16", "float64, mixed"],
)
def test_equals_a_sort_after_every_step(backend, device, make, dtypes):
    params = parameters(device, dtypes, rows=700)  # more than a chunk
    optimizer = make(params)
    tracked = optimizer.track_threshold(params[:4], SPARSITIES)
    check(tracked, params[:4])
    for number in range(2):
        draw(params, number)
        optimizer.step()
        check(tracked, params[:4])
    check(tracked, params[:4])  # asked twice


@needs_triton
def test_a_step_tells_without_a_pass(passes):
    params = parameters(DEVICE)
    with wcr_fast.backend("triton"):
        optimizer = AdamW(params, lr=1e-3)
        tracked = optimizer.track_threshold(params[:4], 0.9)
        for number in range(4):
            draw(params, number)
            optimizer.step()
            if number != 1:
                assert tracked.threshold().item() == wanted(params[:4], 0.9)
    assert passes == ["run", *["settle"] * 3]  # one pass says where the window lies


@needs_triton
def test_what_is_counted_settles_it_alone(monkeypatch):
    """Neither the resolve nor the passes behind it may read a weight where the cut is in its window."""
    from wcr_fast.triton_path import track

    params = parameters(DEVICE)
    with wcr_fast.backend("triton"):
        optimizer = SGD(params, lr=1e-3)
        tracked = optimizer.track_threshold(params[:4], [0.5, 0.9])
        draw(params, 0)
        optimizer.step()
        monkeypatch.setattr(track.Search, "passes", 1)  # of which the step has taken one
        assert tracked.threshold().tolist() == [wanted(params[:4], s) for s in (0.5, 0.9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1e-3, 40.0], ids=["down", "up"])
def test_thresholds_that_jump_out_of_their_windows(backend, device, dtype, factor):
    params = parameters(device, (dtype,) * 4)
    optimizer = SGD(params, lr=1.0)
    tracked = optimizer.track_threshold(params[:4], SPARSITIES)
    for number in range(3):
        for p in params:  # of the weights' own direction: all of them shrink, or grow
            p.grad = ((1 - factor ** (1 if number == 1 else -1 if number == 2 else 0)) * p.detach()).to(p.dtype)
        optimizer.step()
        check(tracked, params[:4])


def written(optimizer, params):
    with torch.no_grad():
        params[3].mul_(3)


def data_moved(optimizer, params):
    params[3].data = params[3].detach() * 3


def announced(optimizer, params):
    params[3].data.mul_(3)
    optimizer.weights_changed()


def loaded(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("disturb", [written, data_moved, announced, loaded])
def test_outside_writes_are_read(backend, device, disturb):
    params = parameters(device)
    optimizer = SGD(params, lr=1e-2, momentum=0.9)
    tracked = optimizer.track_threshold(params[:4], SPARSITIES)
    for number in range(2):
        draw(params, number)
        optimizer.step()
    disturb(optimizer, params)
    check(tracked, params[:4])
    draw(params, 2)
    optimizer.step()
    check(tracked, params[:4])


def test_weights_that_a_step_leaves_alone(backend, device):
    """Without a gradient, or where a scaler found an overflow, weights count as they are."""
    params = parameters(device)
    optimizer = AdamW(params, lr=1e-2)
    tracked = optimizer.track_threshold(params[:4], SPARSITIES)
    for number, missing in enumerate((None, 0, 3)):
        draw(params, number)
        if missing is not None:
            params[missing].grad = None
        optimizer.step()
        check(tracked, params[:4])
    draw(params, 5)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    before = params[3].detach().clone()
    optimizer.step()
    assert torch.equal(params[3], before)
    check(tracked, params[:4])


def test_weights_that_no_step_knows(backend, device):
    params = parameters(device)
    optimizer = SGD(params[:2], lr=1e-2)
    tracked = optimizer.track_threshold(params[:4], SPARSITIES)
    draw(params, 0)
    optimizer.step()
    check(tracked, params[:4])
    optimizer.add_param_group({"params": params[2:]})
    draw(params, 1)
    optimizer.step()
    check(tracked, params[:4])


def test_a_weight_given_twice_counts_twice(backend, device):
    params = parameters(device)
    optimizer = SGD(params, lr=1e-2)
    tracked = optimizer.track_threshold([params[0], params[3], params[0]], 0.4)
    draw(params, 0)
    optimizer.step()
    assert tracked.threshold().item() == wanted([params[0], params[3], params[0]], 0.4)


def test_a_parameter_that_the_optimizer_has_twice(backend, device):
    params = parameters(device)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SGD([params[0], params[3], params[0]], lr=1e-2)
    tracked = optimizer.track_threshold([params[0], params[3]], 0.4)
    draw(params, 0)
    optimizer.step()
    assert tracked.threshold().item() == wanted([params[0], params[3]], 0.4)


def test_parameters_that_share_memory(backend, device):
    base = torch.randn(40, 8, device=device)
    params = [torch.nn.Parameter(base), torch.nn.Parameter(base[:15])]
    optimizer = SGD(params, lr=0.3)
    tracked = optimizer.track_threshold(params[:1], 0.5)
    draw(params, 0)
    optimizer.step()
    assert tracked.threshold().item() == wanted(params[:1], 0.5)


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.half,
        torch.Tensor.double,
        lambda t: t[:10] * 1e-3,
        lambda t: t.bfloat16() / 99,
    ],
    ids=["bfloat16", "float16", "float64", "smaller", "bfloat16, outside"],
)
def test_weights_of_another_kind(backend, device, change):
    weight = torch.nn.Parameter(torch.randn(30, 50, device=device))
    optimizer = SGD([weight], lr=1e-2)
    tracked = optimizer.track_threshold([weight], SPARSITIES)
    draw([weight], 0)
    optimizer.step()
    weight.grad = None
    weight.data = change(weight.detach())
    check(tracked, [weight])
    for number in range(2):
        draw([weight], number)
        optimizer.step()
        check(tracked, [weight])
    with wcr_fast.backend("torch"):
        check(tracked, [weight])


@needs_triton
def test_a_step_that_breaks_off(monkeypatch):
    from wcr_fast.triton_path import step

    params = parameters(DEVICE)
    with wcr_fast.backend("triton"):
        optimizer = SGD(params, lr=1e-2)
        tracked = optimizer.track_threshold(params[:4], 0.5)
        draw(params, 0)
        optimizer.step()
        monkeypatch.setattr(step, "launch_step", None)
        with pytest.raises(TypeError):
            optimizer.step(lambda: 0.0)
        assert tracked.threshold().item() == wanted(params[:4], 0.5)


def test_weights_that_count_no_versions(backend, device):
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.randn(9, 8, device=device))
    optimizer = SGD([weight], lr=1e-2)
    tracked = optimizer.track_threshold([weight], 0.5)
    with torch.inference_mode():
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert tracked.threshold().item() == wanted([weight], 0.5)


def test_weights_with_gaps(backend, device):
    torch.manual_seed(0)
    whole = torch.randn(40, 60, device=device)
    params = [torch.nn.Parameter(whole[:, ::2]), torch.nn.Parameter(torch.randn(9, 8, device=device))]
    optimizer = SGD(params, lr=1e-2)
    tracked = optimizer.track_threshold(params, SPARSITIES)
    for number in range(2):
        draw(params, number)
        optimizer.step()
        check(tracked, params)


def test_masked_weights(backend, device):
    model = torch.nn.Linear(70, 40, device=device)
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    wcr_fast.Masks.from_sparsity(model, 0.7).keep(optimizer)
    tracked = optimizer.track_threshold(model, [0.5, 0.8])
    draw(list(model.parameters()), 0)
    optimizer.step()
    check(tracked, [model.weight], [0.5, 0.8])
    assert tracked.threshold()[0] == 0  # more than half of them are pruned


def test_nan_and_what_comes_after_it(backend, device):
    params = parameters(device)
    optimizer = SGD(params, lr=1e-2)
    tracked = optimizer.track_threshold(params[:4], 0.5)
    draw(params, 0)
    params[3].grad[5, 7] = torch.nan
    optimizer.step()
    if backend == "torch" and device.type == "cpu":
        with pytest.raises(ValueError, match=r"TrackedThreshold.threshold: weights\[3\] holds NaN"):
            tracked.threshold()
    else:
        assert tracked.threshold().isnan()
    with torch.no_grad():
        params[3].nan_to_num_(0.0)
    assert tracked.threshold().item() == wanted(params[:4], 0.5)
    draw(params, 1)
    optimizer.step()
    assert tracked.threshold().item() == wanted(params[:4], 0.5)


def test_steps_are_the_same_and_states_know_nothing(backend, device):
    runs = []
    for track in (False, True):
        params = parameters(device)
        optimizer = AdamW(params, lr=1e-2, penalty=wcr_fast.WCR([params[0], params[3]]), lam=1e-6)
        tracked = optimizer.track_threshold(params[:4], 0.9) if track else None
        for number in range(3):
            draw(params, number)
            optimizer.step()
        runs.append((params, optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1].keys() == runs[1][1].keys()
    assert runs[0][1]["param_groups"] == runs[1][1]["param_groups"]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._tracked is None
        draw([p for group in other.param_groups for p in group["params"]], 0)
        other.step()
    assert tracked.threshold().item() == wanted(params[:4], 0.9)


def test_another_one_and_an_end(backend, device):
    params = parameters(device)
    optimizer = SGD(params, lr=1e-2)
    first = optimizer.track_threshold(params[:4], 0.5)
    second = optimizer.track_threshold(params[3], 0.9)
    for end in (False, True):
        if end:
            first.remove()
            second.remove()
        draw(params, int(end))
        optimizer.step()
        assert first.threshold().item() == wanted(params[:4], 0.5)
        assert second.threshold().item() == wanted(params[3:4], 0.9)
    assert repr(second) == "TrackedThreshold(sparsity=0.9)"


@needs_triton
def test_counts_of_64_bits(monkeypatch):
    from wcr_fast.triton_path import track

    original = track.Search.histograms
    monkeypatch.setattr(track.Search, "histograms", lambda self: original(self).long())
    params = parameters(DEVICE)
    with wcr_fast.backend("triton"):
        optimizer = SGD(params, lr=1e-2)
        tracked = optimizer.track_threshold(params[:4], SPARSITIES)
        draw(params, 0)
        optimizer.step()
        check(tracked, params[:4])


@pytest.mark.cuda
def test_a_captured_step_counts():
    params = parameters("cuda")
    optimizer = AdamW(params, lr=torch.tensor(1e-3, device="cuda"))
    tracked = optimizer.track_threshold(params[:4], 0.9)
    draw(params, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
            tracked.threshold()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
        found = tracked.threshold()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert found.item() == wanted(params[:4], 0.9)


@needs_triton
def test_the_number_of_sparsities_is_the_kernels():
    from wcr_fast.kernels.track import MAX_CUTS

    assert MAX_CUTS == MAX_TRACKED


def test_bad_arguments():
    params = parameters("cpu")
    optimizer = SGD(params, lr=0.1)
    with pytest.raises(ValueError, match=r"SGD\.track_threshold: sparsity must be 1 to 5 numbers, got 6"):
        optimizer.track_threshold(params[:4], [0.1] * 6)
    with pytest.raises(ValueError, match="there are no weights"):
        optimizer.track_threshold([], 0.5)
    with pytest.raises(ValueError, match="sparsity is the fraction removed"):
        optimizer.track_threshold(params[:4], 1.5)
