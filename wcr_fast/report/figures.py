"""Statistics -> the demo's three figures, as PNG bytes. Pure functions; matplotlib without its global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from wcr_fast.errors import require
from wcr_fast.report.statistics import PROTOCOLS, Summary
from wcr_fast.report.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour blindness; markers and dashes say it again.
STYLES = [
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    {"color": "#009E73", "marker": "^", "linestyle": "--"},
    {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    {"color": "#CC79A7", "marker": "v", "linestyle": "--"},
    {"color": "#E69F00", "marker": "P", "linestyle": "-."},
]

FRONT_SPARSITIES = (0.95, 0.98)


def styles(summary: Summary) -> dict[str, dict[str, Any]]:
    return {method: STYLES[i % len(STYLES)] for i, method in enumerate(summary.labels)}


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, np.ndarray]:
    figure = require("matplotlib.figure", "demo").Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version or date inside: equal numbers give equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)


def accuracy_curves(summary: Summary, protocol: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return what the first figure draws: method -> (mean, lower edge, upper edge of the band), in %.

    The band is one standard deviation to each side, cut at 0 and 100; none (the mean itself) for one seed.
    """
    drawn = {}
    for method, curve in summary.test[protocol].items():
        std = np.nan_to_num(curve.std)
        drawn[method] = (curve.mean, np.clip(curve.mean - std, 0, 100), np.clip(curve.mean + std, 0, 100))
    return drawn


def accuracy_figure(summary: Summary) -> bytes:
    """Draw test accuracy against sparsity at the chosen strengths, one panel for each protocol."""
    figure, grid = _figure(1, 2, (10, 5.2), sharey=True)
    places = np.arange(len(summary.sparsities))
    for axes, protocol in zip(grid[0], PROTOCOLS, strict=True):
        for method, (mean, lower, upper) in accuracy_curves(summary, protocol).items():
            style = styles(summary)[method]
            label = f"{summary.labels[method]} ({summary.chosen[method]:g})"
            axes.fill_between(places, lower, upper, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(places, mean, label=label, markersize=5, linewidth=1.8, **style)
        if summary.reference is not None:
            extra = summary.reference
            label = f"{extra.label} ({extra.strength:g})"
            axes.plot(places, extra.test[protocol].mean, label=label, color="#777777", linestyle=":", linewidth=1.8)
        axes.set_title(PROTOCOLS[protocol], fontsize=12)
        axes.set_xticks(places, [f"{100 * s:g}" for s in summary.sparsities])
        axes.set_xlabel("weights removed (%), uneven steps", fontsize=11)
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("test accuracy (%)", fontsize=11)
    seeds = len(summary.seeds)
    band = f"band: ± 1 standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"UCI digits: one-shot global magnitude pruning ({band})", fontsize=12)
    _legend(figure, grid[0][0])
    return _png(figure)


def front_figure(summary: Summary) -> bytes:
    """Draw dense against pruned accuracy on the validation part, along every method's ladder."""
    shown = [s for s in FRONT_SPARSITIES if s in summary.sparsities]
    figure, grid = _figure(len(shown), 2, (10, 4.2 * len(shown) + 0.8), sharex=True, sharey="row")
    for line, sparsity in zip(grid, shown, strict=True):
        for axes, protocol in zip(line, PROTOCOLS, strict=True):
            for method, entries in summary.strengths.items():
                _front(axes, summary, method, protocol, summary.column(sparsity), entries)
            axes.set_title(f"{percent(sparsity)} removed, {PROTOCOLS[protocol]}", fontsize=12)
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 103)
        line[0].set_ylabel("validation accuracy, pruned (%)", fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("validation accuracy, dense (%)", fontsize=11)
    figure.suptitle("Every strength of every ladder: larger marker = stronger, ring = chosen", fontsize=12)
    _legend(figure, grid[0][0])
    return _png(figure)


def _front(axes: Axes, summary: Summary, method: str, protocol: str, column: int, entries: list) -> None:
    """Draw one method's ladder into one panel."""
    style = styles(summary)[method]
    dense = [entry.dense for entry in entries]
    pruned = [entry.curves[protocol][column] for entry in entries]
    axes.plot(dense, pruned, color=style["color"], linestyle=style["linestyle"], linewidth=1, alpha=0.6)
    axes.scatter(
        dense,
        pruned,
        s=np.linspace(14, 70, len(entries)),
        color=style["color"],
        marker=style["marker"],
        label=summary.labels[method],
        alpha=0.85,
        linewidths=0,
    )
    at = [entry.strength for entry in entries].index(summary.chosen[method])
    axes.scatter(dense[at], pruned[at], s=170, facecolors="none", edgecolors=style["color"], linewidths=1.5)


def histogram_figure(summary: Summary) -> bytes:
    """Draw the magnitudes of the dense weights: each method filled, the first one outlined for comparison."""
    methods = list(summary.labels)
    columns = 3
    rows = -(-len(methods) // columns)
    figure, grid = _figure(rows, columns, (10, 2.9 * rows + 0.5), sharex=True, sharey=True)
    edges = summary.magnitude_edges
    present = np.flatnonzero(sum(summary.magnitudes.values()) > 0)
    for axes, method in zip(grid.flat, methods, strict=False):
        color = styles(summary)[method]["color"]
        axes.stairs(summary.magnitudes[method], edges, fill=True, color=color, alpha=0.55)
        axes.stairs(summary.magnitudes[methods[0]], edges, color="#000000", linewidth=1)
        axes.set_title(f"{summary.labels[method]} ({summary.chosen[method]:g})", fontsize=11)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if len(present):
            axes.set_xlim(edges[max(present[0], 0)], edges[present[-1] + 1])
    for axes in grid.flat[len(methods) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("|w|", fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of weights (%)", fontsize=11)
    figure.suptitle(
        f"Magnitudes of the dense weights (black line: {summary.labels[methods[0]]}; eight bins a decade)",
        fontsize=12,
    )
    return _png(figure)


def all_figures(summary: Summary) -> dict[str, bytes]:
    """Return file name -> PNG of every figure."""
    return {
        "accuracy.png": accuracy_figure(summary),
        "front.png": front_figure(summary),
        "magnitudes.png": histogram_figure(summary),
    }
