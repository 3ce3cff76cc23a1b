"""CPU ratios, side by side in one process: ``python -m benchmarks.cpu``.

Verifies every result against the float64 reference of the tests before anything is timed. ``--checkpoint`` adds the
streaming of a 2 GB safetensors file against cp + sync (needs 6 GB of disk), ``--out FILE`` writes the record.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import wcr_fast
from benchmarks.harness import Cpu, WrongResult
from benchmarks.rivals import EPS, R, eager_penalty
from benchmarks.rivals_select import Holder, global_unstructured
from benchmarks.shapes import make, resnet, resnet18, small_tensors
from benchmarks.suites.optimizer_step import Ways
from benchmarks.timing import interleaved
from wcr_fast.machine import describe_machine
from wcr_fast.report.files import write_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference
import reference_selection

LAM = 1e-5


def check(name: str, condition: bool) -> None:
    if not condition:
        raise SystemExit(f"benchmarks.cpu: {name} disagrees with the reference; nothing was timed")


def verify_penalty(weights: list[Tensor], gradient: Callable[[], object]) -> None:
    """Check that a way of adding the penalty's gradient adds the reference's."""
    _, want = reference.penalty_and_grads("wcr", weights, EPS, R)
    for w in weights:
        w.grad = torch.zeros_like(w)
    gradient()
    check(
        "the gradient",
        all(reference.relative_error(w.grad, LAM * g) < 1e-5 for w, g in zip(weights, want, strict=True)),
    )


def penalty_rows(shapes: list[tuple[int, ...]], *, compiled: bool, rounds: int) -> dict[str, float]:
    weights = [w.requires_grad_() for w in make(shapes)]
    wcr = wcr_fast.WCR(weights, lam=LAM)
    sides: dict[str, Callable[[], object]] = {
        "add_grad_": wcr.add_grad_,
        "loss": lambda: wcr().backward(),
        "eager": lambda: eager_penalty(weights, LAM).backward(),
    }
    if compiled:
        compiled_penalty = torch.compile(eager_penalty)
        sides["compiled"] = lambda: compiled_penalty(weights, LAM).backward()
    for side in sides.values():
        verify_penalty(weights, side)
    return interleaved(sides, rounds=rounds)


def step_rows(kind: str, shapes: list[tuple[int, ...]], *, rounds: int) -> dict[str, float]:
    """Time steps over parameters of these shapes: torch's fused one, ours, and both with the penalty."""
    sides = {side.name: side for side in Ways(kind, shapes, torch.float32, Cpu()).sides()}
    calls: dict[str, Callable[[], object]] = {}
    for name in ("torch fused", "ours", "torch fused, add_grad_", "ours, penalty"):
        subject = sides[name].build(1)
        try:
            subject.verify()
        except WrongResult as error:
            raise SystemExit(f"benchmarks.cpu: {kind}, {name}: {error}; nothing was timed") from None
        calls[name] = lambda subject=subject: subject.call(0)
    return interleaved(calls, rounds=rounds)


def prune_rows(shapes: list[tuple[int, ...]], *, sparsity: float, rounds: int) -> dict[str, float]:
    dense = make(shapes)
    want = reference_selection.masks(dense, sparsity, "global")
    ours = [w.clone() for w in dense]
    wcr_fast.prune_(ours, sparsity)
    check("prune_", all(torch.equal(o, w * m) for o, w, m in zip(ours, dense, want, strict=True)))

    def restore() -> None:
        for o, w in zip(ours, dense, strict=True):
            o.copy_(w)

    held: list[Holder] = []

    def fresh() -> None:
        held[:] = [Holder([w.clone() for w in dense])]

    def rival() -> None:
        global_unstructured(held[0], sparsity)

    fresh(), rival()
    check("torch's pruning", all(torch.equal(k.weight != 0, m) for k, m in zip(held[0].layers, want, strict=True)))
    sides = {"prune_": (restore, lambda: wcr_fast.prune_(ours, sparsity)), "global_unstructured": (fresh, rival)}
    return interleaved(sides, rounds=rounds, warmup=1)


TEN = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999]


