"""``wcr-fast doctor``: runs every op on every device at hand, compares with float64, prints error and bandwidth."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import wcr_fast
from wcr_fast.backend import interpreting, triton_installed
from wcr_fast.pruning.magnitude import magnitude_masks, magnitude_threshold
from wcr_fast.pruning.prune import prune_

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rounding of the arithmetic (float32; float64 for float64) or of storing a gradient in the weights' dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-11}
FAMILIES = (
    wcr_fast.WCR,
    wcr_fast.L1,
    wcr_fast.HoyerSquare,
    wcr_fast.RelativeConcentration,
    wcr_fast.LogConcentration,
)


@dataclass(frozen=True)
class Row:
    """One check: where, what, its error (None: exact comparison), whether it held, and the speed."""

    device: str
    backend: str
    dtype: str
    op: str
    error: float
    ok: bool
    gb_per_s: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``wcr-fast doctor``."""
    parser.add_argument("--size", type=int, default=None, help="weights in the list (default: 4 M, 100 M on a GPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check everything; return 0 when all held, else 1."""
    rows = list(examine(args.size))
    if args.json:
        print(json.dumps({"schema": "wcr-fast/doctor/1", "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{'device':8} {'backend':8} {'dtype':9} {'op':34} {'error':>9} {'GB/s':>8}")
        for row in rows:
            where = f"{row.device:8} {row.backend:8} {row.dtype:9} {row.op:34}"
            print(f"{where} {row.error:9.1e} {row.gb_per_s:8.1f}{'' if row.ok else '  WRONG'}")
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


def examine(size: int | None = None) -> Iterator[Row]:
    """Yield one row per device, backend, dtype and op.

    Example:
        >>> all(row.ok for row in examine(size=2000))
        True
    """
    for device, backend in places():
        slow = backend == "triton" and device.type == "cpu"
        count = size or (100_000_000 if device.type == "cuda" else 20_000 if slow else 4_000_000)
        for dtype in DTYPES:
            with wcr_fast.backend(backend):
                for op, bytes_moved, error, tolerance, seconds in _checks(device, dtype, count):
                    yield Row(
                        str(device),
                        backend,
                        str(dtype).removeprefix("torch."),
                        op,
                        error,
                        error <= tolerance,
                        bytes_moved / seconds / 1e9,
                    )


def _weights(device: torch.device, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Return three matrices and a channels_last kernel, ties included, of about count values in all."""
    generator = torch.Generator().manual_seed(0)
    side = max(4, int((count / 4) ** 0.5) // 4 * 4)
    shapes = [(side, side), (side, 2 * side), (side + 1, side - 1), (16, 8, 3, 3)]
    weights = [(torch.randn(shape, generator=generator) * 0.05).to(dtype) for shape in shapes]
    weights[1][0] = weights[0].flatten()[: 2 * side].reshape(-1)[: weights[1].shape[1]]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    return [w.to(device) for w in weights]


def _timed(run: Callable[[], object], device: torch.device) -> tuple[object, float]:
    run()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _checks(device: torch.device, dtype: torch.dtype, count: int) -> Iterator[tuple[str, float, float, float, float]]:
    weights = _weights(device, dtype, count)
    total = sum(w.numel() for w in weights) * weights[0].element_size()
    tolerance = TOLERANCE[dtype]

    (mean, var), seconds = _timed(lambda: wcr_fast.layer_moments(weights), device)
    want = torch.stack([_reference_moments(w) for w in weights], 1)
    error = ((torch.stack([mean, var]).double().cpu() - want) / want).abs().max().item()
    yield "layer_moments", total, error, TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32], seconds

    for family in FAMILIES:
        params = [w.clone().requires_grad_() for w in weights]
        regularizer = family(params, lam=1.0)
        wanted = _reference_gradient(regularizer, params)
        scale = 1.0 / max(g.abs().max().item() for g in wanted)  # keeps half precision within its range
        regularizer.lam = scale
        regularizer().backward()
        error = _gradient_error(params, wanted, scale)
        yield f"{family.__name__} loss.backward", 4 * total, error, tolerance, _timed(regularizer, device)[1]
        for p in params:
            p.grad = None
        regularizer.add_grad_()
        error = _gradient_error(params, wanted, scale)
        yield f"{family.__name__}.add_grad_", 4 * total, error, tolerance, _timed(regularizer.add_grad_, device)[1]

    for scope in ("global", "layer"):
        got, seconds = _timed(lambda scope=scope: magnitude_threshold(weights, 0.9, scope=scope), device)
        want = _reference_threshold(weights, 0.9, scope)
        yield f"magnitude_threshold {scope}", total, float((got.double().cpu() - want).abs().max()), 0.0, seconds
    for scope in ("global", "layer", "row", "2:4"):
        sparsity = None if scope == "2:4" else 0.9
        got, seconds = _timed(lambda s=sparsity, scope=scope: magnitude_masks(weights, s, scope=scope), device)
        want = _reference_masks(weights, sparsity, scope)
        wrong = sum(int((g.cpu() != w).sum()) for g, w in zip(got, want, strict=True))
        yield f"magnitude_masks {scope}", 2 * total, float(wrong), 0.0, seconds
    pruned = [w.clone() for w in weights]
    _, seconds = _timed(lambda: prune_(pruned, 0.9), device)
    want = _reference_masks(weights, 0.9, "global")
    wrong = sum(
        int((p.cpu() != torch.where(m, w.cpu(), 0)).sum()) for p, w, m in zip(pruned, weights, want, strict=True)
    )
    yield "prune_ global", 2 * total, float(wrong), 0.0, seconds


def _reference_moments(w: Tensor) -> Tensor:
    a = torch.sqrt(w.double().cpu() ** 2 + 1e-8)
    return torch.stack([a.mean(), a.var(unbiased=False)])


def _reference_gradient(regularizer: wcr_fast.Regularizer, params: list[Tensor]) -> list[Tensor]:
    xs = [p.detach().double().cpu().requires_grad_() for p in params]
    a = [x.abs() if regularizer.r == 0 else torch.sqrt(x * x + regularizer.r) for x in xs]
    mean, var = torch.stack([m.mean() for m in a]), torch.stack([m.var(unbiased=False) for m in a])
    numel = torch.tensor([float(x.numel()) for x in xs], dtype=torch.float64)
    regularizer.formula(mean, var, numel, float(numel.sum())).sum().backward()
    return [x.grad for x in xs]


def _gradient_error(params: list[Tensor], wanted: list[Tensor], scale: float) -> float:
    pairs = zip(params, wanted, strict=True)
    return max(((p.grad.double().cpu() - scale * g).abs().max() / (scale * g).abs().max()).item() for p, g in pairs)


def _ordered(values: Tensor) -> Tensor:
    """Return the places of the magnitudes from large to small, ties in order: what is kept first comes first."""
    return torch.sort(values.double().abs(), descending=True, stable=True).indices


def _keep(values: Tensor, sparsity: float) -> Tensor:
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[_ordered(values)[: values.numel() - round(sparsity * values.numel())]] = True
    return mask


def _reference_masks(weights: list[Tensor], sparsity: float | None, scope: str) -> list[Tensor]:
    flats = [w.cpu().reshape(-1) for w in weights]
    if scope == "global":
        parts = _keep(torch.cat([f.double() for f in flats]), sparsity).split([f.numel() for f in flats])
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
    if scope == "layer":
        return [_keep(f, sparsity).view(w.shape) for f, w in zip(flats, weights, strict=True)]
    if scope == "row":
        return [torch.stack([_keep(row.reshape(-1), sparsity).view(row.shape) for row in w.cpu()]) for w in weights]
    masks = []
    for w in weights:
        moved = w.cpu().movedim(1, -1)
        whole = moved.shape[-1] // 4 * 4
        groups = moved[..., :whole].reshape(-1, 4).double().abs()
        order = torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :2]
        kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order, True)
        mask = torch.ones(moved.shape, dtype=torch.bool)
        mask[..., :whole] = kept.view(moved[..., :whole].shape)
        masks.append(mask.movedim(-1, 1))
    return masks


def _reference_threshold(weights: list[Tensor], sparsity: float, scope: str) -> Tensor:
    flats = [w.cpu().double().abs().reshape(-1) for w in weights]
    pools = [torch.cat(flats)] if scope == "global" else flats
    values = [pool.sort(descending=True).values[pool.numel() - round(sparsity * pool.numel()) - 1] for pool in pools]
    return values[0] if scope == "global" else torch.stack(values)
