"""Test setup: the interpreter when there is no GPU, one fixed seed per test, both backends."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:  # Triton reads this when a kernel is defined, so it has to come before the first import.
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if CUDA else "cpu"

# What tests have compiled stays here, out of the user's own cache.
os.environ.setdefault("WCR_FAST_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "native"))


def _triton_skip_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if CUDA:
        return None
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} breaks with NumPy {np.__version__} (>= 2.4)"
    return None


TRITON_SKIP = _triton_skip_reason()
needs_triton = pytest.mark.skipif(TRITON_SKIP is not None, reason=TRITON_SKIP or "")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on both backends; Triton's on the GPU when there is one, else interpreted on the CPU."""
    import wcr_fast

    with wcr_fast.backend(request.param):
        yield request.param


@pytest.fixture
def device(request):
    """The device for this test's tensors: the GPU only where the Triton backend is under test."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "torch"
    return torch.device(DEVICE if name == "triton" else "cpu")


@pytest.fixture(params=["python", "compiled"])
def look(request, monkeypatch):
    """Run the test with both ways to look at tensors before a repeated call."""
    from wcr_fast import native

    if request.param == "python":
        monkeypatch.setattr(native, "_module", None)
        monkeypatch.setenv("WCR_FAST_NATIVE", "0")
    else:
        try:
            native.build()
        except RuntimeError as error:
            pytest.skip(str(error))
    return request.param
