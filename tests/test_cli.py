"""The command line: exit codes, one line per error, results on stdout, lazy imports."""

import io
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import wcr_fast
from wcr_fast import cli, errors, info
from wcr_fast.pruning import command


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "in.safetensors"
    save_file({"w": torch.randn(10, 10), "b": torch.randn(10)}, path)
    return path


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


def test_prune_prints_a_table(weights, tmp_path, capsys):
    assert cli.main(["prune", str(weights), str(tmp_path / "out.safetensors"), "--sparsity", "0.9"]) == 0
    out, err = capsys.readouterr()
    assert "90.00%" in out
    assert "left out: 1 tensor (1-d, such as b)" in out
    assert err == ""
    assert int((load_file(tmp_path / "out.safetensors")["w"] == 0).sum()) == 90


def test_prune_prints_json(weights, tmp_path, capsys):
    arguments = ["prune", str(weights), "--dry_run", "--sparsity=1", "--json"]  # "_" does for "-"
    assert cli.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == "wcr-fast/prune/1"
    assert record["version"] == wcr_fast.__version__
    assert record["asked"] == record["zeros"] == record["numel"] == 100
    assert record["target"] is None
    assert record["per_layer"][0] | {"dtype": "F32", "shape": [10, 10]} == record["per_layer"][0]
    assert list(tmp_path.iterdir()) == [weights]


def test_prune_at_several_sparsities(weights, tmp_path, capsys):
    assert cli.main(["prune", str(weights), "--dry-run", "--sparsity", ".5,0.8,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "wcr-fast/prune-several/1"
    assert [(record["requested"], record["zeros"]) for record in found["records"]] == [(0.5, 50), (0.8, 80), (1, 100)]
    assert cli.main(["prune", str(weights), "--dry-run", "--sparsity", ".5,0.8,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["sparsity 0.5", "sparsity 0.8", "sparsity 1"]
    assert lines[5].split() == ["all", "100", "50.00%", "80.00%", "100.00%"]
    assert lines[-1] == "dry run: nothing written"
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["prone"], "invalid choice"),
        (["prune"], "required: IN"),
        (["prune", "{in}", "{out}"], "sparsity"),
        (["prune", "{in}", "{out}", "--sparsity", "90"], r"\[0, 1\]"),
        (["prune", "{in}", "{out}", "--sparsity", "many"], "invalid float"),
        (["prune", "{in}", "{out}", "--sparsity", ".5,"], "invalid float"),
        (["prune", "{in}", "{out}", "--sparsity", ".5,.9"], "--dry-run"),
        (["prune", "{in}", "{out}", "--sparsity", ".5", "--scope", "3:2"], "3:2"),
        (["prune", "{in}", "{in}", "--sparsity", ".5"], "in.safetensors: exists already; --force"),
        (["prune", "{out}", "{in}", "--sparsity", ".5"], "out.safetensors: no such file"),
        (["prune", "{in}", "{out}", "--sparsity", ".5", "--exclude", "x"], "'x' matches no"),
        (["prune", "{in}", "{out}", "--sparsity", ".5", "--exclude", "w"], "nothing to prune"),
        (["info", "--bogus"], "unrecognized"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(weights, tmp_path, capsys, arguments, message):
    places = {"in": weights, "out": tmp_path / "out.safetensors"}
    assert cli.main([a.format(**places) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err).startswith("wcr-fast")
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == [weights]


def run_info(monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    return cli.main(["info"])


def test_errors_and_their_codes(monkeypatch, capsys):
    for error, code, text in [
        (errors.UsageError("what and how"), 2, "what and how"),
        (errors.MissingExtra("pip install it"), 3, "pip install it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "a.txt: No such file"),
        (ZeroDivisionError("oh"), 1, "ZeroDivisionError: oh"),
    ]:
        assert run_info(monkeypatch, error) == code
        assert text in one_line(capsys.readouterr().err)
    assert run_info(monkeypatch, BrokenPipeError()) == 0
    assert capsys.readouterr() == ("", "")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("WCR_FAST_DEBUG", "1")
    with pytest.raises(errors.UsageError):
        run_info(monkeypatch, errors.UsageError("x"))


def test_require_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(errors.MissingExtra, match=r'pip install "wcr-fast\[demo\]"'):
        errors.require("sklearn.datasets", "demo")
    assert errors.require("json", "demo") is json


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(args):
        warnings.showwarning(UserWarning("mind this"), UserWarning, "file.py", 1)
        return 0

    before = warnings.showwarning
    monkeypatch.setattr(info, "run", warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "wcr-fast: warning: mind this\n"
    assert warnings.showwarning is before


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wcr-fast {wcr_fast.__version__}\n"
    for arguments in (["--help"], ["prune", "--help"], ["info", "-h"]):
        assert cli.main(arguments) == 0
        assert "usage: wcr-fast" in capsys.readouterr().out


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("WCR_FAST_BACKEND", "torch")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "wcr-fast/info/2"
    assert found["packages"]["torch"] == torch.__version__
    assert found["backend"]["cpu"] == {"runs": "torch", "why": "WCR_FAST_BACKEND=torch asks for it"}
    monkeypatch.setenv("WCR_FAST_BACKEND", "cuda")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "WCR_FAST_BACKEND must be one of" in out
    assert "backend on cpu" in out
    assert "compiled for selection" in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(monkeypatch):
    now = 0.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    log, screen = io.StringIO(), Terminal()
    with command.ProgressLine(log) as plain, command.ProgressLine(screen) as bar:
        for now in range(1, 101):
            plain.show(now * 10**9, 100 * 10**9)
            bar.show(now * 10**9, 100 * 10**9)
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4] == "prune  50%  1.00 GB/s  50 s left"
    assert screen.getvalue().count("\r") == 101
    assert screen.getvalue().endswith("\r\x1b[K")


def test_progress_follows_a_change_of_pace(monkeypatch):
    """Half as fast for the second half: the rate tells the new pace, and so does the time left."""
    now = 0.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    log = io.StringIO()
    with command.ProgressLine(log) as line:
        for i in range(1, 1001):
            now += 0.1 if i <= 500 else 0.2
            line.show(i * 10**8, 1000 * 10**8)
    lines = log.getvalue().splitlines()
    assert lines[4] == "prune  50%  1.00 GB/s  50 s left"
    assert lines[7] == "prune  80%  0.50 GB/s  40 s left"


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "wcr_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_as_a_module(tmp_path):
    done = run("prune", str(tmp_path / "gone.safetensors"), "x", "--sparsity", "0.5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "gone.safetensors" in one_line(done.stderr)


def test_a_closed_pipe_is_quiet():
    code = f"{sys.executable} -m wcr_fast info --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_commands_are_not_imported():
    code = """
import sys
from wcr_fast import cli
assert cli.main(["info"]) == 0
wrong = {"wcr_fast.pruning.command", "wcr_fast.experiments.command", "wcr_fast.doctor", "triton", "sklearn"}
assert not wrong & set(sys.modules), wrong & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
