"""The demo: its data, plan, training runs, worker processes and command."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from wcr_fast import cli
from wcr_fast.experiments import command, digits, methods, plan, sweep, train
from wcr_fast.experiments.progress import Progress
from wcr_fast.report import files

TINY = plan.Plan("tiny", steps=(3,), seeds=(1,), epochs=1)


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.prepare(*digits.read_digits())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Data and net ----------------------------------------------------------------------------------------------------


def test_the_split_is_the_committed_one():
    _, labels = digits.read_digits()
    parts = digits.split(labels)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 898, "val": 449, "test": 450}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    text = json.dumps([parts[name].tolist() for name in ("train", "val", "test")])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "18b4bf3a4536a1de"


def test_the_split_is_stratified():
    _, labels = digits.read_digits()
    for rows, share in zip(digits.split(labels).values(), digits.SHARES.values(), strict=True):
        assert np.all(np.abs(np.bincount(labels[rows]) - share * np.bincount(labels)) <= 1)


def test_images_are_standardised_with_the_training_part(data):
    assert abs(float(data.train.images.mean())) < 1e-5
    assert float(data.train.images.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(data.test.images.mean())) > 1e-5
    assert data.val.images.shape == (449, 1, 8, 8)
    assert [len(batch) for batch in data.train.batches(500)] == [449, 449]


def test_the_net_has_the_stated_weights():
    weights = [p for p in digits.build_net().parameters() if p.dim() > 1]
    assert (len(weights), sum(w.numel() for w in weights)) == (4, 65_824)


# Plan ------------------------------------------------------------------------------------------------------------


def test_every_method_has_the_same_number_of_strengths():
    for method in methods.ALL:
        assert len(set(method.ladder)) == methods.LADDER_STEPS
        assert list(method.ladder) == sorted(method.ladder)
    for size in plan.PLANS.values():
        runs = size.runs()
        assert len(runs) == len(set(runs)) == len(size.methods) * len(size.steps) * len(size.seeds)
        counts = {key: sum(run.method == key for run in runs) for key in size.methods}
        assert len(set(counts.values())) == 1
    assert len(plan.PLANS["full"].seeds) >= 5
    assert len(plan.PLANS["full"].steps) >= 6


PENALTIES = {
    "sgd": [],
    "l1": ["L1"],
    "l1 decoupled": ["L1"],
    "l1 proximal": ["L1"],
    "l2": ["L2"],
    "hoyer_square": ["HoyerSquare"],
    "wcr": ["WCR"],
    "log": ["LogConcentration"],
    "relative": ["RelativeConcentration"],
    "group_lasso": ["GroupLasso"],
    "group_hoyer_square": ["GroupHoyerSquare"],
    **{key: [] for key in ("sam", "asam", "cram", "cram+", "s2sam")},
}


@pytest.mark.parametrize("method", methods.ALL, ids=lambda m: m.key)
def test_each_method_trains_by_its_own_means(method):
    net, strength = digits.build_net(), method.ladder[0]
    penalties, optimizer = method.penalties(net, strength), method.optimizer(net, strength)
    alone = method.key.removesuffix("+wcr")
    assert [type(p).__name__ for p in penalties] == PENALTIES[alone] + ["WCR"] * (alone != method.key)
    assert all(p.lam == strength for p in penalties[:1] if PENALTIES[alone])
    names = {"sam": "SAM", "asam": "ASAM", "cram": "CrAM", "cram+": "CrAMPlus", "s2sam": "S2SAM"}
    assert type(optimizer).__name__ == names.get(alone, "SGD")
    assert optimizer.param_groups[0].get("rho", strength) == strength
    assert optimizer.param_groups[0]["weight_decay"] == (strength if alone == "sgd" else methods.WEIGHT_DECAY)


def test_all_methods_come_alone_and_with_wcr():
    keys = [m.key for m in methods.ALL]
    assert len(keys) == len(set(keys))
    assert set(PENALTIES) == {key for key in keys if not key.endswith("+wcr")}
    assert {f"{key}+wcr" for key in PENALTIES} - {"sgd+wcr", "wcr+wcr"} == {k for k in keys if k.endswith("+wcr")}


# Runs ------------------------------------------------------------------------------------------------------------


def test_training_learns_and_the_penalty_acts(data, one_thread):
    plain = train.train(plan.Run("sgd", 5e-4, 0, 4), data.train)
    lasso = train.train(plan.Run("l1", 8e-3, 0, 4), data.train)
    assert train.count_correct(plain, data.val) > 0.9 * len(data.val)
    assert float(lasso[4].weight.detach().abs().mean()) < 0.5 * float(plain[4].weight.detach().abs().mean())


def test_a_row_holds_what_was_counted(data, one_thread):
    run = plan.Run("wcr", 1e-5, 3, 2)
    row = train.execute(run, data)
    net = train.train(run, data.train)
    assert row["correct"]["as_is"]["test"][0] == train.count_correct(net, data.test)
    assert row["correct"]["as_is"]["val"][0] == train.count_correct(net, data.val)
    magnitudes = torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() > 1]).abs().numpy()
    assert sum(row["magnitudes"]) == magnitudes.size
    low, high = train.MAGNITUDE_EDGES[50:52]
    assert row["magnitudes"][50] == np.sum((magnitudes >= low) & (magnitudes < high))
    assert json.loads(json.dumps(row)) == row


def test_a_diverged_run_is_marked(data, one_thread, monkeypatch):
    monkeypatch.setattr(methods, "LEARNING_RATE", 1e30)
    row = train.execute(plan.Run("sgd", 5e-4, 0, 1), data)
    assert row["diverged"]
    assert set(row["correct"]["as_is"]["test"]) == {0}


def test_two_demos_agree_bit_for_bit_whatever_the_workers(monkeypatch, tmp_path, capsys):
    two = dataclasses.replace(TINY, methods=("sgd", "l1+wcr"))
    first, second = command.run_plan(two, workers=1), command.run_plan(two, workers=2)
    assert [row["weights_sha256"] for row in first["runs"]] == [row["weights_sha256"] for row in second["runs"]]
    assert first["digest"] == second["digest"]
    assert [row["method"] for row in first["runs"]] == ["sgd", "l1+wcr"]
    assert first["runs"][0]["weights_sha256"] != first["runs"][1]["weights_sha256"]

    text = command.write_report(first, tmp_path)
    names = {"results.json", "accuracy.png", "front.png", "magnitudes.png", "report.html"}
    assert set(os.listdir(tmp_path)) == names
    capsys.readouterr()
    again = tmp_path / "again"
    assert cli.main(["demo", "--from", str(tmp_path / "results.json"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == text.replace(str(tmp_path), str(again)) + "\n"
    for name in names:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_failing_run_names_itself():
    with pytest.raises(RuntimeError, match=r"method='none'.* failed:\n(.|\n)*KeyError"):
        sweep.sweep([plan.Run("none", 1.0, 0, 1)], digits.read_digits, workers=1)
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_an_error():
    def kill(row):
        for child in multiprocessing.active_children():
            child.kill()

    runs = [plan.Run("sgd", 5e-4, seed, 1) for seed in range(3)]
    with pytest.raises(RuntimeError, match="died"):
        sweep.sweep(runs, digits.read_digits, workers=1, on_row=kill)


# Progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _plain_environment(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.usefixtures("_plain_environment")
def test_a_file_gets_a_line_each_tenth():
    stream = io.StringIO()
    with Progress(25, "runs", stream) as progress:
        for _ in range(25):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("runs: 3 of 25 (12 %), about ")
    assert lines[-1].startswith("runs: 25 of 25 (100 %), about 0 s left")


@pytest.mark.usefixtures("_plain_environment")
@pytest.mark.parametrize(("variable", "value"), [(None, ""), ("NO_COLOR", "1"), ("TERM", "dumb"), ("CI", "true")])
def test_a_terminal_gets_a_bar_unless_it_is_dumb(monkeypatch, variable, value):
    if variable:
        monkeypatch.setenv(variable, value)
    stream = Terminal()
    with Progress(4, "runs", stream) as progress:
        for _ in range(4):
            progress.advance()
    text = stream.getvalue()
    assert ("\x1b[" in text) == (variable in (None, "NO_COLOR"))
    assert ("\x1b[38;" in text or "\x1b[3" in text) == (variable is None)
    assert "4/4" in text or "4 of 4" in text


# Command ---------------------------------------------------------------------------------------------------------


def test_missing_extra_exits_3(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 3
    assert 'pip install "wcr-fast[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--quick", "--full"], ["--from", "x", "--quick"]])
def test_wrong_arguments_exit_2(arguments, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_out_that_is_a_file_exits_2_before_any_training(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"schema": 0}', '{"schema": 1, "plan": 0}'])
def test_a_damaged_results_file_exits_2(tmp_path, capsys, content):
    source = tmp_path / "results.json"
    if content is not None:
        source.write_text(content)
    assert cli.main(["demo", "--from", str(source), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "results.json" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_write_file_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    files.write_file(target, b"old")
    files.write_file(target, b"new")
    assert target.read_bytes() == b"new"

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_file(target, b"newer")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="signals to a process group")
def test_ctrl_c_ends_the_workers_and_exits_130(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "wcr_fast", "demo", "--full", "--workers", "2", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with open(children) as file:
                pids = file.read().split()
            if len(pids) >= 2:
                break
            time.sleep(0.1)
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].endswith("interrupted")
    assert os.listdir(out) == []
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)
