"""The README's tables: what they show of results, the verdict on each goal, the markers, and --check."""

import json

import pytest
from benchmark_rows import MARKS, latency

from benchmarks import goals, readme_tables, results, tables
from benchmarks.results import Row


def test_latency_table_names_the_machine_and_what_was_not_measured():
    rows = latency(
        "resnet50", "whole", "bfloat16", 16, {"eager": 200.0, "fused": 80.0, "frozen": 75.0, "compile": 100.0}
    )
    rows += latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "fused": None, "compile": 3.0})
    rows += latency("resnet34", "whole", "float32", 2, {"eager": 4.0, "fused": 2.0})
    text = tables.latency(rows)
    assert "Test CPU (AVX2, AMX, AMX-BF16), 2 threads, Linux x86_64. torch 2.13.0, Triton 3.7.1" in text
    assert "(abc), 2026-01-02." in text
    assert "medians of 5 rounds;" in text
    assert "trusted" not in text
    assert "| resnet50 | whole | bfloat16 | 16 | 200.0 | 100.0 | 80.00 | 75.00 | 2.50x | 0.80x | 0.75x |" in text
    assert (
        "| resnet18 | whole | float32 | 1 | 4.00 | 3.00 | failed | not measured | not measured | not measured |" in text
    )
    assert (
        "| resnet34 | whole | float32 | 2 | 4.00 | not measured | 2.00 | not measured | 2.00x | not measured |" in text
    )
    assert "| resnet50 | layer1-4 | bfloat16 | 16 | not measured | not measured | not measured |" in text


def test_each_machine_has_a_table_of_its_own():
    medians = {"eager": 4.0, "fused": 2.0}
    rows = latency("resnet18", "whole", "float32", 1, medians)
    rows += latency("resnet18", "whole", "float32", 1, medians, cpu="Other CPU", amx="no", commit="def-dirty")
    text = tables.latency(rows)
    assert text.count("| network |") == 2
    first, second = text.split("Other CPU")
    assert first.count("| resnet") == 16, "what the first lacks is said"
    assert second.count("| resnet") == 1
    assert "Other CPU (AVX2, AMX, AMX-BF16, no AMX)" in text
    assert "(def with changes)" in text


def test_disturbed_measurements_are_marked():
    rows = latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "fused": 2.0}, other_cores=0.2)
    assert "trusted" not in tables.latency(rows)
    rows += latency("resnet18", "whole", "float32", 16, {"eager": 4.0, "fused": 2.0}, other_cores=1.3)
    assert "other programs kept up to 1.3 of 2 cores busy in 2 of 4 measurements" in tables.latency(rows)
    photo = DEMO["photos"][0] | {"disturbed": True, "other_cores": 1.3}
    assert "not to be trusted:** others kept 1.3 cores busy" in tables.demo(DEMO | {"photos": [photo]})


def judged(rows):
    """Goal -> (measured, met, applies), by the goal's text up to the colon."""
    return {goal.split(":")[0]: tuple(rest) for goal, *rest in goals.judge(rows)}


def test_goals_say_whether_they_are_met_and_apply():
    whole = {"eager": 200.0, "fused": 80.0, "compile": 100.0}
    rows = latency("resnet50", "whole", "bfloat16", 16, whole)
    rows += latency(
        "resnet50", "layer1-4", "bfloat16", 16, {"eager": 200.0, "fused": 99.0, "frozen": 120.0, "compile": 100.0}
    )
    rows += latency("resnet50", "whole", "bfloat16", 1, {"eager": 10.0, "fused": None, "compile": 5.0})
    rows += latency("resnet50", "whole", "float32", 1, {"eager": 12.0, "fused": 10.0, "compile": 5.0})
    said = judged(rows)
    yes = "yes: the CPU has AMX"
    assert said["resnet50 bfloat16, batch 16, whole"] == ("2.500x", "yes", yes)
    assert said["resnet50 bfloat16, batch 16, layer1-4"] == ("1.200x", "no", yes)
    assert said["resnet50 bfloat16, batch 1, whole"] == ("1 of 1 failed", "no", yes)
    assert said["resnet50 float32, batch 1 and 16, whole"] == ("1.200x; 1 not measured", "not measured", yes)
    everything = "resnet18 float32 and bfloat16, batch 1 and 16, whole and layer1-4"
    assert said[everything] == ("not measured", "not measured", yes)

    for case in goals.AMX_GOALS[-1].cases():
        slow = case.batch == 16 and case.dtype == "float32" and case.part == "whole"
        medians = {"eager": 10.0, "fused": 10.01 if slow else 9.0}
        rows += latency(case.network, case.part, case.dtype, case.batch, medians)
    assert judged(rows)[everything] == ("0.999x (worst of 8)", "no", yes)


def test_goals_of_amx_do_not_apply_without_it():
    rows = latency("resnet50", "whole", "bfloat16", 16, {"eager": 4.0, "fused": 2.0}, amx="no")
    assert judged(rows)["resnet50 bfloat16, batch 16, whole"][1:] == (
        "yes",
        "no: set for a CPU with AMX, which this one lacks",
    )


def test_the_time_to_fuse_includes_the_packing():
    rows = [
        Row(kind, "resnet50", "whole", "fused", dtype, 1, 224, median_ms=ms, p20_ms=ms, p80_ms=ms, rounds=5)
        for dtype, times in (("float32", (400.0, 4700.0)), ("bfloat16", (300.0, 200.0)))
        for kind, ms in zip(("fuse", "packing"), times, strict=True)
    ]
    text = "resnet50 float32 and bfloat16"
    assert judged(rows)[text] == ("5.10 s (worst of 2)", "no", "yes")
    assert judged(rows[2:])[text] == ("0.50 s", "not measured", "yes")
    assert "| resnet50 | float32 | 400.0 | 4700.0 |" in tables.fusing(rows)


