"""How kernels are launched: settings as data, one launch function, and the variants ``benchmarks.codegen`` checks.

The sizes follow from 16-byte loads: 16 KiB per block is 64 bytes in flight for each of 256 threads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Elements of one chunk (one program), for every op and dtype: one chunk map serves them all.
CHUNK = 32768

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# The key of infinity; what lies above is NaN. The torch path has its own copy in wcr_fast.torch_path.cuts: kernels
# import nothing from the package, and that path imports nothing that needs Triton.
INF_KEYS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
INF_KEYS[torch.float64] = 0x7FF0000000000000

# Every launch says so explicitly: the default changes between Triton versions, the results must not.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class LaunchConfig:
    """Elements loaded at a time, on the path without masks and on the general one, and warps per program.

    The general path keeps a 64-bit offset per element: smaller blocks stop it from taking the registers that
    decide how many programs share a multiprocessor.
    """

    block: int
    warps: int
    general: int = 0
    registers: int = 0  # the most that a thread may take on NVIDIA GPUs; 0 leaves it to the compiler

    def options(self) -> dict[str, Any]:
        limit = {"maxnreg": self.registers} if self.registers and not torch.version.hip else {}
        return {"num_warps": self.warps, **limit, **OPTIONS}


# (op, bytes per element) -> settings. Rows differ only where a reason is given.
_CONFIGS = {
    # Blocks of LANES elements, so that every kernel sums in the same order; 16 bytes a thread and load.
    ("moments", 2): LaunchConfig(1024, 4),
    ("moments", 4): LaunchConfig(1024, 8),
    ("moments", 8): LaunchConfig(1024, 8),
    # Left alone, the compiler spills some registers to stay at 64 or 80 under Triton 3.6: of one r, of two.
    ("moments of terms", 2): LaunchConfig(1024, 4, registers=104),
    ("moments of terms", 4): LaunchConfig(1024, 8, registers=80),
    ("moments of terms", 8): LaunchConfig(1024, 8, registers=104),
    ("joint moments", 2): LaunchConfig(1024, 4),
    ("joint moments", 4): LaunchConfig(1024, 8, registers=104),
    ("joint moments", 8): LaunchConfig(1024, 8),
    # Left alone, the compiler spills some registers to stay at 128; three programs fit with these.
    ("step", 2): LaunchConfig(1024, 4, registers=168),
    ("step", 4): LaunchConfig(1024, 8),
    ("step", 8): LaunchConfig(1024, 8),
    ("amsgrad step", 2): LaunchConfig(1024, 4, registers=168),
    ("amsgrad step", 4): LaunchConfig(1024, 8, registers=144),  # spills at 128 under Triton 3.6
    ("amsgrad step", 8): LaunchConfig(1024, 8),
    ("tracked step", 2): LaunchConfig(1024, 4, registers=192),
    ("tracked step", 4): LaunchConfig(1024, 8, registers=160),
    ("tracked step", 8): LaunchConfig(1024, 8),
    # Two streams are read: half a block of each keeps the same bytes in flight and the registers low.
    ("gradient", 2): LaunchConfig(2048, 8),
    ("gradient", 4): LaunchConfig(2048, 8),
    ("gradient", 8): LaunchConfig(1024, 8),
    # As the moments: sums run in the same order in every dtype.
    ("squares", 2): LaunchConfig(1024, 4),
    ("squares", 4): LaunchConfig(1024, 8),
    ("squares", 8): LaunchConfig(1024, 8),
    ("ascend", 2): LaunchConfig(2048, 8),
    ("ascend", 4): LaunchConfig(2048, 8),
    ("ascend", 8): LaunchConfig(1024, 8),
    ("codes", 2): LaunchConfig(4096, 8),
    # By the weights' dtype, not the keys'. Twice these blocks spill; so do some forms that are left alone.
    ("fine", 2): LaunchConfig(4096, 8, registers=128),
    ("fine", 4): LaunchConfig(2048, 8),
    ("fine", 8): LaunchConfig(1024, 8),
    # Of 16-bit weights among float64 ones.
    ("fine among float64", 2): LaunchConfig(4096, 8, registers=168),
    # Two streams are read.
    ("fine scores", 2): LaunchConfig(2048, 8, registers=96),
    ("fine scores", 4): LaunchConfig(1024, 8, registers=64),
    ("fine scores", 8): LaunchConfig(512, 8),
    ("survey", 2): LaunchConfig(4096, 8),
    ("survey", 4): LaunchConfig(4096, 8),
    ("survey", 8): LaunchConfig(2048, 8),
    ("mask", 2): LaunchConfig(4096, 8, 1024),
    ("mask", 4): LaunchConfig(4096, 8, 1024),
    ("mask", 8): LaunchConfig(2048, 8, 1024),
    # It computes more with scores, and counts more in place. Left alone, the compiler spills some registers to stay at
    # 80; two programs fit in these.
    ("mask scores", 4): LaunchConfig(4096, 8, 1024, registers=112),
    ("mask scores", 8): LaunchConfig(2048, 8, 1024, registers=112),
    ("mask in place", 2): LaunchConfig(4096, 8, 1024, registers=112),
    ("mask in place", 4): LaunchConfig(4096, 8, 1024, registers=112),
    ("mask in place", 8): LaunchConfig(1024, 8, 1024, registers=112),
    # One program per row: most rows are a few thousand elements, four warps leave fewer idle.
    # Blocks of twice the size spill on sm_80.
    ("rows", 2): LaunchConfig(1024, 4, 512),
    ("rows", 4): LaunchConfig(1024, 4, 512),
    ("rows", 8): LaunchConfig(1024, 4, 512),
    # Left alone, the compiler spills some registers to stay at 80, with the numbers of a score beside the weights;
    # with 96 and 128, 16-bit and float64 weights spill some under Triton 3.6.
    ("rows scores", 2): LaunchConfig(1024, 4, 512, registers=104),
    ("rows scores", 4): LaunchConfig(1024, 4, 512, registers=96),
    ("rows scores", 8): LaunchConfig(1024, 4, 512, registers=144),
    # Ranks are compared column by column in registers: small tiles keep them from spilling. Left alone,
    # the compiler spills two of float64's under Triton 3.6 to stay at 48.
    ("nm", 2): LaunchConfig(1024, 4),
    ("nm", 4): LaunchConfig(1024, 4),
    ("nm", 8): LaunchConfig(256, 4, registers=128),
    # Groups of sixteen spill with less than 144 on sm_90; those of four take up to 96.
    ("nm scores", 2): LaunchConfig(1024, 4, registers=144),
    ("nm scores", 4): LaunchConfig(1024, 4, registers=144),
    ("nm scores", 8): LaunchConfig(256, 4, registers=128),
}


def config(op: str, dtype: torch.dtype) -> LaunchConfig:
    """Return the launch settings of an op for one dtype."""
    return _CONFIGS[op, dtype.itemsize]


# Versions whose JIT ends in ``run(x, y, z, stream, function, metadata, launch metadata, two hooks, *arguments)``.
_DIRECT_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) in _DIRECT_VERSIONS

# Compiled kernel, its launcher and the trailing arguments, by everything that decides what Triton compiles and loads.
_prepared: dict[tuple, tuple[CompiledKernel, Callable, tuple]] = {}


def _ordinary(kernel: Any) -> bool:
    """Tell whether a launch has to take Triton's own way: interpreted, of an unknown version, watched or debugged."""
    if not _DIRECT or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return True
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or runtime.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
        or any(getattr(hook, "calls", hook) for hook in hooks)
    )


