"""Rows of results.json -> statistics: the chosen strengths, means and standard deviations. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Results = dict[str, Any]

#: How a pruned net is evaluated: as it is, or with batch-norm statistics re-estimated on training images.
PROTOCOLS = {"as_is": "as pruned", "re_estimated": "batch norm re-estimated"}

DENSE_TOLERANCE = 0.5

RULE = (
    "One strength per method, chosen on the validation part: the highest mean accuracy over all sparsities, "
    "without and with batch-norm re-estimation alike, and over the seeds, among the strengths whose mean dense "
    f"accuracy is within {DENSE_TOLERANCE} points of the method's best; ties go to the smaller strength."
)


@dataclass(frozen=True)
class Strength:
    """Validation accuracy in % of one method at one strength, as the rule sees it."""

    method: str
    strength: float
    dense: float
    score: float
    eligible: bool
    curves: dict[str, np.ndarray]
    """Protocol -> mean accuracy over the seeds, [sparsities]."""


@dataclass(frozen=True)
class Curve:
    """Test accuracy in % of a chosen strength: mean and sample standard deviation over the seeds, [sparsities]."""

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Plain SGD at the other methods' weight decay: fixed beforehand, not chosen, so its test part may be read."""

    label: str
    method: str
    strength: float
    test: dict[str, Curve]
    """Protocol -> curve."""


@dataclass(frozen=True)
class Summary:
    """All that tables, figures and text are made from."""

    labels: dict[str, str]
    knobs: dict[str, str]
    sparsities: list[float]
    seeds: list[int]
    strengths: dict[str, list[Strength]]
    chosen: dict[str, float]
    test: dict[str, dict[str, Curve]]
    """Protocol -> method -> curve."""
    reference: Reference | None
    magnitudes: dict[str, np.ndarray]
    """Method -> share of the dense weights in each bin of |w|, mean over the seeds, in %."""
    magnitude_edges: np.ndarray
    diverged: int

    def column(self, sparsity: float) -> int:
        """Return the position of a sparsity."""
        return self.sparsities.index(sparsity)


def accuracies(results: Results, method: str, strength: float, protocol: str, part: str) -> np.ndarray:
    """Return the accuracies in % of one method at one strength, [seeds, sparsities], seeds in plan order."""
    rows = {
        row["seed"]: row["correct"][protocol][part]
        for row in results["runs"]
        if row["method"] == method and row["strength"] == strength
    }
    counts = np.array([rows[seed] for seed in results["plan"]["seeds"]], dtype=np.float64)
    return 100.0 * counts / results["data"]["sizes"][part]


def _std(values: np.ndarray) -> np.ndarray:
    """Return the sample standard deviation over axis 0; nan for a single seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def validate(results: Results, method: str) -> list[Strength]:
    """Return the validation accuracies of every strength of a method, and which ones the rule admits."""
    rows = []
    for strength in results["plan"]["methods"][method]["strengths"]:
        curves = {p: accuracies(results, method, strength, p, "val").mean(axis=0) for p in PROTOCOLS}
        dense = float(curves["as_is"][results["plan"]["sparsities"].index(0.0)])
        rows.append((strength, dense, float(np.mean(list(curves.values()))), curves))
    best = max(dense for _, dense, _, _ in rows)
    # Counts are integers: the slack only keeps a mean of them from falling on the wrong side of the edge.
    edge = best - DENSE_TOLERANCE - 1e-9
    return [Strength(method, s, dense, score, dense >= edge, curves) for s, dense, score, curves in rows]


def choose(strengths: list[Strength]) -> float:
    """Apply :data:`RULE`: return the chosen strength of one method."""
    eligible = [row for row in strengths if row.eligible]
    return max(eligible, key=lambda row: (round(row.score, 9), -row.strength)).strength


def _share_of_weights(results: Results, method: str, strength: float) -> np.ndarray:
    counts = np.array(
        [
            row["magnitudes"]
            for row in results["runs"]
            if row["method"] == method and row["strength"] == strength and not row["diverged"]
        ],
        dtype=np.float64,
    )
    if not len(counts):
        return np.zeros(len(results["magnitude_edges"]) - 1)
    return (100.0 * counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)


def _test_curve(results: Results, method: str, strength: float, protocol: str) -> Curve:
    values = accuracies(results, method, strength, protocol, "test")
    return Curve(values.mean(axis=0), _std(values))


def _reference(results: Results, chosen: dict[str, float]) -> Reference | None:
    """Return plain SGD at the common weight decay; None where it wasn't run or was chosen anyway."""
    plan, decay = results["plan"], results["plan"]["weight_decay"]
    if decay not in plan["methods"].get("sgd", {}).get("strengths", []) or chosen["sgd"] == decay:
        return None
    label = f"{plan['methods']['sgd']['label']}, weight decay as the others"
    return Reference(label, "sgd", decay, {p: _test_curve(results, "sgd", decay, p) for p in PROTOCOLS})


