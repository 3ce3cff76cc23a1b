"""Searches that the host leads over keys counted by kernels: the same cuts and counts as over blocks of keys."""

import itertools
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import reference_selection as ref
import torch
from conftest import DEVICE, needs_triton
from test_bounds import by_hand
from test_shared_search import equal, run

import wcr_fast
from wcr_fast import ops, score_masks
from wcr_fast.ops import scored as scored_ops
from wcr_fast.score import NAMED, Scored
from wcr_fast.torch_path import allocate, window
from wcr_fast.torch_path.blocks import MemorySource
from wcr_fast.torch_path.scores import ScoreSource

pytestmark = needs_triton


def source_of(tensors, scored=None):
    from wcr_fast.triton_path.source import DeviceSource

    return DeviceSource(tensors, scored)


@pytest.fixture
def no_blocks(monkeypatch):
    """Fail where keys would go through the host."""

    def fail(self, count):
        raise AssertionError("keys are read by the host")

    for source in (MemorySource, ScoreSource):
        monkeypatch.setattr(source, "streams", fail)


def in_turn(monkeypatch):
    """Let one thread count at a time: Triton's interpreter is not made for several."""
    from wcr_fast.triton_path.source import DeviceSource

    lock, count = threading.Lock(), DeviceSource.count

    def locked(self, windows, *, first):
        with lock:
            return count(self, windows, first=first)

    monkeypatch.setattr(DeviceSource, "count", locked)


