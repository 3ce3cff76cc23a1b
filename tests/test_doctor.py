"""wcr-fast doctor: right when all is right, exit 1 when an op is wrong."""

import json

import pytest
import torch

from wcr_fast import cli, doctor
from wcr_fast.torch_path import moments


def test_all_right(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["doctor", "--size", "3000"]) == 0
    out = capsys.readouterr().out
    assert "all right" in out
    assert "WCR.add_grad_" in out
    assert "magnitude_masks 2:4" in out


def test_a_wrong_op_is_found(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    right = moments.layer_moments

    def wrong(tensors, r, rule=None):
        stats, coef = right(tensors, r, rule)
        stats[1] *= 1.01
        return stats, coef

    monkeypatch.setattr(moments, "layer_moments", wrong)
    assert cli.main(["doctor", "--size", "3000", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert not all(row["ok"] for row in rows)


def test_interpreter_is_a_place_of_its_own(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is used without a GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (torch.device("cpu"), "triton") in doctor.places()
