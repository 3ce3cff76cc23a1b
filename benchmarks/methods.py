"""Every regularizer and pruning-robust optimizer, alone and with WCR, on the digits: ``python -m benchmarks.methods``.

The runs of ``wcr-fast demo --methods``: three seeds, six strengths each, chosen on the validation part. Prints the
table; ``--out FILE`` also writes the record: the table's numbers, every ladder, machine and date. ``--from FILE``
takes the runs from the results.json of such a demo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from wcr_fast.experiments.command import run_plan
from wcr_fast.experiments.plan import PLANS
from wcr_fast.report import statistics, tables
from wcr_fast.report.files import load_results, write_file

SCHEMA = "wcr-fast/methods/1"


def record_of(results: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a comparison: small enough to be committed, with all that the table says."""
    summary, costs = statistics.summarise(results), statistics.costs(results)
    plan = {key: value for key, value in results["plan"].items() if key != "methods"}
    methods = {}
    for method, label in summary.labels.items():
        methods[method] = {
            "label": label,
            "knob": summary.knobs[method],
            "chosen": summary.chosen[method],
            "time": round(costs[method].time, 3),
            "copies": round(costs[method].copies, 3),
            "test": {
                protocol: {name: _rounded(getattr(summary.test[protocol][method], name)) for name in ("mean", "std")}
                for protocol in statistics.PROTOCOLS
            },
            "validation": {
                f"{entry.strength:g}": {protocol: _rounded(curve) for protocol, curve in entry.curves.items()}
                for entry in summary.strengths[method]
            },
        }
    return {
        "schema": SCHEMA,
        "command": "python -m benchmarks.methods",
        "made": {key: value for key, value in results["made"].items() if key != "held_copies"},
        "machine": results["machine"],
        "plan": plan,
        "data": results["data"],
        "digest": results["digest"],
        "diverged": summary.diverged,
        "methods": methods,
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 2) for v in values]


def dump(record: dict[str, Any]) -> str:
    """Return the record's text, a line for each method."""
    head = {key: value for key, value in record.items() if key != "methods"}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record["methods"].items())
    return f'{json.dumps(head, indent=1)[:-2]},\n "methods": {{\n{lines}\n }}\n}}\n'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the record as JSON")
    parser.add_argument("--from", dest="source", type=Path, metavar="RESULTS", help="take the runs from a results.json")
    parser.add_argument("--workers", type=int, help="processes (default one a core)")
    args = parser.parse_args(arguments)
    results = load_results(args.source) if args.source else run_plan(PLANS["methods"], args.workers)
    print(tables.text_methods(statistics.summarise(results), statistics.costs(results)))
    if args.out:
        write_file(args.out, dump(record_of(results)).encode())


if __name__ == "__main__":
    main()
