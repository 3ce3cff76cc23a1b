"""Host time of a call: ``python -m benchmarks.host [--json] [--out FILE]``, with launches stubbed; needs no GPU.

Everything runs as for a GPU, up to the driver's launch function, which does nothing; once with the compiled look at
the tensors (built here where it isn't yet), and once without, as it is where there is no C++ compiler. Where there is
a GPU the same is measured there too, each call issued on an empty queue. For scale: torch's fused SGD step on the CPU,
on as many tensors of one element each. Times are microseconds of one call, the shortest and the median.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Interpreted kernels can't be compiled, and Triton reads this when they are defined.
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import nn

import wcr_fast
from benchmarks.shapes import Shape, make, resnet, small_tensors, weights_of
from benchmarks.stub import stubbed
from wcr_fast import native, optim
from wcr_fast.machine import describe_machine
from wcr_fast.report.files import write_file

SCHEMA = "wcr-fast/host/2"
# The bounds of the stubbed calls, in microseconds.
BOUNDS = {("add_grad_", 54): 50.0, ("add_grad_", 2000): 600.0, ("step", 161): 90.0, ("step", 2000): 600.0}
TURNS = 3
WEIGHTS, PARAMETERS, SMALL = weights_of(resnet(50)), resnet(50), small_tensors(2000)

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One call's host time."""

    # "stubbed": launches do nothing; "python": nor is the look compiled; "cuda": real ones; "cpu": torch's, for scale
    where: str
    call: str
    tensors: int
    shortest_us: float
    median_us: float
    bound_us: float | None


def model_of(shapes: Iterable[Shape], device: torch.device) -> nn.Module:
    """Return a module with one layer for each shape, with gradients."""
    layers = nn.ModuleList()
    for values in make(list(shapes)):
        layer = nn.Module()
        layer.weight = nn.Parameter(values.to(device))
        layer.weight.grad = torch.zeros_like(layer.weight)
        layers.append(layer)
    return layers


def penalty_call(shapes: Sequence[Shape], device: torch.device) -> Call:
    """Return the call that adds WCR's gradient to gradients that are there."""
    return wcr_fast.WCR(model_of(shapes, device)).add_grad_


def step_call(name: str, penalty: str | None, shapes: Sequence[Shape], device: torch.device) -> Call:
    """Return the step of one of our optimizers, SGD with momentum or AdamW."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    params = list(model_of(shapes, device).parameters())
    return getattr(optim, name)(params, lr=0.0, penalty=penalty, **options).step


def torch_call(count: int) -> Call:
    """Return torch's fused SGD step on the CPU, on tensors of one element."""
    params = [nn.Parameter(torch.randn(1)) for _ in range(count)]
    for p in params:
        p.grad = torch.zeros(1)
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=True).step


def our_calls(device: torch.device) -> dict[tuple[str, int], Call]:
    """Return what is measured, by name and number of tensors."""
    calls: dict[tuple[str, int], Call] = {}
    for shapes in (WEIGHTS, SMALL):
        calls["add_grad_", len(shapes)] = penalty_call(shapes, device)
    for name in ("SGD", "AdamW"):
        for penalty in (None, "wcr"):
            for shapes in (PARAMETERS, SMALL):
                label = f"{name} step" + (f" + {penalty}" if penalty else "")
                calls[label, len(shapes)] = step_call(name, penalty, shapes, device)
    return calls


def _times(call: Call, before: Call, seconds: float) -> list[float]:
    """Return the microseconds of single calls, as many as fit into so many seconds."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        before()
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start))
    return found


def measure(where: str, calls: dict[tuple[str, int], Call], seconds: float, before: Call = lambda: None) -> list[Row]:
    """Measure the calls in turn; ``before`` runs before each call and isn't timed."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        for _ in range(3):  # compile, build the tables
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(TURNS):
            for key, call in calls.items():
                times[key] += _times(call, before, seconds / TURNS)
    finally:
        gc.enable()
    rows = []
    for (name, tensors), found in times.items():
        bound = BOUNDS.get(("step" if "step" in name else name, tensors)) if where == "stubbed" else None
        rows.append(Row(where, name, tensors, min(found), statistics.median(found), bound))
    return rows


def stubbed_rows(where: str, seconds: float) -> list[Row]:
    """Measure with launches stubbed; nothing else is in the caches than what is measured here."""
    calls = our_calls(torch.device("cpu"))  # before the stub: a regularizer looks at its weights' moments
    with stubbed():
        return measure(where, calls, seconds)


def run(seconds: float = 1.0) -> list[Row]:
    """Measure everything that this machine has, each call for so many seconds."""
    rows = stubbed_rows("python", seconds)
    try:
        native.build()
    except RuntimeError as error:
        print(f"benchmarks.host: {error}; the compiled look is left out")
    else:
        rows = stubbed_rows("stubbed", seconds) + rows
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one element is not worth a second thread
    counts = (len(WEIGHTS), len(PARAMETERS), len(SMALL))
    rows += measure("cpu", {("torch fused SGD step", n): torch_call(n) for n in counts}, seconds)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        rows += measure("cuda", our_calls(torch.device("cuda")), seconds, torch.cuda.synchronize)
    return rows


def text_of(rows: Sequence[Row]) -> str:
    """Return the rows as a table, with what they are."""
    lines = [f"{'where':8} {'call':22} {'tensors':>7} {'shortest us':>12} {'median us':>10} {'bound':>6}"]
    for r in rows:
        bound = "" if r.bound_us is None else f"{r.bound_us:.0f}"
        lines.append(f"{r.where:8} {r.call:22} {r.tensors:7} {r.shortest_us:12.1f} {r.median_us:10.1f} {bound:>6}")
    lines.append("stubbed: kernels are compiled and every launch is prepared, but the launch itself does nothing")
    lines.append("python: the same without the compiled look at the tensors, as it is where there is no C++ compiler")
    lines.append("cpu: torch's own step on tensors of one element, one thread, for scale")
    if any(r.where == "cuda" for r in rows):
        lines.append("cuda: real launches, each call issued on an empty queue, not waited for")
    return "\n".join(lines)


def record_of(rows: Sequence[Row]) -> dict:
    """Return the rows as a record."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "launches": "stubbed, and real ones on the GPU" if gpu else "stubbed",
        "look": native.state().split(",")[0],
        "machine": describe_machine(),
        "rows": [asdict(row) for row in rows],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there too")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each call (default 1)")
    args = parser.parse_args(arguments)
    rows = run(args.seconds)
    record = json.dumps(record_of(rows), indent=1)
    print(record if args.json else text_of(rows))
    if args.out:
        write_file(args.out, (record + "\n").encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