def threshold_rows(shapes: list[tuple[int, ...]], *, rounds: int) -> dict[str, float]:
    """Time the thresholds of ten sparsities, asked for at once, one by one, and of one."""
    weights = make(shapes)
    want = [reference_selection.threshold(weights, s).item() for s in TEN]
    sides: dict[str, Callable[[], object]] = {
        "one": lambda: wcr_fast.magnitude_threshold(weights, 0.9),
        "ten at once": lambda: wcr_fast.magnitude_threshold(weights, TEN),
        "ten calls": lambda: [wcr_fast.magnitude_threshold(weights, s) for s in TEN],
    }
    check("one threshold", sides["one"]().item() == want[TEN.index(0.9)])
    for name in ("ten at once", "ten calls"):
        check(name, [t.item() for t in sides[name]()] == want)
    return interleaved(sides, rounds=rounds)


# VmHWM, not ru_maxrss: the latter counts what the parent held when it forked.
PEAK = """
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
"""
MEMORY_PROBE = f"""{PEAK}
import sys, torch, wcr_fast
from wcr_fast import native
from wcr_fast.torch_path import scan
dtype = getattr(torch, sys.argv[1])
numel = int(sys.argv[2]) // dtype.itemsize
weights = [torch.randn(500, 500).to(dtype) for _ in range(numel // 250_000)]
# Code that the first call loads is no memory of this one.
wcr_fast.prune_(torch.randn(1000).round().to(dtype), 0.75)
if native.wanted():
    scan.build()
before = status("VmRSS")
record = wcr_fast.prune_(weights, 0.9)
print(status("VmHWM") - before)
"""
PRUNE_PROBE = f"""{PEAK}
import sys
from wcr_fast.cli import main
code = main(sys.argv[1:])
print(status("VmHWM"))
raise SystemExit(code)
"""


def memory_of_prune(dtype: str, size: int) -> int:
    """Return the growth of the resident peak, in bytes, while a fresh process prunes a list of ``size`` bytes."""
    run = [sys.executable, "-c", MEMORY_PROBE, dtype, str(size)]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


