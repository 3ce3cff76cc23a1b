"""Prune more than 2^31 weights in one bfloat16 tensor and count what is left: ``python -m benchmarks.large``.

Needs 5 GB of memory. Ends with exit code 1 where a count is not exact.
"""

from __future__ import annotations

import argparse
import time

import torch

import wcr_fast

CHUNK = 1 << 26


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    parser.add_argument("--more", type=int, default=12_345, help="weights beyond 2^31 (default 12345)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="the fraction removed (default 0.9)")
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.empty(2**31 + args.more, dtype=torch.bfloat16)
    parts = weight.split(CHUNK)
    for part in parts:
        part.uniform_(0.5, 1.5)  # no zeros, 192 different values: most are ties
    want = weight.numel() - round(args.sparsity * weight.numel())
    start = time.perf_counter()
    record = wcr_fast.prune_(weight, args.sparsity)
    seconds = time.perf_counter() - start
    kept = sum(int(part.count_nonzero()) for part in parts)
    smallest = min(part[part != 0].min().item() for part in parts if part.any())
    print(f"{weight.numel()} weights, {kept} kept in {seconds:.1f} s, {want} wanted; threshold {record.threshold}")
    exact = kept == want and record.zeros == record.removed == record.asked == weight.numel() - want
    # Of the ties at the threshold the first stay: none is kept behind the first one removed.
    tied = [(part == record.threshold).any().item() for part in parts]
    earlier = tied == sorted(tied, reverse=True)
    if not (exact and earlier and smallest == record.threshold):
        raise SystemExit("benchmarks.large: the counts are not exact")


if __name__ == "__main__":
    main()
