"""Statistics and figures -> one HTML page that needs no other file. Pure functions."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from wcr_fast.report import tables
from wcr_fast.report.statistics import PROTOCOLS, RULE, Cost, Results, Summary, differences

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 0 auto; padding: 1rem; }
p, ul, dl { max-width: 60rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure { margin: 1.5rem 0; max-width: 66rem; } figcaption { font-size: .9rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .42rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886; }
thead th { white-space: normal; vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tbody th { white-space: normal; min-width: 8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""

FIGURES = {
    "accuracy.png": (
        "Accuracy against sparsity",
        "Test accuracy at the chosen strength of each method (in brackets). Bands: one standard deviation.",
    ),
    "front.png": (
        "Dense against pruned accuracy",
        "Validation accuracy of every strength of every ladder, mean over the seeds: what a method reaches does "
        "not hang on the one strength that the rule takes.",
    ),
    "magnitudes.png": (
        "Weight magnitudes",
        "Distribution of |w| before pruning at the chosen strengths, mean over the seeds; both axes are "
        "logarithmic. The lowest bin (at 1e-8) also holds everything smaller, exact zeros included.",
    ),
}

PAIRS = (("wcr", "sgd"), ("l1", "sgd"), ("l1+wcr", "l1"))

UNTRIED = (
    "The L1, Hoyer-Square and concentration penalties act through the optimizer's gradient as published "
    "subgradients; proximal variants were not tried."
)
LIMITS = (
    "One tiny data set (1,797 images of 8 x 8 pixels) and one small net: nothing here says what happens on large "
    "images, deep nets or language models.",
    "One fixed split. The seeds vary initialisation and order of batches, not the data; one test image is "
    "{image:.2f} points, so small differences are a few images.",
    "Strength decides much, and the ladders are coarse: a finer one, or another learning rate, schedule or number "
    "of epochs for a method, may change the order. All methods share one training recipe, tuned for none.",
    "Plain SGD's ladder varies the weight decay, the one knob it has; the penalised methods keep {decay:g}. Penalty "
    "and weight decay tuned together were not tried, so plain SGD is not compared with the penalties at equal "
    "weight decay, except where a row says so.",
    "The strengths were chosen on {val} validation images with the same seeds that are then tested.",
    "Only one-shot global magnitude pruning, without any training afterwards; other criteria, per-layer budgets "
    "or fine-tuning may change the order.",
    UNTRIED,
    "Nothing about speed: removed weights are stored as zeros and computed with all the same. The durations below "
    "belong to this demo on this machine.",
    "The numbers repeat exactly on the same machine and versions; another processor or library may round "
    "differently and end a little elsewhere.",
)


LEADING = "The figures show plain SGD and the five methods with the highest mean test accuracy at 90, 95 and 98 %."


def _paragraphs(texts: Sequence[str]) -> str:
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _figures(images: Mapping[str, bytes]) -> str:
    parts = []
    for name, image in images.items():
        title, text = FIGURES[name]
        data = base64.b64encode(image).decode("ascii")
        parts.append(
            f"<h2>{title}</h2>\n<figure>"
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _list(texts: Sequence[str]) -> str:
    # A mean and its deviation stay on one line.
    lines = [html.escape(text).replace(" ± ", "&nbsp;±&nbsp;") for text in texts]
    return "<ul>" + "\n".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _limits(results: Results) -> str:
    sizes = results["data"]["sizes"]
    values = {"image": 100 / sizes["test"], "val": sizes["val"], "decay": results["plan"]["weight_decay"]}
    limits = [text for text in LIMITS if "l1 proximal" not in results["plan"]["methods"] or text != UNTRIED]
    return _list([text.format(**values) for text in limits])


def _facts(results: Results) -> str:
    plan, made = results["plan"], results["made"]
    sizes = ", ".join(f"{name} {count}" for name, count in results["data"]["sizes"].items())
    facts = {
        "size": f"{plan['size']}: {len(plan['methods'])} methods x {len(plan['steps'])} strengths x "
        f"{len(plan['seeds'])} seeds = {len(results['runs'])} runs of {plan['epochs']} epochs",
        "data": f"{results['data']['name']}; {sizes} (stratified by class, fixed)",
        "net": results["data"]["net"],
        "training": f"SGD, momentum {plan['momentum']:g}, learning rate {plan['learning_rate']:g} "
        f"({plan['schedule']}), batch {plan['batch_size']}, weight decay {plan['weight_decay']:g} "
        "(on plain SGD's ladder: as listed)",
        "duration": f"{made['seconds']:.0f} s with {made['workers']} worker processes of one thread each",
        "date": made["date"],
        "digest of the runs": results["digest"],
        **{name: str(value) for name, value in results["machine"].items()},
    }
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def _differences(results: Results, summary: Summary, protocol: str) -> str:
    """Return the table of the pairs at hand, each method at its chosen strength."""
    labels, chosen = summary.labels, summary.chosen
    rows = [
        (f"{labels[a]} minus {labels[b]}", differences(results, (a, chosen[a]), (b, chosen[b]), protocol))
        for a, b in PAIRS
        if {a, b} <= set(labels)
    ]
    base = summary.reference
    if base is not None and "wcr" in labels:
        curve = differences(results, ("wcr", chosen["wcr"]), (base.method, base.strength), protocol)
        rows.insert(0, (f"{labels['wcr']} minus {base.label}", curve))
    return tables.html_differences(summary, rows, protocol)


def _warnings(results: Results, summary: Summary) -> list[str]:
    """Say which runs diverged or warned, if any did."""
    texts = []
    if summary.diverged:
        texts.append(f"{summary.diverged} runs ended with weights that are not finite; they count as 0 % correct.")
    warned = sorted({(row["method"], row["strength"]) for row in results["runs"] if row["warnings"]})
    if warned:
        listed = ", ".join(f"{summary.labels[method]} {strength:g}" for method, strength in warned)
        texts.append(f"Warned during training (unstable or odd steps; the texts are in results.json): {listed}.")
    return texts


def render_page(
    results: Results, summary: Summary, images: Mapping[str, bytes], costs: Mapping[str, Cost] | None = None
) -> str:
    """Return the report as one HTML document.

    Args:
        results: the content of results.json.
        summary: its statistics.
        images: file name -> PNG, as from ``all_figures``.
        costs: of every method, for a comparison of all of them.
    """
    tested = [(s, p) for p in PROTOCOLS for s in (0.95, 0.98) if s in summary.sparsities]
    findings = [tables.ranking(summary, sparsity, protocol) for sparsity, protocol in tested]
    if costs:  # thirty methods in a sentence say less than their table
        findings = []
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>wcr-fast demo: training before one-shot pruning</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Training before one-shot pruning, on UCI digits</h1>
<p>A small conv net is trained with each method along a ladder of strengths, then its smallest weights are removed
at once, over all layers together and without further training. Every number comes from results.json beside this
page.</p>
<h2>What was measured</h2>
{_list(findings) if findings else ""}
{_paragraphs([*[LEADING] * bool(costs), tables.seeds_note(summary), *_warnings(results, summary)])}
{tables.html_methods(summary, costs) if costs else ""}
{tables.html_accuracy(summary, "as_is")}
{tables.html_accuracy(summary, "re_estimated")}
<h2>Same seeds, differences</h2>
{_differences(results, summary, "as_is")}
{_differences(results, summary, "re_estimated")}
{_figures(images)}
<h2>How strengths were chosen</h2>
{_paragraphs([RULE, tables.edge_of_choice(summary)])}
{tables.html_ladders(summary)}
<h2>What this does not show</h2>
{_limits(results)}
<h2>How it was made</h2>
{_facts(results)}
</body>
</html>
"""
