"""Checkpoints pruned by several processes at once: the same bytes as by one, and they fail together."""

import filecmp
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_tools import write_dcp
from safetensors.torch import load_file, save_file

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

import rank_checks as checks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints of all formats, and next to them what one process makes of each."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("ranks")

    def weights(*shape):
        return (torch.randn(*shape) * 4).round() / 4

    stored = {
        "a.weight": weights(37, 30),
        "b.weight": weights(6, 8, 3, 3).bfloat16(),
        "c.weight": weights(12, 14).half(),
        "a.bias": torch.randn(37),
        "d.weight": weights(90, 33),
    }
    (root / "hf" / "sub").mkdir(parents=True)
    names = list(stored)
    save_file({n: stored[n] for n in names[:2]}, root / "hf" / "m-1.safetensors")
    save_file({n: stored[n] for n in names[2:]}, root / "hf" / "m-2.safetensors")
    for file in ("config.json", "sub/a.txt", "sub/b.txt"):
        (root / "hf" / file).write_text(file)
    save_file({"w": torch.randn(100, 77), "b": torch.randn(9)}, root / "one.safetensors")
    write_dcp(root / "dcp", stored, {"a.weight": {0: [5], 1: [11]}, "d.weight": {1: [7, 20]}}, files=3)
    write_dcp(root / "dcp rows", stored, {"a.weight": {0: [5, 20]}, "d.weight": {0: [70]}}, files=2)
    bad = torch.randn(50, 50)
    bad[49, 49] = torch.nan
    save_file({"w": torch.randn(50, 50), "x": bad}, root / "nan.safetensors")
    return root


def same_files(first, second):
    if first.is_file():
        return filecmp.cmp(first, second, shallow=False)
    files = sorted(p.relative_to(first) for p in first.rglob("*"))
    assert files == sorted(p.relative_to(second) for p in second.rglob("*"))
    return all(filecmp.cmp(first / f, second / f, shallow=False) for f in files if (first / f).is_file())


@pytest.fixture(scope="module")
def alone(root):
    """What one process makes of it."""
    found = {}
    for case in checks.CASES:
        found[case] = checks.prune(root, f"1 {checks.name(*case)}", case).to_dict() | {"target": ""}
    for folder in ("hf", "dcp"):
        several = checks.prune(root, None, (folder, "global", checks.SEVERAL), dry_run=True)
        found[folder] = [record.to_dict() for record in several]
    found["rows"] = checks.prune(root, None, ("hf", "row", 0.5), dry_run=True).to_dict()
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_equal_one(root, alone, ranks):
    # One start for all checks: it takes longer than they do.
    torch.multiprocessing.spawn(checks.work, (ranks, str(root)), nprocs=ranks)
    for rank in range(ranks):
        found = torch.load(root / f"{ranks}.{rank}.pt")
        assert not isinstance(found, str), found
        for case, want in alone.items():
            got = found[case]
            if case in checks.CASES:
                done, total = got.pop("progress")
                assert abs(done - total) <= 1, case
                assert same_files(root / f"1 {checks.name(*case)}", root / f"{ranks} {checks.name(*case)}"), case
            assert got == want, case
        assert "tensor 'x' holds NaN" in found["nan"]
        assert "exists already" in found["there"]
        assert "nothing" in found["full"]
        assert "No space left" in found["full"]
        assert "Input/output error" in found["unreadable"]
        assert found["a fault of ours"].endswith("ZeroDivisionError: oh")
        assert found["alone"] == "no error"
    left = [path.name for path in root.iterdir() if path.name.startswith((".", "nothing"))]
    assert not left


def torchrun(*arguments, script=("-m", "wcr_fast")):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.run(
        [sys.executable, *launch, *script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_torchrun(root, tmp_path):
    done = torchrun("prune", root / "one.safetensors", tmp_path / "out.safetensors", "--sparsity", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["asked"] == 3850
    assert int((load_file(tmp_path / "out.safetensors")["w"] == 0).sum()) == 3850
    done = torchrun("prune", root / "nan.safetensors", tmp_path / "out2.safetensors", "--sparsity", "0.5")
    assert done.returncode != 0
    assert done.stderr.count("wcr-fast: error") == 1
    assert "tensor 'x' holds NaN" in done.stderr
    assert os.listdir(tmp_path) == ["out.safetensors"]


KILLED = """
import os, signal, sys
from wcr_fast import cli
from wcr_fast.pruning import checkpoint_write
if os.environ["RANK"] == "1":
    checkpoint_write.write_behind = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_process_ends_the_others(root, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    arguments = ["prune", root / "hf", tmp_path / "out", "--sparsity", "0.5"]
    done = torchrun(*arguments, script=[str(script)])
    assert done.returncode != 0
    assert "Signal 9" in done.stderr
    assert [path.name for path in Path(tmp_path).iterdir()] == ["killed.py"]
