"""Bytes per weight that each op moves: ``python -m benchmarks.bytes [--resnet18] [--json] [--out FILE]``; needs no GPU.

Kernels run in Triton's interpreter, where every load, store and atomic operation is counted: active lanes times item
size, an atomic operation as a read and a write. "data" is what lies in the op's own arrays (weights, gradients, states,
mask bits), "rest" everything else: tables, moments, partial sums, histograms. What a cache would save is not
subtracted. Of an op of several kernels ("all"), what torch's own operations between them read and write counts, too;
these run on a hundred million weights, as what a selection moves besides doesn't grow with them.

The exit code is 1 when an op moves more than 2 % above its floor. ``--resnet18`` adds that network's list for
information, in a quarter of an hour: its small tensors pay for their tables.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# Triton reads this when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

import wcr_fast
from benchmarks.shapes import Shape, make, resnet18
from wcr_fast import optim
from wcr_fast.machine import describe_machine
from wcr_fast.report.files import write_file
from wcr_fast.torch_path.bits import num_words

SCHEMA = "wcr-fast/bytes/1"
TOLERANCE = 0.02
SECTOR = 32  # bytes that cross the bus together
DTYPES = (torch.float32, torch.bfloat16)
RULE, R = ("wcr", 1e-8), 1e-8

# The builder's method -> where it takes the addresses and the mask, and how often each byte crosses the bus.
_ACCESSES = {
    "create_masked_load": (0, 1, 1),
    "create_masked_store": (0, 2, 1),
    "create_atomic_rmw": (1, 3, 2),
    "create_atomic_cas": (0, None, 2),
}


class Counter:
    """Bytes that interpreted kernels move: by kernel, in the given tensors' memory ("data") and elsewhere ("rest").

    In sectors, every 32 bytes that a program touches count once and whole, as its first-level cache joins them.
    """

    def __init__(self, tensors: Sequence[Tensor], *, sectors: bool = False) -> None:
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
        self._starts, self._ends = (np.array(side, dtype=np.uint64) for side in zip(*spans, strict=True))
        self.bytes: dict[str, dict[str, int]] = defaultdict(lambda: {"data": 0, "rest": 0})
        self._kernel = ""
        self._touched: dict[tuple[int, int], list[np.ndarray]] | None = defaultdict(list) if sectors else None

    def add_torch(self, arrays: Sequence[Any]) -> None:
        """Count one read or write of every tensor among these, between the kernels."""
        tensors = [a for a in arrays if isinstance(a, Tensor)]
        self.bytes[TORCH]["rest"] += sum(t.numel() * t.element_size() for t in tensors)

    def add(self, place: int, pointers: Any, mask: Any, times: int) -> None:
        """Count one access by a block of addresses; ``place`` tells kinds of accesses apart."""
        item = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data, dtype=np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        if self._touched is None:
            self._count(addresses, times * item)
        else:
            self._touched[place, times].append(addresses.reshape(-1) // SECTOR)

    def end_program(self) -> None:
        """Count the sectors that one program has touched."""
        for (_, times), touched in (self._touched or {}).items():
            self._count(np.unique(np.concatenate(touched)) * SECTOR, times * SECTOR)
        if self._touched:
            self._touched.clear()

    def _count(self, addresses: np.ndarray, size: int) -> None:
        span = np.searchsorted(self._starts, addresses, side="right")
        inside = int(((span > 0) & (addresses < self._ends[np.maximum(span, 1) - 1])).sum())
        counts = self.bytes[self._kernel]
        counts["data"] += size * inside
        counts["rest"] += size * (addresses.size - inside)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the kernels do inside the block."""
        with contextlib.ExitStack() as stack:
            for kind, (name, (place, mask_place, times)) in enumerate(_ACCESSES.items()):
                method = getattr(InterpreterBuilder, name)

                def counted(builder, *args, _call=method, _kind=kind, _place=place, _mask=mask_place, _times=times):
                    self.add(_kind, args[_place], None if _mask is None else args[_mask], _times)
                    return _call(builder, *args)

                stack.enter_context(mock.patch.object(InterpreterBuilder, name, counted))
            next_program = InterpreterBuilder.set_grid_idx

            def ended(builder, *index):
                self.end_program()
                return next_program(builder, *index)

            stack.enter_context(mock.patch.object(InterpreterBuilder, "set_grid_idx", ended))
            launch = GridExecutor.__call__

            def named(executor, *args, **kwargs):
                self._kernel = executor.fn.__name__
                with _disable_current_modes():  # the interpreter copies its arguments to and fro
                    result = launch(executor, *args, **kwargs)
                self.end_program()
                return result

            stack.enter_context(mock.patch.object(GridExecutor, "__call__", named))
            stack.enter_context(_TorchOps(self))
            yield


# Stands for torch's own operations among the kernels.
TORCH = "torch"