def checkpoint_rows(dtype: torch.dtype, folder: Path, shards: int) -> dict[str, float]:
    """Return seconds of ``wcr-fast prune`` and of cp + sync on shards of 2 GB, and the former's resident peak."""
    from safetensors.torch import save_file

    source, copy, pruned = folder / "model", folder / "copy", folder / "pruned"
    count = (2 << 30) // (32 << 20)
    rows = (32 << 20) // (4096 * torch.empty(0, dtype=dtype).element_size())
    source.mkdir()
    for shard in range(shards):
        weights = {f"{shard}.{i}": torch.randn(rows, 4096).to(dtype) for i in range(count)}
        save_file(weights, source / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
        del weights

    def timed(run: Callable[[], object]) -> float:
        for old in (copy, pruned):
            shutil.rmtree(old, ignore_errors=True)
        os.sync()
        for path in source.iterdir():  # into the page cache
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def copy_and_sync() -> None:
        subprocess.run(["cp", "-r", source, copy], check=True)
        subprocess.run(["sync", *copy.iterdir()], check=True)

    probe = [sys.executable, "-c", PRUNE_PROBE, "prune"]
    peaks = []

    def prune_files() -> None:
        run = [*probe, str(source), str(pruned), "--sparsity", "0.9", "--json"]
        out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        peaks.append(int(out.splitlines()[-1]))

    def start_only() -> None:
        subprocess.run([*probe, "--help"], capture_output=True, check=True)

    start = min(timed(start_only) for _ in range(3))
    pairs = [(timed(prune_files) - start, timed(copy_and_sync)) for _ in range(3)]
    ours, theirs = (sorted(column)[1] for column in zip(*pairs, strict=True))
    return {"prune": ours, "cp_sync": theirs, "peak_bytes": max(peaks)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--checkpoint", action="store_true", help="also stream a 2 GB file (6 GB of disk)")
    parser.add_argument("--sharded", action="store_true", help="also stream three files of 2 GB (18 GB of disk)")
    parser.add_argument("--dir", help="where the checkpoints go for a while (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    record: dict[str, object] = {
        "command": f"python -m benchmarks.cpu --rounds {args.rounds}"
        + " --checkpoint" * args.checkpoint
        + " --sharded" * args.sharded,
        "date": datetime.date.today().isoformat(),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
    }
    ms = record["seconds"] = {}
    ms["resnet18"] = penalty_rows(resnet18(), compiled=True, rounds=args.rounds)
    ms["small_1000"] = penalty_rows(small_tensors(), compiled=False, rounds=args.rounds)
    ms["prune_resnet18"] = prune_rows(resnet18(), sparsity=0.9, rounds=min(args.rounds, 7))
    ms["prune_small_1000"] = prune_rows(small_tensors(), sparsity=0.9, rounds=min(args.rounds, 7))
    for kind in ("SGD", "AdamW"):
        ms[f"{kind}_resnet18"] = step_rows(kind, resnet(18), rounds=2 * args.rounds)
        ms[f"{kind}_small_1000"] = step_rows(kind, small_tensors(), rounds=args.rounds)
    ms["thresholds_resnet18"] = threshold_rows(resnet18(), rounds=args.rounds)
    thresholds = ms["thresholds_resnet18"]
    penalty, small, prune, prune_small = (
        ms[name] for name in ("resnet18", "small_1000", "prune_resnet18", "prune_small_1000")
    )
    rows = [
        ("add_grad_ against eager autograd, ResNet-18", ratio(penalty, "eager", "add_grad_"), ">= 4"),
        ("add_grad_ time over torch.compile's, ResNet-18", ratio(penalty, "add_grad_", "compiled"), "<= 1.4"),
        ("wcr() + backward against eager autograd, ResNet-18", ratio(penalty, "eager", "loss"), ">= 3"),
        ("add_grad_ against eager autograd, 1,000 small", ratio(small, "eager", "add_grad_"), ""),
        ("wcr() + backward against eager, 1,000 small", ratio(small, "eager", "loss"), ""),
        ("prune_ 90 % against torch's, ResNet-18", ratio(prune, "global_unstructured", "prune_"), ">= 100"),
        ("prune_ 90 % against torch's, 1,000 small", ratio(prune_small, "global_unstructured", "prune_"), ""),
        ("ten thresholds over one, ResNet-18", ratio(thresholds, "ten at once", "one"), "<= 4"),
        ("ten thresholds at once over ten calls", ratio(thresholds, "ten at once", "ten calls"), "<= 0.33"),
    ]
    for dtype in ("float32", "bfloat16", "float16"):
        for size in (45, 100, 400):
            extra, bound = memory_of_prune(dtype, size * 10**6) / 1e6, f"<= {0.05 * size + 1:g}"
            rows.append((f"extra memory of prune_ on {size} MB of {dtype}, MB", extra, bound))
    for kind in ("SGD", "AdamW"):
        for key, name, bound in (("resnet18", "ResNet-18", "<= 1.1"), ("small_1000", "1,000 small", "")):
            steps = ms[f"{kind}_{key}"]
            with_penalty = ratio(steps, "ours, penalty", "torch fused, add_grad_")
            rows.append((f"{kind} step time over torch's fused, {name}", ratio(steps, "ours", "torch fused"), bound))
            rows.append((f"{kind} with penalty over fused + add_grad_, {name}", with_penalty, bound))
    streams = [(torch.float32, 1), (torch.bfloat16, 1)] if args.checkpoint else []
    for dtype, shards in [*streams, *[(torch.bfloat16, 3)] * args.sharded]:
        folder = Path(tempfile.mkdtemp(prefix="wcr-fast-", dir=args.dir))
        try:
            times = ms[f"checkpoint_{dtype}" + f"_{shards}_shards" * (shards > 1)] = checkpoint_rows(
                dtype, folder, shards
            )
        finally:
            shutil.rmtree(folder)
        name, bound = f"wcr-fast prune, {2 * shards} GB {dtype}, over cp + sync", "<= 2.2" if shards > 1 else "<= 3"
        rows.append((name, ratio(times, "prune", "cp_sync"), bound))
        rows.append((f"  its resident peak, {2 * shards} GB {dtype}, MB", times["peak_bytes"] / 1e6, "< 600"))
    record["ratios"] = {name.strip(): value for name, value, _ in rows}
    for name, times in ms.items():
        print(name.ljust(24), "  ".join(f"{k} {v * 1e3:.2f} ms" for k, v in times.items() if k != "peak_bytes"))
    print()
    for name, value, bound in rows:
        print(f"{name:56s} {value:8.2f}   {bound}")
    if args.out:
        write_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


def ratio(times: dict[str, float], over: str, under: str) -> float:
    return times[over] / times[under]


if __name__ == "__main__":
    main()
