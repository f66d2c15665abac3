"""Pictures of results: which are drawn, and from which figures."""

from __future__ import annotations

import csv

import pytest
from benchmark_rows import latency
from test_gpu_tables import ROOF

from benchmarks import plots, results

pytest.importorskip("matplotlib")


def test_nothing_is_drawn_without_results(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_what_there_is(tmp_path):
    rows = latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "compile": 3.0, "fused": 2.0})
    results.Writer(tmp_path / "cpu.csv").write(rows)
    with (tmp_path / "roofline.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROOF))
        writer.writeheader()
        writer.writerows([{**ROOF, "block": "l1"}, ROOF])
    plots.main(["--results", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["cpu.png", "roofline.png"]
    assert all(p.stat().st_size > 5000 for p in tmp_path.glob("*.png"))


def test_figures_are_those_of_the_rows():
    rows = latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "fused": 2.0})
    panels, title = plots.cpu(rows)
    assert panels == {"batch 1": {"resnet18 whole float32": {"eager": 4.0, "fused": 2.0}}}
    assert title.startswith("Test CPU, 2 threads")
    other = latency("resnet50", "whole", "float32", 1, {"eager": 9.0}, cpu="Other CPU")
    assert plots.cpu(rows + other) == (panels, title), "machines do not mix"
    panels, title = plots.roofline([{**ROOF, "block": "l1"}, ROOF])
    assert panels[plots.NETWORKS]["resnet50"]["predicted, with stages"] == 3371.4
    assert "measured" not in panels[plots.NETWORKS]["resnet50"]
    assert title.startswith("Floors, predictions")
    panels, _ = plots.roofline([{**ROOF, "measured_us": "2777.8"}])
    assert panels[plots.NETWORKS]["resnet50"]["measured"] == 2777.8


def test_gpu_bars():
    row = {"gpu": "H100", "torch": "2.11", "triton": "3.6", "network": "resnet50", "part": "whole", "batch": "128"}
    row["dtype"] = "fp16"
    graph = {**row, "status": "ok", "provider": "fused+graph", "median_ms": "2.5"}
    panels, title = plots.gpu(
        [graph, {**graph, "provider": "fused"}, {**graph, "status": "failed"}, {**graph, "dtype": "bf16"}]
    )
    assert panels == {"batch 128": {"resnet50": {"fused": 2.5}}}
    assert title == "H100, torch 2.11, Triton 3.6, fp16"
    compiled = [{**graph, "group": "compile", "median_ms": "2.9"}, {**graph, "group": "main"}]
    assert plots.gpu([*compiled, {**compiled[0], "provider": "compile+graph"}])[0] == {
        "batch 128": {"resnet50": {"fused": 2.5, "compile": 2.9}}
    }