def summarise(results: Results) -> Summary:
    """Turn the content of results.json into statistics.

    Strengths are chosen from validation accuracies alone; test accuracies are read for the chosen ones only.
    """
    methods = results["plan"]["methods"]
    strengths = {method: validate(results, method) for method in methods}
    chosen = {method: choose(rows) for method, rows in strengths.items()}
    test = {
        protocol: {method: _test_curve(results, method, strength, protocol) for method, strength in chosen.items()}
        for protocol in PROTOCOLS
    }
    return Summary(
        labels={key: method["label"] for key, method in methods.items()},
        knobs={key: method["knob"] for key, method in methods.items()},
        sparsities=list(results["plan"]["sparsities"]),
        seeds=list(results["plan"]["seeds"]),
        strengths=strengths,
        chosen=chosen,
        test=test,
        reference=_reference(results, chosen),
        magnitudes={method: _share_of_weights(results, method, s) for method, s in chosen.items()},
        magnitude_edges=np.array(results["magnitude_edges"]),
        diverged=sum(row["diverged"] for row in results["runs"]),
    )


def differences(results: Results, run: tuple[str, float], base: tuple[str, float], protocol: str) -> Curve:
    """Return test accuracy of one (method, strength) minus that of another, in points, paired by seed, [sparsities].

    Both start from the same initial weights and see the same batches, so the paired spread is the one that
    matters for their difference.
    """
    a, b = (accuracies(results, method, strength, protocol, "test") for method, strength in (run, base))
    return Curve((a - b).mean(axis=0), _std(a - b))


@dataclass(frozen=True)
class Cost:
    """What a method takes beside plain SGD: training time as a ratio, and memory held in copies of the parameters."""

    time: float
    copies: float


def costs(results: Results) -> dict[str, Cost]:
    """Return the cost of every method; the time of training is the median over its runs."""

    def seconds(method: str) -> float:
        return float(np.median([row["train_seconds"] for row in results["runs"] if row["method"] == method]))

    held, plain = results["made"]["held_copies"], seconds("sgd")
    return {key: Cost(seconds(key) / plain, held[key] - held["sgd"]) for key in results["plan"]["methods"]}


def leading(summary: Summary, count: int, sparsities: Sequence[float]) -> list[str]:
    """Return plain SGD and the methods with the highest mean test accuracy at these sparsities, as pruned."""
    columns = [summary.column(s) for s in sparsities]
    means = {method: float(curve.mean[columns].mean()) for method, curve in summary.test["as_is"].items()}
    best = sorted((m for m in means if m != "sgd"), key=lambda m: -means[m])
    return [m for m in summary.labels if m == "sgd" or m in best[: count - 1]]


def restricted(summary: Summary, methods: Sequence[str]) -> Summary:
    """Return the summary of some of the methods."""

    def some(values: dict[str, Any]) -> dict[str, Any]:
        return {method: values[method] for method in methods}

    return replace(
        summary,
        labels=some(summary.labels),
        knobs=some(summary.knobs),
        strengths=some(summary.strengths),
        chosen=some(summary.chosen),
        test={protocol: some(curves) for protocol, curves in summary.test.items()},
        magnitudes=some(summary.magnitudes),
    )
