"""The one-pass window on Triton: samples, warm starts, misses, every way of counting, ties with and without counts."""

import dataclasses

import pytest
import reference_selection as ref
import torch
from conftest import CUDA, DEVICE, TRITON_SKIP

if TRITON_SKIP:
    pytest.skip(TRITON_SKIP, allow_module_level=True)

from wcr_fast.kernels import count, window
from wcr_fast.kernels.launch import CHUNK
from wcr_fast.kernels.window import Counting

from wcr_fast.triton_path import cuts, select

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[1 << 16, 1 << 9], ids=["good sample", "poor sample"])
def sample(request, monkeypatch):
    """Sample lists of any size: well, or so little that the window is often wide or wrong."""
    monkeypatch.setattr(cuts, "SAMPLE_FROM", 1)
    monkeypatch.setattr(cuts, "SAMPLES", dict.fromkeys(cuts.SAMPLES, request.param))
    return request.param


def check(weights, sparsities, *, in_place=True):
    """Compare cuts, masks and pruning of one search with a stable sort; return the cuts."""
    weights = [w.to(DEVICE) for w in weights]
    total = sum(w.numel() for w in weights)
    found = select.find_cuts(weights, [[ref.num_keep(s, total) for s in sparsities]])
    assert not found.bad.any()
    for q, sparsity in enumerate(sparsities):
        wanted = ref.masks(weights, sparsity)
        if in_place:
            got = [torch.empty_like(w).copy_(w) for w in weights]
            select.apply(got, found.at(q))
            pruned = ref.prune([w.cpu() for w in weights], wanted)
            assert all(torch.equal(g.cpu(), w) for g, w in zip(got, pruned, strict=True)), sparsity
        else:
            got = [torch.empty(w.shape, dtype=torch.bool, device=DEVICE) for w in weights]
            select.apply(weights, found.at(q), got)
            assert all(torch.equal(g.cpu(), w) for g, w in zip(got, wanted, strict=True)), sparsity
    return found


def mixed_list(dtype):
    """Contiguous, tiny, permuted and strided tensors, with ties in each."""
    return [
        torch.randn(220, 300).to(dtype),
        torch.randn(7).to(dtype),
        torch.empty(0, 3).to(dtype),
        (torch.randn(8, 5, 3, 3) * 3).round().to(dtype).to(memory_format=torch.channels_last),
        (torch.randn(30, 8) * 2).round().to(dtype)[:, ::2],
        (torch.randn(20, 30) * 2).round().to(dtype).t(),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_windows_give_the_stable_sort(dtype, sample):
    check(mixed_list(dtype), [0.5, 0.9, 0.0, 0.999, 1.0])


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "masks"])
def test_mixed_dtypes(in_place, sample):
    weights = [(torch.randn(300, 120) * 4).round().div(3).to(dtype) for dtype in DTYPES[:3]]
    check(weights, [0.3, 0.8], in_place=in_place)
    check([*weights, weights[0].double()], [0.6], in_place=in_place)


