"""``wcr-fast doctor``: runs every op on every device at hand, compares with float64, prints error and bandwidth."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import wcr_fast
from wcr_fast import native
from wcr_fast.backend import interpreting, triton_installed
from wcr_fast.errors import UsageError
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.pruning.prune import prune_
from wcr_fast.torch_path import scan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rounding of the arithmetic (float32; float64 for float64) or of storing a gradient in the weights' dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-11}
FAMILIES = (
    wcr_fast.WCR,
    wcr_fast.L1,
    wcr_fast.L2,
    wcr_fast.HoyerSquare,
    wcr_fast.RelativeConcentration,
    wcr_fast.LogConcentration,
)


# Weights compared with float64, which takes the CPU seconds; only the timing uses more. The interpreter takes
# milliseconds per program.
CHECKED, CHECKED_WITH_GPU, CHECKED_INTERPRETED = 1_000_000, 4_000_000, 20_000
TIMED_ON_GPU = 100_000_000
MIN_SIZE = 64
SPARSITY = 0.9
STEP_LR = 0.05  # of the optimizers' steps, whose largest is as long as a large weight
SAM_RHO = 1.0
SCOPES = ("global", "layer", "row", "2:4")


@dataclass(frozen=True)
class Row:
    """One check: where, what, its error (a count of wrong elements for masks), whether it held, and the speed.

    ``gb_per_s`` is the least that the op must move through memory, over its time: the device's
    bandwidth is its ceiling. ``weights`` is the size it was timed at.
    """

    device: str
    backend: str
    dtype: str
    op: str
    error: float
    ok: bool
    weights: int
    gb_per_s: float


@dataclass(frozen=True)
class Reference:
    """The weights of one dtype on the CPU and what every op must make of them, computed in float64."""

    weights: list[Tensor]
    moments: Tensor  # [2, L]
    gradients: dict[type, list[Tensor]]
    masks: dict[str, list[Tensor]]


@dataclass(frozen=True)
class Check:
    """One op: its floor in bytes per weight, and how to prepare, run and judge it."""

    op: str
    floor: float
    tolerance: float
    prepare: Callable[[list[Tensor]], Callable[[], Any]]  # weights -> the call to time
    error: Callable[[Any, Reference], float]  # of the first call's result


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``wcr-fast doctor``."""
    parser.add_argument("--size", type=int, default=None, help="weights in the list (default: 1 M, 100 M on a GPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check everything; return 0 when all held, else 1.

    Raises:
        UsageError: the size is smaller than 64.
    """
    if args.size is not None and args.size < MIN_SIZE:
        raise UsageError(f"--size must be at least {MIN_SIZE}, got {args.size}")
    if native.wanted():
        for build in (native.build, scan.build):
            with contextlib.suppress(OSError, RuntimeError):  # nothing depends on it; its state says why
                build()
    if args.json:
        rows = list(examine(args.size))
        compiled = {"steps": native.state(), "selection": scan.state()}
        found = {"schema": "wcr-fast/doctor/3", "native": compiled, "rows": [asdict(row) for row in rows]}
        print(json.dumps(found, indent=2))
    else:
        print(f"{'device':8} {'backend':8} {'dtype':9} {'op':34} {'error':>9} {'weights':>11} {'GB/s':>8}")
        rows = []
        for row in examine(args.size):
            where = f"{row.device:8} {row.backend:8} {row.dtype:9} {row.op:34}"
            figures = f"{row.error:9.1e} {row.weights:11,} {row.gb_per_s:8.1f}"
            print(f"{where} {figures}{'' if row.ok else '  WRONG'}", flush=True)  # the interpreter takes minutes
            rows.append(row)
        print("GB/s: the bytes that the op must move at least, over its time")
        print(f"compiled for steps: {native.state()}; for selection: {scan.state()}")
        bad = sum(not row.ok for row in rows)
        print(f"{len(rows)} checks, {bad} wrong" if bad else f"{len(rows)} checks, all right")
    return 0 if all(row.ok for row in rows) else 1


def places() -> list[tuple[torch.device, str]]:
    """Return every (device, backend) that can run here."""
    found = [(torch.device("cpu"), "torch")]
    if triton_installed() and interpreting():
        found.append((torch.device("cpu"), "triton"))
    for i in range(torch.cuda.device_count()):
        found.append((torch.device("cuda", i), "torch"))
        if triton_installed():
            found.append((torch.device("cuda", i), "triton"))
    return found


def sizes(device: torch.device, backend: str, size: int | None) -> tuple[int, int]:
    """Return how many weights are compared with float64, and how many are timed."""
    if device.type == "cpu" and backend == "triton":
        checked = min(size or CHECKED_INTERPRETED, CHECKED_INTERPRETED)
        return checked, checked
    limit = CHECKED_WITH_GPU if torch.cuda.is_available() else CHECKED
    timed = size or (TIMED_ON_GPU if device.type == "cuda" else limit)
    return min(timed, limit), timed


def examine(size: int | None = None) -> Iterator[Row]:
    """Yield one row per dtype, device, backend and op.

    Example:
        >>> next(examine(size=64)).ok
        True
    """
    for dtype in DTYPES:
        for device, backend in places():
            checked, timed = sizes(device, backend, size)
            reference = reference_of(dtype, checked)
            weights = [w.to(device) for w in reference.weights]
            large = weights if timed == checked else draw(dtype, timed, device)
            count = sum(w.numel() for w in large)
            with wcr_fast.backend(backend):
                for check in checks(dtype, reference):
                    call = check.prepare(weights)
                    error = check.error(call(), reference)
                    seconds = _seconds(call if large is weights else check.prepare(large), device)
                    where = str(device), backend, str(dtype).removeprefix("torch.")
                    speed = check.floor * count / seconds / 1e9
                    yield Row(*where, check.op, error, error <= check.tolerance, count, speed)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of the second call: the first one compiles and allocates."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def draw(dtype: torch.dtype, count: int, device: torch.device) -> list[Tensor]:
    """Return three matrices and a channels_last kernel, ties included, of about count values in all."""
    generator = torch.Generator(device).manual_seed(0)
    side = max(4, int((count / 4) ** 0.5) // 4 * 4)
    shapes = [(side, side), (side, 2 * side), (side + 1, side - 1), (16, 8, 3, 3)]
    weights = [(torch.randn(shape, generator=generator, device=device) * 0.05).to(dtype) for shape in shapes]
    weights[1][0] = weights[0].flatten()[: 2 * side]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    return weights


def checks(dtype: torch.dtype, reference: Reference) -> list[Check]:
    """Return every op's check for weights of one dtype; floors count reading and writing each weight once a pass."""
    item = dtype.itemsize
    listed = [
        Check(
            "layer_moments",
            item,
            TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32],
            lambda weights: lambda: wcr_fast.layer_moments(weights),
            lambda got, ref: ((torch.stack(got).double().cpu() - ref.moments) / ref.moments).abs().max().item(),
        )
    ]
    for family in FAMILIES:
        # lam brings the largest gradient to 1: half precision stays within its range
        lam = 1.0 / max(g.abs().max().item() for g in reference.gradients[family])
        error = functools.partial(_gradient_error, family=family, lam=lam)
        for op, backward in ((f"{family.__name__} loss + backward", True), (f"{family.__name__}.add_grad_", False)):
            prepare = functools.partial(_penalty_call, family=family, lam=lam, backward=backward)
            listed.append(Check(op, 4 * item, TOLERANCE[dtype], prepare, error))  # moments; gradient in and out
    lam = 1.0 / max(g.abs().max().item() for g in reference.gradients[wcr_fast.WCR])
    error = functools.partial(_step_error, lam=lam)
    for kind, options, arrays in (
        (wcr_fast.optim.SGD, {"momentum": 0.9}, 5),
        (wcr_fast.optim.AdamW, {"weight_decay": 0.0, "decoupled": True}, 7),
    ):
        prepare = functools.partial(_step_call, kind=kind, lam=lam, options=options)
        listed.append(Check(f"{kind.__name__} step + WCR", arrays * item, TOLERANCE[dtype], prepare, error))
    listed.append(Check("SAM first_step + restore", 7 * item, TOLERANCE[dtype], _sam_call, _sam_error))
    for scope in ("global", "layer"):
        prepare = functools.partial(_call, magnitude_threshold, scope=scope)
        error = functools.partial(_threshold_error, scope=scope)
        listed.append(Check(f"magnitude_threshold {scope}", item, 0.0, prepare, error))
    for scope in SCOPES:
        prepare = functools.partial(_call, magnitude_masks, scope=scope)
        error = functools.partial(_mask_error, scope=scope)
        reads = 2 if scope in ("global", "layer") else 1  # a row or a group is cut where it is read
        listed.append(Check(f"magnitude_masks {scope}", reads * item + 1, 0.0, prepare, error))
    listed.append(Check("prune_ global", 3 * item, 0.0, _prune_call, _pruned_error))
    return listed


