"""The byte counter: what it counts, that it sees waste, and that ops stay at their floors on a small list."""

import json

import pytest
import torch
from conftest import CUDA, TRITON_SKIP

if CUDA or TRITON_SKIP:
    pytest.skip("counts in Triton's interpreter, which a GPU's session doesn't use", allow_module_level=True)

import triton
import triton.language as tl
from wcr_fast.kernels.launch import launch

from benchmarks import bytes as counting
from benchmarks.bytes import DTYPES, OPS, Counter, Op, count

SMALL = [(32, 1024), (64, 512), (16, 16)]


@triton.jit
def scale_kernel(x_ptr, total_ptr, n, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    for _ in tl.static_range(TIMES):
        x += tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(x_ptr + i, x, mask=i < n)
    tl.atomic_add(total_ptr, tl.sum(x))


def scaled(times, n=1000):
    def prepare(shapes, dtype):
        x, total = torch.ones(n, dtype=dtype), torch.zeros(1)
        return lambda: launch(scale_kernel, 4, (x, total, n), {"TIMES": times, "BLOCK": 256}, {}), [x]

    return Op("scale", {"scale_kernel": lambda item: 2 * item}, prepare)


@pytest.mark.parametrize(("times", "data"), [(0, 8.0), (1, 12.0), (3, 20.0)])
def test_waste_is_seen(times, data):
    (row,) = count(scaled(times), "ones", [(1000,)], torch.float32)
    assert row.data == data  # lanes beyond the end move nothing
    assert row.rest == 4 * 2 * 4 / 1000  # an atomic operation reads and writes
    assert row.fails == (times > 0)


def test_a_failure_is_the_exit_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(counting, "LARGE", [(1000,)])
    monkeypatch.setattr(counting, "DTYPES", (torch.float32,))
    for times, code in ((0, 0), (1, 1)):
        monkeypatch.setattr(counting, "OPS", (scaled(times),))
        assert counting.main(["--json", "--out", str(tmp_path / "bytes.json")]) == code
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "bytes.json").read_text())
        assert printed["rows"][0]["data"] == 8.0 + 4.0 * times
    assert "too many" in counting.text_of(count(scaled(1), "ones", [(1000,)], torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if not op.shapes], ids=lambda op: op.name)
def test_data_is_moved_once(op, dtype):
    rows = count(op, "small", SMALL, dtype)
    assert {row.kernel for row in rows} == set(op.floors)
    for row in rows:
        assert row.floor <= row.data <= 1.002 * row.floor, row
        # Of weights inside a window, their counts; of groups, a number for every row and column of small matrices.
        assert row.rest < (0.3 if "tracked" in op.name else 1.0 if "group" in op.name else 0.05), row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["threshold", "threshold, warm", "mask in place"])
def test_a_selection_reads_weights_once(name, dtype, monkeypatch):
    """On a list of a hundred thousand weights: what moves besides doesn't grow with it, and isn't looked at here."""
    from wcr_fast.triton_path import cuts

    monkeypatch.setattr(cuts, "SAMPLE_FROM", 1)
    monkeypatch.setattr(cuts, "SAMPLES", dict.fromkeys(cuts.SAMPLES, 1 << 12))
    if dtype == torch.float32:  # what so small a sample says is wider than the histogram of so small a list
        monkeypatch.setattr(cuts, "_max_bins", lambda *_: 1 << 22)
    (op,) = (op for op in OPS if op.name == name)
    (row,) = count(op, "small", [(300, 400)], dtype)
    sampled = 0.0 if name != "threshold" else 4096 * dtype.itemsize / 120_000
    passes = 2 if name == "mask in place" else 1
    assert passes * dtype.itemsize <= row.data <= 1.001 * passes * dtype.itemsize + 1.1 * sampled


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_groups_touch_whole_sectors_once(dtype):
    (op,) = (op for op in OPS if op.sectors)
    (row,) = count(op, "small", [(16, 256, 3, 3)], dtype)
    assert row.floor <= row.data <= 1.02 * row.floor


def test_nothing_stays_patched():
    before = counting.InterpreterBuilder.create_masked_load
    with Counter([torch.ones(1)]).counting():
        assert counting.InterpreterBuilder.create_masked_load is not before
    assert counting.InterpreterBuilder.create_masked_load is before