def lists(dtype):
    """Lists with ties, constant, subnormal, signed zeros, infinite, empty and 0-d weights, with gaps and permuted."""
    tiny = torch.finfo(dtype).tiny
    yield [
        torch.randn(70, 50),
        torch.empty(0, 3),
        torch.tensor(-2.0),
        torch.randn(40, 30).t(),
        torch.randn(9, 8)[:, ::2],
    ]
    yield [torch.full((300,), -0.5), torch.full((40,), 0.5), torch.tensor(0.5)]
    yield [torch.randint(-2, 3, (500,)) / 4, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0])]
    yield [torch.randn(300).double() * tiny / 4, torch.zeros(20), -torch.zeros(5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_same_cuts_as_over_blocks(dtype):
    for listed in lists(dtype):
        tensors = [t.to(dtype).to(DEVICE) for t in listed]
        total = sum(t.numel() for t in tensors)
        keeps = [total // 3, 0, 1, total]
        wanted = window.window_search(MemorySource(tensors), keeps)
        equal(window.window_search(source_of(tensors), keeps), wanted)
        (((one,),), _) = run([[source_of(tensors)]], [(keeps, total)])
        equal(one, wanted)


def test_mixed_dtypes_nan_and_64_bit_counts(monkeypatch):
    from wcr_fast.triton_path import source

    monkeypatch.setattr(source, "WIDE", 0)
    tensors = [torch.randn(3000), torch.randn(100).bfloat16(), torch.randn(60).half(), torch.randn(3).double()]
    for listed in (tensors[:3], tensors):
        listed = [t.to(DEVICE) for t in listed]
        equal(window.window_search(source_of(listed), [900]), window.window_search(MemorySource(listed), [900]))
    tensors[1][-1] = torch.nan
    found = window.window_search(source_of([t.to(DEVICE) for t in tensors]), [900])
    assert found.bad.tolist() == [False, True, False, False]


def test_any_windows_are_counted_as_over_blocks():
    tensors = [torch.randn(40_000).to(DEVICE), torch.randint(-2, 3, (50,)).to(DEVICE) / 4]
    top = 0x7F80_0001
    spans = [(0, top), (0x3F00_0000, 0x3F00_0007), (0x3F00_0000, 0x3F12_3456), (0x3F70_0000, top), (0, 1)]
    windows = [window.histogram(lo, hi, (0,), bins, top) for lo, hi in spans for bins in (2, 100)]
    for first in (True, False):
        one, other = (window.count_windows(s(tensors), windows, first=first) for s in (source_of, MemorySource))
        for name in ("above", "inside", "zeros", "bad"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        for mine, wanted, w in zip(one.bins, other.bins, windows, strict=True):
            assert w.bins == 1 or np.array_equal(mine, wanted)
    assert [w.hi == w.lo + (w.bins << w.shift) or w.hi == top for w in windows] == [True] * len(windows)


def test_a_sample_and_ranks_that_hold_parts(monkeypatch, no_blocks):
    monkeypatch.setattr(window, "SAMPLE_MIN", 512)
    monkeypatch.setattr("wcr_fast.torch_path.shared.SAMPLE_MIN", 512)
    in_turn(monkeypatch)
    tensors = [torch.randn(4000), torch.randint(-3, 4, (900,)).float() / 4, torch.randn(())]
    parts = [[t.reshape(-1).tensor_split(3)[r].to(DEVICE) for t in tensors] for r in range(3)]
    keeps = [500, 2000, 4901]
    found, table = run([[source_of(p)] for p in parts], [(keeps, 4901)])
    values = torch.cat([t.reshape(-1).abs() for t in tensors]).sort(descending=True).values
    for (one,) in found:
        assert torch.tensor(one.key, dtype=torch.int32).view(torch.float32).tolist() == [values[k - 1] for k in keeps]
        assert one.above.sum(axis=0).tolist() == [int((values > values[k - 1]).sum()) for k in keeps]
        assert one.zeros.tolist() == [int((t == 0).sum()) for t in tensors]
    assert table.bytes < 100_000
    # a sample that misleads only costs sweeps
    monkeypatch.setattr(type(source_of(parts[0])), "sample", lambda self, size: np.full((8, 32), 5, np.int32))
    again, _ = run([[source_of(p)] for p in parts], [(keeps, 4901)])
    equal(again[0][0], found[0][0])


def test_samples_are_lines_of_all_tensors():
    tensors = [torch.arange(1, 65).float().view(8, 8).t(), torch.tensor(3.0), torch.full((2000,), 7.0)]
    sample = source_of([t.to(DEVICE) for t in tensors]).sample(320)
    assert sample.shape == (10, 32)
    assert np.isin(sample.view(np.float32), np.arange(1, 65)).all()
    everything = source_of([t.to(DEVICE) for t in tensors]).sample(4000)
    assert np.array_equal(np.sort(everything, axis=None), np.sort(MemorySource(tensors).sample(4000), axis=None))


@pytest.mark.parametrize("name", [None, "gradient", "wanda"])
def test_bounds_by_counts_of_kernels(name, no_blocks):
    weights = [torch.randn(60, 30), 0.05 * torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.ones(7)]
    numbers = [torch.rand(w.shape if name == "gradient" else (w.shape[-1] if w.dim() < 3 else 4,)) for w in weights]
    scores = [
        w.abs() if name is None else (w * (a.view(1, -1, 1, 1) if w.dim() > 2 and name == "wanda" else a)).abs()
        for w, a in zip(weights, numbers, strict=True)
    ]
    numels = [w.numel() for w in weights]
    low, high = [math.ceil(0.1 * n) for n in numels], [math.floor(0.7 * n) for n in numels]
    before = None
    for sparsity in (0.4, 0.6, 0.85):
        with wcr_fast.backend("triton"):
            found = score_masks(
                [w.to(DEVICE) for w in weights],
                sparsity,
                name or "magnitude",
                aux=None if name is None else [a.to(DEVICE) for a in numbers],
                floor=0.1,
                cap=0.7,
            )
        found = [m.cpu() for m in found]
        assert sum(int(m.sum()) for m in found) == ref.num_keep(sparsity, sum(numels))
        assert all(torch.equal(m, w) for m, w in zip(found, by_hand(scores, sparsity, low, high), strict=True))
        assert before is None or not any((m & ~b).any() for m, b in zip(found, before, strict=True))
        before = found


def test_scores_in_the_window_search():
    weights = [torch.randn(40, 20).to(DEVICE), torch.randn(5, 6).double().to(DEVICE), torch.tensor(0.5).to(DEVICE)]
    scored = Scored(NAMED["gradient"][0], tuple(torch.randint(0, 3, w.shape).to(w) for w in weights))
    wanted = window.window_search(ScoreSource(weights, scored), [300, 831])
    equal(window.window_search(source_of(weights, scored), [300, 831]), wanted)


def test_what_takes_the_kernels(monkeypatch):
    weights = [torch.randn(4, 3), torch.randn(5)]
    assert isinstance(scored_ops._source(weights, None), MemorySource)
    mine = wcr_fast.Score("mine", lambda w, a: w.abs() * a, per="layer")
    with wcr_fast.backend("triton"):
        moved = [w.to(DEVICE) for w in weights]
        numbers = tuple(torch.ones((), device=DEVICE) for _ in weights)
        assert isinstance(scored_ops._source(moved, None), window.KeyCounter)
        assert isinstance(scored_ops._source(moved, Scored(NAMED["normalised"][0], numbers)), window.KeyCounter)
        assert isinstance(scored_ops._source(moved, Scored(mine, numbers)), ScoreSource)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lamps_sums_are_those_of_exact_arithmetic(dtype):
    for weight in (torch.randn(3000), torch.randn(3000).mul(6).exp(), torch.full((100,), 3.0)):
        weight = weight.to(dtype) * (1e200 if dtype == torch.float64 else 1.0)
        found = allocate.LampSource([weight]).keys(0).view(torch.float64)
        squares = [Fraction(w) ** 2 for w in sorted(map(abs, weight.tolist()), reverse=True)]
        scores = [float(s / total) for s, total in zip(squares, itertools.accumulate(squares), strict=True)]
        torch.testing.assert_close(found, torch.tensor(scores, dtype=torch.float64), rtol=1e-15, atol=0)
        assert (found.diff() <= 0).all()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ops.scored.lamp_per_layer([torch.ones(3), torch.tensor([1.0, bad])], [2])
