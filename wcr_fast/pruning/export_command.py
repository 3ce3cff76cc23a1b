"""``wcr-fast export``: a pruned checkpoint with its zeros packed, and back."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path

from wcr_fast.pruning.command import ProgressLine
from wcr_fast.pruning.export import export_checkpoint, restore_checkpoint


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``wcr-fast export``."""
    parser.add_argument("source", metavar="IN", type=Path, help="a .safetensors file or a Hugging Face folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="what to write; wcr_fast.load_exported(OUT) loads it")
    parser.add_argument("--restore", action="store_true", help="IN is an export: write the dense checkpoint again")
    parser.add_argument(
        "--no-zlib", action="store_true", help="don't find out the compressed size, which takes the longest"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing OUT; OUT may be IN")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export or restore, and print the sizes."""
    begin = time.perf_counter()
    with ProgressLine(sys.stderr, "restore" if args.restore else "export") as line:
        if args.restore:
            size = restore_checkpoint(args.source, args.target, force=args.force, progress=line.show)
            record = {"source": str(args.source), "target": str(args.target), "dense_bytes": size}
            text = f"wrote {args.target}: {size:,} bytes, checked against the hash of the dense file"
        else:
            done = export_checkpoint(
                args.source, args.target, compress=not args.no_zlib, force=args.force, progress=line.show
            )
            record, text = done.to_dict(), str(done)
    if args.json:
        head = {
            "schema": f"wcr-fast/{'restore' if args.restore else 'export'}/1",
            "version": importlib.metadata.version("wcr-fast"),
            "seconds": round(time.perf_counter() - begin, 3),
        }
        print(json.dumps(head | record, indent=2))
    else:
        print(text)
    return 0