def _specialisation(arg: torch.Tensor | float) -> Any:
    """Return what Triton compiles anew for, of an argument: the dtype, and alignment, divisibility by 16 or being 1."""
    if isinstance(arg, float):
        return float
    if isinstance(arg, int):
        return type(arg), arg == 1, arg % 16 == 0, arg.bit_length() // 32
    return arg.dtype, arg.data_ptr() % 16 == 0


def launch(
    kernel: Any,
    programs: int,
    args: tuple[torch.Tensor | float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch so many programs of a kernel: ``args`` in signature order, then its compile-time constants by name.

    The first launch of a form goes through the JIT, which compiles it. Later ones call the compiled kernel: the
    binder between would take longer than a short kernel runs.
    """
    if _ordinary(kernel):
        kernel[(programs,)](*args, **constants, **options)
        return
    device = driver.active.get_current_device()
    key = (
        driver.active,
        device,
        id(kernel),  # never another's: the compiled kernel keeps its source alive
        *map(_specialisation, args),
        *constants.items(),
        *options.items(),
    )
    prepared = _prepared.get(key)
    if prepared is None:
        compiled = kernel[(programs,)](*args, **constants, **options)
        names = kernel.arg_names[len(args) :]
        # The calling convention is known for CUDA; arguments left to their defaults stay with the binder.
        if (
            isinstance(compiled, CompiledKernel)
            and compiled.metadata.target.backend == "cuda"
            and {*names} == {*constants}
        ):
            trailing = tuple(constants[name] for name in names)
            _prepared[key] = compiled, compiled.run, trailing
        return
    compiled, run, trailing = prepared
    stream = driver.active.get_current_stream(device)
    where = programs, 1, 1, stream, compiled.function, compiled.packed_metadata
    run(*where, None, None, None, *args, *trailing)


def float_pair(value: float) -> tuple[float, float]:
    """Split a float64 into two float32 values that sum to it (48 bits): kernel arguments are float32."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, as its launcher asks for it: what the code generation check compiles."""

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    # Bytes that the full-chunk path reads per element, in 128-bit loads, over those of DTYPE; 0 without that path.
    streams: float = 1
    essential: bool = True  # False where another variant has the same loops: the full list compiles it, tests don't
    bytes_per_element: float | None = None  # that the op moves: the budget; None without a full-chunk path to count
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    backend: str | None = None  # "cuda" or "hip" where the form is for one of them only
