"""The comparison of all methods: its table, its page, and the record that is committed."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from wcr_fast.experiments import command, methods, plan
from wcr_fast.report import statistics, tables

pytest.importorskip("sklearn", reason="the demo extra is not installed")
pytest.importorskip("matplotlib", reason="the demo extra is not installed")

from benchmarks import methods as benchmark

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = ("sgd", "l1 proximal", "cram+", "sam+wcr")


@pytest.fixture(scope="module")
def results():
    small = dataclasses.replace(plan.PLANS["methods"], steps=(2,), seeds=(0, 1), epochs=1, methods=CHOSEN)
    return command.run_plan(small, workers=2)


def test_table_page_and_record(results, tmp_path):
    text = command.write_report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["digest"] == results["digest"]
    page = (tmp_path / "report.html").read_text()
    for key in CHOSEN:
        assert methods.BY_KEY[key].label in text
        assert methods.BY_KEY[key].label in page
    assert "proximal variants were not tried" not in page
    (tmp_path / "copy").mkdir()
    assert command.write_report(results, tmp_path / "copy") == text.replace(str(tmp_path), str(tmp_path / "copy"))

    costs = statistics.costs(results)
    assert costs["sgd"] == statistics.Cost(1.0, 0.0)
    copies = {"sgd": 0, "l1 proximal": 0, "cram+": 2, "sam+wcr": 1}
    assert {key: round(costs[key].copies) for key in CHOSEN} == copies
    record = benchmark.record_of(results)
    assert json.loads(benchmark.dump(record)) == record
    assert list(record["methods"]) == list(CHOSEN)


def test_the_command_takes_the_runs_of_a_demo(results, tmp_path, capsys):
    command.write_report(results, tmp_path)
    benchmark.main(["--from", str(tmp_path / "results.json"), "--out", str(tmp_path / "record.json")])
    assert "Group" not in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "record.json").read_text()) == benchmark.record_of(results)


def test_figures_show_the_leading_methods(results):
    summary = statistics.summarise(results)
    leading = statistics.leading(summary, 3, tables.METHOD_SPARSITIES)
    assert leading[0] == "sgd"
    assert len(leading) == 3
    columns = [summary.column(s) for s in tables.METHOD_SPARSITIES]
    means = {m: c.mean[columns].mean() for m, c in summary.test["as_is"].items() if m != "sgd"}
    assert min(means[m] for m in leading[1:]) >= max(v for m, v in means.items() if m not in leading)
    drawn = statistics.restricted(summary, leading)
    assert set(drawn.test["re_estimated"]) == set(drawn.strengths) == set(drawn.magnitudes) == set(leading)


def test_the_committed_record_is_the_plan_and_real():
    text = (ROOT / "benchmarks" / "records" / "methods.json").read_text()
    record = json.loads(text)
    assert len(text) < 100_000
    described = json.loads(json.dumps(plan.PLANS["methods"].describe()))
    assert record["plan"] == {key: value for key, value in described.items() if key != "methods"}
    assert list(record["methods"]) == [method.key for method in methods.ALL]
    sparsities = len(record["plan"]["sparsities"])
    for key, row in record["methods"].items():
        ladder = methods.BY_KEY[key].ladder
        assert [float(s) for s in row["validation"]] == pytest.approx(ladder)
        assert row["chosen"] in ladder
        for protocol in statistics.PROTOCOLS:
            curves = [*row["test"][protocol].values(), *(v[protocol] for v in row["validation"].values())]
            assert all(len(c) == sparsities and all(map(math.isfinite, c)) for c in curves), key
            assert all(0.0 <= v <= 100.0 for v in row["test"][protocol]["mean"])
        assert row["test"]["as_is"]["mean"][0] > 90.0, key  # a network that was trained
        assert row["time"] > 0.5
        assert row["copies"] >= 0.0
    assert record["diverged"] >= 0
