"""The report: rows -> statistics, tables, figures, page; and the committed full demo."""

import base64
import html
import json
import re
import statistics as stdlib
from pathlib import Path

import numpy as np
import pytest

from wcr_fast.experiments import plan
from wcr_fast.report import figures, files, page, statistics, tables

COMMITTED = Path(__file__).resolve().parent.parent / "docs" / "demo" / "results.json"
PNG = b"\x89PNG\r\n\x1a\n"


def make_results(seeds: int = 3) -> dict:
    """Return a small made-up results.json: two methods, two strengths, four sparsities."""
    generator = np.random.default_rng(0)
    methods = {
        "sgd": {"label": "SGD", "knob": "weight decay", "strengths": [0.1, 0.2]},
        "wcr": {"label": "SGD + WCR", "knob": "lam", "strengths": [1e-5, 3e-5]},
    }
    rows = []
    for seed in range(seeds):
        for key, method in methods.items():
            for strength in method["strengths"]:
                correct = {
                    p: {"val": generator.integers(20, 201, 4).tolist(), "test": generator.integers(20, 401, 4).tolist()}
                    for p in statistics.PROTOCOLS
                }
                for curve in correct.values():
                    curve["val"][0] = 198
                rows.append(
                    {
                        "method": key,
                        "strength": strength,
                        "seed": seed,
                        "diverged": False,
                        "warnings": [],
                        "correct": correct,
                        "magnitudes": [1, 2, 3],
                        "seconds": 1.0,
                    }
                )
    results = {
        "schema": files.SCHEMA,
        "made": {"date": "2026-01-01T00:00:00+00:00", "seconds": 9.0, "workers": 2, "threads_per_worker": 1},
        "machine": {"torch": "0.0", "commit": None, "processor": "<a & b>"},
        "plan": {**plan.PLANS["quick"].describe(), "methods": methods, "seeds": list(range(seeds))},
        "data": {"name": "digits", "sizes": {"train": 400, "val": 200, "test": 400}, "net": "conv"},
        "magnitude_edges": [1e-3, 1e-2, 1e-1, 1.0],
        "runs": rows,
    }
    results["plan"]["sparsities"] = [0.0, 0.9, 0.95, 0.98]
    return {**results, "digest": files.digest(results)}


def set_val(results: dict, method: str, strength: float, dense: int, rest: int) -> None:
    for row in results["runs"]:
        if (row["method"], row["strength"]) == (method, strength):
            for curve in row["correct"].values():
                curve["val"] = [dense, rest, rest, rest]


