"""Compile every kernel without a GPU and print what came out: registers, spills, shared memory, load width.

    python -m benchmarks.codegen [--json] [--target sm_90 ...] [--only WORD] [--essential]

The exit code is 1 when a kernel spills, or when the full-chunk path of a kernel that streams weights has no 128-bit
loads or more instructions than its budget (NVIDIA's targets; known excesses are named in EXCESSES). SASS per element
counts the machine instructions in the loop of the full-chunk path over the elements a thread handles in one turn;
inner loops count once. The budget is what an H200 can issue while the op's bytes come and go.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

# Interpreted kernels can't be compiled, and Triton reads this when they are defined.
os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wcr_fast.kernels import (
    count,
    groups,
    joint,
    keep,
    mask,
    moments,
    nm,
    perturb,
    rows,
    shrink,
    step,
    survey,
    track,
    window,
)
from wcr_fast.kernels.launch import Variant

MODULES = (moments, joint, groups, window, count, survey, rows, mask, nm, keep, shrink, step, track, perturb)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SCHEMA = "wcr-fast/codegen/3"

# 132 multiprocessors of 128 lanes at 1.98 GHz, over 4.3 TB/s that a copy reaches on an H200.
INSTRUCTIONS_PER_BYTE = 7.8


@dataclass(frozen=True)
class Excess:
    """Variants known to be over their budget, and why: work for later, printed but no failure."""

    kernel: str
    label: str  # a regular expression that occurs in the variant's label
    why: str
    before: tuple[int, int] = (99, 0)  # only of Triton versions before this one

    def covers(self, kernel: str, label: str) -> bool:
        """Tell whether a variant is meant, with the installed Triton."""
        return kernel == self.kernel and self.before > TRITON_VERSION and bool(re.search(self.label, label))


TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
EXCESSES = (
    Excess("_nm_kernel", "float64 8:16", "keys of 64 bits are compared by several instructions"),
    Excess("_fine_kernel", "float16 as float64", "keys of 64 bits are compared by several instructions"),
    Excess("_fine_kernel", r"b?float16 as .*64-bit counts", "lists beyond 2^31 weights"),
    Excess("_fine_kernel", "wanda", "an integer division finds every weight's column"),
    Excess("_mask_kernel", "wanda", "an integer division finds every weight's column"),
    Excess("_fine_kernel", "bfloat16 normalised", "two bytes leave time for the magnitude's arithmetic only"),
    Excess("_joint_moments_kernel", "float16 r=1e-08, 0.0", "two bytes leave time for most of two smoothings' sums"),
    Excess("_group_scale_kernel", "float16 add", "two multiplications each find a weight's row and its column"),
    Excess("_rows_kernel", "float16", "its histogram consists of ballots", before=(3, 8)),
)


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant on one target."""

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int  # loads and stores of spilled registers (on AMD, spilled vector registers)
    shared_bytes: int
    wide_loads: int  # 128-bit loads of global memory
    other_loads: int
    instructions_per_element: float | None  # NVIDIA only, for the loop of the full-chunk path
    budget: float | None  # of them
    excess: str | None  # why it is known to be over its budget
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
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    name: str
    operands: str

    @property
    def is_wide_load(self) -> bool:
        return self.name.startswith("LDG") and ".128" in self.name


