"""The direct launch past the JIT's binder, on a driver that notes what it is given; and the way round it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
CASES = [
    node.name
    for node in ast.parse((ROOT / "tests" / "launch_cases.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


@pytest.fixture(scope="module")
def results():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch_cases"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_launch(results, case):
    assert results[case] is None, results[case]


def test_interpreted_kernels_take_the_ordinary_way():
    from wcr_fast.kernels import launch, moments

    interpreted = not isinstance(moments._moments_kernel, triton.runtime.JITFunction)
    assert launch._ordinary(moments._moments_kernel) == (interpreted or not launch._DIRECT)


def test_every_launcher_goes_through_it():
    calls = [
        f"{path.name}:{node.lineno}"
        for path in ROOT.glob("kernels/*.py")
        if path.name != "launch.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert calls == []
