"""The structure of the host's benchmark; what it measures is not for a test to judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def test_every_call_is_measured(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host", "--seconds", "0.01", "--out", str(tmp_path / "host.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stubbed: kernels are compiled" in done.stdout
    record = json.loads((tmp_path / "host.json").read_text())
    assert record["launches"].startswith("stubbed")
    rows = {(r["where"], r["call"], r["tensors"]): r for r in record["rows"]}
    for where in ("stubbed", "python") if record["look"] == "loaded" else ("python",):
        for tensors in (54, 2000):
            assert (where, "add_grad_", tensors) in rows
        for optimizer in ("SGD", "AdamW"):
            for penalty in ("", " + wcr"):
                for tensors in (161, 2000):
                    assert (where, f"{optimizer} step{penalty}", tensors) in rows
    for tensors in (54, 161, 2000):
        assert ("cpu", "torch fused SGD step", tensors) in rows
    assert all(0 < r["shortest_us"] <= r["median_us"] for r in rows.values())
    bounds = [r["bound_us"] for r in record["rows"] if r["where"] == "stubbed"]
    assert None not in bounds


def test_two_launches_whatever_the_list():
    script = """
import torch, wcr_fast
from benchmarks.host import SMALL, WEIGHTS, penalty_call
from benchmarks.stub import stubbed
launches = []
for shapes in (WEIGHTS[:9], SMALL):
    add = penalty_call(shapes, torch.device("cpu"))
    with stubbed(launches):
        for _ in range(3):
            launches.clear()
            add()
            print(len(launches), end=" ")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["2"] * 6, done.stderr
