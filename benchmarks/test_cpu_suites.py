"""The suites on the CPU through pytest-benchmark: ``pytest benchmarks --benchmark-only`` (the bench extra).

Every side is verified before it's timed, as in ``python -m benchmarks``.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install -e ".[bench]"')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ isn't installed

from benchmarks.harness import Cpu, WrongResult
from benchmarks.suites import optimizer_step, penalty, perturb, select_mask

CASES = [case for suite in (penalty, optimizer_step, select_mask, perturb) for case in suite.cases(Cpu(), quick=False)]
SIDES = [
    pytest.param(case, side, id=f"{case.list}-{case.dtype}-{case.op}-{side.name}".replace(" ", "_"))
    for case in CASES
    for side in case.sides
]


@pytest.mark.parametrize(("case", "side"), SIDES)
def test_side(benchmark, case, side):
    subject = side.build(1)
    subject.ready(0)()
    try:
        subject.verify()
    except WrongResult as error:
        (pytest.fail if side.ours else pytest.skip)(f"not timed: {error}")
    benchmark.group = f"{case.list} {case.dtype} {case.op}"
    benchmark.extra_info.update(weights=case.weights, bytes=side.bytes)
    if subject.prepare is None:
        benchmark(subject.call, 0)
    else:
        benchmark.pedantic(subject.call, (0,), setup=lambda: subject.prepare(0), rounds=10, warmup_rounds=1)
