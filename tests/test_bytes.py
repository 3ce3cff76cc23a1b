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
@pytest.mark.parametrize("op", [op for op in OPS if op.name != "threshold"], ids=lambda op: op.name)
def test_data_is_moved_once(op, dtype):
    rows = count(op, "small", SMALL, dtype)
    assert {row.kernel for row in rows} == set(op.floors)
    for row in rows:
        assert row.floor <= row.data <= 1.002 * row.floor, row
        assert row.rest < 0.05, row


def test_every_digit_of_the_threshold_reads_once():
    (threshold,) = (op for op in OPS if op.name == "threshold")
    (row,) = count(threshold, "small", SMALL, torch.bfloat16)
    assert row.data == 2 * row.floor


def test_nothing_stays_patched():
    before = counting.InterpreterBuilder.create_masked_load
    with Counter([torch.ones(1)]).counting():
        assert counting.InterpreterBuilder.create_masked_load is not before
    assert counting.InterpreterBuilder.create_masked_load is before
