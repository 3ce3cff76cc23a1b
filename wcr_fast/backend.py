"""Which implementation runs an op: Triton kernels or plain torch.

``auto`` takes Triton for CUDA tensors and torch for the rest. ``WCR_FAST_BACKEND`` sets the default for the
process, ``backend(...)`` overrides it for a block. ``triton`` runs CPU tensors only in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch

CHOICES = ("auto", "torch", "triton")


def _check(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("wcr_fast_backend", default=None)


def active_backend() -> str:
    """Return the backend asked for: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises ValueError when the environment variable ``WCR_FAST_BACKEND`` holds anything else.
    """
    override = _override.get()
    if override is not None:
        return override
    return _check(os.environ.get("WCR_FAST_BACKEND", "auto"), "WCR_FAST_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside a ``with`` block.

    Args:
        name: ``"auto"`` (Triton for CUDA tensors, torch otherwise), ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: for any other name.

    Example:
        >>> import torch, wcr_fast
        >>> with wcr_fast.backend("torch"):
        ...     mean, var = wcr_fast.layer_moments([torch.ones(3)])
    """
    token = _override.set(_check(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Tell whether Triton runs kernels in its interpreter: decided when they are first imported."""
    tile = sys.modules.get("wcr_fast.kernels._tile")
    if tile is not None:
        return bool(tile.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _notice_no_triton() -> None:
    warnings.warn("triton is not installed: CUDA tensors take wcr-fast's torch path", stacklevel=4)


def use_triton(tensors: Sequence[torch.Tensor]) -> bool:
    """Choose the backend for a non-empty list of tensors.

    Raises RuntimeError when Triton was asked for and can't run them.
    """
    choice = active_backend()
    if choice == "torch" or not tensors:
        return False
    if choice == "auto":
        if any(t.device.type != "cuda" for t in tensors):
            return False
        if not triton_installed():
            _notice_no_triton()
            return False
    elif not triton_installed():
        raise RuntimeError("backend 'triton' was asked for, but triton is not installed: pip install triton")
    if interpreting():
        if any(t.device.type == "cuda" for t in tensors):
            raise RuntimeError("Triton's interpreter can't read CUDA tensors: unset TRITON_INTERPRET")
    elif any(t.device.type != "cuda" for t in tensors):
        raise RuntimeError(
            "backend 'triton' runs CPU tensors only in Triton's interpreter: "
            "set TRITON_INTERPRET=1 before wcr_fast's first use, or choose backend 'torch'"
        )
    return True
