"""Kernels compile without a GPU: no spills, 128-bit loads, and none is forgotten in the list."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def run(*args):
    """Run Python from the clone's root with real kernels, not interpreted ones."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def kernels_in_source():
    names = set()
    for path in ROOT.glob("kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert any("triton.jit" in ast.unparse(d) for d in node.decorator_list), node.name
                names.add(node.name)
    return names


def rows_of(record):
    return [
        {**dict(zip(record["columns"], common, strict=True)), "target": target}
        | dict(zip(record["figures"], figures, strict=True))
        for *common, targets in record["rows"]
        for target, figures in targets.items()
    ]


@pytest.fixture(scope="module")
def reports():
    done = run("-m", "benchmarks.codegen", "--json", "--essential", "--target", "sm_90")
    assert done.stdout, done.stderr
    return rows_of(json.loads(done.stdout)), done.returncode


def test_every_kernel_is_compiled(reports):
    assert {r["kernel"] for r in reports[0]} == kernels_in_source()


def test_no_spills_and_wide_loads_on_sm_90(reports):
    listed, code = reports
    assert [r for r in listed if r["problems"]] == []
    assert code == 0


def test_every_variant_within_its_budget(reports):
    listed, _ = reports
    over = [r for r in listed if r["budget"] is not None and (r["instructions_per_element"] or 0) > r["budget"]]
    assert [r for r in over if r["excess"] is None] == []
    # What the budgets are: 7.8 instructions for each byte that the op moves for an element.
    budgets = {(r["kernel"], r["variant"]): r["budget"] for r in listed}
    for kernel, variant, moved in (
        ("_fine_kernel", "float32 as float32, first pass", 4),
        ("_mask_kernel", "bfloat16 as bfloat16 in place, ties known", 4),
        ("_mask_kernel", "float32 as float32 mask, ties counted", 5),
        ("_nm_kernel", "float32 2:4", 8),
    ):
        assert budgets[kernel, variant] == pytest.approx(7.8 * moved), (kernel, variant)


def test_budgets_fail_and_known_excesses_do_not():
    script = """
import dataclasses
from benchmarks import codegen
wanted = ("_mask_kernel", "float32 as float32 mask, ties counted")
(variant,) = (v for v in codegen.all_variants() if (v.kernel.__name__, v.label) == wanted)
tight = dataclasses.replace(variant, bytes_per_element=0.1)
print(codegen.inspect(variant, "sm_90").problems, codegen.inspect(tight, "sm_90").problems)
codegen.EXCESSES += (codegen.Excess("_mask_kernel", "float32 mask", "known"),)
report = codegen.inspect(tight, "sm_90")
print(report.problems, report.excess, "over budget, known: known" in codegen.table([report]))
narrow = dataclasses.replace(variant, constants={**variant.constants, "BLOCK": 32})
for target in ("sm_80", "sm_90", "sm_100"):
    print(codegen.inspect(narrow, target).problems)
"""
    done = run("-c", script)
    assert done.stdout.splitlines() == [
        "() ('over budget',)",
        "() known True",
        *["('no 128-bit loads',)"] * 3,
    ], done.stderr


def test_other_targets_compile():
    done = run("-m", "benchmarks.codegen", "--only", "float32 wcr", "--target", "sm_80", "--target", "gfx942")
    assert done.returncode == 0, done.stderr
    assert "gfx942" in done.stdout
    assert "sm_80" in done.stdout


@pytest.mark.parametrize("name", ["codegen.json", "codegen-triton3.6.json"])
def test_committed_record_covers_every_kernel_and_target(name):
    text = (ROOT / "benchmarks" / "records" / name).read_text()
    record = json.loads(text)
    rows = rows_of(record)
    assert len(text) < 100_000
    assert record["problems"] == 0
    assert record["compiled"] == len(rows)
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {(r["kernel"], r["target"]) for r in rows} == {(k, t) for k in kernels_in_source() for t in targets}


def test_no_autotune():
    # It times kernels on live data, and fails without a GPU.
    assert not any("autotune" in path.read_text() for path in ROOT.glob("kernels/*.py"))
