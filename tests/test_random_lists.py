"""Thresholds, masks and pruned weights of random lists against a stable sort.

``WCR_FAST_RANDOM_LISTS=10000 pytest tests/test_random_lists.py`` draws so many lists instead of a few; add
``-k torch`` or ``-k triton`` for one backend. A failure names the seed: ``random_lists.draw(seed)``.
"""

import os
import warnings

import pytest
import reference_selection as ref
import torch
from conftest import CUDA, needs_triton
from random_lists import draw

import wcr_fast
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.torch_path import blocks, select, window

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


def narrow(monkeypatch, block):
    """Make samples, buffers and blocks so small that lists of a few thousand weights reach every branch."""
    for name, value in {"SAMPLE_MIN": 128, "SAMPLE_MAX": 64, "MARGIN": 0.5, "BINS": 8}.items():
        monkeypatch.setattr(window, name, value)
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "SERIAL", block)
    monkeypatch.setattr(select, "SERIAL", block)


@pytest.mark.parametrize("seeds", chunks(TORCH_LISTS), ids=str)
def test_torch_path_equals_a_stable_sort(seeds, monkeypatch):
    with wcr_fast.backend("torch"):
        check_all(seeds[::2])
        narrow(monkeypatch, 100 + seeds.start % 997)
        check_all(seeds[1::2])


@needs_triton
@pytest.mark.parametrize("seeds", chunks(TRITON_LISTS), ids=str)
def test_triton_path_equals_a_stable_sort(seeds):
    with wcr_fast.backend("triton"):
        check_all(seeds, "cuda" if CUDA else "cpu", limit=3000 if CUDA else 300)


def test_every_branch_of_the_search_is_reached(monkeypatch):
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
