"""The search over keys of several processes, played by threads of one: the same cuts as over all keys at once."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wcr_fast.torch_path import shared, window
from wcr_fast.torch_path.blocks import MemorySource


class Table:
    """Sums over threads, as an all-reduce would; counts rounds and bytes."""

    def __init__(self, ranks):
        self.slots, self.barrier = [None] * ranks, threading.Barrier(ranks, timeout=60)
        self.rounds, self.bytes = 0, 0

    def adder(self, rank):
        def add(values):
            self.slots[rank] = values
            self.barrier.wait()
            assert len({len(slot) for slot in self.slots}) == 1
            total = np.sum(self.slots, axis=0)
            if rank == 0:
                self.rounds, self.bytes = self.rounds + 1, self.bytes + values.nbytes
            self.barrier.wait()
            return total

        return add


def run(sources, pools, table=None):
    """Run the searches of every rank; pools[p] is (index of the source, num_keep, total)."""
    ranks = len(sources)
    table = table or Table(ranks)
    found = [None] * ranks

    def work(rank):
        try:
            counters = shared.COUNTERS // len(pools)
            searches = [
                shared.shared_search(sources[rank][p], keep, total, counters=counters)
                for p, (keep, total) in enumerate(pools)
            ]
            found[rank] = shared.together(searches, table.adder(rank))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, table


def equal(found, want):
    assert found.key == want.key
    assert found.ties == want.ties
    for name in ("above", "tied", "zeros", "bad"):
        assert np.array_equal(getattr(found, name), getattr(want, name)), name
        assert getattr(found, name).dtype == getattr(want, name).dtype, name


def check(tensors, num_keep, ranks):
    parts = [[t.reshape(-1).tensor_split(ranks)[r] for t in tensors] for r in range(ranks)]
    total = sum(t.numel() for t in tensors)
    found, table = run([[MemorySource(p)] for p in parts], [(num_keep, total)])
    want = window.window_search(MemorySource(tensors), num_keep)
    for (one,) in found:
        equal(one, want)
    return table


KINDS = {
    "normal": lambda n: torch.randn(n),
    "equal": lambda n: torch.full((n,), 0.5),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float() / 4,
    "sorted": lambda n: torch.randn(n).abs().sort().values,
    "mostly zero": lambda n: torch.randn(n) * (torch.rand(n) < 0.05),
    "wide": lambda n: torch.randn(n).mul(40).exp2(),
    "subnormal": lambda n: torch.randn(n) * 1e-41,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_same_cuts_as_in_one_process(kind, dtype):
    for sizes, ranks in (((300_000, 7, 40_000), 3), ((5, 0, 1, 900), 2), ((70_000,), 4), ((3,), 4)):
        tensors = [KINDS[kind](n).to(dtype) for n in sizes]
        total = sum(sizes)
        check(tensors, [total, 0, 1, total // 2, total // 10, total - 1, total // 10], ranks)


def test_mixed_dtypes_and_nan():
    tensors = [torch.randn(100_000), torch.randn(50_000).bfloat16(), torch.randn(3).double()]
    check(tensors, [1000, 75_000], 3)
    tensors[1][-1] = torch.nan
    parts = [[t.tensor_split(3)[r] for t in tensors] for r in range(3)]
    found, _ = run([[MemorySource(p)] for p in parts], [([1000], 150_003)])
    for (one,) in found:
        assert one.bad.tolist() == [False, True, False]


def test_many_pools_in_step():
    tensors = [torch.randn(n) for n in (100_000, 1, 300, 80_000, 0)]
    keeps = [[t.numel() // 10, t.numel() // 2] for t in tensors]
    parts = [[MemorySource([t.tensor_split(4)[r]]) for t in tensors] for r in range(4)]
    found, table = run(parts, [(k, t.numel()) for k, t in zip(keeps, tensors, strict=True)])
    for rank in found:
        for one, t, keep in zip(rank, tensors, keeps, strict=True):
            equal(one, window.window_search(MemorySource([t]), keep))
    assert table.bytes < 256_000


@pytest.mark.parametrize("capacity", [0, 50])
def test_overflow_and_a_wrong_sample_only_cost_sweeps(monkeypatch, capacity):
    monkeypatch.setattr(shared, "COLLECT_MAX", 0)
    monkeypatch.setattr(shared, "SAMPLE_MIN", 1000 + capacity)
    monkeypatch.setattr(MemorySource, "sample", lambda self, size: np.full((8, 32), 5, np.int32))
    check([torch.randn(30_000), torch.randn(100)], [3000, 15_000, 30_099], 2)


class Broken(MemorySource):
    """A source that fails in its sample, or in the sweep."""

    where = "streams"

    def sample(self, size):
        if self.where == "sample":
            raise OSError("no such file")
        return super().sample(size)

    def streams(self, count, windows=1):
        if self.where == "streams":
            raise OSError("no such file")
        return super().streams(count, windows)


@pytest.mark.parametrize("where", ["sample", "streams"])
def test_a_failure_ends_all_processes(where, monkeypatch):
    monkeypatch.setattr(Broken, "where", where)
    sources = [[MemorySource([torch.randn(60_000)])], [Broken([torch.randn(60_000)])]]
    found, _ = run(sources, [([100], 120_000)])
    assert isinstance(found[1], OSError)
    assert isinstance(found[0], RuntimeError)
    assert "another process" in str(found[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_of_any_list(data):
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("inf"), 1e-40, 3.0])
    tensors = [torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
    total = sum(sizes)
    num_keep = data.draw(st.lists(st.integers(0, total), min_size=0, max_size=3))
    check(tensors, num_keep, data.draw(st.integers(1, 4)))
