"""Thresholds and masks against a stable sort, on both backends."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import reference_selection as ref
import torch
from conftest import CUDA, DEVICE, needs_triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import wcr_fast
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.torch_path import blocks, cuts, select, window
from wcr_fast.torch_path.blocks import MemorySource
from wcr_fast.torch_path.window import KeyBlock, window_search

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# The interpreter takes some 6 ms a program: one sparsity has to do there.
SPARSITIES = {"torch": [0.0, 0.29, 0.5, 0.9, 1.0], "triton": [0.0, 0.29, 0.5, 0.9, 1.0] if CUDA else [0.5]}


def awkward(dtype, device):
    """Ties, zeros of both signs, infinities, subnormals and odd layouts in one list."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    misaligned = torch.randn(9, device=device).to(dtype)[1:]
    return [
        torch.randint(-2, 3, (4, 17), device=device).to(dtype),
        torch.randn(3, 4, 2, 5, device=device).to(dtype).to(memory_format=torch.channels_last),
        torch.randint(-3, 4, (11, 4), device=device).to(dtype).t(),
        torch.randn(5, 12, device=device).to(dtype)[:, ::2],
        torch.empty(0, 4, dtype=dtype, device=device),
        torch.tensor(-1.0, dtype=dtype, device=device),
        torch.tensor([0.0, -0.0, tiny, -tiny, math.inf, -math.inf], dtype=dtype, device=device),
        misaligned,
        torch.tensor([2.0], dtype=dtype, device=device).expand(3),
    ]


def check(weights, sparsity, scope):
    expected = ref.masks(weights, sparsity, scope)
    found = magnitude_masks(weights, None if ":" in scope else sparsity, scope=scope)
    for i, (mask, wanted) in enumerate(zip(found, expected, strict=True)):
        assert mask.dtype == torch.bool
        assert mask.is_contiguous()
        assert torch.equal(mask.cpu(), wanted), (i, weights[i].shape, weights[i].dtype)
    if scope in ("global", "layer"):
        threshold = magnitude_threshold(weights, sparsity, scope=scope)
        assert torch.equal(threshold.cpu().double(), ref.threshold(weights, sparsity, scope))
    return found


