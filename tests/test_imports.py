"""The arrows of the house: data flows one way, no cycles, and importing the package is light and silent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports only from its own group and from groups above it.
ORDER = [
    {"kernels"},
    {"wcr_fast.backend", "wcr_fast.errors", "wcr_fast.score", "wcr_fast.weights"},
    {"wcr_fast.native", "wcr_fast.table", "wcr_fast.slots", "wcr_fast.watch"},
    {"wcr_fast.torch_path", "wcr_fast.triton_path"},
    {"wcr_fast.ops"},
    {"wcr_fast.attach", "wcr_fast.curvature", "wcr_fast.regularizers", "wcr_fast.pruning", "wcr_fast.optim"},
    {"wcr_fast", "wcr_fast.machine"},
    {"wcr_fast.experiments", "wcr_fast.report"},
    {"wcr_fast.doctor", "wcr_fast.info"},
    {"wcr_fast.cli"},
    {"wcr_fast.__main__"},
]


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    files = [*ROOT.glob("wcr_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    return {module_name(f): f for f in files}


def imports_of(path, known):
    """Project modules that a file imports, at the top level or later; TYPE_CHECKING blocks don't count."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node):
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)

    Visitor().visit(ast.parse(path.read_text()))
    names = {name.replace("wcr_fast.kernels", "kernels") for name in found}
    hits = {name for name in names if name in known}
    # "from package import module" names the module; the package itself is then only the way to it
    return {h for h in hits if not any(o.startswith(h + ".") for o in hits)}


def group_of(name):
    best = max((len(prefix), i) for i, group in enumerate(ORDER) for prefix in group if is_in(name, prefix))
    return best[1]


def is_in(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_data_flows_one_way():
    known = modules()
    wrong = []
    for name, path in known.items():
        if name == "wcr_fast":
            continue  # the list of public names
        for other in imports_of(path, known):
            if group_of(other) > group_of(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_kernels_know_nothing_of_the_library():
    known = modules()
    for name, path in known.items():
        if is_in(name, "kernels"):
            assert all(is_in(other, "kernels") for other in imports_of(path, known)), name


def test_no_cycles():
    known = modules()
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    done, active = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in active, f"cycle: {[*active[active.index(name) :], name]}"
        active.append(name)
        for other in graph[name]:
            if other != "wcr_fast":
                visit(other)
        done.add(active.pop())

    for name in graph:
        visit(name)


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **kwargs)


def test_import_is_light_and_silent():
    code = """
import sys, wcr_fast
import torch
heavy = {"triton", "sklearn", "matplotlib", "rich", "transformers", "scipy"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_import_and_use_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else found(name, *a)
import torch, wcr_fast
w = torch.randn(8, 8)
wcr_fast.layer_moments([w])
wcr_fast.prune_([w], 0.5)
try:
    with wcr_fast.backend("triton"):
        wcr_fast.layer_moments([w])
except RuntimeError as error:
    assert "not installed" in str(error)
else:
    raise SystemExit("no error")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_triton_on_the_cpu_needs_the_interpreter():
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch, wcr_fast
with wcr_fast.backend("triton"):
    try:
        wcr_fast.layer_moments([torch.randn(8, 8)])
    except RuntimeError as error:
        assert "TRITON_INTERPRET=1" in str(error)
    else:
        raise SystemExit("no error")
"""
    pytest.importorskip("triton")
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_public_names_are_documented():
    import wcr_fast

    for name in wcr_fast.__all__:
        assert getattr(wcr_fast, name).__doc__, name
