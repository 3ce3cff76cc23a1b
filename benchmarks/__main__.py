"""Every suite, one record each: ``python -m benchmarks --device cuda --out DIR`` (8 minutes on an H100 or H200).

Each suite runs in a process of its own: one that breaks the device or hangs loses only what it had not written.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import Budget, Record, Row, find_device, run_case
from wcr_fast import native

#: suite -> its share of the time
SUITES = {"penalty": 0.22, "optimizer_step": 0.28, "train_step": 0.18, "select_mask": 0.22, "perturb": 0.1}
# Of a suite's time, what starting it and finishing the last case may take.
RESERVE = 20.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for SUITE.json")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this suite; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small lists, few rounds: does it work at all?")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all suites together (default 8)")
    args = parser.parse_args(arguments)
    args.suite = args.suite or list(SUITES)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; --device cpu runs the suites on the processor")
    return args


def run_suite(suite: str, args: argparse.Namespace, seconds: float) -> int:
    """Run one suite here and write its record; return 1 where ours was wrong or failed, else 0."""
    device = find_device(args.device)
    command = f"python -m benchmarks --device {args.device}" + " --quick" * args.quick
    record = Record(suite, command, device, quick=args.quick, path=args.out / f"{suite}.json")
    if args.device == "cuda":  # else it would be built beside the first cases, and take over in the middle of them
        try:
            native.build()
        except RuntimeError as error:
            record.note(str(error))
    budget = Budget(seconds, *((0.2, (3, 5)) if args.quick else (1.5, (10, 50))))
    code = 0
    for case in importlib.import_module(f"benchmarks.suites.{suite}").cases(device, quick=args.quick):
        if budget.left() <= 0:
            record.note(f"{case.list} {case.dtype} {case.op}: skipped, no time left")
            continue
        try:
            record.add(run_case(case, device, budget))
        except Exception as error:  # a broken device fails outside any side, too
            record.note(f"{case.list} {case.dtype} {case.op}: broke off, {type(error).__name__}: {error}")
            code = 1
    record.finish()
    return max(code, *(int(_is_wrong(row)) for row in record.content["rows"]), 0)


def _is_wrong(row: Row) -> bool:
    """A rival's failure, or its wrong result, is a finding; ours is an error."""
    return row["ours"] and row["status"] in ("refused", "failed")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    whole = sum(SUITES[suite] for suite in args.suite)
    seconds = {suite: 60.0 * args.minutes * SUITES[suite] / whole for suite in args.suite}
    if len(args.suite) == 1:
        return run_suite(args.suite[0], args, seconds[args.suite[0]] - RESERVE)
    code = 0
    for suite in args.suite:
        print(f"\n{suite}", flush=True)
        options = ["--suite", suite, "--device", args.device, "--out", str(args.out)]
        options += ["--minutes", f"{seconds[suite] / 60:g}", *["--quick"] * args.quick]
        try:
            done = subprocess.run([sys.executable, "-m", "benchmarks", *options], timeout=seconds[suite])
            code = max(code, int(done.returncode != 0))
        except subprocess.TimeoutExpired:
            print(f"{suite}: stopped after {seconds[suite]:.0f} s; its record holds what was done until then")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