def _disassemble(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions, without padding, and the place each label stands at."""
    pattern = re.compile(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for match in pattern.finditer(sass):
        if match[1]:
            labels[match[1]] = len(instructions)
        elif match[2] != "NOP":
            instructions.append(Instruction(match[2], match[3]))
    return instructions, labels


def _streaming_loop(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """Return the shortest loop with 128-bit loads, or where it was unrolled the stretch that holds most of them."""
    loops, stretch, stretches = [], [], []
    for place, instruction in enumerate(instructions):
        stretch.append(instruction)
        if instruction.name.startswith(("BRA", "EXIT")):
            stretches.append(stretch)
            stretch = []
            target = re.search(r"\.L_x_\d+", instruction.operands)
            if target and labels[target[0]] <= place:
                loops.append(instructions[labels[target[0]] : place + 1])
    streaming = [loop for loop in loops if any(i.is_wide_load for i in loop)]
    if streaming:
        return min(streaming, key=len)
    return max(stretches, key=lambda s: sum(i.is_wide_load for i in s))


def _nvidia(variant: Variant, compiled: triton.compiler.CompiledKernel) -> dict:
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    instructions, labels = _disassemble(_tool("nvdisasm", compiled.asm["cubin"], "-c"))
    loads = [i for i in instructions if i.name.startswith("LDG")]
    wide = [i for i in loads if i.is_wide_load]
    ratio = None
    if wide and variant.streams:
        loop = _streaming_loop(instructions, labels)
        item = variant.constants["DTYPE"].primitive_bitwidth // 8
        elements = sum(i.is_wide_load for i in loop) * 16 // item / variant.streams
        ratio = round(len(loop) / elements, 1)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # Not the stack size: a call of the 64-bit division takes a stack frame without spilling anything.
        "spills": sum(i.name.startswith(("STL", "LDL")) for i in instructions),
        "wide_loads": len(wide),
        "other_loads": len(loads) - len(wide),
        "instructions_per_element": ratio,
    }


def _amd(compiled: triton.compiler.CompiledKernel) -> dict:
    assembly = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    loads = re.findall(r"\b((?:global|buffer|flat)_load_\w+)", assembly)
    wide = [name for name in loads if name.endswith("dwordx4")]
    return {
        "registers": figure("vgpr_count"),
        "spills": figure("vgpr_spill_count"),
        "wide_loads": len(wide),
        "other_loads": len(loads) - len(wide),
        "instructions_per_element": None,
    }


def inspect(variant: Variant, target: str) -> Report:
    """Compile one variant for one target and judge it."""
    compiled = compile_variant(variant, TARGETS[target])
    figures = _amd(compiled) if TARGETS[target].backend == "hip" else _nvidia(variant, compiled)
    name, moved = variant.kernel.__name__, variant.bytes_per_element
    budget = None if moved is None else round(INSTRUCTIONS_PER_BYTE * moved, 1)
    excess = None
    problems = []
    if figures["spills"]:
        problems.append("spills")
    if TARGETS[target].backend == "cuda" and variant.streams and not figures["wide_loads"]:
        problems.append("no 128-bit loads")
    if budget is not None and (figures["instructions_per_element"] or 0) > budget:
        excess = next((e.why for e in EXCESSES if e.covers(name, variant.label)), None)
        if excess is None:
            problems.append("over budget")
    return Report(
        kernel=name,
        variant=variant.label,
        target=target,
        shared_bytes=compiled.metadata.shared,
        budget=budget,
        excess=excess,
        problems=tuple(problems),
        **figures,
    )


def _inspect_number(job: tuple[int, str]) -> Report:
    return inspect(_variants_once()[job[0]], job[1])


def is_essential(variant: Variant) -> bool:
    """Tell whether tests compile a variant; float16 differs from bfloat16 in conversions only."""
    return variant.essential and variant.constants.get("DTYPE") != tl.float16


# What a form has in common, and what each target has of its own.
COMMON = ("kernel", "variant", "budget")
FIGURES = tuple(field.name for field in fields(Report) if field.name not in (*COMMON, "target"))


def record(reports: list[Report]) -> str:
    """Return the reports as JSON: a header, the names of the columns, and one line per form with all its targets."""
    problems = sum(bool(r.problems) for r in reports)
    head = {"schema": SCHEMA, "triton": triton.__version__, "compiled": len(reports), "problems": problems}
    head |= {"instructions_per_byte": INSTRUCTIONS_PER_BYTE, "columns": COMMON, "figures": FIGURES}
    forms: dict[tuple, dict[str, list]] = {}
    for r in reports:
        common = tuple(getattr(r, name) for name in COMMON)
        forms.setdefault(common, {})[r.target] = [getattr(r, name) for name in FIGURES]
    lines = ",\n".join("  " + json.dumps([*common, targets]) for common, targets in forms.items())
    return json.dumps(head)[:-1] + f',\n "rows": [\n{lines}\n]}}'


@functools.cache
def _variants_once() -> list[Variant]:
    return all_variants()


def table(reports: list[Report]) -> str:
    """Return the reports as aligned text."""
    head = ("kernel", "variant", "target", "regs", "spills", "shared B", "128-bit", "other", "SASS/el", "budget", "")
    lines = [head]
    for r in reports:
        ratio, budget = ("" if f is None else f"{f:.1f}" for f in (r.instructions_per_element, r.budget))
        remark = ", ".join(r.problems) + (f"over budget, known: {r.excess}" if r.excess else "")
        numbers = (r.registers, r.spills, r.shared_bytes, r.wide_loads, r.other_loads)
        lines.append((r.kernel, r.variant, r.target, *map(str, numbers), ratio, budget, remark))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if 3 <= i < len(head) - 1 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and return 1 when something spills, reads narrowly or computes too much."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a JSON record instead of the table")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only these (default: all)")
    parser.add_argument("--only", default="", metavar="WORD", help="only variants with this in kernel or label")
    parser.add_argument("--essential", action="store_true", help="only what the tests compile: one of each loop")
    args = parser.parse_args(argv)
    jobs = [
        (number, target)
        for number, variant in enumerate(_variants_once())
        for target in args.target or TARGETS
        if args.only in f"{variant.kernel.__name__} {variant.label}"
        and (is_essential(variant) or not args.essential)
        and variant.backend in (None, TARGETS[target].backend)
    ]
    # Threads would wait for each other: most of a compilation is Python and one process's LLVM.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        reports = list(pool.map(_inspect_number, jobs))
    print(record(reports) if args.json else table(reports))
    failed = [r for r in reports if r.problems]
    if failed:
        print(f"{len(failed)} of {len(reports)} compiled kernels have problems", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
