"""wcr-fast doctor: right when all is right, exit 1 when an op is wrong."""

import json

import pytest
import torch
from conftest import needs_triton

from wcr_fast import cli, doctor
from wcr_fast.torch_path import moments


def test_all_right(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "interpreting", lambda: False)
    assert cli.main(["doctor", "--size", "3000"]) == 0
    out = capsys.readouterr().out
    assert "all right" in out
    assert "WCR.add_grad_" in out
    assert "magnitude_masks 2:4" in out
    assert "AdamW step + WCR" in out
    assert "SAM first_step + restore" in out


def test_a_wrong_op_is_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "interpreting", lambda: False)
    right = moments.layer_moments

    def wrong(tensors, r, rule=None):
        stats, coef = right(tensors, r, rule)
        stats[1] *= 1.01
        return stats, coef

    monkeypatch.setattr(moments, "layer_moments", wrong)
    assert cli.main(["doctor", "--size", "3000", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert not all(row["ok"] for row in rows)


@pytest.mark.parametrize("size", ["-5", "0", "63"])
def test_too_small_a_size_is_one_line(capsys, size):
    assert cli.main(["doctor", "--size", size]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--size must be at least 64, got {size}" in err


def test_the_smallest_size(monkeypatch):
    monkeypatch.setattr(doctor, "interpreting", lambda: False)
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    assert all(row.ok for row in doctor.examine(64))


@needs_triton
def test_kernels_are_right(monkeypatch):
    monkeypatch.setattr(doctor, "DTYPES", (torch.bfloat16,))
    rows = [row for row in doctor.examine(64) if row.backend == "triton"]
    assert {row.op for row in rows} >= {"layer_moments", "magnitude_masks 2:4", "AdamW step + WCR"}
    assert all(row.ok for row in rows)


def test_what_is_checked_stays_small(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.sizes(gpu, "triton", None) == (4_000_000, 100_000_000)
    assert doctor.sizes(cpu, "torch", None) == (4_000_000, 4_000_000)
    assert doctor.sizes(gpu, "torch", 3000) == (3000, 3000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.sizes(cpu, "torch", None) == (1_000_000, 1_000_000)
    assert doctor.sizes(cpu, "torch", 10_000_000) == (1_000_000, 10_000_000)
    assert doctor.sizes(cpu, "triton", 10_000_000) == (20_000, 20_000)


def test_more_weights_are_timed_than_checked(monkeypatch):
    monkeypatch.setattr(doctor, "interpreting", lambda: False)
    monkeypatch.setattr(doctor, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(doctor, "CHECKED", 2000)
    monkeypatch.setattr(doctor, "CHECKED_WITH_GPU", 2000)
    doctor.reference_of.cache_clear()
    rows = list(doctor.examine(20_000))
    assert all(row.ok for row in rows)
    assert {row.weights for row in rows} == {
        sum(w.numel() for w in doctor.draw(torch.bfloat16, 20_000, torch.device("cpu")))
    }
    assert doctor.reference_of.cache_info().misses == 1


def test_floors_are_the_bytes_an_op_must_move():
    floors = {c.op: c.floor for c in doctor.checks(torch.float32, doctor.reference_of(torch.float32, 64))}
    assert floors["layer_moments"] == 4
    assert floors["WCR loss + backward"] == floors["WCR.add_grad_"] == 16
    assert floors["magnitude_masks global"] == 9
    assert floors["prune_ global"] == 12


def test_interpreter_is_a_place_of_its_own(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is used without a GPU only")
    monkeypatch.setattr(doctor, "interpreting", lambda: True)
    assert (torch.device("cpu"), "triton") in doctor.places()