@pytest.mark.parametrize("scope", ["global", "layer", "row", "2:4", "1:3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_lists_equal_a_stable_sort(dtype, scope, backend, device):
    weights = awkward(dtype, device)
    for sparsity in [0.5] if ":" in scope else SPARSITIES[backend]:
        check(weights, sparsity, scope)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_mixed_dtypes_compare_exactly(scope, backend, device):
    weights = [torch.randint(-9, 10, (7, 9), device=device).div(3).to(dtype) for dtype in DTYPES]
    for chosen in (weights, [weights[0], weights[2], weights[3]], [weights[2], weights[3]]):
        for sparsity in SPARSITIES[backend]:
            check(chosen, sparsity, scope)


def test_magnitudes_beyond_a_smaller_dtype(backend, device):
    weights = [torch.full((5,), 1e38), torch.full((4,), math.inf).half(), torch.full((4,), 65504.0).half()]
    for sparsity in (0.2, 0.3, 0.5, 0.8, 0.95):
        check([w.to(device) for w in weights], sparsity, "global")


def test_threshold_dtypes_shapes_and_extremes(backend, device):
    weights = [torch.tensor([3.0, -1.0], device=device), torch.tensor([0.5], device=device)]
    assert magnitude_threshold(weights, 0.0).item() == 0.5
    assert magnitude_threshold(weights, 1.0).item() == math.inf
    assert magnitude_threshold(weights[0], 0.5).shape == ()
    several = magnitude_threshold(weights, [0.9, 0.0, 0.5], scope="layer")
    assert several.shape == (3, 2)
    assert several.dtype == torch.float32
    assert several.device.type == device.type
    assert magnitude_threshold([w.half() for w in weights], [0.5, 0.1]).dtype == torch.float32
    assert magnitude_threshold([weights[0].double(), weights[1]], 0.5).dtype == torch.float64
    assert magnitude_threshold(weights, []).shape == (0,)


def test_several_sparsities_are_those_one_by_one(backend, device):
    weights = [torch.randn(40, 30, device=device), torch.randint(-2, 3, (50,), device=device).float()]
    wanted = [0.99, 0.0, 0.5, 0.5, 1.0, 0.31]
    for scope in ("global", "layer"):
        together = magnitude_threshold(weights, wanted, scope=scope)
        alone = torch.stack([magnitude_threshold(weights, s, scope=scope) for s in wanted])
        assert torch.equal(together, alone)


def test_empty_lists_and_empty_tensors(backend, device):
    assert magnitude_masks([], 0.5) == []
    assert magnitude_threshold([], 0.5).item() == math.inf
    empty = torch.empty(0, 3, device=device)
    assert magnitude_threshold(empty, 0.5).item() == math.inf
    assert magnitude_masks(empty, 0.5)[0].shape == (0, 3)


@needs_triton
def test_backends_agree_on_random_lists():
    for i in range(150 if CUDA else 6):
        dtypes = [DTYPES[j] for j in torch.randint(4, (3,)).tolist()] if i % 3 else [DTYPES[i % 4]] * 3
        weights = [
            (torch.randn(tuple(torch.randint(1, 12, (2,)).tolist())) * 2).round().to(DEVICE, dtype) for dtype in dtypes
        ]
        sparsity = torch.rand(()).item()
        for scope in ("global", "layer", "row", "3:4")[:: 1 if CUDA else 3]:
            found = []
            for name in ("torch", "triton"):
                with wcr_fast.backend(name):
                    found.append(magnitude_masks(weights, None if ":" in scope else sparsity, scope=scope))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (i, scope)


floats = st.floats(width=32, allow_nan=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45, math.inf])
lists = st.lists(st.lists(st.one_of(few, floats), max_size=40), min_size=1, max_size=4)
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(values=lists, sparsity=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_any_list_keeps_the_exact_count(values, sparsity, dtype):
    weights = [torch.tensor(v, dtype=torch.float64).to(dtype) for v in values]
    masks = check(weights, sparsity, "global")
    total = sum(w.numel() for w in weights)
    assert sum(int(m.sum()) for m in masks) == total - round(sparsity * total)
    check(weights, sparsity, "layer")


@relaxed
@given(values=lists, pair=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks_are_nested_as_sparsity_grows(values, pair):
    weights = [torch.tensor(v) for v in values]
    low, high = sorted(pair)
    for more, fewer in zip(magnitude_masks(weights, low), magnitude_masks(weights, high), strict=True):
        assert not (fewer & ~more).any()


def data_sets():
    n = 6000
    binade = 1 + torch.rand(n)
    yield "normal", torch.randn(n)
    yield "all equal", torch.full((n,), 0.3)
    yield "two values", torch.where(torch.rand(n) < 0.4, 0.25, -3.0)
    yield "sorted", torch.linspace(-1, 1, n)
    yield "one binade", binade
    yield "mostly zeros", torch.randn(n) * (torch.rand(n) < 0.1)
    yield "coarse", (torch.randn(n) * 4).round()
    yield "outliers", torch.cat([torch.randn(n - 3), torch.tensor([1e30, -1e38, math.inf])])
    yield "wide", torch.randn(n).mul(20).exp2()


@pytest.mark.parametrize("block", [150, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_narrows_to_the_same_answer(dtype, block, monkeypatch):
    """A tiny sample misses, tiny buffers overflow; the result must not change, whatever the blocks."""
    monkeypatch.setattr(window, "SAMPLE_MIN", 64)
    monkeypatch.setattr(window, "SAMPLE_MAX", 64)
    monkeypatch.setattr(window, "MARGIN", 0.2)
    monkeypatch.setattr(window, "BINS", 8)
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "SERIAL", block)
    monkeypatch.setattr(select, "SERIAL", block)
    with wcr_fast.backend("torch"):
        for name, values in data_sets():
            weights = [part.to(dtype) for part in values.view(60, 100).split([1, 9, 50])]
            weights.append(values[:900].view(30, 30).t().to(dtype))
            for sparsity in (0.0, 0.1, 0.5, 0.97):
                check(weights, sparsity, "global")
            found = magnitude_threshold(weights, [0.97, 0.1, 0.5, 0.96])
            wanted = [ref.threshold(weights, s) for s in (0.97, 0.1, 0.5, 0.96)]
            assert found.double().tolist() == [w.item() for w in wanted], name


class _TwoStreams(MemorySource):
    """The same keys, one tensor per block, dealt out to two threads."""

    def streams(self, count, windows=1):
        keys = [cuts.keys_of(t.reshape(-1), self.dtype).numpy() for t in self.tensors]
        deal = [KeyBlock([i], [0], k) for i, k in enumerate(keys) if k.size]
        return [deal[::2], deal[1::2]]


def large_and_odd():
    """Lists with tensors that are read in several pieces, because their keys must be copied."""
    coarse = (torch.randn(250, 200) * 3).round()
    yield [coarse.bfloat16(), torch.randn(3, 3)]
    yield [torch.randn(250, 400)[:, ::2]]
    yield [torch.randn(40), coarse.repeat(1, 4)[:, ::2].half(), coarse, torch.randn(9).double()]
    yield [coarse.repeat(3, 1, 2)[:, :, ::2], torch.randn(70, 1000).half(), torch.randn(5).bfloat16()]
    yield [coarse.t(), coarse.bfloat16(), torch.randn(2, dtype=torch.float64)]


@pytest.mark.parametrize("which", range(5))
def test_tensors_read_in_pieces_keep_their_counts(which):
    weights = list(large_and_odd())[which]
    check(weights, 0.5, "global")
    check(weights, 0.93, "layer")
    zeros, bad = select.survey(weights)
    assert zeros.tolist() == [int((w == 0).sum()) for w in weights]
    assert not bad.any()
    for block in MemorySource(weights).streams(1)[0]:
        assert len(set(block.tensors)) == len(block.tensors) == len(block.starts)


def test_nan_in_an_early_piece_is_found():
    strided = torch.randn(250, 400)[:, ::2]
    strided[0, 1] = math.nan
    for weights in ([strided], [torch.randn(3), strided.bfloat16()], [strided.half(), torch.randn(3)]):
        for scope in ("global", "layer", "row"):
            with pytest.raises(ValueError, match="holds NaN"):
                magnitude_masks(weights, 0.5, scope=scope)


class _Inconstant(MemorySource):
    """Keys that change from sweep to sweep, as when another thread trains the weights."""

    sweeps = 0

    def streams(self, count, windows=1):
        self.sweeps += 1
        assert self.sweeps < 100
        self.tensors[0].fill_(self.sweeps % 2 + 1.0)
        return super().streams(count, windows)


@pytest.mark.parametrize("capacity", [64, 1 << 16])
def test_weights_that_change_meanwhile_do_not_hang(capacity, monkeypatch):
    monkeypatch.setattr(window, "SAMPLE_MIN", capacity)
    monkeypatch.setattr(window, "SAMPLE_MAX", capacity)
    with pytest.raises(RuntimeError, match="did the weights change"):
        window_search(_Inconstant([torch.full((5000,), 3.0)]), [2500])


@pytest.mark.parametrize("capacity", [8, 1 << 16])
def test_streams_do_not_matter(capacity, monkeypatch):
    monkeypatch.setattr(window, "SAMPLE_MIN", capacity)
    weights = [torch.randn(n) for n in (3000, 0, 17, 5000, 1)]
    one, two = (window_search(source(weights), [800, 1, 8018]) for source in (MemorySource, _TwoStreams))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b)


def test_threads_share_the_limit_of_what_is_collected():
    """However many they are, they collect no more than one would."""
    keys = torch.linspace(1, 2, 100).view(torch.int32)
    crowded = window.Window(int(keys[0]), int(keys[-1]) + 1, (0,), limit=150)
    blocks = [KeyBlock(np.array([i]), [0], keys.numpy()) for i in range(8)]
    source = SimpleNamespace(dtype=torch.float32, numels=[100] * 8, streams=lambda *_: [[block] for block in blocks])
    tally = window.count_windows(source, [crowded], first=True)
    assert tally.inside.tolist() == [[100] * 8]
    assert sum(map(len, tally.keys[0])) == 100


def test_usual_weights_take_one_sweep(monkeypatch):
    """The window of random weights of very different scales holds the cut."""
    weights = [torch.randn(400, 500) * scale for scale in (1.0, 0.1, 0.01)]
    sweeps = []
    original = window._Search.sweep
    monkeypatch.setattr(window._Search, "sweep", lambda self: (sweeps.append(1), original(self)))
    window_search(MemorySource(weights), [60_000])
    assert len(sweeps) == 1


def test_nan_is_an_error_that_names_the_position(device):
    weights = [torch.ones(3), torch.tensor([1.0, math.nan]), torch.ones(2)]
    for scope in ("global", "layer"):
        with pytest.raises(ValueError, match=r"magnitude_threshold: weights\[1\] holds NaN.*can't be ranked$"):
            magnitude_threshold(weights, 0.5, scope=scope)
    for sparsity, scope in [(0.5, "global"), (0.0, "layer"), (0.5, "row"), (None, "2:4")]:
        with pytest.raises(ValueError, match=r"magnitude_masks: weights\[1\] holds NaN.*can't be ranked$"):
            magnitude_masks(weights, sparsity, scope=scope)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, [0.5, 2.0]])
def test_sparsity_must_lie_in_the_unit_interval(sparsity):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        magnitude_threshold(torch.ones(3), sparsity)


def test_sparsities_of_any_kind():
    weights = torch.arange(10.0, requires_grad=True)
    one = [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
    assert [magnitude_threshold(weights, s).tolist() for s in one] == [5.0] * 5
    assert all(int(magnitude_masks(weights, s)[0].sum()) == 5 for s in one)
    several = [[0.5, 0], (0.5, 0), np.array([0.5, 0]), torch.tensor([0.5, 0]), (s for s in (0.5, 0)), {0.5: 1, 0: 2}]
    assert [magnitude_threshold(weights, s).tolist() for s in several] == [[5.0, 0.0]] * 6
    two_dims = [np.array([[0.5]]), torch.tensor([[0.5]]), [[0.5]]]
    for wrong in (*two_dims, "0.5", b"1", ["0.5"], None, [None], 1j, True, np.bool_(True), torch.tensor([True])):
        with pytest.raises(TypeError, match="magnitude_threshold: sparsity must be a number"):
            magnitude_threshold(weights, wrong)


def test_meta_and_fake_tensors_give_shapes(backend):
    def shapes(device):
        weights = [torch.empty(4, 6, device=device), torch.empty(3, dtype=torch.float64, device=device)]
        model = torch.nn.ConvTranspose2d(4, 8, 3, groups=2, device=device)
        for scope in ("global", "layer", "row", "2:4"):
            for some in (weights, model):
                masks = magnitude_masks(some, None if ":" in scope else 0.5, scope=scope)
                assert [m.shape for m in masks] == [w.shape for w in (weights if some is weights else [model.weight])]
                assert all(m.dtype == torch.bool for m in masks)
        assert magnitude_threshold(weights, 0.5).shape == ()
        found = magnitude_threshold(weights, [0.1, 0.5, 0.9], scope="layer")
        assert (found.shape, found.dtype, found.device.type) == ((3, 2), torch.float64, device)

    shapes("meta")
    with FakeTensorMode():
        shapes("cpu")


def test_wrong_arguments():
    ones = torch.ones(4, 4)
    for sparsity in (None, "0.5", True):
        with pytest.raises(TypeError, match="sparsity must be a number"):
            magnitude_masks(ones, sparsity)
    for scope in ("tensor", "2:0", "3:2", "0:4", "-1:4", 3):
        with pytest.raises(ValueError, match="scope"):
            magnitude_masks(ones, None, scope=scope)
    with pytest.raises(ValueError, match="leave sparsity out"):
        magnitude_masks(ones, 0.5, scope="2:4")
    with pytest.raises(ValueError, match='"global" or "layer"'):
        magnitude_threshold(ones, 0.5, scope="row")
    for wrong in (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="float16, bfloat16"):
            magnitude_masks([wrong], 0.5)


def test_ops_pass_opcheck(backend, device):
    weights = [torch.randn(6, 5, device=device), torch.randn(7, device=device)]
    for scope in ("global", "layer"):
        torch.library.opcheck(torch.ops.wcr_fast.magnitude_threshold, (weights, [0.5, 0.9], scope))
    many = backend == "torch" or CUDA
    for scope in ("global", "row", "2:4") if many else ("2:4",):
        torch.library.opcheck(torch.ops.wcr_fast.magnitude_masks, (weights, 0.5, scope))
    torch.library.opcheck(torch.ops.wcr_fast.magnitude_masks, (weights[:1], 0.5, "2:4", [2]))


def test_compiles_into_one_graph():
    weights = [torch.randn(6, 5), torch.randn(7, 4)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def pruned(weights):
        masks = magnitude_masks(weights, 0.5)
        return [w * m for w, m in zip(weights, masks, strict=True)], magnitude_threshold(weights, [0.5, 0.9])

    kept, threshold = pruned(weights)
    for found, wanted in zip(kept, ref.prune(weights, ref.masks(weights, 0.5)), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(threshold, magnitude_threshold(weights, [0.5, 0.9]))


class _Huge:
    """More than 2^31 keys, all from one block in memory, above the few in the last tensor."""

    dtype = torch.bfloat16

    def __init__(self, large):
        self.block, self.last = np.full(1 << 18, 1000, np.int16), np.array([3, 0, 9, 9, 5, 9], np.int16)
        self.numels = [*large, self.last.size]

    def sample(self, size):
        return np.concatenate([self.last, np.full(20, 9, np.int16), self.block])[:, None]

    def streams(self, count, windows=1):
        return [self.blocks()]

    def blocks(self):
        for i, numel in enumerate(self.numels[:-1]):
            for start in range(0, numel, self.block.size):
                yield KeyBlock([i], [0], self.block[: numel - start])
        yield KeyBlock([len(self.numels) - 1], [0], self.last)


def test_counts_are_exact_beyond_31_bits():
    large = [2**31 + 7, 5]
    found = window_search(_Huge(large), [sum(large) + 2, sum(large) + 4])
    assert found.key == [9, 5]
    assert found.ties == [2, 1]
    assert found.above.T.tolist() == [[*large, 0], [*large, 3]]
    assert found.tied.T.tolist() == [[0, 0, 3], [0, 0, 1]]
    assert found.zeros.tolist() == [0, 0, 1]


def test_ties_are_shared_out_exactly_beyond_31_bits():
    tied = np.array([[3], [2**31 + 7], [9]])
    for ties in (2, 2**31 + 1, 2**31 + 12):
        assert window.shares(np.array([ties]), tied).sum() == ties
    assert window.shares(np.array([2**31 + 12]), tied)[:, 0].tolist() == [3, 2**31 + 7, 2]


def test_only_weights_on_the_cpu_are_read_by_several_threads(monkeypatch):
    """Another thread would read a device on another stream."""
    from wcr_fast.torch_path import blocks

    monkeypatch.setattr(blocks, "compiled", lambda: True)
    for device, count in (("cpu", 3), ("meta", 1)):
        source = MemorySource([torch.empty(2 * blocks.COMPILED + 1, device=device)])
        assert len(source.streams(8, blocks.MANY_WINDOWS)) == count
        assert len(source.streams(8, 1)) == 1
