"""Records -> the README's tables and plots: ``python -m benchmarks.report RECORDS... [--out DIR] [--readme FILE]``.

Prints the tables (--ratios: short ones), or writes them between the README's markers; plots go to --out (they need the
demo extra). Records of different machines, versions or commits are refused: report each for itself.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import SCHEMA, Row
from benchmarks.shapes import LISTS
from wcr_fast.errors import MissingExtra, UsageError, require
from wcr_fast.report.figures import STYLES
from wcr_fast.report.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SAME = ("gpu", "processor", "driver_version", "torch", "triton", "python", "wcr_fast", "commit")
TITLES = {
    "penalty": "The penalty's gradient added to `.grad`, and the moments alone",
    "optimizer_step": "One optimizer step over all parameters",
    "train_step": "A whole training step on random data",
    "select_mask": "Magnitude selection: pruning in place, thresholds, masks",
    "perturb": "SAM and CrAM outside of their passes",
}
Record = dict[str, Any]


def load(paths: Sequence[Path]) -> list[Record]:
    """Read records that belong together.

    Raises:
        UsageError: a file is no record, a suite comes twice, or machine, versions or commit differ.
    """
    records: dict[str, Record] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"{path} is not a whole record: {error}") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UsageError(f"{path} is not a record of {SCHEMA}: make one with python -m benchmarks")
        if record["suite"] in records:
            raise UsageError(f"{path}: the suite {record['suite']} comes twice; report each run for itself")
        records[record["suite"]] = record
        first = next(iter(records.values()))
        for key in SAME:
            mine, theirs = (r["machine"].get(key) for r in (record, first))
            if mine != theirs:
                raise UsageError(f"{path}: {key} is {mine}, but {theirs} in {paths[0]}: report them apart")
    return list(records.values())


# Tables ----------------------------------------------------------------------------------------------------------


def caption(records: Sequence[Record]) -> str:
    """Say on what, with what, when and how the records were made."""
    machine = records[0]["machine"]
    where = machine["gpu"] or f"no GPU: {machine['processor']}, {machine['cores']} cores"
    parts = [where, *([f"driver {machine['driver_version']}"] if machine.get("driver_version") else [])]
    parts += [f"{name} {machine[name]}" for name in ("torch", "triton") if machine.get(name)]
    commit, changed, _ = (machine.get("commit") or "unknown").partition("+")
    parts.append(f"commit {commit[:10]}{' and changes' * bool(changed)}")
    parts.append(" and ".join(sorted({record["date"] for record in records})))
    copies = ", ".join(f"{record['copy']['gbps']:,.0f}" for record in records)
    commands = " and ".join(sorted({f"`{record['command']}`" for record in records}))
    notes = [f"{', '.join(parts)}.", f"Measured copy bandwidth: {copies} GB/s.", f"Made with {commands}."]
    if any(record["quick"] for record in records):
        notes.append("**Quick runs: small lists and few rounds, for a look only.**")
    incomplete = [record["suite"] for record in records if not record["complete"]]
    if incomplete:
        notes.append(f"**Broke off: {', '.join(incomplete)}.**")
    return " ".join(notes)


def cases_of(record: Record) -> dict[tuple[str, str, str], list[Row]]:
    """Return (op, list, dtype) -> its rows; float32 first, then by size."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(record["rows"], key=lambda row: (row["dtype"] != "float32", row["weights"])):
        cases.setdefault((row["op"], row["list"], row["dtype"]), []).append(row)
    return cases


def cell(row: Row | None) -> str:
    """Return one side's figures: median ms, share of the copy's bandwidth or memory; what went wrong instead."""
    if row is None:
        return ""
    if row["status"] != "timed":
        return "out of memory" if row["why"] == "out of memory" else row["status"]
    median = row["device_ms"][1]
    text = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
    if row["launch_bound"]:
        text += f" (host {row['host_ms'][1]:.3g})"
    if row["copy_share"] is not None:
        text += f", {row['copy_share']:.0%}"
    if row["bytes"] is None and row["peak_bytes"] is not None:
        text += f", {row['peak_bytes'] / 2**30:.2f} GiB"
    return text


def table(record: Record, op: str) -> str:
    """Return one op's table: a line for each list and dtype, a column for each side, the fastest in bold."""
    cases = {key: rows for key, rows in cases_of(record).items() if key[0] == op}
    sides = list(dict.fromkeys(row["side"] for rows in cases.values() for row in rows))
    lines = [f"| {op} | {' | '.join(sides)} |", "| --- |" + " --- |" * len(sides)]
    for (_, name, dtype), rows in cases.items():
        by_side = {row["side"]: row for row in rows}
        timed = [row for row in rows if row["status"] == "timed"]
        best = min(timed, key=lambda row: row["device_ms"][1])["side"] if timed else None
        shown = [f"**{cell(by_side[s])}**" if s == best else cell(by_side.get(s)) for s in sides]
        lines.append(f"| {name}, {dtype}, {rows[0]['weights'] / 1e6:,.1f} M | {' | '.join(shown)} |")
    return "\n".join(lines)