def _penalty_call(weights: list[Tensor], *, family: type, lam: float, backward: bool) -> Callable[[], list[Tensor]]:
    params = [w.clone().requires_grad_() for w in weights]
    regularizer = family(params, lam=lam)

    def call() -> list[Tensor]:
        if backward:
            regularizer().backward()
        else:
            regularizer.add_grad_()
        return params

    return call


def _step_call(weights: list[Tensor], *, kind: type, lam: float, options: dict) -> Callable[[], list[Tensor]]:
    """Return a step on gradients of zero: the penalty alone moves the weights, by lr lam grad psi at first."""
    params = [w.clone().requires_grad_() for w in weights]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = kind(params, lr=STEP_LR, penalty=wcr_fast.WCR(params), lam=lam, **options)

    def call() -> list[Tensor]:
        optimizer.step()
        return params

    return call


def _step_error(params: list[Tensor], reference: Reference, *, lam: float) -> float:
    pairs = zip(reference.weights, reference.gradients[wcr_fast.WCR], strict=True)
    wanted = [w.double() - STEP_LR * lam * g for w, g in pairs]
    worst = max((p.detach().double().cpu() - w).abs().max().item() for p, w in zip(params, wanted, strict=True))
    return worst / max(w.abs().max().item() for w in wanted)