def test_memory_table():
    figures = {"state_mib": 49.0, "packed_mib": 44.6, "imports_mib": 220.2, "peak_rss_mib": 501.0}
    rows = results.stamped([Row("memory", "resnet50", "whole", "fused", "bfloat16", 16, 224, **figures)], MARKS)
    rows += results.stamped([Row("memory", "resnet50", "whole", "eager", "float32", 1, 224, "failed")], MARKS)
    text = tables.memory(rows)
    assert "| resnet50 | bfloat16 | 16 | fused | 49 | 45 | 220 | 501 |" in text
    assert "| eager | failed | failed | failed | failed |" in text


DEMO = {
    "machine": {"cpu": "Test CPU", "threads": 2, "torch": "2.13.0", "fused_resblock": "0.1.0", "commit": None},
    "dtype": "float32",
    "device": "cpu",
    "digits": {"count": 450, "eager_accuracy": 0.98, "fused_accuracy": 0.98, "differing": 0, "max_abs_error": 1e-6},
    "photos": [
        {"model": "resnet18", "weights": "random", "batch": 2, "eager_ms": 3.0, "fused_ms": 2.0, "speedup": 1.5}
        | {"max_rel_error": 2e-6, "same_top1": 2, "blocks": [{"fused": True}, {"fused": False}]},
        {"model": "resnet50", "batch": 2},
    ],
}


def test_demo_tables():
    assert "| resnet18 | random | 2 | 1 of 2 | 3.00 | 2.00 | 1.50 | 2.0e-06 | 2 of 2 |" in tables.demo(DEMO)
    assert "| resnet50 |  | 2 | 0 of 0 | not measured | not measured |" in tables.demo(DEMO)
    assert "| fused | 441 of 450 | 98.00% |" in tables.digits(DEMO)
    assert "Test CPU, 2 threads, float32. torch 2.13.0" in tables.digits(DEMO)


def readme(tmp_path, text):
    """A README and a folder of results, with the options that name them."""
    (tmp_path / "README.md").write_text(text)
    return ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]


def test_tables_are_put_between_markers_and_checked(tmp_path, capsys):
    old = "# Title\n<!-- table:cpu -->\nold | figures\n<!-- /table -->\nmiddle\n<!-- table:digits --><br>\nend\n"
    options = readme(tmp_path, old)
    (tmp_path / "results").mkdir()
    rows = latency("resnet18", "whole", "float32", 1, {"eager": 4.0, "fused": 2.0})
    results.Writer(tmp_path / "results" / "cpu.csv").write(rows)
    assert readme_tables.main([*options, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == old
    assert readme_tables.main(options) == 0
    new = (tmp_path / "README.md").read_text()
    assert new.startswith("# Title\n<!-- table:cpu -->\n\nTest CPU")
    assert new.endswith("|\n\n<!-- /table -->\nmiddle\n<!-- table:digits --><br>\nend\n")
    assert "old | figures" not in new
    assert readme_tables.main([*options, "--check"]) == 0
    (tmp_path / "README.md").write_text(new.replace("2.00x", "3.00x"))
    assert readme_tables.main([*options, "--check"]) == 1


def test_every_table_reads_not_measured_without_results(tmp_path):
    text = "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in readme_tables.TABLES)
    assert readme_tables.main(readme(tmp_path, text)) == 0
    assert (tmp_path / "README.md").read_text().count("\n\nnot measured\n\n") == len(readme_tables.TABLES)


def test_other_cpus_have_a_table_of_their_own(tmp_path):
    options = readme(tmp_path, "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in ("cpu", "cpu-others")))
    (tmp_path / "results").mkdir()
    for file, ms in (("cpu.csv", 4.0), ("cpu_old.csv", 8.0)):
        rows = latency("resnet18", "whole", "float32", 1, {"eager": ms, "fused": 2.0})
        results.Writer(tmp_path / "results" / file).write(rows)
    assert readme_tables.main(options) == 0
    first, others, _ = (tmp_path / "README.md").read_text().split("<!-- /table -->\n")
    assert [("2.00x" in table, "4.00x" in table) for table in (first, others)] == [(True, False), (False, True)]


def test_the_demo_is_read_from_its_json(tmp_path):
    options = readme(tmp_path, "<!-- table:demo -->\n<!-- /table -->")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo.json").write_text(json.dumps(DEMO))
    assert readme_tables.main(options) == 0
    assert "| resnet18 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table:gpus -->\n<!-- /table -->",
            "table must be one of cpu, cpu-others, goals, fuse, memory, demo, digits, roofline, stages, basic-block, predictions, l2-rates, activations, codegen, emulate, gpu, gpu-launched, gpu-l2, gpu-goals, gpu-checks, gpu-bytes, got",
        ),
        ("<!-- table:cpu -->\n", "got no <!-- /table --> after table:cpu"),
        ("a\n<!-- /table -->\n", "got <!-- /table --> in line 2"),
        ("<!-- table:cpu -->\n<!-- table:demo -->\n<!-- /table -->", "got <!-- table:demo --> in line 2"),
    ],
    ids=["unknown", "open", "closed", "nested"],
)
def test_markers_that_do_not_fit_are_told(tmp_path, text, message, capsys):
    assert readme_tables.main(readme(tmp_path, text)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_readme_is_told(tmp_path, capsys):
    assert readme_tables.main(["--readme", str(tmp_path / "none.md"), "--check"]) == 2
    assert "none.md" in capsys.readouterr().err