def markdown(records: Sequence[Record]) -> str:
    """Return all tables with their caption."""
    parts = [caption(records)]
    place = "device" if records[0]["machine"]["gpu"] else "CPU"
    parts.append(
        f"Median milliseconds on the {place}, the shortest in bold; %: the least that the op must move over that time, "
        "of the measured copy's bandwidth; in brackets the host's time where that is longer; GiB: the step's memory "
        "above what was there before."
    )
    for record in records:
        parts.append(f"**{TITLES[record['suite']]}**")
        parts += [table(record, op) for op in dict.fromkeys(row["op"] for row in record["rows"])]
        troubles = [*filter(None, map(_trouble, record["rows"])), *record["notes"]]
        parts += ["\n".join(f"- {line}" for line in troubles)] * bool(troubles)
    return "\n\n".join(parts) + "\n"


def short(records: Sequence[Record]) -> str:
    """Return the ratios' tables with their caption."""
    tables = [part for record in records for part in (f"**{TITLES[record['suite']]}**", ratios(record))]
    return "\n\n".join([caption(records), *tables]) + "\n"


def _trouble(row: Row) -> str | None:
    """Return the line of a side without a figure, where its cell doesn't say why."""
    if row["status"] == "timed" or row["why"] == "out of memory":
        return None
    return f"{row['list']}, {row['dtype']}, {row['op']}, {row['side']}: {row['status']}, {row['why']}"


def put_between(text: str, tables: str) -> str:
    """Return a README with the tables between its markers.

    Raises:
        UsageError: a marker is missing, or they are in the wrong order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the file needs the lines {BEGIN} and {END}, in this order")
    return f"{head}{BEGIN}\n{tables}{END}{tail}"


# Figures ---------------------------------------------------------------------------------------------------------


#: figure of bandwidths -> what it shows: (op, side)
DRAWN = {
    "bandwidth.png": (
        ("moments", "layer_moments"),
        ("gradient", "add_grad_"),
        ("SGD", "ours, penalty"),
        ("AdamW", "ours, penalty"),
        ("SGD", "torch fused"),
        ("AdamW", "torch fused"),
    ),
    "bandwidth_selection.png": (
        ("threshold", "ours"),
        ("prune", "ours, no record"),
        ("masks", "ours"),
        ("2:4", "ours, no record"),
        ("threshold", "topk unsorted"),
        ("prune", "global_unstructured"),
    ),
}
#: suite -> pairs (our side, the rival that it is compared with)
RIVALRIES = {
    "penalty": (
        ("add_grad_", "eager autograd"),
        ("add_grad_", "_foreach"),
        ("add_grad_", "torch.compile"),
        ("add_grad_", "torch.compile by layer"),
        ("layer_moments", "eager"),
    ),
    "optimizer_step": (
        ("ours", "torch fused"),
        ("ours, penalty", "torch fused"),
        ("ours, penalty", "torch fused, eager penalty"),
    ),
    "train_step": (
        ("ours, penalty", "no penalty, torch fused"),
        ("ours, penalty", "torch fused, eager penalty"),
    ),
    "select_mask": (
        ("ours", "global_unstructured"),
        ("ours", "topk unsorted"),
        ("ours", "kthvalue"),
        ("ours", "sort"),
        ("ours", "partition"),
    ),
    "perturb": (
        ("ours", "_foreach"),
        ("ours", "cat + sorted topk + scatter"),
    ),
}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def rivalries(record: Record) -> dict[tuple[str, str, str], list[tuple[Row, Row]]]:
    """Return (op, list, dtype) -> the rows of our sides and of the rivals that they're compared with."""
    found: dict[tuple[str, str, str], list[tuple[Row, Row]]] = {}
    for case, rows in cases_of(record).items():
        timed = {row["side"]: row for row in rows if row["status"] == "timed"}
        pairs = [pair for pair in RIVALRIES[record["suite"]] if set(pair) <= set(timed)]
        if pairs:
            found[case] = [(timed[ours], timed[rival]) for ours, rival in pairs]
    return found


def _factor(ours: Row, rival: Row) -> float:
    return rival["device_ms"][1] / ours["device_ms"][1]


def speedups(record: Record) -> dict[str, dict[tuple[str, str], float]]:
    """Return case -> (our side, rival) -> how many times as fast ours is, losses included."""
    return {
        f"{name} {dtype}, {op}": {(ours["side"], rival["side"]): _factor(ours, rival) for ours, rival in pairs}
        for (op, name, dtype), pairs in rivalries(record).items()
    }


def ratios(record: Record) -> str:
    """Return a table of what is compared with what, case by case: the ratio of times, and the memory both take."""
    lines = ["| what | against | ratio | extra memory, ours and theirs |", "| --- | --- | --- | --- |"]
    for (op, name, dtype), pairs in rivalries(record).items():
        first = f"{op}, {name}, {dtype}"
        for ours, rival in pairs:
            factor = _factor(ours, rival)
            ratio = f"{factor:.3g} times faster" if factor >= 1 else f"{1 / factor:.3g} times as long"
            side = "" if ours["side"] == "ours" else f" ({ours['side']})"
            lines.append(f"| {first}{side} | {rival['side']} | {ratio} | {_memory(ours)}, {_memory(rival)} |")
            first = ""
    return "\n".join(lines)


