"""Every example in a docstring and in the README runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from conftest import TRITON_SKIP

import wcr_fast

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    m.name
    for m in pkgutil.walk_packages(wcr_fast.__path__, "wcr_fast.")
    if not m.name.startswith(("wcr_fast.kernels", "wcr_fast.triton_path")) and not m.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    if name == "wcr_fast.doctor" and TRITON_SKIP:
        pytest.skip(TRITON_SKIP)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def sections(text, level):
    """Headings of a level -> what stands below, up to the next heading of any level."""
    found = re.findall(rf"^{'#' * level} (.+)\n((?:(?!^#+ ).*\n?)*)", text, flags=re.MULTILINE)
    return {heading.strip(): re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL) for heading, body in found}


METHODS = (ROOT / "docs" / "methods.md").read_text()
EXAMPLES = {**sections(METHODS, 3), "Strengths that change": sections(METHODS, 2)["Strengths that change"]}


def test_every_method_of_the_table_has_its_example():
    anchors = re.findall(r"^\| \[.*?\]\(#(.*?)\)", METHODS, flags=re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in sections(METHODS, 3)}
    assert set(anchors) == headings
    kinds = (wcr_fast.regularizers.Term, wcr_fast.optim.PerturbedOptimizer)
    bases = {"Regularizer", "Term", "PerturbedOptimizer", "TwoPassOptimizer", "VAR"}
    for module in (wcr_fast.regularizers, wcr_fast.optim):
        for name in set(module.__all__) - bases:
            if isinstance(getattr(module, name), type) and issubclass(getattr(module, name), kinds):
                assert name.lower() in anchors, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_methods(name, capsys):
    (code,) = EXAMPLES[name]
    assert len(code.strip().splitlines()) == 3
    scope = {"__name__": "methods"}
    exec(compile(sections(METHODS, 2)["In code"][0], "methods.md", "exec"), scope)
    before = [p.detach().clone() for p in scope["model"].parameters()]
    exec(compile(code, f"methods.md, {name}", "exec"), scope)
    changed = not all(map(torch.equal, before, scope["model"].parameters()))
    graded = any(p.grad is not None for p in scope["model"].parameters())
    assert changed or graded or name == "Strengths that change"
