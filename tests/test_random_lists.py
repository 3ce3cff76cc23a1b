"""Thresholds, masks and pruned weights of random lists against a stable sort.

``WCR_FAST_RANDOM_LISTS=10000 pytest tests/test_random_lists.py`` draws so many lists instead of a few; add
``-k torch`` or ``-k triton`` for one backend. A failure names the seed: ``random_lists.draw(seed)``.
"""

import os
import threading
import warnings

import numpy as np
import pytest
import reference_selection as ref
import torch
from conftest import CUDA, needs_triton
from random_lists import draw

import wcr_fast
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.torch_path import blocks, scan, select, window

CHUNK = 50
TORCH_LISTS = int(os.environ.get("WCR_FAST_RANDOM_LISTS", 300))
TRITON_LISTS = int(os.environ.get("WCR_FAST_RANDOM_LISTS", 300 if CUDA else 4))


def chunks(count):
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def check(weights, sparsity, scope):
    want = ref.masks(weights, sparsity, scope)
    found = magnitude_masks(weights, sparsity, scope=scope)
    assert all(torch.equal(f.cpu(), w) for f, w in zip(found, want, strict=True)), "masks"
    if scope in ("global", "layer"):
        threshold = magnitude_threshold(weights, sparsity, scope=scope)
        assert torch.equal(threshold.cpu().double(), ref.threshold(weights, sparsity, scope)), "threshold"
        several = [sparsity, 0.5, 0.93, 0.0, 0.91]
        thresholds = magnitude_threshold(weights, several, scope=scope).cpu().double()
        assert torch.equal(thresholds, torch.stack([ref.threshold(weights, s, scope) for s in several])), "several"
    if any(0 in w.stride() and w.numel() > 1 for w in weights):
        return  # an expanded tensor can't be written
    pruned = ref.prune([w.cpu() for w in weights], want)
    before = sum(int((w == 0).sum()) for w in weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prune_: nothing is left of")
        record = wcr_fast.prune_(weights, sparsity, scope=scope)
    for weight, wanted in zip(weights, pruned, strict=True):
        assert torch.equal(weight.cpu(), wanted), "prune_"
        assert torch.equal(weight.cpu().signbit(), wanted.signbit()), "the sign of zero"
    assert record.zeros == sum(int((w == 0).sum()) for w in pruned), "zeros"
    assert record.pruned_now == record.zeros - before, "pruned_now"


def check_all(seeds, device="cpu", limit=3000):
    for seed in seeds:
        weights, sparsity, scope = draw(seed, limit=limit)
        try:
            check([w.to(device) for w in weights], sparsity, scope)
        except Exception as error:
            error.add_note(f"drawn by draw({seed}, limit={limit}): scope {scope}, sparsity {sparsity}")
            raise


@pytest.fixture(params=["numpy", "compiled"])
def scanning(request, monkeypatch):
    """Run the test with both ways to scan blocks of keys."""
    if request.param == "numpy":
        monkeypatch.setattr(scan, "_library", None)
        monkeypatch.setenv("WCR_FAST_NATIVE", "0")
    else:
        try:
            scan.build()
        except (OSError, RuntimeError) as error:
            pytest.skip(str(error))
    return request.param


def narrow(monkeypatch, block):
    """Make samples, buffers and blocks so small that lists of a few thousand weights reach every branch."""
    for name, value in {"SAMPLE_MIN": 128, "SAMPLE_MAX": 64, "MARGIN": 0.5, "BINS": 8}.items():
        monkeypatch.setattr(window, name, value)
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "COMPILED", 3 * block)
    monkeypatch.setattr(blocks, "SERIAL", block)
    monkeypatch.setattr(select, "SERIAL", block)


@pytest.mark.parametrize("seeds", chunks(TORCH_LISTS), ids=str)
def test_torch_path_equals_a_stable_sort(seeds, scanning, monkeypatch):
    with wcr_fast.backend("torch"):
        check_all(seeds[::2])
        narrow(monkeypatch, 100 + seeds.start % 997)
        check_all(seeds[1::2])


@needs_triton
@pytest.mark.parametrize("seeds", chunks(TRITON_LISTS), ids=str)
def test_triton_path_equals_a_stable_sort(seeds):
    with wcr_fast.backend("triton"):
        check_all(seeds, "cuda" if CUDA else "cpu", limit=3000 if CUDA else 300)


def test_every_branch_of_the_search_is_reached(scanning, monkeypatch):
    reached = set()
    resolve = window._Search._resolve

    def noted(self, win, i, tally):
        above, inside = int(tally.above[i].sum()), int(tally.inside[i].sum())
        reached.update("miss up" for q in win.ranks if self.num_keep[q] <= above)
        reached.update("miss down" for q in win.ranks if self.num_keep[q] > above + inside)
        if any(above < self.num_keep[q] <= above + inside for q in win.ranks):
            if not win.limit:
                reached.add("histogram" if win.shift else "histogram of single keys")
            else:
                reached.add("hit" if inside <= win.limit else "overflow")
        resolve(self, win, i, tally)

    monkeypatch.setattr(window._Search, "_resolve", noted)
    narrow(monkeypatch, 150)
    with wcr_fast.backend("torch"):
        check_all(range(1, 200, 2))
    assert reached == {"hit", "miss up", "miss down", "overflow", "histogram", "histogram of single keys"}


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64], ids=lambda d: d.__name__)
def test_compiled_scan_counts_and_finds_as_numpy_does(dtype, monkeypatch):
    try:
        scan.build()
    except (OSError, RuntimeError) as error:
        pytest.skip(str(error))
    library, top = scan._library, 31_000
    rng = np.random.default_rng(0)
    for size in (1, 7, 1023, 1024, 1025, 5000):
        patterns = rng.integers(0, 500, size).astype(dtype)
        patterns[rng.random(size) < 0.3] |= np.iinfo(dtype).min  # negative weights
        patterns[: size // 1024] = top  # NaN
        starts = sorted({0, *rng.integers(0, size, 5).tolist()})
        block = scan.KeyBlock(range(len(starts)), starts, patterns, signed=True)
        lo, hi = [0, 3, 90, 400], [1, 90, 95, top]
        for wanted in ([True] * 4, [True, False, False, True]):
            scanner, found = scan.Scanner(lo, hi, wanted, top), []
            for way in (None, library):
                monkeypatch.setattr(scan, "_library", way)
                found.append(scanner.scan(block))
            by_numpy, compiled = found
            assert np.array_equal(by_numpy.bad, compiled.bad)
            assert np.array_equal(by_numpy.zeros, compiled.zeros)
            clean = ~by_numpy.bad
            assert np.array_equal(by_numpy.above[:, clean], compiled.above[:, clean])
            assert np.array_equal(by_numpy.inside[:, clean], compiled.inside[:, clean])
            if clean.all():
                assert all(np.array_equal(a, b) for a, b in zip(by_numpy.found, compiled.found, strict=True))


def test_without_a_compiler_numpy_does_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("WCR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "_library", None)
    monkeypatch.setattr(scan, "_asked", False)
    monkeypatch.setattr(window, "THREADED", 100)
    before = set(threading.enumerate())
    with wcr_fast.backend("torch"):
        check_all(range(40))
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert scan._asked
    assert not scan.compiled()