def cells_of(page_text: str, caption: str) -> dict[str, list[str]]:
    """Return row name -> cells of the HTML table with this caption."""
    table = page_text.split(f"<caption>{html.escape(caption)}</caption>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    parsed = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return {html.unescape(first): rest for first, *rest in parsed}


# Statistics ------------------------------------------------------------------------------------------------------


def test_accuracies_are_percent_in_seed_order():
    results = make_results()
    results["runs"].reverse()
    got = statistics.accuracies(results, "wcr", 3e-5, "re_estimated", "test")
    assert got.shape == (3, 4)
    row = next(r for r in results["runs"] if (r["method"], r["strength"], r["seed"]) == ("wcr", 3e-5, 1))
    assert got[1].tolist() == [100 * count / 400 for count in row["correct"]["re_estimated"]["test"]]


def test_mean_and_sample_deviation_of_the_chosen_strength():
    results = make_results()
    summary = statistics.summarise(results)
    values = [
        100 * row["correct"]["as_is"]["test"][2] / 400
        for row in results["runs"]
        if (row["method"], row["strength"]) == ("sgd", summary.chosen["sgd"])
    ]
    curve = summary.test["as_is"]["sgd"]
    assert curve.mean[2] == pytest.approx(stdlib.mean(values))
    assert curve.std[2] == pytest.approx(stdlib.stdev(values))


@pytest.mark.parametrize(
    ("weak", "strong", "expected"),
    [
        ((198, 20), (198, 21), 0.2),  # the higher mean over the sparsities
        ((198, 20), (197, 200), 0.2),  # exactly half a point below the best dense accuracy: within
        ((198, 20), (196, 200), 0.1),  # a whole point below: out, whatever it reaches
        ((198, 20), (198, 20), 0.1),  # a tie: the smaller
    ],
)
def test_the_rule(weak, strong, expected):
    results = make_results()
    set_val(results, "sgd", 0.1, *weak)
    set_val(results, "sgd", 0.2, *strong)
    assert statistics.summarise(results).chosen["sgd"] == expected


def test_the_choice_never_reads_the_test_part():
    results = make_results()
    before = statistics.summarise(results).chosen
    for row in results["runs"]:
        for curve in row["correct"].values():
            curve["test"] = curve["test"][::-1]
    assert statistics.summarise(results).chosen == before


def test_differences_are_paired_by_seed():
    results = make_results()
    summary = statistics.summarise(results)
    a, b = (
        statistics.accuracies(results, key, summary.chosen[key], "as_is", "test")[:, 1].tolist()
        for key in ("wcr", "sgd")
    )
    each = [x - y for x, y in zip(a, b, strict=True)]
    runs = [(key, summary.chosen[key]) for key in ("wcr", "sgd")]
    curve = statistics.differences(results, *runs, "as_is")
    assert curve.mean[1] == pytest.approx(stdlib.mean(each))
    assert curve.std[1] == pytest.approx(stdlib.stdev(each))


def test_diverged_runs_are_counted_and_left_out_of_the_histogram():
    results = make_results()
    chosen = statistics.summarise(results).chosen["sgd"]
    row = next(r for r in results["runs"] if (r["method"], r["strength"]) == ("sgd", chosen))
    row.update(diverged=True, magnitudes=[0, 0, 0], warnings=["too long a step"])
    summary = statistics.summarise(results)
    assert summary.diverged == 1
    assert summary.magnitudes["sgd"] == pytest.approx([100 / 6, 200 / 6, 300 / 6])
    text = page.render_page(results, summary, {})
    assert "1 runs ended with weights that are not finite" in text
    assert f"Warned during training (unstable or odd steps; the texts are in results.json): SGD {chosen:g}." in text


def test_plain_sgd_at_the_common_weight_decay_is_a_reference_unless_chosen():
    results = make_results()
    assert statistics.summarise(results).reference is None
    set_val(results, "sgd", 0.1, 198, 20)
    set_val(results, "sgd", 0.2, 198, 30)
    results["plan"]["weight_decay"] = 0.2
    assert statistics.summarise(results).reference is None
    results["plan"]["weight_decay"] = 0.1
    summary = statistics.summarise(results)
    values = statistics.accuracies(results, "sgd", 0.1, "as_is", "test")
    np.testing.assert_allclose(summary.reference.test["as_is"].mean, values.mean(0))
    text = page.render_page(results, summary, figures.all_figures(summary))
    row = cells_of(text, tables.caption(summary, "as_is"))["SGD, weight decay as the others"]
    assert row == ["0.1", *tables.cells(summary.reference.test["as_is"])]
    assert "SGD + WCR minus SGD, weight decay as the others" in text
    assert "SGD, weight decay as the others (0.1):" in tables.text_table(summary, "as_is")


# Tables and page -------------------------------------------------------------------------------------------------


def test_the_pages_numbers_come_from_the_rows():
    results = make_results()
    summary = statistics.summarise(results)
    text = page.render_page(results, summary, figures.all_figures(summary))
    for protocol in statistics.PROTOCOLS:
        table = cells_of(text, tables.caption(summary, protocol))
        for method, label in summary.labels.items():
            strength, *cells = table[label]
            assert float(strength) == summary.chosen[method]
            for i, cell in enumerate(cells):
                values = [
                    row["correct"][protocol]["test"][i] / 4
                    for row in results["runs"]
                    if (row["method"], row["strength"]) == (method, float(strength))
                ]
                assert cell == f"{stdlib.mean(values):.1f} ± {stdlib.stdev(values):.1f}"


def test_the_page_needs_no_other_file_and_escapes():
    results = make_results()
    summary = statistics.summarise(results)
    images = figures.all_figures(summary)
    text = page.render_page(results, summary, images)
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert not re.search(r"@import|url\(|<script", text)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(data) for data in embedded] == list(images.values())
    assert "&lt;a &amp; b&gt;" in text
    assert "What this does not show" in text
    assert html.escape(statistics.RULE) in text


def test_the_ranking_follows_the_rows():
    results = make_results()
    for row in results["runs"]:
        row["correct"]["as_is"]["test"] = [300 if row["method"] == "wcr" else 200] * 4
    summary = statistics.summarise(results)
    assert tables.ranking(summary, 0.95, "as_is") == (
        "At 95 %, as pruned, from high to low: SGD + WCR 75.0 ± 0.0; SGD 50.0 ± 0.0."
    )