def adversaries(n):
    """Data that no sample describes well."""
    yield "sorted", torch.linspace(-1, 1, n)
    yield "constant", torch.full((n,), 0.3)
    yield "two values", torch.where(torch.rand(n) < 0.4, 0.25, -3.0)
    yield "one binade", 1 + torch.rand(n)
    yield "subnormal", torch.randn(n) * 1e-42
    yield "zeros", torch.zeros(n) * torch.randn(n).sign()
    yield "infinite", torch.where(torch.rand(n) < 0.6, torch.inf, 1.0) * torch.randn(n).sign()
    yield "periodic", torch.randn(32).repeat(n // 32)


@pytest.mark.parametrize("name", [name for name, _ in adversaries(32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adversary_is_only_slower(name, dtype, sample):
    values = dict(adversaries(CHUNK + 6400))[name].to(dtype).view(-1, 128)
    check([values], [0.3, 0.97])
    check([values.t()], [0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_cut_is_where_the_next_search_starts(dtype, monkeypatch):
    monkeypatch.setattr(cuts, "SAMPLE_FROM", 1)
    weights = [torch.randn(260, 200, device=DEVICE).to(dtype)]
    keep = [[5200]]
    sampled = []
    launch = cuts.launch_sample

    def seen(rows, sample, *rest, **options):
        launch(rows, sample, *rest, **options)
        sampled.append(bool(sample.any()))

    monkeypatch.setattr(cuts, "launch_sample", seen)
    for change in (1.0, 1.001, 0.9995, 30.0, -1e-3, 0.0):  # some steps a window follows, some it can't
        weights[0].mul_(change)
        cut = select.find_cuts(weights, keep)
        magnitudes = weights[0].double().abs().view(-1).sort(descending=True).values
        key = weights[0].new_tensor(magnitudes[5199].item())
        assert cut.key.item() == (0 if key == 0 else cuts_key(key))
        assert cut.ties.item() == 5200 - int((magnitudes > magnitudes[5199]).sum())
    assert sampled == [True] + [False] * 5
    select.find_cuts(weights, [[5201]])  # another question
    assert sampled[-1]


def cuts_key(value):
    return value.view({2: torch.int16, 4: torch.int32}[value.element_size()]).item()


WAYS = [Counting(inline=False, histogram=True), Counting(inline=False, histogram=False)]
if CUDA and not torch.version.hip:
    WAYS += [Counting(inline=True, histogram=True), Counting(inline=True, histogram=False)]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_counting(how, dtype, sample, monkeypatch):
    monkeypatch.setattr(count, "counting", lambda backend=None: how)
    check(mixed_list(dtype), [0.4, 0.9])
    tensors = [w.to(DEVICE) for w in mixed_list(dtype)]
    per_layer = select.find_cuts(tensors, [[w.numel() // 3] for w in tensors])
    out = [torch.empty(w.shape, dtype=torch.bool, device=DEVICE) for w in tensors]
    select.apply(tensors, per_layer, out)
    for weight, mask in zip(tensors, out, strict=True):
        assert torch.equal(mask.cpu().view(-1), ref.keep_flat(ref.flat64(weight), weight.numel() // 3))


def test_counting_follows_version_and_backend(monkeypatch):
    for version, backend, wanted in (
        ((3, 6), "cuda", Counting(inline=True, histogram=False)),
        ((3, 8), "cuda", Counting(inline=True, histogram=True)),
        ((3, 6), "hip", Counting(inline=False, histogram=True)),
        ((3, 6), "interpreter", Counting(inline=False, histogram=True)),
    ):
        monkeypatch.setattr(window, "_VERSION", version)
        assert window.counting(backend) == wanted


def test_counts_of_64_bits(sample, monkeypatch):
    """Lists of more than 2^31 weights count in 64 bits; here a small one pretends to be one."""
    original = cuts.Search.histograms
    monkeypatch.setattr(cuts.Search, "histograms", lambda self: original(self).long())
    check([torch.randn(300, 200), torch.full((CHUNK,), 0.25)], [0.2, 0.9])


def test_a_list_of_more_than_2_to_the_31_weights_is_counted_in_64_bits():
    """The tables and sizes of a list that long, without its memory."""
    small = cuts.Search.of([torch.randn(9, device=DEVICE)], [[4]], sampled=False)
    for numel, counts in (((1 << 31) - 1, torch.int32), (1 << 31, torch.int64)):
        assert dataclasses.replace(small, numels=[numel]).histograms().dtype == counts


def test_masks_of_cuts_without_counts_are_the_same():
    """Cuts from elsewhere say nothing of single chunks: the ties are then counted on the way."""
    weights = [w.to(DEVICE) for w in mixed_list(torch.bfloat16)]
    total = sum(w.numel() for w in weights)
    found = select.find_cuts(weights, [[total // 3]])
    assert found.chunk_ties is not None
    for out in (None, [torch.empty(w.shape, dtype=torch.bool, device=DEVICE) for w in weights]):
        results = []
        for cut in (found, found._replace(chunk_ties=None)):
            target = out if out is not None else [torch.empty_like(w).copy_(w) for w in weights]
            select.apply(target if out is None else weights, cut, out)
            results.append([t.clone() for t in target])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_over_chunks_and_permuted_tensors(dtype):
    """The cut falls in the ties of a tensor of several chunks, whose memory order is not its logical one."""
    middle = torch.randint(1, 4, (40, 30, 8, 5)).to(dtype).to(memory_format=torch.channels_last)
    ends = [torch.randint(1, 4, (CHUNK + 100,)).to(dtype) for _ in range(2)]
    for weights in ([ends[0], middle, ends[1]], [middle], [middle.contiguous(), ends[0]]):
        check(weights, [0.4, 0.5, 0.6])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_selection_follows_the_weights(dtype):
    weights = [torch.randn(3000, 1000, device="cuda").to(dtype), torch.randn(500, 40, device="cuda").to(dtype)]
    keep = [[sum(w.numel() for w in weights) // 10]]
    masks = [torch.empty(w.shape, dtype=torch.bool, device="cuda") for w in weights]
    stream = torch.cuda.Stream()

    def call():
        found = select.find_cuts(weights, keep)
        select.apply(weights, found, masks)
        return found

    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for scale in (1.0, 1.001, 50.0):
        for w in weights:
            w.normal_().mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(m.cpu(), k) for m, k in zip(masks, ref.masks(weights, 0.9), strict=True))


@pytest.mark.cuda
def test_no_synchronisation():
    weights = [torch.randn(2000, 1000, device="cuda")]
    masks = [torch.empty(weights[0].shape, dtype=torch.bool, device="cuda")]
    select.apply(weights, select.find_cuts(weights, [[1000]]), masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select.apply(weights, select.find_cuts(weights, [[1000]]), masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
