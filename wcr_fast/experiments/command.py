"""``wcr-fast demo``: train, prune and compare on UCI digits, and write the report."""

from __future__ import annotations

import argparse
import datetime
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from wcr_fast.errors import UsageError, require
from wcr_fast.machine import describe_machine

DESCRIPTION = """\
Trains a small conv net on the UCI digits with several penalties and seeds, prunes each net at once to ten
sparsities, and writes results.json, three figures and report.html. The default size takes about two minutes
on 2 cores. Two runs on one machine give the same numbers.
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``wcr-fast demo``."""
    parser.description = DESCRIPTION
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="under half a minute: short runs, two strengths each")
    size.add_argument("--full", action="store_true", help="five seeds, six strengths: about ten minutes")
    size.add_argument(
        "--methods",
        action="store_true",
        help="every regularizer and optimizer, alone and with WCR: half an hour to an hour",
    )
    size.add_argument(
        "--from", dest="source", type=Path, metavar="RESULTS", help="draw the report of a results.json again"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("wcr-fast-demo"), metavar="DIR", help="where to write (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; default one a core, at most 8; same numbers"
    )


def run_plan(plan: Any, workers: int | None = None) -> dict[str, Any]:
    """Execute a plan and return the content of results.json.

    Args:
        plan: a ``wcr_fast.experiments.plan.Plan``.
        workers: number of processes; default one for each core, at most eight.
    """
    from wcr_fast.experiments import digits, methods, sweep
    from wcr_fast.experiments.progress import Progress
    from wcr_fast.experiments.train import MAGNITUDE_EDGES, held_copies
    from wcr_fast.report.files import SCHEMA, digest

    start = time.monotonic()
    runs = plan.runs()
    workers = min(workers or sweep.default_workers(), len(runs))
    with Progress(len(runs), "training runs") as progress:
        rows = sweep.sweep(runs, digits.read_digits, workers, on_row=lambda row: progress.advance())
    results = {
        "schema": SCHEMA,
        "made": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "workers": workers,
            "threads_per_worker": 1,
        },
        "machine": describe_machine(),
        "plan": plan.describe(),
        "data": {
            "name": "UCI optical recognition of handwritten digits, as in scikit-learn (1,797 images, 8 x 8)",
            "sizes": {name: len(rows) for name, rows in digits.split(digits.read_digits()[1]).items()},
            "split_seed": digits.SPLIT_SEED,
            "net": "conv 1-32-64-64 (3 x 3, batch norm, ReLU), linear 1024-10: 65,824 prunable weights",
        },
        "magnitude_edges": MAGNITUDE_EDGES.tolist(),
        "runs": rows,
    }
    if plan.size == "methods":
        part = digits.prepare(*digits.read_digits()).train
        results["made"]["held_copies"] = {
            key: round(held_copies(key, methods.BY_KEY[key].ladder[0], part), 4) for key in plan.methods
        }
    return {**results, "digest": digest(results)}


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Write results.json, the figures and report.html into a folder; return the text for the terminal."""
    from wcr_fast.report import figures, files, page, statistics, tables

    files.write_file(folder / "results.json", files.dump_results(results).encode())
    summary = statistics.summarise(results)
    costs = statistics.costs(results) if "held_copies" in results["made"] else None
    drawn = summary
    if costs:  # thirty curves can't be told apart
        drawn = statistics.restricted(summary, statistics.leading(summary, 6, tables.METHOD_SPARSITIES))
    images = figures.all_figures(drawn)
    for name, image in images.items():
        files.write_file(folder / name, image)
    files.write_file(folder / "report.html", page.render_page(results, summary, images, costs).encode())
    if costs:
        shown = [tables.text_methods(summary, costs)]
    else:
        shown = [tables.text_table(summary, protocol) for protocol in statistics.PROTOCOLS]
    names = ", ".join(["results.json", *images, "report.html"])
    made = f"{len(results['runs'])} runs, {results['made']['seconds']:.0f} s, digest {results['digest'][:16]}"
    return "\n\n".join([*shown, textwrap.fill(statistics.RULE, 80), f"{made}\nWritten to {folder}: {names}"])


def _prepare(folder: Path) -> None:
    """Make the output folder now: a wrong path should not cost two minutes first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".wcr-fast-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out: can't write to {folder}: {error.strerror}; choose another folder") from None


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    for module in ("sklearn", "matplotlib", "rich"):
        require(module, "demo")
    if args.source is not None:
        from wcr_fast.report.files import load_results

        results = load_results(args.source)
        _prepare(args.out)
    else:
        _prepare(args.out)
        from wcr_fast.experiments.plan import PLANS

        size = next((name for name in ("quick", "full", "methods") if getattr(args, name)), "default")
        results = run_plan(PLANS[size], args.workers)
    sys.stdout.write(write_report(results, args.out) + "\n")
    return 0
