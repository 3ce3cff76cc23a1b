"""Bytes that selection among sharded weights sends: ``python -m benchmarks.sharded [--list NAME] [--ranks 1 2 4]``.

For each number of processes it spawns a gloo group that cuts a network's weights along dimension 0 (as FSDP2 does), 1,
or each weight along another one, and for 4 processes along 0 with replicas (HSDP). Thresholds, masks and pruned weights
are compared bit for bit with those of one process. Sent bytes are those of one process, as collectives on rings send
them; the time is wall time on this machine, with all processes on it. The exit code is 1 when anything differs, or a
call of scope global or layer sends more than 256 kB.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import wcr_fast
from benchmarks.shapes import LISTS, make, weights_of
from wcr_fast.ops.ranks import traffic

MOST = 256_000
SPARSITY = 0.9
LADDER = [0.5, 0.6, 0.7, 0.8, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Cut = tuple[DeviceMesh, Callable[[int, Tensor], list[Placement]]]


def cuts(ranks: int) -> dict[str, Cut]:
    """Return the ways to cut a list of weights: a mesh, and the placements of the i-th weight."""
    line = init_device_mesh("cpu", (ranks,))
    found: dict[str, Cut] = {
        "dim 0": (line, lambda i, t: [Shard(0)]),
        "dim 1": (line, lambda i, t: [Shard(1)]),
        "each other": (line, lambda i, t: [Shard(i % t.dim())]),
    }
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        found["dim 0, replicas"] = square, lambda i, t: [Replicate(), Shard(0)]
    return found


def calls(scope: str) -> dict[str, Callable[[list[Tensor]], Any]]:
    """Return what is called on a list of weights, by its name."""
    return {
        "magnitude_threshold": lambda tensors: wcr_fast.magnitude_threshold(tensors, SPARSITY, scope=scope),
        "of 10 sparsities": lambda tensors: wcr_fast.magnitude_threshold(tensors, LADDER, scope=scope),
        "magnitude_masks": lambda tensors: wcr_fast.magnitude_masks(tensors, SPARSITY, scope=scope),
        "prune_": lambda tensors: wcr_fast.prune_(tensors, SPARSITY, scope=scope),
    }


def same(found: Any, want: Any, cut: Sequence[tuple[DeviceMesh, list[Placement]]]) -> bool:
    """Tell whether a result over shards is, on this rank, that over the whole weights."""
    if not isinstance(found, list):
        return torch.equal(found, want) if isinstance(found, Tensor) else found == want
    return all(
        torch.equal(part.to_local().contiguous().view(torch.uint8), mine.to_local().contiguous().view(torch.uint8))
        for part, whole, (mesh, placements) in zip(found, want, cut, strict=True)
        for mine in [distribute_tensor(whole, mesh, placements, src_data_rank=None)]
    )


def measure(shapes: Sequence[tuple[int, ...]], ranks: int) -> Iterator[dict[str, Any]]:
    """Yield what each call sent and whether its result is right, on this rank."""
    for dtype_name, dtype in DTYPES.items():
        whole = make(shapes, dtype=dtype)
        for label, (mesh, place) in cuts(ranks).items():
            cut = [(mesh, place(i, t)) for i, t in enumerate(whole)]
            for scope in ("global", "layer"):
                for name, call in calls(scope).items():
                    parts = [distribute_tensor(t, *at, src_data_rank=None) for t, at in zip(whole, cut, strict=True)]
                    plain = [t.clone() for t in whole]
                    dist.barrier()
                    begin = time.perf_counter()
                    with traffic() as sent:
                        found = call(parts)
                    seconds = time.perf_counter() - begin
                    right = same(found, call(plain), cut)
                    if name == "prune_":
                        right = right and same(parts, plain, cut)
                    row = {"dtype": dtype_name, "cut": label, "scope": scope, "call": name, "bytes": sent.bytes}
                    yield row | {"messages": sent.messages, "seconds": seconds, "right": right}


def work(rank: int, ranks: int, folder: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Measure as one process of a group; leave the rows in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    torch.save(list(measure(shapes, ranks)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an ordinary exit is now and then aborted by a thread of torch's that is still running


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--list", choices=LISTS, default="resnet50", help="the network (default resnet50)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes (default 1 2 4)")
    args = parser.parse_args(arguments)
    shapes = weights_of(LISTS[args.list]())
    print(f"{args.list}: {len(shapes)} weights, {sum(torch.Size(s).numel() for s in shapes):,} values, {SPARSITY:.0%}")
    print("ranks  dtype     cut              scope   call                  bytes sent  messages  seconds")
    code = 0
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (ranks, folder, shapes), nprocs=ranks)
            everyone = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
        for rows in zip(*everyone, strict=True):
            row, right = rows[0], all(r["right"] for r in rows)
            most, seconds = max(r["bytes"] for r in rows), max(r["seconds"] for r in rows)
            verdict = "" if right else "  DIFFERS from one process"
            verdict += f"  more than {MOST:,}" if most > MOST else ""
            code = max(code, int(bool(verdict)))
            print(
                f"{ranks:5}  {row['dtype']:8}  {row['cut']:15}  {row['scope']:6}  {row['call']:19}  {most:12,}  "
                f"{row['messages']:8}  {seconds:7.3f}{verdict}",
                flush=True,
            )
    return code


if __name__ == "__main__":
    sys.exit(main())
