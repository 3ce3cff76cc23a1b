"""Statistics -> tables and sentences, as text and HTML. Pure functions."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from wcr_fast.report.statistics import PROTOCOLS, Cost, Curve, Strength, Summary


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


def spread(mean: float, std: float, sign: str = "") -> str:
    """Format mean and standard deviation; a single seed has no deviation."""
    text = f"{round(float(mean), 1) + 0.0:{sign}.1f}"  # + 0.0: no minus before a zero
    return text if math.isnan(std) else f"{text} ± {std:.1f}"


def cells(curve: Curve, sign: str = "") -> list[str]:
    return [spread(m, s, sign) for m, s in zip(curve.mean, curve.std, strict=True)]


def caption(summary: Summary, protocol: str) -> str:
    """Say what a table of accuracies holds."""
    seeds = len(summary.seeds)
    what = f"mean ± standard deviation, {seeds} seeds" if seeds > 1 else "one seed"
    return f"Test accuracy in %, {PROTOCOLS[protocol]}: {what}"


def text_table(summary: Summary, protocol: str) -> str:
    """Return one table for the terminal, sparsities down, methods across; 80 columns for six methods."""
    heads = [textwrap.wrap(label.replace("SGD + ", "+ "), 13) for label in summary.labels.values()]
    strengths = [f"{summary.chosen[method]:g}" for method in summary.labels]
    columns = [cells(summary.test[protocol][method]) for method in summary.labels]

    def line(first: str, rest: Sequence[str]) -> str:
        return (f"{first:<7}" + "".join(f"{text:>12}" for text in rest)).rstrip()

    lines = [caption(summary, protocol)]
    for i in range(max(map(len, heads))):
        lines.append(line("" if i else "removed", [head[i] if i < len(head) else "" for head in heads]))
    lines.append(line("chosen", strengths))
    for i, sparsity in enumerate(summary.sparsities):
        lines.append(line(percent(sparsity), [column[i] for column in columns]))
    if summary.reference is not None:
        curve = cells(summary.reference.test[protocol])
        shown = [f"{percent(s)}: {curve[summary.column(s)]}" for s in (0.8, 0.9, 0.95) if s in summary.sparsities]
        lines += [f"{summary.reference.label} ({summary.reference.strength:g}):", f"  {'; '.join(shown)}"]
    return "\n".join(lines)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    def row(tag: str, values: Sequence[str]) -> str:
        first, *rest = (html.escape(value) for value in values)
        scope = "col" if tag == "th" else "row"
        inner = f'<th scope="{scope}">{first}</th>' + "".join(f"<{tag}>{value}</{tag}>" for value in rest)
        return f"<tr>{inner}</tr>"

    body = "\n".join(row("td", values) for values in rows)
    return (
        f'<div class="wide" tabindex="0"><table><caption>{html.escape(title)}</caption>\n'
        f"<thead>{row('th', head)}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def html_accuracy(summary: Summary, protocol: str) -> str:
    """Return the table of test accuracies at the chosen strengths."""
    head = ["method", "strength", *(percent(s) for s in summary.sparsities)]
    rows = [
        [label, f"{summary.chosen[method]:g}", *cells(summary.test[protocol][method])]
        for method, label in summary.labels.items()
    ]
    if summary.reference is not None:
        extra = summary.reference
        rows.append([extra.label, f"{extra.strength:g}", *cells(extra.test[protocol])])
    return _html(head, rows, caption(summary, protocol))


def html_differences(summary: Summary, rows: Sequence[tuple[str, Curve]], protocol: str) -> str:
    """Return the table of paired differences: (what minus what, difference) a row."""
    head = ["difference", *(percent(s) for s in summary.sparsities)]
    title = f"Difference in points on the test part, paired by seed, {PROTOCOLS[protocol]}"
    return _html(head, [[name, *cells(curve, "+")] for name, curve in rows], title)


def html_ladders(summary: Summary) -> str:
    """Return what the rule saw: validation accuracy of every strength of every method."""
    shown = [s for s in (0.0, 0.9, 0.95, 0.98) if s in summary.sparsities]
    head = ["method", "strength", *(f"{percent(s)}, {PROTOCOLS[p]}" for p in PROTOCOLS for s in shown)]
    head += ["mean over all", "dense within tolerance", "chosen"]

    def row(entry: Strength) -> list[str]:
        values = [entry.curves[p][summary.column(s)] for p in PROTOCOLS for s in shown]
        marks = ["yes" if entry.eligible else "no", "●" if entry.strength == summary.chosen[entry.method] else ""]
        name = f"{summary.labels[entry.method]} ({summary.knobs[entry.method]})"
        return [name, f"{entry.strength:g}", *(f"{v:.1f}" for v in values), f"{entry.score:.2f}", *marks]

    rows = [row(entry) for entries in summary.strengths.values() for entry in entries]
    return _html(head, rows, "Validation accuracy in %, mean over the seeds")


#: Of the table of all methods.
METHOD_SPARSITIES = (0.9, 0.95, 0.98)


def methods_rows(summary: Summary, costs: Mapping[str, Cost]) -> list[list[str]]:
    """Return head and rows of the table of all methods: accuracies at the chosen strengths, and what they cost."""
    shown = [(s, p) for p in PROTOCOLS for s in METHOD_SPARSITIES]
    head = ["method", "strength", "dense", *(percent(s) + (" *" if p != "as_is" else "") for s, p in shown)]
    rows = [[*head, "time", "copies"]]
    dense = summary.column(0.0)
    for method, label in summary.labels.items():
        values = [cells(summary.test["as_is"][method])[dense]]
        values += [cells(summary.test[p][method])[summary.column(s)] for s, p in shown]
        cost = costs[method]
        rows.append([label, f"{summary.chosen[method]:g}", *values, f"{cost.time:.2f}", f"{cost.copies:.2f}"])
    return rows


def methods_caption(summary: Summary) -> str:
    """Say what the table of all methods holds."""
    return (
        f"Test accuracy in %, mean ± standard deviation of {len(summary.seeds)} seeds, at the strength chosen on the "
        "validation part; * with batch norm re-estimated. time: of training, plain SGD = 1. copies: memory held "
        "between steps beyond plain SGD's, in copies of the parameters."
    )


def text_methods(summary: Summary, costs: Mapping[str, Cost]) -> str:
    """Return the table of all methods for the terminal."""
    rows = methods_rows(summary, costs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([textwrap.fill(methods_caption(summary), 100), "", *lines])


def html_methods(summary: Summary, costs: Mapping[str, Cost]) -> str:
    """Return the table of all methods for the page."""
    head, *rows = methods_rows(summary, costs)
    return _html(head, rows, methods_caption(summary))


def ranking(summary: Summary, sparsity: float, protocol: str) -> str:
    """Return one sentence: the methods from the highest to the lowest mean at one sparsity."""
    column = summary.column(sparsity)
    curves = summary.test[protocol]
    order = sorted(curves, key=lambda method: -curves[method].mean[column])
    parts = [f"{summary.labels[m]} {spread(curves[m].mean[column], curves[m].std[column])}" for m in order]
    return f"At {percent(sparsity)}, {PROTOCOLS[protocol]}, from high to low: {'; '.join(parts)}."


def edge_of_choice(summary: Summary) -> str:
    """Name the methods whose chosen strength lies at an end of the ladder: their best may lie outside."""
    ends = []
    for method, rows in summary.strengths.items():
        ladder = [row.strength for row in rows]
        if summary.chosen[method] in (min(ladder), max(ladder)):
            end = "lowest" if summary.chosen[method] == min(ladder) else "highest"
            ends.append(f"{summary.labels[method]} ({end})")
    if not ends:
        return "No chosen strength lies at an end of its ladder."
    return f"Chosen at an end of the ladder, so a better strength may lie outside it: {', '.join(ends)}."


def seeds_note(summary: Summary) -> str:
    """Say how far the spread of these seeds carries."""
    if len(summary.seeds) == 1:
        return "With one seed there is no spread at all: read no ranking into small differences."
    largest = max(float(np.max(curve.std)) for curves in summary.test.values() for curve in curves.values())
    return (
        f"The standard deviations (up to {largest:.1f} points) are over {len(summary.seeds)} seeds on one split: "
        "they hold initialisation and order of batches, not the choice of data."
    )