def _memory(row: Row) -> str:
    return "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"


def _figure(columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # equal numbers give equal files
    return buffer.getvalue()


def _where(records: Sequence[Record]) -> str:
    machine = records[0]["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores (no GPU)"
    quick = ", quick run" if any(record["quick"] for record in records) else ""
    return f"{where}, torch {machine['torch']}, {records[0]['date']}{quick}"


def bandwidth_figure(records: Sequence[Record], shown: Sequence[tuple[str, str]]) -> bytes | None:
    """Draw GB/s against the number of values, a panel for each dtype, under the measured copy; None without any.

    Of a suite that varies the values, only those of the plain lists are shown.
    """
    lines: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for row in (row for record in records for row in record["rows"]):
        if (row["op"], row["side"]) in shown and row["list"] in LISTS and row["gbps"] is not None:
            drawn = lines.setdefault(row["dtype"], {})
            drawn.setdefault((row["op"], row["side"]), []).append((row["weights"], row["gbps"]))
    if not lines:
        return None
    figure, panels = _figure(len(lines), (10, 5.4), sharey=True)
    copy = max(record["copy"]["gbps"] for record in records)
    for axes, (dtype, drawn) in zip(panels, lines.items(), strict=True):
        axes.axhline(copy, color="#000000", linewidth=1, linestyle=":", label=f"measured copy, {copy:,.0f} GB/s")
        for style, key in zip(STYLES, shown, strict=True):
            x, y = zip(*sorted(drawn.get(key, [(float("nan"), float("nan"))])), strict=True)
            axes.plot(x, y, label=f"{key[0]}: {key[1]}", markersize=6, linewidth=1.5, **style)
        sizes = [weights for points in drawn.values() for weights, _ in points]
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 3, max(sizes) * 3)
        axes.set_title(dtype, fontsize=12)
        axes.set_xlabel("values in the list", fontsize=11)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, None)
    panels[0].set_ylabel("GB/s (the least to move, over device time)", fontsize=11)
    figure.suptitle(_where(records), fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _png(figure)


def speedup_figure(record: Record) -> bytes | None:
    """Draw how many times as fast as its rivals ours is, case by case; losses point left. None without a pair."""
    cases = speedups(record)
    if not cases:
        return None
    pairs = [pair for pair in RIVALRIES[record["suite"]] if any(pair in factors for factors in cases.values())]
    bars = sum(len(factors) + 1 for factors in cases.values())
    figure, (axes,) = _figure(1, (10, 1.8 + 0.19 * bars))
    ticks = []
    place = 0.0
    for factors in cases.values():
        ticks.append(-place - (len(factors) - 1) / 2)
        for pair, factor in factors.items():
            style = STYLES[pairs.index(pair) + 1]
            axes.barh(-place, factor - 1, left=1, color=style["color"], height=0.85, hatch="//" * (factor < 1))
            align = "left" if factor >= 1 else "right"
            axes.text(factor, -place, f" {factor:.3g} ", va="center", ha=align, fontsize=8)
            place += 1
        place += 1
    found = [factor for factors in cases.values() for factor in factors.values()]
    low, high = min(0.7, 0.7 * min(found)), max(1.5, 1.5 * max(found))
    axes.set_xscale("log")
    shown = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    axes.axvline(1, color="#000000", linewidth=1)
    axes.set_yticks(ticks, cases, fontsize=9)
    axes.set_ylim(-place + 1, 1)
    axes.set_xlabel("times as fast, device time (log scale; hatched: slower)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    patch = require("matplotlib.patches", "demo").Patch
    handles = [
        patch(color=STYLES[i]["color"], label=f"{ours} against {rival}") for i, (ours, rival) in enumerate(pairs, 1)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{TITLES[record['suite']]}\n{_where([record])}".replace("`", ""), fontsize=11)
    return _png(figure)


def figures(records: Sequence[Record]) -> dict[str, bytes]:
    """Return file name -> PNG of every figure that these records have something for."""
    drawn = {name: bandwidth_figure(records, shown) for name, shown in DRAWN.items()}
    drawn |= {f"speedup_{record['suite']}.png": speedup_figure(record) for record in records}
    return {name: content for name, content in drawn.items() if content is not None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of python -m benchmarks")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the plots there")
    parser.add_argument("--ratios", action="store_true", help="short tables: ours against each rival, and memory")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"put the tables between {BEGIN} and {END}")
    args = parser.parse_args(arguments)
    try:
        records = load(args.records)
        tables = short(records) if args.ratios else markdown(records)
        if args.readme:
            write_file(args.readme, put_between(args.readme.read_text(encoding="utf-8"), tables).encode())
        else:
            print(tables, end="")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            for name, content in figures(records).items():
                write_file(args.out / name, content)
    except (UsageError, MissingExtra) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
