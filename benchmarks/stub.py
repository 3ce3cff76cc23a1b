"""A Triton driver that compiles for sm_90 but launches nothing: the host's part of a launch, without a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

import wcr_fast
import wcr_fast.backend


class _Utils:
    """What a compiled kernel asks of the driver while it is loaded."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads per program

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, _: int) -> None:
        pass


class StubDriver(DriverBase):
    """Stands for one GPU; ``launches`` gets the arguments of every launch where it is a list."""

    def __init__(self, launches: list[tuple] | None = None) -> None:
        self.utils = _Utils()
        self.launches = launches

    def launcher_cls(self, *_: Any) -> Any:
        """Return the launcher of a kernel, given its source and metadata."""
        return _ignore if self.launches is None else lambda *args: self.launches.append(args)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return -1  # no real device's number: Triton keeps compiled kernels by it

    def get_current_stream(self, _: int) -> int:
        return 0


def _ignore(*_: Any) -> None:
    pass


@contextlib.contextmanager
def stubbed(launches: list[tuple] | None = None) -> Iterator[None]:
    """Send CPU tensors to real kernels, as if they lay on a GPU, whose launches do nothing.

    Give the list back to every use, or to none: a compiled kernel keeps the launcher that it was loaded with.
    """
    before = driver._active
    driver.set_active(StubDriver(launches))
    try:
        backend = sys.modules["wcr_fast.backend"]
        with mock.patch.object(backend, "interpreting", return_value=True), wcr_fast.backend("triton"):
            yield
    finally:
        driver._active = before