def _sam_call(weights: list[Tensor]) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Return a perturbation along the weights themselves, and the way back; the first call copies what it reaches."""
    params = [w.clone().requires_grad_() for w in weights]
    for p, w in zip(params, weights, strict=True):
        p.grad = w
    optimizer = wcr_fast.optim.SAM(params, torch.optim.SGD, lr=STEP_LR, rho=SAM_RHO)
    reached: list[Tensor] = []

    def call() -> tuple[list[Tensor], list[Tensor]]:
        optimizer.first_step()
        if not reached:
            reached.extend(p.detach().clone() for p in params)
        optimizer.restore()
        return reached, params

    return call


def _sam_error(got: tuple[list[Tensor], list[Tensor]], reference: Reference) -> float:
    length = sum((w.double() ** 2).sum() for w in reference.weights).sqrt()
    worst = 0.0
    for reached, back, w in zip(*got, reference.weights, strict=True):
        if not torch.equal(back.detach().cpu(), w):
            return float("inf")
        wanted = w.double() * (1.0 + SAM_RHO / length)
        worst = max(worst, ((reached.double().cpu() - wanted).abs().max() / wanted.abs().max()).item())
    return worst


def _call(op: Callable[..., Any], weights: list[Tensor], *, scope: str) -> Callable[[], Any]:
    return lambda: op(weights, None if scope == "2:4" else SPARSITY, scope=scope)


def _prune_call(weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    pruned = [w.clone() for w in weights]

    def call() -> list[Tensor]:
        prune_(pruned, SPARSITY)
        return pruned

    return call


def _gradient_error(params: list[Tensor], reference: Reference, *, family: type, lam: float) -> float:
    pairs = zip(params, reference.gradients[family], strict=True)
    return max(((p.grad.double().cpu() - lam * g).abs().max() / (lam * g).abs().max()).item() for p, g in pairs)


def _threshold_error(got: Tensor, reference: Reference, *, scope: str) -> float:
    pairs = zip(reference.weights, reference.masks[scope], strict=True)
    smallest = torch.stack(
        [w.double().abs()[m].min() if m.any() else torch.tensor(torch.inf).double() for w, m in pairs]
    )
    want = smallest.min() if scope == "global" else smallest
    return float((got.double().cpu() - want).abs().max())


def _mask_error(got: list[Tensor], reference: Reference, *, scope: str) -> float:
    pairs = zip(got, reference.masks[scope], strict=True)
    return float(sum(int((mask.cpu() != want).sum()) for mask, want in pairs))


def _pruned_error(pruned: list[Tensor], reference: Reference) -> float:
    triples = zip(pruned, reference.weights, reference.masks["global"], strict=True)
    return float(sum(int((p.cpu() != torch.where(mask, w, 0)).sum()) for p, w, mask in triples))


@functools.lru_cache(maxsize=2)  # the interpreter's small list and the others' one, for all backends and devices
def reference_of(dtype: torch.dtype, count: int) -> Reference:
    """Return weights of one dtype with the results of every op, from float64 formulas and stable sorts."""
    weights = draw(dtype, count, torch.device("cpu"))
    moments = torch.stack([_moments(w) for w in weights], 1)
    gradients = {family: _gradients(family, weights) for family in FAMILIES}
    return Reference(weights, moments, gradients, {scope: _masks(weights, scope) for scope in SCOPES})


def _moments(w: Tensor) -> Tensor:
    a = torch.sqrt(w.double() ** 2 + 1e-8)
    return torch.stack([a.mean(), a.var(unbiased=False)])


def _gradients(family: type, weights: list[Tensor]) -> list[Tensor]:
    xs = [w.double().clone().requires_grad_() for w in weights]
    regularizer = family(xs, lam=1.0)
    a = [x.abs() if regularizer.r == 0 else torch.sqrt(x * x + regularizer.r) for x in xs]
    mean, var = torch.stack([m.mean() for m in a]), torch.stack([m.var(unbiased=False) for m in a])
    numel = torch.tensor([float(x.numel()) for x in xs], dtype=torch.float64)
    return list(torch.autograd.grad(regularizer.formula(mean, var, numel, float(numel.sum())).sum(), xs))


def _kept(rows: Tensor, count: int) -> Tensor:
    """Return which ``count`` magnitudes of each row are the largest; of equal ones the earlier."""
    order = torch.sort(rows.double().abs(), dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros(rows.shape, dtype=torch.bool).scatter_(1, order, True)


def _masks(weights: list[Tensor], scope: str) -> list[Tensor]:
    def cut(rows: Tensor) -> Tensor:
        return _kept(rows, rows.shape[1] - round(SPARSITY * rows.shape[1]))

    if scope == "global":
        parts = cut(torch.cat([w.reshape(-1) for w in weights])[None])[0].split([w.numel() for w in weights])
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
    if scope in ("layer", "row"):
        return [cut(w.reshape(1 if scope == "layer" else len(w), -1)).view(w.shape) for w in weights]
    masks = []
    for w in weights:
        moved = w.movedim(1, -1)
        whole = moved.shape[-1] // 4 * 4
        mask = torch.ones(moved.shape, dtype=torch.bool)
        mask[..., :whole] = _kept(moved[..., :whole].reshape(-1, 4), 2).view(moved[..., :whole].shape)
        masks.append(mask.movedim(-1, 1))
    return masks