def test_a_choice_at_the_ladders_end_is_named():
    results = make_results()
    set_val(results, "sgd", 0.1, 198, 20)
    set_val(results, "sgd", 0.2, 198, 30)
    text = tables.edge_of_choice(statistics.summarise(results))
    assert "SGD (highest)" in text


def test_one_seed_has_no_deviation():
    results = make_results(seeds=1)
    summary = statistics.summarise(results)
    text = page.render_page(results, summary, figures.all_figures(summary))
    assert "nan" not in text.replace("base64", "").split("<img")[0]
    assert "±" not in tables.text_table(summary, "as_is")
    assert tables.seeds_note(summary).startswith("With one seed")


# Files -----------------------------------------------------------------------------------------------------------


def test_results_json_round_trips_one_run_a_line(tmp_path):
    results = make_results()
    files.write_file(tmp_path / "results.json", files.dump_results(results).encode())
    assert files.load_results(tmp_path / "results.json") == results
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert sum(line.strip().startswith('{"method"') for line in lines) == len(results["runs"])


def test_the_digest_ignores_durations_and_nothing_else_of_a_run():
    results = make_results()
    results["runs"][0]["seconds"] = 99.0
    assert files.digest(results) == results["digest"]
    results["runs"][0]["correct"]["as_is"]["test"][0] += 1
    assert files.digest(results) != results["digest"]


def test_an_edited_file_is_refused(tmp_path):
    results = make_results()
    results["runs"][0]["correct"]["as_is"]["test"][0] += 1
    (tmp_path / "results.json").write_text(files.dump_results(results))
    with pytest.raises(files.UsageError, match="own digest"):
        files.load_results(tmp_path / "results.json")


# The committed full demo -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict:
    return files.load_results(COMMITTED)


def by_hand(results: dict, method: str, strength: float, protocol: str, part: str) -> np.ndarray:
    """Return [seeds, sparsities] in %, read from the JSON without the package's statistics."""
    rows = [r for r in results["runs"] if r["method"] == method and r["strength"] == strength]
    assert sorted(r["seed"] for r in rows) == [0, 1, 2, 3, 4]
    return np.array([r["correct"][protocol][part] for r in rows]) / results["data"]["sizes"][part] * 100


def test_the_committed_demo_is_the_full_plan(committed):
    described = json.loads(json.dumps(plan.PLANS["full"].describe()))
    assert committed["plan"] == described
    assert len(committed["runs"]) == len(plan.PLANS["full"].runs())


def test_the_committed_choice_follows_the_rule(committed):
    chosen = statistics.summarise(committed).chosen
    for method, entry in committed["plan"]["methods"].items():
        val = {
            s: [by_hand(committed, method, s, p, "val").mean(0) for p in ("as_is", "re_estimated")]
            for s in entry["strengths"]
        }
        best = max(curves[0][0] for curves in val.values())
        admitted = {s: np.mean(curves) for s, curves in val.items() if curves[0][0] >= best - 0.5 - 1e-9}
        assert admitted[chosen[method]] == pytest.approx(max(admitted.values()), abs=1e-9)


def test_the_readme_pictures_data_redraws_from_the_committed_results(committed):
    summary = statistics.summarise(committed)
    assert summary.sparsities == list(plan.SPARSITIES)
    for protocol in statistics.PROTOCOLS:
        for method, (mean, lower, upper) in figures.accuracy_curves(summary, protocol).items():
            values = by_hand(committed, method, summary.chosen[method], protocol, "test")
            np.testing.assert_allclose(mean, np.mean(values, 0), atol=1e-9)
            np.testing.assert_allclose(lower, np.maximum(np.mean(values, 0) - np.std(values, 0, ddof=1), 0), atol=1e-9)
            np.testing.assert_allclose(
                upper, np.minimum(np.mean(values, 0) + np.std(values, 0, ddof=1), 100), atol=1e-9
            )


def test_the_picture_itself_is_drawn_from_them(committed):
    image = figures.accuracy_figure(statistics.summarise(committed))
    stored = (COMMITTED.parent / "accuracy.png").read_bytes()
    # Fonts and versions may move pixels: the size is the picture's, and on the committing version it is equal.
    assert image[:24] == stored[:24]
    assert image.startswith(PNG)


def test_the_terminal_table_fits_80_columns(committed):
    summary = statistics.summarise(committed)
    for protocol in statistics.PROTOCOLS:
        lines = tables.text_table(summary, protocol).splitlines()
        assert max(map(len, lines)) <= 80
        assert sum(line.split(" ")[0] in [f"{100 * s:g}" for s in plan.SPARSITIES] for line in lines) == 10
