"""Compile every kernel without a GPU and print what came out: registers, spills, shared memory, load width.

    python -m benchmarks.codegen [--json] [--target sm_90 ...] [--only WORD]

The exit code is 1 when a kernel spills, or when the full-chunk path of a kernel that streams weights has no
128-bit loads on sm_90. SASS per element counts the machine instructions of the full-chunk loop, as unrolled by
the compiler, over the elements it handles per thread; it is a static count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

# Interpreted kernels can't be compiled, and Triton reads this when they are defined.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wcr_fast.kernels import mask, moments, select
from wcr_fast.kernels.launch import Variant

MODULES = (moments, select, mask)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GATED = "sm_90"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant on one target."""

    kernel: str
    variant: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int  # 128-bit loads of global memory
    other_loads: int
    instructions_per_element: float | None  # NVIDIA only, for the longest loop with wide loads
    problems: tuple[str, ...]


def all_variants() -> list[Variant]:
    """Return every compiled form that the kernel modules list."""
    return [variant for module in MODULES for variant in module.variants()]


def compile_variant(variant: Variant, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compile one variant as a launch would, with pointers known to be 16-byte aligned."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options={"num_warps": variant.warps, **variant.options})


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Run one of the disassemblers that come with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    text: str


def _instructions(sass: str) -> list[Instruction]:
    pattern = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)[^;]*);")
    return [Instruction(int(m[1], 16), m[3], m[2]) for m in pattern.finditer(sass)]


def _wide_regions(instructions: list[Instruction]) -> Iterable[list[Instruction]]:
    """Yield the straight runs of code around 128-bit loads: loop bodies, or unrolled stretches between branches."""
    region: list[Instruction] = []
    for instruction in instructions:
        region.append(instruction)
        if instruction.name.startswith(("BRA", "EXIT", "BSYNC", "WARPSYNC")):
            if any(_is_wide(i) for i in region):
                yield region
            region = []


def _is_wide(instruction: Instruction) -> bool:
    return instruction.name.startswith("LDG") and ".128" in instruction.name


def _nvidia(variant: Variant, compiled: triton.compiler.CompiledKernel) -> dict:
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instructions = _instructions(_tool("nvdisasm", compiled.asm["cubin"], "-c"))
    loads = [i for i in instructions if i.name.startswith("LDG")]
    wide = [i for i in loads if _is_wide(i)]
    return {
        "registers": int(figures["REG"]),
        "spill_bytes": int(figures["STACK"]) + int(figures["LOCAL"]),
        "wide_loads": len(wide),
        "other_loads": len(loads) - len(wide),
        "instructions_per_element": _per_element(variant, instructions),
    }


def _per_element(variant: Variant, instructions: list[Instruction]) -> float | None:
    if not variant.elements:
        return None
    item = variant.constants["DTYPE"].primitive_bitwidth // 8
    best = None
    for region in _wide_regions(instructions):
        elements = sum(map(_is_wide, region)) * 16 // item
        ratio = len(region) / elements
        best = ratio if best is None else min(best, ratio)
    return best and round(best, 1)


def _amd(compiled: triton.compiler.CompiledKernel) -> dict:
    assembly = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    loads = re.findall(r"\b((?:global|buffer|flat)_load_\w+)", assembly)
    wide = [name for name in loads if name.endswith("dwordx4")]
    return {
        "registers": figure("vgpr_count"),
        "spill_bytes": 4 * figure("vgpr_spill_count") + 4 * figure("sgpr_spill_count"),
        "wide_loads": len(wide),
        "other_loads": len(loads) - len(wide),
        "instructions_per_element": None,
    }


def inspect(variant: Variant, target: str) -> Report:
    """Compile one variant for one target and judge it."""
    compiled = compile_variant(variant, TARGETS[target])
    figures = _amd(compiled) if TARGETS[target].backend == "hip" else _nvidia(variant, compiled)
    problems = []
    if figures["spill_bytes"]:
        problems.append("spills")
    if target == GATED and variant.elements and variant.wide_loads and not figures["wide_loads"]:
        problems.append("no 128-bit loads")
    return Report(
        kernel=variant.kernel.__name__,
        variant=variant.label,
        target=target,
        shared_bytes=compiled.metadata.shared,
        problems=tuple(problems),
        **figures,
    )


def _inspect_number(job: tuple[int, str]) -> Report:
    return inspect(_variants_once()[job[0]], job[1])


@functools.cache
def _variants_once() -> list[Variant]:
    return all_variants()


def table(reports: list[Report]) -> str:
    """Return the reports as aligned text."""
    head = ("kernel", "variant", "target", "regs", "spill B", "shared B", "128-bit", "other", "SASS/el", "")
    lines = [head]
    for r in reports:
        ratio = "" if r.instructions_per_element is None else f"{r.instructions_per_element:.1f}"
        numbers = (r.registers, r.spill_bytes, r.shared_bytes, r.wide_loads, r.other_loads)
        lines.append((r.kernel, r.variant, r.target, *map(str, numbers), ratio, ", ".join(r.problems)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and return 1 when something spills or reads narrowly."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only these (default: all)")
    parser.add_argument("--only", default="", metavar="WORD", help="only variants with this in kernel or label")
    args = parser.parse_args(argv)
    jobs = [
        (number, target)
        for number, variant in enumerate(_variants_once())
        for target in args.target or TARGETS
        if args.only in f"{variant.kernel.__name__} {variant.label}"
    ]
    # Threads would wait for each other: most of a compilation is Python and one process's LLVM.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        reports = list(pool.map(_inspect_number, jobs))
    print(json.dumps([asdict(r) for r in reports], indent=1) if args.json else table(reports))
    failed = [r for r in reports if r.problems]
    if failed:
        print(f"{len(failed)} of {len(reports)} compiled kernels have problems", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
