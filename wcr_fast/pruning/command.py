"""``wcr-fast prune``: prune a safetensors file, a Hugging Face folder or a distributed checkpoint as a stream."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from wcr_fast.errors import UsageError
from wcr_fast.ops.select import SCOPES
from wcr_fast.pruning.checkpoint import prune_checkpoint
from wcr_fast.pruning.checkpoint_record import compare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BAR = 24
# Rate and time left follow the last 5 seconds: writing is slower than reading.
TICK, TICKS = 0.1, 50


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``wcr-fast prune``."""
    parser.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help="a .safetensors file, a Hugging Face folder, or a folder of torch.distributed.checkpoint",
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, nargs="?", help="what to write (may be left out with --dry-run)"
    )
    parser.add_argument(
        "--sparsity",
        type=_sparsity,
        help="share of the weights to remove, in [0, 1]; not with an n:m scope; with --dry-run several: .5,.8,.9",
    )
    parser.add_argument(
        "--scope", default="global", help="global (default), layer, row, or n:m such as 2:4 (n kept of m)"
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help='tensors or modules to leave as they are: globs, or "re:..." for regular expressions',
    )
    parser.add_argument("--dry-run", action="store_true", help="find the cut and write nothing")
    parser.add_argument("--force", action="store_true", help="replace an existing OUT; OUT may be IN")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def _sparsity(text: str) -> float | list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def run(args: argparse.Namespace) -> int:
    """Prune, and print the record."""
    with _group() as group:
        first = group is None or group.rank() == 0
        try:
            return _prune(args, group, first)
        except UsageError:
            if first:  # all processes raise the same
                raise
            return 2


@contextlib.contextmanager
def _group() -> Iterator[ProcessGroup | None]:
    """Yield the processes that torchrun has started to share the work; None where it has not, or only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _prune(args: argparse.Namespace, group: ProcessGroup | None, first: bool) -> int:
    if args.sparsity is None and args.scope in SCOPES:
        raise UsageError("prune: --sparsity is missing: the share of the weights to remove (or an n:m --scope: 2:4)")
    begin = time.perf_counter()
    with ProgressLine(sys.stderr) if first else contextlib.nullcontext() as line:
        found = prune_checkpoint(
            args.source,
            args.target,
            args.sparsity,
            scope=args.scope,
            exclude=args.exclude,
            dry_run=args.dry_run,
            force=args.force,
            progress=line.show if first else None,
            group=group,
        )
    if not first:
        return 0
    seconds = time.perf_counter() - begin
    several = isinstance(found, list)
    if args.json:
        version = importlib.metadata.version("wcr-fast")
        schema = "wcr-fast/prune-several/1" if several else "wcr-fast/prune/1"
        head = {"schema": schema, "version": version, "seconds": round(seconds, 3)}
        body = {"records": [record.to_dict() for record in found]} if several else found.to_dict()
        print(json.dumps(head | body, indent=2))
    else:
        print(compare(found) if several else found)
    return 0


class ProgressLine:
    """A bar on a terminal; elsewhere one line every 10 %, and none for work of less than two seconds."""

    def __init__(self, stream: TextIO, verb: str = "prune") -> None:
        self.stream, self.terminal, self.verb = stream, stream.isatty(), verb
        self.begin = time.monotonic()
        self.shown_at, self.shown_tenth = self.begin, 0
        self.marks = deque([(self.begin, 0)], maxlen=TICKS)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def show(self, done: int, total: int) -> None:
        """Tell how far the work is; called for every block, so it returns at once where nothing is due."""
        now = time.monotonic()
        if now - self.marks[-1][0] >= TICK:
            self.marks.append((now, done))
        if self.terminal:
            if now - self.shown_at < TICK:
                return
            self.stream.write(f"\r{self._text(done, total, now)}\x1b[K")
        else:
            tenth = 10 * done // max(total, 1)
            if tenth <= self.shown_tenth or now - self.begin < 2:
                return
            self.shown_tenth = tenth
            self.stream.write(f"{self._text(done, total, now)}\n")
        self.shown_at = now
        self.stream.flush()

    def _text(self, done: int, total: int, now: float) -> str:
        share = done / max(total, 1)
        since, before = self.marks[0]
        rate = (done - before) / max(now - since, 1e-9)
        left = (total - done) / max(rate, 1)
        bar = f"[{'#' * int(BAR * share):<{BAR}}] " if self.terminal else ""
        return f"{self.verb} {bar}{share:4.0%}  {rate / 1e9:.2f} GB/s  {left:.0f} s left"
