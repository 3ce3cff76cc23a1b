"""What every process of a gloo group does for test_checkpoint_ranks.py: prune what one process has pruned before."""

import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from wcr_fast.errors import UsageError
from wcr_fast.pruning import checkpoint_plan, checkpoint_write, file_keys, safetensors_io
from wcr_fast.pruning.checkpoint import prune_checkpoint

#: (folder, scope, sparsity); DCP's grid has no whole rows
CASES = [
    *[(folder, "global", sparsity) for folder in ("hf", "dcp") for sparsity in (0.0, 0.37, 0.9, 1.0)],
    *[(folder, "layer", 0.61) for folder in ("hf", "dcp")],
    *[("hf", "row", 0.5), ("hf", "2:4", None), ("one.safetensors", "global", 0.5), ("dcp rows", "row", 0.3)],
]
SEVERAL = [0.2, 0.5, 0.8]


def name(folder, scope, sparsity):
    return f"{folder} {scope} {sparsity}".replace(":", "-")


def prune(root, out, case, **options):
    folder, scope, sparsity = case
    options = {"target": root / out if out else None, **options}
    return prune_checkpoint(root / folder, sparsity=sparsity, scope=scope, **options)


def small_blocks():
    for module in (checkpoint_plan, checkpoint_write):
        module.BLOCK_BYTES = 512
    file_keys.SWEEP_BYTES = 192


def failure(root, out, case, group):
    """Return the message of the error that is expected."""
    try:
        prune(root, out, case, group=group)
    except UsageError as error:
        return str(error)
    return "no error"


def broken(module, attribute, error, rank):
    """Make a function fail in one process, a few calls from now."""
    real, calls = getattr(module, attribute), 0

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise error
        return real(*args)

    if dist.get_rank() == rank:
        setattr(module, attribute, fail)
    return lambda: setattr(module, attribute, real)


def check(root, ranks):
    """Prune everything; return records, messages of errors, and progress."""
    group, found, done = dist.group.WORLD, {}, []
    for case in CASES:
        record = prune(root, f"{ranks} {name(*case)}", case, group=group, progress=lambda *now: done.append(now))
        found[case] = record.to_dict() | {"target": "", "progress": done[-1]}
    for folder in ("hf", "dcp"):
        found[folder] = [r.to_dict() for r in prune(root, None, (folder, "global", SEVERAL), group=group, dry_run=True)]
    found["rows"] = prune(root, None, ("hf", "row", 0.5), group=group, dry_run=True).to_dict()
    found["nan"] = failure(root, "nothing", ("nan.safetensors", "global", 0.5), group)
    found["there"] = failure(root, "hf", ("hf", "global", 0.5), group)
    last = ranks - 1
    for what, module, attribute, error in (
        ("full", safetensors_io.os, "pwrite", OSError(28, "No space left on device")),
        ("unreadable", safetensors_io.os, "preadv", OSError(5, "Input/output error")),
        ("a fault of ours", checkpoint_write, "_erase", ZeroDivisionError("oh")),
    ):
        mend = broken(module, attribute, error, last)
        found[what] = failure(root, "nothing", ("hf", "global", 0.5), group)
        mend()
    found["alone"] = failure(root, f"{ranks} after", ("hf", "global", 0.5), group)
    return found


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    small_blocks()
    try:
        found = check(Path(folder), ranks)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{ranks}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # one ordinary exit in some twenty is aborted by a thread of torch's that is still running