class _TorchOps(TorchDispatchMode):
    """Tells a counter what torch's operations read and write; views and empty allocations move nothing."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            self.counter.add_torch(tree_leaves((args, kwargs)))
            self.counter.add_torch(tree_leaves(result))
        return result


@dataclass(frozen=True)
class Row:
    """What one kernel of an op moves, in bytes per weight."""

    op: str
    kernel: str
    list: str
    dtype: str
    weights: int
    data: float
    rest: float
    floor: float
    gated: bool

    @property
    def above(self) -> float:
        """How far the op is above its floor, as a share of it."""
        return (self.data + self.rest) / self.floor - 1.0

    @property
    def fails(self) -> bool:
        return self.gated and self.above > TOLERANCE


@dataclass(frozen=True)
class Op:
    """An op to count: ``prepare(shapes, dtype)`` returns its call and its own arrays."""

    name: str
    floors: dict[str, Callable[[int], float]]  # kernel, or ALL -> bytes per weight, from the weights' item size
    prepare: Callable[[Sequence[Shape], torch.dtype], tuple[Callable[[], object], list[Tensor]]]
    shapes: Sequence[Shape] | None = None  # of its own list, where the usual one doesn't show it
    sectors: bool = False  # count whole sectors: of accesses that are not of neighbours


# Stands for all kernels of an op together.
ALL = "all"


def _moments(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
    from wcr_fast.triton_path.moments import layer_moments

    weights = make(shapes, dtype=dtype)
    return lambda: layer_moments(weights, R, RULE), weights


def _gradient(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
    from wcr_fast.triton_path.moments import add_grad_, layer_moments

    weights = make(shapes, dtype=dtype)
    grads = [torch.zeros_like(w) for w in weights]
    stats, coef = layer_moments(weights, R, RULE)
    return lambda: add_grad_(grads, weights, stats, coef, 1e-5, R), [*weights, *grads]


def _step(kind: str, *, penalty: str | None = "wcr", masked: bool = False, tracked: bool = False) -> Callable:
    def prepare(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
        params = [nn.Parameter(w) for w in make(shapes, dtype=dtype)]
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(optim, kind)(params, lr=1e-3, penalty=penalty, **options)
        words = [torch.full((num_words(p.numel()),), -1, dtype=torch.int32) for p in params] if masked else []
        for p, bits in zip(params, words, strict=False):
            optimizer._set_mask(p, bits)
        for p in params:
            p.grad = torch.zeros_like(p)
        if tracked:
            optimizer.track_threshold(params, 0.9)
        optimizer.step()  # leaves states and moments behind
        states = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.dim()]
        return optimizer.step, [*params, *(p.grad for p in params), *states, *words]

    return prepare


def _penalty(build: Callable[[list[nn.Parameter]], wcr_fast.regularizers.Term], act: str = "add_grad_") -> Callable:
    def prepare(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
        weights = [nn.Parameter(w) for w in make(shapes, dtype=dtype)]
        for w in weights:
            w.grad = torch.zeros_like(w)
        penalty = build(weights)
        call = penalty.add_grad_ if act == "add_grad_" else lambda: penalty.shrink_(0.1)
        return call, [*weights, *(w.grad for w in weights)]

    return prepare


def _sam(kind: type[optim.TwoPassOptimizer]) -> Callable:
    def prepare(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
        weights = [nn.Parameter(w) for w in make(shapes, dtype=dtype)]
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer = kind(weights, torch.optim.SGD, lr=0.1)
        optimizer.first_step()
        optimizer.restore()

        def there_and_back() -> None:
            optimizer.first_step()
            optimizer.restore()

        return there_and_back, [*weights, *(w.grad for w in weights), *optimizer._room.values()]

    return prepare


def _mask(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
    from wcr_fast.triton_path.select import apply, find_cuts

    weights = make(shapes, dtype=dtype)
    cuts = find_cuts(weights, [[sum(w.numel() for w in weights) // 10]])
    return lambda: apply(weights, cuts), weights


def _nm(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
    from wcr_fast.triton_path.select import apply_nm

    weights = make(shapes, dtype=dtype)
    return lambda: apply_nm([w.movedim(1, -1) for w in weights], 2, 4), weights


def _threshold(*, warm: bool) -> Callable:
    def prepare(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[Callable[[], object], list[Tensor]]:
        from wcr_fast.triton_path.select import find_cuts

        weights = make(shapes, dtype=dtype)
        keep = [[sum(w.numel() for w in weights) // 10]]
        if warm:
            find_cuts(weights, keep)
        return lambda: find_cuts(weights, keep), weights

    return prepare


def _arrays(count: int, bits: float = 0.0) -> Callable[[int], float]:
    return lambda item: count * item + bits


# A hundred million weights.
HUGE = [(10_000, 10_000)]
OPS = (
    Op("moments", {"_moments_kernel": _arrays(1)}, _moments),
    Op("gradient", {"_gradient_kernel": _arrays(3)}, _gradient),
    Op("SGD + penalty", {"_step_kernel": _arrays(5)}, _step("SGD")),
    Op("AdamW + penalty", {"_step_kernel": _arrays(7)}, _step("AdamW")),
    Op("SGD + penalty + mask bits", {"_step_kernel": _arrays(5, 0.125)}, _step("SGD", masked=True)),
    Op("AdamW + penalty + mask bits", {"_step_kernel": _arrays(7, 0.125)}, _step("AdamW", masked=True)),
    Op("AdamW + penalty, tracked", {"_step_kernel": _arrays(7)}, _step("AdamW", tracked=True)),
    Op(
        "WCR + L1",
        {"_joint_moments_kernel": _arrays(1), "_joint_gradient_kernel": _arrays(3)},
        _penalty(lambda ws: wcr_fast.WCR(ws) + wcr_fast.L1(ws)),
    ),
    # Scaling reads its groups' factors for every element: a few kilobytes that stay in the caches.
    Op("group Hoyer-Square", {"_group_squares_kernel": _arrays(2)}, _penalty(wcr_fast.GroupHoyerSquare)),
    Op("proximal L1", {"_shrink_kernel": _arrays(2)}, _penalty(lambda ws: wcr_fast.L1(ws, mode="proximal"), "shrink_")),
    Op(
        "SAM",
        {"_squares_kernel": _arrays(1), "_ascend_kernel": _arrays(4), "_restore_kernel": _arrays(2)},
        _sam(optim.SAM),
    ),
    Op("ASAM", {"_squares_kernel": _arrays(2), "_ascend_kernel": _arrays(4)}, _sam(optim.ASAM)),
    Op("2:4 in place", {"_nm_kernel": _arrays(2)}, _nm),
    Op("2:4 in place, 3x3", {"_nm_kernel": _arrays(2)}, _nm, [(512, 256, 3, 3)], sectors=True),
    Op("threshold", {ALL: {2: 2.08, 4: 4.35}.__getitem__}, _threshold(warm=False), HUGE),
    Op("threshold, warm", {ALL: {2: 2.08, 4: 4.17}.__getitem__}, _threshold(warm=True), HUGE),
    Op("mask in place", {ALL: _arrays(2)}, _mask, HUGE),
)
# What a launch moves besides grows with chunks and tensors: 32 chunks of one tensor show it as any long list does.
LARGE = [(1024, 1024)]


def count(op: Op, name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Row]:
    """Run an op in the interpreter and return what its kernels moved."""
    with wcr_fast.backend("triton"), torch.no_grad():
        call, arrays = op.prepare(shapes, dtype)
        counter = Counter(arrays, sectors=op.sectors)
        with counter.counting():
            call()
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    label = str(dtype).removeprefix("torch.")
    whole = {key: sum(found[key] for found in counter.bytes.values()) for key in ("data", "rest")}
    rows = []
    for kernel, floor in op.floors.items():
        found = whole if kernel == ALL else counter.bytes[kernel]
        per = (found["data"] / weights, found["rest"] / weights)
        rows.append(Row(op.name, kernel, name, label, weights, *per, floor(dtype.itemsize), name != "resnet18"))
    return rows


def _size(shapes: Sequence[Shape]) -> str:
    return f"{sum(torch.Size(shape).numel() for shape in shapes) / 1e6:.0f} M"


def text_of(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""
    lines = [f"{'op':28} {'kernel':18} {'list':9} {'dtype':9} {'data':>8} {'rest':>8} {'floor':>8} {'above':>8}"]
    for r in rows:
        remark = "  too many" if r.fails else "" if r.gated else "  (not a bound)"
        line = f"{r.op:28} {r.kernel:18} {r.list:9} {r.dtype:9} {r.data:8.3f} {r.rest:8.3f} {r.floor:8.3f}"
        lines.append(f"{line} {r.above:8.2%}{remark}")
    return "\n".join(lines)


def record_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows as a record."""
    return {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "counted": "in Triton's interpreter, without a GPU",
        "tolerance": TOLERANCE,
        "machine": {**describe_machine(), "triton": triton.__version__},
        "rows": [{**asdict(row), "above": round(row.above, 5)} for row in rows],
    }


def main(arguments: list[str] | None = None) -> int:
    """Count, print, and return 1 where an op moves too much."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there too")
    parser.add_argument("--only", default="", metavar="WORD", help="only ops with this in their name")
    parser.add_argument("--resnet18", action="store_true", help="add ResNet-18's weights")
    args = parser.parse_args(arguments)
    lists = {"usual": None, "resnet18": resnet18()} if args.resnet18 else {"usual": None}
    rows = [
        row
        for name, given in lists.items()
        for op in OPS
        if args.only in op.name
        for shapes in [given or op.shapes or LARGE]
        for dtype in DTYPES
        for row in count(op, name if given else _size(shapes), shapes, dtype)
    ]
    record = json.dumps(record_of(rows), indent=1)
    print(record if args.json else text_of(rows))
    if args.out:
        write_file(args.out, (record + "\n").encode())
    failed = [r for r in rows if r.fails]
    if failed:
        print(f"{len(failed)} of {len(rows)} move more than {TOLERANCE:.0%} above their floor", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
